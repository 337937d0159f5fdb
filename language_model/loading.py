"""Loading a causal language model and its tokenizer: dtype, devices, and what may go wrong."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import pickle
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import torch
import transformers
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from peft import PeftModel
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.core_model_loading import revert_weight_conversion

from language_model.gguf_files import GgufFile
from language_model.saved_adapters import SavedAdapter
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
    quantised_bits: int | None = None,
    auto_device: bool = True,
    trust_remote_code: bool = False,
) -> PreTrainedModel | PeftModel:
    """Load a causal language model for evaluation (no dropout).

    Args:
        name: a Hub id, a local directory or a GGUF file, of a model or of an adapter, which is
            loaded with the model that it belongs to.
        dtype: of the weights.
        quantised_bits: 8 or 4 (NF4) bits a weight, by bitsandbytes; needs a GPU.
        auto_device: spread the model over the GPUs there are, if any. Otherwise, and in a run of
            several processes, the caller places it.
        trust_remote_code: run code that comes with the model.

    Raises:
        InputError: there is no such model, it is no causal language model, its files are damaged,
            or they lack some of its weights.
    """
    adapter = SavedAdapter.find(name)
    base = adapter.base if adapter else name
    gguf = GgufFile.find(base)
    if gguf and quantised_bits:
        raise InputError(
            f"--load_int{quantised_bits}: the weights of a GGUF file, quantised ones too, are "
            "loaded as ordinary ones; leave it out, or give the model as a directory"
        )
    quantisation = quantisation_of(quantised_bits, dtype) if quantised_bits else None
    several_processes = int(os.environ.get("WORLD_SIZE", "1")) > 1
    spread = auto_device and torch.cuda.is_available() and not several_processes
    device_map = "auto" if spread else None
    try:
        with _without_report():
            if gguf:
                model, found = gguf.load(dtype, device_map)
            else:
                model, found = AutoModelForCausalLM.from_pretrained(
                    base,
                    dtype=dtype,
                    device_map=device_map,
                    quantization_config=quantisation,
                    trust_remote_code=trust_remote_code,
                    output_loading_info=True,
                    # What does not match is refused below, by name.
                    ignore_mismatched_sizes=True,
                )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # pickle, tokenizers and others have errors of their own
        raise _loading_error(base, "no causal language model there", error) from error
    _check_nothing_is_drawn(base, model, found["missing_keys"], found["mismatched_keys"])
    return adapter.load(model) if adapter else model.eval()


def _check_nothing_is_drawn(
    name: str,
    model: PreTrainedModel,
    missing: Collection[str],
    mismatched: Collection[tuple[str, Sequence[int], Sequence[int]]],
) -> None:
    """Refuse weights that transformers has drawn at random, as the head of a ``LlamaModel``."""
    for weight, there, here in sorted(mismatched):
        raise InputError(
            f"--model_name {name}: {weight} is {tuple(there)} in its files and {tuple(here)} by "
            "its configuration; give a whole model"
        )
    untied = set(missing) & dict(model.named_parameters()).keys() - tied_weights(model)
    if untied:
        raise InputError(
            f"--model_name {name}: its files lack weights of {type(model).__name__}, as "
            f"{min(untied)} ({len(untied)} in all); give a model that was saved whole, with its "
            "language-model head"
        )


@contextlib.contextmanager
def _without_report() -> Iterator[None]:
    """Keep transformers' table of missing and unexpected weights from the user."""
    reporting = logging.getLogger("transformers.modeling_utils")

    def is_no_report(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    reporting.addFilter(is_no_report)
    try:
        yield
    finally:
        reporting.removeFilter(is_no_report)


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
) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """Load a model's configuration and its own tokenizer, without its weights.

    For an adapter they are its model's, the tokenizer its own if it was saved with one.

    Raises:
        InputError: as ``load_model``.
    """
    config = load_config(name, trust_remote_code)
    adapter = SavedAdapter.find(name)
    own = adapter is None or (adapter.folder / "tokenizer_config.json").is_file()
    place = name if own else adapter.base
    gguf = GgufFile.find(place)
    try:
        tokenizer = (
            gguf.tokenizer()
            if gguf
            else AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)
        )
    except Exception as error:
        raise _loading_error(place, "no tokenizer there that can be read", error) from error
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
    """Load the configuration of a model, for an adapter that of its model.

    Raises:
        InputError: there is none, or it is damaged.
    """
    base = _base_of(name)
    gguf = GgufFile.find(base)
    if Path(base).is_dir() and not (Path(base) / "config.json").is_file():
        files = sorted(Path(base).glob("*.gguf"))
        way_out = f"; give its GGUF file, as {files[0]}" if files else ""
        raise InputError(
            f"--model_name {base}: this folder holds no model, config.json is missing{way_out}"
        )
    try:
        if gguf:
            return gguf.config()
        return AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise _loading_error(base, "no causal language model there", error) from error


def _base_of(name: str) -> str:
    """Return the model that an adapter belongs to, or the model itself."""
    adapter = SavedAdapter.find(name)
    return adapter.base if adapter else name


def saved_dtype(name: str, trust_remote_code: bool = False) -> torch.dtype | None:
    """Return the dtype that a model's weights were saved in; None if its configuration says none.

    Only the configuration is read. An adapter's weights are float32; this is its model's dtype.
    Quantised weights of a GGUF file count as bfloat16.

    Raises:
        InputError: as ``load_config``.
    """
    config = load_config(name, trust_remote_code)
    if gguf := GgufFile.find(_base_of(name)):
        return gguf.saved_dtype()
    return config.dtype or config.get_text_config(decoder=True).dtype


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
    without_values = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in model.state_dict(keep_vars=True).items()
    }
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


def _loading_error(name: str, what: str, error: Exception) -> InputError:
    reason = first_line(error)
    if isinstance(error, pickle.UnpicklingError):
        reason = "its pickle holds more than tensors, and nothing in it is run; save it again"
    elif not isinstance(error, OSError | ValueError):
        # A message as of KeyError says little without its kind.
        reason = f"{type(error).__name__}: {reason}"
    way_out = "give a Hub id, or a local directory with config.json, weights and tokenizer"
    if Path(name).is_file():
        what = "transformers cannot load this GGUF file"
        way_out = "give a whole one of a model that it knows, or a Hub id or a local directory"
    return InputError(f"--model_name {name}: {what} ({reason}); {way_out}")


def leave_out_loading_bars() -> None:
    """Show no bar for reading and writing weight files; downloads and our own bars stay."""
    downloads_are_shown = not are_progress_bars_disabled()
    transformers.utils.logging.disable_progress_bar()
    if downloads_are_shown:
        enable_progress_bars()
