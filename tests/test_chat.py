"""Chat templates: what the tokenizer itself makes of a conversation, in every kind of run."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from running import SAMPLES, command, finish, refused_line, small_model, training
from tiny_models import tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import run
from language_model.chat import Chat
from language_model.encoding import Encoder
from task_data.loading import load_samples
from tasks import Sample, get_task
from utils import InputError

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>\n{{ m['content'] }}<end>\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    + TEMPLATE
)


def chat_tokenizer(template: str = TEMPLATE) -> PreTrainedTokenizerBase:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = template
    return tokenizer


def encoder(task: str, system_prompt: str | None = None) -> Encoder:
    tokenizer = chat_tokenizer()
    return Encoder(get_task(task), tokenizer, 1000, 10, Chat(tokenizer, system_prompt))


def samples(task: str, count: int = 3) -> list[Sample]:
    return load_samples(get_task(task), str(SAMPLES))[1][:count]


def expected(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """What the tokenizer itself makes of a conversation."""
    found = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return list(found)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@pytest.mark.parametrize("system_prompt", [None, "Answer in one word."])
def test_options_are_the_assistants_answer(system_prompt: str | None) -> None:
    encode = encoder("SST2", system_prompt)
    tokenizer = encode.tokenizer
    shown, sample, _ = samples("SST2")
    system = [turn("system", system_prompt)] if system_prompt else []
    messages = [
        *system,
        turn("user", f"{shown.row['sentence'].strip()} It was"),
        turn("assistant", ("terrible", "great")[shown.correct[0]]),
        turn("user", f"{sample.row['sentence'].strip()} It was"),
    ]
    opening = expected(tokenizer, messages)
    options = encode.options(sample, [shown]).options
    assert encode.prompt(sample, [shown]) == tuple(opening)
    for option, word in zip(options, ("terrible", "great"), strict=True):
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        whole = tokenizer.encode(text + word, add_special_tokens=False)
        assert list(option.tokens) == whole
        assert option.scored == len(whole) - len(opening)
        assert tokenizer.decode(whole[-option.scored :]).strip() == word
    # One start token: the template's.
    assert whole.count(tokenizer.bos_token_id) == 1
    alone = encode.options(sample).options[sample.correct[0]]
    assert encode.correct_option(sample).options == (alone,)


def test_a_generated_answer_ends_as_the_template_ends_it() -> None:
    encode = encoder("SQuAD")
    (sample,) = samples("SQuAD", 1)
    (option,) = encode.correct_option(sample).options
    text = encode.tokenizer.decode(option.tokens[-option.scored :])
    assert text.strip() == f"{sample.correct[0]}<end>"
    assert encode.prompt(sample) == option.tokens[: -option.scored]


def test_content_free_prompts_are_turns_too() -> None:
    encode = encoder("SST2")
    (sample,) = samples("SST2", 1)
    (option, _) = encode.options(sample, content_free=True).options
    text = encode.tokenizer.decode(option.tokens[1:])
    assert "<user>\nIt was<end>" in text and sample.row["sentence"].strip() not in text


def save(folder: Path, template: str | None) -> Path:
    AutoModelForCausalLM.from_pretrained(small_model().name).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(small_model().name)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def test_every_kind_of_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save(tmp_path / "model", TEMPLATE)
    chat: dict[str, Any] = {"model_name": model, "apply_chat_template": True}
    plain = finish(command(model_name=model, result_file=tmp_path / "plain.json"))
    shown = {"verbose": True, "num_train": 2, "system_prompt": "Be brief."}
    result = finish(command(**chat, **shown, result_file=tmp_path / "chat.json"))
    out = capsys.readouterr().out
    assert "<system>\nBe brief.<end>\n<user>\n" in out and "<assistant>\ngreat<end>" in out
    assert result["settings"]["system_prompt"] == "Be brief."
    assert result["experiment"] != plain["experiment"]
    assert plain["settings"]["apply_chat_template"] is False
    finish(training(tmp_path / "zo", **chat, max_steps=1, save_steps=1))
    generated = {"max_new_tokens": 3, "train_as_classification": None, "no_eval": None}
    trained = finish(training(tmp_path / "lm", "SQuAD", **chat, **generated, max_steps=1))
    assert set(trained["metric"]) == {"f1", "em"}
    # Trained with a template, it does not go on without one.
    argv = training(tmp_path / "zo", model_name=model, max_steps=2, save_steps=1, tag="other")
    assert run.main([*argv, "--result_file", str(tmp_path / "other.json")]) == 2
    assert "--apply_chat_template True, not False" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("template", "arguments", "said"),
    [
        (None, {}, "--apply_chat_template: the tokenizer of "),
        (NO_SYSTEM, {"system_prompt": "Hello"}, "refuses it (no system here); leave it out"),
        ("{{ messages[9].x.y }}", {}, "--apply_chat_template: the chat template of"),
    ],
)
def test_refusals(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    template: str | None,
    arguments: dict[str, Any],
    said: str,
) -> None:
    model = save(tmp_path / "model", template)
    chat = {"model_name": model, "apply_chat_template": True} | arguments
    argv = command(**chat, result_file=tmp_path / "result.json")
    assert said in refused_line(argv, capsys, tmp_path)


def test_a_template_without_a_system_is_fine_without_one() -> None:
    Chat(chat_tokenizer(NO_SYSTEM)).check("m")
    with pytest.raises(InputError, match="has no chat template"):
        Chat(tiny_tokenizer()).check("m")
    assert json.dumps(Chat(chat_tokenizer()).end_of_answer) == '"<end>"'
