"""Loading a causal language model and its tokenizer: dtype, devices, and what may go wrong."""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path

import torch
import transformers
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.core_model_loading import revert_weight_conversion

from utils import InputError, first_line

logger = logging.getLogger(__name__)

# What MeZO and HiZOO use; a model with fewer positions uses all of them.
DEFAULT_MAX_LENGTH = 2048

# What transformers raises where a model is missing, damaged or of another kind.
LOADING_ERRORS = (OSError, ValueError, KeyError, ImportError, SafetensorError)


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
    quantised_bits: int | None = None,
    auto_device: bool = True,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal language model for evaluation (no dropout).

    Args:
        name: a Hub id or a local directory.
        dtype: of the weights.
        quantised_bits: 8 or 4 (NF4) bits a weight, by bitsandbytes; needs a GPU.
        auto_device: spread the model over the GPUs there are, if any. Otherwise, and in a run of
            several processes, the caller places it.
        trust_remote_code: run code that comes with the model.

    Raises:
        InputError: there is no such model, or it is no causal language model.
    """
    quantisation = quantisation_of(quantised_bits, dtype) if quantised_bits else None
    several_processes = int(os.environ.get("WORLD_SIZE", "1")) > 1
    spread = auto_device and torch.cuda.is_available() and not several_processes
    try:
        return AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            device_map="auto" if spread else None,
            quantization_config=quantisation,
            trust_remote_code=trust_remote_code,
        ).eval()
    except torch.OutOfMemoryError:
        raise
    except (*LOADING_ERRORS, RuntimeError) as error:
        raise _loading_error(name, error) from error


def quantisation_of(bits: int, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return what bitsandbytes is told for 8-bit or 4-bit (NF4) weights.

    Raises:
        InputError: there is no CUDA GPU, or no bitsandbytes.
    """
    if not torch.cuda.is_available():
        raise InputError(
            f"--load_int{bits} needs a CUDA GPU (bitsandbytes): leave it out on this machine"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            f"--load_int{bits} needs bitsandbytes: pip install bitsandbytes, or leave it out"
        )
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


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
    except LOADING_ERRORS as error:
        raise _loading_error(name, error) from error
    if any(kind.endswith("ForMaskedLM") for kind in config.architectures or ()):
        raise InputError(
            f"--model_name {name}: {config.architectures[0]} is no causal language model; give one "
            "that reads from left to right, as OPT, Llama or GPT-2"
        )
    if not tokenizer.encode("a text", add_special_tokens=False):
        raise InputError(
            f"--model_name {name}: no tokenizer there; put tokenizer.json and "
            "tokenizer_config.json beside the weights"
        )
    return config, tokenizer


def choose_max_length(requested: int | None, config: object) -> int:
    """Return the longest text in tokens: as requested, or 2048, or all that the model can read.

    Raises:
        InputError: more than the model's positions are requested, or fewer than 2.
    """
    positions = getattr(config, "max_position_embeddings", None)
    rotary = getattr(config, "rope_parameters", None) or {}
    if rotary.get("rope_type") == "longrope":
        # Beyond, a long text would change the positions of all texts in its batch.
        positions = rotary.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", positions
        )
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


def tied_weights(model: PreTrainedModel) -> set[str]:
    """Return the names of the weights that are the same tensor as another weight."""
    return set(getattr(model, "all_tied_weights_keys", None) or ())


def saved_names(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the model's tensors, without values, under the names that ``save_pretrained`` gives.

    transformers loads some families under other names than their files have (GPT-NeoX's head).
    """
    without_values = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    return revert_weight_conversion(model, without_values)


def load_renamed_weights(model: nn.Module, folder: Path) -> bool:
    """Load a checkpoint's weights if its names are not the model's own; tell whether they are not.

    ``load_state_dict``, by which the Trainer goes on from a checkpoint, would leave them out.
    """
    if not isinstance(model, PreTrainedModel) or saved_names(model).keys() <= set(
        model.state_dict()
    ):
        return False
    saved = type(model).from_pretrained(folder, config=model.config, dtype=model.dtype)
    model.load_state_dict(saved.state_dict())
    return True


def _loading_error(name: str, error: Exception) -> InputError:
    return InputError(
        f"--model_name {name}: no causal language model there ({first_line(error)}); "
        "give a Hub id, or a local directory with config.json, weights and tokenizer"
    )


def leave_out_loading_bars() -> None:
    """Show no bar for reading and writing weight files; downloads and our own bars stay."""
    downloads_are_shown = not are_progress_bars_disabled()
    transformers.utils.logging.disable_progress_bar()
    if downloads_are_shown:
        enable_progress_bars()
