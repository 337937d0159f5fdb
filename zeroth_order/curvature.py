"""h, the diagonal curvature of one parameter: an entry for each weight, or low-rank (HiZOO-L)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from zeroth_order.chunks import Chunk, TrainedParameter
from zeroth_order.noise import compute_dtype

# What the optimizer's state of a parameter holds.
OFFSET, ROWS, COLUMNS = "hessian_minus_one", "hessian_rows", "hessian_columns"
State = dict[str, Any]


def start(trained: TrainedParameter) -> State:
    """Return the state of h = 1.

    A full h is kept as h - 1: it changes by as little as α = 1e-10 a step, and near 1 float32 would
    swallow changes below 6e-8, bfloat16 those below 4e-3. Near 0 their digits are finer. A low-rank
    h is a float64 vector for the rows and one for the columns.
    """
    parameter = trained.parameter
    if not trained.low_rank:
        return {OFFSET: torch.zeros_like(parameter, dtype=trained.hessian_dtype)}
    one = torch.ones((), dtype=torch.float64, device=parameter.device)
    rows = parameter.numel() // trained.columns
    return {ROWS: one.repeat(rows), COLUMNS: one.repeat(trained.columns)}


def hessian_of_chunk(chunk: Chunk, state: State) -> list[Tensor] | tuple[Tensor, ...] | None:
    """Return h of a chunk as ``kernels`` takes it; None where h is 1.

    A low-rank h is h_ij = r_i k_j / mean(r) (Adafactor, arXiv 1804.04235, section 3). It is
    multiplied out here, outside of compiled kernels: torch.compile would cut those in two.
    """
    if OFFSET in state:
        return chunk.view(state[OFFSET])
    if ROWS not in state:
        return None
    dtype = compute_dtype(chunk.of.parameter.dtype)
    rows, columns = state[ROWS], state[COLUMNS].to(dtype)
    factors = (rows / rows.mean()).to(dtype).unsqueeze(1)
    return tuple(factors[piece] * columns for piece in chunk.rows())


def mean_and_max(states: Iterable[State]) -> tuple[float, float]:
    """Return the mean and the maximum of h over all parameters that have one; (1, 1) for none."""
    total, count, maxima = 0.0, 0, []
    for state in states:
        if ROWS in state:
            rows, columns = state[ROWS], state[COLUMNS]
            size, mean = rows.numel() * columns.numel(), columns.mean().item()
            maxima.append(((rows / rows.mean()).max() * columns.max()).item())
        elif OFFSET in state and state[OFFSET].numel():
            offset = state[OFFSET]
            size, mean = offset.numel(), 1 + offset.mean(dtype=torch.float32).item()
            maxima.append(1 + offset.max().item())
        else:
            continue
        total, count = total + mean * size, count + size
    return (total / count, max(maxima)) if count else (1.0, 1.0)
