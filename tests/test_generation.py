"""Generated text: the argmax of the whole text's logits, up to an end token or the end text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from oracle_scoring import draw, model_of
from tiny_models import (
    newline_writing_model,
    of_families,
    tiny_model,
    tiny_tokenizer,
    tokenizer_without_start,
    word_tokenizer,
)
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from language_model.batches import NotFinite
from language_model.encoding import Encoder
from language_model.generation import GenerationSettings, check_generation, generate
from language_model.scoring import predict
from language_model.shared_tokens import LayerWithRoom, first_position
from tasks import get_task
from utils import InputError

NEWLINE = tiny_tokenizer().encode("\n")[-1]


@torch.no_grad()
def argmax_loop(
    model: PreTrainedModel, prompt: Sequence[int], max_new_tokens: int, stops: Sequence[int]
) -> list[int]:
    """The oracle: the likeliest next token, again and again, of the whole text."""
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        tokens.append(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax().item())
        if tokens[-1] in stops:
            break
    return tokens[len(prompt) :]


def prompts_of(number: int) -> list[tuple[int, ...]]:
    """Prompts of different lengths, from 30 tokens to 80."""
    encoder = Encoder(get_task("SQuAD"), tiny_tokenizer(), 80)
    samples = draw("SQuAD", number, 0)[0]
    return [encoder.prompt(sample)[: 30 + 10 * index] for index, sample in enumerate(samples)]


@of_families
def test_greedy_generation_is_the_argmax_loop(family: str) -> None:
    model, tokenizer = newline_writing_model(family), tiny_tokenizer()
    samples = draw("SQuAD", 8, 0)[0]
    shown = [draw("SQuAD", 2, 1)[1][0] * (index % 3) for index in range(8)]
    encoder = Encoder(get_task("SQuAD"), tokenizer, 300, 12)
    prompts = [encoder.prompt(*pair) for pair in zip(samples, shown, strict=True)]
    stops = (tokenizer.eos_token_id, NEWLINE)
    written = [argmax_loop(model, prompt, 12, stops) for prompt in prompts]
    assert any(len(tokens) < 12 for tokens in written)  # the newline stops it
    expected = [tokenizer.decode(t, skip_special_tokens=True).strip() for t in written]
    assert len(set(expected)) > 2
    settings = GenerationSettings(max_new_tokens=12)
    for batch_size in (1, 5):
        found = predict(model, encoder, samples, shown, batch_size, generation=settings)
        assert [prediction.answer for prediction in found] == expected
        assert all(prediction.scores is None for prediction in found)


@pytest.mark.parametrize("family", ["roberta", "xglm"])  # xglm adds the offset itself
def test_positions_counted_from_the_padding_token(family: str) -> None:
    model, tokenizer, prompts = tiny_model(family), tiny_tokenizer(), prompts_of(3)
    assert first_position(model) == {"roberta": 2, "xglm": 0}[family]
    for beams in (1, 2):
        settings = GenerationSettings(max_new_tokens=8, num_beams=beams, eos_token="never")
        texts = generate(model, tokenizer, prompts, settings, 3, "")
        assert texts == [generate(model, tokenizer, [p], settings, 1, "")[0] for p in prompts]
        if beams == 1:
            written = [argmax_loop(model, prompt, 8, (2,)) for prompt in prompts]
            assert texts == [tokenizer.decode(t, skip_special_tokens=True).strip() for t in written]


@of_families
def test_every_way_of_generating_runs(family: str) -> None:
    tokenizer = tokenizer_without_start()
    prompts = [tuple(tokenizer.encode(text)) for text in ("Yes", "It was a film . It was", "No no")]
    for settings in (
        GenerationSettings(max_new_tokens=5, num_beams=2),
        GenerationSettings(max_new_tokens=5, sampling=True, temperature=0.7, top_k=20, top_p=0.9),
        GenerationSettings(max_new_tokens=5, sampling=True),
        GenerationSettings(max_new_tokens=5, eos_token="."),
    ):
        torch.manual_seed(0)
        texts = generate(model_of(family), tokenizer, prompts, settings, 2, "")
        assert len(texts) == 3
        assert all(text and text == text.strip() for text in texts)


def test_a_layer_with_room_holds_what_a_growing_one_holds() -> None:
    torch.manual_seed(0)
    for room in (1, 5, 50):
        grown, roomy = DynamicLayer(), LayerWithRoom(room)
        for tokens in (7, 1, 1, 1, 9, 1, 1):
            new = torch.randn(2, 2, 3, tokens, 4).unbind()
            for one, other in zip(grown.update(*new), roomy.update(*new), strict=True):
                assert torch.equal(one, other)
            assert roomy.get_seq_length() == grown.get_seq_length()


# ------------------------------------------------------------------------------ where a text ends


def run_on(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The tokens that nothing but an end token ends."""
    return [argmax_loop(model, prompt, 16, (2,)) for prompt in prompts]


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_the_end_text_may_be_a_part_of_tokens_or_several(family: str) -> None:
    """As where a tokenizer has a token for two newlines, and an answer ends at one."""
    model, tokenizer, prompts = model_of(family), tiny_tokenizer(), prompts_of(4)
    texts = [tokenizer.decode(tokens) for tokens in run_on(model, prompts)]
    pieces = [tokenizer.decode([token]) for token in run_on(model, prompts)[0][4:8]]
    long = max(pieces, key=len)
    assert len(long) > 2
    # A token, its middle, and the end of one with the start of the next.
    for end in (long, long[1:-1], "".join(pieces)[len(pieces[0]) - 1 : len(pieces[0]) + 1]):
        expected = [text.partition(end)[0].replace("</s>", "").strip() for text in texts]
        assert expected[0] != texts[0]
        for batch_size in (1, 4):
            settings = GenerationSettings(max_new_tokens=16, eos_token=end)
            assert generate(model, tokenizer, prompts, settings, batch_size, "") == expected


def test_an_end_text_does_not_begin_in_the_prompt() -> None:
    model, tokenizer, (prompt,) = model_of("opt"), tiny_tokenizer(), prompts_of(1)
    tokens = run_on(model, [prompt])[0]
    prompt, written = [*prompt, *tokens[:2]], tokens[2:10]
    end = tokenizer.decode(prompt)[-1:] + tokenizer.decode(written[:1])
    settings = GenerationSettings(max_new_tokens=8, eos_token=end)
    texts = generate(model, tokenizer, [prompt], settings, 1, "")
    assert texts == [tokenizer.decode(written).strip()] and end not in texts[0]


def test_beams_end_where_transformers_ends_them() -> None:
    model, tokenizer, prompts = model_of("llama"), tiny_tokenizer(), prompts_of(3)
    longest = GenerationSettings(max_new_tokens=12, num_beams=3, eos_token="never")
    (text, *_) = generate(model, tokenizer, prompts, longest, 1, "")
    for end in (text[6:9], text.split()[1]):  # of several tokens, and one token
        rows = [
            model.generate(
                torch.tensor([prompt]),
                max_new_tokens=12,
                num_beams=3,
                stop_strings=[end],
                tokenizer=tokenizer,
                pad_token_id=2,
            )[0, len(prompt) :]
            for prompt in prompts
        ]
        whole = [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
        expected = [each.partition(end)[0].strip() for each in whole]
        settings = GenerationSettings(max_new_tokens=12, num_beams=3, eos_token=end)
        assert expected[0] != text
        assert generate(model, tokenizer, prompts, settings, 3, "") == expected, end


def test_a_text_stops_at_its_end_and_not_later() -> None:
    model, tokenizer, (prompt,) = model_of("llama"), tiny_tokenizer(), prompts_of(1)
    (tokens,) = run_on(model, [prompt])
    end = tokenizer.decode(tokens[3:5])
    calls: list[Any] = []
    hook = model.register_forward_pre_hook(lambda *_: calls.append(None))
    generate(model, tokenizer, [prompt], GenerationSettings(16, eos_token=end), 1, "")
    hook.remove()
    assert len(calls) == 5


def test_every_end_token_of_the_model_ends_a_text() -> None:
    model, tokenizer, prompts = tiny_model("llama"), tiny_tokenizer(), prompts_of(4)
    tokens = run_on(model, prompts)
    ends = [tokens[0][5], tokens[1][2], 2]
    model.generation_config.eos_token_id = ends
    expected = [
        tokenizer.decode(argmax_loop(model, p, 16, ends)[:-1], skip_special_tokens=True).strip()
        for p in prompts[:2]
    ]
    settings = GenerationSettings(max_new_tokens=16, eos_token="never")
    for batch_size in (1, 2):
        assert generate(model, tokenizer, prompts[:2], settings, batch_size, "") == expected


# What checkpoints bring along in generation_config.json.
OWN_SETTINGS: list[dict[str, Any]] = [
    {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "temperature": 0.1, "top_k": 2},
    {"min_length": 500, "min_new_tokens": 9, "suppress_tokens": list(range(4, 900))},
    {"forced_bos_token_id": 7, "forced_eos_token_id": 8, "begin_suppress_tokens": [*range(900)]},
    {"do_sample": True, "num_beams": 3, "length_penalty": -5.0, "bad_words_ids": [[NEWLINE]]},
    {
        "sequence_bias": {(9,): 50.0},
        "guidance_scale": 3.0,
        "exponential_decay_length_penalty": (1, 2),
    },
    {"num_return_sequences": 2, "do_sample": True, "use_cache": False},
    {"cache_implementation": "static"},
    {"return_dict_in_generate": True, "output_scores": True, "max_length": 5},
]


@pytest.mark.parametrize("beams", [1, 2])
def test_the_models_own_generation_settings_are_off(beams: int) -> None:
    model, tokenizer, prompts = newline_writing_model("llama"), tiny_tokenizer(), prompts_of(3)
    settings = GenerationSettings(max_new_tokens=10, num_beams=beams)
    expected = generate(model, tokenizer, prompts, settings, 3, "")
    if beams == 1:
        stops = (2, NEWLINE)
        written = [argmax_loop(model, prompt, 10, stops) for prompt in prompts]
        assert expected == [tokenizer.decode(t, skip_special_tokens=True).strip() for t in written]
    for own in OWN_SETTINGS:
        model.generation_config = GenerationConfig(eos_token_id=2, **own)
        assert generate(model, tokenizer, prompts, settings, 3, "") == expected, own
        assert model.generation_config.to_diff_dict().keys() >= own.keys()


def test_sampling_is_from_all_that_is_asked_for() -> None:
    """Without --top_k there is none: neither the model's nor transformers' 50."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    model.generation_config.top_k = 1
    settings = GenerationSettings(1, sampling=True, temperature=1e3, top_p=1.0, eos_token="never")
    torch.manual_seed(0)
    texts = generate(model, tokenizer, prompts_of(1) * 200, settings, 200, "")
    assert len(set(texts)) > 100


# ------------------------------------------------------------------------------------- bad input


def test_logits_that_are_not_finite() -> None:
    for settings, dtype, remedy in (
        (GenerationSettings(4), torch.float16, "float16: .*--load_bfloat16"),
        (GenerationSettings(4, num_beams=2), torch.bfloat16, "bfloat16: .*--learning_rate"),
        (GenerationSettings(4, sampling=True), torch.bfloat16, "bfloat16: .*--learning_rate"),
    ):
        model = tiny_model("llama").to(dtype)
        model.lm_head.weight.data[7] = torch.nan
        with pytest.raises(NotFinite, match=f"logits are not finite in {remedy}"):
            generate(model, tiny_tokenizer(), prompts_of(2), settings, 2, "")


def test_settings_that_do_not_fit() -> None:
    check_generation(GenerationSettings(8, eos_token="."), word_tokenizer(), 64)
    for settings, message in (
        (GenerationSettings(64), "--max_new_tokens 64 leaves no room for a prompt .* of 64 tokens"),
        (GenerationSettings(8), r"--eos_token '\\n': the model's tokenizer has no token"),
    ):
        with pytest.raises(InputError, match=message):
            check_generation(settings, word_tokenizer(), 64)
