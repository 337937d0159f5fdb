"""A run's journal: a few numbers a step, from which base and seed alone bring its weights back.

A zeroth-order step is a function of the weights, of h and of the losses of its forward passes: the
noise comes from the seed. So the losses, and the settings that change along a run, are all that has
to be kept. The file:

    magic, 16 bytes
    header: its length and CRC-32, 4 bytes each, then JSON, deflated
    records: step (4 bytes), length of the payload in words of 4 bytes (2), kind (1), flags (1),
        payload, CRC-32 of all that (4)

All numbers are little-endian. A record's step is the number of steps that were done before it. A
step of one direction with a constant learning rate takes 24 bytes, 20 without curvature. Records
are appended with one write each; one that was half written when the process ended is cut off.
"""

from __future__ import annotations

import json
import math
import os
import struct
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from utils import InputError, NotWritten

FILE = "journal.bin"
MAGIC = b"HiZOO journal 1\n"
HEAD, SUM = struct.Struct("<IHBB"), struct.Struct("<I")
SIZES_OF_HEADER = struct.Struct("<II")
WORD = 4
# Every so many steps a record has its settings, changed or not: a damaged one before it takes them.
SETTINGS_EVERY = 256
# Seconds between two waits for the disk.
SYNC_EVERY = 1.0
# What the flags of a step's record say is in it.
HAS_RATE, HAS_SMOOTHING, IS_DOUBLE, HAS_SIZES = 1, 2, 4, 8


@dataclass(frozen=True)
class Estimate:
    """The losses of one batch, in the order of its forward passes.

    Attributes:
        passes: of each forward pass its loss; several where each example has its own.
        weight: what the batch counts beside others of its step.
    """

    passes: tuple[tuple[float, ...], ...]
    weight: float = 1.0


@dataclass(frozen=True)
class Step:
    """One step: the losses of its batches, its learning rate η and its smoothing α.

    ``rate`` and ``smoothing`` are None where the journal does not say: as in the step before, which
    is damaged.
    """

    kind: ClassVar[int] = 1
    step: int
    estimates: tuple[Estimate, ...]
    rate: float | None = None
    smoothing: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """What the dev examples gave: their loss and other metrics, by name."""

    kind: ClassVar[int] = 2
    step: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Settings:
    """The settings that ``auto`` has chosen, by name: μ of g and of c."""

    kind: ClassVar[int] = 4
    step: int
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Checksum:
    """A checksum of the trained weights."""

    kind: ClassVar[int] = 5
    step: int
    value: int


Record = Step | Evaluation | Settings | Checksum
KINDS: dict[int, type[Record]] = {
    each.kind: each for each in (Step, Evaluation, Settings, Checksum)
}
FORMS = {Checksum.kind: "<Q"}


# ------------------------------------------------------------------------------------ as bytes


def encode(record: Record, before: Step | None = None) -> bytes:
    """Return a record as bytes; a step's η and α only where they are not those of ``before``."""
    flags = 0
    match record:
        case Step():
            flags, payload = _encode_step(record, before)
        case Settings():
            payload = _json_words(record.values)
        case Evaluation():
            payload = _json_words(record.metrics)
        case _:
            _, *numbers = astuple(record)
            payload = struct.pack(FORMS[record.kind], *numbers)
    words = len(payload) // WORD
    if words >= 1 << 16:
        raise ValueError(f"step {record.step} has too many losses for a record: {words:,}")
    content = HEAD.pack(record.step, words, record.kind, flags) + payload
    return content + SUM.pack(zlib.crc32(content))


def _json_words(value: Any) -> bytes:
    text = json.dumps(value).encode()
    return text.ljust(-(-len(text) // WORD) * WORD)


def _encode_step(record: Step, before: Step | None) -> tuple[int, bytes]:
    flags, parts = 0, []
    whole = before is None or (record.step > 0 and record.step % SETTINGS_EVERY == 0)
    if record.rate is not None and (whole or record.rate != before.rate):
        flags |= HAS_RATE
        parts.append(struct.pack("<d", record.rate))
    if record.smoothing is not None and (whole or record.smoothing != before.smoothing):
        flags |= HAS_SMOOTHING
        parts.append(struct.pack("<d", record.smoothing))
    losses = [loss for each in record.estimates for one in each.passes for loss in one]
    if not all(map(_is_single, losses)):
        flags |= IS_DOUBLE
    if len(record.estimates) > 1 or any(len(one) != 1 for one in record.estimates[0].passes):
        flags |= HAS_SIZES
        parts.append(struct.pack("<I", len(record.estimates)))
        for each in record.estimates:
            size = len(each.passes[0])
            parts.append(struct.pack("<dII", each.weight, len(each.passes), size))
    parts.append(struct.pack(f"<{len(losses)}{'d' if flags & IS_DOUBLE else 'f'}", *losses))
    return flags, b"".join(parts)


def _is_single(number: float) -> bool:
    """Whether a number is one of float32's."""
    try:
        return math.isnan(number) or struct.unpack("<f", struct.pack("<f", number))[0] == number
    except OverflowError:
        return False


def decode(content: bytes, start: int) -> tuple[Record, int] | None:
    """Return the record that begins at a byte, and where it ends; None if no whole one does."""
    end = start + HEAD.size
    if end + SUM.size > len(content):
        return None
    step, words, kind, flags = HEAD.unpack_from(content, start)
    end += words * WORD
    if kind not in KINDS or end + SUM.size > len(content):
        return None
    if SUM.unpack_from(content, end)[0] != zlib.crc32(content[start:end]):
        return None
    return _decode_payload(step, kind, flags, content[start + HEAD.size : end]), end + SUM.size


def _decode_payload(step: int, kind: int, flags: int, payload: bytes) -> Record:
    if kind == Step.kind:
        return _decode_step(step, flags, payload)
    if kind == Settings.kind:
        return Settings(step, json.loads(payload))
    if kind == Evaluation.kind:
        return Evaluation(step, json.loads(payload))
    return KINDS[kind](step, *struct.unpack(FORMS[kind], payload))


def _decode_step(step: int, flags: int, payload: bytes) -> Step:
    position, settings = 0, {}
    for flag, name in ((HAS_RATE, "rate"), (HAS_SMOOTHING, "smoothing")):
        if flags & flag:
            (settings[name],) = struct.unpack_from("<d", payload, position)
            position += 8
    form, size = ("d", 8) if flags & IS_DOUBLE else ("f", 4)
    shapes = [(1.0, (len(payload) - position) // size, 1)]
    if flags & HAS_SIZES:
        (count,) = struct.unpack_from("<I", payload, position)
        position += 4
        shapes = [struct.unpack_from("<dII", payload, position + 16 * i) for i in range(count)]
        position += 16 * count
    estimates = []
    for weight, passes, of_pass in shapes:
        losses = struct.unpack_from(f"<{passes * of_pass}{form}", payload, position)
        position += passes * of_pass * size
        cut = (losses[i * of_pass : (i + 1) * of_pass] for i in range(passes))
        estimates.append(Estimate(tuple(cut), weight))
    return Step(step, tuple(estimates), **settings)


def encode_header(header: Mapping[str, Any]) -> bytes:
    """Return what a journal begins with."""
    text = zlib.compress(json.dumps(header, ensure_ascii=False).encode(), 9)
    return MAGIC + SIZES_OF_HEADER.pack(len(text), zlib.crc32(text)) + text


def decode_header(content: bytes) -> tuple[dict[str, Any], int] | None:
    """Return a journal's header and where it ends; None if it is half written or damaged."""
    start = len(MAGIC) + SIZES_OF_HEADER.size
    if len(content) < start or not content.startswith(MAGIC):
        return None
    size, checksum = SIZES_OF_HEADER.unpack_from(content, len(MAGIC))
    text = content[start : start + size]
    if len(text) < size or zlib.crc32(text) != checksum:
        return None
    return json.loads(zlib.decompress(text)), start + size


# ------------------------------------------------------------------------------------- reading


@dataclass
class Journal:
    """What is in a journal's file.

    Attributes:
        path: of the file.
        header: what the run began with; ``first_step``: how many steps were done before it.
        begin: where the records begin, in bytes.
        segments: the records; a new list begins where some are damaged or a step is missing. The
            first one follows the header, and is empty if the first record is damaged.
        ends: where each record ends, in bytes, by segment.
        steps: how many steps the run has done.
        damaged: how many bytes between records are none.
    """

    path: Path
    header: dict[str, Any]
    begin: int
    segments: list[list[Record]] = field(default_factory=lambda: [[]])
    ends: list[list[int]] = field(default_factory=lambda: [[]])
    steps: int = 0
    damaged: int = 0

    def after(self, step: int) -> tuple[list[Record], int]:
        """Return what followed when so many steps were done, until the end or a missing record.

        A checkpoint after these steps holds a probe's and a dev loss's outcome: they are left out,
        except before the first step. The list may be empty.

        Returns:
            The records, and where the last of them ends in bytes, or those before this step.
        """
        if step == self.header["first_step"] == 0:
            return self.segments[0], self.ends[0][-1] if self.ends[0] else self.begin
        for part, ends in zip(self.segments, self.ends, strict=True):
            for index, record in enumerate(part):
                if isinstance(record, Step) and record.step == step:
                    return part[index:], ends[-1]
        return [], self.end_of(step)

    def end_of(self, step: int) -> int:
        """Return where the records of the first so many steps end, in bytes."""
        end = self.begin
        for part, ends in zip(self.segments, self.ends, strict=True):
            for record, its_end in zip(part, ends, strict=True):
                if record.step < step or (record.step == step and not isinstance(record, Step)):
                    end = its_end
        return end

    def step_before(self, end: int) -> Step | None:
        """Return the step that a record behind these bytes follows, None if it is not known."""
        for part, ends in zip(self.segments, self.ends, strict=True):
            if end in ends:
                return last_step(part[: ends.index(end) + 1])
        return first_settings(self.header) if end == self.begin else None

    def add(self, record: Record, end: int, follows: bool) -> None:
        """Add the next record, which ends at a byte; ``follows``: right behind the one before."""
        if not follows or record.step > self.steps:
            self.segments.append([])
            self.ends.append([])
        is_step = isinstance(record, Step)
        self.steps = record.step + is_step
        if is_step:
            record = self._completed(record)
        self.segments[-1].append(record)
        self.ends[-1].append(end)

    def _completed(self, record: Step) -> Step:
        """Return a step with what it has in common with the one before."""
        before = last_step(self.segments[-1])
        if before is None and len(self.segments) == 1:
            before = first_settings(self.header)
        if before is None:
            return record
        return replace(
            record,
            rate=before.rate if record.rate is None else record.rate,
            smoothing=before.smoothing if record.smoothing is None else record.smoothing,
        )


def last_step(records: Sequence[Record]) -> Step | None:
    """Return the last step among records, None if there is none."""
    return next((record for record in reversed(records) if isinstance(record, Step)), None)


def first_settings(header: Mapping[str, Any]) -> Step:
    """Return η and α of a journal's first step, unless its record has others."""
    return Step(header["first_step"], (), header.get("rate"), header.get("smoothing"))


def read_journal(path: Path) -> Journal | None:
    """Read a journal; None if there is none, or if it was half written before its first record.

    Records that are damaged are left out: see ``Journal.segments``.

    Raises:
        InputError: the file is something else, or its header is damaged though records follow.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    if not content.startswith(MAGIC[: len(content)]):
        raise InputError(f"{path} is no journal of a run, or of another version of this program")
    found = decode_header(content)
    if found is None:
        if len(content) > _header_size(content):
            raise InputError(f"{path}: its header is damaged, nothing can be read from it")
        return None
    header, position = found
    journal = Journal(path, header, position, steps=header["first_step"])
    while (found := _next_record(content, position, journal.steps)) is not None:
        record, start, end = found
        journal.add(record, end, follows=start == position)
        journal.damaged += start - position
        position = end
    return journal


def _header_size(content: bytes) -> int:
    """Return how long a file's header is, by itself."""
    start = len(MAGIC) + SIZES_OF_HEADER.size
    if len(content) < start:
        return start
    return start + SIZES_OF_HEADER.unpack_from(content, len(MAGIC))[0]


def _next_record(content: bytes, position: int, done: int) -> tuple[Record, int, int] | None:
    """Return the first whole record from a byte on, where it begins and ends; None: there is none.

    Args:
        content: of the file.
        position: where one should begin.
        done: how many steps were done before it, at least.
    """
    for start in range(position, len(content) - HEAD.size - SUM.size + 1):
        step, _, kind, _ = HEAD.unpack_from(content, start)
        # A missing step had a record of at least so many bytes.
        if kind in KINDS and done <= step <= done + (start - position):
            decoded = decode(content, start)
            if decoded is not None:
                return decoded[0], start, decoded[1]
    return None


# ------------------------------------------------------------------------------------- writing


class JournalFile:
    """A journal that records are appended to; each is on its way to the disk when ``add`` returns.

    Nothing is written before the first step: what comes before it, of a probe, waits for it.

    Args:
        path: of the file.
        header: what a new journal begins with; it is written with the first record.
        begins_at: the byte behind which the file is cut off first; None makes a new file.
        before: the step whose η and α the next one has too, where its record does not say.
    """

    def __init__(
        self,
        path: Path,
        header: Mapping[str, Any],
        begins_at: int | None = None,
        before: Step | None = None,
    ) -> None:
        self.path = path
        self._waiting, self._before = b"", before
        if begins_at is None:
            self._waiting, self._before = encode_header(header), first_settings(header)
        self._begins_at = begins_at
        self._descriptor: int | None = None
        self._synced = 0.0

    def add(self, record: Record) -> None:
        """Append a record.

        Raises:
            NotWritten: the disk is full, or the file cannot be written to.
        """
        content = encode(record, self._before)
        if isinstance(record, Step):
            self._before = record
        elif self._descriptor is None:
            self._waiting += content
            return
        try:
            self._write(content)
            if time.monotonic() - self._synced >= SYNC_EVERY:
                self.sync()
        except OSError as error:
            raise NotWritten.of(self.path, error) from error

    def _write(self, content: bytes) -> None:
        """Write what waits and ``content``, or leave the file as it was."""
        if self._descriptor is None:
            self._open()
        content, self._waiting = self._waiting + content, b""
        size = os.fstat(self._descriptor).st_size
        try:
            while content:
                content = content[os.write(self._descriptor, content) :]
        except OSError:
            os.ftruncate(self._descriptor, size)
            raise

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._descriptor = os.open(self.path, flags, 0o666)
        os.ftruncate(self._descriptor, self._begins_at or 0)

    def sync(self) -> None:
        """Wait until what was written is on the disk."""
        if self._descriptor is not None:
            os.fsync(self._descriptor)
            self._synced = time.monotonic()

    def close(self) -> None:
        """Write what waits, if there were steps before, wait for the disk, and close the file."""
        if self._descriptor is None and self._begins_at is not None and self._waiting:
            self._write(b"")
        if self._descriptor is not None:
            self.sync()
            os.close(self._descriptor)
            self._descriptor, self._begins_at = None, self.path.stat().st_size
