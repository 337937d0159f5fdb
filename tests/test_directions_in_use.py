"""--zo_directions example: losses of examples, packed rows, generated text, and whole runs."""

from __future__ import annotations

import copy
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle_hizoo import read_noise, read_signs
from running import (
    assert_same_checkpoint,
    assert_same_tensors,
    finish,
    log_of,
    training,
    weights,
)
from test_families import save_model
from test_journal import NO_CHECKPOINTS
from test_objectives import encoder
from test_scoring import samples_of
from tiny_models import newline_writing_model, tiny_model, tiny_tokenizer
from torch import nn

import hizoo
import run
from example_directions import ExampleDirections
from hizoo import ExampleNoise, HiZOO
from language_model import objectives, packing
from language_model.adapters import add_lora
from language_model.generation import GenerationSettings
from training.journal import FILE, read_journal

BY_EXAMPLE = {
    "classification": objectives.classification_loss,
    "language model": objectives.language_model_loss,
    "accuracy": objectives.negative_accuracy,
}


def examples_of(task: str, name: str, count: int) -> list[Any]:
    of_task = encoder(task)
    encode = of_task.correct_option if name == "language model" else of_task.options
    return [encode(sample) for sample in samples_of(task)[1][:count]]


@pytest.mark.parametrize("name", BY_EXAMPLE)
@pytest.mark.parametrize("task", ["SST2", "Copa", "ReCoRD"])
def test_the_mean_of_the_examples_losses_is_the_loss(task: str, name: str) -> None:
    model, objective = tiny_model("llama"), BY_EXAMPLE[name]
    batch = packing.collate(examples_of(task, name, 6))
    with torch.no_grad():
        whole = objective(model, batch)
        losses = objectives.losses_of_examples(objective)(model, batch)
    assert losses.shape == (6,)
    assert losses.mean().item() == pytest.approx(whole.item(), abs=1e-6)
    if name == "classification":
        alone = [packing.collate([example]) for example in examples_of(task, name, 6)]
        expected = torch.stack([objective(model, batch) for batch in alone])
        assert torch.allclose(losses, expected, atol=1e-5)


def optimizer_of(model: nn.Module) -> HiZOO:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = HiZOO(trained, eps=1e-2, directions=ExampleDirections(model))
    optimizer._prepare()
    return optimizer


def perturbed(model: nn.Module) -> AbstractContextManager[Any]:
    """A context in which examples have directions of their own."""
    optimizer = optimizer_of(model)
    return optimizer.directions.perturbed(ExampleNoise(optimizer, 0, 1.0))


@pytest.mark.parametrize("family", ["opt", "gpt2", "llama", "gpt_neox", "gemma2"])
@pytest.mark.parametrize("task", ["SST2", "Copa"])
def test_packed_rows_are_those_of_examples_alone(
    family: str, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several examples in a row, options behind a shared prompt, or each option in its own row."""
    model = tiny_model(family)
    losses = objectives.classification_losses
    examples = examples_of(task, "classification", 5)
    together, apart = (packing.collate(examples, share_prompt=share) for share in (True, False))
    assert len(together["input_ids"]) < 5 and together["token_examples"].unique().numel() == 5
    with torch.no_grad(), perturbed(model):
        packed, unpacked = losses(model, together), losses(model, apart)
        monkeypatch.setattr(packing, "ROW_TOKENS", 1)
        in_rows = losses(model, packing.collate(examples))
    with torch.no_grad():
        assert not torch.allclose(packed, losses(model, together), atol=1e-3)
    assert torch.allclose(packed, unpacked, atol=1e-4)
    assert torch.allclose(packed, in_rows, atol=1e-4)


def explicit(model: nn.Module, count: int) -> list[nn.Module]:
    """A model with an example's own weights, for each of some examples."""
    optimizer, models = optimizer_of(model), []
    for signs in read_signs(optimizer, count):
        own = copy.deepcopy(model)
        trained = [parameter for parameter in own.parameters() if parameter.requires_grad]
        for parameter, u, sign in zip(trained, read_noise(optimizer), signs, strict=True):
            parameter.data += (1e-2 * u * sign).to(parameter.dtype)
        models.append(own)
    return models


@pytest.mark.parametrize("beams", [1, 2])
def test_generated_text_is_that_of_the_examples_own_weights(beams: int) -> None:
    model, tokenizer = newline_writing_model("llama"), tiny_tokenizer()
    prompts = [encoder("SQuAD").prompt(sample) for sample in samples_of("SQuAD")[1][:4]]
    settings = GenerationSettings(max_new_tokens=6, num_beams=beams)

    def write(own: nn.Module, of: list[Any]) -> list[str]:
        return objectives.generate(own, tokenizer, of, settings, len(of), None)

    with torch.no_grad(), perturbed(model):
        found = write(model, prompts)
    models = explicit(model, 4)
    assert found == [write(own, [p])[0] for own, p in zip(models, prompts, strict=True)]
    assert found != write(model, prompts)


def test_lora_of_a_packed_batch() -> None:
    model = add_lora(tiny_model("gpt2"), 4, 8).double()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    batch = packing.collate(examples_of("SST2", "classification", 4))
    with torch.no_grad(), perturbed(model):
        found = objectives.classification_losses(model, batch)
    for number, own in enumerate(explicit(model, 4)):
        with torch.no_grad():
            losses = objectives.classification_losses(own, batch)
        assert losses[number].item() == pytest.approx(found[number].item(), abs=1e-6)


# ---- run.py

MODES: dict[str, dict[str, Any]] = {
    "classification": {},
    "language model": {"train_as_classification": None, "gradient_accumulation_steps": 2},
    "accuracy": {"train_as_classification": None, "non_diff": True, "zo_eps": 3e-1},
    "bfloat16": {"load_bfloat16": True, "zo_eps": 3e-2, "hessian": "lowrank"},
    "normalized": {"zo_normalize": True, "zo_clip": 2, "zo_num_samples": 2},
    "lora": {"lora": True, "learning_rate": 1e-1, "zo_eps": 1e-2},
    "untied head": {"head_tuning": True, "untie_emb": True, "learning_rate": 1e-2},
    "no learning rate": {"learning_rate": "auto"},
}


@pytest.mark.parametrize("arguments", MODES.values(), ids=MODES)
def test_every_mode_trains_and_resumes_bit_for_bit(
    tmp_path: Path, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hizoo, "CACHED_TILE_ELEMENTS", 1 << 14)  # so that the model is cut
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    few = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 3}
    few |= {"zo_directions": "example"}
    result = finish(training(whole, **few | arguments))
    assert result["settings"]["zo_directions"] == "example"
    assert result["settings"]["zo_perturbation"] is None
    shutil.copytree(whole / "out/checkpoint-2", parted / "out/checkpoint-2")
    finish(training(parted, **few | arguments))
    last = [folder / "out/checkpoint-4" for folder in (whole, parted)]
    assert log_of(last[0], "loss") == log_of(last[1], "loss")
    if "lora" not in arguments:
        assert_same_checkpoint(*last)
        before, after = weights(whole / "out/checkpoint-2"), weights(last[0])
        assert any(not torch.equal(before[name], after[name]) for name in before)


def test_run_goes_on_from_its_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the losses of every example in place of forward passes."""
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    arguments = {**NO_CHECKPOINTS, "save_model": True, "max_steps": 4}
    arguments |= {"zo_directions": "example", "zo_normalize": True}
    finish(training(whole, **arguments))
    (parted / "out").mkdir(parents=True)
    records = read_journal(whole / "out" / FILE)
    (parted / "out" / FILE).write_bytes(records.path.read_bytes()[: records.end_of(2)])
    passes: list[int] = []
    losses = objectives.classification_losses
    monkeypatch.setitem(
        objectives.BY_EXAMPLE,
        objectives.classification_loss,
        lambda *batch: passes.append(0) or losses(*batch),
    )
    result = finish(training(parted, **arguments))
    assert result["resumed_from"] == str(parted / "out" / FILE)
    # Two steps of three passes; before them, two that try whether the model allows it.
    assert len(passes) == 8
    assert_same_tensors(weights(whole / "out"), weights(parted / "out"))


def test_generation_trains(tmp_path: Path) -> None:
    arguments = {"train_as_classification": None, "non_diff": True, "max_new_tokens": 4}
    arguments |= {"num_train": 3, "max_steps": 1, "save_steps": 1, "zo_eps": 1e-1}
    result = finish(
        training(
            tmp_path, "SQuAD", zo_directions="example", per_device_train_batch_size=2, **arguments
        )
    )
    assert result["steps"] == 1


def test_a_reward_has_no_losses_of_the_examples(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    reward = {"reward": "examples/rewards/praise.py:praise", "train_as_classification": None}
    arguments = {"task_name": None, "data_dir": None, "max_new_tokens": 4} | reward
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "The film was"}\n' * 12)
    argv = training(tmp_path, zo_directions="example", train_file=file, **arguments)
    assert run.main([*argv, "--validation_file", str(file)]) == 2
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last == (
        "error: --zo_directions example: NegativeReward has no losses of the examples; use shared"
    )


REFUSED = {
    "prefix": (
        {"prefix_tuning": True},
        "all examples of a row share the keys and values of --prefix_tuning",
    ),
    "layers": ({"zo_perturbation": "layerwise"}, "with --zo_directions example no weight is"),
    "normalize alone": (
        {"zo_directions": None, "zo_normalize": True},
        "add --zo_directions example",
    ),
    "normalize without a rate": (
        {"zo_normalize": True, "learning_rate": "auto"},
        "give a learning rate",
    ),
    "one example": (
        {"zo_normalize": True, "per_device_train_batch_size": 1},
        "a single example has no standard deviation",
    ),
}


@pytest.mark.parametrize(("arguments", "line"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_go_together(
    tmp_path: Path, capfd: pytest.CaptureFixture, arguments: dict[str, Any], line: str
) -> None:
    assert run.main(training(tmp_path, **{"zo_directions": "example"} | arguments)) == 2
    assert line in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["lfm2", "mamba"])
def test_a_module_that_is_not_known_is_refused_by_name(
    tmp_path: Path, capfd: pytest.CaptureFixture, family: str
) -> None:
    arguments = {"model_name": save_model(family, tmp_path / "model")}
    assert run.main(training(tmp_path, zo_directions="example", **arguments)) == 2
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: --zo_directions example: ") and "is used by" in last
    assert last.endswith("use --zo_directions shared")
    assert not list((tmp_path / "out").glob("checkpoint-*"))
