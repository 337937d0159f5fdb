"""A model with one block in memory at a time; the others lie on disk or in the host's memory.

A block is read while the pass runs through the one before it, and leaves when the pass is through
it. ``streamed.StreamedWeights`` trains such a model.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zeroth_order.block_file import Region
from zeroth_order.signals import signals_wait
from zeroth_order.traffic import Block, Traffic

ATTRIBUTE = "streamed_blocks"

# Reads a tensor by its name into another one, of any dtype; returns how many bytes it has read.
Read = Callable[[str, Tensor], int]


class NoBlocks(ValueError):
    """A model does not say what its blocks are, or they do not make up most of it."""


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


class Blocks:
    """Streams the weights that are used within one block of a model only.

    The first blocks for which there is a ``budget`` stay in memory, on a GPU in its own if the
    others lie in the host's. Of blocks that come in turn, keeping those that were used last would
    keep none.

    Raises:
        NoBlocks: the model has none.
    """

    def __init__(
        self,
        model: nn.Module,  # its parameters are there already, as ``placeholder`` makes them
        source: Read | None,  # reads the weights at first; None: blocks are laid out, none comes
        folder: Path | None = None,  # of the working file; None: blocks lie in the host's memory
        budget: int = 0,  # bytes
        staged: bool | None = None,  # of ``Traffic``
        write_every: int | None = 1,  # of ``streamed.StreamedWeights``
    ) -> None:
        self.source, self.budget, self.write_every = source, budget, write_every
        self.hessians: Read | None = None  # reads h at first; None: it begins at 1
        names = {parameter: name for name, parameter in model.named_parameters()}
        uses = _uses(model)
        self.blocks: list[Block] = []
        for module in block_modules(model):
            own = {p: names[p] for p, count in _uses(module).items() if count == uses[p]}
            self.blocks.append(Block(len(self.blocks), module, own))
        self.block_of = {p: block for block in self.blocks for p in block.names}
        self._placeholders = {parameter: parameter.data for parameter in self.block_of}
        self.running: Any = None  # the ``lockstep.ForwardPass`` that runs in its own thread
        self.owner: Any = None  # the ``streamed.StreamedWeights`` that train the blocks, if any
        # Of weights that no update has changed since, by their ids.
        self.checksums: dict[tuple[int, ...], str] = {}
        device = next(iter(self.block_of)).device
        self.traffic = Traffic(device, self._fill, folder, staged)
        self.lay_out({})
        for block in self.blocks if source else ():
            # Hooks would not see the end of a forward that Ctrl-C interrupts.
            forward = block.module.forward
            streamed = functools.partial(self._forward, block, forward)
            block.module.forward = functools.update_wrapper(streamed, forward)
        setattr(model, ATTRIBUTE, self)

    # ---- what they hold

    def lay_out(self, states: Mapping[nn.Parameter, tuple[str, torch.dtype]]) -> None:
        """Begin again from the source, with room for a state of some parameters beside them.

        Raises:
            RuntimeError: blocks were changed already.
        """
        if any(block.is_changed for block in self.blocks):
            raise RuntimeError("streamed weights that were trained get no room for another h")
        self.begin_again(hessians=self.hessians)
        for block in self.blocks:
            tensors: list[Any] = [(p, p.shape, p.dtype) for p in block.names]
            for p in block.names:
                if p in states:
                    name, dtype = states[p]
                    tensors.append(((p, name), p.shape, dtype))
            block.region = Region(tensors)
        self.traffic.lay_out(self.blocks, self.budget)

    def make_room_for(self, states: Mapping[nn.Parameter, tuple[str, torch.dtype]]) -> None:
        """Lay blocks out anew if they have no room for these states; raises as ``lay_out``."""
        room = {key for block in self.blocks for key in block.region.places}
        if not room.issuperset((p, name) for p, (name, _) in states.items()):
            self.lay_out(states)

    def begin_again(self, source: Read | None = None, hessians: Read | None = None) -> None:
        """Forget what was done to the blocks: they come from the source again, or another one."""
        for block in self.blocks:
            self.traffic.settle(block)
            block.memory = block.host = None
            block.is_changed = block.is_in_file = False
        self.source, self.hessians = source or self.source, hessians
        self.checksums.clear()
        if self.owner is not None:
            self.owner.forget()

    def _fill(self, block: Block, memory: Tensor) -> int:
        """Fill memory with a block as it was before the first update; return the bytes read."""
        read = 0
        for key, target in block.region.views(memory).items():
            if not isinstance(key, tuple):
                read += self.source(block.names[key], target)
            elif self.hessians is not None:
                read += self.hessians(block.names[key[0]], target)
            else:
                target.zero_()
        return read

    # ---- who comes by

    def load(self, block: Block) -> None:
        """Bring a block into memory, up to date, and begin to read the next one.

        Raises:
            OSError: it cannot be read.
        """
        for other in self.blocks:
            if other is not block and not other.users:
                self.traffic.drop(other)
        if block.memory is None:
            self.traffic.begin_to_read(block)
            with self.traffic.timed("waiting"):
                self.traffic.end_of_reading(block)
        self.traffic.begin_to_read(self.blocks[(block.number + 1) % len(self.blocks)])
        tensors = block.region.views(block.memory)
        for parameter in block.names:
            parameter.data = tensors[parameter]
        with signals_wait():  # an update is applied once, and written
            if self.owner and self.owner.arrived(block, tensors):
                self.traffic.begin_to_write(block)

    def unload(self, block: Block) -> None:
        """Let a block go; its memory is used again as soon as it is written."""
        if block.memory is None:
            return
        for parameter in block.names:
            parameter.data = self._placeholders[parameter]
        if self.owner:
            self.owner.departed(block)
        self.traffic.give_back(block)

    @contextlib.contextmanager
    def loaded(self, block: Block) -> Iterator[None]:
        """Have a block in memory."""
        user = object()
        block.users.add(user)
        try:
            if len(block.users) == 1:
                self.load(block)
            yield
        finally:
            if user in block.users:
                block.users.remove(user)
                if not block.users:
                    self.unload(block)

    def forget_users(self) -> None:
        """Let blocks go that an interrupted loop over weights holds, as long as its traceback."""
        for block in self.blocks:
            if block.users:
                block.users.clear()
                self.unload(block)

    def _forward(
        self, block: Block, forward: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        """Run a block's own forward with the block in memory."""
        if self.running is not None:
            self.running.wait_before(block)
            return forward(*args, **kwargs)
        with self.loaded(block):
            return forward(*args, **kwargs)

    def in_order(self, parameters: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield parameters in their order, each with its block in memory as it comes."""
        for block, of_block in itertools.groupby(parameters, self.block_of.get):
            with self.loaded(block) if block else contextlib.nullcontext():
                yield from of_block

    def in_turn(self, parameters: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield parameters block by block, so that each block is read once."""
        numbers = {p: block.number for p, block in self.block_of.items()}
        return self.in_order(sorted(parameters, key=lambda p: numbers.get(p, -1)))


def _uses(module: nn.Module) -> Counter[nn.Parameter]:
    """Count the places where a module and those within it hold each parameter."""
    parts = module.modules()
    return Counter(p for part in parts for p in part._parameters.values() if p is not None)
