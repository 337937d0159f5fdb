"""--help, --help_all, docs/arguments.md, and what is said to arguments that do not exist."""

from __future__ import annotations

import dataclasses
import re
import runpy

import pytest
from running import ROOT
from transformers import TrainingArguments

import run
from command_line.arguments import Arguments, parse_arguments
from command_line.groups import COMMON_TRAINER_ARGUMENTS, GROUPS
from command_line.unknown import NOT_OFFERED, OTHER_NAMES, explain_unknown
from utils import InputError

OWN = {field.name: field for group in GROUPS for field in dataclasses.fields(group)}
OFFERED = {field.name for field in dataclasses.fields(Arguments) if field.init} - {*NOT_OFFERED}
# What people type, and what they are to give.
TYPED = {
    "--task": "--task_name",
    "--model": "--model_name",
    "--model_name_or_path": "--model_name",
    "--lr": "--learning_rate",
    "--batch_size": "--per_device_train_batch_size",
    "--bs=16": "--per_device_train_batch_size",
    "--per_gpu_train_batch_size": "--per_device_train_batch_size",
    "--epochs": "--num_train_epochs",
    "--num_epochs": "--num_train_epochs",
    "--steps": "--max_steps",
    "--eps": "--zo_eps",
    "--load_in_8bit": "--load_int8",
    "--load-in-4bit": "--load_int4",
    "--max_seq_length": "--max_length",
    "--num_demonstrations": "--num_train",
    "--warmup_ratio": "--warmup_steps",
    "--hessian_smooth": "--hessian_smooth_type",
    "--do_sample": "--sampling",
    "--learning_rat": "--learning_rate",
    "--ZO_EPS": "--zo_eps",
}


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as exit_code:
        run.main(argv)
    assert exit_code.value.code == 0
    return capsys.readouterr().out


def names_in(text: str) -> list[str]:
    """The arguments that a help text explains, in order."""
    return re.findall(r"^  (?:-h, )?--(\w+)", text, flags=re.MULTILINE)


def test_help_has_our_own_arguments_first_and_in_groups(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = printed(capsys, "--help")
    assert names_in(text) == ["help", "help_all", *OWN, *order_of(COMMON_TRAINER_ARGUMENTS)]
    titles = [f"\n{group.__doc__.removesuffix('.')}:\n" for group in GROUPS]
    places = [text.index(title) for title in titles]
    assert places == sorted(places)


def test_help_all_has_every_argument(capsys: pytest.CaptureFixture[str]) -> None:
    names = names_in(printed(capsys, "--help_all"))
    assert names[: len(OWN) + 2] == ["help", "help_all", *OWN]
    assert sorted(names[2:]) == sorted(OFFERED)


def order_of(names: dict[str, str]) -> list[str]:
    return [field.name for field in dataclasses.fields(TrainingArguments) if field.name in names]


def test_every_argument_of_ours_is_explained() -> None:
    for name, field in OWN.items():
        text = field.metadata["help"]
        assert len(text) > 30 and text.endswith("."), name
        if field.default is None and name != "model_name" and name != "task_name":
            assert "Default: " in text or name in ("train_file", "validation_file"), name
    # Flags that exclude each other say so, both of them.
    excluded = {
        (name, other)
        for name, field in OWN.items()
        for sentence in re.findall(r"Excludes ([^.]*)\.", field.metadata["help"])
        for other in re.findall(r"--(\w+)", sentence)
    }
    assert len(excluded) > 20
    assert [pair for pair in sorted(excluded) if pair[::-1] not in excluded] == []


@pytest.mark.parametrize("typed", TYPED)
def test_did_you_mean(typed: str) -> None:
    with pytest.raises(InputError) as error:
        parse_arguments(["--num_eval", "5", typed, "1"])
    assert str(error.value).startswith(f"unknown argument {typed}: did you mean {TYPED[typed]}")


def test_other_names_lead_to_arguments_that_exist() -> None:
    assert not OTHER_NAMES.keys() & OFFERED and not OTHER_NAMES.keys() & NOT_OFFERED.keys()
    for hint in [*OTHER_NAMES.values(), *NOT_OFFERED.values()]:
        assert {name for name in re.findall(r"--(\w+)", hint)} <= OFFERED, hint
    assert explain_unknown("qqqqq", ["--zo_eps"]).endswith("--help lists the arguments")


def test_arguments_that_would_do_nothing_are_not_offered() -> None:
    for name in NOT_OFFERED:
        with pytest.raises(InputError, match=rf"^--{name} is not offered: .*; leave it out$"):
            parse_arguments([f"--{name}", "1"])
    with pytest.raises(InputError, match=r"^--do-train is not offered"):
        parse_arguments(["--do-train"])


def test_page_of_the_arguments_is_that_of_the_command_line() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_arguments.py"))["make_page"]()
    page = (ROOT / "docs" / "arguments.md").read_text(encoding="utf-8")
    assert page == made, "run: python docs/make_arguments.py"
    for name in {*OFFERED, *NOT_OFFERED}:
        assert f"`--{name}`" in page
    for field in OWN.values():
        assert all(f"`{alias}`" in page for alias in field.metadata.get("aliases", ()))
