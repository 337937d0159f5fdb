"""Any causal language model through run.py: every family, tokenizers without a start token."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from running import assert_same_tensors, finish, log_of, training, weights
from safetensors.torch import load_file
from tiny_models import (
    FAMILIES,
    of_families,
    tiny_model,
    tiny_tokenizer,
    tokenizer_without_start,
)

# Every way to tune is met by several families, each family by several ways.
MODES: dict[str, dict[str, Any]] = {
    "all weights": {"learning_rate": 1e-3},
    "lora": {"lora": True, "learning_rate": 1e-1, "zo_eps": 1e-2},
    "prefix": {"prefix_tuning": True, "learning_rate": 1e-1, "zo_eps": 1e-2},
    "untied head": {"head_tuning": True, "untie_emb": True, "learning_rate": 1e-2},
}


def save_model(family: str, folder: Path) -> Path:
    """Save a tiny model of a family; Qwen2, GPT-2 and GPT-NeoX begin a text without a token."""
    without_start = family in ("qwen2", "gpt2", "gpt_neox")
    tiny_model(family).save_pretrained(folder)
    (tokenizer_without_start() if without_start else tiny_tokenizer()).save_pretrained(folder)
    return folder


IN_MAKE_TEST = {
    ("opt", "all weights"),
    ("gpt_neox", "all weights"),
    ("gpt_neox", "lora"),
    ("llama", "prefix"),
    ("gpt2", "untied head"),
}


@pytest.mark.parametrize(
    ("family", "mode"),
    [
        pytest.param(*pair, marks=() if pair in IN_MAKE_TEST else pytest.mark.slow)
        for pair in itertools.product(FAMILIES, MODES)
    ],
)
def test_training_resumes_and_evaluates(tmp_path: Path, family: str, mode: str) -> None:
    arguments = MODES[mode] | {
        "model_name": save_model(family, tmp_path / "model"),
        "no_eval": None,
        "num_eval": 4,
        "predictions_file": tmp_path / "rows.jsonl",
    }
    whole = finish(training(tmp_path / "whole", **arguments))
    rows = (tmp_path / "rows.jsonl").read_text()
    shutil.copytree(tmp_path / "whole/out/checkpoint-3", tmp_path / "parted/out/checkpoint-3")
    torch.manual_seed(12345)  # whatever state the process is in
    arguments |= {"predictions_file": tmp_path / "parted.jsonl"}
    parted = finish(training(tmp_path / "parted", **arguments))
    assert parted["resumed_from"].endswith("checkpoint-3")
    assert parted["metric"] == whole["metric"]
    assert (tmp_path / "parted.jsonl").read_text() == rows
    first, second = (tmp_path / name / "out" / "checkpoint-6" for name in ("whole", "parted"))
    assert log_of(first, "loss") == log_of(second, "loss")
    if mode in ("lora", "prefix"):
        names = [folder / "adapter_model.safetensors" for folder in (first, second)]
        assert_same_tensors(load_file(names[0]), load_file(names[1]))
    else:
        assert_same_tensors(weights(first), weights(second))


@of_families
def test_first_order_training_and_generation(tmp_path: Path, family: str) -> None:
    argv = training(
        *(tmp_path, "SQuAD"),
        model_name=save_model(family, tmp_path / "model"),
        trainer="regular",
        **dict.fromkeys(("hessian_smooth_type", "train_as_classification", "no_eval")),
        **{"learning_rate": 1e-2, "max_steps": 3, "max_new_tokens": 4, "num_eval": 4},
        **{"lr_scheduler_type": "linear", "load_best_model_at_end": True, "num_dev": 4},
        **{"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1},
    )
    result = finish(argv)
    assert set(result["metric"]) == {"f1", "em"}
    losses = log_of(tmp_path / "out" / "checkpoint-3", "eval_loss")
    assert losses[-1] < losses[0]


@of_families
def test_linear_probing(tmp_path: Path, family: str) -> None:
    argv = training(
        tmp_path,
        model_name=save_model(family, tmp_path / "model"),
        trainer="regular",
        linear_probing=True,
        **dict.fromkeys(("hessian_smooth_type", "train_as_classification", "no_eval")),
        **dict.fromkeys(("max_steps", "learning_rate", "save_steps", "logging_steps")),
        per_device_train_batch_size=None,
    )
    probe = finish(argv)["linear_probe"]
    assert (probe["tokens"], probe["rows"], probe["converged"]) == (2, 12, True)
