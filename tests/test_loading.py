"""Loading models: dtype and lengths."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from running import MODEL, refusal_of_loading
from tiny_models import tiny_model, tiny_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedModel,
)

from experiment.options import ModelOptions, TrainedWeights
from experiment.preparation import choose_trained_weights, load_pretrained
from language_model.loading import (
    choose_dtype,
    choose_max_length,
    leave_out_loading_bars,
    load_config_and_tokenizer,
    load_model,
    saved_dtype,
)
from language_model.weight_files import tied_weights
from utils import InputError


def test_dtype() -> None:
    assert choose_dtype(False, False) == torch.float32
    assert choose_dtype(True, False) == torch.float16
    assert choose_dtype(False, True) == torch.bfloat16


def test_model_is_loaded_in_its_dtype_for_evaluation() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        model = load_model(str(MODEL), dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert not model.training
        assert tied_weights(model) == {"lm_head.weight"}


def test_tokenizer_is_the_models_own() -> None:
    config, tokenizer = load_config_and_tokenizer(str(MODEL))
    assert config.model_type == "opt"
    assert tokenizer.encode("It was")[0] == config.bos_token_id


def test_max_length() -> None:
    def chosen(positions: int | None, requested: int | None) -> int:
        return choose_max_length(requested, SimpleNamespace(max_position_embeddings=positions))

    assert [chosen(positions, None) for positions in (1024, 4096, None)] == [1024, 2048, 2048]
    assert chosen(4096, 4096) == 4096 and chosen(8, 2) == 2
    for requested in (-1, 0, 1, 1025):
        with pytest.raises(InputError, match=f"--max_length {requested}: "):
            chosen(1024, requested)


def test_longrope_reads_as_far_as_positions_stay_the_same() -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    config = AutoConfig.for_model(
        "phi3",
        max_position_embeddings=512,
        original_max_position_embeddings=50,
        rope_scaling={"rope_type": "longrope", **factors},
        hidden_size=32,
        num_attention_heads=4,
    )
    assert choose_max_length(None, config) == 50
    with pytest.raises(InputError, match="--max_length 51: the model reads 50 tokens at most"):
        choose_max_length(51, config)


# ------------------------------------------------------------------------------- damaged models


class Command:
    """What would run a command where a pickle is trusted."""

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, ("executed",))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Command()}, folder / "pytorch_model.bin")


def without_head(folder: Path) -> None:
    LlamaModel(AutoConfig.from_pretrained(folder)).save_pretrained(folder)


def for_classification(folder: Path) -> None:
    LlamaForSequenceClassification(AutoConfig.from_pretrained(folder)).save_pretrained(folder)


def written(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content)


def cut(name: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return change


def with_setting(name: str, value: int) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {name: value}))

    return change


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickle": (pickled, "its pickle holds more than tensors, and nothing in it is run"),
    "no head": (without_head, r"lack weights of LlamaForCausalLM, as lm_head.weight \(1 in all"),
    "classifier": (for_classification, "lack weights of LlamaForCausalLM, as lm_head.weight"),
    "layers missing": (with_setting("num_hidden_layers", 3), r"as model.layers.2.* \(9 in all"),
    "other size": (with_setting("intermediate_size", 50), r"is \(32, 48\) in its .*\(32, 50\) by"),
    "cut weights": (cut("model.safetensors"), "no causal language model there"),
    "empty weights": (written("model.safetensors", ""), "no causal language model there"),
    "empty config": (written("config.json", ""), "no causal language model there"),
    "null config": (written("config.json", "null"), "no causal language model there"),
    "cut config": (cut("config.json"), "no causal language model there"),
    "empty tokenizer": (written("tokenizer.json", ""), "no tokenizer there that can be read"),
    "cut tokenizer": (cut("tokenizer.json"), "no tokenizer there that can be read"),
    "hollow tokenizer": (written("tokenizer.json", "{}"), "no tokenizer there that can be read"),
    "other tokenizer": (written("tokenizer_config.json", "[]"), "no tokenizer there that can be"),
}


def test_damaged_models_are_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    leave_out_loading_bars()
    failures = []
    for name, (damage, message) in DAMAGE.items():
        folder = tmp_path / name
        tiny_model("llama").save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        damage(folder)
        said = refusal_of_loading(folder)
        table = "REPORT" in capfd.readouterr().err  # transformers'
        if table or not re.fullmatch(rf"--model_name {folder}: .*{message}.*", said):
            failures.append((name, said, table))
    assert not failures
    assert not (tmp_path / "executed").exists()


def test_a_tied_head_is_not_missing(tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    model.model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), torch.float32)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_the_dtype_that_a_model_was_saved_in(tmp_path: Path) -> None:
    for config, dtype in (
        ({"torch_dtype": "float16"}, torch.float16),
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": "float32"}, torch.float32),
        ({}, None),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
        assert saved_dtype(str(tmp_path)) == dtype


def test_a_model_that_the_gpus_have_no_room_for_is_evaluated_but_not_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spilled(name: str, *_: object) -> PreTrainedModel:
        inner = dict.fromkeys(("embed_tokens", "embed_positions", "final_layer_norm"), "cpu")
        inner["layers"] = "disk"
        places = {f"model.decoder.{part}": place for part, place in inner.items()}
        places["lm_head"] = "cpu"
        return AutoModelForCausalLM.from_pretrained(
            name, device_map=places, offload_folder=tmp_path
        )

    monkeypatch.setattr("experiment.preparation.load_model", spilled)
    how = ModelOptions(str(MODEL), torch.float32, True, torch.device("cpu"), False)
    model = load_pretrained(how)
    ids = torch.randint(5, 400, (1, 9))
    expected = load_model(str(MODEL), torch.float32)(input_ids=ids).logits
    assert torch.equal(model(input_ids=ids).logits, expected)
    with pytest.raises(InputError, match=r"does not fit the GPUs.*--offload cpu, --load_bfloat16"):
        choose_trained_weights(model, TrainedWeights.of({}), tiny_tokenizer())
