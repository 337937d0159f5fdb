"""Rewards: any Python function that says how good texts are (``--reward FILE.py:function``)."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils import InputError, one_line

# Prompts, texts and rows, as many of each -> a number for each text, the larger the better.
Function = Callable[[list[str], list[str], list[dict[str, Any]]], Sequence[float]]


@dataclass(frozen=True)
class Reward:
    """A function of a file.

    Attributes:
        file: that it is from.
        name: of the function.
        function: itself.
    """

    file: Path
    name: str
    function: Function = field(compare=False)

    @classmethod
    def load(cls, text: str) -> Reward:
        """Load ``FILE.py:function``; runs the file.

        Raises:
            InputError: there is no such file or function, or the file does not import.
        """
        place, _, name = text.rpartition(":")
        file = Path(place)
        if not place or not name.isidentifier():
            raise InputError(f"--reward {text}: give FILE.py:function")
        if not file.is_file():
            raise InputError(f"--reward {text}: there is no file {file}")
        spec = importlib.util.spec_from_file_location(f"reward_{file.stem}", file)
        if spec is None or spec.loader is None:
            raise InputError(f"--reward {text}: {file} is no Python file; its name ends in .py")
        module = importlib.util.module_from_spec(spec)
        # Dataclasses and pickle look their module up there.
        sys.modules[spec.name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            kind = type(error).__name__
            raise InputError(
                f"--reward {text}: {file} does not import ({kind}: {one_line(error)})"
            ) from error
        function = getattr(module, name, None)
        if not callable(function):
            known = [key for key, value in vars(module).items() if _is_own(value, spec.name)]
            there = f"it has {', '.join(known)}" if known else "it has no function"
            raise InputError(f"--reward {text}: {file} has no function {name}; {there}")
        return cls(file, name, function)

    def __call__(
        self, prompts: Sequence[str], texts: Sequence[str], rows: Sequence[Mapping[str, Any]]
    ) -> list[float]:
        """Return the reward of each text, which follows the prompt made of its row.

        Raises:
            InputError: the function raises, or returns something else than a number for each.
        """
        try:
            returned = self.function(list(prompts), list(texts), [dict(row) for row in rows])
        except Exception as error:
            kind = type(error).__name__
            raise InputError(f"--reward: {self.name} raised {kind}: {one_line(error)}") from error
        try:
            values = [float(value) for value in returned]
        except (TypeError, ValueError) as error:
            raise self._wrong(type(returned).__name__, len(texts)) from error
        if len(values) != len(texts):
            raise self._wrong(f"{len(values)} values", len(texts))
        return values

    def _wrong(self, got: str, wanted: int) -> InputError:
        return InputError(
            f"--reward: {self.name} returned {got} for {wanted} texts; return a list with a number "
            "for each"
        )


def _is_own(value: Any, module: str) -> bool:
    return callable(value) and getattr(value, "__module__", None) == module
