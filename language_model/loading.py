"""Loading a causal language model and its tokenizer: dtype, devices, and what may go wrong.

What cannot be loaded raises ``InputError``, in one line.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import modeling_gguf_pytorch_utils as gguf_loading

from language_model.gguf_files import GgufFile
from language_model.saved_adapters import SavedAdapter
from language_model.streaming import Offload, load_streamed
from language_model.weight_files import check_weights, tied_weights
from utils import InputError, first_line

# What MeZO and HiZOO use; a model with fewer positions uses all of them.
DEFAULT_MAX_LENGTH = 2048


def choose_dtype(load_float16: bool, load_bfloat16: bool) -> torch.dtype:
    """Return the dtype of the weights: float32 unless one of the flags asks for another."""
    if load_float16:
        return torch.float16
    return torch.bfloat16 if load_bfloat16 else torch.float32


def load_model(
    name: str,
    dtype: torch.dtype,
    auto_device: bool = True,
    trust_remote_code: bool = False,
    offload: Offload | None = None,
) -> PreTrainedModel | PeftModel:
    """Load a causal language model for evaluation (no dropout).

    Args:
        name: a Hub id, a local directory or a GGUF file, of a model or of an adapter, which is
            loaded with its base model.
        dtype: of the weights.
        auto_device: spread the model over the GPUs there are, if any. Otherwise, and in a run of
            several processes, the caller places it.
        trust_remote_code: run code that comes with the model.
        offload: where the weights of blocks lie; None: in memory, all of them.
    """
    adapter = SavedAdapter.find(name)
    base = adapter.base if adapter else name
    gguf = GgufFile.find(base)
    if offload:
        config = load_config(base, trust_remote_code)
        if gguf:
            raise InputError("--offload reads safetensors files, no GGUF file; leave it out")
        with _in_one_line(base, "no causal language model there"):
            model = load_streamed(base, config, dtype, offload, trust_remote_code)
        return adapter.load(model) if adapter else model
    several_processes = int(os.environ.get("WORLD_SIZE", "1")) > 1
    spread = auto_device and torch.cuda.is_available() and not several_processes
    how: dict[str, Any] = {
        "dtype": dtype,
        "device_map": "auto" if spread else None,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # check_weights names them
    }
    with _in_one_line(base, "no causal language model there"):
        if gguf:
            model, found = gguf.load(**how)
        else:
            how["trust_remote_code"] = trust_remote_code
            model, found = AutoModelForCausalLM.from_pretrained(base, **how)
    weights = dict(model.named_parameters()).keys() - tied_weights(model)
    # transformers initialises at random what is missing.
    check_weights(base, model, weights & {*found["missing_keys"]}, found["mismatched_keys"])
    return adapter.load(model) if adapter else model.eval()


def load_config_and_tokenizer(
    name: str, trust_remote_code: bool = False
) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """Load a model's configuration and tokenizer, without its weights.

    An adapter has its base model's, but may have a tokenizer of its own.
    """
    config = load_config(name, trust_remote_code)
    has_own = (Path(name) / "tokenizer_config.json").is_file()
    source = name if has_own else base_of(name)
    with _in_one_line(source, "no tokenizer there that can be read"):
        if gguf := GgufFile.find(source):
            tokenizer = gguf.tokenizer()
        else:
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
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


def load_config(name: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Load the configuration of a model, or of an adapter's base model."""
    base = base_of(name)
    folder = Path(base)
    if folder.is_dir() and not (folder / "config.json").is_file():
        way_out = "".join(
            f"; give its GGUF file, as {f}" for f in sorted(folder.glob("*.gguf"))[:1]
        )
        raise InputError(
            f"--model_name {base}: this folder holds no model, config.json is missing{way_out}"
        )
    with _in_one_line(base, "no causal language model there"):
        if gguf := GgufFile.find(base):
            return gguf.config()
        return AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)


def base_of(name: str) -> str:
    """Return the base model of an adapter, or the model itself."""
    adapter = SavedAdapter.find(name)
    return adapter.base if adapter else name


def saved_dtype(name: str, trust_remote_code: bool = False) -> torch.dtype | None:
    """Return the dtype that a model's weights were saved in; None if its configuration says none.

    Only the configuration is read, an adapter's base model's. Quantised weights of a GGUF file
    count as bfloat16.
    """
    config = load_config(name, trust_remote_code)
    if gguf := GgufFile.find(base_of(name)):
        return gguf.saved_dtype()
    return config.dtype or config.get_text_config(decoder=True).dtype


def choose_max_length(requested: int | None, config: object) -> int:
    """Return the longest text in tokens: as requested, or 2048, or all that the model can read."""
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


@contextlib.contextmanager
def _in_one_line(name: str, what: str) -> Iterator[None]:
    """Turn whatever a library raises over a model's files into one line."""
    try:
        yield
    except (torch.OutOfMemoryError, InputError):
        raise
    except Exception as error:  # pickle, tokenizers and others have errors of their own
        way_out = "give a Hub id, or a local directory with config.json, weights and tokenizer"
        reason = first_line(error)
        if isinstance(error, pickle.UnpicklingError):
            reason = "its pickle holds more than tensors, and nothing in it is run; save it again"
        elif not isinstance(error, OSError | ValueError):
            # The message of a KeyError says little without its type.
            reason = f"{type(error).__name__}: {reason}"
        if isinstance(error, ImportError):
            what = "a package is missing"
            way_out = f"pip install {error.name}" if error.name else "install it"
        elif Path(name).is_file():
            what = "transformers cannot load this GGUF file"
            way_out = "give a whole one of a model that it knows, or a Hub id or a local directory"
        raise InputError(f"--model_name {name}: {what} ({reason}); {way_out}") from error


def leave_out_loading_bars() -> None:
    """Hide transformers' bars and tables of weight files; downloads and our own bars stay."""
    reporting = logging.getLogger("transformers.modeling_utils")
    reporting.addFilter(lambda record: "LOAD REPORT" not in record.getMessage())
    downloads_are_shown = not are_progress_bars_disabled()
    transformers.utils.logging.disable_progress_bar()
    # GGUF files have a bar that the switch does not know.
    gguf_loading.tqdm = functools.partial(tqdm, disable=True)
    if downloads_are_shown:
        enable_progress_bars()
