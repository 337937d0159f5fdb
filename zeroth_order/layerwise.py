"""Weights that stay as they are, bit for bit: each module runs with perturbed copies of its own.

For half precision, where a shift that is taken back leaves rounding errors, which add up. The
copies lie in scratch memory, which is allocated once and used again.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zeroth_order.weights import Shift, Weights

# Bytes: weights that lie in one piece each begin where a tensor of their own would.
ALIGNMENT = 64

Copies = dict[nn.Parameter, Tensor]
# Puts weights into the tensors that it is given.
Write = Callable[[Copies], None]


class OnlyInPlace(RuntimeError):
    """Weights of a model are read where their module does not run: shift them in place."""


class Scratch:
    """Pieces of memory; those in ``free`` are not borrowed."""

    def __init__(self) -> None:
        self.free: list[torch.UntypedStorage] = []

    def __getstate__(self) -> dict[str, Any]:
        """Return what ``copy`` and ``pickle`` keep: the memory is allocated anew."""
        return {"free": []}

    def borrow(self, parameters: Sequence[Tensor]) -> dict[Any, Tensor]:
        """Return tensors like some parameters of one device, all in one piece.

        That is the smallest free piece that is large enough. Where none is, the largest makes room
        for a new one.
        """
        if not parameters:
            return {}
        sizes = [-(-p.nbytes // ALIGNMENT) * ALIGNMENT for p in parameters]
        device = parameters[0].device
        pieces = [piece for piece in self.free if piece.device == device]
        pieces.sort(key=torch.UntypedStorage.nbytes)
        piece = next((piece for piece in pieces if piece.nbytes() >= sum(sizes)), None)
        taken = piece or (pieces[-1] if pieces else None)
        self.free = [free for free in self.free if free is not taken]
        piece = piece or torch.UntypedStorage(sum(sizes), device=device)
        weights, start = {}, 0
        for parameter, size in zip(parameters, sizes, strict=True):
            empty = torch.empty(0, dtype=parameter.dtype, device=device)
            offset = start // parameter.element_size()
            weights[parameter] = empty.set_(piece, offset, parameter.shape)
            start += size
        return weights

    def give_back(self, weights: dict[Any, Tensor]) -> None:
        """Take back the pieces that borrowed tensors lie in."""
        pieces = [tensor.untyped_storage() for tensor in weights.values()]
        self.free += {piece.data_ptr(): piece for piece in pieces}.values()


class Layers:
    """Lets each module of a model run with other weights than its own, kept in scratch memory.

    As a module's forward begins, its trainable weights are written into scratch memory and swapped
    in; as it ends, also by an exception, they are swapped out. Scratch is as large as the largest
    module's weights. Weights that several modules share are written once and kept until the end of
    the evaluation, and so are those of a module that runs again (in generation, for every token).
    Vectors, of norms and biases, are written all together before: one by one each of them would
    take nearly as long as a matrix. Modules in ``leave_out`` are perturbed in another way.
    """

    def __init__(self, module: nn.Module, leave_out: Collection[nn.Module] = ()) -> None:
        self.owners: list[tuple[nn.Module, list[nn.Parameter]]] = []
        for part in module.modules():
            trained = [p for p in part.parameters(recurse=False) if p.requires_grad]
            if trained and part not in leave_out:
                self.owners.append((part, trained))
        self.uses = Counter(parameter for _, owned in self.owners for parameter in owned)
        self.trained: set[Tensor] = set(self.uses)
        self.vectors = [parameter for parameter in self.uses if parameter.dim() < 2]
        self.names = {parameter: name for name, parameter in module.named_parameters()}
        self.scratch = Scratch()
        # Whether ``check`` has found that this model can be perturbed so.
        self.checked = False

    def make_weights(self, *args: Any) -> LayerwiseWeights:
        """Return what perturbs the weights so; takes the arguments of ``Weights``."""
        return LayerwiseWeights(self, *args)

    def loaded(self, parameters: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield parameters, in any order."""
        yield from parameters

    @contextlib.contextmanager
    def replaced(self, write: Write, alone: bool = False) -> Iterator[set[nn.Parameter]]:
        """Evaluate with the weights that ``write`` makes.

        With ``alone`` all weights are NaN but those of the modules that run, so that it shows in
        what they return if one reads another one's weights. Yields the parameters whose modules
        have run so far.
        """
        own = idle = {parameter: parameter.data for parameter in self.uses}
        if alone:
            idle = {p: data.new_full((), torch.nan).expand(data.shape) for p, data in own.items()}
        reached: set[nn.Parameter] = set()
        depth: Counter[nn.Parameter] = Counter()
        kept: Copies = {}
        for device in {vector.device for vector in self.vectors}:
            kept |= self._written([v for v in self.vectors if v.device == device], write)

        def enter(parameters: list[nn.Parameter], *_: Any) -> None:
            entering = [p for p in parameters if not depth[p]]
            fresh = [p for p in entering if p not in kept]
            give({p: own[p] for p in fresh})
            copies = self._written(fresh, write)
            give({p: copies[p] if p in copies else kept[p] for p in entering})
            depth.update(parameters)

        def leave(parameters: list[nn.Parameter], *_: Any) -> None:
            depth.subtract(parameters)
            leaving = [p for p in parameters if not depth[p]]
            used = {p: p.data for p in leaving if p not in kept}
            give({p: idle[p] for p in leaving})
            if any(self.uses[p] > 1 or p in reached for p in used):
                kept.update(used)
            else:
                self.scratch.give_back(used)
            reached.update(leaving)

        with contextlib.ExitStack() as hooks:
            for part, parameters in self.owners:
                before = functools.partial(enter, parameters)
                after = functools.partial(leave, parameters)
                hooks.callback(part.register_forward_pre_hook(before, prepend=True).remove)
                hooks.callback(part.register_forward_hook(after, always_call=True).remove)
            try:
                give(idle)
                yield reached
            finally:
                give(own)
                self.scratch.give_back(kept)

    def _written(self, parameters: list[nn.Parameter], write: Write) -> Copies:
        """Return scratch for parameters of one device, with the weights that ``write`` makes."""
        if weights := self.scratch.borrow(parameters):
            write(weights)
        return weights

    def check(self, loss: Callable[[], Any]) -> list[str]:
        """Try whether a model's weights are read by their own modules alone, while these run.

        ``loss`` is evaluated ``alone`` and, if that fails, as it is. The weights keep every bit.

        Returns:
            The names of the weights that no module reads, so that the loss does not depend on
            them. Those of an expert that got no token are not among them: another one did.

        Raises:
            OnlyInPlace: a module reads another one's weights, and would not see the perturbed ones.
        """
        own = {parameter: parameter.data for parameter in self.uses}

        def write(weights: Copies) -> None:
            for parameter, copy in weights.items():
                copy.copy_(own[parameter])

        try:
            with self.replaced(write, alone=True) as reached:
                found = self._count_nan(loss)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of any module, which may do anything with a weight
            self._count_nan(loss)  # what it raises in any case is not of this check
            raise OnlyInPlace(f"a module needs another one's weights ({error})") from error
        if found and found > self._count_nan(loss):
            raise OnlyInPlace("a module reads another one's weights")
        self.checked = True
        return self.unreached(self.uses, reached)

    def unreached(self, parameters: Iterable[Tensor], reached: Iterable[Tensor]) -> list[str]:
        """Return the names of parameters of whose kind none was reached."""
        kinds = {kind_of(self.names[parameter]) for parameter in reached}
        return [name for name in map(self.names.get, parameters) if kind_of(name) not in kinds]

    def _count_nan(self, loss: Callable[[], Any]) -> int:
        """Evaluate ``loss``; return how many times a module, or itself, returned NaN."""
        found: list[bool] = []

        def look(part: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                found.append(bool(output.isnan().any()))

        # Under autocast torch keeps weights that it has cast, and would not see other ones.
        torch.clear_autocast_cache()
        with contextlib.ExitStack() as hooks:
            for part, _ in self.owners:
                hooks.callback(part.register_forward_hook(look).remove)
            found.append(math.isnan(float(loss())))
        return sum(found)


def give(weights: Copies) -> None:
    """Let parameters hold these weights."""
    for parameter, weight in weights.items():
        parameter.data = weight


def kind_of(name: str) -> str:
    """Return a weight's name without the numbers of its layer and its expert."""
    return re.sub(r"\d+", "*", name)


class LayerwiseWeights(Weights):
    """Runs each module with a perturbed copy of its weights: exact in every dtype."""

    def __init__(self, layers: Layers, *args: Any) -> None:
        super().__init__(*args)
        self.layers = layers

    def prepare(self, closure: Callable[[], Any]) -> None:
        """Check the closure's model once; raise RuntimeError if a weight plays no part in it."""
        if not self.layers.checked and (unused := self.layers.check(closure)):
            raise RuntimeError(
                f"the loss does not depend on {unused[0]}: freeze it before Layers(model), with "
                "requires_grad_(False)"
            )
        super().prepare(closure)

    def loss_at(self, closure: Callable[[], Any], shift: Shift | None) -> float:
        """Return the loss at some shift, with the weights themselves at θ."""
        with self.perturbed(shift):
            return float(closure())

    def perturbed(self, shift: Shift | None) -> contextlib.AbstractContextManager[Any]:
        """Let each module run with its weights at some shift."""
        if shift is None:
            return contextlib.nullcontext()
        return self.layers.replaced(self.perturbing(*shift))

    def perturbing(self, direction: int, sign: float) -> Write:
        """Return what writes θ + ``sign`` μ u/√h."""

        def write(copies: Copies) -> None:
            parameters = [self.trained[parameter] for parameter in copies]
            for chunk, noise in self.chunks_with_noise(parameters, direction):
                self.perturb_chunk(chunk, noise, sign, copies[chunk.of.parameter])

        return write
