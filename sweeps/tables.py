"""Means over seeds: as a table, and to choose the best setting."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import pandas as pd

from sweeps.results import METRICS, MISSING, NUMBERS, SEEDS, Outcome, differing_settings
from utils import InputError

# What the cells can show, and its format.
FORMS = {**dict.fromkeys((*METRICS, "dev_loss"), ".4f"), **dict.fromkeys(NUMBERS, ",.0f")}
COLUMNS = ("task", "seed")
Escape = Callable[[str], str]


class Table(NamedTuple):
    """A row for each setting, a column for each task or seed."""

    settings: pd.DataFrame  # the values of the settings that differ, as text
    # By title and kind: "mean", "std", the "count" of runs that have the number, the "size" of all
    # runs, "is_whole": all runs of the row and its task have finished.
    numbers: dict[tuple[str, str], pd.DataFrame]


def make_table(
    outcomes: Sequence[Outcome], by: str = "task", kind: str = "metric", also: Sequence[str] = ()
) -> Table:
    """Arrange runs; those without a result have empty cells.

    Raises:
        InputError: no run has a result, a column would hold several tasks, two runs have the same
            settings and seed, or none has what is to be shown.
    """
    finished = [each for each in outcomes if each.is_finished]
    if not finished:
        raise InputError("no run has a result yet: wait for the first")
    tasks = ", ".join(dict.fromkeys(each.task for each in outcomes))
    if by == "seed" and tasks != outcomes[0].task:
        way_out = "give --columns task, or the files of one task"
        raise InputError(f"result files of different tasks ({tasks}) in one column: {way_out}")
    _check_distinct(finished)
    names = differing_settings(outcomes)
    rows = list(dict.fromkeys(each.values(names) for each in outcomes))
    found = [each.numbers if each.is_finished else {} for each in outcomes]
    runs = pd.DataFrame(found, range(len(found)), dtype=float)
    titles = pd.Series([each.task if by == "task" else seed_title(each) for each in outcomes])
    for name in (kind, *also):
        if name not in runs:
            losses = "train with --num_dev and --eval_strategy"
            way_out = losses if name == "dev_loss" else "give another name"
            raise InputError(f"none of the {len(finished)} results has {name}: {way_out}")
    runs["row"] = [rows.index(each.values(names)) for each in outcomes]
    runs["task"] = [each.task for each in outcomes]
    runs["is_finished"] = [each.is_finished for each in outcomes]
    runs["is_whole"] = runs.groupby(["row", "task"])["is_finished"].transform("all")
    shown = titles[runs["is_finished"]].unique()
    columns = {(title, kind): runs[titles == title] for title in shown}
    for name in also:
        if by == "seed":
            columns[name, name] = runs
            continue
        for title in shown:  # numbers of different tasks have no mean
            columns[f"{title} {name}" if len(shown) > 1 else name, name] = runs[titles == title]
    numbers = {}
    for (title, name), chosen in columns.items():
        by_row = chosen.groupby("row")
        values = by_row[name].agg(["mean", "std", "count", "size"])
        values["is_whole"] = by_row["is_whole"].all()
        # A mean over only some of the finished runs would mislead.
        values.loc[values["count"] < by_row["is_finished"].sum(), "mean"] = float("nan")
        numbers[title, name] = values.reindex(range(len(rows)))
    return Table(pd.DataFrame(rows, range(len(rows)), list(names)), numbers)


def _check_distinct(outcomes: Sequence[Outcome]) -> None:
    """Raise InputError, which names two files, if runs have the same settings and seeds."""
    names, first = differing_settings(outcomes), {}
    for each in outcomes:
        same = first.setdefault((each.task, *each.values((*names, *SEEDS))), each)
        if same is not each:
            raise InputError(
                f"{same.path} and {each.path} have the same settings and seed: give one of them"
            )


def texts(table: Table, percent: bool, plus_minus: str, bold: str, escape: Escape) -> pd.DataFrame:
    """Return every cell as text; the best of the rows whose runs have all finished are bold.

    The others say how many runs their mean is of.
    """
    texts = table.settings.map(escape).rename(columns=escape)
    for (title, kind), values in table.numbers.items():
        factor, form = (100, ".1f") if percent and kind in METRICS else (1, FORMS[kind])
        numbers = (values[["mean", "std"]] * factor).map(lambda n, form=form: format(n, form))
        means, deviations, is_there = numbers["mean"], numbers["std"], values["mean"].notna()
        # A deviation that reads 0 says nothing; over one run there is none.
        is_shown = (values["count"] > 1) & (deviations != format(0, form))
        cells = means.where(~is_shown, means + plus_minus + deviations)
        is_short = is_there & (values["count"] < values["size"])
        cells = cells.where(~is_short, cells + values["count"].map(" (n = {:.0f})".format))
        competes = is_there & values["is_whole"].eq(True)  # rows without a run have NaN
        if kind in (*METRICS, "dev_loss") and means[competes].nunique() > 1:
            find_best = pd.Series.idxmin if kind == "dev_loss" else pd.Series.idxmax
            best = means[find_best(values["mean"].where(competes))]
            cells = cells.where(~competes | (means != best), cells.map(bold.format))
        texts[escape(title)] = cells.where(is_there, MISSING)
    return texts


def remark(table: Table) -> str:
    """Return how many runs a mean is of."""
    counts = pd.concat([values["count"] for values in table.numbers.values()])
    fewest, most = int(counts[counts > 0].min()), int(counts.max())
    if most == 1:
        return "Single runs."
    number = f"{most}" if fewest == most else f"{fewest} to {most}"
    return f"Mean ± standard deviation of {number} runs."


def seed_title(outcome: Outcome) -> str:
    """Return the seeds of a run; those that equal the first are left out."""
    seeds = zip(SEEDS, outcome.values(SEEDS), strict=True)
    named = [(name, value) for name, value in seeds if value != MISSING] or [("seed", MISSING)]
    others = [f"{name} {value}" for name, value in named if value != named[0][1]]
    return ", ".join([f"seed {named[0][1]}", *others])


def markdown(table: Table, percent: bool) -> str:
    """Return the table in Markdown, with columns that stand below each other in a terminal."""
    cells = texts(table, percent, " ± ", "**{}**", _for_markdown)
    lines = [list(cells.columns), *cells.to_numpy().tolist()]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    text = "".join(f"| {' | '.join(map(str.ljust, line, widths))} |\n" for line in lines)
    return f"{text}\n{remark(table)}\n"


def latex(table: Table, percent: bool) -> str:
    """Return the table in LaTeX, with the rules of booktabs."""
    cells = texts(table, percent, " $\\pm$ ", "\\textbf{{{}}}", _for_latex).replace(MISSING, "--")
    form = "l" * table.settings.shape[1] + "r" * len(table.numbers)
    text = cells.to_latex(index=False, escape=False, column_format=form)
    return f"{text}% {remark(table)}\n"


def comma_separated(table: Table, percent: bool) -> str:
    """Return the table as CSV: mean, standard deviation and number of runs, unrounded."""
    cells = table.settings.map(_for_spreadsheets).rename(columns=_for_spreadsheets)
    for (title, kind), values in table.numbers.items():
        factor = 100 if percent and kind in METRICS else 1
        title = _for_spreadsheets(title)
        cells[title], cells[f"{title}_std"] = values["mean"] * factor, values["std"] * factor
        cells[f"{title}_runs"] = values["count"].fillna(0).astype(int)
    return cells.to_csv(index=False)


FORMATS = {"markdown": markdown, "latex": latex, "csv": comma_separated}


def _for_markdown(text: str) -> str:
    return re.sub(r"([\\|*`<])", r"\\\1", text)


LATEX = {character: f"\\{character}" for character in "_%&#${}"}
# A row that begins with * or [ would be an argument of the \\ before it.
LATEX |= {character: f"{{{character}}}" for character in "*[]"}
LATEX |= {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}"}
LATEX |= {"|": r"\textbar{}", "<": r"\textless{}", ">": r"\textgreater{}"}


def _for_latex(text: str) -> str:
    return text.translate(str.maketrans(LATEX))


def _for_spreadsheets(text: str) -> str:
    """Return text that no spreadsheet takes for a formula; numbers stay."""
    is_number = re.fullmatch(r"[+-]?[\d.]+(e[+-]?\d+)?", text)
    return f"'{text}" if text.lstrip().startswith(tuple("=+-@")) and not is_number else text


def best(outcomes: Sequence[Outcome]) -> Iterator[tuple[str, list[Outcome], str]]:
    """Yield for each task its name, the runs of its best setting, and their means in words.

    The highest mean dev metric wins, among equal ones the lowest dev loss. A setting counts if all
    of its runs have finished. Without a best setting there are no runs, and the words say why.
    """
    names = differing_settings(outcomes)
    for task in dict.fromkeys(each.task for each in outcomes):
        settings: dict[tuple[str, ...], list[Outcome]] = {}
        for each in outcomes:
            if each.task == task:
                settings.setdefault(each.values(names), []).append(each)
        whole = [runs for runs in settings.values() if all(each.is_finished for each in runs)]
        means = pd.DataFrame([_numbers(runs).mean(skipna=False) for runs in whole])
        if not whole:
            yield task, [], "no setting has finished with all of its seeds"
        elif means[["dev_metric", "dev_loss"]].isna().all(axis=None):
            yield task, [], "no run has a dev set (--num_dev) to choose by"
        else:
            order = means.sort_values(["dev_metric", "dev_loss"], ascending=[False, True]).index
            yield task, whole[order[0]], in_words(whole[order[0]])


def in_words(runs: Sequence[Outcome]) -> str:
    """Return the mean dev metric, test metric and dev loss of runs."""
    metric, numbers = runs[0].metric, _numbers(runs)
    titles = {"dev_metric": f"dev {metric}", "metric": f"test {metric}", "dev_loss": "dev loss"}
    words = []
    for kind, title in titles.items():
        mean, deviation = numbers[kind].mean(skipna=False), numbers[kind].std()
        spread = f" ± {deviation:.4f}" if deviation >= 5e-5 else ""
        words += [f"{title} {mean:.4f}{spread}"] if mean == mean else []
    return ", ".join([*words, *([f"{len(runs)} runs"] if len(runs) > 1 else [])])


def _numbers(runs: Sequence[Outcome]) -> pd.DataFrame:
    return pd.DataFrame([each.numbers for each in runs], columns=list(FORMS), dtype=float)
