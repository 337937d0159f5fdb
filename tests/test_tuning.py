"""Every tuning mode through run.py: what is trained, saved, resumed and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from running import (
    MODEL,
    SAMPLES,
    assert_same_tensors,
    contents,
    finish,
    let_every_dev_loss_be_worse,
    log_of,
    refused_line,
    small_model,
    training,
    weights,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import run
from language_model.encoding import Encoder
from language_model.scoring import score_options
from metrics import f1, mean
from task_data.loading import load_samples
from task_data.sampling import permutation_subset
from tasks import get_task

MODES: dict[str, dict[str, Any]] = {
    "lora": {"lora": True},
    "prefix": {"prefix_tuning": True},
    "reparameterised prefix": {"prefix_tuning": True, "no_reparam": "False"},
    "prefix from noise": {"prefix_tuning": True, "prefix_init_by_real_act": "False"},
    "head": {"head_tuning": True},
    "untied head": {"head_tuning": True, "untie_emb": True},
    "untied": {"untie_emb": True},
}
TRAINERS: dict[str, dict[str, Any]] = {
    "zo": {"learning_rate": 1e-2, "zo_eps": 1e-2},
    "regular": {"trainer": "regular", "learning_rate": 1e-3, "lr_scheduler_type": "constant"},
}
# A layer of the small model has 2 projections of 32 x 32, 2 layers in all.
TRAINED_PARAMETERS = {
    "lora": 2 * 2 * 8 * (32 + 32),
    "prefix": 5 * 2 * 2 * 32,
    "reparameterised prefix": 5 * 32 + 512 * 33 + 2 * 2 * 32 * 513,
    "prefix from noise": 5 * 2 * 2 * 32,
    "head": 1536 * 32,
    "untied head": 1536 * 32,
}


def saved(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor in the safetensors files of a checkpoint."""
    files = sorted(folder.glob("*.safetensors"))
    return {f"{file.name} {k}": v for file in files for k, v in load_file(file).items()}


# ------------------------------------------------------------------------- training and resuming


@pytest.mark.parametrize(
    ("mode", "trainer"),
    [
        ("lora", "zo"),
        ("prefix", "zo"),
        ("reparameterised prefix", "regular"),
        ("untied head", "regular"),
        *(
            pytest.param(mode, trainer, marks=pytest.mark.slow)
            for mode in MODES
            for trainer in TRAINERS
        ),
    ],
)
def test_resumed_run_equals_uninterrupted_one(tmp_path: Path, mode: str, trainer: str) -> None:
    arguments = MODES[mode] | TRAINERS[trainer]
    result = finish(training(tmp_path / "whole", **arguments))
    number = TRAINED_PARAMETERS.get(mode, result["trained_parameters"])
    assert result["trained_parameters"] == number
    finish(training(tmp_path / "parted", max_steps=3, **arguments))
    torch.manual_seed(12345)  # whatever state the process is in
    resumed = finish(training(tmp_path / "parted", **arguments))
    assert resumed["resumed_from"] and resumed["checkpoint"].endswith("checkpoint-6")
    folders = [tmp_path / name / "out" / "checkpoint-6" for name in ("whole", "parted")]
    assert_same_tensors(*(saved(folder) for folder in folders))
    states = [torch.load(f / "optimizer.pt", weights_only=True)["state"] for f in folders]
    for key, state in states[0].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][key][name])), name
    assert log_of(folders[0], "loss") == log_of(folders[1], "loss")
    assert len(set(log_of(folders[0], "loss"))) > 1
    # Only what is trained is in the optimizer: h, or AdamW's two moments.
    tensors = [value for one in states[0].values() for value in one.values() if value.dim()]
    assert sum(map(torch.numel, tensors)) == (1 if trainer == "zo" else 2) * number
    if mode == "lora" or "prefix" in mode:
        assert not (folders[0] / "model.safetensors").exists()
        config = json.loads((folders[0] / "adapter_config.json").read_text())
        assert config["peft_type"] == ("LORA" if mode == "lora" else "PREFIX_TUNING")
        assert config["base_model_name_or_path"] == small_model().name


@pytest.mark.parametrize(
    ("mode", "task"),
    [
        ("lora", "SST2"),
        ("reparameterised prefix", "SQuAD"),
        *(
            pytest.param(mode, task, marks=pytest.mark.slow)
            for mode, task in (("prefix", "SST2"), ("prefix", "SQuAD"), ("lora", "SQuAD"))
        ),
    ],
)
def test_peft_alone_predicts_the_same(tmp_path: Path, mode: str, task: str) -> None:
    extra: dict = {"train_as_classification": True}
    if task == "SQuAD":
        extra = {"train_as_classification": None, "max_new_tokens": 6}
    argv = training(
        *(tmp_path, task),
        **MODES[mode] | TRAINERS["regular"] | extra,
        save_model=True,
        no_eval=None,
        train_set_seed=0,
        predictions_file=tmp_path / "rows.jsonl",
    )
    result = finish(argv)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    base = AutoModelForCausalLM.from_pretrained(small_model().name)
    model = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    encoder = Encoder(get_task(task), tokenizer, 1000, 6)
    samples = permutation_subset(load_samples(get_task(task), str(SAMPLES))[1], 6, 0)
    assert [row["id"] for row in rows] == [each.row.get("id", each.id) for each in samples]
    if task == "SST2":
        for row, sample in zip(rows, samples, strict=True):
            for found, option in zip(row["scores"], encoder.options(sample).options, strict=True):
                text = torch.tensor([option.tokens])
                logits = model(input_ids=text, attention_mask=torch.ones_like(text)).logits[0]
                expected = logits[-2].log_softmax(-1)[option.tokens[-1]].item()
                assert found == pytest.approx(expected, abs=1e-4)
        return
    newline = tokenizer.encode("\n", add_special_tokens=False)[-1]
    texts = []
    for sample in samples:
        prompt = torch.tensor([encoder.prompt(sample)])
        output = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=[newline, tokenizer.eos_token_id],
        )
        texts.append(tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True))
    assert [row["prediction"] for row in rows] == [text.strip() for text in texts]
    golds = [sample.correct for sample in samples]
    assert result["metric"]["f1"] == pytest.approx(mean([*map(f1, texts, golds)]))


def test_an_untied_head_is_loaded_untied(tmp_path: Path) -> None:
    arguments = MODES["untied head"] | TRAINERS["regular"]
    finish(training(tmp_path, **arguments, save_model=True))
    before, after = weights(Path(small_model().name)), weights(tmp_path / "out")
    embeddings = next(name for name in before if name.endswith("embed_tokens.weight"))
    assert torch.equal(after[embeddings], before[embeddings])
    assert not torch.equal(after["lm_head.weight"], before[embeddings])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model.lm_head.weight, after["lm_head.weight"])
    assert torch.equal(model.get_input_embeddings().weight, before[embeddings])


def test_a_tied_head_trains_the_embeddings_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finish(training(tmp_path, **MODES["head"], **TRAINERS["regular"]))
    assert "the head is tied" in capsys.readouterr().out
    before, after = weights(Path(small_model().name)), weights(tmp_path / "out" / "checkpoint-6")
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert [name.rpartition(".embed")[1] for name in changed] == [".embed"]


def test_the_best_adapter_is_reported_and_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for prefix-tuning, whose best checkpoint the Trainer alone would not load."""
    let_every_dev_loss_be_worse(monkeypatch)
    for mode in ("lora", "reparameterised prefix"):
        folder = tmp_path / mode
        argv = training(
            folder,
            **MODES[mode] | TRAINERS["regular"],
            **{"num_dev": 8, "eval_strategy": "steps", "eval_steps": 3, "save_steps": 3},
            load_best_model_at_end=True,
            save_model=True,
        )
        assert finish(argv)["checkpoint"].endswith("checkpoint-3")
        assert_same_tensors(saved(folder / "out"), saved(folder / "out" / "checkpoint-3"))


def test_linear_probing_learns_and_saves(tmp_path: Path) -> None:
    argv = training(
        tmp_path,
        trainer="regular",
        model_name=MODEL,
        linear_probing=True,
        num_train=256,
        num_eval=100,
        no_eval=None,
        eval_before_training=True,
        save_model=True,
        **dict.fromkeys(("train_as_classification", "max_steps", "learning_rate")),
        **dict.fromkeys(("per_device_train_batch_size", "logging_steps", "save_steps")),
    )
    result = finish(argv)
    assert result["metric"]["accuracy"] > result["metric_before_training"]["accuracy"] + 0.1
    assert result["trained_parameters"] == 2 * 128
    assert result["linear_probe"]["tokens"] == 2 and result["linear_probe"]["rows"] == 256
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    samples = permutation_subset(load_samples(get_task("SST2"), str(SAMPLES))[1], 100, 0)
    encoder = Encoder(get_task("SST2"), tokenizer, 1024)
    encoded = [encoder.options(sample) for sample in samples]
    scores = score_options(model, encoded, 16, "")
    pairs = zip(scores, encoded, strict=True)
    right = [(option[1] > option[0]) == bool(example.correct) for option, example in pairs]
    assert sum(right) / 100 == pytest.approx(result["metric"]["accuracy"])


# ---------------------------------------------------------------------- objectives without gradient


def test_training_without_a_gradient(tmp_path: Path) -> None:
    least = {}
    for task, mode in (("SST2", {}), ("SQuAD", MODES["lora"]), ("DROP", MODES["prefix"])):
        argv = training(
            *(tmp_path / task, task),
            **mode,
            **TRAINERS["zo"] | {"zo_eps": 1e-1, "train_as_classification": None, "max_steps": 2},
            **{"num_dev": 4, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 2},
            non_diff=True,
            max_new_tokens=None if task == "SST2" else 4,
        )
        finish(argv)
        checkpoint = tmp_path / task / "out" / "checkpoint-2"
        losses = log_of(checkpoint, "loss") + log_of(checkpoint, "eval_loss")
        assert all(-1 <= loss <= 0 for loss in losses), task
        least[task] = min(losses)
    assert least["SST2"] < 0


# --------------------------------------------------------------------------------------- bad input


BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "lora and prefix": (
        {"lora": True, "prefix_tuning": True},
        ["--lora and --prefix_tuning exclude each other"],
    ),
    "prefix too long": (
        {"prefix_tuning": True, "num_prefix": 1023},
        ["--num_prefix 1023", "--max_length 1024"],
    ),
    "two objectives": ({"non_diff": True}, ["--train_as_classification", "--non_diff"]),
    "prefix without activations": (
        {
            "prefix_tuning": True,
            "gradient_checkpointing": True,
            "trainer": "regular",
            "hessian_smooth_type": None,
        },
        ["--gradient_checkpointing: ", "--prefix_tuning"],
    ),
}


# The name before transformers 5.23 is refused by the same line.
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failures = {}
    for case, (arguments, pieces) in BAD.items():
        line = refused_line(training(tmp_path, **arguments), capsys, tmp_path)
        if missing := [piece for piece in pieces if piece not in line]:
            failures[case] = (line, missing)
    assert not failures and contents(tmp_path) == {}


def test_a_checkpoint_of_another_mode_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, first, second, piece in (
        ("rank", {"lora": True}, {"lora": True, "lora_r": 4}, "--lora_r 8, not 4"),
        ("mode", {}, {"head_tuning": True}, "--head_tuning False, not True"),
    ):
        finish(training(tmp_path / folder, **first, max_steps=3))
        again = training(tmp_path / folder, **second)
        assert piece in refused_line(again, capsys, tmp_path / folder)


def test_a_damaged_adapter_is_passed_over_and_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    finish(training(tmp_path, lora=True, max_steps=3))
    checkpoint = tmp_path / "out" / "checkpoint-3"
    file = checkpoint / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert run.main(training(tmp_path, lora=True, resume_from_checkpoint=checkpoint)) == 2
    assert "adapter_model.safetensors is not what was written" in capsys.readouterr().err
    result = finish(training(tmp_path, lora=True))
    # What the journal holds of the first three steps is not lost with the checkpoint.
    assert result["resumed_from"].endswith("journal.jsonl") and result["steps"] == 6
    assert any("is passed over: adapter_model.safetensors" in line for line in caplog.messages)
