"""bash HiZOO.sh: what it passes to run.py, and whole runs on the bundled model."""

from __future__ import annotations

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
    *("HESSIAN_SMOOTH_TYPE", "DATA_DIR", "EPOCH", "NUM_GPU"),
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


# A Python that has torch, knows in which dtype every model was saved, and prints its arguments.
PRINTER = """#!/bin/sh
case "$1 $2" in
    -c*find_spec*) exit 0 ;;
    -c*AutoConfig*) echo "torch.${SAVED_IN:-float16}"; exit 0 ;;
esac
for argument in "$@"; do printf "%s\\n" "$argument"; done
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
        "step 2",
        "step 4",
        "checkpoint",
        "dev accuracy",
        "test accuracy",
        "result",
    ]
    result_file = folder / lines[-1].removeprefix("result: ")
    result = json.loads(result_file.read_text())
    assert result["steps"] == 4 and result["task"] == "SST2"
    assert lines[0] == (
        f"zero-shot accuracy: {result['metric_before_training']['accuracy']:.4f} (12 examples)"
    )
    assert lines[-2] == f"test accuracy: {result['metric']['accuracy']:.4f} (12 examples)"
    checkpoint = folder / lines[3].removeprefix("checkpoint: ")
    assert (checkpoint / "model.safetensors").is_file()
    assert "4/4" in done.stderr and "missing keys" not in done.stderr
    assert sorted(entry.name for entry in folder.iterdir()) == [".commands", "result"]


@pytest.mark.parametrize("task", TASKS)
def test_every_task_trains(
    tmp_path: Path, task: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"STEPS": "2", "EVAL_STEPS": "1", "TRAIN": "4", "DEV": "2", "EVAL": "3", "BS": "2"}
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
        "WARMUP_STEP": ("3", "warmup_step"),
        "DECAY_STEP": ("6", "decay_step"),
        "ZO_LR_SCHEDULER_TYPE": ("cosine", "zo_lr_scheduler_type"),
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


PREFIX_TUNING = ["--prefix_tuning", "--num_prefix", "5", "--no_reparam"]
PREFIX_TUNING += ["--prefix_init_by_real_act"]


@pytest.mark.parametrize(
    ("mode", "flags", "learning_rate", "eps"),
    [
        ("ft", [], "1e-6", "1e-3"),
        ("prefix", PREFIX_TUNING, "1e-2", "1e-1"),
        ("lora", ["--lora"], "1e-4", "1e-2"),
    ],
)
def test_modes(tmp_path: Path, mode: str, flags: list[str], learning_rate: str, eps: str) -> None:
    argv = passed_arguments(tmp_path, MODE=mode, MODEL="a/b")
    others = {"--lora", *PREFIX_TUNING} - {*flags, "5"}
    assert " ".join(flags) in " ".join(argv) and not others & {*argv}
    assert value_of(argv, "learning_rate") == learning_rate and value_of(argv, "zo_eps") == eps
    assert f"-{mode}-" in value_of(argv, "tag")
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
        ("--tag no", True),
    ],
)
def test_best_checkpoint_needs_dev_losses_and_checkpoints(
    tmp_path: Path, line: str, loads_best: bool
) -> None:
    argv = passed_arguments(tmp_path, *line.split())
    assert ("--load_best_model_at_end" in argv) is loads_best


def test_what_the_script_passes_is_not_given_by_the_user(tmp_path: Path) -> None:
    for line in (
        *("--save_strategy no", "--evaluation_strategy no --save_strategy no --no_eval"),
        *("--eval_strategy epoch --save_strategy epoch", "--logging_strategy epoch"),
        "--trainer regular --optim sgd",
    ):
        check(parse_arguments(passed_arguments(tmp_path, *line.split(), MODEL=str(MODEL))))
    for line in ("--save_strategy no --save_steps 5", "--adam_beta1 0.5"):
        with pytest.raises(InputError, match=r"^--save_steps 5: |^--adam_beta1 0.5: "):
            check(parse_arguments(passed_arguments(tmp_path, *line.split(), MODEL=str(MODEL))))
    line = ["--linear_probing", "--num_train", "9"]
    argv = passed_arguments(tmp_path, *line, script=ROOT / "finetune.sh", MODEL=str(MODEL))
    check(parse_arguments(argv))


def add_gpus(folder: Path, number: int, capability: str = "7.5") -> None:
    """Put an nvidia-smi that finds so many GPUs on the path of the scripts run in ``folder``."""
    commands = folder / ".commands"
    commands.mkdir(exist_ok=True)
    listed, asked = (
        "; ".join([f"echo {line}"] * number) or "true" for line in ("GPU 0: a name", capability)
    )
    (commands / "nvidia-smi").write_text(
        f"#!/bin/sh\ncase $1 in -L) {listed} ;; --query-gpu=compute_cap) {asked} ;; esac\n"
    )
    (commands / "nvidia-smi").chmod(0o755)


@pytest.mark.parametrize(
    ("saved", "capability", "expected"),
    [
        ("float16", "7.5", {"--load_float16"}),
        ("float16", "9.0", {"--load_float16"}),
        ("bfloat16", "8.0", {"--load_bfloat16"}),
        ("bfloat16", "10.0", {"--load_bfloat16"}),
        ("bfloat16", "7.5", set()),  # float16 would overflow
        ("float32", "9.0", set()),
    ],
)
def test_half_precision_is_that_of_the_saved_model(
    tmp_path: Path, saved: str, capability: str, expected: set[str]
) -> None:
    add_gpus(tmp_path, 2, capability)
    for script in (None, ROOT / "icl.sh"):
        argv = passed_arguments(
            tmp_path, script=script, CUDA_VISIBLE_DEVICES="0,1", MODEL="a/b", SAVED_IN=saved
        )
        assert {word for word in argv if word.startswith("--load_") and "best" not in word} == (
            expected
        )


def test_float16_only_where_a_gpu_is(tmp_path: Path) -> None:
    add_gpus(tmp_path, 1)
    commands = tmp_path / ".commands"
    assert "--load_float16" in passed_arguments(tmp_path, CUDA_VISIBLE_DEVICES="0")
    argv = passed_arguments(tmp_path, "--load_bfloat16", CUDA_VISIBLE_DEVICES="0")
    assert "--load_float16" not in argv
    # Another argument that begins with --load_ says nothing about the weights.
    line = ["--load_best_model_at_end", "False"]
    assert "--load_float16" in passed_arguments(tmp_path, *line, CUDA_VISIBLE_DEVICES="0")
    assert "--load_float16" not in passed_arguments(tmp_path, CUDA_VISIBLE_DEVICES="")
    (commands / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    assert "--load_float16" not in passed_arguments(tmp_path, CUDA_VISIBLE_DEVICES="0")


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


def test_help_lists_every_variable(tmp_path: Path) -> None:
    for name in ("HiZOO.sh", "icl.sh", "finetune.sh", "finetune_fsdp.sh"):
        done = run_script(tmp_path, "--help", script=ROOT / name, python="#!/bin/sh\nexit 1\n")
        assert (done.returncode, done.stderr) == (0, "")
        source = (ROOT / name.replace("_fsdp", "")).read_text()
        read = re.findall(r"^ *([A-Z_]+)=\$\{\1:-", source, flags=re.MULTILINE)
        assert len(read) > 4
        assert all(re.search(rf"^  {variable} ", done.stdout, re.MULTILINE) for variable in read)
        assert "python run.py --help" in done.stdout


def test_python_of_the_environment_that_make_demo_made(tmp_path: Path) -> None:
    """Where no environment is active, or one without torch."""
    copy = tmp_path / "copy"
    (copy / ".venv" / "bin").mkdir(parents=True)
    for name in ("HiZOO.sh", "settings.sh"):
        shutil.copy(ROOT / name, copy)
    made = copy / ".venv" / "bin" / "python"
    made.write_text(PRINTER.replace("for argument", "echo made; for argument"))
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
    assert (
        done.stderr.startswith("error: no Python with torch found") and "make demo" in done.stderr
    )


@pytest.mark.parametrize(
    ("given", "right"),
    [("LEARNING_RATE", "LR"), ("SEEDS", "SEED"), ("STEP", "STEPS"), ("BATCH_SIZE", "BS")],
)
def test_variables_near_a_known_one_are_pointed_out(tmp_path: Path, given: str, right: str) -> None:
    done = run_script(tmp_path, python=PRINTER, **{given: "1"})
    assert done.returncode == 0
    assert done.stderr == f"warning: {given} is not read, do you mean {right}?\n"
    assert run_script(tmp_path, python=PRINTER, **{right: "1"}).stderr == ""


@pytest.mark.parametrize("model", ["data/tiny-opt", "./data/tiny-opt/", str(MODEL)])
def test_the_bundled_model_by_its_path_is_the_bundled_model(tmp_path: Path, model: str) -> None:
    (tmp_path / "data").symlink_to(ROOT / "data")
    assert passed_arguments(tmp_path, MODEL=model) == passed_arguments(tmp_path)


@pytest.mark.parametrize(
    ("row", "classifies"),
    [
        ({"prompt": "Fine. It was", "options": ["bad", "good"], "answer": 1}, True),
        ({"prompt": "Two and two?", "answer": "four"}, False),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_own_files(tmp_path: Path, suffix: str, row: dict, classifies: bool) -> None:
    file = tmp_path / f"own{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row] * 20), file)
    elif suffix == ".csv":
        file.write_text(",".join(row) + "\n" + 20 * "a,b,c\n")
    else:
        file.write_text(20 * (json.dumps(row) + "\n"))
    own = ["--train_file", str(file), "--validation_file", str(file)]
    python = PRINTER.replace("esac", f'    -c*) exec "{sys.executable}" "$@" ;;\nesac', 1)
    done = run_script(tmp_path, *own, python=python)
    argv = done.stdout.splitlines()[1:]
    assert not {"--task_name", "--data_dir"} & {*argv}
    assert ("--train_as_classification" in argv) is classifies
    assert value_of(argv, "num_dev") == "4" and "--eval_strategy" in argv
    argv = run_script(tmp_path, *own, python=python, DEV="0").stdout.splitlines()
    assert not {"--eval_strategy", "--load_best_model_at_end"} & {*argv}
