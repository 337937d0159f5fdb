"""``--trainer broadcast`` through run.py: it learns, resumes, and refuses what it cannot train."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from running import (
    MODEL,
    assert_same_checkpoint,
    assert_same_tensors,
    finish,
    log_of,
    refused_line,
    training,
    weights,
)
from tiny_models import tiny_model, tiny_tokenizer

from training.checkpoints import LAST_STEP, note_step

BROADCAST: dict[str, Any] = {"trainer": "broadcast", "learning_rate": None}


@pytest.mark.parametrize(
    "objective",
    [
        {"train_as_classification": True},
        {"train_as_classification": None},
        {"train_as_classification": None, "only_train_option": "False", "broadcast_tokens": 64},
        {"load_bfloat16": True},
    ],
    ids=["options", "language_model", "whole_text", "bfloat16"],
)
def test_training_lowers_the_loss(tmp_path: Path, objective: dict[str, Any]) -> None:
    arguments = {"max_steps": 12, "per_device_train_batch_size": 12, "save_steps": 12}
    result = finish(training(tmp_path, model_name=MODEL, **BROADCAST | arguments | objective))
    losses = log_of(tmp_path / "out/checkpoint-12", "loss")
    assert losses[-1] < (0.8 if "only_train_option" in objective else 0.7) * losses[0]
    rates = log_of(tmp_path / "out/checkpoint-12", "broadcast_rate")
    assert rates == pytest.approx([4 * (1 - step / 12) for step in range(12)])
    assert result["forward_passes"] == 12 and "backward_passes" not in result
    before, after = weights(MODEL), weights(tmp_path / "out/checkpoint-12")
    changed = [name for name, tensor in after.items() if (tensor != before[name].to(tensor)).any()]
    # The upper two of three blocks.
    matrices = itertools.product((1, 2), ("self_attn.out_proj", "fc2"))
    assert {*changed} == {f"model.decoder.layers.{n}.{matrix}.weight" for n, matrix in matrices}
    assert result["trained_parameters"] == sum(before[name].numel() for name in changed)


@pytest.mark.parametrize("dtype", ["float32", "load_bfloat16", "load_float16"])
def test_a_killed_run_repeats_the_steps_after_its_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, dtype: str
) -> None:
    arguments = BROADCAST | {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    if dtype != "float32":
        arguments[dtype] = True
    finish(training(tmp_path / "whole", **arguments))
    assert not (tmp_path / "whole/out" / LAST_STEP).exists()
    shutil.copytree(tmp_path / "whole/out/checkpoint-3", tmp_path / "parted/out/checkpoint-3")
    note_step(tmp_path / "parted/out", 5)
    note_step(tmp_path / "early/out", 2)
    for name in ("parted", "early"):
        torch.manual_seed(12345)  # whatever state the process is in
        finish(training(tmp_path / name, **arguments))
        assert_same_checkpoint(*(tmp_path / n / "out/checkpoint-6" for n in ("whole", name)))
    assert "steps 4 to 5 came after the checkpoint: done again" in caplog.text
    assert "steps 1 to 2 came before the first checkpoint: done again" in caplog.text


def test_accumulated_batches_are_one_large_batch(tmp_path: Path) -> None:
    finish(training(tmp_path / "one", **BROADCAST))
    halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    finish(training(tmp_path / "two", **BROADCAST | halves))
    one, two = (tmp_path / name / "out/checkpoint-6" for name in ("one", "two"))
    for name, tensor in weights(one).items():
        torch.testing.assert_close(tensor, weights(two)[name], atol=2e-6, rtol=0)


def test_a_rate_of_0_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    for dtype in ({}, {"load_bfloat16": True}, {"load_float16": True}):
        folder = tmp_path / "-".join(dtype)
        finish(training(folder, model_name=MODEL, broadcast_rate=0, **BROADCAST | dtype))
        saved = weights(folder / "out/checkpoint-6")
        start = weights(MODEL)
        assert_same_tensors({name: start[name].to(saved[name]) for name in saved}, saved)


def test_models_of_another_architecture_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for family in ("gemma3n", "mamba"):
        model = tmp_path / family
        tiny_model(family).save_pretrained(model)
        tiny_tokenizer().save_pretrained(model)
        argv = training(tmp_path / f"run {family}", model_name=model, **BROADCAST)
        line = refused_line(argv, capsys)
        assert line.startswith("--trainer broadcast: ") and line.endswith("; use --trainer zo")
        assert not (tmp_path / f"run {family}").exists()
