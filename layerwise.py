"""Running a model's modules with other weights, and giving their own back, bit for bit.

HiZOO (hizoo.py) uses it for half precision, where shifting weights in place and back does not
return: they drift by rounding. Torch only.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

Weights = dict[nn.Parameter, Tensor]
# Bytes: a module's weights lie in one piece of scratch, each as a tensor of its own would.
ALIGNMENT = 64
# Relative difference of two losses with the same weights, on a device that adds in any order.
SAME_LOSS = 1e-4


class LayerwiseWeights:
    """Lets each module of a model run with other weights than its own, kept in scratch memory.

    As a module's forward begins, its trainable weights are written into scratch memory and swapped
    in; as it ends, also by an exception, they are swapped out. Scratch is as large as the largest
    module's weights. Weights that several modules share are written once and kept until the end of
    the evaluation, and so are those of a module that runs again (in generation, for every token).
    """

    def __init__(self, module: nn.Module) -> None:
        self.owners: list[tuple[nn.Module, list[nn.Parameter]]] = []
        for part in module.modules():
            trained = [p for p in part._parameters.values() if p is not None and p.requires_grad]
            if trained:
                self.owners.append((part, trained))
        self.uses = Counter(parameter for _, owned in self.owners for parameter in owned)
        self.names = {parameter: name for name, parameter in module.named_parameters()}
        self.free: list[torch.UntypedStorage] = []
        # Whether a module that does not run is known to have no part in the loss.
        self.checked = False

    def __getstate__(self) -> dict[str, Any]:
        """Return what ``copy`` and ``pickle`` keep: scratch memory is made anew."""
        return {**self.__dict__, "free": []}

    @contextlib.contextmanager
    def replaced(self, write: Callable[[Weights], None]) -> Iterator[None]:
        """Evaluate with the weights that ``write`` puts into the tensors it is given.

        Raises:
            RuntimeError: the module of a parameter did not run, so that its own weights may count;
                not after ``check``, which has shown that they do not.
        """
        with self._swapped(write) as finished:
            yield
        missed = self._names_but(finished)
        if missed and not self.checked:
            raise RuntimeError(
                f"{missed[0]} was not perturbed: the forward of its module did not run; perturb "
                "this model in place"
            )

    def check(self, loss: Callable[[], Any]) -> list[str]:
        """Try whether a model's weights are read by their own modules alone, while these run.

        ``loss`` is evaluated twice: once as it is, and once with NaN in place of all weights whose
        module is not running, so that a read from elsewhere shows. No weight is touched.

        Returns:
            The names of the weights whose module does not run: the loss does not depend on them.

        Raises:
            RuntimeError: the two losses differ, or the second is an exception: with this model
                perturbed weights would not be seen everywhere.
        """
        expected = float(loss())
        own = {parameter: parameter.data for parameter in self.uses}

        def write(weights: Weights) -> None:
            for parameter, scratch in weights.items():
                scratch.copy_(own[parameter])

        try:
            for parameter, data in own.items():
                parameter.data = data.new_full((), torch.nan).expand(data.shape)
            with self._swapped(write) as finished:
                found = float(loss())
        except Exception as error:  # of any module, which may do anything with a weight
            raise RuntimeError(f"a module needs another one's weights ({error})") from error
        finally:
            for parameter, data in own.items():
                parameter.data = data
        if not abs(found - expected) <= SAME_LOSS * abs(expected):
            raise RuntimeError("a module reads another one's weights")
        self.checked = True
        return self._names_but(finished)

    def _names_but(self, finished: set[nn.Parameter]) -> list[str]:
        return [self.names[parameter] for parameter in self.uses if parameter not in finished]

    @contextlib.contextmanager
    def _swapped(self, write: Callable[[Weights], None]) -> Iterator[set[nn.Parameter]]:
        """As ``replaced``, for whatever modules run; yields the parameters whose module has."""
        own: Weights = {}
        kept: Weights = {}
        depth: Counter[nn.Parameter] = Counter()
        finished: set[nn.Parameter] = set()

        def enter(parameters: list[nn.Parameter], *_: Any) -> None:
            entering = [p for p in parameters if p not in own]
            fresh = self._borrow([p for p in entering if p not in kept])
            if fresh:
                write(fresh)
            for parameter in entering:
                own[parameter] = parameter.data
                parameter.data = fresh[parameter] if parameter in fresh else kept[parameter]
            depth.update(parameters)

        def leave(parameters: list[nn.Parameter], *_: Any) -> None:
            depth.subtract(parameters)
            leaving = [p for p in parameters if p in own and not depth[p]]
            used = {p: p.data for p in leaving if p not in kept}
            for parameter in leaving:
                parameter.data = own.pop(parameter)
            if any(self.uses[p] > 1 or p in finished for p in used):
                kept.update(used)
            else:
                self._give_back(used)
            finished.update(leaving)

        with contextlib.ExitStack() as hooks:
            for part, parameters in self.owners:
                before = functools.partial(enter, parameters)
                after = functools.partial(leave, parameters)
                hooks.callback(part.register_forward_pre_hook(before, prepend=True).remove)
                hooks.callback(part.register_forward_hook(after, always_call=True).remove)
            try:
                yield finished
            finally:
                for parameter, data in own.items():
                    parameter.data = data
                self._give_back(kept)

    def _borrow(self, parameters: list[nn.Parameter]) -> Weights:
        """Scratch for a module's parameters, in the smallest free piece that is large enough."""
        if not parameters:
            return {}
        sizes = [-(-p.numel() * p.element_size() // ALIGNMENT) * ALIGNMENT for p in parameters]
        device = parameters[0].device
        pieces = [piece for piece in self.free if piece.device == device]
        pieces.sort(key=torch.UntypedStorage.nbytes)
        piece = next((piece for piece in pieces if piece.nbytes() >= sum(sizes)), None)
        # Where none is, the largest piece makes room for a larger one.
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

    def _give_back(self, weights: Weights) -> None:
        pieces = [tensor.untyped_storage() for tensor in weights.values()]
        self.free += {piece.data_ptr(): piece for piece in pieces}.values()
