"""Weights of which one block is in memory at a time: exact, and larger than the memory.

The forward passes of a step run in lockstep, each in a thread of its own, of which one runs at a
time: a pass stops before every block, and when all of them are there the block is read, updated
with the step before, and each pass runs through it with its own perturbed weights. So a step reads
every block once and writes it once.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from zeroth_order import curvature
from zeroth_order.blocks import Blocks, NoBlocks, blocks_of
from zeroth_order.chunks import TrainedParameter
from zeroth_order.layerwise import Layers, LayerwiseWeights, Scratch, give
from zeroth_order.lockstep import ForwardPass, hooks_of
from zeroth_order.traffic import DISK, Block
from zeroth_order.weights import GroupStep, Pass, Shift, States, Update


def best_write_every(total: float, seconds: Mapping[str, float]) -> int:
    """Return after how many updates a block is best written.

    A step that writes one block in k computes (k - 1) / 2 updates more than one that writes all,
    which took ``total`` seconds; ``seconds`` are those of ``Traffic`` in it.
    """
    reading, writing, waiting = (seconds[name] for name in ("reading", "writing", "waiting"))
    if waiting < total / 10:
        return 1

    def expected(every: int) -> float:
        disk = total * (reading + writing / every) / (reading + writing)
        return max(total - waiting + seconds["updating"] * (every - 1) / 2, disk)

    return min(range(1, 17), key=expected)


class Reads(TorchFunctionMode):
    """Notes the parameters that functions of torch read."""

    def __init__(self) -> None:
        super().__init__()
        self.parameters: set[Tensor] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Call a function; a property that is set is not read."""
        if getattr(func, "__name__", "") != "__set__":
            values = tree_leaves((args, kwargs))
            self.parameters.update(value for value in values if isinstance(value, nn.Parameter))
        return func(*args, **(kwargs or {}))


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

    def check(self, loss: Callable[[], Any]) -> list[str]:
        """As ``Layers.check``, but any module of a block may read the weights of another in it."""
        inside = [p for parameters in self.of_block.values() for p in parameters]
        reached: set[Tensor] = set()

        def look(part: nn.Module, *_: Any) -> None:
            reached.update(part._parameters.values())

        with contextlib.ExitStack() as hooks:
            for part in {part for block in self.of_block for part in block.module.modules()}:
                hooks.callback(part.register_forward_hook(look).remove)
            with Reads() as reads:
                unused = super().check(loss)
        reached |= reads.parameters
        return unused + self.unreached(inside, reached.intersection(inside))

    def make_weights(self, *args: Any) -> StreamedWeights:
        """Return what perturbs the weights so; takes the arguments of ``Weights``."""
        return StreamedWeights(self, *args)

    def loaded(self, parameters: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield parameters, each with its block in memory as it comes."""
        return self.blocks.in_turn(parameters)


class StreamedWeights(LayerwiseWeights):
    """Runs the passes of a step block by block; an update waits until its block is read again.

    Weights outside of blocks are updated at once, and so are those of an adapter within them.

    Attributes:
        waiting: updates that the file of some block lacks, the oldest first.
        write_every: a block on disk that was updated so many times is written; until then what it
            lacks is applied whenever it is read. A second visit between two steps writes it, too.
            None: 1 at first, then what the second step that wrote shows to be the fastest.
    """

    layers: StreamedLayers

    def __init__(self, layers: StreamedLayers, *args: Any) -> None:
        super().__init__(layers, *args)
        self.blocks = blocks = layers.blocks
        self.write_every, self._writing_steps = blocks.write_every, 0
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
        # Of blocks that were not written: their low-rank h as it was when they were.
        self._states_then: dict[Block, States] = {}
        self._visited = dict.fromkeys(blocks.blocks, -1)  # how many updates there were then
        self._scratch = Scratch()
        self._threads: ThreadPoolExecutor | None = None
        blocks.owner = self

    def prepare(self, closure: Callable[[], Any]) -> None:
        """Check the closure's model once; let h begin at 1.

        Raises:
            RuntimeError: α was 0 in the first step, and is not now.
        """
        streamed = (t for parameters in self.of_block.values() for t in parameters)
        full = (t for t in streamed if not t.low_rank and t.group["hessian_smooth"] > 0)
        self.blocks.make_room_for({t.parameter: (curvature.OFFSET, t.hessian_dtype) for t in full})
        if any(self.of_block.values()):
            self.blocks.traffic.reserve(self.blocks.blocks)
        super().prepare(closure)

    def start_hessian(self, trained: TrainedParameter) -> None:
        """Let a parameter's h begin at 1; that of a streamed one comes with its block."""
        if trained.low_rank or trained.parameter not in self.blocks.block_of:
            self.finish()  # updates that wait know of no h
            super().start_hessian(trained)

    # ---- forward passes

    def losses(self, passes: Sequence[Pass]) -> list[float]:
        """Return the losses of forward passes, which run in lockstep."""
        self.blocks.forget_users()
        if self._threads is None or self._threads._max_workers < len(passes):
            self._threads = ThreadPoolExecutor(len(passes))
        device, begun = self.parameters[0].parameter.device, time.perf_counter()
        shifts = {
            ForwardPass(closure, self._threads, device, self.layers.hooks): shift
            for closure, shift in passes
        }
        try:
            for each, shift in shifts.items():
                self._run(each, shift)
            last = -1
            while stopped := {each.before for each in shifts} - {None}:
                # Passes of unequal length, as in generation: serve those that are ahead, in turn.
                ahead = {(b.number - last - 1) % len(self.blocks.blocks): b for b in stopped}
                block = ahead[min(ahead)]
                last = block.number
                at_block: dict[Shift | None, list[ForwardPass]] = {}
                for each, shift in shifts.items():
                    if each.before is block:
                        at_block.setdefault(shift, []).append(each)
                with self.blocks.loaded(block):
                    for shift, passes_of_shift in at_block.items():
                        with self._perturbed_block(block, shift):
                            for each in passes_of_shift:
                                self._run(each, shift)
        finally:
            for each in shifts:
                each.abandon()
        self._choose_write_every(time.perf_counter() - begun)
        return [each.loss for each in shifts]

    def _choose_write_every(self, total: float) -> None:
        """After the second step that wrote blocks, choose how often they are written from now on.

        The first one may have applied all steps of a journal.
        """
        seconds = self.blocks.traffic.seconds
        self._writing_steps += seconds["writing"] > 0
        if self.write_every is None and self._writing_steps == 2:
            self.write_every = best_write_every(total, seconds)
        seconds.clear()

    def _run(self, each: ForwardPass, shift: Shift | None) -> None:
        """Let a pass run until it stops before a block, or ends."""
        with self.perturbed(shift):
            self.blocks.running = each
            try:
                each.resume()
            finally:
                self.blocks.running = None

    @contextlib.contextmanager
    def _perturbed_block(self, block: Block, shift: Shift | None) -> Iterator[None]:
        """Give a block that is in memory perturbed weights."""
        parameters = self.layers.of_block[block] if shift else []
        # Within the last block the head begins, with scratch of its own.
        copies, own = self._scratch.borrow(parameters), {p: p.data for p in parameters}
        try:
            if copies:
                self.perturbing(*shift)(copies)
                give(copies)
            yield
        finally:
            give(own)
            self._scratch.give_back(copies)

    # ---- updates

    def update(self, steps: Sequence[GroupStep]) -> None:
        """Update what stays in memory; blocks get the step when they are read next."""
        update = self.update_of(steps)
        self.apply(self.resident, update)
        if any(self.of_block.values()):
            self.waiting.append(update)
        self.blocks.checksums.clear()

    @torch.no_grad()
    def arrived(self, block: Block, tensors: Mapping[Any, Tensor]) -> bool:
        """Bring a block that was loaded up to date; return whether this changed it."""
        for key, tensor in tensors.items():
            if isinstance(key, tuple):
                self.states[key[0]] = {key[1]: tensor}
        now, trained = self._first + len(self.waiting), self.of_block[block]
        updates = self.waiting[self._next[block] - self._first :] if trained else []
        # What was not written is read as it was then; the low-rank h of then belongs to it.
        self.states.update(self._states_then.pop(block, {}))
        low_rank = (t.parameter for t in trained if t.low_rank)
        then = {p: self.states[p] for p in low_rank if p in self.states}
        with self.blocks.traffic.timed("updating"):
            for update in updates:
                self.apply(trained, update)
        block.is_changed |= bool(updates)
        again, self._visited[block] = self._visited[block] == now, now
        is_due = again or (now + block.number) % (self.write_every or 1) == 0
        if updates and block.home == DISK and not is_due:
            self._states_then[block] = then
            return False
        self._next[block] = now
        done = min(self._next.values()) - self._first
        self.waiting, self._first = self.waiting[done:], self._first + done
        return bool(updates)

    def departed(self, block: Block) -> None:
        """Forget the h of a block that lies with its weights."""
        for key in block.region.places:
            if isinstance(key, tuple):
                self.states.pop(key[0], None)

    def finish(self) -> None:
        """Apply the updates that wait to all blocks."""
        for block in self.blocks.blocks if self.waiting else ():
            self._visited[block] = self._first + len(self.waiting)
            with self.blocks.loaded(block):
                pass

    def forget(self) -> None:
        """Leave out the updates that wait: blocks begin again."""
        self._first += len(self.waiting)
        self.waiting, self._states_then = [], {}
        self._next = dict.fromkeys(self._next, self._first)
