"""Rewards: any Python function that says how good texts are (``--reward FILE.py:function``)."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from utils import InputError, one_line

# Prompts, texts and rows, as many of each -> a number for each text, the larger the better.
Function = Callable[[list[str], list[str], list[dict[str, Any]]], Sequence[float]]


@dataclass(frozen=True)
class Reward:
    """A function of a file."""

    file: Path
    name: str
    function: Function = field(compare=False)

    @classmethod
    def load(cls, text: str) -> Reward:
        """Load ``FILE.py:function``; runs the file."""
        path, _, name = text.rpartition(":")
        file = Path(path)
        if not path or not name.isidentifier():
            raise InputError(f"--reward {text}: give FILE.py:function")
        if not file.is_file():
            raise InputError(f"--reward {text}: there is no file {file}")
        module = _imported(file, text)
        function = getattr(module, name, None)
        if not callable(function):
            raise InputError(f"--reward {text}: {file} has no function {name}")
        return cls(file, name, function)

    def __call__(
        self, prompts: Sequence[str], texts: Sequence[str], rows: Sequence[Mapping[str, Any]]
    ) -> list[float]:
        """Return the reward of each text, which follows the prompt made of its row."""
        try:
            returned = self.function(list(prompts), list(texts), [dict(row) for row in rows])
        except (Exception, SystemExit) as error:
            kind = type(error).__name__
            raise InputError(f"--reward: {self.name} raised {kind}: {one_line(error)}") from error
        values = _numbers(returned)
        if values and len(values) == len(texts) and all(map(math.isfinite, values)):
            return values
        got = type(returned).__name__
        if values is not None:
            got = next((str(v) for v in values if not math.isfinite(v)), f"{len(values)} values")
        raise InputError(
            f"--reward: {self.name} returned {got} for {len(texts)} texts; return a list with a "
            "finite number for each"
        )


def _imported(file: Path, text: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"reward_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise InputError(f"--reward {text}: {file} is no Python file; its name ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Dataclasses and pickle look their module up there.
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        kind = type(error).__name__
        raise InputError(
            f"--reward {text}: {file} does not import ({kind}: {one_line(error)})"
        ) from error
    return module


def _numbers(returned: Any) -> list[float] | None:
    """Return what a function returned as numbers; None for texts, mappings and the like."""
    if not isinstance(returned, Iterable) or isinstance(returned, str | bytes | Mapping | set):
        return None
    try:
        return [float(value) for value in returned]
    except (TypeError, ValueError, OverflowError):
        return None
