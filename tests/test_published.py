"""Published command lines run as they are, or end in one line that says what is not here."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from running import MODEL, ROOT, SAMPLES, command, finish, log_of, training

import run
from command_line.arguments import check, parse_arguments
from command_line.reading import read_values
from utils import InputError

COMMANDS = ROOT / "tests" / "published_commands.txt"
# What a command line needs that is not here -> what is said; None: it is seen with the model.
REFUSED = {
    r"--method FZOO": r"not here: --method FZOO \(--trainer zo is MeZO, .*\)",
    r"--momentum": r"not here: --trainer zo_sgd .*, --momentum 0.9 .*, --module_wise_perturb.*",
    r"--trainer=zo_sgd": r"not here: --trainer zo_sgd \(choose from none, regular, zo, broadcast\)",
    r"--prompt_tuning": r"not here: --prompt_tuning \(--prefix_tuning trains a prefix\)",
    r"--zo_method": r"not here: --zo_method mezo-sgd \(.*ZO2's offloading\)",
    r"--fsdp": r"--fsdp needs processes: .*",
    r"WinoGrande": r"unknown task 'WinoGrande': choose one of .*",
    r"^(?!.*--model_name)": r"--model_name is missing: .*",
    r"--max_length 4096": None,
}


def published() -> Iterator[tuple[str, list[str], str | None]]:
    """Yield each command line, its words, and the pattern of its refusal."""
    for line in COMMANDS.read_text().splitlines():
        if not line.startswith("#"):
            text = line.partition(" | ")[2].replace("$TAG", "")
            found = [said for mark, said in REFUSED.items() if re.search(mark, text)]
            yield text, shlex.split(text)[1:], found[0] if found else ""


@pytest.fixture
def beside_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder beside the bundled model and data."""
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_is_read_and_checked(beside_data: Path) -> None:
    failures, refused = {}, 0
    for text, words, pattern in published():
        try:
            arguments = parse_arguments(words)
            check(arguments)
            said = ""
            if "\n" in (arguments.warning or ""):
                failures[text] = arguments.warning
        except InputError as error:
            said = str(error)
        refused += bool(said)
        if not re.fullmatch(pattern or "", said):
            failures[text] = said
    assert not failures and refused == 8
    assert len(list(published())) == 54


@pytest.mark.slow
def test_every_command_runs(
    beside_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failures, ran = {}, 0
    for number, (text, words, pattern) in enumerate(published()):
        folder = beside_data / str(number)
        folder.mkdir()
        (folder / "data").symlink_to(ROOT / "data")
        monkeypatch.chdir(folder)
        code = run.main(words)
        lines = [line for line in capsys.readouterr().err.splitlines() if ": " in line]
        warnings = [line for line in lines if line.startswith("warning: ")]
        errors = [line for line in lines if line.startswith("error: ")]
        ran += code == 0
        expected = (0, 0) if pattern == "" else (2, 1)
        has_result = bool(list(folder.glob("result/*.json")))
        if (code, len(errors)) != expected or len(warnings) > 1 or has_result != (code == 0):
            failures[text] = (code, lines)
    assert not failures and ran == 45


def test_published_schedules(tmp_path: Path) -> None:
    """By the formulas of the published code: 8 steps, warmup of 2, decay from 5, η 1e-4."""

    def decayed(step: int) -> float:
        return 1 if step < 5 else (1 - 1e-3) * (1 - (step - 5) / 3) ** 3 + 1e-3

    courses: dict[str, Callable[[int], float]] = {
        "linear_with_warmup": lambda step: (8 - step) / 6,
        "cosine_with_warmup": lambda step: 0.5 * (1 + math.cos(math.pi * 4 * (step - 2) / 6)),
        "constant_polynomial_decay_with_warmup": decayed,
    }
    for name, course in courses.items():
        decay = {"decay_step": 5} if name.startswith("constant") else {}
        argv = training(tmp_path / name, max_steps=8, save_steps=8, **decay)
        # HiZOO's schedule counts, whichever stands last.
        argv += ["--zo_lr_scheduler_type", name, "--warmup_step", "2"]
        finish([*argv, "--lr_scheduler_type", "constant"])
        expected = [1e-4 * (step / 2 if step < 2 else course(step)) for step in range(9)]
        logged = log_of(tmp_path / name / "out/checkpoint-8", "learning_rate")
        near = [pytest.approx(part, abs=1e-12) for part in (expected[:8], expected[1:])]
        assert logged in near, name
        by_variable = read_values(["--script", "HiZOO.sh"], {"ZO_LR_SCHEDULER_TYPE": name})
        of_command = read_values(["--zo_lr_scheduler_type", name])
        for argument in ("lr_scheduler_type", "lr_scheduler_kwargs"):
            assert getattr(by_variable, argument) == getattr(of_command, argument)
    for words, warmup in (
        (["--warmup_ratio", "0.1"], 0.1),
        (["--warmup_steps", "0", "--warmup_ratio", "0.1"], 0.1),
        (["--warmup_ratio", "0.1", "--warmup_steps", "0"], 0.1),
        (["--warmup_steps", "5", "--warmup_ratio", "0.0"], 5),
        (["--warmup_steps", "5", "--warmup_step", "0"], 0),
        (["--warmup_steps", "100", "--warmup_ratio", "0.1"], 100),
        (["--warmup_ratio", "0.1", "--warmup_steps", "100"], 100),
        (["--warmup_steps", "100", "--warmup_ratio", "0.00"], 100),
    ):
        assert read_values(words).warmup_steps == warmup, words


def test_first_line_of_a_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alpha = {"hessian_smooth_type": "constant1e-8"}
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"hessian_smooth_type": None}, "MeZO: 2 forward passes a step"),
        (alpha, "HiZOO, α 1e-8: 3 forward passes a step"),
        (alpha | {"hessian": "lowrank"}, "HiZOO-L, α 1e-8: 3 forward passes a step"),
        (alpha | {"q": 2}, "HiZOO, α 1e-8, 2 directions: 5 forward passes a step"),
        (
            {"hessian_smooth_type": None, "learning_rate": "auto"},
            "MeZO, η auto: 2 forward passes a step, 1 more in every 10th",
        ),
        (alpha | {"gradient_accumulation_steps": 2}, "HiZOO, α 1e-8: 3 forward passes a batch"),
    )
    for number, (arguments, line) in enumerate(cases):
        finish(training(tmp_path / str(number), max_steps=1, **arguments))
        assert capsys.readouterr().out.splitlines()[0] == line


def test_dev_losses_without_dev_examples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are those of the eval examples, as in MeZO; metrics have MeZO's names."""
    shared = {"no_eval": None, "num_eval": 6, "eval_strategy": "steps", "eval_steps": 3}
    result = finish(training(tmp_path / "eval", **shared, load_best_model_at_end=True))
    said = "dev losses are those of the eval examples: there is no --num_dev"
    assert said in capsys.readouterr().out.splitlines()
    assert [*result["history"]["dev_loss"]] == ["3", "6"] and "dev_metric" not in result
    assert result["accuracy"] == result["metric"]["accuracy"] and result["settings"]["num_dev"] == 0
    result = finish(training(tmp_path / "dev", **shared, num_dev=4))
    assert said not in capsys.readouterr().out
    assert result["dev_accuracy"] == result["dev_metric"]["accuracy"]
    rows = command("SQuAD", model_name=MODEL, data_dir=SAMPLES, num_eval=2, max_new_tokens=2)
    result = finish([*rows, "--result_file", str(tmp_path / "text.json")])
    assert {"f1", "em"} <= result.keys() and result["f1"] == result["metric"]["f1"]
    assert json.loads((tmp_path / "text.json").read_text())["em"] == result["em"]
