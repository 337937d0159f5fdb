"""``--zo_eps auto``, ``--learning_rate auto`` and probe.py, as their users run them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from running import assert_same_tensors, finish, log_of, training
from safetensors.torch import load_file

import probe
import run
from training import scales
from training.objective_trainer import ObjectiveTrainer

AUTO = {"learning_rate": "auto", "zo_eps": "auto"}


def state(checkpoint: Path) -> dict[str, Any]:
    """The optimizer's first group in a checkpoint."""
    return torch.load(checkpoint / "optimizer.pt", weights_only=True)["param_groups"][0]


def test_a_run_takes_the_scale_that_it_finds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = finish(training(tmp_path, zo_eps="auto"))["probe"]
    assert found == json.loads((tmp_path / "out/probe.json").read_text())
    assert 30 < found["passes"] < 100
    largest = max(found["eps"], found["curvature_eps"])
    assert state(tmp_path / "out/checkpoint-3")["eps"] == largest
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("probe: ")]
    assert "noise of the loss" in shown[0] and "forward passes" in shown[0]


def test_no_learning_rate_takes_no_pass_before_the_first_step(tmp_path: Path) -> None:
    result = finish(training(tmp_path, learning_rate="auto"))
    assert "probe" not in result
    # One more than three a step: the first loss is taken twice.
    assert result["forward_passes"] == 3 * result["steps"] + 1
    measured = log_of(tmp_path / "out/checkpoint-3", "curvature")
    mean = 0.0
    for count, value in enumerate(measured, 1):
        mean = max(mean + (value - mean) / count, 0.3 * value)
    assert state(tmp_path / "out/checkpoint-3")["mean_curvature"] == pytest.approx(mean)


def test_scales_are_chosen_without_moving_the_weights(tmp_path: Path) -> None:
    for dtype in ({}, {"load_bfloat16": True, "zo_perturbation": "inplace"}):
        folder = tmp_path / str(len(dtype))
        finish(training(folder, **dtype, zo_eps="auto"))
        eps = state(folder / "out/checkpoint-3")["eps"]
        finish(training(folder / "given", **dtype, zo_eps=eps))
        first, second = (
            load_file(f / "out/checkpoint-3/model.safetensors") for f in (folder, folder / "given")
        )
        assert_same_tensors(first, second)


MODES = {
    "mezo": {"hessian_smooth_type": "constant0"},
    "half": {"load_bfloat16": True},
    "prefix": {"prefix_tuning": True, "zo_num_samples": 2},
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_a_resumed_run_takes_what_was_found(
    tmp_path: Path, mode: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = training(tmp_path, **AUTO, **mode)
    whole = finish(argv)
    # As if the run had ended behind the checkpoint of the third step.
    (tmp_path / "out/checkpoint-6").rename(tmp_path / "whole")
    (tmp_path / "result.json").unlink()
    monkeypatch.setattr(scales, "choose_scales", None)
    resumed = finish(argv)
    assert resumed["probe"] == whole["probe"]
    checkpoints = tmp_path / "whole", tmp_path / "out/checkpoint-6"
    (file,) = {path.name for path in checkpoints[0].glob("*model.safetensors")}
    assert_same_tensors(*(load_file(folder / file) for folder in checkpoints))
    first, second = map(state, checkpoints)
    assert first == second


def test_the_command_measures_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "folder/probe.svg"
    argv = training(tmp_path, result_file=None, save_steps=None, num_eval=None)
    assert probe.main([*argv, "--plot", str(tmp_path / "probe.doc")]) == 2
    assert not any(tmp_path.iterdir()), "it is refused before anything is measured"
    assert "give a name that ends in .png" in capsys.readouterr().err
    assert probe.main([*argv, "--plot", str(picture)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"picture: {picture}"
    found = json.loads((tmp_path / "out/probe.json").read_text())
    assert set(probe.GRID) <= set(found["scales"])
    # Text is drawn as outlines; comments keep what it says.
    assert f"μ = {found['eps']:.2g}" in picture.read_text()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"probe.json"}


def test_losses_that_cannot_be_probed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = ObjectiveTrainer.compute_loss
    monkeypatch.setattr(
        ObjectiveTrainer, "compute_loss", lambda *args, **kwargs: real(*args, **kwargs) * math.nan
    )
    argv = training(tmp_path, **AUTO)
    assert run.main(argv) == probe.main(argv) == 2
    assert "no μ can be chosen: the loss is nan before any step" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_probe_command_is_for_zeroth_order(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--task_name", "SST2", "--model_name", "data/tiny-opt", "--data_dir", "data/samples"]
    assert probe.main(argv) == 2
    assert "probe.py measures for --trainer zo" in capsys.readouterr().err
