"""The files of methods.py: what all runs of a file share, and a line for each measurement."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from filelock import FileLock

from utils import InputError, read_json, write_text_atomically

# What decides the figures of a method and a seed, and its value in the oldest files.
SHARED = {
    "model": None,
    "task": None,
    "dtype": "float32",
    "pool": None,
    "objective": "task",
    "max_length": 512,
}


def read_file(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return what all runs of a file share, and its runs; a loss that was not finite as infinity.

    Raises:
        InputError: it is no file of methods.py.
    """
    content = read_json(path)
    if not isinstance(content.get("runs"), list):
        raise InputError(f"{path} is no file of benchmarks/methods.py --output")
    for run in content["runs"]:
        for row in run["curve"]:
            row["loss"] = math.inf if row["loss"] is None else row["loss"]
    return {name: content.get(name, value) for name, value in SHARED.items()}, content["runs"]


def read_runs(path: Path, shared: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the runs of a file that more of the same may be added to; none if it is not there.

    Raises:
        InputError: its runs share something else.
    """
    if not path.exists():
        return []
    found, runs = read_file(path)
    differences = [
        f"{name} {found[name]}, not {shared[name]}"
        for name in SHARED
        if found[name] != shared[name]
    ]
    if differences:
        raise InputError(
            f"--output {path} holds runs with {'; '.join(differences)}: give another file"
        )
    return runs


def add_run(path: Path, shared: dict[str, Any], run: dict[str, Any]) -> list[dict[str, Any]]:
    """Add a run to a file, unless another process has added it; returns the file's runs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    with FileLock(lock):
        runs = read_runs(path, shared)
        if (run["method"], run["seed"]) not in [(each["method"], each["seed"]) for each in runs]:
            runs.append(run)
            _write(path, shared, runs)
        lock.unlink()  # before the release: filelock takes no file that is gone
    return runs


def _write(path: Path, shared: dict[str, Any], runs: list[dict[str, Any]]) -> None:
    text = json.dumps(shared, ensure_ascii=False, allow_nan=False)[:-1] + ', "runs": [\n'
    lines = []
    for run in runs:
        rows = [
            json.dumps({name: _short(value) for name, value in r.items()}) for r in run["curve"]
        ]
        rest = json.dumps({name: value for name, value in run.items() if name != "curve"})
        lines.append(rest[:-1] + ', "curve": [\n  ' + ",\n  ".join(rows) + "\n]}")
    write_text_atomically(path, text + ",\n".join(lines) + "\n]}\n")


def _short(value: Any) -> Any:
    """Return a number with the digits that mean something; None for what JSON cannot hold."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None
