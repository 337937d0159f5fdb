"""Arguments from a YAML file, printed as one, and what a run will take before it begins."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from running import MODEL, SAMPLES, command, contents, finish, refused_line, training

import run
from command_line.arguments import check, parse_arguments
from command_line.config_files import words_of_config
from command_line.settings import experiment_hash
from experiment import preparation

CONFIG = """\
# Of this house.
task_name: SST2
model_name: {model}
data_dir: {data}
num-eval: 6
trainer: zo
num_train: 12
max_steps: 2
learning_rate: 1e-3
zo_compile: no
train_as_classification: true
lr_scheduler_type: linear
lr_scheduler_kwargs: ~
"""


def write_config(folder: Path, text: str = CONFIG) -> str:
    path = folder / "config.yaml"
    path.write_text(text.format(model=MODEL, data=SAMPLES), encoding="utf-8")
    return str(path)


def test_the_command_line_wins_over_a_file_and_a_file_over_a_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path)
    arguments = parse_arguments(["--config", config, "--learning_rate", "1e-5"])
    check(arguments)
    assert (arguments.learning_rate, arguments.num_eval, arguments.zo_compile) == (1e-5, 6, "no")
    assert arguments.train_as_classification and arguments.lr_scheduler_kwargs is None
    for name, value in {"LR": "1e-2", "EPS": "1e-2", "DEV": "3"}.items():
        monkeypatch.setenv(name, value)
    arguments = parse_arguments(["--script", "HiZOO.sh", "--config", config])
    assert (arguments.learning_rate, arguments.zo_eps) == (1e-3, 1e-2)
    assert {"learning_rate", "num_eval"} <= arguments.given_by_user
    assert "zo_eps" not in arguments.given_by_user


def test_a_file_is_the_same_run_as_its_command_line(tmp_path: Path) -> None:
    typed = command(
        **{"num_eval": 6, "trainer": "zo", "num_train": 12, "max_steps": 2, "learning_rate": 1e-3},
        **{"zo_compile": "no", "train_as_classification": True, "lr_scheduler_type": "linear"},
    )
    both = [["--config", write_config(tmp_path)], typed]
    assert len({experiment_hash(parse_arguments(argv)) for argv in both}) == 1


# A file's text, and what is said of it.
BAD = (
    ("learning_rat: 1e-3\n", ":1: unknown argument --learning_rat: did you mean --learning_rate?"),
    ("task_name: SST2\n\nlr: 1e-3\n", ":3: unknown argument --lr: did you mean --learn"),
    ("seed: 1\nseed: 2\n", ":2: seed is given twice"),
    ("num_eval: 1\nnum_test: 2\n", ":2: --num_eval is given twice, under another name"),
    ("seed: [1, 2]\n", ":1: seed is a list; give one value (sweep.py reads lists)"),
    ("num_eval: many\n", ":1: --num_eval many: must be a whole number"),
    ("config: other.yaml\n", ":1: config in a file of --config"),
    ("", ": give arguments by name, as in learning_rate: 1e-6"),
    ("- a\n", ": give arguments by name"),
    ("a: [1\n", ":2: not YAML (while parsing a flow sequence, expected ',' or ']'"),
    ("a: 1\n---\nb: 2\n", ":2: not YAML (expected a single document"),
    ("? [a]\n: b\n", ":1: not YAML (while constructing a mapping, found unhashable key"),
    ("num_eval: -1\n", ":1: --num_eval -1: must be at least 1"),
    ("a: &a [1]\nb: &b [*a, *a]\nseed: [*b, *b]\n", ":2: aliases are not read"),
    ("seed: {a: 1, a: 2}\n", ":1: a is given twice"),
    ("seed: !!python/object/apply:os.system [touch x]\n", ":1: tags are not read"),
    ("seed: \x01\n", ": not YAML (unacceptable character"),
    ("a: " + "[" * 1200 + "]" * 1200, ":1: nested more than 20 times"),
)


def test_a_bad_file_is_refused_by_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path, failures = Path("config.yaml"), {}
    for text, said in BAD:
        path.write_text(text, encoding="utf-8")
        line = refused_line(["--config", path], capsys, tmp_path)
        if not line.startswith(f"config.yaml{said}"):
            failures[text[:99]] = line
    os.mkfifo("fifo")
    for name, said in (
        ("none.yaml", "cannot be read (No such file or directory)"),
        ("fifo", "cannot be read (it is no file)"),
        (".", "cannot be read (it is no file)"),
    ):
        line = refused_line(["--config", name], capsys)
        if line != f"{name}: {said}":
            failures[name] = line
    assert not failures


def test_dictionaries_of_a_file_are_json(tmp_path: Path) -> None:
    """Numbers, truths and nothing are what JSON takes them for; all else is text, and never run."""
    text = "a: {b: 1e-7, c: true, d: ~, e: '!!python/name:os.system', f: [1, x]}\n"
    (tmp_path / "config.yaml").write_text(text)
    _, word = words_of_config(tmp_path / "config.yaml")["a"]
    expected = {"b": 1e-7, "c": True, "d": None, "e": "!!python/name:os.system", "f": [1, "x"]}
    assert json.loads(word) == expected


def test_dry_run_checks_everything_but_the_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = training(tmp_path, num_dev=4, eval_strategy="steps", eval_steps=2, no_eval=None)
    monkeypatch.setattr(preparation, "load_pretrained", None)
    assert run.main([*argv, "--dry_run"]) == 0
    steps, weights = capsys.readouterr().out.splitlines()
    assert steps == "6 steps: 19 forward passes"
    assert "parameters" in weights and "MiB" in weights
    assert contents(tmp_path) == {}
    assert run.main([*argv, "--dry_run", "--num_dev", "5000"]) == 2
    assert "5000 dev examples leave none to train on" in capsys.readouterr().err
    few = ["--dataloader_drop_last", "--per_device_train_batch_size", "50"]
    line = refused_line(
        [*argv, "--dry_run", "--num_train", "1000", "--num_dev", "1590", *few], capsys
    )
    assert "--dataloader_drop_last leaves nothing of 10 training examples, 50 a step" in line


def test_dry_run_of_an_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = command(num_eval=20, result_file=tmp_path / "result.json", num_train=2)
    assert run.main([*argv, "--dry_run"]) == 0
    assert capsys.readouterr().out.startswith("923,008 parameters;")
    finish(argv)
    assert "dry_run" not in json.loads((tmp_path / "result.json").read_text())["settings"]
