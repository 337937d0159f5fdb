"""A model with one block in memory at a time; the others lie on disk or in the host's memory.

A block is read as its forward pass begins, while the one before it still runs, and leaves when the
pass is through it. ``streamed.StreamedWeights`` trains such a model.
"""

from __future__ import annotations

import contextlib
import functools
import queue
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from zeroth_order.block_file import Region, WorkingFile, page_aligned

# A block that is read, one that passes run through and one that is written.
BUFFERS = 3
ATTRIBUTE = "streamed_blocks"


class NoBlocks(ValueError):
    """A model does not say what its blocks are, or they do not make up most of it."""


class Source(Protocol):
    """Where tensors come from the first time: the files of a model, which are only read."""

    def read(self, name: str, target: Tensor) -> int:
        """Read a tensor, in any dtype, into ``target``; return how many bytes were read."""


class Owner(Protocol):
    """Who trains the weights of blocks."""

    def arrived(self, block: Block, tensors: Mapping[Any, Tensor]) -> bool:
        """Bring a block that was loaded up to date; return whether this changed it."""

    def left(self, block: Block) -> None:
        """Let go of the tensors of a block."""

    def finish(self) -> None:
        """Bring all blocks up to date."""

    def forget(self) -> None:
        """Leave out what blocks still have to get: they begin again."""


class Block:
    """One block.

    Attributes:
        names: of its parameters that are streamed.
        region: where its tensors lie in a buffer and in the working file.
        kept: whether it stays in memory.
        memory: the buffer it lies in; None: it is not in memory.
        is_changed: whether it was updated; else it is as it came from the source.
        is_in_file: whether the working file has it.
        users: how many have loaded it and not released it.
    """

    def __init__(self, number: int, module: nn.Module, names: dict[nn.Parameter, str]) -> None:
        self.number, self.module, self.names = number, module, names
        self.region = Region(0, ())
        self.kept = self.is_changed = self.is_in_file = False
        self.memory: Tensor | None = None
        self.users = 0
        self.reading: Future[Tensor] | None = None
        self.writing: Future[None] | None = None


def block_modules(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a model of transformers, those within others left out.

    Raises:
        NoBlocks: it names none.
    """
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    found = [module for module in model.modules() if type(module).__name__ in kinds]
    inner = {part for module in found for part in module.modules() if part is not module}
    blocks = [module for module in found if module not in inner]
    if len(blocks) < 2:
        raise NoBlocks(f"{type(model).__name__} names no blocks (_no_split_modules)")
    return blocks


def placeholder(parameter: Tensor, device: torch.device | str) -> Tensor:
    """Return a tensor like a parameter, without memory: who reads it finds NaN."""
    nan = torch.full((), torch.nan, dtype=parameter.dtype, device=device)
    return nan.expand(parameter.shape)


def blocks_of(model: nn.Module) -> Blocks | None:
    """Return the blocks of a model whose weights are streamed, None for other models."""
    return getattr(model, ATTRIBUTE, None)


def in_order(model: nn.Module, parameters: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield parameters of any model in their order, each in memory as it comes."""
    blocks = blocks_of(model)
    return blocks.in_order(parameters) if blocks else iter(parameters)


class Blocks:
    """Streams the weights that are used within one block of a model only.

    Args:
        model: its parameters are there already, as ``placeholder`` makes them.
        source: of the weights.
        folder: of the working file; None: all blocks stay in memory once they were read.
        budget: bytes of memory; the first blocks that fit stay there. Of blocks that come in turn,
            keeping those that were used last would keep none.

    Attributes:
        bytes_read, bytes_written: so far, on disk.
        running: the forward pass that runs in a thread of its own.
        owner: who trains the weights.

    Raises:
        NoBlocks: the model has none.
    """

    def __init__(
        self, model: nn.Module, source: Source, folder: Path | None = None, budget: int = 0
    ) -> None:
        self.source, self.folder, self.budget = source, folder, budget
        self.hessians: Source | None = None
        uses = _uses(model)
        names = {parameter: name for name, parameter in model.named_parameters()}
        self.blocks: list[Block] = []
        for module in block_modules(model):
            own = {p: names[p] for p, count in _uses(module).items() if count == uses[p]}
            self.blocks.append(Block(len(self.blocks), module, own))
        self.block_of = {p: block for block in self.blocks for p in block.names}
        self.bytes_read = self.bytes_written = 0
        self.running: Any = None
        self.owner: Owner | None = None
        self.file: WorkingFile | None = None
        self.free: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
        self.reader, self.writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self.lay_out({})
        for block in self.blocks:
            enter, leave = (functools.partial(f, block) for f in (self._enter, self._leave))
            block.module.register_forward_pre_hook(enter, prepend=True)
            block.module.register_forward_hook(leave, always_call=True)
        setattr(model, ATTRIBUTE, self)

    # ---- where blocks lie

    def lay_out(self, states: Mapping[nn.Parameter, tuple[str, torch.dtype]]) -> None:
        """Begin again from the source, with room for a state of some parameters beside them.

        Raises:
            RuntimeError: blocks were changed already.
        """
        if any(block.is_changed for block in self.blocks):
            raise RuntimeError("streamed weights that were trained get no room for another h")
        self.begin_again(hessians=self.hessians)
        start, room = 0, self.budget
        for block in self.blocks:
            tensors = [(p, p.shape, p.dtype) for p in block.names]
            tensors += [
                ((p, states[p][0]), p.shape, states[p][1]) for p in block.names if p in states
            ]
            block.region = Region(start, tensors)
            start += block.region.size
            block.kept = self.folder is None or block.region.size <= room
            room -= block.region.size * block.kept
        if self.file is not None:
            self.file.close()
            self.file = None
        self.free = queue.SimpleQueue()
        streamed = [block.region.size for block in self.blocks if not block.kept]
        for _ in range(min(BUFFERS, len(streamed))):
            self.free.put(page_aligned(max(streamed)))

    def make_room_for(self, states: Mapping[nn.Parameter, tuple[str, torch.dtype]]) -> None:
        """Lay blocks out anew if they have no room for these states.

        Raises:
            RuntimeError: blocks were changed already.
        """
        places = {key: place for block in self.blocks for key, place in block.region.places.items()}
        wanted = {(p, name): dtype for p, (name, dtype) in states.items()}
        if any(key not in places or places[key][2] != wanted[key] for key in wanted):
            self.lay_out(states)

    def turn_after(self, number: int) -> Callable[[Block], int]:
        """Return what counts the blocks that come between one, by its number, and another."""
        return lambda block: (block.number - number - 1) % len(self.blocks)

    @property
    def size_on_disk(self) -> int:
        """How many bytes the working file takes once it is needed."""
        return max((b.region.start + b.region.size for b in self.blocks if not b.kept), default=0)

    def reserve(self) -> None:
        """Make the working file, if there is none and it is needed.

        Raises:
            OSError: the folder cannot be written to, or has no room.
        """
        if self.file is None and self.folder is not None and self.size_on_disk:
            self.file = WorkingFile(self.folder, self.size_on_disk)

    def begin_again(self, source: Source | None = None, hessians: Source | None = None) -> None:
        """Forget what was done to the blocks: they come from the source again, or another one."""
        for block in self.blocks:
            self._wait_for(block)
            block.memory, block.is_changed, block.is_in_file = None, False, False
        self.source, self.hessians = source or self.source, hessians
        if self.owner is not None:
            self.owner.forget()

    def _wait_for(self, block: Block) -> None:
        if block.reading is not None:
            memory, block.reading = block.reading.result(), None
            if not block.kept:
                self.free.put(memory)
        if block.writing is not None:
            block.writing.result()

    # ---- reading and writing

    def load(self, block: Block) -> None:
        """Bring a block into memory, up to date, and begin to read the next one.

        Raises:
            OSError: it cannot be read.
        """
        block.users += 1
        if block.users > 1:
            return
        try:
            for other in self.blocks:
                if other is not block and not other.users:
                    self._drop(other)
            if block.memory is None:
                self._begin_to_read(block)
                reading, block.reading = block.reading, None
                block.memory = reading.result()
        except BaseException:
            block.users = 0
            raise
        self._begin_to_read(self.blocks[(block.number + 1) % len(self.blocks)])
        tensors = block.region.views(block.memory)
        for parameter in block.names:
            parameter.data = tensors[parameter]
        if self.owner and self.owner.arrived(block, tensors):
            block.is_changed = True
            if not block.kept:
                block.writing = self.writer.submit(self._write, block, block.memory)

    def release(self, block: Block) -> None:
        """Let a block go; its memory is used again as soon as it is written."""
        block.users = max(0, block.users - 1)
        if block.users or block.memory is None:
            return
        for parameter in block.names:
            parameter.data = placeholder(parameter, parameter.device)
        if self.owner:
            self.owner.left(block)
        if not block.kept:
            self._free_when_written(block)

    def _free_when_written(self, block: Block) -> None:
        memory, block.memory, free = block.memory, None, self.free
        if block.writing is None:
            free.put(memory)
        else:
            block.writing.add_done_callback(lambda _: free.put(memory))

    def _begin_to_read(self, block: Block) -> None:
        if block.memory is None and block.reading is None:
            block.reading = self.reader.submit(self._read, block)

    def _drop(self, block: Block) -> None:
        """Give back what was read too early: passes went to another block."""
        if block.reading is not None and not block.kept:
            memory, block.reading = block.reading.result(), None
            self.free.put(memory)

    def _read(self, block: Block) -> Tensor:
        if block.writing is not None:
            block.writing.result()
            block.writing = None
        if block.kept:
            memory = page_aligned(block.region.size)
            self._fill(block, memory)
            return memory
        memory = self.free.get()
        try:
            self._fill(block, memory)
        except BaseException:
            self.free.put(memory)
            raise
        return memory

    def _fill(self, block: Block, memory: Tensor) -> None:
        region = block.region
        if block.is_in_file:
            self.file.read(region.start, memory[: region.size])
            self.bytes_read += region.size
            return
        for key, target in region.views(memory).items():
            if isinstance(key, tuple):
                name = block.names[key[0]]
                if self.hessians is None:
                    target.zero_()
                else:
                    self.bytes_read += self.hessians.read(name, target)
            else:
                self.bytes_read += self.source.read(block.names[key], target)

    def _write(self, block: Block, memory: Tensor) -> None:
        self.file.write(block.region.start, memory[: block.region.size])
        self.bytes_written += block.region.size
        block.is_in_file = True

    # ---- who comes by

    def _enter(self, block: Block, *_: Any) -> None:
        if self.running is not None:
            self.running.wait_before(block)
        else:
            self.load(block)

    def _leave(self, block: Block, *_: Any) -> None:
        if self.running is None:
            self.release(block)

    @contextlib.contextmanager
    def loaded(self, block: Block) -> Iterator[None]:
        """Have a block in memory."""
        self.load(block)
        try:
            yield
        finally:
            self.release(block)

    def in_order(self, parameters: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield parameters in their order, each with its block in memory as it comes."""
        here: Block | None = None
        try:
            for parameter in parameters:
                block = self.block_of.get(parameter)
                if block is not here:
                    if here:
                        self.release(here)
                    here = None
                    if block:
                        self.load(block)
                    here = block
                yield parameter
        finally:
            if here:
                self.release(here)

    def in_turn(self, parameters: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield parameters block by block, so that each block is read once."""
        numbers = {p: block.number for p, block in self.block_of.items()}
        return self.in_order(sorted(parameters, key=lambda p: numbers.get(p, -1)))


def _uses(module: nn.Module) -> Counter[nn.Parameter]:
    """Count the places where a module and those within it hold each parameter."""
    parts = module.modules()
    return Counter(p for part in parts for p in part._parameters.values() if p is not None)
