"""Results as a table: a row for each setting, a column for each task or seed, means over seeds."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from command_line.settings import NOT_OF_THE_RESULT
from sweeps.summary import SEEDS, Measured, Result, dev_loss
from utils import InputError

# Of places only the model is a setting; the data are a task.
NO_SETTING = {*NOT_OF_THE_RESULT, *SEEDS, "num_train_sets"} - {"model_name"}
NUMBERS = (
    *("forward_passes", "backward_passes", "steps", "trained_parameters"),
    *("train_seconds", "seconds", "peak_memory_mib"),
)
# What a table can show of a result, and how.
FORMS = {
    **dict.fromkeys(("metric", "dev_metric", "metric_before_training", "dev_loss"), ".4f"),
    **dict.fromkeys(NUMBERS, ",.0f"),
}
COLUMNS = ("task", "seed")


@dataclass(frozen=True)
class Loaded:
    """A run's result and the file that it is from; one of several sets counts by itself.

    Attributes:
        is_finished: whether it is a result; otherwise it is what a running run has saved.
    """

    path: Path
    result: Result
    is_finished: bool = True

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings that were used."""
        return self.result["settings"]

    @property
    def seeds(self) -> tuple[Any, ...]:
        """What tells it from other runs of its setting."""
        return tuple(self.settings.get(name) for name in SEEDS)

    def value(self, name: str) -> float | None:
        """Return one of ``FORMS``, of metrics the first; None if it has none."""
        if name == "dev_loss":
            return dev_loss(self.result)
        value = self.result.get(name)
        return next(iter(value.values())) if isinstance(value, Mapping) else value


@dataclass
class Row:
    """One setting.

    Attributes:
        settings: its values of the settings that differ.
        cells: by column, its runs.
    """

    settings: tuple[Any, ...]
    cells: dict[str, list[Loaded]] = field(default_factory=dict)

    def runs(self) -> list[Loaded]:
        """Return its runs in all columns."""
        return list(itertools.chain(*self.cells.values()))


@dataclass(frozen=True)
class Table:
    """Rows and columns of runs, before anything is averaged.

    Attributes:
        names: of the settings that differ.
        columns: tasks or seeds.
        rows: in the order of the files.
        shown: what its cells are, one of ``FORMS``.
        also: further columns behind them.
    """

    names: tuple[str, ...]
    columns: tuple[str, ...]
    rows: list[Row]
    shown: str = "metric"
    also: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        loaded: Sequence[Loaded],
        by: str = "task",
        shown: str = "metric",
        also: Sequence[str] = (),
    ) -> Table:
        """Arrange finished runs.

        Raises:
            InputError: there is none, a column would hold several tasks, two runs are of the same
                setting and seed, or none has what is to be shown.
        """
        loaded = [each for each in loaded if each.is_finished]
        if not loaded:
            raise InputError("no run has a result yet: wait for the first")
        tasks = list(dict.fromkeys(each.result["task"] for each in loaded))
        if by == "seed" and len(tasks) > 1:
            raise InputError(
                f"result files of different tasks ({', '.join(tasks)}) in one column: give "
                "--columns task, or the files of one task"
            )
        for name in (shown, *also):
            if all(each.value(name) is None for each in loaded):
                raise InputError(f"none of the {len(loaded)} results has {name}: give another name")
        names = differing_settings(loaded)
        rows: dict[tuple, Row] = {}
        columns: dict[str, None] = {}
        for each in loaded:
            settings = tuple(_hashable(each.settings.get(name)) for name in names)
            row = rows.setdefault(settings, Row(settings))
            column = each.result["task"] if by == "task" else _seed_name(each)
            columns[column] = None
            cell = row.cells.setdefault(column, [])
            same = next((o for o in cell if o.seeds == each.seeds), None)
            if same:
                raise InputError(
                    f"{same.path} and {each.path} are of the same settings and seed: give one of "
                    "them"
                )
            cell.append(each)
        return cls(names, tuple(columns), list(rows.values()), shown, tuple(also))

    def head(self) -> list[str]:
        """Return the names of the columns."""
        return [*self.names, *self.columns, *self.also]

    def values(self) -> Iterator[tuple[list[str], list[Measured | None]]]:
        """Yield each row's settings, and its means, those of ``also`` over all columns."""
        for row in self.rows:
            cells = [measured(row.cells.get(name, []), self.shown) for name in self.columns]
            cells += [measured(row.runs(), name) for name in self.also]
            yield [shown_setting(value) for value in row.settings], cells

    def remark(self) -> str:
        """Return how many runs a mean is of."""
        counts = sorted({len(runs) for row in self.rows for runs in row.cells.values()})
        if counts == [1]:
            return "Single runs."
        number = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
        return f"Mean ± standard deviation of {number} runs."


def differing_settings(loaded: Sequence[Loaded]) -> tuple[str, ...]:
    """Return the names of the settings in which runs of the same task differ.

    A setting that only some runs have, as those of one trainer, has to differ among those.
    """
    names = dict.fromkeys(name for each in loaded for name in each.settings)
    values: dict[str, dict[str, set]] = {name: {} for name in names if name not in NO_SETTING}
    for each in loaded:
        for name, by_task in values.items():
            # Without h it has no dtype, which is no choice.
            has_none = name == "hessian_dtype" and each.settings.get(name) is None
            if name in each.settings and not has_none:
                value = _hashable(each.settings[name])
                by_task.setdefault(each.result["task"], set()).add(value)
    differing = [
        name
        for name, by_task in values.items()
        if any(len(found) > 1 for found in by_task.values())
    ]
    return tuple(differing)


def measured(runs: Sequence[Loaded], name: str) -> Measured | None:
    """Return the mean of what runs have under a name; None if no run has it."""
    values = [value for run in runs if (value := run.value(name)) is not None]
    return Measured.of(values) if values else None


def shown_setting(value: Any) -> str:
    """Return a value as it may be typed."""
    if value is None:
        return "–"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _hashable(value: Any) -> Any:
    return value if isinstance(value, str | float | int | bool | None) else str(value)


def _seed_name(each: Loaded) -> str:
    named = zip(SEEDS, each.seeds, strict=True)
    # The seed alone, where the others go with it or are not set.
    distinct = dict.fromkeys(str(value) for _, value in named if value is not None)
    return f"seed {'/'.join(distinct) or '–'}"


# ----------------------------------------------------------------------------------- as a text


def markdown(table: Table, percent: bool = False) -> str:
    """Return the table in Markdown."""
    lines = [table.head(), ["---"] * len(table.head())]
    lines += [_row(table, settings, cells, percent, " ± ") for settings, cells in table.values()]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"{text}\n{table.remark()}\n"


def latex(table: Table, percent: bool = False) -> str:
    """Return the table in LaTeX, with the rules of booktabs."""
    form = "l" * len(table.names) + "r" * (len(table.columns) + len(table.also))
    lines = [f"\\begin{{tabular}}{{{form}}}", "\\toprule"]
    lines += [f"{' & '.join(map(_for_latex, table.head()))} \\\\", "\\midrule"]
    for settings, cells in table.values():
        row = _row(table, [_for_latex(text) for text in settings], cells, percent, " $\\pm$ ")
        lines.append(f"{' & '.join(row)} \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", f"% {table.remark()}", ""])


def comma_separated(table: Table, percent: bool = False) -> str:
    """Return the table as CSV: of each column the mean, the standard deviation and the number."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    heads = [f"{name}{end}" for name in table.head()[len(table.names) :] for end in ("", "_std")]
    writer.writerow([*table.names, *heads, "runs"])
    for row, (settings, cells) in zip(table.rows, table.values(), strict=True):
        factors = _factors(table, percent)
        numbers = [
            "" if number is None else repr(number * factor)
            for cell, factor in zip(cells, factors, strict=True)
            for number in ((cell.mean, cell.deviation) if cell else (None, None))
        ]
        writer.writerow([*settings, *numbers, len(row.runs())])
    return file.getvalue()


FORMATS = {"markdown": markdown, "latex": latex, "csv": comma_separated}


def _row(
    table: Table,
    settings: list[str],
    cells: Sequence[Measured | None],
    percent: bool,
    plus_minus: str,
) -> list[str]:
    names = [table.shown] * len(table.columns) + list(table.also)
    factors = _factors(table, percent)
    shown = []
    for cell, name, factor in zip(cells, names, factors, strict=True):
        form = ".1f" if factor == 100 else FORMS[name]
        deviation = None if cell is None or cell.deviation is None else cell.deviation * factor
        shown.append(
            Measured(cell.mean * factor, deviation).text(form, plus_minus) if cell else "–"
        )
    return [*settings, *shown]


def _factors(table: Table, percent: bool) -> list[int]:
    names = [table.shown] * len(table.columns) + list(table.also)
    return [100 if percent and "metric" in name else 1 for name in names]


def _for_latex(text: str) -> str:
    escaped = {"\\": "\\textbackslash{}", "–": "--"}
    escaped |= {character: f"\\{character}" for character in "_%&#${}"}
    return "".join(escaped.get(character, character) for character in text)
