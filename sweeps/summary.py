"""Results of several runs: means over seeds, and which setting is best on the dev set."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# What a setting is averaged over.
SEEDS = ("seed", "data_seed", "train_set_seed")
# Settings that make another problem of it: what is best is asked for each.
PROBLEM = ("task_name", "data_dir", "train_file", "validation_file")

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Measured:
    """A mean, and the sample standard deviation over at least 2 values; None for a single one."""

    mean: float
    deviation: float | None = None

    @classmethod
    def of(cls, values: Sequence[float]) -> Measured:
        """Return the mean of at least one value."""
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), deviation)

    def text(self, form: str = ".4f", plus_minus: str = " ± ") -> str:
        """Return it as it is read."""
        mean = format(self.mean, form)
        return mean if self.deviation is None else mean + plus_minus + format(self.deviation, form)


@dataclass(frozen=True)
class Setting:
    """One setting of a grid, with its runs over seeds.

    Attributes:
        choice: what it chooses of the lists, without seeds.
        names: of its runs.
        results: of its runs; None for those that have not finished.
    """

    choice: dict[str, str]
    names: list[str]
    results: list[Result | None]

    @property
    def is_whole(self) -> bool:
        """Whether all of its runs have finished."""
        return all(result is not None for result in self.results)

    def metric(self, kind: str) -> tuple[str, Measured] | None:
        """Return the name and the values of the first metric of a kind, where there is one."""
        values = [result[kind] for result in self.results if result and kind in result]
        if not values:
            return None
        name = next(iter(values[0]))
        return name, Measured.of([value[name] for value in values])

    def dev_loss(self) -> Measured | None:
        """Return the dev loss of the weights that count, where there is one."""
        losses = [dev_loss(result) for result in self.results if result]
        return Measured.of(losses) if losses and None not in losses else None


def dev_loss(result: Result) -> float | None:
    """Return a result's dev loss: the lowest where the best checkpoint counts, or the last one."""
    found = [loss for run in result.get("runs", [result]) for loss in _losses(run)]
    if not found:
        return None
    return min(found) if result["settings"].get("load_best_model_at_end") else found[-1]


def _losses(run: Result) -> Iterable[float]:
    return [
        loss for loss in run.get("history", {}).get("dev_loss", {}).values() if loss is not None
    ]


def group(
    runs: Iterable[tuple[str, Mapping[str, str], Result | None]],
) -> dict[tuple[str, ...], list[Setting]]:
    """Return the settings of runs, given as name, choice and result, for each problem."""
    problems: dict[tuple[str, ...], dict[tuple, Setting]] = {}
    for name, choice, result in runs:
        problem = tuple(choice[key] for key in PROBLEM if key in choice)
        shown = {key: value for key, value in choice.items() if key not in SEEDS}
        settings = problems.setdefault(problem, {})
        setting = settings.setdefault(tuple(shown.items()), Setting(shown, [], []))
        setting.names.append(name)
        setting.results.append(result)
    return {problem: list(settings.values()) for problem, settings in problems.items()}


def best(settings: Sequence[Setting]) -> Setting | None:
    """Return the setting with the highest dev metric, or the lowest dev loss among equals.

    Only settings whose runs have all finished count. None: there is none with a dev set.
    """

    def rank(setting: Setting) -> tuple[float, float] | None:
        metric, loss = setting.metric("dev_metric"), setting.dev_loss()
        if metric is None and loss is None:
            return None
        by_metric = metric[1].mean if metric else 0.0
        return by_metric, -loss.mean if loss else 0.0

    ranked = [(rank(setting), setting) for setting in settings if setting.is_whole]
    ranked = [(order, setting) for order, setting in ranked if order is not None]
    return max(ranked, key=lambda pair: pair[0])[1] if ranked else None


def shown_choice(choice: Mapping[str, str]) -> str:
    """Return a choice in words."""
    return ", ".join(f"{name} {value}" for name, value in choice.items()) or "the only setting"
