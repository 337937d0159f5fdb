"""replay.py: the model after any step of a run, from the model it began with and its journal."""

from __future__ import annotations

import copy
import json
import math
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from running import (
    assert_same_tensors,
    contents,
    finish,
    flip_bit,
    small_model,
    training,
    weights,
)
from safetensors.torch import load_file
from test_checkpoints import files_of_at_most
from test_journal import line_of_values

import replay
import run
from language_model.adapters import PROMPT_ENCODER_FILE
from training.journal import JOURNAL, Checksum, line_of, read_journal
from training.objective_trainer import ObjectiveTrainer

MODES = {
    "in_place": {"lr_scheduler_type": "linear", "weight_decay": 0.1},
    "layerwise": {"load_bfloat16": True, "hessian": "lowrank", "zo_num_samples": 2},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "probe": {"learning_rate": "auto"},
    "lora": {"lora": True, "learning_rate": 1e-2, "zo_eps": 1e-2},
    "prefix": {"prefix_tuning": True, "no_reparam": "False", "zo_eps": 1e-2},
}


def replayed(run_folder: Path, folder: Path, *options: Any) -> int:
    line = ["--journal", run_folder / "out" / JOURNAL, "--output_dir", folder, *options]
    return replay.main([str(word) for word in line])


def saved(folder: Path) -> dict[str, torch.Tensor]:
    """The weights in a folder, an adapter's with those of its network."""
    names = ("model.safetensors", "adapter_model.safetensors", PROMPT_ENCODER_FILE)
    return {
        f"{name} {key}": tensor
        for name in names
        if (folder / name).is_file()
        for key, tensor in load_file(folder / name).items()
    }


@pytest.mark.parametrize("arguments", MODES.values(), ids=MODES)
def test_replay_gives_the_checkpoints_of_every_mode(
    tmp_path: Path,
    arguments: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    finish(training(tmp_path, **{"max_steps": 4, "save_steps": 2} | arguments))
    monkeypatch.setattr(ObjectiveTrainer, "compute_loss", None)
    for steps in (2, 4):
        folder = tmp_path / f"model-{steps}"
        capsys.readouterr()
        assert replayed(tmp_path, folder, "--steps", steps, "--verify") == 0
        told = capsys.readouterr().out.splitlines()
        assert told[-1] == f"model: {folder}" and told[-3] == f"{steps} steps"
        verified = "verified: bit for bit the weights of the run after step 4"
        assert told[-2] == (verified if steps == 4 else "not verified: " + NO_CHECKSUM)
        assert_same_tensors(saved(folder), saved(tmp_path / f"out/checkpoint-{steps}"))
    before, after = saved(tmp_path / "model-2"), saved(tmp_path / "model-4")
    assert any(not torch.equal(before[name], after[name]) for name in before)


NO_CHECKSUM = "the journal has no checksum of these steps"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    finish(training(folder, max_steps=4, save_steps=2))
    return folder


def test_replay_ends_before_a_damaged_line(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(plain / "out", tmp_path / "out")
    journal = read_journal(plain / "out" / JOURNAL)
    flip_bit(tmp_path / "out" / JOURNAL, journal.ends[2] + 9)
    assert replayed(tmp_path, tmp_path / "shorter") == 1
    steps, damaged, _ = capsys.readouterr().out.splitlines()
    assert steps == "2 steps" and damaged.startswith(f"damaged: {tmp_path / 'out' / JOURNAL} ends")
    assert_same_tensors(weights(tmp_path / "shorter"), weights(plain / "out/checkpoint-2"))


def test_only_verified_and_whole_models_are_saved(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After a failed --verify, or on a full disk, nothing is left, and a repeat is not refused."""
    (tmp_path / "out").mkdir()
    journal = read_journal(plain / "out" / JOURNAL)
    content = (plain / "out" / JOURNAL).read_bytes()[: journal.ends[4]]
    (tmp_path / "out" / JOURNAL).write_bytes(content + line_of(Checksum(4, "0" * 16)))
    before = contents(tmp_path)
    assert replayed(tmp_path, tmp_path / "model", "--verify") == 1
    *_, line = capsys.readouterr().out.splitlines()
    assert line.startswith("different: after step 4 the weights are not, bit for bit, those of the")
    for size in (100, 2_000, 20_000):
        with files_of_at_most(size):
            assert replayed(tmp_path, tmp_path / "model") == 1
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith(f"stopped: {tmp_path / 'model'} could not be written: "), line
        assert contents(tmp_path) == before, size
    assert replayed(tmp_path, tmp_path / "model") == 0
    assert {path.name for path in (tmp_path / "model").iterdir()} >= {"config.json"}
    assert not list((tmp_path / "model").glob(".*"))


def test_what_replay_refuses(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = plain / "out" / JOURNAL
    harmed = tmp_path / "out" / JOURNAL
    harmed.parent.mkdir()
    shutil.copy(journal, harmed)
    flip_bit(harmed, read_journal(journal).ends[1] + 9)
    other = plain / "out/checkpoint-2"
    late = tmp_path / "late.jsonl"
    late.write_bytes(line_of(replace(read_journal(journal).header, step=2)))
    changed = tmp_path / "changed"
    shutil.copytree(small_model().name, changed)
    flip_bit(changed / "model.safetensors", -1)
    new = ["--output_dir", tmp_path / "new"]
    finish(training(tmp_path / "lora", lora=True, max_steps=1, save_steps=9))
    adapter = tmp_path / "lora/out" / JOURNAL
    before = contents(tmp_path)
    for line, words in (
        (["--journal", journal], "give --output_dir"),
        (["--journal", journal, "--output_dir", other], "there is a model"),
        (["--journal", tmp_path / "none", *new], "there is none"),
        (["--journal", plain / "result.json", *new], "is no journal"),
        (["--journal", journal, "--steps", 5, *new], "has 4 steps, not 5; give --steps 4"),
        (["--journal", journal, "--steps", -1, *new], "--steps -1: must be at least 0"),
        (["--journal", harmed, "--steps", 4, *new], "has 1 steps (line 3: its checksum is wrong)"),
        (["--journal", late, *new], "it begins with step 2, behind a checkpoint"),
        (["--journal", journal, "--model_name", other, *new], "not those that the run began"),
        (["--journal", journal, "--model_name", changed, *new], "not those that the run began"),
        (["--journal", adapter, "--model_name", changed, *new], "not those that the run began"),
    ):
        assert replay.main([str(word) for word in line]) == 2, words
        (error,) = capsys.readouterr().err.strip().splitlines()[-1:]
        assert error.startswith("error: ") and words in error, error
    assert contents(tmp_path) == before
    assert small_model().name in read_journal(journal).header.model["name"]


ODD = [
    *(None, "x", [], {}, -1, -1.5, 0, 5, True, 10**9, 10**400, 1e308, 1e-300, math.nan, math.inf),
    *([[]], [None], [[1, 2], [3, 4]], {"a": 1}, "nan", "../.."),
]


def places_in(value: Any, place: tuple = ()) -> Iterator[tuple]:
    """Every key and index in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, each in items:
        yield (*place, key)
        if isinstance(each, dict | list):
            yield from places_in(each, (*place, key))


@pytest.mark.slow
def test_odd_values_in_a_journal_never_end_in_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """200 random changes of a record, whose checksum is right; each is replayed and resumed."""
    course = {"num_dev": 4, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 3}
    best = {"save_strategy": "no", "load_best_model_at_end": True, "zo_eps": "auto"}
    argv = training(tmp_path, **course, **best)
    finish(argv)
    whole = tmp_path / "whole"
    shutil.move(tmp_path / "out", whole)
    records = [json.loads(line) for line in (whole / JOURNAL).read_text().splitlines()]
    draw, file = random.Random(0), tmp_path / "out" / JOURNAL
    for _ in range(200):
        changed = copy.deepcopy(records)
        record = draw.choice(changed)
        *above, last = draw.choice([*places_in(record)])
        for key in above:
            record = record[key]
        record[last] = odd = draw.choice(ODD)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.copytree(whole, tmp_path / "out")
        file.write_bytes(b"".join(map(line_of_values, changed)))
        (tmp_path / "result.json").unlink(missing_ok=True)
        for code in (replay.main(["--journal", str(file), "--verify"]), run.main(argv)):
            assert code in (0, 1, 2), (above, last, odd)
        for line in capsys.readouterr().err.splitlines():
            assert "Traceback" not in line, (above, last, odd)
