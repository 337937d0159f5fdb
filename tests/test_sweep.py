"""A grid of runs: which ones it has, how they are done and taken up again, and the best of them."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from running import MODEL, ROOT, SAMPLES, contents, finish, refused_line, small_model, training

import run
import sweep
from command_line.arguments import check, parse_arguments
from experiment.options import Options, options_of
from experiment.plan import make_plan, passes_of_training
from experiment.preparation import prepare
from sweeps import running, slurm
from sweeps.grid import read_command_line, read_grid
from sweeps.results import Outcome
from sweeps.running import Job, follow, last_words
from sweeps.tables import best, in_words
from utils import InputError

DATA = ["--task_name", "SST2", "--model_name", str(MODEL), "--data_dir", str(SAMPLES)]
GRID = """\
task_name: SST2
model_name: {model}
data_dir: {data}
trainer: zo
num_train: 12
learning_rate: [1e-3, 1e-4]
method:
  - {{hessian_smooth_type: constant0}}
  - {{hessian_smooth_type: constant1e-4, hessian: lowrank}}
seed: [0, 1]
"""


def write_grid(folder: Path, text: str = GRID) -> Path:
    path = folder / "grid.yaml"
    path.write_text(text.format(model=small_model().name, data=SAMPLES))
    return path


def short(**changes: Any) -> list[str]:
    """Arguments of a run of a few steps, without the places of its files."""
    argv = training(
        Path("unused"), **({"max_steps": 2, "save_steps": 1, "logging_steps": 1} | changes)
    )
    for name in ("--output_dir", "--result_file"):
        place = argv.index(name)
        del argv[place : place + 2]
    return argv


class InThisProcess:
    """Does in this process what ``Processes`` starts; fails where a test says so."""

    failing: tuple[str, ...] = ()
    done: list[str]

    def __init__(self, jobs: list[Job], number: int) -> None:
        self.jobs = jobs
        type(self).done = []

    def look(self) -> None:
        for job in self.jobs:
            if job.state == "waiting":
                type(self).done.append(job.name)
                if any(part in job.name for part in self.failing):
                    job.log.write_text("step 1 of 2: loss 1\nerror: no such thing\nSegfault\n")
                    job.end(2)
                else:
                    job.end(run.main(job.words))

    def stop(self) -> None:
        pass


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> type[InThisProcess]:
    monkeypatch.setattr(sweep, "Processes", InThisProcess)
    monkeypatch.setattr(running, "PAUSE", 0)
    monkeypatch.setattr(InThisProcess, "failing", ())
    return InThisProcess


# ------------------------------------------------------------------------------------- the grid


def test_lists_multiply_and_groups_stay_together(tmp_path: Path) -> None:
    grid = read_grid(write_grid(tmp_path), {}, [])
    choices = [run.choice for run in grid.runs()]
    methods = (
        {"hessian_smooth_type": "constant0"},
        {"hessian_smooth_type": "constant1e-4", "hessian": "lowrank"},
    )
    assert choices == [
        {"learning_rate": rate, **method, "seed": seed}
        for rate, method, seed in itertools.product(("1e-3", "1e-4"), methods, ("0", "1"))
    ]
    first = grid.runs()[0]
    assert first.name == "learning_rate=1e-3,hessian_smooth_type=constant0,seed=0"
    arguments = parse_arguments(first.words)
    assert (arguments.learning_rate, arguments.seed, arguments.trainer) == (1e-3, 0, "zo")


def test_the_command_line_alone_and_over_a_file(tmp_path: Path) -> None:
    lists = {"lr_scheduler_type": ["linear", "cosine"], "seed": ["3"]}
    runs = read_grid(None, lists, DATA).runs()
    assert [run.words for run in runs] == [
        ("--lr_scheduler_type", kind, "--seed", "3", *DATA) for kind in ("linear", "cosine")
    ]
    lists = {"learning_rate": ["1e-5"], "kind": ["{lora: True, lora_r: 4}", "{sfc: ~}"]}
    grid = read_grid(write_grid(tmp_path), lists, ["--seed", "7", "--no-eval"])
    assert len(grid.runs()) == 1 * 2 * 2
    words = [run.words for run in grid.runs()]
    assert all(line[-3:] == ("--seed", "7", "--no-eval") for line in words)
    assert all(line.count("--seed") == 1 for line in words)
    assert [("--lora_r" in line, "--sfc" in line) for line in words] == [(1, 0), (0, 0)] * 2
    # The values of an argument may begin with a brace.
    (tmp_path / "films.csv").write_text("review,stars\nFine.,2\nDull.,1\n")
    rows = ["--validation_file", str(tmp_path / "films.csv"), "--label_column", "stars"]
    templates = {"prompt_template": ["{review} It was", "{review}"]}
    runs = read_grid(None, templates, [*rows, "--model_name", str(MODEL)]).runs()
    assert [run.values.given["prompt_template"] for run in runs] == ["{review} It was", "{review}"]


def test_values_are_what_they_say_and_names_are_fit_for_files() -> None:
    lists = {
        "model_name": ["facebook/opt-13b", "other/opt-13b", "a/b c:d"],
        "eval-strategy": ["no"],
    }
    runs = read_grid(None, lists, ["--task_name", "SST2", "--data_dir", str(SAMPLES)]).runs()
    assert [run.choice["eval_strategy"] for run in runs] == ["no"] * 3
    assert runs[2].name == "model_name=b_c_d,eval_strategy=no"
    assert len({run.name for run in runs}) == 3 and all("/" not in run.name for run in runs)


def test_names_with_dashes_are_those_with_underscores() -> None:
    argv = ["--zo-eps", "1e-3", "--dry-run", "--output-dir=a-b", "--slurm", "--cpus-per-task=2"]
    options, grid = read_command_line([*argv, "--", *DATA])
    assert (options.dry_run, options.output_dir) == (True, Path("a-b"))
    assert options.slurm == "--cpus-per-task=2" and [*grid.axes] == ["zo_eps"]


BAD_GRIDS = (
    ("learning_rat: [1, 2]\n", "grid.yaml:1: unknown argument --learning_rat: did you mean"),
    ("m: [{lora: true, lorar: 3}]\n", "grid.yaml:1: in m: unknown argument --lorar"),
    ("seed: []\n", "grid.yaml:1: seed is an empty list: give at least one value"),
    ("seed: 3\n", "the grid has no list"),
    ("seed: [1, 2\nlr: 3", "grid.yaml:2: not YAML"),
    ("- 1\n- 2\n", "grid.yaml: give arguments by name, as in learning_rate"),
    ("seed: [1, 2]\nm: [{seed: 3}, {seed: 4}]\n", "--seed is in the grid twice"),
    ("seed: 1\nm: [{seed: 3}, {seed: 4}]\n", "--seed is in the grid twice"),
    ("seed: [1]\nseed: [2]\n", "grid.yaml:2: seed is given twice"),
    ("num_eval: [1, 2]\nnum_test: [3]\n", "grid.yaml:2: --num_eval is in the grid twice"),
    ("m: [{num_eval: 1, num_test: 2}]\n", "grid.yaml:1: in m: --num_eval is given twice"),
    ("m: [{seed: 1, seed: 2}]\n", "grid.yaml:1: seed is given twice"),
    ("learning_rate: [1e-4, 0.0001]\n", "the grid has the same run twice"),
    ("hessian_smooth_type: [constant1e-4, constant0.0001]\n", "the grid has the same run twice"),
    ("adam_beta1: [0.9, 0.90]\n", "the grid has the same run twice"),
    ("a: &x [1]\nseed: *x\n", "grid.yaml:2: aliases are not read"),
    (f"seed: {'[' * 1200}{']' * 1200}\n", "grid.yaml:1: nested more than 20 times"),
    ("seed: [[1, 2], 3]\n", "grid.yaml:1: seed is a list; give one value"),
    ("tag: [a, b]\n", "--tag in a sweep: every run has files of its own"),
    ("dry_run: [true, false]\n", "--dry_run of the runs of a sweep: they write no result"),
    ("seed: [0, -1]\n", "seed=-1: --seed -1: must be at least 0"),
)
BAD_COMMAND_LINES = (
    (["no.yaml"], "no.yaml: cannot be read"),
    (["pipe"], "pipe: cannot be read (it is no file)"),
    (["a.yaml", "b.yaml"], "b.yaml: a second grid, beside a.yaml"),
    (["--seed", "--", *DATA], "--seed: give the values that the grid has"),
    (["--seed", "1", "2", "--", *DATA, "--seed", "1"], "--seed is in the grid and behind --"),
    (["--seed", "1", "--jobs", "0", "--", *DATA], "--jobs: 0: must be a whole number"),
    (["--seed", "1", "--jobs"], "--jobs: expected one argument"),
    (["--seed", "1", "--seed", "2"], "--seed is given twice"),
    (["--seed", "1", "--", *DATA, "--tag", "a"], "--tag in a sweep"),
    (["--seed", "1", "--", *DATA, "--dry_run"], "--dry_run of the runs of a sweep"),
    (["--mine", "{", "--", *DATA], "--mine: "),
    (["--mine", "{seed: 1, seed: 2}", "--", *DATA], "--mine: seed is given twice; write groups"),
)


def test_bad_grids_and_command_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    failures = []
    for grid, said in BAD_GRIDS:
        (tmp_path / "grid.yaml").write_text(grid)
        line = refused_line(["grid.yaml", "--dry_run", "--", *DATA], capsys, None, sweep.main)
        failures += [] if line.startswith(said) else [(grid, line)]
    for argv, said in BAD_COMMAND_LINES:
        line = refused_line(argv, capsys, None, sweep.main)
        failures += [] if line.startswith(said) else [(argv, line)]
    assert not failures
    assert {path.name for path in tmp_path.iterdir()} == {"pipe", "grid.yaml"}


def test_the_grids_that_come_with_it_are_run_py_s() -> None:
    for path in sorted((ROOT / "runs/grids").glob("*.yaml")):
        runs = read_grid(path, {}, ["--model_name", str(MODEL), "--use_cpu"]).runs()
        assert len(runs) >= 6
        for each in runs:
            check(parse_arguments(each.words))


# ---------------------------------------------------------------------------------------- doing


def test_a_sweep_is_done_once_and_grows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], in_this_process: type[InThisProcess]
) -> None:
    folder = tmp_path / "runs"
    rest = ["--output_dir", str(folder), "--", *short(num_dev=4, no_eval=None, learning_rate=None)]
    argv = ["--learning_rate", "1e-4", "1e-1", "--seed", "0", *rest]
    assert sweep.main(argv) == 0
    names = ["learning_rate=1e-4,seed=0", "learning_rate=1e-1,seed=0"]
    assert in_this_process.done == names
    results = {name: json.loads((folder / f"{name}.json").read_text()) for name in names}
    out = capsys.readouterr().out
    chosen = max(names, key=lambda name: results[name]["dev_metric"]["accuracy"])
    accuracies = [result["dev_metric"]["accuracy"] for result in results.values()]
    if accuracies[0] != accuracies[1]:
        assert f"best on the dev set: learning_rate {chosen.split(',')[0][14:]}" in out
    command = next(line for line in out.splitlines() if line.startswith("  python "))
    assert "--output_dir" not in command and "--seed 0" in command
    # Nothing is left to do; a third seed is.
    assert sweep.main(argv) == 0 and in_this_process.done == []
    assert "2 finished before" in capsys.readouterr().out
    assert sweep.main(["--learning_rate", "1e-4", "1e-1", "--seed", "0", "1", *rest]) == 0
    assert in_this_process.done == [name.replace("seed=0", "seed=1") for name in names]
    assert "and with --seed 1" in capsys.readouterr().out
    # Neither the order nor the spelling makes another grid.
    reordered = ["--seed", "1", "0", "--learning_rate", "0.1", "0.0001", "--dry_run", *rest]
    place = reordered.index("--num_dev")
    moved = [*reordered[:place], *reordered[place + 2 :], *reordered[place : place + 2]]
    assert sweep.main(moved) == 0
    assert "0 of 4 runs are left" in capsys.readouterr().out
    # Another grid is refused, and changes nothing.
    before = contents(folder)
    assert sweep.main(["--learning_rate", "1e-4", "1e-2", "--seed", "0", *rest]) == 2
    assert "holds another grid" in capsys.readouterr().err
    assert contents(folder) == before


def test_failed_runs_are_told_in_a_line_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], in_this_process: type[InThisProcess]
) -> None:
    in_this_process.failing = ("seed=1",)
    argv = ["--seed", "0", "1", "--output_dir", str(tmp_path), "--", *short()]
    assert sweep.main(argv) == 1
    lines = capsys.readouterr().out.splitlines()
    assert f"failed: seed=1: error: no such thing ({tmp_path}/seed=1.log)" in lines
    assert any("no best setting: no setting has finished" in line for line in lines)
    in_this_process.failing = ()
    assert sweep.main(argv) == 0 and in_this_process.done == ["seed=1"]
    assert "no run has a dev set (--num_dev)" in capsys.readouterr().out


def test_results_of_other_data_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], in_this_process: type[InThisProcess]
) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text('prompt,options,answer\nGood?,"[""yes"", ""no""]",yes\n')
    own = ["--validation_file", str(rows), "--model_name", small_model().name]
    argv = ["--max_length", "30", "40", "--output_dir", str(tmp_path / "s"), "--", *own]
    assert sweep.main(argv) == 0
    rows.write_text('prompt,options,answer\nGood?,"[""yes"", ""no""]",no\n')
    capsys.readouterr()
    assert sweep.main(argv) == 2
    assert "a sweep's --output_dir), or --overwrite_output_dir" in capsys.readouterr().err
    assert sweep.main([*argv, "--overwrite_output_dir"]) == 2  # that is another grid
    assert in_this_process.done == ["max_length=30", "max_length=40"]


def test_other_data_have_a_best_setting_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], in_this_process: type[InThisProcess]
) -> None:
    files = [tmp_path / "a" / "rows.csv", tmp_path / "b" / "rows.csv"]
    for file in files:
        file.parent.mkdir()
        file.write_text('prompt,options,answer\nGood?,"[""yes"", ""no""]",yes\n')
    folder = ["--output_dir", str(tmp_path / "s"), "--", "--model_name", small_model().name]
    assert sweep.main(["--validation_file", *map(str, files), *folder]) == 0
    out = capsys.readouterr().out
    assert all(f"rows {file}: no best setting: no run has a dev set" in out for file in files)


STANDS_IN_FOR_RUN = """\
import os, sys, time
print("step 1 of 2", sys.argv[1], os.environ.get("OMP_NUM_THREADS"), flush=True)
time.sleep(60 if sys.argv[1] == "slow" else 0)
if sys.argv[1] != "no result":
    open(sys.argv[2], "w").close()
sys.exit(3 if sys.argv[1] == "bad" else 0)
"""


def job(folder: Path, name: str) -> Job:
    result = folder / f"{name}.json"
    return Job(name, (name, str(result)), folder / f"{name}.log", result)


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A script in the place of run.py."""
    path = tmp_path / "run.py"
    path.write_text(STANDS_IN_FOR_RUN)
    monkeypatch.setattr(running, "SCRIPT", path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return path


def test_processes_run_side_by_side_and_none_is_left(
    tmp_path: Path,
    script: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    jobs = [job(tmp_path, name) for name in ("good", "bad", "slow", "no result", "late")]
    runner = running.Processes(jobs, 2)

    def interrupt(_: float) -> None:
        # The last ones begin when the others have left them room, beside the slow one.
        if jobs[4].state == "finished" and jobs[2].log.stat().st_size:
            assert jobs[2].state == "running"
            raise KeyboardInterrupt
        time.sleep(0.02)

    monkeypatch.setattr(running, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        follow(runner, jobs, lambda job: "well")
    states = ["finished", "failed", "failed", "failed", "finished"]
    assert [job.state for job in jobs] == states
    assert jobs[2].said == "ended by SIGINT" and not runner.running
    lines = capsys.readouterr().out.splitlines()
    assert {"finished: good: well", "failed: bad: step 1 of 2 bad 3", "started: slow"} <= {*lines}
    assert "failed: no result: exit code 0, but no no result.json" in lines
    assert lines[-1] == "interrupted: the runs save their checkpoints"
    assert (tmp_path / "late.log").read_text() == "step 1 of 2 late 3\n"


def test_an_error_in_the_sweep_ends_its_runs(tmp_path: Path, script: Path) -> None:
    jobs = [job(tmp_path, "good"), job(tmp_path, "slow")]
    runner = running.Processes(jobs, 2)
    with pytest.raises(ZeroDivisionError):
        follow(runner, jobs, lambda job: str(1 / 0))
    assert jobs[1].is_over and not runner.running


def test_a_sweep_that_is_killed_takes_its_runs_along(tmp_path: Path, script: Path) -> None:
    program = f"""
import os, pathlib, signal, time
from sweeps import running
running.SCRIPT = pathlib.Path({str(script)!r})
log = pathlib.Path({str(tmp_path / "log")!r})
runner = running.Processes([running.Job("slow", ("slow",), log, log)], 1)
runner.look()
while not (log.exists() and log.stat().st_size):
    time.sleep(0.02)
print(*(process.pid for _, process, _ in runner.running), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == -9, done.stderr
    state = Path(f"/proc/{int(done.stdout)}/stat")
    for _ in range(200):
        # Ended, or ended and not yet waited for.
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.02)
    pytest.fail("the run goes on without its sweep")


def test_every_process_has_its_share_of_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    with pytest.raises(
        InputError, match="--jobs 3: each run has a GPU of its own, and there are 2"
    ):
        running.Processes([], 3)
    assert running.Processes([], 2).free == ["2", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5,6,GPU-7,8")
    for number, free in ((1, ["2,5,6,GPU-7,8"]), (2, ["2,5", "6,GPU-7"]), (3, ["2", "5", "6"])):
        assert running.Processes([], number).free == free
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert running.Processes([], 2).free == [None, None]


def test_last_words(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert last_words(log, 1) == "exit code 1"
    log.write_text("a\nerror: no model\n\n")
    assert last_words(log, 2) == "error: no model"
    log.write_text("Traceback\n  x\nKeyError: 'y'\n")
    assert last_words(log, 1) == "KeyError: 'y'"
    assert last_words(log, -9) == "ended by SIGKILL (out of memory?)"


# ---------------------------------------------------------------------------------- the best one


def outcome(
    accuracy: float | None, loss: float = 0.1, task: str = "CB", **settings: Any
) -> Outcome:
    """A run's result; an accuracy of None: it has none yet."""
    result = {"task": task, "settings": settings}
    if accuracy is not None:
        result["dev_metric"] = {"accuracy": accuracy}
        result["metric"] = {"accuracy": 1 - accuracy}
        result["history"] = {"dev_loss": {"1": 0.1, "2": loss, "3": float("nan")}}
    return Outcome.of(Path("a"), result, is_finished=accuracy is not None)


def test_best_goes_by_the_dev_set_alone() -> None:
    a = [outcome(0.5, 0.3, zo_eps=1, seed=0), outcome(0.7, 0.3, zo_eps=1, seed=1)]
    b = [outcome(0.6, 0.2, zo_eps=2, seed=0), outcome(0.6, 0.2, zo_eps=2, seed=1)]
    c = [outcome(0.9, 0.1, zo_eps=3, seed=0), outcome(None, zo_eps=3, seed=1)]
    # c is not whole; a and b are equal by the metric, and b has the lower dev loss.
    words = "dev accuracy 0.6000, test accuracy 0.4000, dev loss 0.2000, 2 runs"
    assert list(best([*a, *b, *c])) == [("CB", b, words)]
    assert in_words(a).startswith("dev accuracy 0.6000 ± 0.1414, test")
    assert next(best(c))[1:] == ([], "no setting has finished with all of its seeds")
    assert outcome(0.5, 0.3, load_best_model_at_end=True).numbers["dev_loss"] == 0.1
    # Every task has a best of its own.
    runs = [
        outcome(accuracy, task=task, zo_eps=eps)
        for task, eps, accuracy in (
            ("CB", 1, 0.6),
            ("CB", 2, 0.5),
            ("RTE", 1, 0.5),
            ("RTE", 2, 0.7),
        )
    ]
    assert [(task, chosen) for task, chosen, _ in best(runs)] == [
        ("CB", [runs[0]]),
        ("RTE", [runs[3]]),
    ]


# -------------------------------------------------------------------------- what it will take


PLANNED = (
    {},
    {"hessian_smooth_type": "constant0"},
    {"zo_num_samples": 2, "gradient_accumulation_steps": 2},
    {"learning_rate": "auto", "hessian_smooth_type": "constant0", "max_steps": 11},
    {"trainer": "regular"},
    {"trainer": "broadcast", "gradient_accumulation_steps": 2},
    {"max_steps": None, "num_train_epochs": 2, "num_train": 10, "dataloader_drop_last": True},
    {"max_steps": None, "num_train_epochs": 1, "num_dev": 1590},
)


def test_planned_passes_are_those_of_the_run(tmp_path: Path) -> None:
    for number, changes in enumerate(PLANNED):
        argv = training(tmp_path / str(number), **({"save_strategy": "no"} | changes))
        result = finish(argv)
        # num_train is what was drawn, which may be less than was asked for.
        drawn = result["settings"]["num_train"]
        steps, forward, backward = passes_of_training(parse_arguments(argv), drawn)
        assert (result["forward_passes"], result.get("backward_passes", 0)) == (forward, backward)
        assert result["steps"] == steps
        history = result["history"]
        assert history["forward_passes"][str(result["steps"])] == result["forward_passes"]
        assert list(history["seconds"].values()) == sorted(history["seconds"].values())


def test_plan_counts_weights_and_says_so(tmp_path: Path) -> None:
    arguments = parse_arguments(training(tmp_path, lora=True))
    check(arguments)
    plan = make_plan(options_of(arguments), prepare(options_of(arguments)))
    result = finish(training(tmp_path, lora=True))
    assert plan.trained_parameters == result["trained_parameters"]
    assert plan.steps == 6 and plan.forward_passes == result["forward_passes"]
    assert 4 * plan.parameters < plan.memory < 100 * 2**20
    steps, weights = plan.lines()
    assert steps.startswith("6 steps: 19 forward passes")
    assert weights.endswith("for weights and optimizer")
    argv = training(tmp_path / "broadcast", trainer="broadcast", broadcast_matrices="o")
    of_broadcast = options_of(parse_arguments(argv))
    plan = make_plan(of_broadcast, prepare(of_broadcast))
    assert plan.trained_parameters == finish(argv)["trained_parameters"] > 0
    assert (plan.forward_passes, plan.memory) == (6, 4 * plan.parameters)


def test_dry_run_tells_what_differs_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    prepared: list[Options] = []
    monkeypatch.setattr(sweep, "prepare", lambda each: prepared.append(each) or prepare(each))
    assert sweep.main(["--seed", "0", "1", "--dry_run", "--jobs", "2", "--", *short()]) == 0
    every, same, head, *rows, last = capsys.readouterr().out.splitlines()
    assert every.startswith("each run: python ") and "--task_name SST2" in every
    assert same == "each run: 2 steps, 7 forward passes"
    assert [row.split() for row in (head, *rows)] == [["seed"], ["0"], ["1"]]
    assert last == "2 of 2 runs are left"
    assert len(prepared) == 1  # seeds change no number
    (tmp_path / "other.gguf").symlink_to(MODEL)
    lists = ["--model_name", str(MODEL), "other.gguf", "--learning_rate", "1e-6", "1e-2"]
    others = short(model_name=None, learning_rate=None)
    assert sweep.main([*lists, "--dry_run", "--", *others]) == 0
    _, _, *rows, _ = capsys.readouterr().out.splitlines()
    names = [[model, rate] for model in ("tiny-opt", "other") for rate in ("1e-6", "1e-2")]
    assert [row.split() for row in rows] == [["model_name", "learning_rate"], *names]
    (tmp_path / "other.gguf").unlink()
    assert contents(tmp_path) == {}


# ------------------------------------------------------------------------------------------ Slurm


def test_slurm_gets_the_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert slurm.read_options("--gres=gpu:1 --time=2-12:00:00 --exclusive") == {
        "gres": "gpu:1",
        "time": "2-12:00:00",
        "exclusive": True,
    }
    for text in ("gpu:1 --time=1", "--gres=gpu:1", "--time=1 -N2", ""):
        with pytest.raises(InputError, match="write sbatch's options as --name=value"):
            slurm.read_options(text)
    submitit = pytest.importorskip("submitit")
    parameters = {"additional_parameters": slurm.read_options("--time=24:00:00 --exclusive")}
    monkeypatch.setattr(submitit.SlurmExecutor, "affinity", staticmethod(lambda: 1))
    executor = slurm.make_executor(tmp_path, parameters | {"array_parallelism": 2})
    text = executor._make_submission_file_text("command", "1")
    assert "#SBATCH --time=24:00:00\n" in text and "#SBATCH --exclusive\n" in text
    assert "#SBATCH --signal=USR2@120\n" in text


def test_an_array_on_the_local_executor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submitit = pytest.importorskip("submitit")

    def local(folder: Path, parameters: dict[str, Any]) -> Any:
        assert parameters == {"array_parallelism": 2, "additional_parameters": {"time": "10"}}
        executor = submitit.LocalExecutor(folder)
        executor.update_parameters(timeout_min=1)
        return executor

    script = tmp_path / "run.py"
    lines = ("import sys", "print('error: bad')", "open(sys.argv[2], 'w')")
    script.write_text("\n".join([*lines, "sys.exit('1' in sys.argv)"]))
    monkeypatch.setattr(slurm, "SCRIPT", script)
    monkeypatch.setattr(slurm, "make_executor", local)
    # The jobs import the module that runs the script beside it, not the user's of the same name.
    shutil.copytree(ROOT / "sweeps", tmp_path / "sweeps")
    shutil.copy(ROOT / "utils.py", tmp_path)
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "utils.py").write_text("NO_GPU = None")
    monkeypatch.chdir(tmp_path / "user")
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    jobs = [job(tmp_path, name) for name in ("0", "1")]
    array = slurm.JobArray(jobs, "--time=10", tmp_path, 2)
    for _ in range(600):
        array.look()
        if all(job.is_over for job in jobs):
            break
        time.sleep(0.1)
    assert [job.state for job in jobs] == ["finished", "failed"]
    assert (jobs[0].said, jobs[1].said) == ("", "error: bad")
    assert set(json.loads((tmp_path / "slurm.json").read_text())) == {"0", "1"}


FAKE_SLURM = {
    "srun": "exit 1",
    "sbatch": "cat $1 >>{folder}/sent; echo Submitted batch job 8",
    "sacct": "cat {folder}/states",
    "squeue": "cat {folder}/queue",  # fails if there is no such file
}
# What sacct says of an earlier job, whether the queue has it and whether its result is there; is a
# new one sent?
EARLIER = (
    ("RUNNING", True, False, False),
    ("PENDING", True, False, False),
    ("SUSPENDED", True, False, False),
    ("RUNNING", False, True, True),  # sacct is behind
    ("FAILED", False, False, True),
    ("CANCELLED by 0", False, False, True),
    ("DEADLINE", False, False, True),
    ("REVOKED", False, False, True),
    ("PREEMPTED", True, False, False),
    ("PREEMPTED", False, False, True),
    ("UNKNOWN", True, False, False),
    ("UNKNOWN", False, False, True),
    ("UNKNOWN", False, True, True),
)


@pytest.fixture
def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Slurm's commands, which say what this folder's files hold."""
    pytest.importorskip("submitit")
    from submitit.slurm.slurm import SlurmJob

    folder = tmp_path / "slurm commands"
    folder.mkdir()
    for name, text in FAKE_SLURM.items():
        (folder / name).write_text("#!/bin/sh\n" + text.format(folder=f"'{folder}'"))
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    monkeypatch.setattr(slurm, "BETWEEN", -1)
    SlurmJob.watcher.clear()
    monkeypatch.setattr(SlurmJob.watcher, "_registered", set())
    return folder


def say_states(folder: Path, states: dict[str, str], queue: list[str]) -> None:
    """Let sacct and squeue say so; sacct knows no job that is UNKNOWN."""
    from submitit.slurm.slurm import SlurmJob

    lines = [f"{number}|{state}|n" for number, state in states.items() if state != "UNKNOWN"]
    (folder / "states").write_text("\n".join(["JobID|State|NodeList", *lines, ""]))
    (folder / "queue").write_text("\n".join([*queue, ""]))
    SlurmJob.watcher._last_status_check = -1e9


def put_result(folder: Path, number: str, outcome: str, result: object) -> None:
    (folder / "slurm").mkdir(exist_ok=True)
    (folder / "slurm" / f"{number}_0_result.pkl").write_bytes(pickle.dumps((outcome, result)))


def test_earlier_jobs_are_followed_or_sent_again(tmp_path: Path, fake_slurm: Path) -> None:
    numbers = [f"7_{n}" for n in range(len(EARLIER))]
    states = {number: each[0] for number, each in zip(numbers, EARLIER, strict=True)}
    queue = [number for number, each in zip(numbers, EARLIER, strict=True) if each[1]]
    say_states(fake_slurm, states, queue)
    for number, (_, _, has_result, _) in zip(numbers, EARLIER, strict=True):
        if has_result:
            put_result(tmp_path, number, "success", 1)
    (tmp_path / "slurm.json").write_text(json.dumps({number: number for number in numbers}))
    jobs = [job(tmp_path, number) for number in numbers]
    array = slurm.JobArray(jobs, "--time=10", tmp_path, None)
    followed = {number for number in numbers if array.submitted[number].job_id == number}
    assert followed == {n for n, each in zip(numbers, EARLIER, strict=True) if not each[3]}
    sent = len(numbers) - len(followed)
    assert f"--array=0-{sent - 1}%" in (fake_slurm / "sent").read_text()
    new = [f"8_{n}" for n in range(sent)]
    recorded = json.loads((tmp_path / "slurm.json").read_text())
    assert sorted(recorded.values()) == sorted([*followed, *new])


def test_jobs_that_leave_the_queue_are_over(tmp_path: Path, fake_slurm: Path) -> None:
    states = dict(a="UNKNOWN", b="PREEMPTED", c="UNKNOWN", d="UNKNOWN", e="DEADLINE", f="RUNNING")
    names = {f"8_{n}": name for n, name in enumerate(states)}
    say_states(fake_slurm, {}, [*names])
    jobs = {name: job(tmp_path, name) for name in states}
    jobs["d"].log.write_text("error: of an earlier job\n")
    array = slurm.JobArray([*jobs.values()], "--time=10", tmp_path, None)
    array.look()
    assert {job.state for job in jobs.values()} == {"waiting"}
    (fake_slurm / "queue").unlink()  # Slurm does not answer
    array.look()
    assert {job.state for job in jobs.values()} == {"waiting"}
    put_result(tmp_path, "8_2", "success", 0)
    jobs["c"].result.touch()
    put_result(tmp_path, "8_3", "error", "Traceback:\n  x\nImportError: no y\n")
    (tmp_path / "slurm" / "8_4_0_log.err").write_text("z is bad\nsrun: error: n: exit code 1\n")
    for each in array.submitted.values():
        each._results_timeout_s = 0
    say_states(fake_slurm, {number: states[name] for number, name in names.items()}, [])
    array.look()
    left = "has left Slurm's queue without a result"
    assert {name: (job.state, job.said) for name, job in jobs.items()} == {
        "a": ("failed", f"job 8_0 {left}"),
        "b": ("interrupted", f"job 8_1 {left}"),
        "c": ("finished", ""),
        "d": ("failed", "ImportError: no y"),
        "e": ("failed", "z is bad"),
        "f": ("running", ""),
    }


def test_without_slurm_one_line_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    argv = ["--seed", 0, "--output_dir", tmp_path / "s", "--slurm", "--time=1", "--", *short()]
    line = refused_line(argv, capsys, main=sweep.main)
    assert line.startswith("--slurm --time=1: ") and line.endswith("use --jobs")
