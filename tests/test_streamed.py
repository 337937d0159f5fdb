"""Streamed weights against the layer-by-layer optimizer in memory: the same bits."""

from __future__ import annotations

import copy
import itertools
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor, nn

from hizoo import HiZOO, Layers
from zeroth_order.blocks import Blocks, blocks_of, placeholder
from zeroth_order.streamed import StreamedLayers

FAMILIES = ("opt", "llama", "qwen2", "gpt_neox", "gemma2")
STATE = "hessian_minus_one"


class Tensors:
    """Weights by their names, which count what is read."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def read(self, name: str, target: Tensor) -> int:
        target.copy_(self.tensors[name])
        return target.nbytes


def streamed(model: nn.Module, folder: Path | None, budget: int = 0, **how: Any) -> nn.Module:
    """Return a model like another one whose blocks are streamed."""
    tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.data = placeholder(parameter, "cpu")
    blocks = Blocks(twin, Tensors(tensors), folder, budget, **how)
    for name, parameter in twin.named_parameters():
        if parameter not in blocks.block_of:
            parameter.data = tensors[name].clone()
    return twin


def trained(
    model: nn.Module, layers: Any, steps: int, accumulated: int, scheduled: bool, **settings: Any
) -> tuple[list[tuple], dict[str, Tensor], HiZOO]:
    """Return losses, g and c of every step, and the weights and h at the end."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = HiZOO(groups, layers=layers, **settings)
    generator, log = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        for _ in range(accumulated):
            ids = torch.randint(5, 400, (2, 9), generator=generator)
            optimizer.estimate(lambda ids=ids: model(input_ids=ids, labels=ids).loss, len(ids))
            log.append(optimizer.losses)
        optimizer.step()
        log.append([optimizer.projected_gradient, optimizer.curvature])
        if scheduled:
            for group in optimizer.param_groups:
                group["lr"] *= 0.5
                group["hessian_smooth"] *= 0.5
                group["weight_decay"] *= 0.5
    optimizer.finish()
    tensors: dict[str, Tensor] = {}
    blocks = blocks_of(model)
    names = {p: name for name, p in model.named_parameters()}
    for parameter in blocks.in_order(names) if blocks else names:
        tensors[names[parameter]] = parameter.detach().clone()
        for kind, state in optimizer.state.get(parameter, {}).items():
            tensors[f"{names[parameter]} {kind}"] = state.clone()
    return log, tensors, optimizer


def differences(expected: tuple, found: tuple) -> list[str]:
    """Return what differs between two results of ``trained``, by name."""
    wrong = [] if expected[0] == found[0] else ["losses, g or c"]
    wrong += [] if expected[1].keys() == found[1].keys() else ["names"]
    return wrong + [n for n, t in expected[1].items() if not torch.equal(t, found[1].get(n, t + 1))]


HESSIANS = {
    "full": {"hessian_smooth": 1e-3},
    "low-rank": {"hessian_smooth": 1e-3, "hessian": "lowrank"},
    "no h": {"hessian_smooth": 0.0},
    "auto": {"hessian_smooth": 0.0, "lr": "auto", "curvature_every": 2},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_bit_is_that_of_the_step_in_memory(family: str, tmp_path: Path) -> None:
    wrong = []
    kinds = itertools.product(HESSIANS, (torch.float32, torch.bfloat16))
    for number, (name, dtype) in enumerate(kinds):
        model = tiny_model(family, num_hidden_layers=3).to(dtype)
        settings = {"lr": 1e-3, "weight_decay": 0.1, "eps": 1e-2} | HESSIANS[name]
        course = {"steps": 4, "accumulated": 1 + number % 2, "scheduled": number % 3 > 0}
        course |= settings | {"num_samples": 1 + (number % 4 == 1)}
        folder, budget = tmp_path if number % 4 else None, (number % 3) * 30_000
        # A GPU's blocks go through buffers on the host.
        twin = streamed(model, folder, budget, staged=number % 2 == 0)
        found = trained(twin, StreamedLayers(twin), **course)
        expected = trained(model, Layers(model), **course)
        wrong += [(name, dtype, each) for each in differences(expected, found)]
    assert not wrong
    assert threading.active_count() < 100
