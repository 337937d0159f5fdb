"""A run's journal in JSON Lines: a header, then the losses of every step.

A zeroth-order step is a function of the weights, of h, of the seed and of the losses of its forward
passes. So the header and the losses give the weights after any step, without data, and a run that
was killed resumes behind its last line. ``pandas.read_json(path, lines=True)`` reads the file.

Every line ends with the CRC-32 of its text. A line that was half written when the process ended is
dropped. A row's ``step`` counts the steps that were done before it.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from training.rows import VERSION, Header, Row, Step, line_of, row_of
from utils import InputError, NotWritten

FILE = "journal.jsonl"
# Seconds between two waits for the disk.
SYNC_EVERY = 1.0


@dataclass
class Journal:
    """What is in a journal's file."""

    path: Path
    header: Header
    # None stands for a line that is not what was written.
    rows: list[Row | None] = field(default_factory=list)
    # Where each line ends, in bytes; the header's first.
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
