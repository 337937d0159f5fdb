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

import language_model.encoding
import run
from language_model.encoding import Chat, Encoder
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


# A template, and what is refused of the conversation "Who?", "Ann Lee." by it.
CHANGING: dict[str, tuple[str, str]] = {
    "lower-cases": (
        TEMPLATE.replace("m['content']", "m['content'] | lower"),
        "what the user says, 'Who?': it makes '</s><user>\\nwho?<end>",
    ),
    "strips": (
        TEMPLATE.replace("m['content']", "m['content'].strip('.')"),
        "the answer 'Ann Lee.': the conversation ends in '</s><user>\\nWho?<end>",
    ),
    "drops": (
        "{% for m in messages if m['role'] != 'assistant' %}{{ m['content'] }}{% endfor %}",
        "leaves out the answer 'Ann Lee.'",
    ),
    "constant": ("hello", "what the user says, 'Who?': it makes 'hello'"),
    "empty": ("{# nothing #}", "what the user says, 'Who?': it makes ''"),
    "refuses": ("{{ messages[9].x.y }}", "refuses [{'role': 'user', 'content': 'Who?'}] ("),
    "no template": ("{% for %}", "refuses [{'role': 'user', 'content': 'Who?'}] ("),
    "never ends": (
        "".join(f"{{% for {name} in range(99999) %}}" for name in "abc") + "{% endfor %}" * 3,
        "(it takes longer than 0.2 seconds)",
    ),
}


def test_a_template_that_changes_a_conversation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_model.encoding, "SECONDS", 0.2)
    asked, failures = [turn("user", "Who?")], []
    for case, (template, said) in CHANGING.items():
        with pytest.raises(InputError) as refusal:
            Chat(chat_tokenizer(template)).check_conversation(asked, "Ann Lee.")
        line = str(refusal.value)
        if said not in line or "\n" in line or not line.endswith("out --apply_chat_template"):
            failures.append((case, line))
    assert not failures
    # What is fine: spaces at both ends, an end of another kind, reasoning left out of history.
    for template in (
        *(TEMPLATE, TEMPLATE.replace("m['content']", "m['content'] | trim"), NO_SYSTEM),
        TEMPLATE.replace("m['content']", "m['content'].split('</think>')[-1]"),
        TEMPLATE.replace("<assistant>\n", "<assistant>\n<think>\n"),
    ):
        history = [*asked, turn("assistant", "<think>Hm.</think>Bob."), *asked]
        Chat(chat_tokenizer(template)).check_conversation(history, "Ann Lee.")


ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + TEMPLATE
)


def test_rows_are_rendered_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the files for training, for validation and to predict."""
    good = {"messages": [turn("user", "Who?"), turn("assistant", "Ann")]}
    rows = {
        "system": {"messages": [turn("system", "Be short."), *good["messages"]]},
        "two": {"messages": [turn("user", "Hi"), *good["messages"]]},
        "good": good,
    }
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (good, row)))
    file = {name: tmp_path / f"{name}.jsonl" for name in rows}
    chat = {"apply_chat_template": True, "task_name": None, "data_dir": None, "num_eval": None}
    plain = {**chat, "train_as_classification": None, "no_eval": None, "max_new_tokens": 2}
    failures = []
    for template, files, said in (
        (NO_SYSTEM, {"train_file": file["system"], "validation_file": file["good"]}, "training"),
        (NO_SYSTEM, {"train_file": file["good"], "validation_file": file["system"]}, "validation"),
        (ALTERNATING, {"train_file": file["two"], "validation_file": file["good"]}, "training"),
    ):
        model = save(tmp_path / "model", template)
        argv = training(tmp_path, model_name=model, num_train=2, **plain, **files)
        line = refused_line(argv, capsys, tmp_path)
        reason = "no system here" if template is NO_SYSTEM else "roles must alternate"
        if not line.startswith(f"{said} data, row 1 ") or reason not in line:
            failures.append(line)
    predicted = {"predict_file": file["two"], "predictions_file": tmp_path / "p.jsonl"}
    argv = command(model_name=model, **chat, max_new_tokens=2, **predicted)
    line = refused_line(argv, capsys, tmp_path)
    if not line.startswith(f"{file['two']}, row 1 "):
        failures.append(line)
    assert not failures


def test_what_a_tokenizer_needs(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(InputError, match="the tokenizer of m has no chat template"):
        Chat(tiny_tokenizer()).check("m")
    with pytest.raises(InputError, match=r"no system here\); .* and --system_prompt"):
        Chat(chat_tokenizer(NO_SYSTEM), "Hello").text([turn("user", "Who?")])
    assert Chat(chat_tokenizer()).end_of_answer == "<end>" and not caplog.messages
    Chat(chat_tokenizer(TEMPLATE + "{{ strftime_now('%Y') }}")).check("m")
    (line,) = caplog.messages
    assert line == "the chat template of m writes today's date: prompts differ from day to day"
