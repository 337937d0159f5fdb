"""Loading a causal language model and its tokenizer: dtype, devices, and what may go wrong.

A model is a Hub id, a folder, or a GGUF file, llama.cpp's format, whose quantised weights become
ordinary ones. What cannot be loaded raises ``InputError``, in one line.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import logging
import os
import pickle
import tempfile
import warnings
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
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers import modeling_gguf_pytorch_utils as gguf_loading
from transformers.integrations.gguf import read_gguf_metadata

from language_model.adapters import SavedAdapter
from language_model.streaming import Offload, load_streamed
from language_model.weight_files import check_weights, tied_weights
from utils import InputError, first_line

logger = logging.getLogger(__name__)

# What MeZO and HiZOO use; a model with fewer positions uses all of them.
DEFAULT_MAX_LENGTH = 2048
# general.file_type of GGUF files whose matrices are not quantised.
DTYPE_OF_FILE_TYPE = {0: torch.float32, 1: torch.float16, 32: torch.bfloat16}


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
    gguf = gguf_file(base)
    if offload and gguf:
        raise InputError("--offload reads safetensors files, no GGUF file; leave it out")
    several_processes = int(os.environ.get("WORLD_SIZE", "1")) > 1
    spread = auto_device and torch.cuda.is_available() and not several_processes
    how: dict[str, Any] = {
        "dtype": dtype,
        "device_map": "auto" if spread else None,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # check_weights names them
    }
    with _in_one_line(base):
        if offload:
            config = load_config(base, trust_remote_code)
            model = load_streamed(base, config, dtype, offload, trust_remote_code)
        else:
            if gguf:
                model, found = _load_gguf(gguf, **how)
            else:
                how["trust_remote_code"] = trust_remote_code
                model, found = AutoModelForCausalLM.from_pretrained(base, **how)
            # transformers initialises at random what is missing.
            weights = dict(model.named_parameters()).keys() - tied_weights(model)
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
        if gguf := gguf_file(source):
            tokenizer = _gguf_tokenizer(gguf)
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
        files = sorted(folder.glob("*.gguf"))
        way_out = f"; give its GGUF file, as {files[0]}" if files else ""
        raise InputError(
            f"--model_name {base}: this folder holds no model, config.json is missing{way_out}"
        )
    with _in_one_line(base):
        if gguf := gguf_file(base):
            return _gguf_config(gguf)
        return AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)


def base_of(name: str) -> str:
    """Return the base model of an adapter, or the model itself."""
    adapter = SavedAdapter.find(name)
    return adapter.base if adapter else name


def saved_dtype(name: str, trust_remote_code: bool = False) -> torch.dtype | None:
    """Return the dtype that a model's weights were saved in; None if its configuration says none.

    Only the configuration is read, an adapter's base model's. Quantised weights of a GGUF file
    count as bfloat16: nothing overflows in it, and it has more digits than 8 bits or fewer.
    """
    config = load_config(name, trust_remote_code)
    if gguf := gguf_file(base_of(name)):
        metadata, _ = read_gguf_metadata(str(gguf))
        return DTYPE_OF_FILE_TYPE.get(metadata.get("general.file_type"), torch.bfloat16)
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


# --------------------------------------------------------------------------------------- GGUF files


def gguf_file(name: str) -> Path | None:
    """Return the GGUF file ``name``; None if it is a folder or a Hub id."""
    path = Path(name)
    is_file = path.is_file() or path.suffix.lower() == ".gguf"
    return path if is_file and not path.is_dir() else None


def _from_gguf(kind: Any, path: Path, **how: Any) -> Any:
    # transformers looks for further files in the folder that it is given.
    with tempfile.TemporaryDirectory() as empty:
        return kind.from_pretrained(empty, gguf_file=str(path.absolute()), **how)


def _gguf_config(path: Path) -> PreTrainedConfig:
    """Read a model's configuration."""
    return copy.deepcopy(_config_read_once(path.absolute(), path.stat().st_mtime_ns))


@functools.lru_cache(maxsize=1)
def _config_read_once(path: Path, changed: int) -> PreTrainedConfig:
    """Read a file's configuration once: a large vocabulary takes many seconds each time."""
    return _from_gguf(AutoConfig, path)


def _gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Read the tokenizer, without what transformers adds to it, as to Llama 3's."""
    # AutoTokenizer makes the same one, but reads the whole file once more before.
    tokenizer = _from_gguf(PreTrainedTokenizerFast, path)
    size = _gguf_config(path).vocab_size
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < size]
    tokenizer._tokenizer = tokenizer.backend_tokenizer.from_str(json.dumps(state))
    tokenizer.name_or_path = str(path)
    return tokenizer


def _load_gguf(path: Path, **how: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load the weights, quantised ones too, as ordinary ones, with ``from_pretrained``."""
    how |= {"config": _gguf_config(path), "quantization_config": GgufConfig(dequantize=True)}
    model, found = _from_gguf(AutoModelForCausalLM, path, **how)
    # An adapter names its base model; peft looks for a config.json there.
    model.name_or_path = model.config.name_or_path = str(path)
    warnings.filterwarnings("ignore", "Could not find a config file in", UserWarning)
    _, tensors = read_gguf_metadata(str(path))
    if scaled := [name for name in tensors if name.startswith(("rope_freqs", "rope_factors"))]:
        logger.warning(
            f"--model_name {path}: transformers ignores {', '.join(scaled)}, which scales this "
            "model's positions: results differ from those of the original"
        )
    return model, found


# ----------------------------------------------------------------------------------- what users see


@contextlib.contextmanager
def _in_one_line(name: str, what: str = "no causal language model there") -> Iterator[None]:
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
