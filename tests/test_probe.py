"""``auto`` arguments and probe.py, as their users run them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from running import MODEL, assert_same_tensors, finish, log_of, probe_in_small, training
from safetensors.torch import load_file

import probe
import run
from training import step_sizes
from training.objective_trainer import ObjectiveTrainer

AUTO = {"learning_rate": "auto", "zo_eps": "auto"}


def state(checkpoint: Path) -> dict[str, Any]:
    """The optimizer's first group in a checkpoint."""
    return torch.load(checkpoint / "optimizer.pt", weights_only=True)["param_groups"][0]


def test_a_run_takes_what_its_probe_finds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = finish(training(tmp_path, **AUTO, hessian_smooth_type="constant0"))
    (found,) = result["probes"]
    assert found == json.loads((tmp_path / "out/probe.json").read_text())["probes"][0]
    assert found["global_step"] == 0 and 50 < found["passes"] < 200
    group = state(tmp_path / "out/checkpoint-3")
    assert group["eps"] == found["scales"]["shared_scale"] >= found["scales"]["curvature_scale"]
    # The mean curvature begins with the probe's.
    measured = log_of(tmp_path / "out/checkpoint-3", "curvature")
    mean, count = found["step"]["curvature"], 5
    for value in measured:
        count += 1
        mean = max(mean + (value - mean) / min(count, 20), 0.3 * value)
    assert group["mean_curvature"] == pytest.approx(mean)
    rates = log_of(tmp_path / "out/checkpoint-3", "eta")
    assert rates[-1] == pytest.approx(0.1 / (2 * mean))
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("probe: ")]
    assert "noise of the loss" in shown[0] and "forward passes" in shown[1]


MODES = {
    "mezo": {"hessian_smooth_type": "constant0"},
    "hizoo": {"curvature_eps": "auto"},
    "half": {"load_bfloat16": True, "curvature_eps": "auto"},
    "half in place": {"load_bfloat16": True, "zo_perturbation": "inplace"},
    "two directions": {"zo_num_samples": 2, "zo_clip": 3},
    "lora": {"lora": True},
    "prefix": {"prefix_tuning": True, "curvature_eps": "auto"},
    "head": {"head_tuning": True},
    "decay": {"lr_scheduler_type": "linear", "warmup_steps": 2},
    "probed again": {"probe_every": 2},
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_a_resumed_run_takes_what_was_found(
    tmp_path: Path, mode: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    probe_in_small(monkeypatch)
    measured = []
    real = probe.measure
    monkeypatch.setattr(
        probe, "measure", lambda *args, **kwargs: measured.append(0) or real(*args, **kwargs)
    )
    steps = [0, 2, 4] if "probe_every" in mode else [0]
    argv = training(tmp_path, **AUTO, **mode)
    whole = finish(argv)
    assert [found["global_step"] for found in whole["probes"]] == steps
    assert len(measured) == len(steps)
    # As if the run had ended behind the checkpoint of the third step.
    (tmp_path / "out/checkpoint-6").rename(tmp_path / "whole")
    (tmp_path / "result.json").unlink()
    resumed = finish(argv)
    assert resumed["probes"] == whole["probes"]
    assert len(measured) == len(steps) + sum(step > 3 for step in steps)
    checkpoints = tmp_path / "whole", tmp_path / "out/checkpoint-6"
    (file,) = {path.name for path in checkpoints[0].glob("*model.safetensors")}
    assert_same_tensors(*(load_file(folder / file) for folder in checkpoints))
    first, second = map(state, checkpoints)
    assert first == second


def test_the_command_measures_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    probe_in_small(monkeypatch)
    picture = tmp_path / "probe.png"
    sizes = {"num_train": 200, "per_device_train_batch_size": 16, "num_eval": None}
    argv = training(tmp_path, model_name=MODEL, result_file=None, save_steps=None, **sizes)
    assert probe.main([*argv, "--plot", str(picture)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1] == f"picture: {picture}" and picture.stat().st_size > 10_000
    (found,) = json.loads((tmp_path / "out/probe.json").read_text())["probes"]
    assert found["learning_rate"] == pytest.approx(0.05 / found["step"]["curvature"])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"probe.json"}


BAD = {
    "regular": (
        {"trainer": "regular", "learning_rate": "auto"},
        "--learning_rate auto is found by forward passes, for --trainer zo",
    ),
    "a word": ({"learning_rate": "fast"}, "'fast' is no number, nor auto"),
    "clip of 0": ({"zo_clip": 0}, "--zo_clip 0: must be larger than 0"),
    "own eps of 0": ({"curvature_eps": 0}, "--curvature_eps 0: must be larger than 0"),
    "never again": ({"probe_every": 2}, "--probe_every 2: nothing is probed"),
    "no curvature": (
        {"curvature_eps": "auto", "hessian_smooth_type": "constant0"},
        "the curvature is not measured",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: dict[str, Any],
    message: str,
) -> None:
    assert run.main(training(tmp_path, **arguments)) == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda real: real * math.nan, "the probe cannot start: the loss of its batch 0 is nan"),
        (lambda real: real * 0 + 1, "no shift of the weights changes the loss"),
    ],
)
def test_losses_that_cannot_be_probed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    loss: Any,
    message: str,
) -> None:
    probe_in_small(monkeypatch)
    real = ObjectiveTrainer.compute_loss
    monkeypatch.setattr(
        ObjectiveTrainer, "compute_loss", lambda *args, **kwargs: loss(real(*args, **kwargs))
    )
    argv = training(tmp_path, **AUTO)
    assert run.main(argv) == probe.main(argv) == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_curve_without_a_minimum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    probe_in_small(monkeypatch)
    monkeypatch.setattr(step_sizes._Curve, "lowest", lambda self: (None, False))
    assert probe.main(training(tmp_path, result_file=None)) == 2
    assert "no step lowers the loss of other batches" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
    # A run takes the curvature all the same.
    assert finish(training(tmp_path, **AUTO))["probes"][0]["step"]["best"] is None


def test_probe_command_is_for_zeroth_order(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--task_name", "SST2", "--model_name", "data/tiny-opt", "--data_dir", "data/samples"]
    assert probe.main(argv) == 2
    assert "probe.py measures for --trainer zo" in capsys.readouterr().err
