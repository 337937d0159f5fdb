"""Two processes with a part of the weights each train and evaluate as one with all of them.

Loading the libraries takes longer than all of these runs: one launch does them one after another.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from running import (
    assert_same_tensors,
    command,
    finish,
    keep_steps,
    launch_runs,
    log_of,
    training,
    weights,
)
from tiny_models import tiny_model, tiny_tokenizer

import replay
import run
from language_model.loading import load_model
from training.journal import FILE, Checksum, read_journal
from utils import InputError

# One process of pytest-xdist runs all of this module.
pytestmark = pytest.mark.xdist_group("tensor parallel")

NOTING = """
train = trainer.ObjectiveTrainer.train

def train_and_note(self, **arguments):
    train(self, **arguments)
    torch.save(self.model.state_dict(), f"rank{os.environ['RANK']}.pt")

trainer.ObjectiveTrainer.train = train_and_note
"""
# The projected gradient and the curvature magnify the rounding of the losses, by 1/2μ and 1/2μ²:
# hence a large μ and a small α.
SHARED = {"zo_eps": 1e-2, "hessian_smooth_type": "constant1e-4", "check_every": 2}
LLAMA = SHARED | {
    **{"num_dev": 5, "eval_strategy": "steps", "eval_steps": 3, "eval_metric": True},
    **{"no_eval": None, "save_model": True, "gradient_accumulation_steps": 2, "num_train": 9},
}
# Tied weights; the best step by a replay, in parts too.
QWEN2 = SHARED | {
    **{"hessian": "lowrank", "zo_num_samples": 2, "save_strategy": "no", "save_model": True},
    **{"load_best_model_at_end": True, "num_dev": 4, "eval_strategy": "steps", "eval_steps": 1},
    "learning_rate": 3e-3,
}
OPT = SHARED | {"load_bfloat16": True, "zo_perturbation": "layerwise", "learning_rate": "auto"}
FAMILIES = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "opt": {"dropout": 0.0},
    "gpt2": {},
    "gpt_neox": {},
    "gpt_oss": {},
    "deepseek_v2": {},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model of each family."""
    folder = tmp_path_factory.mktemp("models")
    for family, overrides in FAMILIES.items():
        tiny_model(family, **overrides).save_pretrained(folder / family)
        tiny_tokenizer().save_pretrained(folder / family)
    return folder


def evaluation(model: Path, folder: Path) -> list[str]:
    """A command line of generated answers, with demonstrations."""
    return command(
        "SQuAD",
        **{"model_name": model, "num_eval": 5, "num_train": 2, "train_set_seed": 0},
        **{"per_device_eval_batch_size": 3, "max_new_tokens": 6},
        **{"result_file": folder / "result.json", "predictions_file": folder / "answers.jsonl"},
    )


def cut_short(whole: Path, parted: Path) -> None:
    """Copy a run's checkpoint of three steps, and of its journal four."""
    keep_steps(whole, parted, 4)
    shutil.copytree(whole / "out/checkpoint-3", parted / "out/checkpoint-3")


@pytest.fixture(scope="module")
def in_parts(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Path:
    """The folder of all runs, each in one of its own, with what they printed."""
    folder = tmp_path_factory.mktemp("parts")
    folders = {name: folder / name for name in ("llama", "resumed", "qwen2", "opt", "answers")}
    for each in folders.values():
        each.mkdir()
    finish(training(folder / "alone", model_name=models / "llama", **LLAMA))
    cut_short(folder / "alone", folders["resumed"])
    part = {"tensor_parallel": True}
    runs = [
        ("llama", training(folders["llama"], model_name=models / "llama", **LLAMA, **part)),
        ("resumed", training(folders["resumed"], model_name=models / "llama", **LLAMA, **part)),
        ("qwen2", training(folders["qwen2"], model_name=models / "qwen2", **QWEN2, **part)),
        ("opt", training(folders["opt"], model_name=models / "opt", **OPT, **part)),
        ("answers", [*evaluation(models / "llama", folders["answers"]), "--tensor_parallel"]),
    ]
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    launch_runs(folder, launcher, NOTING, [(folders[name], line) for name, line in runs])
    return folder


def optimizer_state(checkpoint: Path) -> dict[tuple[int, str], torch.Tensor]:
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    return {(n, name): tensor for n, of_one in saved.items() for name, tensor in of_one.items()}


def assert_nearly_the_same(one: Path, other: Path) -> None:
    """Files of a whole model, with the same weights, h and losses up to rounding."""
    mine, its = weights(one), weights(other)
    assert mine.keys() == its.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(its[name], tensor, atol=2e-6, rtol=0)
    mine, its = optimizer_state(one), optimizer_state(other)
    assert mine.keys() == its.keys() and mine
    for key, tensor in mine.items():
        torch.testing.assert_close(its[key], tensor, atol=1e-3, rtol=1e-3)
    for name in ("loss", "eval_loss", "hessian_mean", "hessian_max"):
        assert log_of(other, name) == pytest.approx(log_of(one, name), rel=1e-4)
    assert log_of(other, "eval_accuracy") == log_of(one, "eval_accuracy")


def test_parts_train_as_the_whole(in_parts: Path) -> None:
    alone, parts = in_parts / "alone", in_parts / "llama"
    for step in (3, 6):
        assert_nearly_the_same(*(each / f"out/checkpoint-{step}" for each in (alone, parts)))
    ranks = [torch.load(parts / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    saved = weights(parts / "out")
    cut = {"q_proj": 0, "o_proj": 1, "down_proj": 1, "embed_tokens": 0, "lm_head": 0, "norm": None}
    for name, tensor in saved.items():
        pieces = [rank[name] for rank in ranks]
        dimension = next((d for key, d in cut.items() if key in name), 0)
        if dimension is None:
            assert torch.equal(pieces[0], pieces[1])
            assert torch.equal(pieces[0], tensor)
        else:
            assert torch.equal(torch.cat(pieces, dimension), tensor), name
            assert pieces[0].numel() == tensor.numel() / 2
    results = [json.loads((each / "result.json").read_text()) for each in (alone, parts)]
    assert results[0]["trained_parameters"] == sum(t.numel() for t in saved.values())
    for name in ("metric", "trained_parameters", "forward_passes", "dev_metric"):
        assert results[0][name] == results[1][name]
    assert (parts / "printed.txt").read_text().count("test accuracy: ") == 1
    # The first process sends a loss of four bytes for each forward pass, and the first one again.
    first, *others = log_of(parts / "out/checkpoint-6", "exchanged_bytes_per_step")
    assert first == 4 * 7 and set(others) <= {4 * 6, 4 * 3}


def test_journal_of_parts_is_that_of_the_whole(in_parts: Path, tmp_path: Path) -> None:
    journals = [read_journal(in_parts / name / "out" / FILE) for name in ("alone", "llama")]
    assert journals[0].header == journals[1].header
    sums = [
        [record.step for record in each.segments[0] if isinstance(record, Checksum)]
        for each in journals
    ]
    assert sums[0] == sums[1] == [2, 4, 6]
    # The losses are all: from them one process makes the same model, bit for bit.
    made = str(tmp_path / "made")
    line = ["--journal", str(journals[1].path), "--output_dir", made, "--verify"]
    assert replay.main(line) == 0
    assert_same_tensors(weights(tmp_path / "made"), weights(in_parts / "llama/out"))


def test_run_goes_on_with_parts_and_without(in_parts: Path, tmp_path: Path, models: Path) -> None:
    printed = (in_parts / "resumed/printed.txt").read_text()
    assert "going on from " in printed and "checkpoint-3, and 1 steps of " in printed
    last = "out/checkpoint-6"
    assert_nearly_the_same(in_parts / "alone" / last, in_parts / "resumed" / last)
    cut_short(in_parts / "llama", tmp_path)
    result = finish(training(tmp_path, model_name=models / "llama", **LLAMA))
    assert result["resumed_from"] == str(tmp_path / "out/checkpoint-3")
    assert_nearly_the_same(in_parts / "llama" / last, tmp_path / last)


def test_low_rank_h_and_the_best_step(in_parts: Path, tmp_path: Path, models: Path) -> None:
    result = finish(training(tmp_path, model_name=models / "qwen2", **QWEN2))
    of_parts = json.loads((in_parts / "qwen2/result.json").read_text())
    assert of_parts["best_step"] == result["best_step"] < 6
    for name, tensor in weights(tmp_path / "out").items():
        torch.testing.assert_close(weights(in_parts / "qwen2/out")[name], tensor, atol=1e-5, rtol=0)


def test_half_precision_rounds_as_the_whole(in_parts: Path, tmp_path: Path) -> None:
    """Losses differ by rounding, but what is made of them is the same, bit for bit."""
    file = str(in_parts / "opt/out" / FILE)
    assert replay.main(["--journal", file, "--output_dir", str(tmp_path / "made")]) == 0
    made = weights(tmp_path / "made")
    assert made["model.decoder.layers.0.fc1.weight"].dtype == torch.bfloat16
    assert_same_tensors(made, weights(in_parts / "opt/out/checkpoint-6"))


def test_parts_write_the_same_answers(in_parts: Path, tmp_path: Path, models: Path) -> None:
    one = finish(evaluation(models / "llama", tmp_path))
    two = json.loads((in_parts / "answers/result.json").read_text())
    assert two["metric"] == one["metric"]
    rows = [(folder / "answers.jsonl").read_text() for folder in (tmp_path, in_parts / "answers")]
    assert rows[0] == rows[1] and rows[0].count("\n") == 5


REFUSED = {
    "regular": ({"trainer": "regular"}, "--trainer zo"),
    "lora": ({"lora": True}, "--lora: its weights are not cut"),
    "prefix": ({"prefix_tuning": True}, "--prefix_tuning: its weights are not cut"),
    "head alone": ({"head_tuning": True}, "--head_tuning: it does not know the parts"),
    "head copied": ({"untie_emb": True}, "--untie_emb: the head"),
    "quantised": ({"load_int8": True, "lora": True}, "--lora: its weights are not cut"),
    "drawn texts": (
        {"task": "SQuAD", "train_as_classification": None, "non_diff": True, "sampling": True},
        "--sampling: processes of --tensor_parallel have to write the same texts; leave it out",
    ),
    "directions": ({"zo_parallel": "directions", "zo_num_samples": 2}, "--zo_parallel directions"),
    "examples": ({"zo_directions": "example"}, "--zo_directions example"),
    "alone": ({}, "--tensor_parallel needs processes"),
}


@pytest.mark.parametrize("added, said", REFUSED.values(), ids=REFUSED)
def test_what_does_not_go_together_is_refused(
    added: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run.main(training(tmp_path, tensor_parallel=True, **added)) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "family, processes, said",
    [
        ("gpt2", 2, "GPT2LMHeadModel .* has no plan in transformers"),
        ("gpt_oss", 2, "GptOssForCausalLM .* has no plan in transformers"),
        ("deepseek_v2", 2, "is cut in a way that is not known here .mla_kv_a_proj"),
        ("llama", 4, "4 processes cannot share its 2 heads .num_key_value_heads. evenly"),
        ("opt", 3, "3 processes cannot share its 4 heads"),
    ],
)
def test_models_that_cannot_be_cut_are_refused(
    models: Path, family: str, processes: int, said: str
) -> None:
    with pytest.raises(InputError, match=said):
        load_model(str(models / family), torch.float32, parts=processes)
