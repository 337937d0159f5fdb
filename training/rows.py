"""Rows of a journal, and their lines: JSON with a checksum; values come back in their types."""

from __future__ import annotations

import functools
import json
import math
import types
import typing
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, ClassVar

from zeroth_order.config import HiZOOConfig

VERSION = 2


@dataclass(frozen=True)
class Group:
    """Weights with the same weight decay: dtype and shape of each, by name."""

    weight_decay: float
    parameters: dict[str, str]


@dataclass(frozen=True)
class Header:
    """What a run began with; ``settings`` and ``versions`` are for comparison only."""

    kind: ClassVar[str] = "header"
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
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """One step; ``step`` counts those that were done before it."""

    kind: ClassVar[str] = "step"
    step: int
    lr: float  # k where it is "auto"
    alpha: float
    losses: tuple[tuple[float, ...], ...]  # of each batch, in the order of its forward passes
    weights: tuple[float, ...]  # what each batch counts
    g: float | None = None
    c: float | None = None  # None: not measured
    eta: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """The metrics of the dev examples, by name."""

    kind: ClassVar[str] = "evaluation"
    step: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Scales:
    """The μ of g and of c that "auto" has chosen; None: that of c is that of g."""

    kind: ClassVar[str] = "scales"
    step: int
    eps: float
    curvature_eps: float | None


@dataclass(frozen=True)
class Checksum:
    """A checksum of the trained weights."""

    kind: ClassVar[str] = "checksum"
    step: int
    checksum: str


Row = Step | Evaluation | Scales | Checksum
KINDS = {each.kind: each for each in (Header, Step, Evaluation, Scales, Checksum)}


# ------------------------------------------------------------------------------------ as lines


def line_of(row: Header | Row) -> bytes:
    """Return a row as a line."""
    text = json.dumps({"kind": row.kind, **_plain(asdict(row))}, allow_nan=False)
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


def row_of(line: bytes) -> Header | Row | None:
    """Return the row of a line; None if it is not what was written."""
    text, mark, checksum = line.rpartition(b', "crc32": ')
    try:
        if not mark or int(checksum.rstrip(b"}\n")) != zlib.crc32(text + b"}"):
            return None
        values = json.loads(text + b"}")
        return typed(KINDS[values.pop("kind")], values)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


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
    raise ValueError(f"{value!r} is no {hint}")


hints_of = functools.cache(typing.get_type_hints)
