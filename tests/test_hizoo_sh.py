"""bash HiZOO.sh: what it passes to run.py, and whole runs on the bundled model."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from running import MODEL, ROOT, SAMPLES

import run
from command_line.arguments import parse_arguments
from command_line.checks import check
from utils import InputError

TASKS = ["SST2", "RTE", "CB", "BoolQ", "WSC", "WIC", "MultiRC", "Copa", "ReCoRD", "SQuAD", "DROP"]
VARIABLES = (
    *("MODEL", "TASK", "MODE", "BS", "LR", "EPS", "SEED", "TRAIN", "DEV", "EVAL", "STEPS"),
    *("EVAL_STEPS", "WARMUP_STEP", "DECAY_STEP", "ZO_LR_SCHEDULER_TYPE", "WEIGHT_DECAY"),
    *("HESSIAN_SMOOTH_TYPE", "DATA_DIR", "EPOCH", "NUM_GPU", "DIRECTIONS"),
)


def run_script(
    folder: Path, *arguments: str, python: str | None = None, script: Path | None = None, **env: str
) -> subprocess.CompletedProcess:
    """Run a script, HiZOO.sh, in ``folder``; ``python`` is one that stands in for Python."""
    commands = folder / ".commands"
    commands.mkdir(exist_ok=True)
    stand_in = commands / "python"
    stand_in.write_text(python or f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    stand_in.chmod(0o755)
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    clean |= {"PATH": f"{commands}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        ["bash", str(script or ROOT / "HiZOO.sh"), *arguments],
        cwd=folder,
        env=clean | env,
        capture_output=True,
        text=True,
        timeout=120,
    )


# What a script asks of Python is answered; what it would run is printed, a word a line.
PRINTER = f"""#!/bin/sh
[ "$1" = -c ] && exec "{sys.executable}" "$@"
printf "%s\\n" "$@"
"""


def passed_to_python(
    folder: Path, *arguments: str, script: Path | None = None, **env: str
) -> list[str]:
    """The arguments that Python would get."""
    done = run_script(folder, *arguments, python=PRINTER, script=script, **env)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def passed_arguments(
    folder: Path, *arguments: str, script: Path | None = None, **env: str
) -> list[str]:
    """What run.py would get."""
    lines = passed_to_python(folder, *arguments, script=script, **env)
    assert lines[0] == str(ROOT / "run.py")
    return lines[1:]


def value_of(argv: list[str], name: str) -> str:
    """The value that wins: the last one."""
    return argv[len(argv) - argv[::-1].index(f"--{name}")]


def test_end_to_end_on_the_bundled_model(tmp_path: Path) -> None:
    folder = tmp_path / "with a space"
    folder.mkdir()
    small = {"STEPS": "4", "EVAL_STEPS": "2", "TRAIN": "16", "DEV": "8", "EVAL": "12", "BS": "4"}
    done = run_script(folder, **small)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "zero-shot accuracy",
        *["probe"] * (3 if lines[3].startswith("probe") else 2),
        "step 2",
        "step 4",
        "checkpoint",
        "dev accuracy",
        "test accuracy",
        *lines[-3:-1],  # the run at a glance
        "result",
    ]
    assert lines[-3].split()[-2:] == ["all", "memory"] and lines[-2].endswith("MiB")
    result_file = folder / lines[-1].removeprefix("result: ")
    result = json.loads(result_file.read_text())
    assert result["steps"] == 4 and result["task"] == "SST2"
    assert lines[0] == (
        f"zero-shot accuracy: {result['metric_before_training']['accuracy']:.4f} (12 examples)"
    )
    assert lines[-4] == f"test accuracy: {result['metric']['accuracy']:.4f} (12 examples)"
    checkpoint = folder / lines[-6].removeprefix("checkpoint: ")
    assert (checkpoint / "model.safetensors").is_file()
    assert done.stderr == ""
    assert sorted(entry.name for entry in folder.iterdir()) == [".commands", "result"]


@pytest.mark.parametrize("task", TASKS)
def test_every_task_trains(
    tmp_path: Path, task: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"STEPS": "2", "EVAL_STEPS": "1", "TRAIN": "4", "DEV": "2", "EVAL": "3", "BS": "2"}
    small["LR"] = "1e-4"  # auto's probe is many times longer than such a run
    metric, further = "accuracy", []
    if task in ("SQuAD", "DROP"):
        metric, further = "f1", ["--max_new_tokens", "4"]
    argv = passed_arguments(tmp_path, *further, TASK=task, **small)
    monkeypatch.chdir(tmp_path)
    assert run.main(argv) == 0
    out = capsys.readouterr().out
    assert f"zero-shot {metric}: " in out and f"test {metric}: " in out


@pytest.mark.parametrize("task", TASKS)
def test_objective_and_dev_examples_of_a_task(tmp_path: Path, task: str) -> None:
    for spelling in (task, task.lower(), task.upper()):
        argv = passed_arguments(tmp_path, TASK=spelling, MODEL="facebook/opt-13b")
        generated_or_choice = task in ("Copa", "ReCoRD", "SQuAD", "DROP")
        assert ("--train_as_classification" in argv) is not generated_or_choice
        assert value_of(argv, "num_dev") == ("100" if task in ("CB", "Copa") else "500")
        assert value_of(argv, "task_name") == spelling


def test_line_of_the_paper(tmp_path: Path) -> None:
    argv = passed_arguments(
        tmp_path,
        MODEL="facebook/opt-13b",
        TASK="CB",
        MODE="ft",
        LR="1e-6",
        EPS="1e-3",
        HESSIAN_SMOOTH_TYPE="constant1e-10",
    )
    expected = {
        "model_name": "facebook/opt-13b",
        "task_name": "CB",
        "trainer": "zo",
        "learning_rate": "1e-6",
        "zo_eps": "1e-3",
        "hessian_smooth_type": "constant1e-10",
        "max_steps": "20000",
        "per_device_train_batch_size": "16",
        "num_train": "1000",
        "num_dev": "100",
        "num_eval": "1000",
        "eval_steps": "2000",
        "seed": "0",
    }
    assert {name: value_of(argv, name) for name in expected} == expected
    assert "--data_dir" not in argv and "--load_float16" not in argv
    assert "--load_best_model_at_end" in argv and "--eval_before_training" not in argv


def test_line_of_the_paper_with_local_model_and_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = tmp_path / "my models" / "an opt", tmp_path / "my data"
    shutil.copytree(MODEL, model)
    shutil.copytree(SAMPLES / "cb", data / "CB")
    argv = passed_arguments(
        tmp_path,
        *("--max_steps", "2", "--eval_steps", "1", "--save_steps", "1", "--num_eval", "4"),
        *("--num_dev", "4", "--num_train", "8", "--per_device_train_batch_size", "2"),
        MODEL=str(model),
        TASK="CB",
        MODE="ft",
        LR="1e-6",
        EPS="1e-3",
        HESSIAN_SMOOTH_TYPE="constant1e-10",
        DATA_DIR=str(data),
    )
    monkeypatch.chdir(tmp_path)
    assert run.main(argv) == 0
    (result_file,) = (tmp_path / "result").glob("CB-an opt-*.json")
    result = json.loads(result_file.read_text())
    assert result["steps"] == 2 and result["settings"]["hessian_smooth_type"] == "constant1e-10"


def test_every_variable_reaches_run_py(tmp_path: Path) -> None:
    values = {
        "TASK": ("RTE", "task_name"),
        "MODEL": ("a/b", "model_name"),
        "BS": ("3", "per_device_train_batch_size"),
        "LR": ("7e-7", "learning_rate"),
        "EPS": ("2e-3", "zo_eps"),
        "SEED": ("5", "seed"),
        "TRAIN": ("11", "num_train"),
        "DEV": ("12", "num_dev"),
        "EVAL": ("13", "num_eval"),
        "STEPS": ("14", "max_steps"),
        "EVAL_STEPS": ("2", "eval_steps"),
        "WARMUP_STEP": ("3", "warmup_steps"),
        "DECAY_STEP": ("6", "decay_step"),
        "ZO_LR_SCHEDULER_TYPE": ("cosine", "lr_scheduler_type"),
        "WEIGHT_DECAY": ("0.1", "weight_decay"),
        "HESSIAN_SMOOTH_TYPE": ("linear1e-6", "hessian_smooth_type"),
        "DATA_DIR": ("some where", "data_dir"),
    }
    env = {name: value for name, (value, _) in values.items()}
    argv = passed_arguments(tmp_path, **env)
    for value, option in values.values():
        assert value_of(argv, option) == value
    assert value_of(argv, "train_set_seed") == "5" and value_of(argv, "save_steps") == "2"


def test_further_arguments_win(tmp_path: Path) -> None:
    argv = passed_arguments(tmp_path, "--learning_rate", "3", "--tag", "my tag", LR="1e-6")
    assert value_of(argv, "learning_rate") == "3" and value_of(argv, "tag") == "my tag"


def test_nothing_set_is_the_bundled_model_and_data(tmp_path: Path) -> None:
    argv = passed_arguments(tmp_path)
    assert value_of(argv, "model_name") == str(MODEL)
    assert value_of(argv, "data_dir") == str(SAMPLES)
    assert value_of(argv, "task_name") == "SST2" and "--eval_before_training" in argv


@pytest.mark.parametrize(
    ("mode", "flags", "learning_rate", "eps"),
    [
        ("ft", [], "1e-6", "1e-3"),
        ("prefix", ["--prefix_tuning"], "1e-2", "1e-1"),
        ("lora", ["--lora"], "1e-4", "1e-2"),
    ],
)
def test_modes(tmp_path: Path, mode: str, flags: list[str], learning_rate: str, eps: str) -> None:
    argv = passed_arguments(tmp_path, MODE=mode, MODEL="a/b")
    assert [word for word in argv if word in ("--lora", "--prefix_tuning")] == flags
    assert value_of(argv, "learning_rate") == learning_rate and value_of(argv, "zo_eps") == eps
    argv = passed_arguments(tmp_path, MODE=mode, LR="3", EPS="4")
    assert value_of(argv, "learning_rate") == "3" and value_of(argv, "zo_eps") == "4"


def test_unknown_mode_is_refused(tmp_path: Path) -> None:
    done = run_script(tmp_path, MODE="nothing")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: MODE=nothing: give ft, prefix or lora\n"
    assert [entry.name for entry in tmp_path.iterdir()] == [".commands"]


def test_line_without_dev_loss_and_checkpoints(tmp_path: Path) -> None:
    line = "--non_diff --evaluation_strategy no --save_strategy no --save_model"
    env = {"TASK": "SQuAD", "MODE": "prefix", "LR": "1e-2", "EPS": "1e-1"}
    argv = passed_arguments(tmp_path, *line.split(), HESSIAN_SMOOTH_TYPE="constant1e-4", **env)
    assert argv[-len(line.split()) :] == line.split()
    assert not {"--load_best_model_at_end", "--train_as_classification"} & {*argv}
    # SST2 trains as classification, but not with another objective.
    argv = passed_arguments(tmp_path, "--non_diff")
    assert "--train_as_classification" not in argv and "--load_best_model_at_end" in argv


@pytest.mark.parametrize(
    ("line", "loads_best"),
    [
        ("--eval_strategy no", False),
        ("--eval_strategy=no", False),
        ("--evaluation_strategy no", False),
        ("--save_strategy no", False),
        ("--eval_strategy no --evaluation_strategy steps", True),
        ("--eval_strategy epoch --save_strategy epoch", True),
        ("--eval_strategy epoch", True),
        ("--save_strategy best", True),
        ("--save_strategy epoch", False),
        ("--num_dev 0", False),
        ("--tag no", True),
    ],
)
def test_best_checkpoint_needs_dev_losses_and_checkpoints(
    tmp_path: Path, line: str, loads_best: bool
) -> None:
    argv = passed_arguments(tmp_path, *line.split())
    assert ("--load_best_model_at_end" in argv) is loads_best
    check(parse_arguments(argv))


def test_what_the_script_passes_is_not_given_by_the_user(tmp_path: Path) -> None:
    for line in (
        *("--save_strategy no", "--evaluation_strategy no --save_strategy no --no_eval"),
        *("--eval_strategy epoch --save_strategy epoch", "--logging_strategy epoch"),
        *(
            "--trainer regular --optim sgd --learning_rate 1e-3",
            "--eval-steps 30",
            "--num_train_sets 2",
        ),
        *("--num_train_epochs 2", "--only_train_option False", "--no_eval", "--task_name SQuAD"),
    ):
        check(parse_arguments(passed_arguments(tmp_path, *line.split(), MODEL=str(MODEL))))
    for line in ("--save_strategy no --save_steps 5", "--adam_beta1 0.5"):
        with pytest.raises(InputError, match=r"^--save_steps 5: |^--adam_beta1 0.5: "):
            check(parse_arguments(passed_arguments(tmp_path, *line.split(), MODEL=str(MODEL))))
    for line in ("--linear_probing --num_train 9", "--eval_strategy steps --eval_steps 7"):
        argv = passed_arguments(tmp_path, *line.split(), script=ROOT / "finetune.sh")
        check(parse_arguments(argv))


def test_half_precision_is_that_of_the_saved_model(tmp_path: Path) -> None:
    for script in (None, ROOT / "icl.sh"):
        assert "--load_saved_dtype" in passed_arguments(tmp_path, script=script)
        for line in ("--load_float16", "--load_bfloat16", "--load-int8", "--load_int4=True"):
            argv = passed_arguments(tmp_path, line, script=script)
            assert "--load_saved_dtype" not in argv
    # Another argument that begins with --load_ says nothing about the weights.
    line = ["--load_best_model_at_end", "False"]
    assert "--load_saved_dtype" in passed_arguments(tmp_path, *line)


def test_repository_in_a_folder_with_spaces(tmp_path: Path) -> None:
    repository = tmp_path / "a copy of it"
    repository.mkdir()
    for name in ("HiZOO.sh", "settings.sh"):
        shutil.copy(ROOT / name, repository)
    done = run_script(tmp_path, python=PRINTER, script=repository / "HiZOO.sh")
    lines = done.stdout.splitlines()
    assert lines[0] == str(repository / "run.py")
    assert value_of(lines, "model_name") == str(repository / "data" / "tiny-opt")


# ------------------------------------------------------------------------- what a newcomer types


SCRIPTS = ("HiZOO.sh", "icl.sh", "finetune.sh", "finetune_fsdp.sh")


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_lists_every_variable(tmp_path: Path, name: str) -> None:
    done = run_script(tmp_path, "--help", script=ROOT / name, python="#!/bin/sh\nexit 1\n")
    assert (done.returncode, done.stderr) == (0, "")
    source = (ROOT / name.replace("_fsdp", "")).read_text()
    read = {*re.findall(r"\$\{([A-Z_]+):-", source)} & {*VARIABLES}
    shared = {"MODEL", "TASK", "DATA_DIR"} | ({"DEV"} if name != "icl.sh" else set())
    listed = re.findall(r"^([A-Z][A-Z_]*)  ", done.stdout, re.MULTILINE)
    assert sorted(read | shared) == sorted(listed)
    assert "python run.py --help" in done.stdout


@pytest.mark.parametrize("name", ["HiZOO.sh", "finetune.sh"])
def test_help_tells_the_defaults(tmp_path: Path, name: str) -> None:
    """Of every mode, with a model of one's own and with the bundled one."""
    options = {
        **{"TASK": "task_name", "BS": "per_device_train_batch_size", "LR": "learning_rate"},
        **{"EPS": "zo_eps", "HESSIAN_SMOOTH_TYPE": "hessian_smooth_type", "STEPS": "max_steps"},
        **{"EVAL_STEPS": "eval_steps", "SEED": "seed", "TRAIN": "num_train", "DEV": "num_dev"},
        **{"EVAL": "num_eval", "WARMUP_STEP": "warmup_steps", "DECAY_STEP": "decay_step"},
        **{"ZO_LR_SCHEDULER_TYPE": "lr_scheduler_type", "WEIGHT_DECAY": "weight_decay"},
        **{"EPOCH": "num_train_epochs", "DIRECTIONS": "zo_num_samples"},
    }
    lines = run_script(tmp_path, "--help", script=ROOT / name).stdout.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("variable "))
    columns = [lines[start].index(word) for word in ("variable", "default", "bundled", "meaning")]
    told, variable = {}, ""
    for line in lines[start + 1 :]:
        variable, default, bundled = (
            line[first:last].strip() or before
            for first, last, before in zip(columns, columns[1:], (variable, "", ""), strict=False)
        )
        mode = line.rpartition("with MODE=")[2] if "with MODE=" in line else "ft"
        if default and variable in options:
            told[variable, mode] = (default, bundled or default)
    for mode in ("ft", "prefix", "lora"):
        own, bundled = (
            passed_arguments(tmp_path, script=ROOT / name, MODE=mode, **model)
            for model in ({"MODEL": "a/b"}, {})
        )
        for variable, option in options.items():
            expected = told.get((variable, mode)) or told.get((variable, "ft"))
            if expected:
                assert (value_of(own, option), value_of(bundled, option)) == expected, variable
    assert len({variable for variable, _ in told}) >= 8


def test_python_of_the_environment_that_make_demo_made(tmp_path: Path) -> None:
    """Where no environment is active, or one without torch."""
    copy = tmp_path / "copy"
    (copy / ".venv" / "bin").mkdir(parents=True)
    for name in ("HiZOO.sh", "settings.sh"):
        shutil.copy(ROOT / name, copy)
    made = copy / ".venv" / "bin" / "python"
    made.write_text(PRINTER.replace("printf", "echo made; printf"))
    made.chmod(0o755)
    without_torch = "#!/bin/sh\nexit 1\n"
    done = run_script(tmp_path, script=copy / "HiZOO.sh", python=without_torch)
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "made"), done.stderr
    assert "made" not in run_script(tmp_path, script=copy / "HiZOO.sh", python=PRINTER).stdout
    made.write_text(without_torch)
    (tmp_path / ".commands" / "python3").write_text(without_torch)
    (tmp_path / ".commands" / "python3").chmod(0o755)
    done = run_script(tmp_path, script=copy / "HiZOO.sh", python=without_torch)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no Python with torch") and "make demo" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "right"),
    [
        *(("LEARNING_RATE", "LR"), ("SEEDS", "SEED"), ("STEP", "STEPS"), ("BATCH_SIZE", "BS")),
        *(("MODLE", "MODEL"), ("HESSIAN_SMOTH_TYPE", "HESSIAN_SMOOTH_TYPE"), ("lr", "LR")),
    ],
)
def test_variables_near_a_known_one_are_pointed_out(tmp_path: Path, given: str, right: str) -> None:
    done = run_script(tmp_path, python=PRINTER, **{given: "1"})
    assert done.returncode == 0
    assert done.stderr == f"warning: {given} is not read, do you mean {right}?\n"
    assert run_script(tmp_path, python=PRINTER, **{right: "1"}).stderr == ""


def test_variables_of_another_script_are_pointed_out(tmp_path: Path) -> None:
    done = run_script(tmp_path, python=PRINTER, script=ROOT / "finetune.sh", STEPS="9")
    expected = "warning: STEPS is not read by finetune.sh, see bash finetune.sh --help\n"
    assert (done.returncode, done.stderr) == (0, expected)


def test_processes_share_the_batch_or_the_weights(tmp_path: Path) -> None:
    for more, examples in (([], "3"), (["--tensor_parallel"], "6")):
        argv = passed_arguments(tmp_path, *more, WORLD_SIZE="2", BS="6")
        assert value_of(argv, "per_device_train_batch_size") == examples


def test_variables_of_a_cluster_are_not_pointed_out(tmp_path: Path) -> None:
    names = "NODE NODES NUM_CPU MODULEPATH DEVICE TMP LD_LIBRARY_PATH SLURM_NTASKS SLURM_STEP_ID"
    names += " WORLD_SIZE RANK MASTER_PORT TERM MAIL DATASETS BASE PS1 no_proxy TASK_ID TRAINER"
    done = run_script(tmp_path, python=PRINTER, **dict.fromkeys(names.split(), "1"))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("model", ["data/tiny-opt", "./data/tiny-opt/", str(MODEL)])
def test_the_bundled_model_by_its_path_is_the_bundled_model(tmp_path: Path, model: str) -> None:
    (tmp_path / "data").symlink_to(ROOT / "data")
    expected = passed_arguments(tmp_path)
    assert passed_arguments(tmp_path, MODEL=model) == expected
    argv = passed_arguments(tmp_path, "--model_name", model)
    assert argv == [*expected, "--model_name", model]


@pytest.mark.parametrize(
    ("row", "classifies"),
    [
        ({"prompt": "Fine. It was", "options": ["bad", "good"], "answer": 1}, True),
        ({"prompt": 'These are two "options": which?', "answer": "four"}, False),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_own_files(tmp_path: Path, suffix: str, row: dict, classifies: bool) -> None:
    file = tmp_path / f"my own{suffix}"
    rows = [{**row, "prompt": f"{number}. {row['prompt']}"} for number in range(20)]
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif suffix == ".csv":
        with file.open("w", newline="") as lines:
            table = csv.DictWriter(lines, row)
            table.writeheader()
            options = json.dumps(row.get("options"))
            table.writerows({**row, "options": options} if classifies else row for row in rows)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = [f"--train_file={file}", "--validation_file", str(file)]
    argv = passed_arguments(tmp_path, *own)
    assert not {"--task_name", "--data_dir"} & {*argv}
    assert ("--train_as_classification" in argv) is classifies
    assert (value_of(argv, "num_train"), value_of(argv, "num_dev")) == ("16", "4")
    assert value_of(argv, "eval_strategy") == "steps"
    check(parse_arguments(argv))
    argv = passed_arguments(tmp_path, *own, DEV="0")
    assert value_of(argv, "eval_strategy") == "no" and "--load_best_model_at_end" not in argv
    check(parse_arguments(argv))


def test_own_files_for_demonstrations(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text(json.dumps({"prompt": "Two and two?", "answer": "four"}) + "\n")
    icl = ROOT / "icl.sh"
    argv = passed_arguments(tmp_path, "--validation_file", str(file), script=icl)
    assert value_of(argv, "num_train") == "0"
    check(parse_arguments(argv))
    both = ["--validation_file", str(file), "--train_file", str(file)]
    assert value_of(passed_arguments(tmp_path, *both, script=icl), "num_train") == "32"


@pytest.mark.parametrize(
    ("script", "line", "env", "message"),
    [
        ("HiZOO.sh", "--train_file a.csv", {"TASK": "CB"}, "TASK=CB and --train_file"),
        ("HiZOO.sh", "--train_file a.csv", {"DATA_DIR": "b"}, "DATA_DIR=b and --train_file"),
        ("HiZOO.sh", "--trainer none", {}, "--trainer none: HiZOO.sh trains"),
        ("icl.sh", "--trainer=zo", {}, "--trainer zo: icl.sh trains nothing"),
        ("finetune.sh", "--fsdp", {"MODE": "prefix"}, "MODE=prefix: a prefix needs the whole"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tmp_path: Path, script: str, line: str, env: dict[str, str], message: str
) -> None:
    done = run_script(tmp_path, *line.split(), script=ROOT / script, python=PRINTER, **env)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1


def test_waiting_threads_give_up_their_core(tmp_path: Path) -> None:
    printer = "#!/bin/sh\n[ $1 = -c ] || echo $OMP_WAIT_POLICY\n"
    for script in SCRIPTS:
        done = run_script(tmp_path, script=ROOT / script, python=printer, NUM_GPU="1")
        assert done.stdout == "passive\n"
    assert run_script(tmp_path, python=printer, OMP_WAIT_POLICY="active").stdout == "active\n"
