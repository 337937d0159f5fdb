"""Rewards: any Python function that says how good texts are (``--reward FILE.py:function``)."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils import InputError, one_line

# Prompts, texts and rows, as many of each -> a number for each text, the larger the better. A
# function with a parameter ``completions`` is called as TRL's GRPOTrainer calls it.
Function = Callable[..., Sequence[float]]
# Columns that TRL gives by other names.
NOT_AS_COLUMNS = ("prompt", "completion", "completion_ids", "messages")
# Means of larger rewards, and their differences over μ, would overflow float32.
LARGEST = 1e30


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
        if file.suffix != ".py" or not file.is_file():
            raise InputError(f"--reward {text}: there is no file {file} that ends in .py")
        spec = importlib.util.spec_from_file_location(f"reward_{file.stem}", file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # Dataclasses and pickle look their module up there.
        with _errors_in_one_line(f"--reward {text}: {file}"):
            spec.loader.exec_module(module)
        function = getattr(module, name, None)
        if not callable(function):
            raise InputError(f"--reward {text}: {file} has no function {name}")
        return cls(file, name, function)

    def __call__(
        self, prompts: Sequence[str], texts: Sequence[str], rows: Sequence[Mapping[str, Any]]
    ) -> list[float]:
        """Return the reward of each text, which follows the prompt made of its row."""
        with _errors_in_one_line(f"--reward: {self.name}"):
            returned = self._call(list(prompts), list(texts), [dict(row) for row in rows])
            unordered = isinstance(returned, str | bytes | Mapping | Set)
            if isinstance(returned, Iterable) and not unordered:
                # One more than there should be: a generator may have no end.
                returned = list(itertools.islice(returned, len(texts) + 1))
        got = type(returned).__name__
        if isinstance(returned, list):
            values = [_number(value) for value in returned]
            if None in values:
                bad = returned[values.index(None)]
                got = f"a list with {bad if isinstance(bad, float) else type(bad).__name__}"
            elif len(values) == len(texts):
                return values
            else:
                got = "more values" if len(values) > len(texts) else f"{len(values)} values"
        raise InputError(
            f"--reward: {self.name} returned {got} for {len(texts)} texts; return a list with a "
            f"number for each, between -{LARGEST:g} and {LARGEST:g}"
        )

    def _call(self, prompts: list[Any], texts: list[Any], rows: list[dict[str, Any]]) -> Any:
        if "completions" not in inspect.signature(self.function).parameters:
            return self.function(prompts, texts, rows)
        if rows and "messages" in rows[0]:
            prompts = [row["messages"] for row in rows]
            texts = [[{"role": "assistant", "content": text}] for text in texts]
        names = [name for name in (rows[0] if rows else ()) if name not in NOT_AS_COLUMNS]
        columns = {name: [row.get(name) for row in rows] for name in names}
        return self.function(prompts=prompts, completions=texts, **columns)


@contextlib.contextmanager
def _errors_in_one_line(what: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit would end the run without a result
        kind = type(error).__name__
        raise InputError(f"{what} raised {kind}: {one_line(error)}") from error


def _number(value: Any) -> float | None:
    """Return a reward as a number; None of a text, and of what float32 could not hold."""
    if isinstance(value, str | bytes):
        return None
    try:
        number = float(value)
    except (Exception, SystemExit):  # TypeError, OverflowError, or torch's RuntimeError
        return None
    return number if abs(number) <= LARGEST else None
