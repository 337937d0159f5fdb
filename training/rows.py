"""Rows of a journal, and their lines: JSON with a checksum; values come back in their types."""

from __future__ import annotations

import functools
import json
import math
import reprlib
import types
import typing
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any

from utils import one_line
from zeroth_order.config import HiZOOConfig, check_settings

VERSION = 3


def check_step(step: int) -> None:
    """Raise ValueError if a number of steps is negative."""
    if step < 0:
        raise ValueError(f"step must be at least 0, not {step}")


@dataclass(frozen=True)
class Group:
    """The names of weights with the same weight decay."""

    weight_decay: float
    parameters: tuple[str, ...]

    def __post_init__(self) -> None:
        check_settings(vars(self))


@dataclass(frozen=True)
class Header:
    """What a run began with; ``settings`` are for comparison only."""

    version: int
    noise: int  # version of u
    step: int  # steps that were done before the first row
    max_steps: int
    start: str  # checksum of the trained weights before the first row
    groups: tuple[Group, ...]
    layerwise: bool
    optimizer: HiZOOConfig
    # Its name, and the SHA-256 of its files.
    model: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_step(self.step)
        names = [name for group in self.groups for name in group.parameters]
        if not names or len(names) > len(set(names)):
            raise ValueError("its groups must have parameters, each of them once")


@dataclass(frozen=True)
class Row:
    """What was written when ``step`` steps were done."""

    step: int

    def __post_init__(self) -> None:
        check_step(self.step)


@dataclass(frozen=True)
class Step(Row):
    """One step; ``step`` counts those that were done before it."""

    lr: float  # k where it is "auto"
    losses: tuple[tuple[float, ...], ...]  # of each batch, in the order of its forward passes
    weights: tuple[float, ...]  # what each batch counts
    g: float | None = None
    c: float | None = None  # None: not measured
    eta: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings({"lr": self.lr})
        if not all(0 <= weight < math.inf for weight in self.weights):
            raise ValueError("a weight must be at least 0 and finite")
        if not self.losses or len(self.losses) != len(self.weights):
            raise ValueError(f"{len(self.losses)} batches and {len(self.weights)} weights")


@dataclass(frozen=True)
class Scale(Row):
    """The μ that "auto" has chosen."""

    eps: float

    def __post_init__(self) -> None:
        check_settings(vars(self))
        if self.step != 0:
            raise ValueError(f"step {self.step}: μ is chosen before the first step")


@dataclass(frozen=True)
class Checksum(Row):
    """A checksum of the trained weights."""

    checksum: str


KINDS = {each.__name__.lower(): each for each in (Header, Step, Scale, Checksum)}


# ------------------------------------------------------------------------------------ as lines


def line_of(row: Header | Row) -> bytes:
    """Return a row as a line."""
    text = json.dumps({"kind": type(row).__name__.lower(), **_plain(asdict(row))}, allow_nan=False)
    return f'{text[:-1]}, "crc32": {zlib.crc32(text.encode())}}}\n'.encode()


def _plain(value: Any) -> Any:
    """Return a value as JSON has it; numbers that are not finite become "nan", "inf", "-inf"."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value


def row_of(line: bytes) -> Header | Row:
    """Return the row of a line.

    Raises:
        ValueError: it is not what was written, or a value is not one that a run writes.
    """
    text, mark, checksum = line.rpartition(b', "crc32": ')
    if not mark or checksum.rstrip(b"}\n") != b"%d" % zlib.crc32(text + b"}"):
        raise ValueError("its checksum is wrong")
    try:
        values = json.loads(text + b"}")
        if (kind := values.pop("kind")) not in KINDS:
            raise ValueError(f"{reprlib.repr(kind)} is no kind of row")
        return typed(KINDS[kind], values)
    except Exception as error:  # whatever odd values lead to
        raise ValueError(one_line(error)) from error


def typed(hint: Any, value: Any) -> Any:
    """Return a JSON value as its type hint says; unknown fields of a dataclass are ignored.

    Raises:
        ValueError: it is something else.
    """
    kind, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or (hint in (int, str, bool, types.NoneType) and type(value) is hint):
        return value
    if hint is float and (type(value) in (int, float) or value in ("nan", "inf", "-inf")):
        return float(value)
    if kind is tuple and isinstance(value, list):
        return tuple(typed(parts[0], each) for each in value)
    if kind is dict and isinstance(value, dict):
        return {name: typed(parts[1], each) for name, each in value.items()}
    if is_dataclass(hint) and isinstance(value, dict):
        hints = hints_of(hint)
        known = [each.name for each in fields(hint) if each.name in value]
        return hint(**{name: typed(hints[name], value[name]) for name in known})
    if kind is types.UnionType:
        for part in parts:
            try:
                return typed(part, value)
            except ValueError:
                continue
    raise ValueError(f"{reprlib.repr(value)} is no {getattr(hint, '__name__', hint)}")


hints_of = functools.cache(typing.get_type_hints)
