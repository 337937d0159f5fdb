"""GGUF files, llama.cpp's format, as models: their weights become ordinary ones when loaded.

One file holds the configuration, the tokenizer and the weights. Nothing beside it is read: the
folder that transformers is given is an empty one.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
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

from utils import InputError

logger = logging.getLogger(__name__)

MAGIC = b"GGUF"
# general.file_type of files whose matrices are not in blocks of quantised weights.
DTYPE_OF_FILE_TYPE = {0: torch.float32, 1: torch.float16, 32: torch.bfloat16}


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file on disk; what cannot be read raises whatever the libraries raise.

    Attributes:
        path: where it is.
    """

    path: Path

    @classmethod
    def find(cls, name: str) -> GgufFile | None:
        """Return the GGUF file ``name``; None if it is a folder or a Hub id.

        Raises:
            InputError: there is no such file, it is of another kind, or the package that reads it
                is missing.
        """
        path = Path(name)
        if not path.is_file():
            if path.suffix.lower() != ".gguf" or path.is_dir():
                return None
            raise InputError(f"--model_name {name}: there is no such file; give one that is there")
        try:
            with path.open("rb") as file:
                begin = file.read(len(MAGIC))
        except OSError as error:
            raise InputError(
                f"--model_name {name}: cannot be read ({error.strerror}); give another file"
            ) from error
        if begin != MAGIC:
            raise InputError(
                f"--model_name {name}: this file is no GGUF file; give a Hub id, a local model "
                "directory or a GGUF file"
            )
        if importlib.util.find_spec("gguf") is None:
            raise InputError(
                f"--model_name {name}: a GGUF file needs the package gguf: pip install gguf, or "
                "give the model as a Hub id or a local directory"
            )
        return cls(path)

    def config(self) -> PreTrainedConfig:
        """Read the model's configuration."""
        return copy.deepcopy(_config(self.path.absolute(), self.path.stat().st_mtime_ns))

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Read the tokenizer."""
        with tempfile.TemporaryDirectory() as empty:
            # AutoTokenizer makes the same one, but reads the whole file once more before.
            tokenizer = PreTrainedTokenizerFast.from_pretrained(
                empty, gguf_file=str(self.path.absolute())
            )
        _remove_tokens_from(self.config().vocab_size, tokenizer)
        tokenizer.name_or_path = str(self.path)
        return tokenizer

    def saved_dtype(self) -> torch.dtype:
        """Return the dtype of most weights; bfloat16 for quantised ones, which it loses least of.

        Nothing overflows in it, and it has more digits than blocks of 8 bits or fewer.
        """
        metadata, _ = read_gguf_metadata(str(self.path))
        return DTYPE_OF_FILE_TYPE.get(metadata.get("general.file_type"), torch.bfloat16)

    def load(
        self, dtype: torch.dtype, device_map: str | None
    ) -> tuple[PreTrainedModel, dict[str, Any]]:
        """Load the weights, quantised ones too, as ordinary weights of ``dtype``.

        Returns:
            The model, which is trained and saved as any other, and transformers' loading info.
        """
        _, tensors = read_gguf_metadata(str(self.path))
        with tempfile.TemporaryDirectory() as empty:
            model, found = AutoModelForCausalLM.from_pretrained(
                empty,
                gguf_file=str(self.path.absolute()),
                config=self.config(),
                dtype=dtype,
                device_map=device_map,
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        # An adapter names the model that it belongs to; peft looks for a config.json there.
        model.name_or_path = model.config.name_or_path = str(self.path)
        warnings.filterwarnings("ignore", "Could not find a config file in", UserWarning)
        if scaled := [name for name in tensors if name.startswith(("rope_freqs", "rope_factors"))]:
            logger.warning(
                "--model_name %s: transformers leaves out %s, by which this model scales its "
                "positions: results differ from those of the original",
                self.path,
                ", ".join(scaled),
            )
        return model, found


def _remove_tokens_from(size: int, tokenizer: PreTrainedTokenizerFast) -> None:
    """Remove what transformers adds beyond the vocabulary, as <|endoftext|> to Llama 3's."""
    backend = tokenizer.backend_tokenizer
    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < size]
    tokenizer._tokenizer = backend.from_str(json.dumps(state))


@functools.lru_cache(maxsize=1)
def _config(path: Path, changed: int) -> PreTrainedConfig:
    """Read a file's configuration once: a large vocabulary takes many seconds each time."""
    with tempfile.TemporaryDirectory() as empty:
        return AutoConfig.from_pretrained(empty, gguf_file=str(path))
