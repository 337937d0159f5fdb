"""A direction of its own for every example of a batch, in the same forward passes; torch only.

HiZOO (hizoo.py) uses it with a closure that returns a loss for each example:

    optimizer = HiZOO(model.parameters(), lr=1e-3, directions=ExampleDirections(model))
    loss = optimizer.step(lambda: losses_of_examples(model(**batch)))    # (examples,)

With u ~ N(0, I) of a matrix W, and random signs r_i for its rows and s_i for its columns, example i
sees W + μ Δ_i, Δ_i = u∘(r_i s_iᵀ) (GRZO, arXiv 2606.02857). Its tokens x need no matrix of their
own for that:

    y = W x + μ r_i∘(u (s_i∘x))

and each of these directions is as random as u itself. Of a vector, Δ_i = u∘r_i.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

# Part of the first example's change that another example's loss may show, from rounding.
MIXED_LOSS = 0.1


class NotByExample(RuntimeError):
    """A model uses a weight, or orders its tokens, in a way that is not known here."""


class Tokens(NamedTuple):
    """The example of every token, in the tokens' shape or broadcast to it, and their number."""

    examples: Tensor
    count: int


_TOKENS: ContextVar[Tokens | None] = ContextVar("tokens", default=None)


@contextlib.contextmanager
def examples_of_tokens(examples: Tensor | None, count: int | None = None) -> Iterator[None]:
    """Say which example of its batch every token belongs to, for the forward passes in the block.

    Args:
        examples: whole numbers from 0, of the shape of the tokens, or with a 1 where they do not
            differ: (rows, length), or (rows, 1) for text that grows. None: as outside the block.
            Outside all blocks each row of a model's input is an example.
        count: examples in the batch; None: as many as ``examples`` names.
    """
    if examples is None:
        yield
        return
    count = int(examples.max()) + 1 if count is None else count
    outside = _TOKENS.set(Tokens(examples, count))
    try:
        yield
    finally:
        _TOKENS.reset(outside)


def examples_are_apart() -> bool:
    """Whether every example runs with weights of its own: no tokens can be read for several."""
    return _PERTURBED.get()


_PERTURBED: ContextVar[bool] = ContextVar("perturbed", default=False)


class Noise(Protocol):
    """What the examples' weights are perturbed with: μ u/√h, and signs."""

    def signs(self, parameter: Tensor, examples: Tensor, positions: Tensor) -> Tensor:
        """Return signs in the broadcast shape of ``examples`` and ``positions``.

        Positions count the rows of a matrix first, then its columns; or the numbers of a vector.
        """

    def tiles(self, parameter: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield μ u/√h of a parameter, some of its rows after the other."""

    def rows(self, parameter: Tensor, rows: Tensor) -> Tensor:
        """Return some rows of μ u/√h of a matrix, (rows, columns)."""


class ExampleDirections:
    """Lets every example of a batch run with weights of its own, without making any of them.

    For a forward pass the trained weights are replaced, in all modules, by tensors that know what
    to do where they are used: in ``linear``, in GPT-2's ``addmm``, in ``embedding``, in layer and
    RMS norms, and in elementwise arithmetic. So it does not matter which module does it, and a
    weight that several modules share has the same direction everywhere. Where a weight is used
    otherwise, ``NotByExample`` names it. The weights themselves are never touched.

    Attributes:
        parameters: what is perturbed.
        first_example: number of the batch's first example, where several processes share a batch.
        checked: whether ``check`` has found that this model can be perturbed so.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.places = [
            (part, name, parameter)
            for part in module.modules()
            for name, parameter in part._parameters.items()
            if parameter is not None and parameter.requires_grad
        ]
        self.names = {p: name for name, p in module.named_parameters() if p.requires_grad}
        self.parameters = set(self.names)
        self.first_example = 0
        self.checked = False

    @contextlib.contextmanager
    def perturbed(self, noise: Noise) -> Iterator[set[Tensor]]:
        """Evaluate with each example's own weights; yields the parameters used so far."""
        reached: set[Tensor] = set()
        weights = {
            parameter: ExampleWeight.of(Use(parameter, name, noise, reached))
            for parameter, name in self.names.items()
        }
        running: list[contextlib.ExitStack] = []

        def enter(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            running.append(contextlib.ExitStack())
            if _TOKENS.get() is None:
                running[-1].enter_context(examples_of_tokens(*rows_of(arguments, keywords)))

        def leave(*_: Any) -> None:
            running.pop().close()

        with contextlib.ExitStack() as left:
            left.callback(self.module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            left.callback(self.module.register_forward_hook(leave, always_call=True).remove)
            for part, name, parameter in self.places:
                left.callback(part._parameters.__setitem__, name, parameter)
                part._parameters[name] = weights[parameter]
            left.callback(_PERTURBED.reset, _PERTURBED.set(True))
            yield reached

    def check(self, losses: Callable[[], Tensor], none: Noise, first: Noise) -> list[str]:
        """Try whether this model can be perturbed so, in two forward passes.

        Args:
            losses: returns the losses of a batch, (examples,).
            none: noise whose signs are 0 for all examples.
            first: noise whose signs are 0 for all examples but the first.

        Returns:
            The names of the weights that no loss depends on.

        Raises:
            NotByExample: a weight is used in a way that is not known, or the loss of an example
                depends on another one's direction.
        """
        with self.perturbed(none):
            expected = losses().double()
        with self.perturbed(first) as reached:
            change = (losses() - expected).abs()
        precision = max(torch.finfo(parameter.dtype).eps for parameter in self.parameters)
        allowed = (MIXED_LOSS * change[0]).maximum(precision * expected.abs())
        mixed = (change > allowed)[1:].nonzero()
        if len(mixed):
            raise NotByExample(
                f"the loss of example {1 + int(mixed[0])} depends on the direction of example 0; "
                "give the losses in the order of the examples, and say with examples_of_tokens() "
                "whose tokens stand where"
            )
        self.checked = True
        return [name for parameter, name in self.names.items() if parameter not in reached]


def rows_of(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Tensor | None, int]:
    """Take each row of a model's input, token ids or vectors, for an example."""
    first = [keywords.get(name) for name in ("input_ids", "inputs_embeds")]
    given = (value for value in (*first, *arguments, *keywords.values()))
    tokens = next((value for value in given if isinstance(value, Tensor)), None)
    if tokens is None:
        return None, 0
    shape = tokens.shape[:-1] if tokens.is_floating_point() else tokens.shape
    rows = torch.arange(shape[0], device=tokens.device)
    return rows.view(-1, *[1] * (len(shape) - 1)), shape[0]


# ----------------------------------------------------------------- what stands in a weight's place


@dataclass(frozen=True, eq=False)
class Use:
    """A parameter in one forward pass.

    Attributes:
        parameter: as it is.
        name: its name in the model.
        noise: of the direction.
        reached: parameters that were used, of all of the model.
    """

    parameter: nn.Parameter
    name: str
    noise: Noise
    reached: set[Tensor]

    def signs(self, tokens: Tokens, rows: bool, device: torch.device) -> Tensor:
        """Return every example's signs, (examples, rows) or (examples, columns)."""
        parameter = self.parameter
        height = parameter.shape[0]
        start, stop = (0, height) if rows else (height, height + parameter.shape[1])
        positions = torch.arange(start, stop, dtype=torch.int32, device=device)
        examples = torch.arange(tokens.count, dtype=torch.int32, device=device)
        return self.noise.signs(parameter, examples.unsqueeze(1), positions)

    def whole(self) -> Tensor:
        """Return μ u/√h in the parameter's shape: for vectors."""
        whole = torch.empty_like(self.parameter)
        for part, tile in self.noise.tiles(self.parameter):
            whole[part] = tile
        return whole

    def perturbed(self, tokens: Tokens, examples: Tensor) -> Tensor:
        """Return the perturbed parameter of every token, float32 at least: for vectors."""
        self.reached.add(self.parameter)
        own = self.parameter.data
        change = self.signs(tokens, True, own.device)
        if own.dim() == 2:
            change = change.unsqueeze(2) * self.signs(tokens, False, own.device).unsqueeze(1)
        change = change.mul_(self.whole())
        return (change + own)[examples]

    def refused(self, how: str) -> NotByExample:
        """Return the error for a use that is not known."""
        return NotByExample(f"no direction for every example: {self.name} {how}")


class ExampleWeight(Tensor):
    """Stands in a weight's place, and is another weight for every example where it is used.

    Attributes:
        use: which weight it is.
        own: the weight itself, after ``changes``.
        changes: what was done to all its numbers alike.
        is_cast: whether that was casts alone.
        is_transposed: whether it is a matrix' transpose, which ``matmul`` alone takes.
    """

    use: Use
    own: Tensor
    changes: tuple[Callable[[Tensor], Tensor], ...]
    is_cast: bool
    is_transposed = False

    @classmethod
    def of(cls, use: Use) -> ExampleWeight:
        """Stand for a parameter as it is."""
        return cls._make(use, use.parameter.data, (), True)

    @classmethod
    def _make(cls, use: Use, own: Tensor, changes: Any, is_cast: bool) -> ExampleWeight:
        weight = torch.Tensor._make_subclass(cls, own)
        weight.use, weight.own, weight.changes, weight.is_cast = use, own, changes, is_cast
        return weight

    def changed(self, change: Callable[[Tensor], Tensor], is_cast: bool) -> ExampleWeight:
        """Return what stands for the changed weight."""
        changes = (*self.changes, change)
        return self._make(self.use, change(self.own), changes, self.is_cast and is_cast)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in KNOWN:
            return KNOWN[function](*args, **kwargs)
        name = function.__name__
        weights = [v for v in (*args, *kwargs.values()) if isinstance(v, ExampleWeight)]
        if weights and weights[0].is_transposed:
            raise weights[0].use.refused(f"is transposed and used by {name}")
        if name in ELEMENTWISE and len(weights) == 1 and not kwargs:
            return elementwise(function, weights[0], args)
        if name in CASTS and weights[0] is args[0]:
            return weights[0].changed(lambda own: function(own, *args[1:], **kwargs), True)
        if name in CASTS:  # of something else, to the weight's dtype
            return function(*map(own_of, args), **kwargs)
        if name in LOOKS:
            with torch._C.DisableTorchFunctionSubclass():
                result = function(*args, **kwargs)
            if not isinstance(result, Tensor):
                return result
        if not weights:  # they are in a list, as of torch.cat
            raise NotByExample(f"no direction for every example: weights are used by {name}")
        raise weights[0].use.refused(f"is used by {name}")


# Methods and functions by name: what looks at a weight's form alone, what casts it, and what treats
# all its numbers alike.
LOOKS = {
    *("__get__", "size", "dim", "ndimension", "numel", "nelement", "stride", "element_size"),
    *("is_contiguous", "is_floating_point", "is_complex", "get_device", "data_ptr", "__len__"),
    *("__hash__", "__repr__", "storage_offset", "result_type"),
}
CASTS = {"to", "float", "half", "bfloat16", "double", "type_as", "contiguous", "clone", "detach"}
ELEMENTWISE = {
    *("mul", "__mul__", "__rmul__", "multiply", "add", "__add__", "__radd__", "sub", "__sub__"),
    *("__rsub__", "rsub", "div", "__truediv__", "mul_", "add_", "__imul__", "__iadd__"),
}


def own_of(value: Any) -> Any:
    """Return the weight that an ``ExampleWeight`` stands for, and anything else as it is."""
    return value.own if isinstance(value, ExampleWeight) else value


def tokens_now(use: Use) -> Tokens:
    """Return the tokens of the forward pass that runs."""
    tokens = _TOKENS.get()
    if tokens is None:
        raise use.refused("is used outside the model, where the tokens' examples are not known")
    return tokens


def examples_along(use: Use, shape: torch.Size, strides: tuple[int, ...]) -> Tensor:
    """Return the example of each token of a tensor whose axes before the features are ``shape``.

    The tokens may be in one axis, or have heads beside them, as (rows, length, heads), or
    (rows, heads, length): where both axes are as long, the tokens' is the one of longer strides.
    The result broadcasts to ``shape``, or ``shape`` to it where positions stand for all rows.
    """
    examples = tokens_now(use).examples
    given = examples.shape
    as_given = [b in (1, a) for a, b in zip(shape, given, strict=False)]
    # What stands in one row alone, as positions, is every row's.
    if len(shape) == len(given) and (as_given[0] or shape[0] == 1) and all(as_given[1:]):
        return examples
    if len(given) == 2 and len(shape) == 3 and shape[0] == given[0]:
        fitting = [axis for axis in (1, 2) if given[1] in (1, shape[axis])]
        if fitting:
            axis = max(fitting, key=lambda axis: strides[axis])
            return examples.unsqueeze(3 - axis)
    if len(given) == 2 and len(shape) < 3:
        # Rows behind one another, perhaps with heads beside them.
        of_row = shape[0] // given[0] if given[1] == 1 else given[1]
        if shape[0] == given[0] * of_row:
            return examples.expand(-1, of_row).reshape(-1, *[1] * (len(shape) - 1))
    raise use.refused(
        f"meets tokens of shape {tuple(shape)}, where the examples of {tuple(given)} are known"
    )


# ------------------------------------------------------------------------ the uses that are known


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return W x + b and the examples' own parts, as ``functional.linear``."""
    inputs = foldable(inputs)
    output = functional.linear(inputs, own_of(weight), own_of(bias))
    if isinstance(weight, ExampleWeight):
        use, tokens = only_cast(weight), tokens_now(weight.use)
        examples = examples_along(use, inputs.shape[:-1], inputs.stride())
        signed = inputs * use.signs(tokens, False, inputs.device).to(inputs.dtype)[examples]
        rows = use.signs(tokens, True, inputs.device).to(output.dtype)[examples]
        if signed.shape[:-1] != output.shape[:-1]:
            output = output.expand(*signed.shape[:-1], -1).clone()
        for part, noise in use.noise.tiles(use.parameter):
            change = functional.linear(signed, noise.to(inputs.dtype))
            output[..., part].addcmul_(change.to(output.dtype), rows[..., part])
    return add_bias(output, bias)


def addmm(bias: Tensor, inputs: Tensor, weight: Tensor) -> Tensor:
    """Return x W + b and the examples' own parts, as ``torch.addmm``: GPT-2's linear layer."""
    return add_bias(matmul(inputs, weight, own_of(bias)), bias)


def matmul(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W and the examples' own parts."""
    if isinstance(inputs, ExampleWeight):
        raise inputs.use.refused("is multiplied from the left")
    if isinstance(weight, ExampleWeight) and weight.is_transposed:
        return linear(inputs, ExampleWeight.of(weight.use), bias)
    own, inputs = own_of(weight), foldable(inputs)
    output = torch.matmul(inputs, own) if bias is None else torch.addmm(bias, inputs, own)
    if isinstance(weight, ExampleWeight):
        use, tokens = only_cast(weight), tokens_now(weight.use)
        examples = examples_along(use, inputs.shape[:-1], inputs.stride())
        signed = inputs * use.signs(tokens, True, inputs.device).to(inputs.dtype)[examples]
        columns = use.signs(tokens, False, inputs.device).to(output.dtype)[examples]
        change = sum(
            torch.matmul(signed[..., part], noise.to(inputs.dtype))
            for part, noise in use.noise.tiles(use.parameter)
        )
        output = torch.addcmul(output, change.to(output.dtype), columns)
    return output


def transpose(weight: ExampleWeight) -> ExampleWeight:
    """Return what stands for a matrix' transpose: the matrix itself, which remembers it."""
    if weight.changes or weight.is_transposed or weight.dim() != 2:
        raise weight.use.refused("is changed and transposed")
    same = ExampleWeight.of(weight.use)
    same.is_transposed = True
    return same


def embedding(
    ids: Tensor, weight: Tensor, padding_idx: int | None = None, *_: Any, **__: Any
) -> Tensor:
    """Return the tokens' rows of W, each with its example's own part."""
    use, tokens = only_cast(weight), tokens_now(weight.use)
    # Positions may stand there once for all rows.
    ids, examples = torch.broadcast_tensors(ids, examples_along(use, ids.shape, ids.stride()))
    found, places = ids.unique(return_inverse=True)
    change = use.noise.rows(use.parameter, found).to(weight.own.dtype)[places]
    change = change * use.signs(tokens, False, ids.device).to(change.dtype)[examples]
    rows = use.noise.signs(use.parameter, examples.to(torch.int32), ids.to(torch.int32))
    change.mul_(rows.to(change.dtype).unsqueeze(-1))
    return functional.embedding(ids, weight.own, padding_idx).add_(change)


def layer_norm(
    inputs: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Return ``functional.layer_norm`` with each token's own weight and bias."""
    output = functional.layer_norm(inputs.to(wide(inputs.dtype)), normalized_shape, eps=eps)
    return scaled(output, weight, bias).to(inputs.dtype)


def rms_norm(
    inputs: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """Return ``functional.rms_norm`` with each token's own weight."""
    eps = torch.finfo(inputs.dtype).eps if eps is None else eps
    output = functional.rms_norm(inputs.to(wide(inputs.dtype)), normalized_shape, eps=eps)
    return scaled(output, weight, None).to(inputs.dtype)


def scaled(output: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return ``output`` times ``weight`` plus ``bias``, of which some are the examples' own."""
    if weight is not None:
        output = output * weight
    return output if bias is None else output + bias


def elementwise(
    function: Callable[..., Any], weight: ExampleWeight, args: tuple[Any, ...]
) -> Tensor | ExampleWeight:
    """Combine a weight with a number, which stays a weight, or with the numbers of every token."""
    (other,) = (value for value in args if value is not weight)
    if not isinstance(other, Tensor) or not other.dim():
        of_numbers = [weight is value for value in args]

        def change(own: Tensor) -> Tensor:
            return function(*(own if here else other for here in of_numbers))

        return weight.changed(change, False)
    use, features = weight.use, weight.own.dim()
    if not features or features > 2 or other.dim() <= features:
        raise use.refused(f"is combined with {tuple(other.shape)} by {function.__name__}")
    examples = examples_along(use, other.shape[:-features], other.stride())
    own = use.perturbed(tokens_now(use), examples)
    for change in weight.changes:
        own = change(own)
    dtype = torch.result_type(weight.own, other)
    if function.__name__.endswith("_") and not function.__name__.endswith("__"):
        dtype = other.dtype
    return function(*(own if value is weight else other for value in args)).to(dtype)


def foldable(inputs: Tensor) -> Tensor:
    """Return tokens that torch multiplies by a matrix as rows of one matrix.

    Tokens that lie apart, as the last one of each text, it would multiply one text after the other,
    by a copy of the matrix for each: of a parameter it does not, but what stands here for one needs
    no gradient.
    """
    return inputs.contiguous()


def add_bias(output: Tensor, bias: Tensor | None) -> Tensor:
    """Add the examples' own parts of a bias to an ``output`` that has the bias itself."""
    if isinstance(bias, ExampleWeight):
        use, tokens = only_cast(bias), tokens_now(bias.use)
        use.reached.add(use.parameter)
        change = use.signs(tokens, True, output.device).mul_(use.whole())
        examples = examples_along(use, output.shape[:-1], output.stride())
        output = output + change.to(output.dtype)[examples]
    return output


def only_cast(weight: ExampleWeight) -> Use:
    """Return the use of a weight that was cast at most; it counts as reached."""
    use = weight.use
    if weight.is_transposed or not weight.is_cast:
        raise use.refused("is changed before it is used")
    use.reached.add(use.parameter)
    return use


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that norms are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


KNOWN: dict[Any, Callable[..., Tensor]] = {
    functional.linear: linear,
    functional.embedding: embedding,
    functional.layer_norm: layer_norm,
    functional.rms_norm: rms_norm,
    torch.addmm: addmm,
    torch.matmul: matmul,
    Tensor.matmul: matmul,
    Tensor.__matmul__: matmul,
    Tensor.t: transpose,
    Tensor.T.__get__: transpose,
    Tensor.mT.__get__: transpose,
}
