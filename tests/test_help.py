"""--help, docs/arguments.md, and what is said to arguments that do not exist."""

from __future__ import annotations

import re
import runpy

import pytest
from running import ROOT

from command_line.arguments import parse_arguments
from command_line.declarations import declared
from command_line.help import FIRST, help_text, help_texts
from command_line.published import IGNORED, NOT_HERE
from command_line.reading import DECLARED, GROUPS, OWN, SYNONYMS
from command_line.starting import begin
from command_line.trainer_arguments import NOT_OFFERED
from utils import InputError


def names_in(text: str) -> list[str]:
    """The arguments that a help text explains, in order."""
    return re.findall(r"^  (?:-h, )?--(\w+)", text, flags=re.MULTILINE)


def test_help_has_our_own_arguments_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    for words, code in (([], 2), (["--task_name", "SST2", "-h"], 0)):
        with pytest.raises(SystemExit) as error:
            begin(words)
        assert error.value.code == code
        first = capsys.readouterr().out
        assert "python run.py --task_name TASK" in first
    assert names_in(first) == list(FIRST)
    groups = {group._word: group for group in GROUPS}
    of_words = {word: names_in(help_text(["--help", word])) for word in groups}
    assert of_words == {word: [each.name for each in declared(g)] for word, g in groups.items()}
    assert all(f"\n  {word} " in first for word in (*groups, "all"))
    text = help_text(["--help", "all"])
    assert names_in(text) == list(OWN)
    titles = [f"{group.__doc__.partition('.')[0]}:\n" for group in GROUPS]
    places = list(map(text.index, titles))
    assert places == sorted(places)
    assert all(len(line) <= 100 for line in text.splitlines())
    assert help_text(["--help", "--task_name", "zo"]) == help_text(["--help"])


def test_every_argument_of_ours_is_explained() -> None:
    for name, each in OWN.items():
        text = help_texts()[name]
        assert len(text) > 14 and text.endswith("."), name
        if each.default is None and name not in ("model_name", "task_name", "train_file"):
            assert "Default: " in text, name
    text = help_text(["--help", "icl"])
    assert "Excludes --icl_sfc." in text and "Excludes --sfc." in text


def test_unknown_arguments() -> None:
    for typed, meant in (
        *((f"--{name}", meant) for name, meant in SYNONYMS.items()),
        *(("--bs=16", "per_device_train_batch_size"), ("--learning_rat", "learning_rate")),
        *(("--ZO_EPS", "zo_eps"), ("--hessian_smooth", "hessian_smooth_type")),
    ):
        with pytest.raises(InputError) as error:
            parse_arguments(["--num_eval", "5", typed, "1"])
        option = typed.partition("=")[0]
        assert str(error.value).startswith(f"unknown argument {option}: did you mean --"), typed
        assert typed.removeprefix("--") in SYNONYMS or meant in str(error.value)
    assert {*SYNONYMS.values()} <= {*DECLARED} and len(SYNONYMS) <= 10
    for far in (["--foo"], ["--qqqqq"], ["--"], ["--foo", "--bar=2", "--baz"]):
        listed = "--help all lists the arguments"
        with pytest.raises(InputError, match=rf"^unknown argument .*{listed}$"):
            parse_arguments([*far, "1"])


def test_arguments_that_would_break_a_run_are_not_offered() -> None:
    for name in NOT_OFFERED:
        with pytest.raises(InputError, match=rf"^--{name} is not offered: .*; leave it out$"):
            parse_arguments([f"--{name}", "1"])
        assert parse_arguments([f"--{name}", "False"]).warning is None


def test_page_of_the_arguments_is_that_of_the_command_line() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_arguments.py"))["make_page"]()
    page = (ROOT / "docs" / "arguments.md").read_text(encoding="utf-8")
    assert page == made, "run: python docs/make_arguments.py"
    for name in {*DECLARED, *NOT_OFFERED, *IGNORED, *NOT_HERE}:
        assert f"`--{name}`" in page
    for each in OWN.values():
        assert all(f"`{alias}`" in page for alias in each.aliases)
