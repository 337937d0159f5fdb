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
import time
import types
import typing
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar

from utils import InputError, NotWritten
from zeroth_order.config import HiZOOConfig

FILE = "journal.jsonl"
VERSION = 2
# Seconds between two waits for the disk.
SYNC_EVERY = 1.0


@dataclass(frozen=True)
class Group:
    """Weights with the same weight decay: dtype and shape of each, by name."""

    weight_decay: float
    parameters: dict[str, str]


@dataclass(frozen=True)
class Header:
    """What a run began with.

    Attributes:
        version: of the journal.
        noise: version of the noise u.
        step: steps that were done before the first row.
        max_steps: of the run.
        start: checksum of the trained weights before the first row.
        groups: of the trained weights.
        layerwise: whether one module was perturbed at a time.
        optimizer: its settings.
        model: its name, and the SHA-256 of its files.
        settings: all that decides the course of the run, for comparison only.
        versions: of the libraries.
    """

    kind: ClassVar[str] = "header"
    version: int
    noise: int
    step: int
    max_steps: int
    start: str
    groups: tuple[Group, ...]
    layerwise: bool
    optimizer: HiZOOConfig
    model: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        step: steps that were done before it.
        lr: learning rate; k where it is "auto".
        alpha: smoothing of h.
        losses: of each batch, in the order of its forward passes.
        weights: what each batch counts.
        g: projected gradient.
        c: curvature; None: not measured.
        eta: the step's size.
    """

    kind: ClassVar[str] = "step"
    step: int
    lr: float
    alpha: float
    losses: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]
    g: float | None = None
    c: float | None = None
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


# ------------------------------------------------------------------------------------- reading


@dataclass
class Journal:
    """What is in a journal's file.

    Attributes:
        path: of the file.
        header: of the run.
        rows: all of them; None stands for a line that is not what was written.
        ends: where each line ends, in bytes; the header's first.
    """

    path: Path
    header: Header
    rows: list[Row | None] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """How many steps the run has done."""
        done = (row.step + isinstance(row, Step) for row in self.rows if row)
        return max(done, default=self.header.step)

    def after(self, step: int) -> tuple[list[Row], int]:
        """Return what followed when so many steps were done, until the end or a damaged line.

        The dev loss of that step is among the rows before step 0 only; later a checkpoint has it.

        Returns:
            The rows, and where the last of them ends in bytes.
        """
        first = 0
        if step or self.header.step:
            at = (i for i, row in enumerate(self.rows) if is_step(row, step))
            first = next(at, None)
            if first is None:
                return [], self.end_of(step)
        rows: list[Row] = []
        for row in self.rows[first:]:
            if row is None or row.step != step:
                break
            rows.append(row)
            step += isinstance(row, Step)
        return rows, self.ends[first + len(rows)]

    def end_of(self, step: int) -> int:
        """Return where the rows of the first so many steps end, in bytes."""
        end = self.ends[0]
        for row, its_end in zip(self.rows, self.ends[1:], strict=True):
            if row and (row.step < step or (row.step == step and not isinstance(row, Step))):
                end = its_end
        return end


def is_step(row: Row | None, step: int) -> bool:
    """Whether a row is the step before which so many were done."""
    return isinstance(row, Step) and row.step == step


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
    if not lines and b'{"kind": "header"'.startswith(content[:17]):
        return None
    header = row_of(lines[0]) if lines else None
    if not isinstance(header, Header):
        fault = "it is no journal of a run"
        if content.startswith(b'{"kind": "header"'):
            fault = "its header is damaged"
        elif content.startswith(b"HiZOO journal"):
            fault = "it is the journal of an earlier version, which cannot be read"
        raise InputError(f"{path}: {fault}")
    if header.version != VERSION:
        raise InputError(
            f"{path}: journal version {header.version}; this program reads version {VERSION}"
        )
    journal = Journal(path, header, ends=[len(lines[0]) + 1])
    for line in lines[1:]:
        row = row_of(line)
        journal.rows.append(None if isinstance(row, Header) else row)
        journal.ends.append(journal.ends[-1] + len(line) + 1)
    return journal


# ------------------------------------------------------------------------------------- writing


class JournalFile:
    """A journal that rows are appended to; each is on its way to the disk when ``add`` returns.

    Nothing is written before the first step: other rows wait for it.

    Args:
        path: of the file.
        header: of a new journal.
        begins_at: the byte behind which the file is cut off first; None makes a new file.
    """

    def __init__(self, path: Path, header: Header, begins_at: int | None = None) -> None:
        self.path = path
        self._waiting = line_of(header) if begins_at is None else b""
        self._begins_at = begins_at or 0
        self._descriptor: int | None = None
        self._synced = 0.0

    def add(self, row: Row) -> None:
        """Append a row.

        Raises:
            NotWritten: the disk is full, or the file cannot be written to.
        """
        self._waiting += line_of(row)
        if self._descriptor is None and not isinstance(row, Step):
            return
        try:
            self._write()
            if time.monotonic() - self._synced >= SYNC_EVERY:
                self.sync()
        except OSError as error:
            raise NotWritten.of(self.path, error) from error

    def _write(self) -> None:
        """Write what waits, or leave the file as it was."""
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

    def sync(self) -> None:
        """Wait until what was written is on the disk."""
        if self._descriptor is not None:
            os.fsync(self._descriptor)
            self._synced = time.monotonic()

    def close(self) -> None:
        """Write what waits if there were steps before, wait for the disk, and close the file."""
        if self._begins_at and self._waiting:
            self._write()
        if self._descriptor is not None:
            self.sync()
            os.close(self._descriptor)
            self._descriptor, self._begins_at = None, self.path.stat().st_size
