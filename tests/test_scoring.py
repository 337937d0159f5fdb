"""Scoring against the obvious way: one option, one sequence, no padding, every logit.

The oracle below shares no code with scoring.py beyond the templates: it writes the text out, sends
it through the model as ``model(input_ids)`` and reads the log-probabilities off.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import (
    FAMILIES,
    OTHER_FAMILIES,
    appending_tokenizer,
    of_families,
    tiny_model,
    tiny_tokenizer,
    tokenizer_without_start,
    word_tokenizer,
)
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from language_model import objectives, packing, scoring
from language_model.batches import run_in_batches
from language_model.encoding import EncodedExample, EncodedOption, Encoder
from language_model.generation import GenerationSettings, generate
from language_model.precision import NotFinite
from language_model.prediction import Prediction, predict
from language_model.shared_tokens import _warn_once, can_share_prompt
from task_data.loading import load_samples
from tasks import Sample, Task, get_task
from utils import InputError

SAMPLES_DIR = Path(__file__).parent.parent / "data" / "samples"
# Largest differences seen: 2.1e-6 for means, 3.9e-5 for sums (of about -100, in float32).
TOLERANCE = 1e-5
SUM_TOLERANCE = 1e-4

model_of = functools.cache(tiny_model)
samples_of = functools.cache(lambda task: load_samples(get_task(task), str(SAMPLES_DIR)))
TOKENIZERS = {
    "start": tiny_tokenizer,
    "no start": functools.cache(tokenizer_without_start),
}


# ------------------------------------------------------------------------------------- the oracle


@dataclass(frozen=True)
class Oracle:
    """The rules of scoring, one after the other."""

    model: PreTrainedModel
    task: Task
    tokenizer: PreTrainedTokenizerBase
    max_length: int = 1024

    def tokens(
        self, sample: Sample, shown: Sequence[Sample], candidate: Any, content_free: bool = False
    ) -> tuple[list[int], int]:
        """Return the tokens of a whole text, and how many at its end are scored."""
        if content_free:
            prompt = self.task.content_free_prompt(sample)
            option = self.task.content_free_option(sample, candidate)
        else:
            prompt, option = self.task.prompt(sample), self.task.option(sample, candidate)
        text = ""
        for other in shown:
            answered = self.task.prompt(other) + self.task.option(other, other.correct[0])
            text += answered.strip() + "\n\n"
        text = (text + (prompt + option).strip(" ")).lstrip(" \n")
        with_option = self.tokenizer((prompt + option).strip(" "))["input_ids"]
        scored = len(with_option) - len(self.tokenizer(prompt.strip(" "))["input_ids"])
        tokens = self.tokenizer(text)["input_ids"]
        if scored == len(tokens):
            tokens = [self.tokenizer.eos_token_id, *tokens]
        while len(tokens) > self.max_length:
            del tokens[1]
        return tokens, min(scored, len(tokens) - 1)

    def log_probabilities(self, *text: Any, everything: bool = False, **how: Any) -> Tensor:
        """Return the log-probability of every scored token; of every token after the first."""
        tokens, scored = self.tokens(*text, **how)
        return log_probabilities(self.model, tokens, len(tokens) - 1 if everything else scored)

    @torch.no_grad()
    def predict(
        self,
        samples: Sequence[Sample],
        demonstrations: Sequence[Sequence[Sample]],
        calibration: str | None = None,
    ) -> list[Prediction]:
        predictions = []
        for sample, shown in zip(samples, demonstrations, strict=True):
            scores = []
            for candidate in sample.candidates:
                values = self.log_probabilities(sample, shown, candidate)
                if calibration is None:
                    scores.append(values.mean().item())
                else:
                    before = shown if calibration == "icl_sfc" else []
                    prior = self.log_probabilities(sample, before, candidate, content_free=True)
                    scores.append((values.sum() - prior.sum()).item())
            predictions.append(Prediction(sample.candidates[scores.index(max(scores))], (*scores,)))
        return predictions


def log_probabilities(model: PreTrainedModel, tokens: Sequence[int], scored: int) -> Tensor:
    """Return the log-probabilities of the last ``scored`` tokens."""
    logits = model(input_ids=torch.tensor([tokens])).logits[0]
    table = torch.log_softmax(logits.float(), dim=-1)
    return torch.stack([table[i - 1, tokens[i]] for i in range(len(tokens))[-scored:]])


def assert_equal_predictions(
    found: Sequence[Prediction], expected: Sequence[Prediction], tolerance: float = TOLERANCE
) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.answer == other.answer
        assert one.scores == pytest.approx(other.scores, abs=tolerance, rel=0)


def assert_equal_sums(*results: list[list[tuple[float, int]]]) -> None:
    found, expected = ([pair for options in result for pair in options] for result in results)
    assert [count for _, count in found] == [count for _, count in expected]
    sums = [total for total, _ in expected]
    assert [total for total, _ in found] == pytest.approx(sums, abs=SUM_TOLERANCE, rel=0)


def assert_same_as_oracle(
    model: PreTrainedModel, task: str, number: int, max_length: int = 1024
) -> None:
    samples, shown = draw(task, number, 0)
    setting = (get_task(task), tiny_tokenizer(), max_length)
    found = predict(model, Encoder(*setting), samples, shown, 2)
    assert_equal_predictions(found, Oracle(model, *setting).predict(samples, shown))


def encode(task: str, number: int, demonstrations: int) -> list[EncodedExample]:
    encoder = Encoder(get_task(task), tiny_tokenizer(), 1024)
    pairs = zip(*draw(task, number, demonstrations), strict=True)
    return [encoder.options(*pair) for pair in pairs]


def draw(task: str, number: int, demonstrations: int) -> tuple[list[Sample], list[list[Sample]]]:
    """Return validation samples, and for each its own training samples."""
    train, validation = samples_of(task)
    starts = range(0, number * demonstrations, max(1, demonstrations))
    shown = [train[start : start + demonstrations] for start in starts] or [[]] * number
    return validation[:number], shown


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
@pytest.mark.parametrize("task", ["Copa", "ReCoRD"])
def test_models_that_cannot_share_a_prompt_score_as_the_oracle(family: str, task: str) -> None:
    assert not can_share_prompt(model_of(family), 100)
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


@of_families
def test_bfloat16_scores_are_close_to_float32(family: str) -> None:
    setting = (Encoder(get_task("Copa"), tiny_tokenizer(), 1024), *draw("Copa", 6, 1), 4)
    full = predict(model_of(family), *setting)
    half = predict(tiny_model(family).bfloat16(), *setting)
    for one, other in zip(full, half, strict=True):  # a score that is not finite is not close
        assert one.scores == pytest.approx(other.scores, abs=0.1, rel=0)


@pytest.mark.parametrize(
    ("dtype", "remedy"),
    [(torch.float16, "--load_bfloat16 in place"), (torch.float32, "a lower --learning_rate")],
)
def test_scores_that_are_not_finite_choose_no_option(dtype: torch.dtype, remedy: str) -> None:
    model = tiny_model("llama").to(dtype)
    model.lm_head.weight.data[7] = torch.nan
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(
        NotFinite, match=f"scores of the options are not finite in {name}: .*{remedy}"
    ):
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


WINDOWED = {
    "mistral": {"sliding_window": 24},
    "gemma2": {"sliding_window": 24},
    "qwen2": {"sliding_window": 24, "use_sliding_window": True},
}


@pytest.mark.parametrize("family", WINDOWED)
def test_texts_longer_than_a_sliding_window(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family, **WINDOWED[family])
    assert can_share_prompt(model, 24)
    assert not can_share_prompt(model, 25)
    assert_same_as_oracle(model, "ReCoRD", 3)
    monkeypatch.setattr(scoring, "can_share_prompt", lambda *_: True)
    with pytest.raises(AssertionError):  # the window matters in these texts
        assert_same_as_oracle(model, "ReCoRD", 3)


@pytest.mark.parametrize("family", WINDOWED)
def test_texts_within_a_sliding_window_share_their_prompt(family: str) -> None:
    model = tiny_model(family, **WINDOWED[family])
    for max_length in (12, 24):
        assert can_share_prompt(model, max_length)
        assert_same_as_oracle(model, "Copa", 6, max_length)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_configuration_with_layer_types_that_the_model_does_not_read(attention: str) -> None:
    for kinds in ({}, {"layer_types": ["full_attention", "full_attention"]}):
        model = tiny_model("mistral", attn_implementation=attention, **kinds)
        assert can_share_prompt(model, 1024)
        assert_same_as_oracle(model, "Copa", 3)


def test_each_reason_not_to_share_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    _warn_once.cache_clear()
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


@pytest.mark.parametrize("share", [True, False])
@of_families
def test_classification_loss_of_examples_with_different_numbers_of_options(
    family: str, share: bool
) -> None:
    model = tiny_model(family)
    losses, examples = [], []
    for task in ("CB", "Copa", "ReCoRD"):
        oracle = Oracle(model, get_task(task), tiny_tokenizer())
        for sample in draw(task, 2, 0)[0]:
            values = [oracle.log_probabilities(sample, [], c).mean() for c in sample.candidates]
            correct = values[sample.candidates.index(sample.correct[0])]
            losses.append(torch.stack(values).logsumexp(0) - correct)
        examples += encode(task, 2, 0)
    found = objectives.classification_loss(model, packing.collate(examples, share_prompt=share))
    assert_same_loss_and_gradient(model, found, torch.stack(losses).mean())


@pytest.mark.parametrize("only_option", [True, False])
@of_families
def test_language_model_loss(family: str, only_option: bool) -> None:
    model, samples = tiny_model(family), draw("SQuAD", 4, 0)[0]
    setting = (get_task("SQuAD"), tiny_tokenizer(), 60)
    oracle, encoder = Oracle(model, *setting), Encoder(*setting)
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
        torch.autograd.grad(expected, parameters, allow_unused=True),
        strict=True,
    ):
        assert (one is None) == (other is None)
        if one is not None:
            assert (one - other).abs().max() < 1e-5 + 1e-4 * other.abs().max()


# --------------------------------------------------------------------------------- text to tokens


def sst2(sentence: str, label: int) -> Sample:
    return get_task("SST2").sample({"sentence": sentence, "label": label}, 0)


def copa(premise: str, choices: tuple[str, str], question: str, label: int) -> Sample:
    row = {"premise": premise, "question": question, "label": label}
    return get_task("Copa").sample({**row, "choice1": choices[0], "choice2": choices[1]}, 0)


def squad(title: str, context: str, question: str, answer: str) -> Sample:
    row = {"title": title, "context": context, "question": question, "answers": {"text": [answer]}}
    return get_task("SQuAD").sample(row, 0)


WRITTEN_OUT: list[tuple[str, Sample, list[Sample], str, list[str]]] = [
    (
        "SST2",
        sst2("the film is charming . ", 1),
        [sst2("quite ridiculous . ", 0), sst2(" clever and honest ", 1)],
        "quite ridiculous . It was terrible\n\nclever and honest It was great\n\n"
        "the film is charming . It was",
        [" terrible", " great"],
    ),
    (
        "Copa",
        copa("Vera heard a joke.", ("She laughed.", "I left the town."), "effect", 0),
        [
            copa("The hat was gone.", ("Tom took it.", "It was red."), "cause", 0),
            copa("It was late.", ("I was early.", "I went home."), "effect", 1),
        ],
        "The hat was gone because tom took it.\n\nIt was late so I went home.\n\n"
        "Vera heard a joke so",
        [" she laughed.", " I left the town."],
    ),
    (
        "SQuAD",
        squad("Hexley", "Hexley is a town.", " What is Hexley? ", "a town"),
        [squad("Quarn", "It is red.", "Which colour?", "red"), squad("A", "B.", "C?", "B")],
        "Title: Quarn\nContext: It is red.\nQuestion: Which colour?\nAnswer: red\n\n"
        "Title: A\nContext: B.\nQuestion: C?\nAnswer: B\n\n"
        "Title: Hexley\nContext: Hexley is a town.\nQuestion: What is Hexley?\nAnswer:",
        [" a town\n"],
    ),
]


@pytest.mark.parametrize(("task", "sample", "shown", "before", "options"), WRITTEN_OUT)
@pytest.mark.parametrize("start", ["</s>", ""])
def test_the_whole_text_and_the_scored_span(
    task: str, sample: Sample, shown: list[Sample], before: str, options: list[str], start: str
) -> None:
    tokenizer = TOKENIZERS["start" if start else "no start"]()
    encoder = Encoder(get_task(task), tokenizer, 1024, 10)
    candidates = sample.candidates or sample.correct
    example = encoder.options(sample, shown, candidates)
    assert [tokenizer.decode(option.tokens) for option in example.options] == [
        start + before + option for option in options
    ]
    spans = [option.tokens[option.targets.start :] for option in example.options]
    assert [tokenizer.decode(span) for span in spans] == options
    assert tokenizer.decode(encoder.prompt(sample, shown)) == start + before
    # A cut takes tokens on the left, after the first, and a generated text needs room.
    short = Encoder(get_task(task), tokenizer, 20, 10)
    cuts = short.options(sample, shown, candidates).options
    for option, cut in zip(example.options, cuts, strict=True):
        assert cut == EncodedOption((option.tokens[0], *option.tokens[-19:]), option.scored)
    whole = encoder.prompt(sample, shown)
    assert short.prompt(sample, shown) == (whole[0], *whole[-9:])


def test_the_correct_option() -> None:
    task, sample = get_task("SST2"), sst2("the film is charming . ", 1)
    encoder = Encoder(task, tiny_tokenizer(), 1024)
    example = encoder.options(sample)
    assert [example.correct, len(example.options)] == [1, 2]
    assert encoder.correct_option(sample) == EncodedExample((example.options[1],))
    (everything,) = encoder.correct_option(sample, only_option=False).options
    assert everything.tokens == example.options[1].tokens
    assert everything.targets == range(1, len(everything.tokens))


def test_content_free_prompts() -> None:
    tokenizer = tiny_tokenizer()
    shown = [sst2("quite ridiculous . ", 0)]

    def texts(task: str, sample: Sample, shown: Sequence[Sample] = ()) -> list[tuple[str, str]]:
        options = Encoder(get_task(task), tokenizer, 1024).options(sample, shown, content_free=True)
        return [
            (tokenizer.decode(o.tokens), tokenizer.decode(o.tokens[o.targets.start :]))
            for o in options.options
        ]

    assert texts("SST2", shown[0])[0] == ("</s>It was terrible", " terrible")
    assert texts("SST2", shown[0], shown)[1] == (
        "</s>quite ridiculous . It was terrible\n\nIt was great",
        " great",
    )
    (cb,) = draw("CB", 1, 0)[0]
    assert texts("CB", cb) == [("</s>" + word, word) for word in ("Yes", "No", "Maybe")]


def test_an_end_token_behind_every_text_is_left_out() -> None:
    """It would be scored in the option's place, and would end a prompt before its answer."""
    tokenizers = appending_tokenizer(), tiny_tokenizer()
    assert tokenizers[0].encode("Yes") == [*tokenizers[1].encode("Yes"), 2]
    for task in ("SST2", "Copa", "CB", "SQuAD"):
        one, other = (Encoder(get_task(task), tokenizer, 100, 8) for tokenizer in tokenizers)
        for sample, shown in zip(*draw(task, 3, 2), strict=True):
            assert one.prompt(sample, shown) == other.prompt(sample, shown)
            assert one.correct_option(sample) == other.correct_option(sample)
            assert one.options(sample, shown) == other.options(sample, shown)
            if task in ("SST2", "CB"):
                free = {"content_free": True}
                assert one.options(sample, **free) == other.options(sample, **free)


def test_nothing_stands_before_an_option_without_start_and_end_token() -> None:
    (cb,) = draw("CB", 1, 0)[0]
    encoder = Encoder(get_task("CB"), word_tokenizer(), 1024)
    assert encoder.options(cb).options
    with pytest.raises(InputError, match=r"neither a start token .* nor an end token .* --sfc"):
        encoder.options(cb, content_free=True)


def test_a_text_without_a_start_gets_one_where_nothing_precedes_the_option() -> None:
    encoder = Encoder(get_task("CB"), tokenizer_without_start(), 1024)
    (cb,) = draw("CB", 1, 0)[0]
    end = encoder.tokenizer.eos_token_id
    for option in encoder.options(cb, content_free=True).options:
        assert option.tokens[0] == end and len(option.targets) == len(option.tokens) - 1
    assert end not in encoder.options(cb).options[0].tokens


# ----------------------------------------------------------------------------- batches by length


def test_batches_hold_the_longest_first_and_every_item_once() -> None:
    lengths, batches = [3, 9, 1, 7, 5], []
    run_in_batches(batches.append, 5, lengths.__getitem__, 2, "")
    assert batches == [[1, 3], [4, 0], [2]]
