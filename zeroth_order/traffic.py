"""Blocks on their way between the disk, the host's memory and the device that runs the passes.

One thread reads and one writes, so that a block comes while passes run through the one before it,
and goes while they run through it and the next one.
"""

from __future__ import annotations

import contextlib
import queue
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zeroth_order.block_file import Region, WorkingFile, page_aligned
from zeroth_order.signals import signals_wait

# A block that is read, one that passes run through and one that is written.
BUFFERS = 3
DEVICE, HOST, DISK = "device", "host", "disk"


@dataclass(eq=False)
class Block:
    """A block of a model."""

    number: int
    module: nn.Module
    names: dict[nn.Parameter, str]  # of its parameters that are streamed
    region: Region = field(init=False)  # where its tensors lie in a buffer and in the working file
    home: str = DEVICE  # where it lies while no pass runs through it
    memory: Tensor | None = None  # the buffer on the device that it lies in
    host: Tensor | None = None  # its memory on the host, if that is its home and it has been there
    is_changed: bool = False  # by an update; else it is as it came from the model's files
    is_in_file: bool = False
    users: set[object] = field(default_factory=set)  # who needs it in memory
    reading: Future[Tensor] | None = None
    writing: Future[None] | None = None


# Memory on the device, and the event behind which it is free (CUDA).
Buffer = tuple[Tensor, Any]


class Traffic:
    """Moves blocks.

    ``fill`` fills a buffer on the host with a block that neither the working file nor the host's
    memory has, and returns how many bytes it has read.
    """

    def __init__(
        self,
        device: torch.device,  # runs the passes
        fill: Callable[[Block, Tensor], int],
        folder: Path | None,  # of the working file; None: there is none
        staged: bool | None = None,  # through buffers on the host; None: if the device is a GPU
    ) -> None:
        self.device, self.fill, self.folder = device, fill, folder
        self.is_gpu = device.type == "cuda"
        self.staged = self.is_gpu if staged is None else staged
        self.bytes_read = self.bytes_written = 0
        self.seconds: Counter[str] = Counter()  # of reading, writing, waiting and updating
        self.file: WorkingFile | None = None
        self._free: queue.SimpleQueue[Buffer] = queue.SimpleQueue()
        self._reader, self._writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._stream_in, self._stream_out = (
            torch.cuda.Stream(device) if self.is_gpu else None for _ in range(2)
        )
        self._staging: list[Tensor] = []

    def lay_out(self, blocks: Sequence[Block], room: int) -> None:
        """Choose where blocks lie; the first ones for which there is ``room`` lie nearer."""
        if self.folder:
            near, far = HOST if self.staged else DEVICE, DISK
        else:
            near, far = DEVICE, HOST if self.staged else DEVICE
        for block in blocks:
            block.home = near if block.region.size <= room else far
            room -= block.region.size * (block.home == near)
        start = 0
        for region in _on_disk(blocks):
            region.start, start = start, start + region.size
        if self.file is not None:
            self.file.close()
            self.file = None
        moving = [block.region.size for block in blocks if block.home != DEVICE]
        largest = max(moving, default=0)
        self._free = queue.SimpleQueue()
        for _ in range(min(BUFFERS, len(moving))):
            self._free.put((self._on_device(largest), None))
        self._staging = [self._on_host(largest) for _ in range(2)] if self.staged else []

    def size_on_disk(self, blocks: Iterable[Block]) -> int:
        """Return how many bytes the working file takes."""
        return sum(region.size for region in _on_disk(blocks))

    def reserve(self, blocks: Iterable[Block]) -> None:
        """Make the working file, if there is none and it is needed.

        Raises:
            OSError: the folder cannot be written to, or has no room.
        """
        if self.file is None and (size := self.size_on_disk(blocks)):
            self.file = WorkingFile(self.folder, size)

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add the seconds that something takes."""
        begun = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - begun

    def _on_device(self, size: int) -> Tensor:
        if self.is_gpu:
            return torch.empty(size, dtype=torch.uint8, device=self.device)
        return page_aligned(size)

    def _on_host(self, size: int) -> Tensor:
        """Return memory from which a GPU copies while it computes."""
        memory = page_aligned(size)
        if self.is_gpu:
            # torch's own pinned memory is rounded up to a power of two.
            cuda, start = torch.cuda.cudart(), memory.data_ptr()
            cuda.cudaHostRegister(start, memory.nbytes, 0)
            # Memory that takes its place later has other pages.
            weakref.finalize(memory, cuda.cudaHostUnregister, start).atexit = False
        return memory

    # ---- reading

    def begin_to_read(self, block: Block) -> None:
        """Begin to bring a block to the device, if it is not there or on its way."""
        if block.memory is None and block.reading is None:
            block.reading = self._reader.submit(self._read, block)

    def end_of_reading(self, block: Block) -> None:
        """Wait for a block, which lies on the device then; Ctrl-C leaves it on its way."""
        wait([block.reading])
        with signals_wait():
            reading, block.reading = block.reading, None
            block.memory = reading.result()

    def drop(self, block: Block) -> None:
        """Give back what was read too early: passes went to another block, or were interrupted."""
        if block.home == DEVICE:
            return
        if block.reading is not None:
            self.end_of_reading(block)
        if block.memory is not None:
            self.give_back(block)

    def _read(self, block: Block) -> Tensor:
        if block.writing is not None:
            block.writing.result()
            block.writing = None
        size, is_there = block.region.size, block.home == DEVICE
        memory, freed = (self._on_device(size), None) if is_there else self._free.get()
        try:
            if self.staged:
                self._copy(memory[:size], self._on_the_host(block), self._stream_in, freed)
            else:
                self._fill(block, memory[:size])
        except BaseException:
            if not is_there:
                self._free.put((memory, freed))
            raise
        return memory

    def _on_the_host(self, block: Block) -> Tensor:
        """Return memory on the host that a block lies in."""
        size = block.region.size
        if block.host is not None:
            self.bytes_read += size
            return block.host
        if block.home == HOST:
            host = self._on_host(size)
        else:
            host = self._staging[0] if size <= len(self._staging[0]) else page_aligned(size)
        self._fill(block, host[:size])
        if block.home == HOST:
            block.host = host
        return host[:size]

    def _fill(self, block: Block, memory: Tensor) -> None:
        with self.timed("reading"):
            if block.is_in_file:
                self.file.read(block.region.start, memory)
                self.bytes_read += len(memory)
            else:
                self.bytes_read += self.fill(block, memory)

    def _copy(self, target: Tensor, source: Tensor, stream: Any, after: Any) -> None:
        """Copy on a stream of its own (CUDA), after an event if there is one; wait for the end."""
        if not self.is_gpu:
            target.copy_(source)
            return
        with torch.cuda.stream(stream):
            if after is not None:
                stream.wait_event(after)
            target.copy_(source, non_blocking=True)
        stream.synchronize()

    # ---- writing

    def begin_to_write(self, block: Block) -> None:
        """Begin to bring a block that was updated back to where it lies."""
        if block.home != DEVICE:
            block.writing = self._writer.submit(self._write, block, block.memory, self._event())

    def _event(self) -> Any:
        return torch.cuda.current_stream(self.device).record_event() if self.is_gpu else None

    def _write(self, block: Block, memory: Tensor, updated: Any) -> None:
        source = memory[: block.region.size]
        if self.staged:
            host = self._staging[1] if block.host is None else block.host
            host = host[: block.region.size]
            self._copy(host, source, self._stream_out, updated)
            source = host
        if block.home == DISK:
            with self.timed("writing"):
                self.file.write(block.region.start, source)
            block.is_in_file = True
        self.bytes_written += len(source)

    def give_back(self, block: Block) -> None:
        """Let the memory of a block be used again, as soon as the block is written."""
        if block.home == DEVICE:
            return
        with signals_wait():
            buffer, free = (block.memory, self._event()), self._free
            block.memory = None
            if block.writing is None:
                free.put(buffer)
            else:
                block.writing.add_done_callback(lambda _: free.put(buffer))

    def settle(self, block: Block) -> None:
        """Wait until a block is neither read nor written."""
        self.drop(block)
        if block.reading is not None:
            self.end_of_reading(block)
        if block.writing is not None:
            block.writing.result()


def _on_disk(blocks: Iterable[Block]) -> list[Region]:
    """Return the regions that have a place in the working file, in their order there."""
    return [block.region for block in blocks if block.home == DISK]
