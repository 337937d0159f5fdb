"""Weights of which one block is in memory at a time: exact, and larger than the memory.

The forward passes of a step run in lockstep, each in a thread of its own, of which one runs at a
time: a pass stops before every block, and when all of them are there the block is read, updated
with the step before, and each pass runs through it with its own perturbed weights. So a step reads
every block once and writes it once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from zeroth_order import curvature
from zeroth_order.blocks import Blocks, NoBlocks, blocks_of
from zeroth_order.chunks import TrainedParameter
from zeroth_order.layerwise import Layers, LayerwiseWeights, give
from zeroth_order.lockstep import ForwardPass, hooks_of
from zeroth_order.traffic import Block
from zeroth_order.weights import GroupStep, Pass, Shift, Update


class StreamedLayers(Layers):
    """Perturbs a streamed model: within blocks a whole block, elsewhere one module at a time.

    Raises:
        NoBlocks: a module has both blocks and trained weights of its own.
    """

    def __init__(self, model: nn.Module) -> None:
        self.blocks: Blocks = blocks_of(model)
        modules = [block.module for block in self.blocks.blocks]
        super().__init__(model, {part for module in modules for part in module.modules()})
        for part, _ in self.owners:
            if not set(modules).isdisjoint(part.modules()):
                raise NoBlocks(f"{type(part).__name__} has blocks and weights of its own")
        self.of_block = {
            block: [p for p in block.module.parameters() if p.requires_grad]
            for block in self.blocks.blocks
        }
        self.hooks = hooks_of(model)
        self.trained |= {p for parameters in self.of_block.values() for p in parameters}

    @property
    def kind(self) -> type[StreamedWeights]:
        """What perturbs the weights so."""
        return StreamedWeights

    def loaded(self, parameters: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield parameters, each with its block in memory as it comes."""
        return self.blocks.in_turn(parameters)


class StreamedWeights(LayerwiseWeights):
    """Runs the passes of a step block by block; an update waits until its block is read again.

    Weights outside of blocks are updated at once, and so are those of an adapter within them.

    Attributes:
        waiting: updates that some block still has to get, the oldest first.
    """

    layers: StreamedLayers

    def __init__(self, layers: StreamedLayers, *args: Any) -> None:
        super().__init__(layers, *args)
        self.blocks = blocks = layers.blocks
        if blocks.owner is not None:
            blocks.owner.finish()
        self.resident = [t for t in self.parameters if t.parameter not in blocks.block_of]
        self.of_block = {
            block: [self.trained[p] for p in block.names if p in self.trained]
            for block in blocks.blocks
        }
        self.waiting: list[Update] = []
        self._first = 0  # the number of the oldest one
        self._next = dict.fromkeys(blocks.blocks, 0)  # the number of the one a block gets next
        self._threads: ThreadPoolExecutor | None = None
        blocks.owner = self

    def _states(self) -> dict[Tensor, tuple[str, torch.dtype]]:
        """Return the full h that lies beside streamed weights."""
        streamed = (t for parameters in self.of_block.values() for t in parameters)
        full = (t for t in streamed if not t.low_rank and t.group["hessian_smooth"] > 0)
        return {t.parameter: (curvature.OFFSET, t.hessian_dtype) for t in full}

    def prepare(self, closure: Callable[[], Any]) -> None:
        """Check the closure's model once; let h begin at 1.

        Raises:
            RuntimeError: α was 0 in the first step, and is not now.
        """
        self.blocks.make_room_for(self._states())
        if any(self.of_block.values()):
            self.blocks.traffic.reserve(self.blocks.blocks)
        super().prepare(closure)

    def start_hessian(self, trained: TrainedParameter) -> None:
        """Let a parameter's h begin at 1; that of a streamed one comes with its block."""
        if trained.low_rank or trained.parameter not in self.blocks.block_of:
            super().start_hessian(trained)

    # ---- forward passes

    def losses(self, passes: Sequence[Pass]) -> list[float]:
        """Return the losses of forward passes, which run in lockstep."""
        if self._threads is None or self._threads._max_workers < len(passes):
            self._threads = ThreadPoolExecutor(len(passes))
        device = self.parameters[0].parameter.device
        running = [
            ForwardPass(closure, self._threads, device, self.layers.hooks) for closure, _ in passes
        ]
        shifts = dict(zip(running, (shift for _, shift in passes), strict=True))
        try:
            for each in running:
                self._run(each, shifts[each])
            last = -1
            while stopped := [each for each in running if each.before is not None]:
                # Passes of unequal length, as in generation: serve those that are ahead, in turn.
                count = len(self.blocks.blocks)
                block = min(
                    (e.before for e in stopped), key=lambda b: (b.number - last - 1) % count
                )
                last = block.number
                with self.blocks.loaded(block):
                    for each in stopped:
                        if each.before is block:
                            with self._perturbed(block, shifts[each]):
                                self._run(each, shifts[each])
        finally:
            for each in running:
                each.abandon()
        return [each.loss for each in running]

    def _run(self, each: ForwardPass, shift: Shift | None) -> None:
        """Let a pass run until it stops before a block, or ends."""
        with contextlib.ExitStack() as perturbed:
            if shift and shift[1]:
                perturbed.enter_context(self.layers.replaced(self.perturbing(*shift)))
            self.blocks.running = each
            try:
                each.resume()
            finally:
                self.blocks.running = None

    @contextlib.contextmanager
    def _perturbed(self, block: Block, shift: Shift | None) -> Iterator[None]:
        """Give a block that is in memory perturbed weights."""
        parameters = self.layers.of_block[block] if shift and shift[1] else []
        scratch = self.layers.scratch
        copies, own = scratch.borrow(parameters), {p: p.data for p in parameters}
        try:
            if copies:
                self.perturbing(*shift)(copies)
                give(copies)
            yield
        finally:
            give(own)
            scratch.give_back(copies)

    # ---- updates

    def update(self, steps: Sequence[GroupStep]) -> None:
        """Update what stays in memory; blocks get the step when they are read next."""
        update = self.update_of(steps)
        self.apply(self.resident, update)
        if any(self.of_block.values()):
            self.waiting.append(update)

    @torch.no_grad()
    def arrived(self, block: Block, tensors: Mapping[Any, Tensor]) -> bool:
        """Bring a block that was loaded up to date; return whether this changed it."""
        for key, tensor in tensors.items():
            if isinstance(key, tuple):
                self.states[key[0]] = {key[1]: tensor}
        updates = self.waiting[self._next[block] - self._first :]
        for update in updates if self.of_block[block] else ():
            self.apply(self.of_block[block], update)
        self._next[block] = self._first + len(self.waiting)
        done = min(self._next.values()) - self._first
        self.waiting, self._first = self.waiting[done:], self._first + done
        return bool(updates) and bool(self.of_block[block])

    def left(self, block: Block) -> None:
        """Forget the h of a block that lies with its weights."""
        for key in block.region.places:
            if isinstance(key, tuple):
                self.states.pop(key[0], None)

    def finish(self) -> None:
        """Apply the updates that wait to all blocks."""
        if self.waiting:
            for block in self.blocks.blocks:
                with self.blocks.loaded(block):
                    pass

    def forget(self) -> None:
        """Leave out the updates that wait: blocks begin again."""
        self._first += len(self.waiting)
        self.waiting = []
        self._next = dict.fromkeys(self._next, self._first)
