"""A run's journal in JSON Lines: a header, then the losses of every step.

A zeroth-order step is a function of the weights, of h, of the seed and of the losses of its forward
passes. So the header and the losses give the weights after any step, without data, and a run that
was killed resumes behind its last line. ``pandas.read_json(path, lines=True)`` reads the file.

Every line ends with the CRC-32 of its text. A line that was half written when the process ended is
dropped. A row's ``step`` counts the steps that were done before it.
"""

from __future__ import annotations

import functools
import json
import math
import os
import reprlib
import time
import types
import typing
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

from utils import InputError, NotWritten, one_line
from zeroth_order.config import HiZOOConfig, check_settings

JOURNAL = "journal.jsonl"
VERSION = 3
BEGIN = b'{"kind": "header"'
# Seconds between two waits for the disk.
SYNC_EVERY = 1.0


# ---------------------------------------------------------------------------------------- rows


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
    model: dict[str, Any] = field(default_factory=dict)  # its name
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.step < 0:
            raise ValueError(f"step must be at least 0, not {self.step}")
        names = [name for group in self.groups for name in group.parameters]
        if not names or len(names) > len(set(names)):
            raise ValueError("its groups must have parameters, each of them once")


@dataclass(frozen=True)
class Row:
    """What was written when ``step`` steps were done."""

    step: int


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
        return _typed(KINDS[kind], values)
    except Exception as error:  # whatever odd values lead to
        raise ValueError(one_line(error)) from error


_hints_of = functools.cache(typing.get_type_hints)


def _typed(hint: Any, value: Any) -> Any:
    """Return a JSON value as its type hint says; unknown fields of a dataclass are ignored."""
    kind, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or (hint in (int, str, bool, types.NoneType) and type(value) is hint):
        return value
    if hint is float and (type(value) in (int, float) or value in ("nan", "inf", "-inf")):
        return float(value)
    if kind is tuple and isinstance(value, list):
        return tuple(_typed(parts[0], each) for each in value)
    if kind is dict and isinstance(value, dict):
        return {name: _typed(parts[1], each) for name, each in value.items()}
    if is_dataclass(hint) and isinstance(value, dict):
        hints = _hints_of(hint)
        return hint(**{name: _typed(hints[name], value[name]) for name in hints if name in value})
    if kind is types.UnionType:
        for part in parts:
            try:
                return _typed(part, value)
            except ValueError:
                continue
    raise ValueError(f"{reprlib.repr(value)} is no {getattr(hint, '__name__', hint)}")


# ------------------------------------------------------------------------------------- reading


@dataclass
class Journal:
    """What is in a journal's file, until its end or the first line that cannot be used."""

    path: Path
    header: Header
    ends: list[int]  # where each line ends, in bytes; the header's first
    rows: list[Row] = field(default_factory=list)
    fault: str | None = None  # why the line behind the last row cannot be used

    @property
    def steps(self) -> int:
        """How many steps the run has done."""
        return self.header.step + sum(isinstance(row, Step) for row in self.rows)

    def after(self, step: int) -> list[Row]:
        """Return what followed when so many steps were done."""
        return self.rows[self._count_before(step) :]

    def end_of(self, step: int) -> int:
        """Return where the rows of the first so many steps end, in bytes."""
        return self.ends[self._count_before(step)]

    def _count_before(self, step: int) -> int:
        if step == self.header.step:
            return 0  # the choice of μ follows
        steps = (i for i, row in enumerate(self.rows) if isinstance(row, Step) and row.step >= step)
        return next(steps, len(self.rows))


def read_journal(path: Path) -> Journal | None:
    """Read a journal; None if there is none, or if its header was half written.

    Raises:
        InputError: the file is something else, of another version, or its header is damaged.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    *lines, _ = content.split(b"\n")  # a half written line has no end
    if not lines and content[: len(BEGIN)] == BEGIN[: len(content)]:
        return None
    if not content.startswith(BEGIN):
        raise InputError(f"{path}: it is no journal of a run")
    try:
        header = row_of(lines[0])
    except ValueError as error:
        raise InputError(f"{path}: its header is damaged ({error})") from error
    if header.version != VERSION:
        raise InputError(
            f"{path}: journal version {header.version}; this program reads version {VERSION}"
        )
    journal, due = Journal(path, header, [len(lines[0]) + 1]), header.step
    for number, line in enumerate(lines[1:], 2):
        try:
            row = _row_that_follows(header, due, line)
        except ValueError as error:
            journal.fault = f"line {number}: {error}"
            break
        journal.rows.append(row)
        journal.ends.append(journal.ends[-1] + len(line) + 1)
        due += isinstance(row, Step)
    return journal


def _row_that_follows(header: Header, due: int, line: bytes) -> Row:
    """Return the row of a line; raises ValueError if it cannot follow ``due`` steps."""
    row, least = row_of(line), 2 * header.optimizer.num_samples
    if isinstance(row, Header):
        raise ValueError("a second header")
    if row.step != due:
        raise ValueError(f"step {row.step} where {due} was due")
    if isinstance(row, Step) and min(map(len, row.losses)) < least:
        raise ValueError(f"step {row.step} has fewer losses than {least} a batch")
    return row


# ------------------------------------------------------------------------------------- writing


class JournalFile:
    """A journal that rows are appended to; each is on its way to the disk when ``add`` returns.

    Nothing is written before the first step: other rows wait for it. All methods raise
    ``NotWritten`` if the disk is full, or the file cannot be written to. ``begins_at`` is the byte
    behind which the file is cut off first; None makes a new one, with the header.
    """

    def __init__(self, path: Path, header: Header, begins_at: int | None = None) -> None:
        self.path = path
        self._waiting = line_of(header) if begins_at is None else b""
        self._begins_at = begins_at or 0
        self._descriptor: int | None = None
        self._synced = 0.0

    def add(self, row: Row) -> None:
        """Append a row."""
        self._waiting += line_of(row)
        if self._descriptor is None and not isinstance(row, Step):
            return
        self._write()
        if time.monotonic() - self._synced >= SYNC_EVERY:
            self.sync()

    def _write(self) -> None:
        """Write what waits, or leave the file as it was."""
        try:
            if self._descriptor is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
                self._descriptor = os.open(self.path, flags, 0o666)
                os.ftruncate(self._descriptor, self._begins_at)
            content, self._waiting = self._waiting, b""
            size = os.fstat(self._descriptor).st_size
            try:
                while content:
                    content = content[os.write(self._descriptor, content) :]
            except OSError:
                os.ftruncate(self._descriptor, size)
                raise
        except OSError as error:
            raise NotWritten.of(self.path, error) from error

    def sync(self) -> None:
        """Wait until what was written is on the disk."""
        if self._descriptor is not None:
            try:
                os.fsync(self._descriptor)
            except OSError as error:
                raise NotWritten.of(self.path, error) from error
            self._synced = time.monotonic()

    def close(self) -> None:
        """Write what waits if there were steps before, wait for the disk, and close the file."""
        if self._begins_at and self._waiting:
            self._write()
        if self._descriptor is not None:
            self.sync()
            os.close(self._descriptor)
            self._descriptor, self._begins_at = None, self.path.stat().st_size
