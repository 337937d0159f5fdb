"""Checkpoints on disk: which are whole, and which belong to a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from running import MODEL
from transformers import AutoConfig, AutoModelForCausalLM

from checkpoints import (
    RunSettings,
    check_checkpoint,
    checkpoints,
    last_whole_checkpoint,
    remove_checkpoints,
    saved_shapes,
)
from language_model.loading import load_model
from utils import InputError


def make_checkpoint(folder: Path, state: str | None = "{}") -> Path:
    folder.mkdir()
    if state is not None:
        (folder / "trainer_state.json").write_text(state)
    return folder


def test_checkpoints_are_ordered_by_step(tmp_path: Path) -> None:
    for name in ("checkpoint-100", "checkpoint-20", "checkpoint-3", "checkpoint-x", "other"):
        make_checkpoint(tmp_path / name)
    (tmp_path / "checkpoint-7").touch()
    names = [folder.name for folder in checkpoints(tmp_path)]
    assert names == ["checkpoint-3", "checkpoint-20", "checkpoint-100"]
    assert checkpoints(tmp_path / "nowhere") == []


@pytest.mark.parametrize("state", [None, "", '{"global_step": 1'])
def test_half_written_checkpoint_is_passed_over(tmp_path: Path, state: str | None) -> None:
    assert last_whole_checkpoint(tmp_path) is None
    whole = make_checkpoint(tmp_path / "checkpoint-1")
    make_checkpoint(tmp_path / "checkpoint-2", state)
    assert last_whole_checkpoint(tmp_path) == whole


def test_only_checkpoints_are_removed(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "checkpoint-1")
    make_checkpoint(tmp_path / "checkpoint-best")
    (tmp_path / "file").touch()
    remove_checkpoints(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoint-best", "file"]


def test_run_settings_of_a_checkpoint(tmp_path: Path) -> None:
    saved = {"stateful_callbacks": {"RunSettings": RunSettings({"seed": 3}).state()}}
    assert RunSettings.read(make_checkpoint(tmp_path / "a", json.dumps(saved))) == {"seed": 3}
    assert RunSettings.read(make_checkpoint(tmp_path / "b")) == {}


def as_checkpoint(folder: Path) -> Path:
    shutil.copytree(MODEL, folder)
    (folder / "trainer_state.json").write_text("{}")
    return folder


def test_checkpoint_of_the_model_itself(tmp_path: Path) -> None:
    model = load_model(str(MODEL), torch.float32)
    check_checkpoint(str(as_checkpoint(tmp_path / "checkpoint-1")), model)


def test_checkpoint_in_several_files(tmp_path: Path) -> None:
    model = load_model(str(MODEL), torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="1MB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    (tmp_path / "trainer_state.json").write_text("{}")
    check_checkpoint(str(tmp_path), model)
    next(tmp_path.glob("model-*.safetensors")).unlink()
    with pytest.raises(InputError, match=r"is no whole checkpoint: model-.* is missing"):
        saved_shapes(tmp_path)


@pytest.mark.parametrize("layers", [2, 4])
def test_checkpoint_with_fewer_or_more_layers(tmp_path: Path, layers: int) -> None:
    config = AutoConfig.from_pretrained(MODEL)
    config.num_hidden_layers = layers
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(InputError, match="is a checkpoint of another model"):
        check_checkpoint(str(as_checkpoint(tmp_path / "checkpoint-1")), model)
