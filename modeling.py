"""Loading a causal language model and its tokenizer: dtype, devices, and what may go wrong."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from utils import InputError, first_line

logger = logging.getLogger(__name__)

# What MeZO and HiZOO use; a model with fewer positions uses all of them.
DEFAULT_MAX_LENGTH = 2048


def choose_dtype(load_float16: bool, load_bfloat16: bool) -> torch.dtype:
    """Return the dtype of the weights: float32 unless one of the flags asks for another.

    Raises:
        InputError: both are set.
    """
    if load_float16 and load_bfloat16:
        raise InputError("--load_float16 and --load_bfloat16 exclude each other: give one")
    if load_float16:
        return torch.float16
    return torch.bfloat16 if load_bfloat16 else torch.float32


def load_model(
    name: str,
    dtype: torch.dtype,
    load_int8: bool = False,
    auto_device: bool = True,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal language model for evaluation (no dropout).

    Args:
        name: a Hub id or a local directory.
        dtype: of the weights.
        load_int8: 8-bit weights by bitsandbytes; needs a GPU.
        auto_device: spread the model over the GPUs there are, if any. Otherwise, and in a run of
            several processes, the caller places it.
        trust_remote_code: run code that comes with the model.

    Raises:
        InputError: there is no such model, or it is no causal language model.
    """
    if load_int8 and not torch.cuda.is_available():
        raise InputError(
            "--load_int8 needs a CUDA GPU (bitsandbytes): leave it out on this machine"
        )
    several_processes = int(os.environ.get("WORLD_SIZE", "1")) > 1
    spread = auto_device and torch.cuda.is_available() and not several_processes
    try:
        return AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            device_map="auto" if spread else None,
            quantization_config=BitsAndBytesConfig(load_in_8bit=True) if load_int8 else None,
            trust_remote_code=trust_remote_code,
        ).eval()
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _loading_error(name, error) from error


def load_config_and_tokenizer(
    name: str, trust_remote_code: bool = False
) -> tuple[object, PreTrainedTokenizerBase]:
    """Load a model's configuration and its own tokenizer, without its weights.

    Raises:
        InputError: as ``load_model``.
    """
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise InputError(f"--model_name {name}: this folder holds no model, config.json is missing")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _loading_error(name, error) from error
    return config, tokenizer


def choose_max_length(requested: int | None, config: object) -> int:
    """Return the longest text in tokens: as requested, or 2048, or all that the model can read.

    Raises:
        InputError: more than the model's positions are requested, or fewer than 2.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if requested is None:
        return min(DEFAULT_MAX_LENGTH, positions or DEFAULT_MAX_LENGTH)
    if requested < 2:
        raise InputError(f"--max_length {requested}: a text has at least 2 tokens")
    if positions is not None and requested > positions:
        raise InputError(
            f"--max_length {requested}: the model reads {positions} tokens at most; "
            f"give at most {positions}"
        )
    return requested


def check_checkpoint(checkpoint: str, model: PreTrainedModel) -> None:
    """Check that a checkpoint's weights have the names and shapes of ``model``'s.

    Raises:
        InputError: the folder holds no checkpoint of a training run, or one of another model.
    """
    folder = Path(checkpoint)
    if not (folder / "trainer_state.json").is_file():
        raise InputError(f"{checkpoint} is no checkpoint: trainer_state.json is missing")
    shapes = saved_shapes(folder)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, shape in shapes.items():
        if expected.get(name) != shape:
            raise InputError(
                f"{checkpoint} is a checkpoint of another model: {name} is {shape} there and "
                f"{expected.get(name, 'missing')} in this model; "
                "give its own checkpoint, or --overwrite_output_dir to start anew"
            )


def saved_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the tensors in a checkpoint's safetensors files."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    shapes = {}
    for file in files:
        if not (folder / file).is_file():
            raise InputError(f"{folder} is no whole checkpoint: {file} is missing")
        with safe_open(folder / file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                shapes[name] = tuple(tensors.get_slice(name).get_shape())
    return shapes


def _loading_error(name: str, error: Exception) -> InputError:
    return InputError(
        f"--model_name {name}: no causal language model there ({first_line(error)}); "
        "give a Hub id, or a local directory with config.json, weights and tokenizer"
    )
