"""Tiny causal language models of several families, with random weights, and tokenizers for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

TINY_OPT = Path(__file__).parent.parent / "data" / "tiny-opt"

_SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
}
_GROUPED = {**_SHAPE, "intermediate_size": 48, "num_key_value_heads": 2}
_PACKABLE: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "opt": (OPTConfig, {**_SHAPE, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gpt2": (GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 1024}),
    "gpt_neox": (GPTNeoXConfig, {**_SHAPE, "intermediate_size": 48}),
    "phi": (PhiConfig, _GROUPED),
    "llama": (LlamaConfig, _GROUPED),
    "qwen2": (Qwen2Config, {**_GROUPED, "max_window_layers": 1}),
    "mistral": (MistralConfig, {**_GROUPED, "sliding_window": None}),
    "gemma2": (Gemma2Config, {**_GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8}),
}
# Bloom's attention reads distances, not positions, and no 4-D mask; LFM2's convolutions mix tokens.
_OTHER: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "bloom": (BloomConfig, {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "lfm2": (Lfm2Config, {**_GROUPED, "layer_types": ["conv", "full_attention"]}),
}
FAMILIES = tuple(_PACKABLE)
OTHER_FAMILIES = tuple(_OTHER)


def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """Return the tokenizer of the bundled model; like OPT's, it begins every text with </s>."""
    return AutoTokenizer.from_pretrained(TINY_OPT)


def tokenizer_without_start() -> PreTrainedTokenizerBase:
    """Return the same vocabulary, but no start and no pad token, as Qwen2's and GPT-2's habits."""
    state = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    state["post_processor"] = None
    tokenizer = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", clean_up_tokenization_spaces=False
    )


def tiny_model(family: str, **overrides: Any) -> PreTrainedModel:
    """Return a seeded float32 model in evaluation mode, for ``tiny_tokenizer``'s vocabulary.

    Weights are large, so that log-probabilities of different texts differ clearly.
    """
    config_class, shape = {**_PACKABLE, **_OTHER}[family]
    vocabulary = len(tiny_tokenizer())
    spread = {"init_std": 0.2} if family == "opt" else {"initializer_range": 0.2}
    special = {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}
    config = config_class(vocab_size=vocabulary, **{**shape, **spread, **special, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases and norms, which start at 0 or 1: a mix-up would hide
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()
