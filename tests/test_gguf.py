"""Models in GGUF files: evaluated, trained and saved as ordinary ones; what cannot be read."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf_writing import tiny_llama, write_gguf
from running import (
    SAMPLES,
    assert_same_tensors,
    finish,
    refusal_of_loading,
    training,
    weights,
)
from tiny_models import tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import run
from language_model.loading import load_config_and_tokenizer, load_model, saved_dtype
from utils import InputError

F32, Q8_0 = GGMLQuantizationType.F32, GGMLQuantizationType.Q8_0


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A GGUF file of a tiny Llama, beside files of another model, which do not belong to it."""
    folder = tmp_path / "models"
    folder.mkdir()
    write_gguf(folder / "tiny.gguf", tiny_llama())
    for name in ("config.json", "tokenizer_config.json", "adapter_config.json"):
        (folder / name).write_text("{}")
    (folder / "tokenizer.json").write_text("not read")
    return folder / "tiny.gguf"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The same model as a folder."""
    tiny_llama().save_pretrained(tmp_path / "folder")
    tiny_tokenizer().save_pretrained(tmp_path / "folder")
    return tmp_path / "folder"


def test_weights_configuration_and_tokens_are_those_of_the_file(file: Path) -> None:
    config, tokenizer = load_config_and_tokenizer(str(file))
    model = load_model(str(file), torch.float32)
    assert_same_tensors(model.state_dict(), tiny_llama().state_dict())
    assert config.max_position_embeddings == 1024 and model.name_or_path == str(file)
    assert not model.training and not model.is_quantized and not hasattr(model, "hf_quantizer")
    assert len(tokenizer) == config.vocab_size  # nothing is added that has no embedding
    for text in ("It was great", " It was\n\nterrible!", "<|endoftext|>"):
        assert tokenizer.encode(text) == tiny_tokenizer().encode(text)


def test_quantised_weights_are_loaded_as_ordinary_ones(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_llama(), stored=Q8_0)
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(str(path), dtype)
        assert {weight.dtype for weight in model.parameters()} == {dtype}
    weight = tiny_llama().model.layers[1].mlp.down_proj.weight.detach()
    expected = gguf.dequantize(gguf.quantize(weight.numpy(), Q8_0), Q8_0)
    loaded = load_model(str(path), torch.float32).model.layers[1].mlp.down_proj.weight.detach()
    assert np.array_equal(loaded.numpy(), expected)
    assert not torch.equal(loaded, weight)


def test_saved_dtype(tmp_path: Path) -> None:
    for stored, dtype in (
        *(("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)),
        ("Q8_0", torch.bfloat16),
    ):
        write_gguf(tmp_path / "tiny.gguf", tiny_llama(), stored=GGMLQuantizationType[stored])
        assert saved_dtype(str(tmp_path / "tiny.gguf")) == dtype


def evaluation(model: Path, result: Path) -> list[str]:
    return [
        *("--task_name", "SST2", "--data_dir", str(SAMPLES), "--num_eval", "6", "--num_train", "2"),
        *("--model_name", str(model), "--result_file", str(result)),
        *("--predictions_file", str(result.with_suffix(".jsonl"))),
    ]


def test_evaluation_is_that_of_the_same_model_in_a_folder(
    file: Path, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    predictions = []
    for model in (file, folder):
        result = tmp_path / f"{model.stem}.json"
        assert finish(evaluation(model, result))["metric"]
        predictions.append(result.with_suffix(".jsonl").read_text())
    assert predictions[0] == predictions[1]
    assert "de-quantizing" not in capfd.readouterr().err


def test_training_goes_on_from_a_checkpoint_and_saves_an_ordinary_model(
    file: Path, folder: Path, tmp_path: Path
) -> None:
    """Two steps at once, or one and one, or from the folder: the same weights."""
    for name, model, steps in (("a", file, [2]), ("b", file, [1, 2]), ("c", folder, [2])):
        for last in steps:
            argv = training(
                tmp_path / name, model_name=model, max_steps=last, save_steps=1, save_model=True
            )
            result = finish(argv)
        assert (result["resumed_from"] is not None) == (len(steps) == 2)
    saved = weights(tmp_path / "a" / "out")
    assert_same_tensors(saved, weights(tmp_path / "b" / "out"))
    assert_same_tensors(saved, weights(tmp_path / "c" / "out"))
    assert not torch.equal(saved["lm_head.weight"], tiny_llama().lm_head.weight)

    out = tmp_path / "a" / "out"
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert_same_tensors(AutoModelForCausalLM.from_pretrained(out).state_dict(), saved)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.encode("It was great") == tiny_tokenizer().encode("It was great")
    assert finish(evaluation(out, tmp_path / "again.json"))["metric"]


def test_an_adapter_finds_the_file_that_it_belongs_to(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    place = file.relative_to(tmp_path)
    lora = {"lora": True, "max_steps": 2, "save_model": True}
    finish(training(tmp_path, model_name=place, **lora))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(place)
    assert finish(evaluation(tmp_path / "out", tmp_path / "lora.json"))["metric"]
    monkeypatch.chdir("/")
    assert saved_dtype(str(tmp_path / "out")) == torch.float32


def test_the_name_of_a_run_goes_by_the_content_of_the_file(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tags = []
    copied, other = tmp_path / "tiny.gguf", tmp_path / "other" / "tiny.gguf"
    shutil.copy(file, copied)
    other.parent.mkdir()
    write_gguf(other, tiny_llama(), stored=Q8_0)
    for path in (file, copied, other):
        assert run.main(evaluation(path, tmp_path / "x.json")[:-4]) == 0
        tags.append({each.stem for each in (tmp_path / "result").glob("*.json")})
    assert len(tags[0]) == 1 and tags[0] == tags[1] and len(tags[2]) == 2
    assert all(tag.startswith("SST2-tiny-none-2-shot") for tag in tags[2])


# ------------------------------------------------------------------------------------- bad input


def cut(size: int) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(path.read_bytes()[:size])


def missing(path: Path) -> None:
    path.unlink()


def written(content: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(content)


def of_another_architecture(path: Path) -> None:
    write_gguf(path, tiny_llama(), architecture="clip")


def without_a_tensor(path: Path) -> None:
    write_gguf(path, tiny_llama(), left_out="blk.1.ffn_up.weight")


BAD_FILES = {
    "missing": (missing, "No such file or directory"),
    "text": (written("A text."), "does not start with the GGUF magic bytes"),
    "empty": (written(""), "transformers cannot load this GGUF file"),
    "only the magic bytes": (written("GGUF"), "transformers cannot load this GGUF file"),
    "cut in the tokens": (cut(2000), "transformers cannot load this GGUF file"),
    "cut in the weights": (cut(150_000), "transformers cannot load this GGUF file"),
    "architecture": (of_another_architecture, "with architecture clip is not supported yet"),
    "a weight is missing": (without_a_tensor, r"layers.1.mlp.up_proj.weight \(1 in all"),
}


def test_a_file_that_cannot_be_read_is_refused_in_one_line(file: Path) -> None:
    failures, whole = [], file.read_bytes()
    for name, (change, message) in BAD_FILES.items():
        file.write_bytes(whole)
        change(file)
        said = refusal_of_loading(file)
        if not re.fullmatch(rf"--model_name {file}: .*{message}.*", said):
            failures.append((name, said))
    assert not failures


def test_without_the_package_one_line_names_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"a package is missing .*; pip install gguf"):
        load_model(str(file), torch.float32)


def test_a_folder_of_gguf_files_is_told_to_name_one(file: Path) -> None:
    (file.parent / "config.json").unlink()
    (file.parent / "adapter_config.json").unlink()
    with pytest.raises(InputError, match=rf"holds no model.*give its GGUF file, as {file}"):
        load_config_and_tokenizer(str(file.parent))


def test_positions_that_transformers_does_not_scale_are_pointed_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_llama(), added=("rope_freqs.weight",))
    load_model(str(tmp_path / "tiny.gguf"), torch.float32)
    assert "ignores rope_freqs.weight" in caplog.text
