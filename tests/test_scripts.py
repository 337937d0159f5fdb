"""The shell scripts: their variables, defaults, and whole runs."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from running import MODEL, ROOT, SAMPLES, log_of, weights

import run
from command_line.arguments import make_arguments
from command_line.contradictions import check_values
from command_line.reading import Values, read_values
from command_line.scripts import VARIABLES, unread_variables
from utils import InputError

TASKS = ["SST2", "RTE", "CB", "BoolQ", "WSC", "WIC", "MultiRC", "Copa", "ReCoRD", "SQuAD", "DROP"]
OWN_MODEL = {"MODEL": "facebook/opt-13b"}
NAMES = {name for variables in VARIABLES.values() for name in variables}


def values_of(script: str, line: str | list[str] = "", **variables: str) -> Values:
    words = line.split() if isinstance(line, str) else line
    values = read_values(["--script", script, *words], variables)
    check_values(values)
    return values


def picked(values: Values, names: Any) -> dict[str, Any]:
    return {name: getattr(values, name) for name in names}


def run_script(
    folder: Path, *arguments: str, script: str = "HiZOO.sh", python: str = "", **variables: str
) -> subprocess.CompletedProcess:
    """Run a script in ``folder``; ``python`` is a shell script that stands in for Python."""
    commands = folder / ".commands"
    commands.mkdir(exist_ok=True)
    (commands / "python").write_text(python or f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (commands / "python").chmod(0o755)
    clean = {name: value for name, value in os.environ.items() if name not in NAMES}
    clean |= {"PATH": f"{commands}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        ["bash", str(ROOT / script), *arguments],
        cwd=folder,
        env=clean | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )


# What a script asks of Python is answered; what it would run is printed, a word a line.
PRINTER = f"""#!/bin/sh
[ "$1" = -c ] && exec "{sys.executable}" "$@"
printf "%s\\n" "$@"
"""


def finish(
    folder: Path, monkeypatch: pytest.MonkeyPatch, script: str, line: str = "", **variables: str
) -> dict[str, Any]:
    """Do a script's run in this process, with ``folder`` as its working directory."""
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert run.main(["--script", script, *line.split()]) == 0
    (result_file,) = (folder / "result").glob("*.json")
    return json.loads(result_file.read_text())


# ------------------------------------------------------------------------------------- defaults


def test_nothing_set_is_the_bundled_model_and_data() -> None:
    bundled = {"model_name": str(MODEL), "data_dir": str(SAMPLES), "task_name": "SST2"}
    for script in VARIABLES.keys() - {"mezo.sh"}:
        values = values_of(script)
        assert picked(values, bundled) == bundled
        assert values.eval_before_training is (script != "icl.sh")
    for model in ("data/tiny-opt", "./data/tiny-opt/"):
        same = values_of("HiZOO.sh", MODEL=os.path.relpath(ROOT / model))
        assert same.given == values_of("HiZOO.sh").given


def test_line_of_the_paper() -> None:
    variables = {"TASK": "CB", "MODE": "ft", "LR": "1e-6", "EPS": "1e-3"}
    values = values_of("HiZOO.sh", HESSIAN_SMOOTH_TYPE="constant1e-10", **OWN_MODEL, **variables)
    expected = {
        **{"model_name": "facebook/opt-13b", "task_name": "CB", "trainer": "zo", "data_dir": None},
        **{"learning_rate": 1e-6, "zo_eps": 1e-3, "hessian_smooth_type": "constant1e-10"},
        **{"max_steps": 20000, "per_device_train_batch_size": 16, "num_train": 1000},
        **{"num_dev": 100, "num_eval": 1000, "eval_steps": 2000, "save_steps": 2000, "seed": 0},
        **{"train_set_seed": 0, "load_best_model_at_end": True, "load_saved_dtype": True},
        **{"eval_before_training": False, "train_as_classification": True},
    }
    assert picked(values, expected) == expected
    values = values_of("finetune.sh", **OWN_MODEL)
    expected |= {
        **{"task_name": "SST2", "trainer": "regular", "num_train_epochs": 5, "num_dev": 500},
        **{"per_device_train_batch_size": 8, "learning_rate": 1e-5, "lr_scheduler_type": "linear"},
        **{"eval_strategy": "epoch", "save_strategy": "epoch", "save_total_limit": 1},
        **{"max_steps": -1, "eval_steps": None, "save_steps": 500, "load_saved_dtype": False},
        **{"fp16": None, "bf16": True, "zo_eps": 1e-3, "hessian_smooth_type": "constant0"},
    }
    assert picked(values, expected) == expected
    values = values_of("broadcast.sh", **OWN_MODEL)
    expected |= {
        **{"trainer": "broadcast", "per_device_train_batch_size": 16, "max_steps": 200},
        **{"eval_strategy": "steps", "eval_steps": 50, "save_steps": 50, "learning_rate": 5e-5},
        **{"num_train_epochs": 3, "save_strategy": "steps", "load_saved_dtype": True},
        "bf16": None,
        **{"broadcast_rate": "auto", "broadcast_damping": 0.1, "broadcast_from": 0.5},
    }
    assert picked(values, expected) == expected
    # Of what a script gives, nothing is without effect here.
    for script in ("broadcast.sh", "HiZOO.sh"):
        values = values_of(script, "--trainer broadcast")
        assert make_arguments(values).warning is None and values.lr_scheduler_type == "linear"
    values = values_of("mezo.sh", TASK="Copa", MODE="lora")
    expected = {
        **{"model_name": "facebook/opt-1.3b", "task_name": "Copa", "trainer": "zo", "lora": True},
        **{"learning_rate": 1e-5, "zo_eps": 1e-3, "hessian_smooth_type": "constant0", "seed": 0},
        **{"max_steps": 20000, "eval_steps": 4000, "save_steps": 4000, "num_dev": 100},
        **{"per_device_train_batch_size": 16, "num_train": 1000, "num_eval": 1000},
        **{"train_as_classification": False, "load_best_model_at_end": True},
        **{"lr_scheduler_type": "constant", "train_set_seed": 0, "save_total_limit": 1},
    }
    assert picked(values, expected) == expected
    values = values_of("HiZOO.sh", "--lora", **OWN_MODEL)
    assert picked(values, {"learning_rate", "zo_eps"}) == {"learning_rate": 1e-4, "zo_eps": 1e-2}
    values = values_of("icl.sh", TASK="CB", SEED="4", **OWN_MODEL)
    expected = {"trainer": "none", "num_train": 32, "train_set_seed": 4, "num_eval": 1000}
    assert picked(values, expected) == expected and values.load_saved_dtype
    assert values_of("icl.sh", **OWN_MODEL).train_set_seed is None


def test_every_variable_is_an_argument() -> None:
    samples = {
        **{"TASK": "RTE", "MODEL": "a/b", "DATA_DIR": "some where", "MODE": ""},
        **{"HESSIAN_SMOOTH_TYPE": "constant1e-6", "ZO_LR_SCHEDULER_TYPE": "cosine"},
        **{"STEPS": "80", "DECAY_STEP": "70", "FROM": "0.25"},
    }
    for script in ("HiZOO.sh", "broadcast.sh", "finetune.sh", "icl.sh"):
        numbers = iter(range(2, 30))
        variables = {name: samples.get(name, str(next(numbers))) for name in VARIABLES[script]}
        values = values_of(script, **variables)
        for name, arguments in VARIABLES[script].items():
            for argument in arguments.split():
                shown = getattr(values, argument)
                shown = f"{shown:g}" if isinstance(shown, float) else str(shown)
                assert variables[name] == shown, (script, argument)


def test_every_number_is_checked_in_one_place() -> None:
    """Bash would run some of these words; each is named with its variable, once."""
    texts = {"MODEL", "DATA_DIR", "TASK", "MODE", "HESSIAN_SMOOTH_TYPE", "ZO_LR_SCHEDULER_TYPE"}
    floats = {"LR", "EPS", "EPOCH", "WEIGHT_DECAY", "WARMUP_STEP", "DECAY_STEP", "EVAL_STEPS"}
    floats |= {"RATE", "DAMPING", "FROM"}
    failures = []
    for script, variables in VARIABLES.items():
        for name in variables.keys() - texts:
            words = ["a[$(touch x)]", "1.5.2", "nan", "1e999", "-3", "0x10"]
            for word in words if name in floats else [*words, "1.5", "99999999999999999999"]:
                try:
                    values_of(script, **{name: word})
                    failures.append((script, name, word, "taken"))
                except InputError as error:
                    if not str(error).startswith(f"{name}={word}: "):
                        failures.append((script, name, word, str(error)))
    assert not failures


def test_what_the_user_types_wins() -> None:
    values = values_of("HiZOO.sh", "--learning_rate 3 --seed 9", LR="1e-6", SEED="5")
    assert (values.learning_rate, values.seed, values.train_set_seed) == (3, 9, 5)
    assert values.given_by_user == {"learning_rate", "seed"}
    assert values_of("HiZOO.sh", "--eval-steps 30").save_steps == 30
    assert values_of("HiZOO.sh", "--num_train_epochs 2").max_steps == -1
    assert values_of("HiZOO.sh", "--num_train_sets 2").train_set_seed is None
    for flag in ("load_float16", "load_bfloat16"):
        assert not values_of("HiZOO.sh", f"--{flag}").load_saved_dtype


def test_modes() -> None:
    """By the variable or by a flag."""
    rates = {"ft": (1e-6, 1e-3, 1e-5), "prefix": (1e-2, 1e-1, 1e-2), "lora": (1e-4, 1e-2, 1e-4)}
    flags = {"ft": "", "prefix": "--prefix_tuning", "lora": "--lora"}
    for mode, (rate, scale, of_adamw) in rates.items():
        for line, variables in (("", {"MODE": mode}), (flags[mode], {})):
            values = values_of("HiZOO.sh", line, **OWN_MODEL, **variables)
            assert (values.learning_rate, values.zo_eps) == (rate, scale)
            assert (values.prefix_tuning, values.lora) == (mode == "prefix", mode == "lora")
            assert values_of("finetune.sh", line, **variables).learning_rate == of_adamw
    values = values_of("HiZOO.sh", MODE="lora", LR="3", EPS="4")
    assert (values.learning_rate, values.zo_eps) == (3, 4)


def test_objective_and_dev_examples_of_a_task() -> None:
    for task in TASKS:
        for spelling in (task, task.lower()):
            values = values_of("HiZOO.sh", TASK=spelling, **OWN_MODEL)
            classes = task not in ("Copa", "ReCoRD", "SQuAD", "DROP")
            assert values.train_as_classification is classes, task
            assert values.num_dev == (100 if task in ("CB", "Copa") else 500)
            published = read_values(["--task_name", spelling, "--trainer", "zo"])
            assert not published.train_as_classification
    assert not values_of("HiZOO.sh", "--non_diff").train_as_classification
    assert not values_of("finetune.sh", "--only_train_option False").train_as_classification


def test_best_checkpoint_needs_dev_losses_and_checkpoints() -> None:
    for line, best in (
        *(("--eval_strategy no", False), ("--evaluation_strategy=no", False)),
        *(("--save_strategy no", False), ("--eval_strategy epoch", True)),
        *(("--eval_strategy no --evaluation_strategy steps", True), ("--tag no", True)),
        *(("--save_strategy best --metric_for_best_model loss", True), ("--num_dev 0", False)),
        *(("--save_strategy epoch", False), ("--logging_strategy epoch", True)),
        *(("--no_eval", True), ("--trainer regular --learning_rate 1", True)),
    ):
        assert bool(values_of("HiZOO.sh", line).load_best_model_at_end) is best, line
    line = "--non_diff --evaluation_strategy no --save_strategy no --save_model"
    values = values_of("HiZOO.sh", line, TASK="SQuAD", MODE="prefix", **OWN_MODEL)
    assert make_arguments(values_of("HiZOO.sh", line, TASK="SQuAD", MODE="prefix")).warning is None
    assert values.save_model and not values.load_best_model_at_end


def test_own_files(tmp_path: Path) -> None:
    """Options train as classification, however given, by run.py too; a fifth of few rows is dev."""
    rows = [{"prompt": f"{n}. It was", "options": ["bad", "good"], "answer": 1} for n in range(20)]
    texts = [{"prompt": f'{n}. Which "options"?', "answer": "four"} for n in range(20)]
    for kind, table in (("options", rows), ("texts", texts)):
        name = str(tmp_path / f"my {kind}")
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), f"{name}.parquet")
    with (tmp_path / "my labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *((f"text {n}", n % 2) for n in range(20))])
    columns = ["--text_column", "text", "--label_column", "label"]
    for name, more, classes in (
        *((f"my options.{suffix}", [], True) for suffix in ("jsonl", "parquet")),
        *((f"my texts.{suffix}", [], False) for suffix in ("jsonl", "parquet")),
        ("my labels.csv", columns, True),
    ):
        file = str(tmp_path / name)
        own = [f"--train_file={file}", "--validation_file", file, *more]
        values = values_of("HiZOO.sh", own)
        assert (values.task_name, values.data_dir) == (None, None)
        assert values.train_as_classification is classes, name
        assert (values.num_train, values.num_dev, values.eval_strategy) == (16, 4, "steps")
        for line, of_run_py in (
            *(("zo", classes), ("regular", classes), ("none", False), ("zo --non_diff", False)),
            *(("zo --only_train_option", False), ("zo --train_as_classification False", False)),
        ):
            values = read_values([*own, "--trainer", *line.split()])
            assert values.train_as_classification is of_run_py, (name, line)
        values = values_of("HiZOO.sh", own, DEV="0")
        assert (values.eval_strategy, values.load_best_model_at_end) == ("no", False)
        assert values.num_train == 20
        assert values_of("HiZOO.sh", own, DEV="7").num_train == 13
        assert values_of("HiZOO.sh", [*own, "--num_dev", "99"]).num_train == 1
        assert values_of("icl.sh", own).num_train == 32
        for empty in ([], ["--train_file", ""]):
            assert values_of("icl.sh", [*own[1:], *empty]).num_train == 0
        assert values_of("HiZOO.sh", [*own[1:], *empty]).num_train == 1000
        answered = ["--predict_file", file, "--predictions_file", "p.jsonl", *more]
        values = values_of("icl.sh", answered)
        assert (values.task_name, values.num_train) == (None, 0)
        assert values_of("icl.sh", answered, TASK="SST2").task_name == "SST2"
        values = values_of("HiZOO.sh", own, TASK="RTE", DATA_DIR="nowhere")
        assert (values.task_name, values.data_dir) == (None, None)
        assert "here: TASK, DATA_DIR (the files of --tr" in make_arguments(values).warning
        held_out = values_of("HiZOO.sh", [own[0], *more])  # a tenth of the rows to report on
        assert (held_out.num_train, held_out.num_dev) == (15, 3)


def test_what_makes_no_sense_is_refused() -> None:
    for script, line, variables, message in (
        ("HiZOO.sh", "--train_file a.csv --task_name CB", {}, "--task_name and --train_file excl"),
        ("HiZOO.sh", "--train_file a.csv", {}, "--train_file a.csv: "),
        ("HiZOO.sh", "", {"MODE": "nothing"}, "MODE=nothing: give ft, prefix, lora"),
        ("HiZOO.sh", "", {"BS": "1.5"}, "BS=1.5: must be a whole number"),
        ("HiZOO.sh", "", {"BS": "a[$(touch x)]"}, r"BS=a\[\$\(touch x\)\]: must be a whole number"),
        ("HiZOO.sh", "", {"BS": "+5", "WORLD_SIZE": "2"}, r"BS=\+5: give a multiple of the 2 proc"),
        ("HiZOO.sh", "", {"BS": "5", "WORLD_SIZE": "2"}, "BS=5: give a multiple of the 2 proc"),
        ("HiZOO.sh", "", {"LR": "fast", "STEPS": "0"}, "(?s)LR=fast: must be a number.*STEPS=0: "),
        ("broadcast.sh", "", {"FROM": "1"}, "FROM=1: must be below 1"),
        ("broadcast.sh", "--lora", {"RATE": "-1"}, "RATE=-1: must be at least 0"),
        ("HiZOO.sh", "--trainer broadcast", {"MODE": "lora"}, "--lora: .*take --trainer zo"),
        ("finetune.sh", "--fsdp full_shard", {"MODE": "prefix"}, "--prefix_tuning: it needs whole"),
        ("nothing.sh", "", {}, "--script nothing.sh: choose from icl.sh"),
        ("HiZOO.sh", ["--model_name", ""], {}, "^--model_name is missing"),
    ):
        with pytest.raises(InputError, match=message):
            values_of(script, line, **variables)


def test_processes() -> None:
    two = {"WORLD_SIZE": "2", "BS": "6"}
    assert values_of("HiZOO.sh", **two).per_device_train_batch_size == 3
    own = values_of("HiZOO.sh", "--per_device_train_batch_size 5", WORLD_SIZE="3")
    assert own.per_device_train_batch_size == 5  # 16 is no multiple of 3
    assert values_of("finetune.sh", WORLD_SIZE="2").per_device_train_batch_size == 4


def test_mixed_precision_is_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """finetune.sh asks for it; it is as without effect on a CPU, unless the user asks too."""
    assert values_of("finetune.sh").bf16 and make_arguments(values_of("finetune.sh")).bf16 is False
    assert make_arguments(values_of("finetune.sh")).warning is None
    assert make_arguments(values_of("finetune.sh", "--bf16")).bf16
    for line in ("--fp16", "--load_bfloat16", "--trainer zo", "--trainer broadcast"):
        assert "bf16" not in values_of("finetune.sh", line).given


def test_variables_that_are_not_read_are_pointed_out() -> None:
    said = ["warning: STEPS is not read by finetune.sh, see bash finetune.sh --help"]
    assert unread_variables("finetune.sh", {"STEPS": "9", "EPOCH": "1", "PATH": "/"}) == said
    assert unread_variables("HiZOO.sh", {"STEPS": "9"}) == []
    (said,) = unread_variables("finetune.sh", {"NUM_GPU": "4"})
    assert "NUM_GPU is not read" in said


# ----------------------------------------------------------------------------------- the scripts


def test_help_lists_every_variable(tmp_path: Path) -> None:
    for name, variables in VARIABLES.items():
        done = run_script(tmp_path, "--help", script=name, python="#!/bin/sh\nexit 1\n")
        assert (done.returncode, done.stderr) == (0, "")
        assert "python run.py --help" in done.stdout
        listed = re.findall(r"^([A-Z][A-Z_]*)  ", done.stdout, re.MULTILINE)
        assert sorted(listed) == sorted(variables)


def told_defaults(lines: list[str], arguments: dict[str, str]) -> dict[tuple[str, str], tuple]:
    """What a script's help says by variable and mode: for a model of one's own, and the bundled."""
    start = next(index for index, line in enumerate(lines) if line.startswith("variable "))
    columns = [lines[start].index(word) for word in ("variable", "default", "bundled", "meaning")]
    told, variable = {}, ""
    for line in lines[start + 1 :]:
        variable, default, bundled = (
            line[first:last].strip() or before
            for first, last, before in zip(columns, columns[1:], (variable, "", ""), strict=False)
        )
        mode = line.rpartition("with MODE=")[2] if "with MODE=" in line else "ft"
        if default and arguments[variable] not in ("", "model_name", "data_dir"):
            told[variable, mode] = (default, bundled or default)
    return told


def test_help_tells_the_defaults(tmp_path: Path) -> None:
    for name in ("HiZOO.sh", "broadcast.sh", "finetune.sh"):
        lines = run_script(tmp_path, "--help", script=name).stdout.splitlines()
        told = told_defaults(lines, VARIABLES[name])
        for mode in ("ft", "prefix", "lora"):
            own, bundled = (values_of(name, MODE=mode, **model) for model in (OWN_MODEL, {}))
            for variable, arguments in VARIABLES[name].items():
                expected = told.get((variable, mode)) or told.get((variable, "ft"))
                for values, text in zip((own, bundled), expected or (), strict=False):
                    found = getattr(values, arguments.split()[0])
                    assert str(found) == text or float(found) == float(text), variable
        assert len({variable for variable, _ in told}) >= 8


def test_python_and_folders(tmp_path: Path) -> None:
    """A copy in a folder with spaces, with the environment that make demo makes."""
    copy = tmp_path / "a copy"
    (copy / ".venv" / "bin").mkdir(parents=True)
    for name in ("HiZOO.sh", "settings.sh"):
        shutil.copy(ROOT / name, copy)
    made = copy / ".venv" / "bin" / "python"
    made.write_text(PRINTER.replace("printf", "echo made; printf"))
    made.chmod(0o755)
    without_torch = "#!/bin/sh\nexit 1\n"
    script = os.path.relpath(copy / "HiZOO.sh", ROOT)
    called = [str(copy / "run.py"), "--script", "HiZOO.sh", "--tag", "my tag"]
    where = {"CDPATH": "/:/tmp"}
    done = run_script(tmp_path, *called[3:], script=script, python=without_torch, **where)
    assert (done.returncode, done.stdout.splitlines()) == (0, ["made", *called]), done.stderr
    done = run_script(tmp_path, *called[3:], script=script, python=PRINTER)
    assert done.stdout.splitlines() == called
    for file in (made, tmp_path / ".commands" / "python3"):
        file.write_text(without_torch)
        file.chmod(0o755)
    done = run_script(tmp_path, script=script, python=without_torch)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no Python with torch") and "make demo" in done.stderr


def test_end_to_end_on_the_bundled_model(tmp_path: Path) -> None:
    folder = tmp_path / "with a space"
    folder.mkdir()
    small = {"STEPS": "4", "EVAL_STEPS": "2", "TRAIN": "16", "DEV": "8", "EVAL": "12", "BS": "4"}
    done = run_script(folder, "--top_k", "9", EPOCH="1", **small)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if "warning" in line] == [
        "warning: EPOCH is not read by HiZOO.sh, see bash HiZOO.sh --help",
        "warning: no effect here: --top_k (the task has options)",
    ]
    lines = done.stdout.splitlines()
    titles = [line.split(":")[0] for line in lines if not line.startswith("probe")]
    assert titles[:6] == [
        *("zero-shot accuracy", "HiZOO, α 1e-5, 2 directions, η auto", "step 2", "step 4"),
        *("checkpoint", "dev accuracy"),
    ]
    result = json.loads((folder / lines[-1].removeprefix("result: ")).read_text())
    assert result["steps"] == 4 and result["task"] == "SST2"
    assert sorted(entry.name for entry in folder.iterdir()) == [".commands", "result"]


def train_a_task(folder: Path, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"STEPS": "2", "EVAL_STEPS": "1", "TRAIN": "4", "DEV": "2", "EVAL": "3", "BS": "2"}
    line = "--max_new_tokens 4" if task == "SQuAD" else ""
    result = finish(folder / task, monkeypatch, "HiZOO.sh", line, TASK=task, LR="1e-4", **small)
    assert result["steps"] == 2 and result["task"] == task


def test_other_tasks_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for task in ("Copa", "SQuAD"):
        train_a_task(tmp_path, task, monkeypatch)


@pytest.mark.slow
def test_every_task_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for task in TASKS:
        train_a_task(tmp_path, task, monkeypatch)


def test_error_broadcast_beats_zero_shot_in_few_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"STEPS": "12", "EVAL_STEPS": "6", "TRAIN": "128", "DEV": "32", "EVAL": "200"}
    result = finish(tmp_path, monkeypatch, "broadcast.sh", "--broadcast_matrices o", **small)
    first = "error broadcast, κ 4, λ 0.1: 1 forward pass a step"
    assert first in capsys.readouterr().out.splitlines()
    assert (result["trainer"], result["steps"], result["forward_passes"]) == ("broadcast", 12, 12)
    assert result["metric_before_training"]["accuracy"] < 0.8 < 0.9 < result["metric"]["accuracy"]
    # The same command is the same experiment: it prints the result that is there.
    assert (
        finish(tmp_path, monkeypatch, "broadcast.sh", "--broadcast_matrices O", **small) == result
    )


def test_icl_from_a_folder_with_spaces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "with a space"
    shutil.copytree(MODEL, folder / "a model")
    variables = {"MODEL": str(folder / "a model"), "DATA_DIR": str(SAMPLES), "EVAL": "6"}
    finish(folder, monkeypatch, "icl.sh", "--num_train 0", **variables)
    accuracy, result = capsys.readouterr().out.splitlines()
    assert accuracy.startswith("zero-shot accuracy: ") and accuracy.endswith("(6 examples)")
    assert result.startswith("result: result/SST2-a model-none-0-shot-")


# ----------------------------------------------------------------------------------- finetune.sh

SMALL = {"TRAIN": "16", "DEV": "4", "EVAL": "6", "EPOCH": "1"}


def test_a_short_training_beats_zero_shot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"TRAIN": "128", "DEV": "32", "EVAL": "200", "EPOCH": "2", "LR": "1e-4"}
    result = finish(tmp_path, monkeypatch, "finetune.sh", **variables)
    assert result["steps"] == 32 and result["trainer"] == "regular"
    assert result["metric_before_training"]["accuracy"] < 0.8
    assert result["metric"]["accuracy"] > 0.95
    assert (tmp_path / result["checkpoint"] / "model.safetensors").is_file()


# The name before transformers 5.23 is passed on, too.
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
def test_accumulation_recomputation_and_mixed_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = {
        "plain": "",
        "accumulated": "--gradient_accumulation_steps 4 --per_device_train_batch_size 2",
        "checkpointed": "--gradient_checkpointing",
        "mixed": "--bf16",
    }
    checkpoints = {}
    for name, line in ways.items():
        folder = tmp_path / name
        line += " --logging_steps 1 --no_eval"
        result = finish(folder, monkeypatch, "finetune.sh", line, LR="1e-4", **SMALL)
        assert result["steps"] == 2
        checkpoints[name] = folder / result["checkpoint"]
    losses = {name: log_of(checkpoint, "loss") for name, checkpoint in checkpoints.items()}
    for name in ("accumulated", "checkpointed"):
        assert losses[name] == pytest.approx(losses["plain"], rel=1e-4)
        for key, tensor in weights(checkpoints["plain"]).items():
            # Adam divides a gradient near 0 by itself: its rounding can move a weight by LR.
            difference = (weights(checkpoints[name])[key] - tensor).abs()
            assert difference.mean() < 2e-6 and difference.max() < 5e-4, (name, key)
    assert all(each.dtype == torch.float32 for each in weights(checkpoints["mixed"]).values())
    assert losses["mixed"] != losses["plain"]
    assert losses["mixed"] == pytest.approx(losses["plain"], rel=0.1)
