"""A direction for every example: the textbook's step, every family, and what is refused."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle_hizoo import OracleByExample, read_noise, read_signs
from test_hizoo import largest_difference, whole_hessian_offset
from tiny_models import tiny_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

import hizoo
from example_directions import ExampleDirections, NotByExample, examples_of_tokens
from hizoo import ExampleNoise, HiZOO
from language_model.adapters import add_lora
from zeroth_order.layerwise import LayerwiseWeights

TOKENS = torch.tensor(
    [[2, 9, 17, 30, 5, 8], [2, 11, 40, 7, 21, 3], [2, 60, 6, 77, 90, 4], [2, 5, 41, 8, 33, 9]]
)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of each matrix, the last one shorter."""
    monkeypatch.setattr(hizoo, "CACHED_TILE_ELEMENTS", 3000)


def token_losses(model: nn.Module, tokens: Tensor) -> Tensor:
    """Every row's loss, (rows,)."""
    logits = model(tokens, use_cache=False).logits[:, :-1]
    losses = cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    return losses.mean(1)


def perceptron(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(7)
    parts = [nn.Linear(6, 20), nn.LayerNorm(20), nn.Tanh(), nn.Linear(20, 12, bias=False)]
    return nn.Sequential(*parts, nn.RMSNorm(12), nn.Linear(12, 3)).to(dtype)


def inputs_of(batch: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(4 + batch % 3, 6, generator=generator, dtype=torch.float64).to(dtype)


def output_losses(model: nn.Module, inputs: Tensor) -> Tensor:
    return model(inputs).double().square().mean(1)


def loss_by_parameters(
    model: nn.Module, losses: Callable[[nn.Module, Tensor], Tensor]
) -> Callable[[Tensor, list[Tensor]], float]:
    """The loss of one example, a row, as a function of the parameters, in float64."""
    other = copy.deepcopy(model).double()
    trained = [parameter for parameter in other.parameters() if parameter.requires_grad]

    @torch.no_grad()
    def loss(row: Tensor, parameters: list[Tensor]) -> float:
        for own, parameter in zip(trained, parameters, strict=True):
            own.data = parameter
        row = row.double() if row.is_floating_point() else row
        return float(losses(other, row.unsqueeze(0)))

    return loss


def deltas(optimizer: HiZOO, count: int) -> list[list[list[Tensor]]]:
    """Δ of every sample and example of the coming step."""
    directions = []
    for draw in range(optimizer.num_samples):
        noise, signs = read_noise(optimizer, draw), read_signs(optimizer, count, draw)
        directions.append(
            [[u * s for u, s in zip(noise, of_example, strict=True)] for of_example in signs]
        )
    return directions


def follow_oracle(
    model: nn.Module,
    losses: Callable[[nn.Module, Tensor], Tensor],
    batches: list[list[Tensor]],
    **settings: Any,
) -> None:
    """Do a step for each of ``batches``, each of which holds those that are accumulated."""
    trained = [p for p in model.parameters() if p.requires_grad]
    double = trained[0].dtype == torch.float64
    settings = {"lr": 1e-2, "eps": 1e-3 if double else 1e-2, **settings}
    decay = [0.1 if p.dim() > 1 else 0.0 for p in trained]
    groups = [{"params": [p], "weight_decay": d} for p, d in zip(trained, decay, strict=True)]
    optimizer = HiZOO(groups, seed=5, directions=ExampleDirections(model), **settings)
    names = ("step_size", "curvature_eps", "clip", "normalize")
    oracle = OracleByExample(
        trained,
        settings["eps"],
        settings["hessian_smooth"],
        [settings["lr"]] * len(trained),
        decay,
        settings.get("hessian") == "lowrank",
        **{name: settings[name] for name in names if name in settings},
    )
    loss = loss_by_parameters(model, losses)
    start = [parameter.detach().clone() for parameter in trained]
    for parts in batches:
        weights = [1.0 + number for number, _ in enumerate(parts)]
        expected = [[functools.partial(loss, row) for row in part] for part in parts]
        directions = deltas(optimizer, sum(map(len, parts)))
        for part, weight in zip(parts, weights, strict=True):
            optimizer.estimate(lambda part=part: losses(model, part), weight)
        oracle.step_by_example(expected, weights, directions)
        optimizer.step()
    moved = largest_difference(start, oracle.parameters)
    assert moved > 1e-3
    # Norms of float64 weights compute in float32 in many families.
    bound = 1e-3 if double else 5e-3
    assert largest_difference(trained, oracle.parameters) < bound * moved
    for parameter, h in zip(trained, oracle.hessians, strict=True):
        change = (h - 1).abs().max().item()
        assert (change > 0) == (settings["hessian_smooth"] > 0)
        error = (whole_hessian_offset(optimizer, parameter) - (h - 1)).abs().max().item()
        assert error <= (1e-2 if double else 5e-2) * change


@pytest.mark.parametrize("family", ["opt", "gpt2", "gpt_neox", "llama", "qwen2", "gemma2"])
def test_steps_of_every_family_follow_the_textbook(family: str) -> None:
    """Linear, Conv1D, embeddings, all norms, tied heads, flattened rows: whole steps."""
    model = tiny_model(family).double()
    batches = [[TOKENS[:2], TOKENS[1:]], [TOKENS[:2]]]
    follow_oracle(model, token_losses, batches, hessian_smooth=1e-4, lr=1e-4)


def test_steps_in_single_precision_follow_the_textbook() -> None:
    model = tiny_model("opt")
    follow_oracle(model, token_losses, [[TOKENS]], hessian_smooth=1e-4, lr=1e-4)


def test_lora_follows_the_textbook() -> None:
    model = add_lora(tiny_model("gpt2"), 4, 8).double()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    follow_oracle(model, token_losses, [[TOKENS]] * 2, hessian_smooth=1e-3)


SETTINGS: dict[str, dict[str, Any]] = {
    "MeZO": {"hessian_smooth": 0.0},
    "two directions": {"hessian_smooth": 1e-2, "num_samples": 2},
    "low rank": {"hessian_smooth": 1e-2, "hessian": "lowrank", "num_samples": 2},
    "bounded": {"hessian_smooth": 0.0, "clip": 0.9},
    "normalized": {"hessian_smooth": 1e-3, "normalize": True, "num_samples": 2},
    "by curvature": {"hessian_smooth": 0.0, "step_size": "curvature", "curvature_every": 1},
    "own eps": {"hessian_smooth": 1e-2, "curvature_eps": 2e-2, "curvature_every": 1},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_settings_follow_the_textbook(settings: dict[str, Any]) -> None:
    batches = [[inputs_of(step), inputs_of(step + 1)] for step in range(8)]
    follow_oracle(perceptron(), output_losses, batches, **settings)


def test_signs_are_fair_and_independent() -> None:
    """Of rows, of columns, of examples and of directions: all as if drawn by a coin."""
    model, count = perceptron(), 4000
    optimizer = HiZOO(model.parameters(), directions=ExampleDirections(model))
    slot = optimizer._slots[0]
    examples = torch.arange(count, dtype=torch.int32).unsqueeze(1)
    positions = torch.arange(26, dtype=torch.int32)
    signs = torch.cat([optimizer._signs(slot, draw, examples, positions) for draw in (0, 1)], dim=1)
    assert signs.abs().eq(1).all() and signs.shape == (count, 52)
    means = torch.cat([signs.mean(0), (signs[1:] * signs[:-1]).mean(0)])
    correlations = (signs.T @ signs / count).fill_diagonal_(0)
    assert means.abs().max() < 5 / math.sqrt(count)
    assert correlations.abs().max() < 5 / math.sqrt(count)
    assert means.std() == pytest.approx(1 / math.sqrt(count), rel=0.3)


# ---- what the step promises


def half_step(dtype: torch.dtype, **settings: Any) -> tuple[nn.Module, HiZOO]:
    model = perceptron(dtype)
    directions = ExampleDirections(model)
    optimizer = HiZOO(model.parameters(), directions=directions, **{"lr": 1e-2, **settings})
    return model, optimizer


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_are_not_touched_by_an_estimate(dtype: torch.dtype) -> None:
    model, optimizer = half_step(dtype, lr=0.0, weight_decay=0.1, hessian_smooth=1e-3)
    before = copy.deepcopy(model.state_dict())
    parameters = dict(model.named_parameters())
    for batch in range(20):
        inputs = inputs_of(batch, dtype)
        optimizer.estimate(lambda inputs=inputs: output_losses(model, inputs))
        assert all(parameters[name] is own for name, own in model.named_parameters())
        optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert optimizer.hessian_mean_and_max()[1] > 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sees_its_examples_directions(dtype: torch.dtype) -> None:
    model, optimizer = half_step(dtype, eps=3e-2)
    wide = copy.deepcopy(model).double()
    directions = ExampleDirections(wide)
    expected = HiZOO(wide.parameters(), eps=3e-2, lr=1e-2, directions=directions)
    differences = []
    for of_optimizer, own in ((optimizer, model), (expected, wide)):
        inputs = inputs_of(1, next(own.parameters()).dtype)
        of_optimizer.estimate(lambda own=own, inputs=inputs: output_losses(own, inputs))
        differences.append(of_optimizer._estimates[0][1][0][0])
    bound = 0.02 if dtype == torch.float16 else 0.15
    assert (differences[0] - differences[1]).norm() < bound * differences[1].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hessian", ["full", "lowrank"])
def test_a_run_resumes_bit_for_bit(dtype: torch.dtype, hessian: str) -> None:
    settings = {"hessian_smooth": 1e-3, "hessian": hessian, "num_samples": 2, "clip": 2.0}
    settings |= {"eps": 3e-2}
    model, optimizer = half_step(dtype, **settings)

    def go_on(own: nn.Module, of_optimizer: HiZOO, batches: range) -> None:
        for batch in batches:
            inputs = inputs_of(batch, dtype)
            for part in (inputs, inputs[:3]):
                of_optimizer.estimate(lambda part=part: output_losses(own, part))
            of_optimizer.step()

    go_on(model, optimizer, range(3))
    weights, saved = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    copied, its_optimizer = copy.deepcopy((model, optimizer))
    go_on(model, optimizer, range(3, 6))
    resumed, of_resumed = half_step(dtype, **settings, seed=99)
    resumed.load_state_dict(weights)
    of_resumed.load_state_dict(saved)
    for own, of_own in ((resumed, of_resumed), (copied, its_optimizer)):
        go_on(own, of_own, range(3, 6))
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, own.state_dict()[name]), name
            assert not torch.equal(tensor, weights[name]), name


def test_what_is_not_finite_or_raises_changes_nothing() -> None:
    model, optimizer = half_step(torch.float32)
    inputs = inputs_of(0, torch.float32)
    optimizer.step(lambda: output_losses(model, inputs))
    before = copy.deepcopy(model.state_dict())
    bad = torch.tensor([0.0, math.inf, 0.0, 0.0])
    optimizer.step(lambda: output_losses(model, inputs) + bad)
    assert optimizer.skipped_steps == 1

    def fail() -> Tensor:
        output_losses(model, inputs)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(fail)
    assert all(isinstance(own, nn.Parameter) for own in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_losses_along_a_direction_share_it() -> None:
    model, optimizer = half_step(torch.float64, hessian_smooth=1e-2)
    inputs = inputs_of(0)
    optimizer.step(lambda: output_losses(model, inputs))
    shifted = copy.deepcopy(model)
    noise = read_noise(optimizer, draw=4)
    for own, parameter, u in zip(shifted.parameters(), model.parameters(), noise, strict=True):
        own.data += 0.02 * u / (1 + whole_hessian_offset(optimizer, parameter)) ** 0.5
    found = optimizer.loss_along(lambda: output_losses(model, inputs).mean(), 0.02, draw=4)
    # u is float32, and its last place depends on where a processor's vectors end.
    assert found == pytest.approx(output_losses(shifted, inputs).mean().item(), rel=1e-7)


def test_only_a_part_of_the_noise_is_there_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tile that is drawn is larger than the tiles of a step, nor are rows that no one reads."""
    monkeypatch.setattr(hizoo, "CACHED_TILE_ELEMENTS", 700)
    model = tiny_model("llama")
    optimizer = HiZOO(model.parameters(), directions=ExampleDirections(model))
    drawn: list[int] = []
    normal = hizoo.standard_normals
    monkeypatch.setattr(
        hizoo, "standard_normals", lambda bits: drawn.append(bits.numel()) or normal(bits)
    )
    optimizer.step(lambda: token_losses(model, TOKENS))
    assert max(drawn) <= 1400 < model.lm_head.weight.numel() / 10


class RepeatedMatrices(TorchDispatchMode):
    """Counts the products of several texts with one and the same matrix, one after the other."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if function is torch.ops.aten.bmm.default:
            self.count += args[1].stride(0) == 0
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_tokens_that_lie_apart_are_multiplied_together(family: str) -> None:
    """As the last of each row: otherwise torch copies a bfloat16 matrix for each of them."""
    model = tiny_model(family)
    optimizer = HiZOO(model.parameters(), directions=ExampleDirections(model))
    with RepeatedMatrices() as products:
        optimizer.step(lambda: model(TOKENS, logits_to_keep=1).logits[:, 0, :2].mean(1))
    assert products.count == 0


# ---- several examples in a row, and what is refused


def test_tokens_say_whose_they_are() -> None:
    """Two examples in each row, given apart and together: the same losses."""
    model = tiny_model("gpt_neox").double()
    optimizer = HiZOO(model.parameters(), directions=ExampleDirections(model))
    optimizer._prepare()
    rows = TOKENS.reshape(2, 12)
    positions = torch.arange(6).repeat(2, 2)
    own = torch.ones(6, 6, dtype=torch.bool).tril()
    mask = torch.zeros(12, 12, dtype=torch.bool)
    mask[:6, :6] = mask[6:, 6:] = own
    additive = torch.zeros(2, 1, 12, 12, dtype=torch.float64)
    additive.masked_fill_(~mask, torch.finfo(torch.float64).min)
    with torch.no_grad(), optimizer.directions.perturbed(ExampleNoise(optimizer, 0, 1.0)):
        apart = model(TOKENS).logits
        with examples_of_tokens(torch.arange(4).repeat_interleave(6).view(2, 12)):
            together = model(rows, attention_mask=additive, position_ids=positions).logits
        with examples_of_tokens(torch.tensor([[3], [2], [1], [0]])):
            turned = model(TOKENS.flip(0)).logits
    assert torch.allclose(apart, together.view_as(apart), atol=1e-9)
    assert torch.allclose(apart, turned.flip(0), atol=1e-9)
    assert not torch.allclose(apart, model(TOKENS).logits, atol=1e-5)


def test_losses_of_the_wrong_examples_are_found() -> None:
    model, optimizer = half_step(torch.float32)
    inputs = inputs_of(0, torch.float32)
    with pytest.raises(NotByExample, match="loss of example 3 depends on the direction of"):
        optimizer.step(lambda: output_losses(model, inputs).flip(0))
    with pytest.raises(NotByExample, match="loss of example 1 depends"):
        optimizer.step(lambda: output_losses(model, inputs).mean().expand(4))
    assert all(isinstance(own, nn.Parameter) for own in model.parameters())


REFUSED = {
    "convolution": ("lfm2", "layers.0.conv.conv.weight is used by squeeze"),
    "scan": ("mamba", "mixer.A_log is used by exp"),
    "experts": ("dbrx", "ffn.experts.mlp.v1 is used by view"),
    "sinks": ("gpt_oss", "self_attn.sinks is used by reshape"),
}


@pytest.mark.parametrize(("family", "line"), REFUSED.values(), ids=REFUSED)
def test_unknown_uses_are_refused_by_name(family: str, line: str) -> None:
    model = tiny_model(family)
    before = copy.deepcopy(model.state_dict())
    optimizer = HiZOO(model.parameters(), directions=ExampleDirections(model))
    with pytest.raises(NotByExample, match=line):
        optimizer.step(lambda: token_losses(model, TOKENS))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_arguments_that_do_not_go_together() -> None:
    model = perceptron()
    directions = ExampleDirections(model)
    with pytest.raises(ValueError, match="exclude each other"):
        HiZOO(model.parameters(), directions=directions, layers=LayerwiseWeights(model))
    with pytest.raises(ValueError, match="normalize needs directions"):
        HiZOO(model.parameters(), normalize=True)
    with pytest.raises(ValueError, match="exactly the parameters"):
        HiZOO(list(model.parameters())[1:], directions=directions)
    optimizer = HiZOO(model.parameters(), directions=directions)
    with pytest.raises(ValueError, match="losses of the examples"):
        optimizer.step(lambda: output_losses(model, inputs_of(0)).mean())
    model.add_module("spare", nn.Linear(2, 2).double())
    model[-1].forward = lambda hidden: hidden
    optimizer = HiZOO(model.parameters(), directions=ExampleDirections(model))
    with pytest.raises(RuntimeError, match=r"no loss depends on spare.weight: freeze it"):
        optimizer.step(lambda: output_losses(model, inputs_of(0)))
