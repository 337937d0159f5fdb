"""How kernels run on a chunk: operation by operation, or compiled.

Compiling takes 10 to 35 seconds once, and makes a step of a large model several times faster.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from zeroth_order import kernels
from zeroth_order.chunks import NoiseSource, TrainedParameter
from zeroth_order.noise import compute_dtype

# A C++ compiler makes one operation of a product and a sum, rounded once: a sixth less time.
COMPILER_OPTIONS = {"cpp.enable_floating_point_contract_flag": "fast"}
# From so many weights on compiling pays within a hundred steps.
COMPILE_FROM = 1 << 24
# Smaller parameters run operation by operation: torch.compile makes kernels for one core if the
# first chunk that it sees is small.
SMALLEST_COMPILED = 1 << 16


def can_compile(parameters: Sequence[Tensor], wanted: bool | None) -> bool:
    """Return whether kernels are compiled; warn where they should be and cannot.

    ``wanted`` None: for ``COMPILE_FROM`` weights and more.
    """
    if wanted is None:
        wanted = sum(parameter.numel() for parameter in parameters) >= COMPILE_FROM
    for device in {parameter.device for parameter in parameters} if wanted else ():
        reason = why_not_compiled(device)
        if reason is not None:
            warnings.warn(
                f"the step runs several times slower, torch.compile fails here: {reason}",
                stacklevel=6,
            )
            return False
    return wanted


@functools.cache
def why_not_compiled(device: torch.device) -> str | None:
    """Try to compile a small kernel for ``device``; return the reason if it cannot be done."""
    pieces = [*torch.zeros(2, 1 << 15, device=device)]
    noise = NoiseSource(torch.zeros(2, dtype=torch.int32, device=device), None)
    try:
        compiled(kernels.perturb)(pieces, None, noise, torch.ones((), device=device))
    except Exception as error:  # of torch, Triton, a compiler or the system, as it may be
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return None


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` as one kernel for chunks of every size."""
    # One for each kind of chunk: its dtype, its h, its pieces. The limit is for accidents.
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, 64)
    # float16 weights with an h in bfloat16 are meant to be mixed.
    warnings.filterwarnings("ignore", message="bf16 and fp16 are mixed")
    return torch.compile(function, dynamic=True, options=COMPILER_OPTIONS)


def kernel(function: Callable[..., Any], trained: TrainedParameter) -> Callable[..., Any]:
    """Return a function of ``kernels`` as it runs on chunks of a parameter."""
    return compiled(function) if trained.compiles else function


def scalars(numbers: list[float], trained: TrainedParameter) -> list[kernels.Scalar]:
    """Return numbers as the kernels of a parameter take them."""
    if not trained.compiles:
        return numbers
    dtype = compute_dtype(trained.parameter.dtype)
    return [*torch.tensor(numbers, dtype=dtype).to(trained.parameter.device, non_blocking=True)]


def float32_copies(pieces: kernels.Hessian, first: int) -> kernels.Hessian:
    """Return float32 copies of pieces, in scratch memory number ``first`` and the next."""
    if not isinstance(pieces, list):
        return pieces  # a low-rank h is in float32 already
    copies = []
    for number, piece in enumerate(pieces, first):
        count = piece.numel()
        copies.append(scratch(number, (count - 1).bit_length())[:count].view(piece.shape))
    kernels.write(copies, pieces)
    return copies


@functools.lru_cache(maxsize=16)
def scratch(number: int, power: int) -> Tensor:
    """Return a buffer of 2 ** ``power`` float32 numbers, which is made once."""
    return torch.empty(1 << power, dtype=torch.float32, device="cpu")
