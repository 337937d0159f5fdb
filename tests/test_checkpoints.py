"""Checkpoints on disk: which are whole, and which belong to a model."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from running import (
    assert_same_checkpoint,
    assert_same_tensors,
    contents,
    finish,
    flip_bit,
    let_every_dev_loss_be_worse,
    refused_line,
    trainer_state,
    training,
    weights,
)
from tiny_models import tiny_model, tiny_tokenizer

import run
from training.checkpoints import (
    MANIFEST,
    UNFINISHED,
    checkpoints,
    damage,
    last_whole_checkpoint,
    write_manifest,
)
from training.objective_trainer import ObjectiveTrainer
from utils import write_json


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


# ------------------------------------------------------------------------------- damaged files

FILES = (
    *("config.json", "generation_config.json", "model.safetensors", "optimizer.pt"),
    *("rng_state.pth", "scheduler.pt", "trainer_state.json", "training_args.bin", MANIFEST),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("finished")
    finish(short_training(folder))
    return folder


def short_training(folder: Path, **arguments: Any) -> list[str]:
    return training(folder, **({"max_steps": 2, "save_steps": 1} | arguments))


def zero_end(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: -len(content) // 4].ljust(len(content), b"\0"))


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def empty(file: Path) -> None:
    os.truncate(file, 0)


HARMS = (flip_bit, zero_end, cut, empty, Path.unlink)


def test_every_damage_to_every_file_is_noticed(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for folder in checkpoints(finished / "out"):
        assert damage(folder) is None
        assert {path.name for path in folder.iterdir()} >= set(FILES)
        listed = json.loads((folder / MANIFEST).read_text())["sha256"]
        assert {MANIFEST, *listed} == {path.name for path in folder.iterdir()}
    for number, (name, harm) in enumerate(itertools.product(FILES, HARMS)):
        folder = tmp_path / str(number)
        shutil.copytree(finished / "out", folder)
        harm(folder / "checkpoint-2" / name)
        caplog.clear()
        assert last_whole_checkpoint(folder) == folder / "checkpoint-1"
        (line,) = caplog.messages
        assert line.startswith(f"{folder / 'checkpoint-2'} is damaged and is passed over: ")
        assert name in line or harm is flip_bit


def test_run_resumes_from_the_whole_checkpoint_before(
    finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished / "out", tmp_path / "out")
    flip_bit(tmp_path / "out/checkpoint-2/model.safetensors")
    assert finish(short_training(tmp_path))["resumed_from"].endswith("checkpoint-1")
    assert damage(tmp_path / "out/checkpoint-2") is None
    assert_same_checkpoint(finished / "out/checkpoint-2", tmp_path / "out/checkpoint-2")


def assert_refused(argv: list[str], capsys: pytest.CaptureFixture[str], *parts: str) -> None:
    line = refused_line(argv, capsys)
    assert all(part in line for part in parts), line


def test_checkpoint_of_another_model_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the same name, and with another number of layers."""
    for layers in (2, 3):
        folder = tmp_path / str(layers) / "model"
        tiny_model("opt", num_hidden_layers=layers).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    finish(short_training(tmp_path, model_name=tmp_path / "2/model"))
    (tmp_path / "result.json").unlink()
    argv = short_training(tmp_path, model_name=tmp_path / "3/model", max_steps=3)
    assert_refused(argv, capsys, "comes from a run with other weights")
    checkpoint = tmp_path / "out/checkpoint-2"
    (checkpoint / "scheduler.pt").unlink()
    (checkpoint / MANIFEST).unlink()
    write_manifest(checkpoint)
    argv = short_training(tmp_path, model_name=tmp_path / "2/model", max_steps=3)
    named = [*argv, "--resume_from_checkpoint", str(checkpoint)]
    assert_refused(named, capsys, "has no state of an optimizer and a scheduler")
    state = trainer_state(checkpoint)
    del state["stateful_callbacks"]["RunState"]["attributes"]["version"]
    write_json(checkpoint / "trainer_state.json", state)
    (checkpoint / MANIFEST).unlink()
    write_manifest(checkpoint)
    assert_refused(argv, capsys, "another version of this program wrote it")
    # The very same run resumes by its journal alone.
    again = short_training(tmp_path, model_name=tmp_path / "2/model", overwrite_output_dir=True)
    assert finish(again)["resumed_from"] == str(tmp_path / "out/journal.jsonl")
    (checkpoint / "trainer_state.json").unlink()
    (checkpoint / MANIFEST).unlink()
    write_manifest(checkpoint)
    assert_refused(argv, capsys, "has no trainer_state.json")


def test_checkpoints_of_the_model_alone(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A finished run is only loaded; another begins with its journal, or anew if it is told to."""
    loses = "has no state of an optimizer and a scheduler"
    for trainer, hint in (("zo", "the same command"), ("regular", "--save_only_model left out")):
        folder = tmp_path / trainer
        argv = short_training(folder, trainer=trainer, save_only_model=True)
        with monkeypatch.context() as patched:
            interrupt_the_first_step(patched)
            assert run.main(argv) == 130
        assert hint in capsys.readouterr().err.splitlines()[-1]
        last, journal = folder / "out/checkpoint-1", folder / "out/journal.jsonl"
        if trainer == "regular":
            assert_refused(argv, capsys, f"{last} {loses}; give another one, or --overwrite")
            argv = [*argv, "--overwrite_output_dir"]
        caplog.clear()
        result = finish(argv)
        begins = f"with {journal}" if trainer == "zo" else "anew"
        assert f"{last} {loses}: the run begins {begins}" in caplog.messages
        assert result["resumed_from"] == (str(journal) if trainer == "zo" else None)
        (folder / "result.json").unlink()
        written = contents(folder / "out")
        argv = short_training(folder, trainer=trainer, save_only_model=True)
        assert finish(argv)["resumed_from"] == str(folder / "out/checkpoint-2")
        assert contents(folder / "out") == written


def interrupt_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    begin_step = ObjectiveTrainer._begin_step

    def begin_step_and_interrupt(self: ObjectiveTrainer) -> None:
        begin_step(self)
        if self.state.global_step == 0:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(ObjectiveTrainer, "_begin_step", begin_step_and_interrupt)


def test_named_checkpoint_that_is_not_whole_is_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = tmp_path / "checkpoint-2"
    shutil.copytree(finished / "out/checkpoint-2", named)
    flip_bit(named / "optimizer.pt")
    before = contents(tmp_path)
    argv = short_training(tmp_path, resume_from_checkpoint=named)
    assert_refused(argv, capsys, f"--resume_from_checkpoint {named}", "optimizer.pt is not what")
    assert contents(tmp_path) == before


class Executed:
    """Makes a folder if it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_pickle_that_torch_refuses_is_not_executed(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("optimizer.pt", "rng_state.pth"):
        checkpoint = tmp_path / name / "out/checkpoint-1"
        shutil.copytree(finished / "out/checkpoint-1", checkpoint)
        torch.save({"state": Executed(tmp_path / name / "executed")}, checkpoint / name)
        (checkpoint / MANIFEST).unlink()
        write_manifest(checkpoint)
        argv = short_training(tmp_path / name)
        assert_refused(argv, capsys, str(checkpoint), "torch refuses one of its files")
        assert not (tmp_path / name / "executed").exists()


# ------------------------------------------------------------------------------ renamed folders


@pytest.mark.parametrize(("old_stays", "max_steps"), [(True, 2), (False, 3)])
def test_best_checkpoint_of_a_copied_folder(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    old_stays: bool,
    max_steps: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    let_every_dev_loss_be_worse(monkeypatch)
    arguments = {
        **{"num_dev": 4, "eval_strategy": "steps", "eval_steps": 1},
        **{"load_best_model_at_end": True, "save_model": True},
    }
    finish(short_training(tmp_path / "old", **arguments))
    assert trainer_state(tmp_path / "old/out/checkpoint-2")["best_model_checkpoint"] is None
    (shutil.copytree if old_stays else shutil.move)(tmp_path / "old", tmp_path / "new")
    (tmp_path / "new/result.json").unlink()
    result = finish(short_training(tmp_path / "new", **(arguments | {"max_steps": max_steps})))
    best = tmp_path / "new/out/checkpoint-1"
    assert result["checkpoint"] == str(best)
    assert torch.equal(
        weights(tmp_path / "new/out")["model.decoder.final_layer_norm.weight"],
        weights(best)["model.decoder.final_layer_norm.weight"],
    )
    assert not caplog.messages
    flip_bit(best / "model.safetensors")
    (tmp_path / "new/result.json").unlink()
    result = finish(short_training(tmp_path / "new", **(arguments | {"max_steps": max_steps})))
    assert result["checkpoint"].endswith(f"checkpoint-{max_steps}")
    assert f"the best checkpoint, {best}, is damaged" in caplog.messages[-1]


def test_best_checkpoint_beside_a_named_one_in_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later checkpoint, in the new folder, does not let the best one be forgotten."""
    let_every_dev_loss_be_worse(monkeypatch)
    arguments = {
        **{"num_dev": 4, "eval_strategy": "steps", "eval_steps": 1},
        **{"load_best_model_at_end": True, "save_model": True},
    }
    finish(short_training(tmp_path / "old", **arguments))
    named = tmp_path / "old/out/checkpoint-2"
    arguments |= {"max_steps": 3, "resume_from_checkpoint": named}
    best = named.with_name("checkpoint-1")
    assert finish(short_training(tmp_path / "new", **arguments))["checkpoint"] == str(best)
    assert_same_tensors(weights(tmp_path / "new/out"), weights(best))


# --------------------------------------------------------------------------------- full disks


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let the operating system refuse to write more bytes into a file, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("part", ["save_model", "_save_optimizer_and_scheduler", "_save_rng_state"])
def test_full_disk_leaves_the_checkpoint_before(
    finished: Path,
    tmp_path: Path,
    part: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write = getattr(ObjectiveTrainer, part)

    def write_on_a_full_disk(self: ObjectiveTrainer, *args: Any, **kwargs: Any) -> None:
        with files_of_at_most(2000) if self.state.global_step == 2 else contextlib.nullcontext():
            write(self, *args, **kwargs)

    argv = short_training(tmp_path, save_total_limit=1)
    with monkeypatch.context() as patched:
        patched.setattr(ObjectiveTrainer, part, write_on_a_full_disk)
        assert run.main(argv) == 1
    before = tmp_path / "out/checkpoint-1"
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "could not" in line]
    assert line.startswith("stopped: ") and "checkpoint-2 could not be written: " in line
    assert not (tmp_path / "out" / UNFINISHED).exists()
    assert line.endswith(f"the same command resumes from {before}")
    assert checkpoints(tmp_path / "out") == [before] and damage(before) is None
    assert finish(argv)["resumed_from"] == str(before)
    assert checkpoints(tmp_path / "out") == [tmp_path / "out/checkpoint-2"]
    assert_same_checkpoint(finished / "out/checkpoint-2", tmp_path / "out/checkpoint-2")


def test_first_checkpoint_and_model_on_a_full_disk(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with files_of_at_most(20_000):
        assert run.main(short_training(tmp_path)) == 1
        assert "the same command resumes from its start" in capsys.readouterr().err
        assert checkpoints(tmp_path / "out") == []
        argv = training(tmp_path, save_strategy="no", save_steps=None, save_model=True, max_steps=1)
        assert run.main(argv) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"stopped: {tmp_path / 'out'} could not be written: ")
