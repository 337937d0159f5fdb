"""The zeroth-order arguments of run.py: each mode trains, resumes exactly, logs its scalars."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from running import (
    MODEL,
    assert_replays,
    assert_same_checkpoint,
    finish,
    log_of,
    refused_line,
    trainer_state,
    training,
    weights,
)
from test_families import save_model

import run
from language_model.loading import load_model
from replay import optimizer_of, play
from trainer import ZerothOrderTrainer
from training import objective_trainer
from training.journal import JOURNAL, read_journal
from zeroth_order import chunks
from zeroth_order.config import HiZOOConfig

MODES = {
    "bfloat16": {"load_bfloat16": True},
    "float16_accumulation": {"load_float16": True, "gradient_accumulation_steps": 2},
    "float16_in_place": {"load_float16": True, "zo_perturbation": "inplace"},
    "float32_layerwise": {"zo_perturbation": "layerwise"},
    "lowrank": {"hessian": "lowrank"},
    "lowrank_bfloat16": {"hessian": "lowrank", "load_bfloat16": True},
    # A parameter of the small model is too small for it.
    "compiled": {"zo_compile": "yes", "model_name": MODEL},
    "three_directions": {"zo_num_samples": 3},
    "mezo_bfloat16": {"load_bfloat16": True, "hessian_smooth_type": "constant0"},
}


@pytest.fixture
def optimizers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The optimizers that runs create."""
    made = []
    create = ZerothOrderTrainer.create_optimizer

    def remember(self: ZerothOrderTrainer, model: Any = None) -> Any:
        made.append(create(self, model))
        return made[-1]

    monkeypatch.setattr(ZerothOrderTrainer, "create_optimizer", remember)
    return made


MODE_CASES = [
    # test_hizoo.py shows that compiled kernels do the same.
    pytest.param(mode, id=name, marks=[pytest.mark.slow] if name == "compiled" else [])
    for name, mode in MODES.items()
]


@pytest.mark.parametrize("arguments", MODE_CASES)
def test_every_mode_resumes_bit_for_bit(
    tmp_path: Path, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CACHED_CHUNK", 1 << 14)  # so that the model is cut
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    few = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2}
    finish(training(whole, **few, **arguments))
    shutil.copytree(whole / "out/checkpoint-2", parted / "out/checkpoint-2")
    finish(training(parted, **few, **arguments))
    assert_same_checkpoint(whole / "out/checkpoint-4", parted / "out/checkpoint-4")
    before, after = weights(whole / "out/checkpoint-2"), weights(whole / "out/checkpoint-4")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert_replays(whole, tmp_path / "replayed", "checkpoint-4", monkeypatch, **few, **arguments)
    if arguments.get("zo_compile") == "yes":
        assert_differs_by_rounding(whole / "out")


def assert_differs_by_rounding(run_folder: Path) -> None:
    """Without the compiler, a replay differs by little, and tells."""
    journal = read_journal(run_folder / "journal.jsonl")
    model = load_model(str(MODEL), torch.float32)
    optimizer = optimizer_of(journal.header, model, compile=False)
    compared, different = play(journal.after(0), optimizer, model, compare=True)
    assert compared == [4]
    trained = weights(run_folder / "checkpoint-4")
    differences = [
        float((parameter.detach() - trained[name]).abs().max())
        for name, parameter in model.named_parameters()
    ]
    assert max(differences) < 1e-4
    assert (max(differences) > 0) == (different == 4)


def test_auto_perturbs_half_precision_layer_by_layer(tmp_path: Path, optimizers: list[Any]) -> None:
    for number, (arguments, layerwise) in enumerate(
        [
            ({}, False),
            ({"load_bfloat16": True}, True),
            ({"load_float16": True}, True),
            ({"load_float16": True, "zo_perturbation": "inplace"}, False),
            ({"zo_perturbation": "layerwise"}, True),
        ]
    ):
        finish(training(tmp_path / str(number), max_steps=1, save_strategy="no", **arguments))
        assert (optimizers[-1].layers is not None) == layerwise, arguments


def test_a_model_that_cannot_be_perturbed_layer_by_layer_is_shifted_in_place(
    tmp_path: Path, optimizers: list[Any], caplog: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_model("lfm2", tmp_path / "model")
    arguments = {"model_name": model, "max_steps": 1, "save_strategy": "no"}
    finish(training(tmp_path, load_bfloat16=True, **arguments))
    assert optimizers[-1].layers is None
    (line,) = [text for text in caplog.messages if "layer by layer" in text]
    assert "Lfm2ForCausalLM" in line and "in place" in line
    assert run.main(training(tmp_path / "no", zo_perturbation="layerwise", **arguments)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("error: Lfm2ForCausalLM cannot be perturbed layer by layer: ")
    assert line.endswith("use --zo_perturbation inplace")


def test_perturbation_scale_that_does_not_fit_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for eps in ("1e30", "1e-30"):
        assert run.main(training(tmp_path, zo_eps=eps)) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
        assert line.startswith(f"error: --zo_eps {float(eps):g}: eps ") and "give a " in line
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_hessian_arguments_reach_the_optimizer(tmp_path: Path, optimizers: list[Any]) -> None:
    once = {"max_steps": 1, "save_strategy": "no"}
    finish(training(tmp_path / "2", load_float16=True, **once))
    dtypes = {t["hessian_minus_one"].dtype for t in optimizers[-1].state.values()}
    assert dtypes == {torch.bfloat16}
    finish(training(tmp_path / "3", hessian="lowrank", zo_num_samples=2, **once))
    names = {name for state in optimizers[-1].state.values() for name in state}
    assert names == {"hessian_rows", "hessian_columns", "hessian_minus_one"}
    assert optimizers[-1].config.num_samples == 2


def test_log_shows_the_optimizers_scalars(tmp_path: Path) -> None:
    finish(training(tmp_path))
    folder = tmp_path / "out/checkpoint-6"
    gradients, curvatures = log_of(folder, "projected_gradient"), log_of(folder, "curvature")
    assert len(set(gradients)) == 6 and len(set(curvatures)) == 6
    assert all(curvature > 0 for curvature in curvatures)
    means, largest = log_of(folder, "hessian_mean"), log_of(folder, "hessian_max")
    assert all(most > mean > 0 for mean, most in zip(means, largest, strict=True))
    assert len(set(means)) == 6
    assert log_of(folder, "skipped_steps") == [0] * 6
    kept = trainer_state(folder)["stateful_callbacks"]["RunState"]["attributes"]["optimizer"]
    journal = read_journal(tmp_path / "out" / JOURNAL)
    assert HiZOOConfig(**kept) == journal.header.optimizer
    assert (kept["lr"], kept["hessian_smooth"]) == (1e-4, 1e-2)


def test_losses_that_are_not_finite_stop_the_run_with_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = ZerothOrderTrainer.compute_loss

    def fails_after_two_steps(self: ZerothOrderTrainer, *arguments: Any, **settings: Any) -> Any:
        loss = real(self, *arguments, **settings)
        return loss * float("nan") if self.state.global_step >= 2 else loss

    monkeypatch.setattr(ZerothOrderTrainer, "compute_loss", fails_after_two_steps)
    monkeypatch.setattr(objective_trainer, "SKIPPED_STEPS", 3)
    argv = training(tmp_path, max_steps=20, save_steps=2)
    assert run.main(argv) == 1
    errors = capsys.readouterr().err.splitlines()
    assert errors[-1].startswith(
        "stopped: no finite loss in 3 steps in a row: stopped after step 5"
    )
    assert "--learning_rate" in errors[-1]
    assert not (tmp_path / "result.json").exists()
    skipped = log_of(tmp_path / "out/checkpoint-5", "skipped_steps")
    assert skipped[-1] == 3
    before, after = weights(tmp_path / "out/checkpoint-2"), weights(tmp_path / "out/checkpoint-5")
    assert all(torch.allclose(before[n], after[n], rtol=0, atol=1e-6) for n in before)


def test_bad_values_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ({"hessian": "diagonal"}, "--hessian"),
        ({"zo_perturbation": "sideways"}, "--zo_perturbation"),
        ({"zo_num_samples": 0}, "--zo_num_samples 0: must be at least 1"),
    ):
        assert message in refused_line(training(tmp_path, **arguments), capsys, tmp_path)
