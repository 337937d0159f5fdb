"""Training through run.py: resuming, accumulation, schedules, dev loss, both trainers."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from running import (
    MODEL,
    SAMPLES,
    assert_replays,
    assert_same_checkpoint,
    assert_same_tensors,
    contents,
    finish,
    let_every_dev_loss_be_worse,
    log_of,
    small_model,
    start,
    training,
    weights,
)
from transformers import AutoModelForCausalLM, get_scheduler

import run
from trainer import ZerothOrderTrainer
from training.checkpoints import MANIFEST
from training.journal import JOURNAL, Step, read_journal

RESUMED = {
    "hizoo": {"num_dev": 8, "eval_strategy": "steps", "eval_steps": 3},
    "mezo": {"hessian_smooth_type": "constant0", "max_steps": None, "num_train_epochs": 2},
    "accumulation_over_ends_of_epochs": {
        **{"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        **{"num_train": 9, "max_steps": 8},
    },
    "schedules": {
        "lr_scheduler_type": "linear",
        "warmup_step": 2,
        "decay_step": 4,
        "weight_decay": 0.1,
    },
    "language_model_loss": {"train_as_classification": None},
    "regular": {"trainer": "regular", "hessian_smooth_type": None},
}


@pytest.mark.parametrize("arguments", RESUMED.values(), ids=RESUMED)
def test_resumed_run_equals_uninterrupted_one(
    tmp_path: Path, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    finish(training(whole, **arguments))
    shutil.copytree(whole / "out" / "checkpoint-3", parted / "out" / "checkpoint-3")
    torch.manual_seed(12345)  # whatever state the process is in
    result = finish(training(parted, **arguments))
    assert result["resumed_from"] == str(parted / "out" / "checkpoint-3")
    last = f"checkpoint-{result['steps']}"
    assert int(last.split("-")[1]) >= 6
    if arguments.get("trainer") == "regular":
        assert_same_tensors(weights(whole / "out" / last), weights(parted / "out" / last))
    else:
        assert_same_checkpoint(whole / "out" / last, parted / "out" / last)
        assert_replays(whole, tmp_path / "replayed", last, monkeypatch, **arguments)


def test_training_changes_the_weights_from_step_to_step(tmp_path: Path) -> None:
    """What the comparisons above compare is no constant."""
    finish(training(tmp_path))
    first, second = weights(tmp_path / "out/checkpoint-3"), weights(tmp_path / "out/checkpoint-6")
    assert any(not torch.equal(first[name], second[name]) for name in first)
    losses = log_of(tmp_path / "out/checkpoint-6", "loss")
    assert len(losses) == len(set(losses)) == 6
    state = torch.load(tmp_path / "out/checkpoint-6/optimizer.pt", weights_only=True)
    tensors = [tensor for h in state["state"].values() for tensor in h.values()]
    assert any(tensor.std() > 1e-4 for tensor in tensors if tensor.numel() > 1)


# The bundled model: a smaller one would be through before the signal comes.
LONG = {"model_name": MODEL, "max_steps": 30, "save_steps": 6}


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    finish(training(folder, **LONG))
    return folder / "out/checkpoint-30"


def send(number: int, process: int, folder: Path) -> None:
    """Send a process a signal when it has written a checkpoint of its sixth step."""
    deadline = time.monotonic() + 120
    while not (folder / "out/checkpoint-6" / MANIFEST).is_file():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process, number)


def assert_goes_on(argv: list[str], folder: Path, long_run: Path) -> None:
    assert not (folder / "result.json").exists()
    result = finish(argv)
    step = int(result["resumed_from"].split("-")[-1])
    assert 6 <= step < 30
    assert_same_checkpoint(long_run, folder / "out/checkpoint-30")


@pytest.mark.xdist_group("long run")
def test_killed_process_goes_on(tmp_path: Path, long_run: Path) -> None:
    argv = training(tmp_path, save_on_interrupt=True, **LONG)
    process = start(argv, tmp_path)
    send(signal.SIGKILL, process.pid, tmp_path)
    process.communicate(timeout=60)
    assert_goes_on(argv, tmp_path, long_run)


@pytest.mark.xdist_group("long run")
def test_interrupted_run_goes_on(
    tmp_path: Path, long_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At any time: from another thread."""
    argv = training(tmp_path, save_on_interrupt=True, **LONG)
    thread = threading.Thread(target=send, args=(signal.SIGTERM, os.getpid(), tmp_path))
    # A run that were through before would leave the signal to the process of the tests.
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    thread.start()
    code = run.main(argv)
    thread.join()
    signal.signal(signal.SIGTERM, before)
    errors = capsys.readouterr().err
    assert code == 130
    assert errors.splitlines()[-1].startswith("interrupted: SIGTERM: stopped after step ")
    assert_goes_on(argv, tmp_path, long_run)


@pytest.mark.parametrize(("save_strategy", "last"), [("steps", 5), ("best", 4)])
def test_interrupt_keeps_its_checkpoint_beside_the_best(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    save_strategy: str,
    last: int,
) -> None:
    """At a step without a dev loss, and at one whose dev loss is not the best."""
    arguments = {
        "save_strategy": save_strategy,
        "metric_for_best_model": "loss",
        "max_steps": 8,
        "num_dev": 8,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "save_total_limit": 1,
        "load_best_model_at_end": True,
        "save_on_interrupt": True,
    }
    let_every_dev_loss_be_worse(monkeypatch)
    step = ZerothOrderTrainer.training_step

    def step_with_signal(self: ZerothOrderTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == last - 1:
            signal.raise_signal(signal.SIGUSR1)
        return step(self, *args, **kwargs)

    before = signal.getsignal(signal.SIGUSR1)
    with monkeypatch.context() as patched:
        patched.setattr(ZerothOrderTrainer, "training_step", step_with_signal)
        assert run.main(training(tmp_path, **arguments)) == 130
    assert signal.getsignal(signal.SIGUSR1) is before
    assert f"SIGUSR1: stopped after step {last}" in capsys.readouterr().err
    kept = tmp_path / f"out/checkpoint-{last}"
    assert (kept / "trainer_state.json").is_file()
    assert len(log_of(kept, "loss")) == last  # the interrupted step is logged
    result = finish(training(tmp_path, **arguments))
    assert result["resumed_from"].endswith(f"checkpoint-{last}")


EPOCHS = {"max_steps": None, "num_train_epochs": 4 / 3}
WITHIN_AN_EPOCH: dict[str, dict[str, Any]] = {
    "steps": {"max_steps": 4},
    "epochs": EPOCHS,
    "smaller batches": {"trainer": "regular", "auto_find_batch_size": True} | EPOCHS,
}


def test_finished_run_reports_again_without_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {
        "num_dev": 8,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_total_limit": 1,
        "load_best_model_at_end": True,
        "no_eval": None,
    }
    let_every_dev_loss_be_worse(monkeypatch)
    first = finish(training(tmp_path, **arguments))
    assert first["checkpoint"].endswith("checkpoint-3")
    written = contents(tmp_path / "out")
    (tmp_path / "result.json").unlink()
    second = finish(training(tmp_path, **arguments))
    assert second["resumed_from"].endswith("checkpoint-6")
    assert contents(tmp_path / "out") == written
    for name in ("metric", "dev_metric", "steps", "checkpoint"):
        assert second[name] == first[name], name
    # Nor does one that ended within an epoch take a further step.
    for name, length in WITHIN_AN_EPOCH.items():
        within = tmp_path / name
        finish(training(within, **length))
        written = contents(within / "out")
        (within / "result.json").unlink()
        assert finish(training(within, **length))["steps"] == 4
        assert contents(within / "out") == written


def test_overwrite_output_dir_starts_anew(tmp_path: Path) -> None:
    finish(training(tmp_path, max_steps=3))
    (tmp_path / "out/notes.txt").write_text("mine")
    (tmp_path / "out/checkpoint-99").mkdir()
    result = finish(training(tmp_path, max_steps=3, learning_rate=2e-4, overwrite_output_dir=True))
    assert result["resumed_from"] is None and result["steps"] == 3
    assert not (tmp_path / "out/checkpoint-99").exists()
    assert (tmp_path / "out/notes.txt").read_text() == "mine"


def test_resume_from_checkpoint_argument(tmp_path: Path) -> None:
    finish(training(tmp_path))
    named = tmp_path / "out/checkpoint-3"
    assert finish(training(tmp_path, resume_from_checkpoint=named))["resumed_from"] == str(named)
    assert finish(training(tmp_path, resume_from_checkpoint="False"))["resumed_from"] is None
    assert finish(training(tmp_path, resume_from_checkpoint="true"))["resumed_from"]


def test_more_steps_go_on_from_a_finished_run(tmp_path: Path) -> None:
    finish(training(tmp_path / "short", max_steps=3))
    finish(training(tmp_path / "long"))
    finish(training(tmp_path / "short", max_steps=6))
    assert_same_checkpoint(tmp_path / "long/out/checkpoint-6", tmp_path / "short/out/checkpoint-6")


def test_new_intervals_hold_after_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Fractions of the run are those of its new length; transformers warns of nothing."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    dev = {"num_dev": 4, "eval_strategy": "steps"}
    finish(training(tmp_path, max_steps=3, save_steps=0.99, eval_steps=0.99, **dev))
    (tmp_path / "result.json").unlink()
    changed = {"save_steps": 0.7, "eval_steps": 1, "logging_steps": 2}
    finish(training(tmp_path, max_steps=6, **changed, **dev))
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == [
        *("checkpoint-3", "checkpoint-5", "checkpoint-6")
    ]
    last = tmp_path / "out/checkpoint-6"
    assert len(log_of(last, "eval_loss")) == 4 and len(log_of(last, "loss")) == 3 + 2
    assert not [line for line in caplog.messages if "trainer_state.json" in line]


# ---------------------------------------------------------------------------------- the step


ACCUMULATED = {
    "hizoo": {},
    # Answers of SQuAD are of different lengths: batches count by their tokens.
    "language_model": {"task": "SQuAD", "train_as_classification": None},
    "regular": {
        **{"task": "SQuAD", "trainer": "regular", "train_as_classification": None},
        **{"hessian_smooth_type": None, "optim": "sgd"},
    },
}


def test_accumulation_of_2_x_4_equals_a_batch_of_8(tmp_path: Path) -> None:
    # The losses of the small model are larger, and so is their rounding.
    shared = {"model_name": MODEL, "num_train": 16, "max_steps": 2, "save_steps": 1}
    for name, arguments in ACCUMULATED.items():
        runs = tmp_path / name / "one", tmp_path / name / "two"
        finish(training(runs[0], per_device_train_batch_size=8, **shared | arguments))
        finish(training(runs[1], gradient_accumulation_steps=2, **shared | arguments))
        assert_same_steps(*runs)


def assert_same_steps(*runs: Path) -> None:
    """Two steps of two runs are the same, up to the rounding of losses."""
    for step in (1, 2):
        one, two = (folder / f"out/checkpoint-{step}" for folder in runs)
        # Losses are means over tokens, whose rounding grows with their size.
        assert log_of(one, "loss") == pytest.approx(log_of(two, "loss"), rel=2e-6, abs=2e-6)
        # A gradient is a difference of losses over 2 μ: their rounding grows by 1 / 2e-3.
        gradients = log_of(one, "projected_gradient"), log_of(two, "projected_gradient")
        assert gradients[0] == pytest.approx(gradients[1], abs=2e-3)
        for name, tensor in weights(one).items():
            torch.testing.assert_close(tensor, weights(two)[name], atol=3e-6, rtol=0)


def test_learning_rate_of_0_returns_every_weight(tmp_path: Path) -> None:
    finish(training(tmp_path, learning_rate=0, hessian_smooth_type="constant0"))
    pretrained = AutoModelForCausalLM.from_pretrained(small_model().name)
    start_weights = dict(pretrained.state_dict())
    for name, tensor in weights(tmp_path / "out/checkpoint-6").items():
        torch.testing.assert_close(tensor, start_weights[name], atol=1e-6, rtol=0)


SCHEDULES = {
    "alias": ({"zo_lr_scheduler_type": "linear", "warmup_step": 2}, "linear", 2, {}),
    "decay_step": (
        {"lr_scheduler_type": "linear", "warmup_step": 2, "decay_step": 5},
        "warmup_stable_decay",
        2,
        {"num_decay_steps": 3, "decay_type": "linear"},
    ),
    "fraction": (
        {"lr_scheduler_type": "linear", "decay_step": 0.625},
        "warmup_stable_decay",
        0,
        {"num_decay_steps": 3, "decay_type": "linear"},
    ),
}


def test_logged_learning_rates_are_those_of_transformers(tmp_path: Path) -> None:
    for kind, (arguments, name, warmup, options) in SCHEDULES.items():
        folder = tmp_path / kind
        finish(training(folder, max_steps=8, save_steps=8, **arguments))
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-4)
        schedule = get_scheduler(name, optimizer, warmup, 8, scheduler_specific_kwargs=options)
        expected = []
        for _ in range(8):
            expected.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        logged = log_of(folder / "out/checkpoint-8", "learning_rate")
        assert logged == pytest.approx(expected) or logged == pytest.approx(
            [*expected[1:], schedule.get_last_lr()[0]]
        ), kind


# ----------------------------------------------------------------------- dev loss and best model


def test_best_model_is_loaded_reported_and_saved(tmp_path: Path) -> None:
    result = finish(
        training(
            tmp_path,
            num_dev=8,
            eval_strategy="steps",
            eval_steps=2,
            save_steps=2,
            save_total_limit=2,
            load_best_model_at_end=True,
            learning_rate=0.01,
            save_model=True,
            no_eval=None,
            predictions_file=tmp_path / "predictions.jsonl",
        )
    )
    losses = log_of(tmp_path / "out/checkpoint-6", "eval_loss")
    assert len(losses) == 3
    best = 2 * (1 + losses.index(min(losses)))
    assert result["checkpoint"].endswith(f"checkpoint-{best}")
    assert_same_tensors(weights(tmp_path / "out"), weights(Path(result["checkpoint"])))
    assert len(list((tmp_path / "out").glob("checkpoint-*"))) <= 2
    again = [
        *("--task_name", "SST2", "--model_name", str(tmp_path / "out"), "--train_set_seed", "0"),
        *("--data_dir", str(SAMPLES), "--num_eval", "6"),
        *("--result_file", str(tmp_path / "again.json")),
        *("--predictions_file", str(tmp_path / "again.jsonl")),
    ]
    assert finish(again)["metric"] == result["metric"]
    rows = [
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("predictions.jsonl", "again.jsonl")
    ]
    for trained, loaded in zip(*rows, strict=True):
        assert trained["scores"] == pytest.approx(loaded["scores"], abs=1e-5)
        assert (trained["id"], trained["prediction"]) == (loaded["id"], loaded["prediction"])


def test_no_warnings_and_no_bars_of_files(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    finish(
        training(
            tmp_path,
            num_dev=4,
            eval_strategy="steps",
            eval_steps=3,
            load_best_model_at_end=True,
            no_eval=None,
            disable_tqdm="False",
        )
    )
    out, err = capfd.readouterr()
    for noise in ("missing keys", "model shards", "Loading weights", "Warning"):
        assert noise not in out + err
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    # The table at the end begins with spaces.
    lines = [line for line in out.splitlines() if ":" in line]
    assert [line.split(":")[0] for line in lines] == [
        "HiZOO, α 0.01",
        "step 3",
        "step 6",
        "checkpoint",
        "dev accuracy",
        "test accuracy",
        "result",
    ]
    assert "6/6" in err and "loss=" in err


# ------------------------------------------------------------------------------- what is shown


def test_lines_of_the_log_without_a_bar(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """With what the method has: MeZO measures no c, and its h is 1."""
    number, left = r"-?[\d.e+-]+", r"00:\d\d left"
    mezo = {"hessian_smooth_type": "constant0"}
    for arguments, name, value, shown in (
        ({}, "loss", r"\d\.\d{4}", "gchη"),
        ({"non_diff": True, "train_as_classification": None}, "accuracy", r"[01]\.\d{4}", "gchη"),
        (mezo, "loss", r"\d\.\d{4}", "gη"),
        (mezo | {"learning_rate": "auto"}, "loss", r"\d\.\d{4}", "gcη"),
    ):
        folder = tmp_path / f"{name}{shown}"
        dev = {"num_dev": 4, "eval_strategy": "steps", "eval_steps": 3}
        finish(training(folder, logging_steps=2, **dev, **arguments))
        out, err = capfd.readouterr()
        lines = [line for line in out.splitlines() if line.startswith("step")]
        values = "".join(f"{letter} {number}, " for letter in shown)
        pattern = rf"step \d of 6: {name} {value}, {values}{left}"
        assert len([line for line in lines if re.fullmatch(pattern, line)]) == 3, lines
        for step in (3, 6):
            (line,) = (line for line in lines if line.startswith(f"step {step}: dev {name} "))
            assert float(line.split()[-1]) >= 0
        assert "{" not in out and "it/s" not in err
    # The log has η itself, not the k of "auto".
    steps = [row for row in read_journal(folder / "out" / JOURNAL).rows if isinstance(row, Step)]
    logged = log_of(folder / "out/checkpoint-6", "learning_rate")
    assert logged == pytest.approx([steps[step].eta for step in (1, 3, 5)])


def test_option_and_whole_text_losses_differ(tmp_path: Path) -> None:
    first = {}
    for only_option in ("True", "False"):
        folder = tmp_path / only_option
        finish(training(folder, train_as_classification=None, only_train_option=only_option))
        first[only_option] = log_of(folder / "out/checkpoint-3", "loss")[0]
    assert abs(first["True"] - first["False"]) > 0.01


def test_each_set_starts_from_the_pre_trained_weights(tmp_path: Path) -> None:
    shared = {"max_steps": 3, "no_eval": None}
    both = finish(training(tmp_path / "both", num_train_sets=2, **shared))
    single = {}
    for seed in (0, 1):
        single[seed] = finish(training(tmp_path / str(seed), train_set_seed=seed, **shared))
        assert_same_checkpoint(
            tmp_path / "both/out" / f"set{seed}" / "checkpoint-3",
            tmp_path / str(seed) / "out/checkpoint-3",
        )
    accuracies = [single[seed]["metric"]["accuracy"] for seed in (0, 1)]
    assert [r["metric"]["accuracy"] for r in both["runs"]] == accuracies
    assert both["metric"]["accuracy"] == pytest.approx(sum(accuracies) / 2)
    assert sorted(path.name for path in (tmp_path / "both/out").iterdir()) == ["set0", "set1"]


# ------------------------------------------------------------------------------------ dev loss


def test_dev_loss_does_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    for task, sizes in (("SST2", (1, 16)), ("SQuAD", (1, 4))):
        losses = [dev_loss(tmp_path / f"{task}{size}", task, size) for size in sizes]
        assert losses == pytest.approx([losses[0]] * 2, abs=1e-5), task


def dev_loss(folder: Path, task: str, size: int) -> float:
    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "num_dev": 11, "no_eval": None}
    classification = {"train_as_classification": True if task == "SST2" else None}
    steps = {"max_steps": 1, "save_steps": 1, "per_device_eval_batch_size": size}
    finish(training(folder, task, **steps, **evaluation | classification))
    (loss,) = log_of(folder / "out/checkpoint-1", "eval_loss")
    return loss


# ------------------------------------------------------------- what a run does not go on from


def refused(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """The line that says why."""
    capsys.readouterr()
    assert run.main(argv) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_checkpoints_that_are_not_gone_on_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = {"max_steps": 4, "save_steps": 2}
    finish(training(tmp_path, **few))
    (tmp_path / "result.json").unlink()
    folder = tmp_path / "out/checkpoint-4"
    assert "--max_steps 3" in refused(capsys, training(tmp_path, **few | {"max_steps": 3}))
    shorter = few | {"max_steps": None, "num_train_epochs": 1}
    assert "has more than --num_train_epochs 1: " in refused(capsys, training(tmp_path, **shorter))
    assert "--data_seed None, not 7" in refused(capsys, training(tmp_path, **few, data_seed=7))
    in_order = training(tmp_path, **few, train_sampling_strategy="sequential")
    assert "--train_sampling_strategy random, not sequential" in refused(capsys, in_order)
    path = {"resume_from_checkpoint": folder}
    both = training(tmp_path, **few, **path, overwrite_output_dir=True)
    assert "which deletes checkpoints" in refused(capsys, both)
    sets = training(tmp_path, **few, **path, num_train_sets=2)
    assert "is of one set" in refused(capsys, sets)
    named = training(tmp_path, **few, **path)
    state = (folder / "optimizer.pt").read_bytes()
    (folder / "optimizer.pt").write_bytes(state[:100])
    assert "optimizer.pt is not what was written" in refused(capsys, named)
    (folder / "optimizer.pt").write_bytes(state)
    (folder / "scheduler.pt").unlink()
    assert "scheduler.pt is missing" in refused(capsys, named)
    (folder / MANIFEST).unlink()
    assert "manifest.json is missing" in refused(capsys, named)
