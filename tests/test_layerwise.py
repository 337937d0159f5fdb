"""Perturbing a model module by module: exact weights, the right losses, little scratch memory."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import FAMILIES, USUAL, of_families, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, BartConfig

from hizoo import HiZOO, Layers, OnlyInPlace
from zeroth_order import weights

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOKENS = torch.tensor([[2, 9, 17, 30, 5, 8], [2, 11, 40, 7, 21, 3]])


def loss_of(model: nn.Module) -> float:
    return model(TOKENS, labels=TOKENS, use_cache=False).loss.item()


def bits_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(model.state_dict())


def assert_bits_equal(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


# One half-precision dtype for each usual family; make test-all has all of both.
PAIRS = {("opt", torch.float16), ("llama", torch.bfloat16)}
EVERY_FAMILY = [
    pytest.param(
        *(family, dtype),
        id=f"{family}-{dtype}",
        marks=[]
        if family in USUAL and (dtype == torch.float32 or (family, dtype) in PAIRS)
        else [pytest.mark.slow],
    )
    for family in FAMILIES
    for dtype in DTYPES
]


@pytest.mark.parametrize("family, dtype", EVERY_FAMILY)
def test_every_family_runs_with_exactly_the_perturbed_weights(family, dtype) -> None:
    model = tiny_model(family).to(dtype)
    shifted = copy.deepcopy(model)
    before = bits_of(model)
    settings = {"lr": 0.0, "eps": 1e-2, "hessian_smooth": 0.0, "seed": 4}
    optimizer = HiZOO(model.parameters(), layers=Layers(model), **settings)
    seen = []
    optimizer.estimate(lambda: seen.append(loss_of(model)) or seen[-1])
    assert_bits_equal(model, before)
    # The first shift in place, from the untouched weights, rounds as the scratch weights do (in
    # float32 the one multiplies and adds at once).
    reference = HiZOO(shifted.parameters(), **settings)
    # Before the first step a loss tells whether the model allows it; its last is taken twice.
    for sign, loss in zip((1, -1, -1), seen[1:], strict=True):
        shifted.load_state_dict(before)
        reference.weights = None
        reference.loss_along(lambda: 0.0, sign * 1e-2)
        exact = 0.0 if dtype != torch.float32 else 1e-6
        assert loss_of(shifted) == pytest.approx(loss, rel=exact, abs=0)
    assert seen[1] != seen[2]
    optimizer.step()
    assert_bits_equal(model, before)


def test_tied_weights_get_the_same_noise_wherever_they_are_used() -> None:
    model = tiny_model("opt")
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    layers = Layers(model)
    seen = []
    for part in (model.model.decoder.embed_tokens, model.lm_head):
        part.register_forward_hook(lambda part, *_: seen.append(part.weight.detach().clone()))

    def write(fresh: dict[nn.Parameter, torch.Tensor]) -> None:
        for parameter, scratch in fresh.items():
            scratch.copy_(parameter.detach() + torch.randn_like(parameter))

    with layers.replaced(write):
        loss_of(model)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], model.lm_head.weight)


def test_generation_draws_no_noise_for_every_token(monkeypatch) -> None:
    model = tiny_model("llama", tie_word_embeddings=False).to(torch.bfloat16)
    before = bits_of(model)
    optimizer = HiZOO(model.parameters(), hessian_smooth=0.0, layers=Layers(model))
    drawn = []
    draw = weights.noise_of_bundle
    monkeypatch.setattr(
        weights, "noise_of_bundle", lambda *bundle: (drawn.append(None), draw(*bundle))[1]
    )

    def generated(count: int) -> list[torch.Tensor]:
        drawn.clear()
        texts = []

        def closure() -> float:
            text = model.generate(
                TOKENS, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
            )
            texts.append(text)
            return float(text.float().mean())

        optimizer.estimate(closure)
        optimizer._forget_estimates()
        return texts

    texts = generated(2)
    few = len(drawn)
    generated(12)
    assert len(drawn) == few
    assert_bits_equal(model, before)
    assert all(text.shape[1] == TOKENS.shape[1] + 2 for text in texts)


def test_a_parameter_whose_module_does_not_run_is_an_error() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Linear(3, 3)
            self.forgotten = nn.Linear(3, 3)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.used(inputs)

    model = Unused()
    before = bits_of(model)
    optimizer = HiZOO(model.parameters(), layers=Layers(model))
    with pytest.raises(RuntimeError, match=r"does not depend on forgotten\.weight: freeze"):
        optimizer.step(lambda: model(torch.ones(2, 3)).sum())
    assert_bits_equal(model, before)


def test_an_exception_inside_a_module_brings_the_weights_back() -> None:
    model = tiny_model("opt")
    before = bits_of(model)
    optimizer = HiZOO(model.parameters(), layers=Layers(model))

    def fail(*_) -> None:
        raise MemoryError("inside")

    last = list(model.modules())[-1]
    last.forward = fail
    with pytest.raises(MemoryError, match="inside"):
        optimizer.step(lambda: loss_of(model))
    del last.forward
    assert_bits_equal(model, before)
    optimizer.step(lambda: loss_of(model))


@pytest.mark.parametrize("tied", [True, False])
def test_scratch_is_the_largest_module_and_a_tied_embedding(tied) -> None:
    model = tiny_model("opt", tie_word_embeddings=tied)
    layers = Layers(model)
    optimizer = HiZOO(model.parameters(), layers=layers)
    for _ in range(3):
        optimizer.step(lambda: loss_of(model))
    matrices = [[p for p in owned if p.dim() > 1] for _, owned in layers.owners]
    largest = max(sum(p.numel() * 4 for p in owned) for owned in matrices)
    vectors = sum(p.numel() * 4 + 64 for p in layers.vectors)
    embedding = model.lm_head.weight.numel() * 4
    scratch = sum(piece.nbytes() for piece in layers.scratch.free)
    assert scratch <= largest + 64 * 2 + vectors + (embedding if tied else 0)


def test_frozen_weights_are_left_alone() -> None:
    model = tiny_model("opt")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1" in name)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    layers = Layers(model)
    before = bits_of(model)
    HiZOO(trained, lr=1e-2, layers=layers).step(lambda: loss_of(model))
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed and all("layers.1" in name for name in changed)


# --------------------------------------------------------------------------- models it is not for


class ReadsAnothersWeight(nn.Module):
    """As DBRX's experts and the convolutions of Mamba: a weight that another module uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(inputs) @ self.second.weight)


def test_check_finds_weights_that_another_module_reads() -> None:
    small = [(ReadsAnothersWeight().to(dtype), torch.ones(2, 3, dtype=dtype)) for dtype in DTYPES]
    for model, inputs in (*small, *((tiny_model("lfm2").to(dtype), None) for dtype in DTYPES)):
        before = bits_of(model)
        layers = Layers(model)

        def loss(model=model, inputs=inputs) -> float:
            return loss_of(model) if inputs is None else model(inputs).sum()

        # Casts that autocast keeps would hide it, and so would a loss that hardly ever changes.
        for autocast in (False, True):
            for objective in (loss, lambda loss=loss: float(loss() > 1e9)):
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    with pytest.raises(OnlyInPlace, match="another one's weights"):
                        layers.check(objective)
                    assert_bits_equal(model, before)
        with pytest.raises(OnlyInPlace, match="another one's weights"):
            HiZOO(model.parameters(), layers=Layers(model)).step(loss)
        assert_bits_equal(model, before)


@of_families
def test_check_passes_where_every_module_reads_its_own(family) -> None:
    model = tiny_model(family).to(torch.bfloat16)
    before = bits_of(model)
    with torch.no_grad():
        assert Layers(model).check(lambda: loss_of(model)) == []
    assert_bits_equal(model, before)


def test_check_names_weights_that_no_text_passes_through() -> None:
    shape = {"vocab_size": 50, "d_model": 16, "decoder_layers": 1, "decoder_ffn_dim": 16}
    heads = {"encoder_layers": 1, "decoder_attention_heads": 2, "encoder_attention_heads": 2}
    config = BartConfig(**shape, **heads, is_decoder=True)
    model = AutoModelForCausalLM.from_config(config).eval()
    layers = Layers(model)
    tokens = torch.tensor([[1, 5, 9, 4]])

    def loss() -> float:
        return model(tokens, labels=tokens).loss

    with torch.no_grad():
        unused = layers.check(loss)
    assert unused and all("encoder_attn" in name for name in unused)
    # It is known now that the loss does not depend on them.
    HiZOO(model.parameters(), layers=layers).step(loss)


class RoutesToOneExpert(nn.Module):
    """As a mixture of experts: not every one gets a token of every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
        self.forgotten = nn.Linear(3, 3)

    def forward(self, inputs: torch.Tensor, expert: int) -> torch.Tensor:
        return self.experts[expert](inputs)


def test_experts_without_a_token_are_no_weights_that_nothing_reads() -> None:
    model = RoutesToOneExpert()
    layers = Layers(model)
    with torch.no_grad():
        unused = layers.check(lambda: model(torch.ones(2, 3), 1).sum())
    assert unused == ["forgotten.weight", "forgotten.bias"]
    model.forgotten.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = HiZOO(trained, layers=Layers(model))
    for expert in (0, 2):
        optimizer.step(lambda expert=expert: model(torch.ones(2, 3), expert).sum())
