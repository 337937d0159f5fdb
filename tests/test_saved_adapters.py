"""Checkpoints of LoRA and prefix-tuning as models: evaluated, and trained further."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from running import command, contents, finish, small_model, training
from safetensors.torch import load_file
from test_adapters import adapted, lora_of, trained
from tiny_models import tiny_model, tiny_tokenizer

import run
from hizoo import HiZOOConfig
from language_model.adapters import PROMPT_ENCODER_FILE, SavedAdapter, prefix_length
from language_model.loading import load_config_and_tokenizer, load_model, saved_dtype
from training.optimizers import groups_of, make_optimizer
from utils import InputError

# peft's, about an adapter that cannot be merged.
pytestmark = pytest.mark.filterwarnings("ignore:.*lora")

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"lora": True, "lora_r": 4, "lora_alpha": 8},
    "prefix": {"prefix_tuning": True},
    "reparameterised": {"prefix_tuning": True, "no_reparam": "False"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, and beside it an adapter of every kind, whose weights have moved."""
    root = tmp_path_factory.mktemp("adapters")
    tiny_model("llama").save_pretrained(root / "model", dtype=torch.bfloat16)
    tiny_tokenizer().save_pretrained(root / "model")
    for kind in KINDS:
        model = adapted("llama", kind)
        model.active_peft_config.base_model_name_or_path = str(root / "model")
        model.save_pretrained(str(root / kind))
    other = lora_of("llama", False, lora_bias=True)
    other.active_peft_config.base_model_name_or_path = str(root / "model")
    other.save_pretrained(str(root / "biases"))
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_loaded_with_its_model(folders: Path, kind: str) -> None:
    expected, text = adapted("llama", kind), torch.tensor([[5, 9, 31, 7]])
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(str(folders / kind), dtype)
        if dtype == torch.float32:
            logits = model(input_ids=text, attention_mask=torch.ones_like(text)).logits
            right = expected(input_ids=text, attention_mask=torch.ones_like(text)).logits
            assert (logits - right).abs().max() < 1e-4
        assert prefix_length(model) == (0 if kind == "lora" else 5)
        assert not model.training and model.dtype == dtype
        # In training they are float32, whatever the model is.
        weights, others = trained(model), trained(expected)
        assert weights.keys() == others.keys()
        assert all(torch.equal(weight, others[name]) for name, weight in weights.items())
    config, tokenizer = load_config_and_tokenizer(str(folders / kind))
    assert config.model_type == "llama" and tokenizer.encode("Yes") == tiny_tokenizer().encode(
        "Yes"
    )
    assert saved_dtype(str(folders / kind)) == saved_dtype(str(folders / "model"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_from_an_adapter(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its model is named by a relative path, which is not the one from here."""
    shutil.copytree(small_model().name, tmp_path / "models" / "tiny")
    monkeypatch.chdir(tmp_path)
    short = {"max_steps": 2, "save_steps": 2, "learning_rate": 1e-1, "zo_eps": 1e-2}
    rows = {name: tmp_path / f"{name}.jsonl" for name in ("trained", "loaded")}
    first = finish(
        training(
            tmp_path / "first",
            **KINDS[kind] | short | {"no_eval": None, "train_set_seed": 0},
            model_name="models/tiny",
            predictions_file=rows["trained"],
        )
    )
    checkpoint = Path(first["checkpoint"])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    loaded = finish(
        command(
            model_name=checkpoint,
            train_set_seed=0,
            predictions_file=rows["loaded"],
            result_file=tmp_path / "loaded.json",
        )
    )
    assert loaded["metric"] == first["metric"]
    assert rows["loaded"].read_text() == rows["trained"].read_text()
    further = training(
        tmp_path / "further",
        **KINDS[kind] | short | {"learning_rate": 0},
        model_name=checkpoint,
        eval_before_training=True,
        train_set_seed=0,
    )
    result = finish(further)
    assert result["metric_before_training"] == first["metric"]
    assert result["trained_parameters"] == first["trained_parameters"]
    second = Path(result["checkpoint"])
    name = PROMPT_ENCODER_FILE if kind == "reparameterised" else "adapter_model.safetensors"
    weights, others = load_file(checkpoint / name), load_file(second / name)
    assert weights.keys() == others.keys()
    # A shift and back rounds.
    assert all((weights[name] - others[name]).abs().max() < 1e-5 for name in weights)
    base = json.loads((second / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(tmp_path / "models" / "tiny")


def test_a_prefix_without_its_network_is_trained_itself(folders: Path, tmp_path: Path) -> None:
    """As peft itself saves it."""
    shutil.copytree(folders / "reparameterised", tmp_path / "finished")
    (tmp_path / "finished" / PROMPT_ENCODER_FILE).unlink()
    adapter = SavedAdapter.find(str(tmp_path / "finished"))
    assert adapter.settings == {"num_prefix": 5, "no_reparam": True}
    text = torch.tensor([[5, 9, 31, 7]])
    whole, finished = (
        load_model(str(folder), torch.float32)
        for folder in (folders / "reparameterised", tmp_path / "finished")
    )
    assert [tuple(weight.shape) for weight in trained(finished).values()] == [(5, 2 * 2 * 2 * 8)]
    logits = [model(input_ids=text).logits for model in (whole, finished)]
    assert (logits[0] - logits[1]).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("kind", "arguments", "parts"),
    [
        ("lora", {}, ["a checkpoint of --lora: train it further with --lora, or give its model"]),
        ("prefix", {"lora": True}, ["train it further with --prefix_tuning"]),
        ("prefix", {"head_tuning": True}, ["train it further with --prefix_tuning"]),
        ("lora", {"lora": True, "lora_r": 3}, ["--lora_r 3: the adapter", "give --lora_r 4"]),
        ("prefix", {"prefix_tuning": True, "num_prefix": 9}, ["--num_prefix 9: ", "has 5"]),
        ("reparameterised", {"prefix_tuning": True}, ["--no_reparam True: ", "has False"]),
        (
            "biases",
            {"lora": True, "lora_r": 4, "lora_alpha": 8, "save_model": True, "merge_adapter": True},
            ["--merge_adapter: peft cannot merge this adapter (", "no bias.); leave it out"],
        ),
    ],
)
def test_what_an_adapter_is_not_trained_for(
    folders: Path,
    kind: str,
    arguments: dict[str, Any],
    parts: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run.main(training(tmp_path, model_name=folders / kind, **arguments)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert all(part in err for part in parts), err
    assert contents(tmp_path) == {}


def damaged_config(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LO')


def damaged_weights(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def belonging_to(folder: Path, model: str) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = model
    (folder / "adapter_config.json").write_text(json.dumps(config))


def other_model(folder: Path) -> None:
    tiny_model("llama", num_hidden_layers=3).save_pretrained(folder / "model")
    belonging_to(folder, str(folder / "model"))


def no_model(folder: Path) -> None:
    belonging_to(folder, "/nowhere/model")


def other_kind(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "IA3", "task_type": "CAUSAL_LM"}')


def test_adapters_that_do_not_fit(folders: Path, tmp_path: Path) -> None:
    for damage, message in (
        (damaged_config, "its adapter_config.json is damaged"),
        (damaged_weights, r"its adapter does not fit .*base_model_name_or_path"),
        (other_model, r"its adapter does not fit .*layers\.2.* is missing"),
        (no_model, "--model_name /nowhere/model: no causal language model there"),
        (other_kind, "an adapter of kind IA3"),
    ):
        folder = tmp_path / damage.__name__
        shutil.copytree(folders / "lora", folder)
        damage(folder)
        with pytest.raises(InputError, match=message):
            load_model(str(folder), torch.float32)


def test_weights_that_are_views_are_not_trained() -> None:
    """As of adapters with ``ensure_weight_tying``."""
    model = torch.nn.Linear(2, 3, bias=False)
    model.weight = torch.nn.Parameter(torch.ones(2, 3).T)
    with pytest.raises(InputError, match=r"^--trainer zo: .* is not contiguous"):
        make_optimizer(model, groups_of(model, (), 0.0), HiZOOConfig(), None, "--zo_scale")
