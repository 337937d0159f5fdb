"""Evaluation through run.py: zero-shot, in context, generation, and what is written about it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running import (
    MODEL,
    ROOT,
    SAMPLES,
    command,
    contents,
    finish,
    flip_bit,
    refused_line,
    small_model,
    training,
)
from transformers import TrainingArguments

import run
import tasks
from command_line.arguments import parse_arguments
from command_line.settings import changed_settings
from experiment import preparation, results
from experiment.options import TrainedWeights, options_of
from experiment.training import trainers_own
from task_data.loading import load_samples
from utils import InputError


def evaluation(folder: Path, task: str = "SST2", **arguments: Any) -> list[str]:
    """Arguments of an evaluation that writes below ``folder`` only."""
    files = {"result_file": folder / "result.json", "predictions_file": folder / "rows.jsonl"}
    return command(task, **(files | arguments))


def rows_of(folder: Path, name: str = "rows.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def validation_column(name: str) -> list[Any]:
    lines = (SAMPLES / "sst2/validation.jsonl").read_text().splitlines()
    return [json.loads(line)[name] for line in lines]


@pytest.fixture
def shown_demonstrations(monkeypatch: pytest.MonkeyPatch) -> list[list[list[int]]]:
    """Ids of the demonstrations of every eval example, one list a call of ``predict``."""
    calls = []
    predict = results.predict

    def record(
        model: Any, encoder: Any, samples: Any, demonstrations: Any, *rest: Any, **more: Any
    ) -> Any:
        calls.append([[sample.id for sample in shown] for shown in demonstrations])
        return predict(model, encoder, samples, demonstrations, *rest, **more)

    monkeypatch.setattr(results, "predict", record)
    return calls


def permutation(count: int, k: int, seed: int) -> list[int]:
    return np.random.RandomState(seed).permutation(count)[:k].tolist()


def test_zero_shot_result_and_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], shown_demonstrations: list
) -> None:
    result = finish(evaluation(tmp_path, num_eval=20, verbose=True))
    assert result["task"] == "SST2" and result["trainer"] == "none"
    assert result["model"] == str(MODEL)
    rows = rows_of(tmp_path)
    assert [row["id"] for row in rows] == permutation(500, 20, seed=0)
    columns = ["id", "sentence", "prediction", "options", "scores", "correct"]
    assert all(list(row) == columns for row in rows)
    gold, sentences = validation_column("label"), validation_column("sentence")
    for row in rows:
        assert row["options"] == ["terrible", "great"] and row["sentence"] == sentences[row["id"]]
        assert row["prediction"] == row["options"][row["scores"][1] > row["scores"][0]]
        assert row["correct"] == (row["prediction"] == row["options"][gold[row["id"]]])
    accuracy = sum(row["correct"] for row in rows) / 20
    assert result["metric"] == {"accuracy": pytest.approx(accuracy)}
    assert shown_demonstrations == [[[]] * 20]
    first, *shown, last = capsys.readouterr().out.splitlines()
    error = math.sqrt(accuracy * (1 - accuracy) / 19)
    assert first == f"zero-shot accuracy: {accuracy:.4f} ± {error:.4f} (20 examples)"
    assert result["metric_standard_error"] == {"accuracy": pytest.approx(error)}
    assert last == f"result: {tmp_path / 'result.json'}"
    for row in rows[:3]:
        assert any(f"{row['sentence'].strip()} It was" in line for line in shown)
        assert f"  ' great': {row['scores'][1]:.4f}" in shown
    assert sum(line.startswith("--- example") for line in shown) == 3
    libraries = {"torch", "transformers", "accelerate", "peft", "numpy"}
    assert set(result["versions"]) == {"python", *libraries}
    assert result["seconds"] > 0


def test_in_context_sets(tmp_path: Path, shown_demonstrations: list) -> None:
    """Each example has a set of its own, or all of them one, or each of two runs."""
    finish(evaluation(tmp_path / "own", num_train=3))
    one = finish(evaluation(tmp_path / "one", num_train=3, train_set_seed=7))
    two = finish(evaluation(tmp_path / "two", num_train=3, num_train_sets=2))
    seeds = np.random.RandomState(0).randint(0, 10000, 6)
    assert shown_demonstrations == [
        [permutation(1600, 3, seed) for seed in seeds],
        *([permutation(1600, 3, seed)] * 6 for seed in (7, 0, 1)),
    ]
    accuracies = []
    for name, seed in (
        ("own/rows.jsonl", 0),
        ("one/rows.jsonl", 7),
        ("two/rows-set0.jsonl", 0),
        ("two/rows-set1.jsonl", 1),
    ):
        rows = rows_of(tmp_path, name)
        assert [row["id"] for row in rows] == permutation(500, 6, seed)
        accuracies.append(sum(row["correct"] for row in rows) / 6)
    assert one["train_set_seed"] == 7
    assert [run["metric"]["accuracy"] for run in two["runs"]] == pytest.approx(accuracies[2:])
    assert [run["train_set_seed"] for run in two["runs"]] == [0, 1]
    assert two["metric"]["accuracy"] == pytest.approx(sum(accuracies[2:]) / 2)
    assert not (tmp_path / "two/rows.jsonl").exists()


def test_calibration_changes_the_scores(tmp_path: Path) -> None:
    scores = {}
    for name in ("none", "sfc", "icl_sfc"):
        extra = {} if name == "none" else {name: True}
        finish(evaluation(tmp_path / name, num_train=2, train_set_seed=0, **extra))
        scores[name] = [row["scores"] for row in rows_of(tmp_path / name)]
    assert scores["none"] != scores["sfc"] != scores["icl_sfc"] != scores["none"]
    # The prompt without demonstrations is one text: every example loses the same two numbers.
    # (Its options have one token: the mean that is scored without calibration is the sum.)
    differences = np.array(scores["none"]) - np.array(scores["sfc"])
    assert np.ptp(differences, axis=0) == pytest.approx([0, 0], abs=1e-4)
    assert np.abs(differences).min() > 0.01


@pytest.mark.parametrize("task", ["SQuAD", pytest.param("DROP", marks=pytest.mark.slow)])
def test_generation_rows_and_f1(
    tmp_path: Path, task: str, capsys: pytest.CaptureFixture[str]
) -> None:
    result = finish(evaluation(tmp_path, task, max_new_tokens=8, verbose=True))
    rows = rows_of(tmp_path)
    assert all(isinstance(row["prediction"], str) and "scores" not in row for row in rows)
    _, samples = load_samples(tasks.get_task(task), str(SAMPLES))
    drawn = [samples[index] for index in permutation(200, 6, seed=0)]
    if task == "SQuAD":  # its rows have ids
        assert [row["id"] for row in rows] == [f"validation-{sample.id:05}" for sample in drawn]
    for row, sample in zip(rows, drawn, strict=True):
        assert {name: row[name] for name in sample.row if name in row} | {"id": 0} == {
            name: sample.row[name] for name in tasks.get_task(task).template.columns
        } | {"id": 0}
    expected = tasks.get_task(task).score([row["prediction"] for row in rows], drawn)
    assert result["metric"] == expected and set(expected) == {"f1", "em"}
    out = capsys.readouterr().out
    shown = [f"{result['metric_standard_error'][name]:.4f}" for name in ("f1", "em")]
    shown = [f" ± {error}" * (error != "0.0000") for error in shown]
    first = f"zero-shot f1: {expected['f1']:.4f}{shown[0]}, em {expected['em']:.4f}{shown[1]} (6 "
    assert out.startswith(first)
    assert "generated: " in out
    assert result["settings"]["max_new_tokens"] == 8


@pytest.mark.parametrize(
    "names", [("SQuAD", "Copa"), pytest.param(("DROP", "ReCoRD"), marks=pytest.mark.slow)]
)
def test_language_model_training(tmp_path: Path, names: tuple[str, str]) -> None:
    for task in names:
        arguments = {"max_steps": 2, "save_strategy": "no", "no_eval": None, "num_dev": 4}
        arguments |= {"eval_strategy": "steps", "eval_steps": 1, "save_steps": None}
        arguments["max_new_tokens"] = 6 if task in ("SQuAD", "DROP") else None
        argv = training(tmp_path / task, task, train_as_classification=None, **arguments)
        result = finish([*argv, "--predictions_file", str(tmp_path / task / "rows.jsonl")])
        metric = "f1" if task in ("SQuAD", "DROP") else "accuracy"
        assert 0 <= result["metric"][metric] <= 1 and 0 <= result["dev_metric"][metric] <= 1
        assert len(rows_of(tmp_path / task)) == 6
        assert result["steps"] == 2 and result["checkpoint"] is None


def test_zero_shot_before_training_is_the_zero_shot_run(tmp_path: Path) -> None:
    trained = finish(training(tmp_path / "a", eval_before_training=True, no_eval=None))
    alone = finish(evaluation(tmp_path / "b", model_name=small_model().name, train_set_seed=0))
    assert trained["metric_before_training"] == alone["metric"]


def test_result_holds_the_experiment_and_nothing_else(tmp_path: Path) -> None:
    given = {"data_seed": 5, "dataloader_drop_last": True}
    argv = training(tmp_path, num_dev=4, no_eval=None, max_steps=2, **given)
    result = finish(argv)
    assert list(result)[:3] == ["task", "model", "trainer"]
    assert {"metric", "dev_metric", "steps", "train_seconds", "seconds", "versions"} <= set(result)
    assert result["steps"] == 2 and result["train_seconds"] > 0
    settings = result["settings"]
    assert set(settings) >= {
        *("task_name", "model_name", "data_dir", "trainer", "train_as_classification", "num_eval"),
        *("num_train", "num_dev", "train_set_seed", "max_length", "seed"),
        *("load_float16", "per_device_train_batch_size", "learning_rate", "hessian"),
        *("lr_scheduler_type", "warmup_steps", "weight_decay", "max_steps", "zo_eps", "lora"),
        *("hessian_smooth_type", "logging_steps", "save_steps", "output_dir"),
    }
    without_effect = {"lora_r", "num_prefix", "num_train_epochs", "eval_steps", "top_p", "optim"}
    nothing_decided = {"save_on_interrupt", "report_to"}
    assert not set(settings) & (without_effect | nothing_decided)
    assert settings["data_seed"] == 5 and settings["dataloader_drop_last"] is True
    assert settings["output_dir"] == str(tmp_path / "out")
    assert settings["lr_scheduler_type"] == "constant" and settings["weight_decay"] == 0
    with_secret = parse_arguments([*argv, "--push_to_hub", "--hub_token", "hf_secret"])
    assert set(changed_settings(with_secret)) == {*settings, "push_to_hub"}


def test_default_files_are_named_after_the_settings(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # A model that is not there is refused at once.
    argv = ["--task_name", "SST2", "--model_name", "nobody/nothing", "--data_dir", str(SAMPLES)]
    assert run.main(argv) == 2
    out, err = capfd.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert err.startswith("error: --model_name nobody/nothing: ")
    assert contents(tmp_path) == {}
    assert run.main(command(num_eval=2)) == 0
    folder, file = contents(tmp_path)
    assert folder == "result"
    assert re.fullmatch(r"result/SST2-tiny-opt-none-0-shot-seed42-[0-9a-f]{8}\.json", file)
    assert run.main(command(num_eval=2, tag="mine")) == 0
    assert (tmp_path / "result/SST2-tiny-opt-mine.json").is_file()


def test_rows_of_own_files_have_their_ids_and_columns(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("id,title,review,stars,shop\na7,Tea,Warm,good,X\nb9,Cup,Broken,bad,Y\n")
    own = {"task_name": None, "data_dir": None, "validation_file": file, "label_column": "stars"}
    finish(evaluation(tmp_path, **own, num_eval=None, prompt_template="{title}: {review}"))
    rows = {row["id"]: row for row in rows_of(tmp_path)}
    assert rows.keys() == {"a7", "b9"}
    assert (rows["a7"]["title"], rows["a7"]["review"]) == ("Tea", "Warm")
    columns = ["id", "title", "review", "prediction", "options", "scores", "correct"]
    assert list(rows["b9"]) == columns
    assert rows["b9"]["prediction"] in rows["b9"]["options"] == ["bad", "good"]


def test_a_damaged_checkpoint_is_no_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finish(training(tmp_path / "whole", max_steps=2, save_steps=2))
    whole = tmp_path / "whole/out/checkpoint-2"
    finish(training(tmp_path / "lora", max_steps=2, save_steps=2, lora=True, model_name=whole))
    lora = tmp_path / "lora/out/checkpoint-2"
    for file in (lora / "adapter_model.safetensors", whole / "model.safetensors"):
        finish(evaluation(tmp_path / "r", model_name=lora, overwrite_output_dir=True))
        flip_bit(file)
        line = refused_line(evaluation(tmp_path / "new", model_name=lora), capsys, tmp_path)
        assert line.startswith(f"--model_name {file.parent} is a damaged checkpoint: {file.name}")
        further = training(tmp_path / "new", model_name=lora, lora=True)
        assert "is a damaged checkpoint" in refused_line(further, capsys, tmp_path)
        flip_bit(file)
    # A file was changed on purpose.
    (whole / "trainer_state.json").write_text("{}")
    (whole / "manifest.json").unlink()
    finish(evaluation(tmp_path / "r", model_name=lora, overwrite_output_dir=True))


def test_interrupt_while_the_libraries_load_ends_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(
        "import os, time\nprint(os.environ['OMP_WAIT_POLICY'], flush=True)\ntime.sleep(60)\n"
    )
    environment = {n: value for n, value in os.environ.items() if n != "OMP_WAIT_POLICY"}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *command(num_eval=1)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment, "PYTHONPATH": str(tmp_path)},
    )
    assert process.stdout.readline() == "passive\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "") and process.returncode == 130


def test_options_are_frozen_and_typed(tmp_path: Path) -> None:
    options = options_of(parse_arguments(training(tmp_path, lora=True, lora_r=4)))
    assert (options.weights.mode, options.weights.lora_r) == ("lora", 4)
    # Options leave a prompt all the room; so do the prompts of --verbose.
    assert preparation.prepare_encoder(options).max_new_tokens == 0
    # The Trainer gets its own arguments, and nothing of ours.
    own = trainers_own(options.arguments, tmp_path)
    assert type(own) is TrainingArguments and own.max_steps == 6
    assert not {"task", "trainer", "zo_eps", "given"} & set(vars(own))
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.weights.lora_r = 8
    for settings, expected in (
        ({"untie_emb": "--trust_remote_code"}, "must be of type"),
        ({"lora": True, "lora_r": 8.0}, "must be of type"),
        ({"lora": True, "lora_r": -1}, "must be at least 1"),
        ({"num_prefix": 10**12}, "must be lower than|must be below"),
    ):
        with pytest.raises(InputError, match=expected):
            TrainedWeights.of(settings)
