"""Tiny causal language models of several families, with random weights, and tokenizers for them."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    DbrxConfig,
    DeepseekV2Config,
    DeepseekV3Config,
    Exaone4Config,
    FalconConfig,
    Gemma2Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    GptOssConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    NanoChatConfig,
    Olmo3Config,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    RecurrentGemmaConfig,
    RobertaConfig,
    Starcoder2Config,
    XGLMConfig,
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
# Windows of 16 tokens, in every other layer where a family has both kinds.
_WINDOW = {**_GROUPED, "sliding_window": 16}
_BOTH_KINDS = {**_WINDOW, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}
_WINDOWED: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "starcoder2": (Starcoder2Config, _WINDOW),
    "gemma3": (Gemma3TextConfig, {**_BOTH_KINDS, "query_pre_attn_scalar": 8}),
    "gemma3n": (
        Gemma3nTextConfig,
        {
            **{**_BOTH_KINDS, "intermediate_size": [48, 48]},
            **{"activation_sparsity_pattern": [0.0, 0.0]},
            **{"hidden_size_per_layer_input": 8, "laurel_rank": 4, "altup_num_inputs": 2},
            **{"num_kv_shared_layers": 0, "vocab_size_per_layer_input": 1536},
        },
    ),
    "olmo3": (Olmo3Config, _BOTH_KINDS),
    "exaone4": (Exaone4Config, _BOTH_KINDS),
    "gpt_oss": (GptOssConfig, {**_BOTH_KINDS, "num_local_experts": 2, "num_experts_per_tok": 1}),
}
# DeepSeek's attention over latent keys and values, and its experts.
_LATENT = {
    **{**_GROUPED, "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8},
    **{"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8},
    **{"n_routed_experts": 2, "n_group": 1, "topk_group": 1},
}
# Configurations with names of their own for what a prefix has to know.
_OTHER_NAMES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "falcon": (FalconConfig, {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}),
    "mpt": (MptConfig, {"d_model": 32, "n_layers": 2, "n_heads": 4}),
    "gptj": (GPTJConfig, {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8}),
    "gpt_neo": (
        GPTNeoConfig,
        {
            **{"hidden_size": 32, "num_layers": 4, "num_heads": 4},
            "attention_types": [[["global", "local"], 2]],
        },
    ),
    "nanochat": (NanoChatConfig, _GROUPED),
    "xglm": (XGLMConfig, {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48}),
    "dbrx": (
        DbrxConfig,
        {
            **{"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 1024},
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    "mixtral": (MixtralConfig, {**_GROUPED, "num_local_experts": 3, "sliding_window": None}),
    "roberta": (RobertaConfig, {**_SHAPE, "intermediate_size": 48, "is_decoder": True}),
    "mamba": (MambaConfig, {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
    "recurrent_gemma": (
        RecurrentGemmaConfig,
        {**_GROUPED, "num_hidden_layers": 3, "head_dim": 8, "lru_width": 32},
    ),
    "deepseek_v2": (DeepseekV2Config, {**_LATENT, "first_k_dense_replace": 2}),
    "deepseek_v3": (
        DeepseekV3Config,
        {
            **{**_LATENT, "first_k_dense_replace": 1},
            **{"num_experts_per_tok": 1, "moe_intermediate_size": 16},
        },
    ),
}
FAMILIES = tuple(_PACKABLE)
# Three that differ: GPT-NeoX fuses its projections and renames its head; make test-all has all.
USUAL = ("opt", "llama", "gpt_neox")
of_families = pytest.mark.parametrize(
    "family",
    [*USUAL, *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES if f not in USUAL)],
)
WINDOWED_FAMILIES = tuple(_WINDOWED)
OTHER_FAMILIES = tuple(_OTHER)


@functools.cache
def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """Return the tokenizer of the bundled model; like OPT's, it begins every text with </s>.

    It is the same one for all: who changes it copies it first.
    """
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
    config_class, shape = {**_PACKABLE, **_OTHER, **_WINDOWED, **_OTHER_NAMES}[family]
    name = "init_std" if family in ("opt", "xglm") else "initializer_range"
    spread = {name: 0.2}
    special = {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}
    settings = {**shape, **spread, **special, **overrides}
    config = config_class(vocab_size=len(tiny_tokenizer()), **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases and norms, which start at 0 or 1: a mix-up would hide
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def newline_writing_model(family: str, **overrides: Any) -> PreTrainedModel:
    """Return a model that writes a newline in the place of every fourth token of the vocabulary."""
    model = tiny_model(family, **overrides)
    newline = tiny_tokenizer().encode("\n")[-1]

    def write_newlines(_: Any, __: Any, logits: Tensor) -> Tensor:
        logits[..., newline] += 100 * (logits.argmax(-1) % 4 == 0)
        return logits

    model.get_output_embeddings().register_forward_hook(write_newlines)
    return model


def appending_tokenizer() -> PreTrainedTokenizerBase:
    """Return the same vocabulary with </s> before and behind every text, as by add_eos_token."""
    state = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.post_processor = TemplateProcessing(
        single="</s> $A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>"},
        clean_up_tokenization_spaces=False,
    )


def word_tokenizer() -> PreTrainedTokenizerBase:
    """Return a tokenizer of whole words, without spaces, newlines, start and end tokens."""
    words = {"<unk>": 0, "Yes": 1, "No": 2, "Maybe": 3, "a": 4, ".": 5}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
