"""A run's journal in JSON Lines: a header, then the losses of every step.

A zeroth-order step is a function of the weights, of h, of the seed and of the losses of its forward
passes. So the header and the losses give the weights after any step, without data, and a run that
was killed resumes behind its last line. ``pandas.read_json(path, lines=True)`` reads the file.

Every line ends with the CRC-32 of its text. A line that was half written when the process ended is
dropped. A row's ``step`` counts the steps that were done before it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from training.rows import VERSION, Header, Row, Step, line_of, row_of
from utils import InputError, NotWritten

FILE = "journal.jsonl"
BEGIN = b'{"kind": "header"'
# Seconds between two waits for the disk.
SYNC_EVERY = 1.0


@dataclass
class Journal:
    """What is in a journal's file, until its end or the first line that cannot be used."""

    path: Path
    header: Header
    rows: list[Row] = field(default_factory=list)
    # Where each line ends, in bytes; the header's first.
    ends: list[int] = field(default_factory=list)
    # Why the line behind the last row cannot be used; None at the end of the file.
    fault: str | None = None

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
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is no file")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    *lines, _ = content.split(b"\n")  # a half written line has no end
    if not lines and BEGIN.startswith(content[: len(BEGIN)]):
        return None
    header, fault = None, "it is no journal of a run"
    try:
        header = row_of(lines[0] if lines else b"")
    except ValueError as error:
        if content.startswith(BEGIN):
            fault = f"its header is damaged ({error})"
    if not isinstance(header, Header):
        raise InputError(f"{path}: {fault}")
    if header.version != VERSION:
        raise InputError(
            f"{path}: journal version {header.version}; this program reads version {VERSION}"
        )
    journal = Journal(path, header, ends=[len(lines[0]) + 1])
    for number, line in enumerate(lines[1:], 2):
        try:
            row = _usable_row(line, journal)
        except ValueError as error:
            journal.fault = f"line {number}: {error}"
            break
        journal.rows.append(row)
        journal.ends.append(journal.ends[-1] + len(line) + 1)
    return journal


def _usable_row(line: bytes, journal: Journal) -> Row:
    """Return the row of a line; raises ValueError if it cannot follow those of the journal."""
    row, due = row_of(line), journal.steps
    if isinstance(row, Header):
        raise ValueError("a second header")
    if row.step != due:
        raise ValueError(f"step {row.step} where {due} was due")
    least = 2 * journal.header.optimizer.num_samples
    if isinstance(row, Step) and min(map(len, row.losses)) < least:
        raise ValueError(f"step {row.step} has fewer losses than {least} a batch")
    return row


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
        with self._naming_errors():
            self._write()
        if time.monotonic() - self._synced >= SYNC_EVERY:
            self.sync()

    @contextlib.contextmanager
    def _naming_errors(self) -> Iterator[None]:
        """Raise ``NotWritten``, which is one line, where the system cannot write."""
        try:
            yield
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
        """Wait until what was written is on the disk.

        Raises:
            NotWritten: it does not get there.
        """
        if self._descriptor is not None:
            with self._naming_errors():
                os.fsync(self._descriptor)
            self._synced = time.monotonic()

    def close(self) -> None:
        """Write what waits if there were steps before, wait for the disk, and close the file.

        Raises:
            NotWritten: the disk is full, or the file cannot be written to.
        """
        if self._begins_at and self._waiting:
            with self._naming_errors():
                self._write()
        if self._descriptor is not None:
            self.sync()
            os.close(self._descriptor)
            self._descriptor, self._begins_at = None, self.path.stat().st_size
