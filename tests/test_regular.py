"""First-order training through run.py, and its steps that are left out."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from running import MODEL, assert_same_tensors, finish, log_of, training, weights
from torch import Tensor, nn

import run
from training import objective_trainer
from training.objective_trainer import ObjectiveTrainer

REGULAR = {"trainer": "regular", "hessian_smooth_type": None}


@pytest.mark.parametrize(
    "objective",
    [
        {"train_as_classification": True},
        {"train_as_classification": None},
        {"train_as_classification": None, "only_train_option": "False"},
    ],
    ids=["options", "language_model", "whole_text"],
)
def test_regular_training_lowers_the_loss(tmp_path: Path, objective: dict[str, Any]) -> None:
    arguments = {"max_steps": 12, "per_device_train_batch_size": 12, "learning_rate": 1e-3}
    finish(
        training(
            tmp_path,
            model_name=MODEL,
            save_steps=12,
            **REGULAR,
            **arguments,
            **objective,
        )
    )
    losses = log_of(tmp_path / "out/checkpoint-12", "loss")
    assert losses[-1] < 0.7 * losses[0]
    assert log_of(tmp_path / "out/checkpoint-12", "grad_norm")[0] > 0


def nan_loss(model: nn.Module, loss: Tensor) -> Tensor:
    return loss * float("nan")


def nan_gradient(model: nn.Module, loss: Tensor) -> Tensor:
    """The same loss, whose gradient is 0 times infinity."""
    return loss + (next(model.parameters()).flatten()[0] * 0).sqrt()


@pytest.mark.parametrize("failure", [nan_loss, nan_gradient])
def test_steps_without_finite_numbers_are_left_out_and_stop_the_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failure: Callable[[nn.Module, Tensor], Tensor],
) -> None:
    real, calls = ObjectiveTrainer.compute_loss, itertools.count()

    def fails_in_the_second_half_of_a_step(self, model, *arguments: Any, **settings: Any) -> Any:
        loss, number = real(self, model, *arguments, **settings), next(calls)
        return failure(model, loss) if number >= 4 and number % 2 else loss

    argv = training(
        tmp_path,
        **REGULAR,
        max_steps=7,
        save_steps=2,
        gradient_accumulation_steps=2,
        num_train=16,  # an even number of batches
    )
    with monkeypatch.context() as patched:
        patched.setattr(objective_trainer, "SKIPPED_STEPS", 3)
        patched.setattr(ObjectiveTrainer, "compute_loss", fails_in_the_second_half_of_a_step)
        assert run.main(argv) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("stopped: no finite loss in 3 steps in a row: stopped after step 5")
    before, after = (weights(tmp_path / f"out/checkpoint-{step}") for step in (2, 5))
    assert_same_tensors(before, after)
    assert log_of(tmp_path / "out/checkpoint-5", "skipped_steps") == [0, 0, 1, 2, 3]
    # Steps before a checkpoint count after it.
    finish(argv)
    assert log_of(tmp_path / "out/checkpoint-7", "skipped_steps")[-1] == 3


@pytest.mark.parametrize("trainer", ["regular", "zo"])
def test_a_loss_far_above_the_first_stops_the_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    trainer: str,
) -> None:
    real = ObjectiveTrainer.compute_loss

    def rises(self: ObjectiveTrainer, *arguments: Any, **settings: Any) -> Any:
        # By more than twice the first one, about 0.7: but for one step.
        raised = 3.0 if self.state.global_step not in (0, 3) else 0.0
        return real(self, *arguments, **settings) + raised

    monkeypatch.setattr(ObjectiveTrainer, "compute_loss", rises)
    monkeypatch.setattr(objective_trainer, "RISEN_STEPS", 4)
    settings = {**REGULAR} if trainer == "regular" else {}
    argv = training(tmp_path, **settings, max_steps=20, save_steps=50)
    assert run.main(argv) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("stopped: the loss of each of the last 4 steps is above 2.")
    # Steps 2, 3 do not count any more: 5, 6, 7 and 8 are four in a row.
    assert "stopped after step 8, checkpoint in" in error and "lower --learning_rate" in error
    assert (tmp_path / "out/checkpoint-8/model.safetensors").is_file()
