"""Loading models: dtype and lengths."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from running import MODEL
from transformers import AutoConfig

from language_model.loading import (
    choose_dtype,
    choose_max_length,
    load_config_and_tokenizer,
    load_model,
    tied_weights,
)
from utils import InputError


def test_dtype() -> None:
    assert choose_dtype(False, False) == torch.float32
    assert choose_dtype(True, False) == torch.float16
    assert choose_dtype(False, True) == torch.bfloat16
    with pytest.raises(InputError, match="exclude each other"):
        choose_dtype(True, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_model_is_loaded_in_its_dtype_for_evaluation(dtype: torch.dtype) -> None:
    model = load_model(str(MODEL), dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert not model.training
    assert tied_weights(model) == {"lm_head.weight"}


def test_tokenizer_is_the_models_own() -> None:
    config, tokenizer = load_config_and_tokenizer(str(MODEL))
    assert config.model_type == "opt"
    assert tokenizer.encode("It was")[0] == config.bos_token_id


@pytest.mark.parametrize(
    ("positions", "requested", "length"),
    [(1024, None, 1024), (4096, None, 2048), (None, None, 2048), (4096, 4096, 4096), (8, 2, 2)],
)
def test_max_length(positions: int | None, requested: int | None, length: int) -> None:
    config = SimpleNamespace(max_position_embeddings=positions)
    assert choose_max_length(requested, config) == length


@pytest.mark.parametrize("requested", [-1, 0, 1, 1025])
def test_bad_max_length(requested: int) -> None:
    with pytest.raises(InputError, match=f"--max_length {requested}: "):
        choose_max_length(requested, SimpleNamespace(max_position_embeddings=1024))


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
