"""GGUF files, llama.cpp's format, as models: their weights become ordinary ones when loaded.

One file holds the configuration, the tokenizer and the weights. transformers looks for further
files in the folder that it is given, so that it is given an empty one.
"""

from __future__ import annotations

import copy
import functools
import json
import logging
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.integrations.gguf import read_gguf_metadata

logger = logging.getLogger(__name__)

# general.file_type of files whose matrices are not quantised.
DTYPE_OF_FILE_TYPE = {0: torch.float32, 1: torch.float16, 32: torch.bfloat16}


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file on disk; what cannot be read raises whatever the libraries raise."""

    path: Path

    @classmethod
    def find(cls, name: str) -> GgufFile | None:
        """Return the GGUF file ``name``; None if it is a folder or a Hub id."""
        path = Path(name)
        is_file = path.is_file() or path.suffix.lower() == ".gguf"
        return cls(path) if is_file and not path.is_dir() else None

    def config(self) -> PreTrainedConfig:
        """Read the model's configuration."""
        return copy.deepcopy(_config(self.path.absolute(), self.path.stat().st_mtime_ns))

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Read the tokenizer, without what transformers adds to it, as to Llama 3's."""
        # AutoTokenizer makes the same one, but reads the whole file once more before.
        tokenizer = _from_file(PreTrainedTokenizerFast, self.path)
        size = self.config().vocab_size
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < size]
        tokenizer._tokenizer = tokenizer.backend_tokenizer.from_str(json.dumps(state))
        tokenizer.name_or_path = str(self.path)
        return tokenizer

    def saved_dtype(self) -> torch.dtype:
        """Return the dtype of most weights; bfloat16 for quantised ones.

        Nothing overflows in it, and it has more digits than weights of 8 bits or fewer.
        """
        metadata, _ = read_gguf_metadata(str(self.path))
        return DTYPE_OF_FILE_TYPE.get(metadata.get("general.file_type"), torch.bfloat16)

    def load(self, **how: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
        """Load the weights, quantised ones too, as ordinary ones, with ``from_pretrained``."""
        _, tensors = read_gguf_metadata(str(self.path))
        how |= {"config": self.config(), "quantization_config": GgufConfig(dequantize=True)}
        model, found = _from_file(AutoModelForCausalLM, self.path, **how)
        # An adapter names its base model; peft looks for a config.json there.
        model.name_or_path = model.config.name_or_path = str(self.path)
        warnings.filterwarnings("ignore", "Could not find a config file in", UserWarning)
        if scaled := [name for name in tensors if name.startswith(("rope_freqs", "rope_factors"))]:
            logger.warning(
                "--model_name %s: transformers ignores %s, which scales this model's positions: "
                "results differ from those of the original",
                self.path,
                ", ".join(scaled),
            )
        return model, found


def _from_file(kind: Any, path: Path, **arguments: Any) -> Any:
    with tempfile.TemporaryDirectory() as empty:
        return kind.from_pretrained(empty, gguf_file=str(path.absolute()), **arguments)


@functools.lru_cache(maxsize=1)
def _config(path: Path, changed: int) -> PreTrainedConfig:
    """Read a file's configuration once: a large vocabulary takes many seconds each time."""
    return _from_file(AutoConfig, path)
