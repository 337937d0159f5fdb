"""Scores, predictions and losses are those of the oracle; who may share a prompt."""

from __future__ import annotations

import logging

import pytest
import torch
from oracle_scoring import (
    SUM_TOLERANCE,
    TOKENIZERS,
    TOLERANCE,
    WINDOWED,
    Oracle,
    assert_equal_predictions,
    assert_equal_sums,
    assert_same_as_oracle,
    draw,
    encode,
    log_probabilities,
    model_of,
)
from tiny_models import FAMILIES, OTHER_FAMILIES, of_families, tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from language_model import objectives, packing, scoring
from language_model.batches import NotFinite, run_in_batches
from language_model.encoding import EncodedExample, EncodedOption, Encoder
from language_model.generation import GenerationSettings, generate
from language_model.scoring import predict
from language_model.shared_tokens import can_share_prompt
from tasks import get_task
from utils import InputError

# --------------------------------------------------------------------------- scores and predictions


# (task, demonstrations, max_length, calibration, tokenizer)
SETTINGS = [
    ("SST2", 0, 1024, None, "start"),
    ("SST2", 3, 1024, "icl_sfc", "start"),
    ("CB", 3, 1024, None, "start"),
    ("CB", 0, 1024, "sfc", "no start"),  # an empty prompt and no start token
    ("Copa", 0, 1024, None, "start"),
    ("Copa", 3, 60, None, "start"),  # choices of different length: cut at different places
    ("Copa", 3, 7, None, "no start"),  # the cut reaches into the option
    ("Copa", 2, 1024, "icl_sfc", "no start"),
    ("ReCoRD", 0, 1024, None, "start"),
    ("ReCoRD", 2, 200, None, "no start"),
    ("ReCoRD", 1, 1024, "sfc", "start"),
    ("MultiRC", 0, 40, None, "start"),
    ("BoolQ", 1, 1024, "icl_sfc", "no start"),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_predictions_are_the_oracles(family: str) -> None:
    model = model_of(family)
    for task, demonstrations, max_length, calibration, tokenizer in SETTINGS:
        samples, shown = draw(task, 4, demonstrations)
        setting = (get_task(task), TOKENIZERS[tokenizer](), max_length)
        oracle, encoder = Oracle(model, *setting), Encoder(*setting)
        found = predict(model, encoder, samples, shown, 3, calibration)
        assert can_share_prompt(model, max_length)
        expected = oracle.predict(samples, shown, calibration)
        assert_equal_predictions(found, expected, SUM_TOLERANCE if calibration else TOLERANCE)
        assert not model.get_output_embeddings()._forward_pre_hooks


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_models_that_cannot_share_a_prompt_score_as_the_oracle(family: str) -> None:
    assert not can_share_prompt(model_of(family), 100)
    for task in ("Copa", "ReCoRD"):
        assert_same_as_oracle(model_of(family), task, 5)


# Models that mix tokens without attention, count positions from the first token or the padding
# token, whatever they are told, or keep keys and values of different sizes.
_EXPERTS = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
_LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
_DECODER = {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
UNUSUAL = {
    "rwkv": {"num_hidden_layers": 2, "attention_hidden_size": 32, "context_length": 512},
    "recurrent_gemma": {"num_hidden_layers": 3, "intermediate_size": 96, "lru_width": 32},
    "minimax": {"layer_types": ["linear_attention", "full_attention"], "num_local_experts": 2},
    "bart": {**_DECODER, "d_model": 32, "is_decoder": True, "init_std": 0.2},
    "roberta": {"intermediate_size": 48, "is_decoder": True},
    "deepseek_v3": {**_EXPERTS, **_LATENT, "v_head_dim": 8, "moe_intermediate_size": 16},
}


@pytest.mark.parametrize("family", UNUSUAL)
def test_unusual_models_read_each_text_as_alone(family: str) -> None:
    heads = {} if family == "rwkv" else {"num_attention_heads": 4, "num_key_value_heads": 4}
    layers = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48} | heads
    special = {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}
    vocabulary = len(tiny_tokenizer())
    config = AutoConfig.for_model(
        family, vocab_size=vocabulary, **layers | UNUSUAL[family] | special
    )
    config.initializer_range = 0.2
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    examples = encode("Copa", 4, 2) + encode("SST2", 4, 0)
    found = scoring.score_options(model, examples, 8, "")
    expected = [
        [log_probabilities(model, option.tokens, len(option.targets)) for option in example.options]
        for example in examples
    ]
    sums = [[(values.sum().item(), len(values)) for values in options] for options in expected]
    assert_equal_sums(found, sums)
    prompts = [example.options[0].tokens for example in examples]
    settings = GenerationSettings(max_new_tokens=4)
    texts = [generate(model, tiny_tokenizer(), prompts, settings, size, "") for size in (1, 8)]
    assert texts[0] == texts[1] and len(set(texts[0])) > 1


@of_families
def test_sharing_the_prompt_changes_no_score(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = encode("ReCoRD", 4, 1) + encode("Copa", 4, 2) + encode("CB", 4, 0)
    packed = scoring.score_options(model_of(family), examples, 5, "")
    monkeypatch.setattr(scoring, "can_share_prompt", lambda *_: False)
    alone = scoring.score_options(model_of(family), examples, 5, "")
    assert_equal_sums(packed, alone)


@of_families
def test_options_without_a_common_token(family: str) -> None:
    options = [((5, 6, 7), 1), ((8, 9), 1), ((10, 11, 12, 13, 14), 3), ((5, 20), 1)]
    example = EncodedExample(tuple(EncodedOption(*option) for option in options))
    found = scoring.score_options(model_of(family), [example], 1, "")
    values = [log_probabilities(model_of(family), *option) for option in options]
    assert_equal_sums(found, [[(value.sum().item(), len(value)) for value in values]])


def test_padding_changes_no_score() -> None:
    """Neither its length (in batches of 1 there is none) nor the token that stands for it."""
    samples = encode("SST2", 6, 0) + encode("Copa", 2, 3)
    for family in ("opt", "bloom", "llama"):
        alone, padded = (scoring.score_options(model_of(family), samples, n, "") for n in (1, 8))
        assert_equal_sums(alone, padded)
        batches = [packing.collate(samples, token, family != "bloom") for token in (0, 77)]
        values = [scoring.token_log_probabilities(model_of(family), batch) for batch in batches]
        assert torch.equal(*values)


def test_bfloat16_scores_are_close_to_float32() -> None:
    setting = (Encoder(get_task("Copa"), tiny_tokenizer(), 1024), *draw("Copa", 6, 1), 4)
    for family in FAMILIES:
        full = predict(model_of(family), *setting)
        half = predict(tiny_model(family).bfloat16(), *setting)
        for one, other in zip(full, half, strict=True):  # a score that is not finite is not close
            assert one.scores == pytest.approx(other.scores, abs=0.1, rel=0), family


def test_scores_that_are_not_finite_choose_no_option() -> None:
    for dtype, remedy in (
        (torch.float16, "float16: .*--load_bfloat16 in place"),
        (torch.float32, "float32: .*a lower --learning_rate"),
    ):
        model = tiny_model("llama").to(dtype)
        model.lm_head.weight.data[7] = torch.nan
        with pytest.raises(NotFinite, match=f"scores of the options are not finite in {remedy}"):
            scoring.score_options(model, encode("SST2", 2, 0), 2, "")


def test_logits_are_made_only_where_a_scored_token_is_predicted() -> None:
    seen: list[int] = []
    model = tiny_model("opt")
    model.lm_head.register_forward_hook(lambda *call: seen.append(call[2].numel() // 1536))
    batch = packing.collate(encode("Copa", 3, 2))
    scoring.token_log_probabilities(model, batch)
    assert seen == [len(batch["targets"])]
    with pytest.raises(IndexError):
        scoring.token_log_probabilities(model, {**batch, "read_rows": batch["read_rows"] + 3})
    assert not model.lm_head._forward_pre_hooks  # not even after an error


def test_generation_tasks_have_no_calibration() -> None:
    encoder = Encoder(get_task("SQuAD"), tiny_tokenizer(), 1024)
    with pytest.raises(InputError, match="--sfc: SQuAD has no options to calibrate"):
        predict(model_of("opt"), encoder, *draw("SQuAD", 1, 0), 1, "sfc")


# --------------------------------------------------------------------------- who may share a prompt


@pytest.mark.parametrize("family", WINDOWED)
def test_texts_within_and_beyond_a_sliding_window(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family, **WINDOWED[family])
    for max_length in (12, 24):
        assert can_share_prompt(model, max_length)
        assert_same_as_oracle(model, "Copa", 6, max_length)
    assert not can_share_prompt(model, 25)
    assert_same_as_oracle(model, "ReCoRD", 3)
    monkeypatch.setattr(scoring, "can_share_prompt", lambda *_: True)
    with pytest.raises(AssertionError):  # the window matters in these texts
        assert_same_as_oracle(model, "ReCoRD", 3)


def test_a_configuration_with_layer_types_that_the_model_does_not_read() -> None:
    for attention in ("eager", "sdpa"):
        for kinds in ({}, {"layer_types": ["full_attention", "full_attention"]}):
            model = tiny_model("mistral", attn_implementation=attention, **kinds)
            assert can_share_prompt(model, 1024)
            assert_same_as_oracle(model, "Copa", 3)


def test_each_reason_not_to_share_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    logging.Logger.warning_once.cache_clear()
    windowed = tiny_model("mistral", sliding_window=24)
    flash = tiny_model("opt")
    flash.config._attn_implementation = "flash_attention_2"
    with caplog.at_level(logging.WARNING):
        for length in (25, 26, 1000):
            for model in (windowed, model_of("bloom"), model_of("lfm2"), flash):
                assert not can_share_prompt(model, length)
    prefix = "scoring every option in a sequence of its own: "
    assert [record.message.removeprefix(prefix) for record in caplog.records] == [
        "its sliding window of 24 tokens is shorter than the longest text",
        "BloomForCausalLM does not take a 4-D attention mask",
        "it has layers of type conv",
        "attention implementation flash_attention_2",
    ]


# ----------------------------------------------------------------------------------------- losses


@of_families
def test_classification_loss_of_examples_with_different_numbers_of_options(family: str) -> None:
    model = tiny_model(family)
    losses, examples = [], []
    for task in ("CB", "Copa", "ReCoRD"):
        oracle = Oracle(model, get_task(task), tiny_tokenizer())
        for sample in draw(task, 2, 0)[0]:
            values = [oracle.log_probabilities(sample, [], c).mean() for c in sample.candidates]
            correct = values[sample.candidates.index(sample.correct[0])]
            losses.append(torch.stack(values).logsumexp(0) - correct)
        examples += encode(task, 2, 0)
    for share in (True, False):
        batch = packing.collate(examples, share_prompt=share)
        found = objectives.classification_loss(model, batch)
        assert_same_loss_and_gradient(model, found, torch.stack(losses).mean())


@of_families
def test_language_model_loss(family: str) -> None:
    model, samples = tiny_model(family), draw("SQuAD", 4, 0)[0]
    setting = (get_task("SQuAD"), tiny_tokenizer(), 60)
    oracle, encoder = Oracle(model, *setting), Encoder(*setting)
    for only_option in (True, False):
        values = [
            oracle.log_probabilities(sample, [], sample.correct[0], everything=not only_option)
            for sample in samples
        ]
        expected = -torch.cat(values).mean()
        examples = [encoder.correct_option(sample, only_option) for sample in samples]
        found = objectives.language_model_loss(model, packing.collate(examples))
        assert_same_loss_and_gradient(model, found, expected)


def assert_same_loss_and_gradient(model: PreTrainedModel, found: Tensor, expected: Tensor) -> None:
    assert found.item() == pytest.approx(expected.item(), abs=TOLERANCE, rel=0)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for one, other in zip(
        torch.autograd.grad(found, parameters, allow_unused=True),
        torch.autograd.grad(expected, parameters, allow_unused=True, retain_graph=True),
        strict=True,
    ):
        assert (one is None) == (other is None)
        if one is not None:
            assert (one - other).abs().max() < 1e-5 + 1e-4 * other.abs().max()


# ----------------------------------------------------------------------------- batches by length


def test_batches_hold_the_longest_first_and_every_item_once() -> None:
    lengths, batches = [3, 9, 1, 7, 5], []
    run_in_batches(batches.append, lengths, 2, "")
    assert batches == [[1, 3], [4, 0], [2]]
