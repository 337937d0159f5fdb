"""Parts of parameters move as the wholes do: the noise, h and the rounding are those of places."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import hizoo
from hizoo import HiZOO, Shard
from zeroth_order.layerwise import LayerwiseWeights

# Shapes, and the dimension that is cut; None: every process has all of it.
SHAPES = {(10, 20): 0, (8, 36): 1, (24,): 0, (4, 8, 5): 1, (8, 3, 5): 0, (7,): None}


class Threads:
    """Sums and maxima over threads, each of which is a process."""

    def __init__(self, count: int) -> None:
        self.barrier, self.given = threading.Barrier(count, timeout=60), [None] * count

    def reduced(self, number: int, tensor: Tensor, operation: Callable) -> Tensor:
        self.given[number] = tensor.clone()
        self.barrier.wait()
        result = operation(torch.stack(self.given), 0)
        self.barrier.wait()
        return result


def parts_of_process(
    wholes: list[nn.Parameter], number: int, count: int, threads: Threads
) -> tuple[list[nn.Parameter], SimpleNamespace]:
    """Return one process's parameters, and what it tells the optimizer."""
    parameters, places = [], {}
    for whole, dimension in zip(wholes, SHAPES.values(), strict=True):
        if dimension is None:
            parameters.append(nn.Parameter(whole.data.clone()))
            continue
        # As torch cuts: the last part may be smaller.
        length = math.ceil(whole.shape[dimension] / count)
        part = whole.data.split(length, dimension)[number].clone()
        parameters.append(nn.Parameter(part))
        places[parameters[-1]] = Shard(tuple(whole.shape), dimension, length * number)
    shards = SimpleNamespace(
        places=places,
        sum=lambda tensor: threads.reduced(number, tensor, torch.sum),
        max=lambda tensor: threads.reduced(number, tensor, torch.amax),
    )
    return parameters, shards


def make_wholes(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(5)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def train(parameters: list[nn.Parameter], shards: object = None, **settings) -> HiZOO:
    """Five steps with given losses, which decide g and c."""
    groups = [
        {"params": parameters[:3], "weight_decay": 0.1},
        {"params": parameters[3:], "weight_decay": 0.0},
    ]
    layers = settings.pop("layerwise", False) and LayerwiseWeights(nn.ParameterList(parameters))
    if layers:
        layers.checked = True
    optimizer = HiZOO(
        groups,
        lr=1e-2,
        eps=1e-2,
        hessian_smooth=1e-1,
        shards=shards,
        layers=layers or None,
        **settings,
    )
    generator = torch.Generator().manual_seed(6)
    # The optimizer takes the first step's last loss again.
    passes = 1 + 2 * optimizer.num_samples
    for _ in range(5):
        losses = iter((1e-3 * torch.rand(9, generator=generator)).tolist())
        last: list[float] = []

        def loss(losses=losses, last=last) -> float:
            last[:] = last if len(last) == passes else [*last, next(losses)]
            return last[-1]

        optimizer.estimate(loss)
        optimizer.step()
    optimizer.logged = optimizer.hessian_mean_and_max()
    return optimizer


def train_in_parts(wholes: list[nn.Parameter], count: int, **settings) -> list[tuple]:
    threads = Threads(count)
    found: list = [None] * count

    def process(number: int) -> None:
        parameters, shards = parts_of_process(wholes, number, count, threads)
        found[number] = parameters, train(parameters, shards, **settings), shards.places

    running = [threading.Thread(target=process, args=(number,)) for number in range(count)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return found


def joined(tensors: list[Tensor], dimension: int | None) -> Tensor:
    return tensors[0] if dimension is None else torch.cat(tensors, dimension)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of a parameter, and of one row each."""
    monkeypatch.setattr(hizoo, "CACHED_TILE_ELEMENTS", 40)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize(
    "dtype, settings",
    [
        (torch.float32, {}),
        (torch.float64, {"num_samples": 2}),
        (torch.bfloat16, {"layerwise": True}),
        (torch.float16, {}),
    ],
)
def test_parts_with_a_full_h_are_those_of_the_whole(count, dtype, settings) -> None:
    wholes = make_wholes(dtype)
    found = train_in_parts(wholes, count, **settings)
    alone = train(wholes, **settings)
    for number, (whole, dimension) in enumerate(zip(wholes, SHAPES.values(), strict=True)):
        parts = [parameters[number] for parameters, _, _ in found]
        torch.testing.assert_close(joined(parts, dimension).data, whole.data, rtol=0, atol=0)
        states = [
            optimizer.state[parameters[number]]["hessian_minus_one"]
            for parameters, optimizer, _ in found
        ]
        assert states[0].dtype == alone.state[whole]["hessian_minus_one"].dtype
        torch.testing.assert_close(
            joined(states, dimension), alone.state[whole]["hessian_minus_one"], rtol=0, atol=0
        )
    for _, optimizer, _ in found:
        assert optimizer.logged == pytest.approx(alone.logged, rel=1e-5)


@pytest.mark.parametrize("count", [2, 4])
def test_parts_with_a_low_rank_h_are_those_of_the_whole(count) -> None:
    wholes = make_wholes(torch.float64)
    found = train_in_parts(wholes, count, hessian="lowrank", num_samples=2)
    alone = train(wholes, hessian="lowrank", num_samples=2)
    for number, (whole, dimension) in enumerate(zip(wholes, SHAPES.values(), strict=True)):
        parts = [parameters[number] for parameters, _, _ in found]
        torch.testing.assert_close(joined(parts, dimension).data, whole.data, rtol=1e-12, atol=0)
        if whole.dim() < 2:
            continue
        for name, vector in alone.state[whole].items():
            for parameters, optimizer, _ in found:
                own = optimizer.state[parameters[number]][name]
                # h is of order one; the vectors are of the whole in all processes.
                torch.testing.assert_close(own, vector, rtol=1e-12, atol=1e-12)
    for _, optimizer, _ in found:
        # The mean of a full h, of vectors, is taken in float32.
        assert optimizer.logged == pytest.approx(alone.logged, rel=1e-6)


def test_compiled_kernels_draw_the_noise_of_places() -> None:
    if hizoo.why_not_compiled(torch.device("cpu")):
        pytest.skip("torch.compile needs a C++ compiler")
    whole, part = torch.empty(300, 500), nn.Parameter(torch.empty(300, 250))
    key = torch.tensor(hizoo.tile_key(3, 1, 0), dtype=torch.int32)
    plain = torch.cat(hizoo.drawn(hizoo.Draw(key, None, (0, 1)), whole.chunk(2)))
    slot = hizoo.Slot.cut(part, {}, 1, False, True, shard=Shard((300, 500), 1, 250))
    (draw,) = HiZOO._draws(SimpleNamespace(_stream=lambda draw: 3), [(slot, 0)], 0)
    compiled = torch.cat(hizoo.compiled(hizoo.drawn)(draw, slot.view(part, 0)))
    torch.testing.assert_close(compiled, plain[:, 250:], rtol=1e-6, atol=1e-6)


def test_perturbation_scale_is_checked_with_all_parts() -> None:
    wholes = make_wholes(torch.float32)
    with pytest.raises(ValueError, match="below the precision") as alone:
        HiZOO(wholes, eps=1e-12).check_perturbation_scale()
    threads, messages = Threads(2), []

    def process(number: int) -> None:
        parameters, shards = parts_of_process(wholes, number, 2, threads)
        try:
            HiZOO(parameters, eps=1e-12, shards=shards).check_perturbation_scale()
        except ValueError as error:
            messages.append(str(error))

    running = [threading.Thread(target=process, args=(number,)) for number in range(2)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert len(messages) == 2 and messages[0] == messages[1]
    assert messages[0] == str(alone.value)


def test_places_of_a_part_are_indices_of_the_whole() -> None:
    whole = torch.arange(4 * 6 * 5).view(4, 6, 5)
    rows, columns = Shard((4, 6, 5), 0, 2), Shard((4, 6, 5), 1, 3)
    assert torch.equal(rows.index(whole[2:], 7, 31), whole[2:].reshape(-1)[7:31])
    part = whole[:, 3:5].contiguous()
    assert torch.equal(columns.index(part, 3, 29), part.view(-1)[3:29])


def test_shards_exclude_directions_of_examples() -> None:
    parameter = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="shards and directions"):
        HiZOO([parameter], shards=object(), directions=object())
