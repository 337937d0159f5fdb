"""LoRA and prefix-tuning: scores, losses and texts are those of peft's own forward pass."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle_scoring import draw, samples_of
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import (
    FAMILIES,
    OTHER_FAMILIES,
    WINDOWED_FAMILIES,
    newline_writing_model,
    of_families,
    tiny_model,
    tiny_tokenizer,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from hizoo import HiZOO, Layers
from language_model import objectives, packing, scoring
from language_model.adapters import (
    add_lora,
    add_prefix,
    check_merge,
    prefix_length,
    save_merged,
)
from language_model.encoding import Encoder
from language_model.generation import GenerationSettings, generate
from language_model.shared_tokens import can_share_prompt
from tasks import get_task
from utils import InputError

TOKENS = torch.tensor([17, 40, 233, 68, 91])
ADAPTERS: dict[str, Callable[[PreTrainedModel], PeftModel]] = {
    "lora": lambda model: add_lora(model, 4, 8),
    "prefix": lambda model: add_prefix(model, 5, False, TOKENS),
    "reparameterised": lambda model: add_prefix(model, 5, True, TOKENS),
    "noise": lambda model: add_prefix(model, 3, False, None),
}
OF_A_WINDOW = [
    family if family == "starcoder2" else pytest.param(family, marks=pytest.mark.slow)
    for family in WINDOWED_FAMILIES
]


def adapted(family: str, kind: str, model: PreTrainedModel | None = None) -> PeftModel:
    """Return a model with an adapter whose weights are no longer where they started."""
    torch.manual_seed(1)
    model = ADAPTERS[kind](model or tiny_model(family)).eval()
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def reloaded(family: str, model: PeftModel, folder: Path) -> PeftModel:
    """Return what another user gets from the saved adapter, with peft alone."""
    model.save_pretrained(str(folder))
    return PeftModel.from_pretrained(tiny_model(family), folder).eval()


@torch.no_grad()
def log_probabilities(model: PeftModel, tokens: Sequence[int], scored: int) -> Tensor:
    """The oracle: one whole text through peft's forward pass, without padding or cache."""
    text = torch.tensor([tokens])
    logits = model(input_ids=text, attention_mask=torch.ones_like(text)).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, text[0, 1:, None])[:, 0][-scored:]


# ----------------------------------------------------------------------------- adding an adapter


def test_lora_starts_as_the_model_and_trains_projections_only() -> None:
    failures = []
    for family in ("llama", "gpt_neox", "gpt2", *OTHER_FAMILIES):
        model, text = tiny_model(family), torch.tensor([[5, 9, 31, 7]])
        expected = model(text).logits
        model = add_lora(model, 4, 8)
        right = torch.equal(model(input_ids=text).logits, expected)
        right &= all(".lora_A." in name or ".lora_B." in name for name in trained(model))
        parts = {name.split(".lora_")[0].rpartition(".")[2] for name in trained(model)}
        # In this order they are saved, too.
        saved = model.peft_config["default"].to_dict()["target_modules"]
        right &= saved in (["q_proj", "v_proj"], ["query_key_value"], ["c_attn"])
        if not right or parts != {*saved}:
            failures.append((family, parts))
    assert not failures


def test_a_prefix_starts_as_the_real_tokens() -> None:
    text, failures = torch.tensor([[5, 9, 31, 7]]), []
    for family in (*FAMILIES, "bloom", "falcon", "mpt", "xglm", "dbrx"):
        for kind in ("prefix", "reparameterised"):
            model = tiny_model(family)
            expected = model(torch.cat([TOKENS[None], text], dim=1)).logits[:, len(TOKENS) :]
            model = ADAPTERS[kind](model).eval()
            found = model(input_ids=text, attention_mask=torch.ones_like(text)).logits
            names = trained(model)
            right = names and all(name.startswith("prompt_encoder.") for name in names)
            right &= any("transform" in name for name in names) == (kind == "reparameterised")
            error = (found - expected).abs().max()
            if not right or error >= 1e-4 or prefix_length(model) != len(TOKENS):
                failures.append((family, kind, error, list(names)))
    assert not failures


def test_layers_without_keys_and_values_have_no_prefix() -> None:
    for family in ("lfm2", "mamba", "recurrent_gemma", "deepseek_v2"):
        for tokens in (TOKENS, None):
            with pytest.raises(InputError, match="do not all have keys and values of one"):
                add_prefix(tiny_model(family), 5, False, tokens)


def test_a_model_without_projections_has_no_lora() -> None:
    model = tiny_model("opt")
    for layer in model.model.decoder.layers:
        layer.self_attn.project_queries = layer.self_attn.q_proj
        del layer.self_attn.q_proj
    with pytest.raises(InputError, match="--lora: OPTForCausalLM has no query and value proj"):
        add_lora(model, 4, 8)


def test_adapters_of_half_precision_models_are_float32() -> None:
    examples, failures = [encoder("SST2").options(s) for s in samples_of("SST2")[1][:4]], []
    for kind, dtype in itertools.product(ADAPTERS, (torch.float16, torch.bfloat16)):
        model = adapted("llama", kind, tiny_model("llama").to(dtype))
        loss = objectives.classification_loss(model, packing.collate(examples))
        if {p.dtype for p in trained(model).values()} != {torch.float32} or not loss.isfinite():
            failures.append((kind, dtype, loss))
    assert not failures


# ------------------------------------------------------------------------------------------ merging


# The projections, the input embeddings, the last norm and the head of families.
LAYERS = {
    "opt": (["q_proj", "v_proj"], "embed_tokens", "final_layer_norm", "lm_head"),
    "llama": (["q_proj", "v_proj"], "embed_tokens", "norm", "lm_head"),
    "gpt2": (["c_attn"], "wte", "ln_f", "lm_head"),
    "gpt_neox": (["query_key_value"], "embed_in", "final_layer_norm", "embed_out"),
}


def saved_by_others(family: str) -> dict[str, dict[str, Any]]:
    """Settings of adapters that this package does not make, but trains further and merges."""
    projections, embeddings, norm, head = LAYERS[family]
    head = (
        head if any(head in name for name, _ in tiny_model(family).named_modules()) else "lm_head"
    )
    with_embeddings, with_head = [*projections, embeddings], [*projections, head]
    return {
        "lora": {},
        "dora": {"use_dora": True},
        "biases": {"bias": "all"},
        "lora of embeddings": {"target_modules": with_embeddings},
        "lora of head": {"target_modules": with_head},
        "dora of both": {"target_modules": [embeddings, head], "use_dora": True},
        "norm": {"modules_to_save": [norm]},
        "embeddings": {"modules_to_save": [embeddings]},
        "head": {"modules_to_save": [head]},
        "tied": {"modules_to_save": [embeddings], "ensure_weight_tying": True},
        "tokens": {"trainable_token_indices": [5, 31]},
    }


def lora_of(family: str, tied: bool, **settings: Any) -> PeftModel:
    """Return a model with a LoRA adapter whose weights have moved."""
    torch.manual_seed(1)
    model = tiny_model(family, tie_word_embeddings=tied)
    settings = {"target_modules": LAYERS[family][0], "init_lora_weights": False} | settings
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, **settings)).eval()
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.filterwarnings("ignore")  # peft's, about tied weights and Conv1D
@pytest.mark.parametrize("family", ["opt", "gpt_neox", "llama", "gpt2"])
def test_a_merged_model_scores_as_its_adapter_which_stays(family: str, tmp_path: Path) -> None:
    text, failures = torch.tensor([[5, 9, 31, 7]]), []
    for tied, (kind, settings) in itertools.product((True, False), saved_by_others(family).items()):
        model, folder = lora_of(family, tied, **settings), tmp_path / f"{kind}-{tied}"
        logits = model(input_ids=text).logits
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        check_merge(model)
        save_merged(model, folder)
        stays = all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
        merged, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        error = (merged.eval()(text).logits - logits).abs().max()
        # Other readers of the folder go by its configuration.
        weights = (merged.get_input_embeddings().weight, merged.get_output_embeddings().weight)
        says_tied = json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
        if not stays or any(found.values()) or error > 1e-4 or says_tied != torch.equal(*weights):
            failures.append((kind, tied, stays, found, error, says_tied))
    assert not failures


def test_what_cannot_be_merged_is_refused() -> None:
    with pytest.raises(InputError, match=r"--merge_adapter: peft .* not support merging.*; leave"):
        check_merge(lora_of("llama", True, alora_invocation_tokens=[3]))


# ------------------------------------------------------------------------------ scores and losses


@functools.cache
def encoder(task: str, max_length: int = 1000) -> Encoder:
    return Encoder(get_task(task), tiny_tokenizer(), max_length, 8)


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("task", ["Copa", pytest.param("SST2", marks=pytest.mark.slow)])
@of_families
def test_scores_are_those_of_the_saved_adapter(
    family: str, kind: str, task: str, tmp_path: Path
) -> None:
    model = adapted(family, kind)
    oracle = reloaded(family, model, tmp_path)
    train, validation = samples_of(task)
    for shown in ([], train[:5]):
        examples = [encoder(task).options(sample, shown) for sample in validation[:5]]
        expected = [
            [log_probabilities(oracle, option.tokens, option.scored) for option in example.options]
            for example in examples
        ]
        for batch_size in (1, 3):
            found = scoring.score_options(model, examples, batch_size, "")
            for of_options, scores in zip(expected, found, strict=True):
                for values, (total, count) in zip(of_options, scores, strict=True):
                    assert count == len(values)
                    assert abs(total - values.sum().item()) < 2e-4


@of_families
@pytest.mark.parametrize("kind", ["lora", "reparameterised"])
def test_losses_and_gradients(family: str, kind: str) -> None:
    model = adapted(family, kind)
    examples = [encoder("Copa").options(sample) for sample in samples_of("Copa")[1][:4]]
    losses, gradients = [], []
    for share in (True, False):
        batch = packing.collate(examples, share_prompt=share)
        loss = objectives.classification_loss(model, batch)
        model.zero_grad()
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad.clone() for p in trained(model).values()])
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for first, second in zip(*gradients, strict=True):
        assert torch.allclose(first, second, atol=1e-4)
        assert first.abs().max() > 0


def test_a_prefix_counts_for_a_sliding_window() -> None:
    model = tiny_model("mistral", sliding_window=40)
    assert can_share_prompt(model, 40)
    model = add_prefix(model, 5, False, TOKENS)
    assert can_share_prompt(model, 35) and not can_share_prompt(model, 36)


# ------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("kind", ["lora", "prefix"])
@of_families
def test_texts_are_those_of_the_argmax(family: str, kind: str) -> None:
    model = adapted(family, kind, newline_writing_model(family))
    for demonstrations in (0, 3):
        samples, shown = draw("SQuAD", 5, demonstrations)
        prompts = [encoder("SQuAD").prompt(sample, shown[0]) for sample in samples]
        settings = GenerationSettings(max_new_tokens=8)
        expected = [written(model, prompt, 8) for prompt in prompts]
        assert len(set(expected)) > (0 if family == "gemma2" else 1)
        for batch_size in (1, 3):
            found = generate(model, tiny_tokenizer(), prompts, settings, batch_size, "")
            assert found == expected


@torch.no_grad()
def written(model: PreTrainedModel | PeftModel, prompt: Sequence[int], max_new_tokens: int) -> str:
    """The likeliest next token, again and again, with the whole text in one forward pass."""
    tokens = list(prompt)
    stops = {tiny_tokenizer().encode("\n", add_special_tokens=False)[-1], 2}
    for _ in range(max_new_tokens):
        text = torch.tensor([tokens])
        logits = model(input_ids=text, attention_mask=torch.ones_like(text)).logits
        tokens.append(int(logits[0, -1].argmax()))
        if tokens[-1] in stops:
            break
    return tiny_tokenizer().decode(tokens[len(prompt) :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("family", ["gemma2", *OF_A_WINDOW])
def test_a_window_does_not_see_padding(family: str) -> None:
    prompts = [encoder("SQuAD", length).prompt(samples_of("SQuAD")[1][0]) for length in (28, 12, 6)]
    assert len({len(prompt) for prompt in prompts}) == 3
    settings = GenerationSettings(max_new_tokens=8)
    for kind in (None, "prefix"):
        model = tiny_model(family, sliding_window=16)
        model = adapted(family, kind, model) if kind else model
        expected = [written(model, prompt, 8) for prompt in prompts]
        assert len(set(expected)) == 3
        for batch_size in (1, 3):
            found = generate(model, tiny_tokenizer(), prompts, settings, batch_size, "")
            assert found == expected, (kind, batch_size)


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_beams(kind: str) -> None:
    """One beam search for several prompts gives what it gives for each alone."""
    model = adapted("llama", kind)
    prompts = [encoder("SQuAD").prompt(sample) for sample in samples_of("SQuAD")[1][:4]]
    settings = GenerationSettings(max_new_tokens=6, num_beams=3)
    tokenizer = tiny_tokenizer()
    expected = []
    for prompt in prompts:
        text = torch.tensor([prompt])
        rows = model.generate(
            input_ids=text,
            attention_mask=torch.ones_like(text),
            max_new_tokens=6,
            num_beams=3,
            do_sample=False,
            eos_token_id=[tokenizer.encode("\n", add_special_tokens=False)[-1], 2],
            pad_token_id=2,
        )
        expected.append(tokenizer.decode(rows[0, len(prompt) :], skip_special_tokens=True).strip())
    assert len(set(expected)) > 1
    assert generate(model, tokenizer, prompts, settings, 4, "") == expected


# --------------------------------------------------------------------------------- the optimizer


def test_only_the_adapter_is_perturbed_and_has_an_h() -> None:
    batch = packing.collate([encoder("SST2").options(s) for s in samples_of("SST2")[1][:4]])
    failures = []
    for kind in ADAPTERS:
        model = adapted("opt", kind)
        before = {name: p.clone() for name, p in model.named_parameters()}
        optimizer = HiZOO(trained(model).values(), lr=1e-3, eps=1e-2, hessian_smooth=1e-3)
        optimizer.step(lambda m=model: objectives.classification_loss(m, batch))
        for name, parameter in model.named_parameters():
            if torch.equal(parameter, before[name]) == parameter.requires_grad:
                failures.append((kind, name))
        assert set(optimizer.state) == set(trained(model).values())
    assert not failures


def test_layer_by_layer_is_in_place() -> None:
    batch = packing.collate([encoder("SST2").options(s) for s in samples_of("SST2")[1][:4]])
    failures = []
    for kind in ADAPTERS:
        results = []
        for layerwise in (False, True):
            model = adapted("opt", kind)
            layers = Layers(model) if layerwise else None
            optimizer = HiZOO(trained(model).values(), lr=1e-3, eps=1e-2, layers=layers)
            for _ in range(3):
                optimizer.step(lambda m=model: objectives.classification_loss(m, batch))
            results.append(trained(model))
        for name, parameter in results[0].items():
            if not torch.allclose(parameter, results[1][name], atol=1e-6):
                failures.append((kind, name))
    assert not failures
