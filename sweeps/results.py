"""Results of runs, read from their files as typed values; nothing named in a file is imported."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from command_line.declarations import NOTHING
from command_line.reading import DECLARED, read_values
from sweeps.grid import Run, hash_of, meaning_of
from utils import InputError, read_json, write_json

# In a sweep's folder: the settings and the command line of each run.
RECORD = "sweep.json"
# Means are taken over these.
SEEDS = ("seed", "data_seed", "train_set_seed")
# Runs of one task that differ in these solve different problems.
DATA = ("data_dir", "train_file", "validation_file", "reward")
# Arguments that tell no settings apart. Of all places, only the model is a setting.
NO_SETTING = {name for name, each in DECLARED.items() if each.decides == NOTHING}
NO_SETTING = NO_SETTING - {"model_name"} | {*SEEDS, "num_train_sets"}
METRICS = ("metric", "dev_metric", "metric_before_training")
NUMBERS = (
    *("forward_passes", "backward_passes", "steps", "trained_parameters"),
    *("train_seconds", "seconds", "peak_memory_mib"),
)
CURVES = ("dev_loss", "dev_metric", "forward_passes", "backward_passes", "seconds")
MISSING = "–"
_FILE_NAME = re.compile(r"[^/\0]{1,200}")


@dataclass(frozen=True)
class Outcome:
    """What a table and a picture show of a run."""

    path: Path  # of its result file, which is not there until the run has finished
    task: str
    metric: str  # the name of the task's metric
    settings: Mapping[str, Any]  # what the run used
    numbers: Mapping[str, float]  # of METRICS, "dev_loss" and NUMBERS what it has, finite
    curves: Mapping[str, Mapping[int, float]]  # of CURVES, the values by step
    is_finished: bool = True
    data: str = ""  # a hash of the files of data, empty if it is not known

    @classmethod
    def of(cls, path: Path, result: Mapping[str, Any], is_finished: bool = True) -> Outcome:
        """Take from a result what has the right type."""
        metrics = {kind: _numbers(result.get(kind)) for kind in METRICS}
        metrics = {kind: values for kind, values in metrics.items() if values}
        numbers = {kind: next(iter(values.values())) for kind, values in metrics.items()}
        numbers |= {name: y for name, y in _numbers(result).items() if name in NUMBERS}
        settings, history = _mapping(result.get("settings")), _mapping(result.get("history"))
        curves = {
            name: {int(x): y for x, y in _numbers(history.get(name)).items() if _is_step(x)}
            for name in CURVES
        }
        if losses := list(curves["dev_loss"].values()):
            numbers["dev_loss"] = losses[-1]
            if settings.get("load_best_model_at_end"):  # by the loss, or by a metric
                step = re.search(r"-([0-9]{1,15})$", str(result.get("checkpoint")))
                numbers["dev_loss"] = curves["dev_loss"].get(step and int(step[1]), min(losses))
        metric = next((next(iter(values)) for values in metrics.values()), "metric")
        settings = {shown(name): value for name, value in settings.items()}
        task, data = shown(result.get("task")), shown(result.get("data", ""))
        return cls(path, task, shown(metric), settings, numbers, curves, is_finished, data)

    def values(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return its values of some settings, as text."""
        return tuple(shown(self.settings.get(name)) for name in names)


def read_outcomes(path: Path, asked_for: Mapping[str, Any] | None = None) -> list[Outcome]:
    """Return the runs of a result file, one for each training set; none if it is no result.

    ``asked_for`` are settings that stand for those that the run used.
    """
    result = read_json(path)
    if not isinstance(result.get("settings"), dict) or not isinstance(result.get("task"), str):
        return []
    runs = result.get("runs")
    sets = [run for run in runs if isinstance(run, dict)] if isinstance(runs, list) else []
    settings = result["settings"] | (asked_for or {})
    found = []
    for run in sets or [{}]:
        seed = {"train_set_seed": run.get("train_set_seed")} if run else {}
        found.append(Outcome.of(path, {**result, **run, "settings": {**settings, **seed}}))
    return found


def read_record(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what a sweep has recorded of each of its runs."""
    runs = _mapping(read_json(folder / RECORD).get("runs"))
    return {n: run for n, run in runs.items() if isinstance(run, dict) and _FILE_NAME.fullmatch(n)}


def with_recorded_names(runs: Sequence[Run], folder: Path) -> list[Run]:
    """Return runs with the names of the recorded ones that mean the same, in whatever order.

    The others get names that the record does not have.
    """
    recorded = read_record(folder)
    names = {}
    for name, run in recorded.items():
        words = run.get("words")
        with contextlib.suppress(InputError):  # an earlier version's words
            names[meaning_of(read_values(words if _are_words(words) else ()))] = name
    named = []
    for run in runs:
        meaning = meaning_of(run.values)
        new = f"{run.name}-{hash_of(meaning)}" if run.name in recorded else run.name
        named.append(replace(run, name=names.get(meaning, new)))
    return named


def record(folder: Path, entries: Mapping[str, Mapping[str, Any]], writes: bool) -> None:
    """Record what the runs are, by their names in the record; those of a larger grid stay.

    Raises:
        InputError: the folder holds another grid; the same grid may grow or shrink.
    """
    recorded = read_record(folder)
    shared = recorded.keys() & entries.keys()
    if len(shared) < min(len(entries), len(recorded)):
        other = next(name for name in recorded if name not in shared)
        raise InputError(f"--output_dir {folder} holds another grid, with {other}; give another")
    if writes:
        write_json(folder / RECORD, {"runs": recorded | dict(entries)})


def read_sweep(folder: Path) -> dict[Path, list[Outcome]]:
    """Return the runs of a sweep by their result files, with the settings that the grid asks for.

    What was used can differ between seeds: fewer examples where some have no correct option.
    """
    found = {}
    for name, run in read_record(folder).items():
        path = folder / f"{name}.json"
        found[path] = read_outcomes(path, _mapping(run.get("settings"))) or [unfinished(path, run)]
    return found


def unfinished(path: Path, run: Mapping[str, Any]) -> Outcome:
    """Return what a sweep's record and the newest checkpoint say of a run without a result yet."""
    states = path.with_name(path.stem).glob("checkpoint-*/trainer_state.json")
    by_step = {state.parent.name.partition("-")[2]: state for state in states}
    newest = max(filter(_is_step, by_step), key=int, default=None)
    log = read_json(by_step[newest]).get("log_history") if newest else None
    rows = [row for row in log if "eval_loss" in _mapping(row)] if isinstance(log, list) else []
    logged = {"dev_loss": "eval_loss", "dev_metric": f"eval_{run.get('metric')}"}
    history = {
        name: {str(row.get("step")): row.get(logged.get(name, name)) for row in rows}
        for name in CURVES
    }
    return Outcome.of(path, {**run, "history": history}, is_finished=False)


def shown(value: Any) -> str:
    """Return a setting in one line, as a user types it: 1e-4, 0.01, 5."""
    if value is None:
        return MISSING
    if isinstance(value, float):
        is_small = 0 < abs(value) < 0.01
        exact = Decimal(repr(value)).normalize()
        return format(exact, "e") if is_small else repr(value).removesuffix(".0")
    # Newlines, a terminal's controls and what is no UTF-8 become escapes.
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(value))


def differing_settings(outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    """Return the settings in which runs of the same task differ.

    A setting that only some of the runs have, such as a trainer's own, must differ among those.
    """
    values: dict[str, dict[str, set[str]]] = {}
    for each in outcomes:
        for name, value in each.settings.items():
            if name not in NO_SETTING:
                values.setdefault(name, {}).setdefault(each.task, set()).add(shown(value))
    return tuple(n for n, tasks in values.items() if any(len(v) > 1 for v in tasks.values()))


def with_names(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return runs with short names of their models, and with tasks' names that tell data apart.

    A task whose runs have different data has these in its name; files of one name and different
    contents are told apart by their hash.
    """
    names: dict[str, set[tuple[str, ...]]] = {}
    contents: dict[tuple[str, ...], set[str]] = {}
    for each in outcomes:
        data = each.values(DATA)
        names.setdefault(each.task, set()).add(data)
        contents.setdefault((each.task, *data), set()).add(each.data)
    models = short_models(each.values(["model_name"])[0] for each in outcomes)
    named = []
    for each in outcomes:
        data, words = each.values(DATA), [each.task]
        if len(names[each.task]) > 1:
            words += [value for value in data if value != MISSING]
        if len(contents[each.task, *data] - {""}) > 1:
            words += [each.data]
        settings = dict(each.settings)
        if settings.get("model_name"):
            settings["model_name"] = models[shown(settings["model_name"])]
        named.append(replace(each, task=" ".join(filter(None, words)), settings=settings))
    return named


def short_models(names: Iterable[str]) -> dict[str, str]:
    """Return models' names without folder and ``.gguf``; whole ones where two would be the same."""
    found = {name: name.rstrip("/").rpartition("/")[2].removesuffix(".gguf") for name in names}
    return found if len({*found.values()}) == len(found) else {name: name for name in found}


def _are_words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _numbers(value: Any) -> dict[str, float]:
    """Return the finite numbers in a mapping."""
    return {
        name: number
        for name, number in _mapping(value).items()
        if type(number) in (int, float) and abs(number) < 1e300
    }


def _is_step(text: str) -> bool:
    return re.fullmatch(r"[0-9]{1,15}", text) is not None
