"""Writes a tiny Llama as a GGUF file, the way llama.cpp lays it out."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import torch
from tiny_models import tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import LlamaForCausalLM

# Names of a layer's weights there, by their names in transformers.
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    architecture: str = "llama",
    stored: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    left_out: str = "",
    added: tuple[str, ...] = (),
) -> None:
    """Write a model and the bundled model's tokenizer.

    Args:
        path: of the file.
        model: what to write.
        architecture: its name in the file.
        stored: the type of the matrices; vectors stay float32.
        left_out: a tensor that is not written.
        added: names of further tensors.
    """
    writer = gguf.GGUFWriter(path, architecture)
    config = model.config
    writer.add_file_type({"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7}[stored.name])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    write_tokenizer(writer)
    for name, weight in model.state_dict().items():
        if name.startswith("model.layers."):
            _, _, layer, part = name.split(".", 3)
            there = f"blk.{layer}.{LAYER_NAMES[part.removesuffix('.weight')]}.weight"
        else:
            there = NAMES[name]
        if there == left_out:
            continue
        if "attn_q" in there:
            weight = pairs_of_neighbours(weight, config.num_attention_heads)
        elif "attn_k" in there:
            weight = pairs_of_neighbours(weight, config.num_key_value_heads)
        if weight.dim() == 1:
            writer.add_tensor(there, weight.numpy())
        else:
            writer.add_tensor(there, gguf.quantize(weight.numpy(), stored), raw_dtype=stored)
    for name in added:
        writer.add_tensor(name, torch.ones(4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_tokenizer(writer: gguf.GGUFWriter) -> None:
    """Write the vocabulary and merges of the bundled model, which begins texts with </s>."""
    tokenizer = tiny_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    control = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in control else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in state["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(True)


def pairs_of_neighbours(weight: Tensor, heads: int) -> Tensor:
    """Reorder a head's rows: rotary positions turn neighbours there, halves in transformers."""
    rows, columns = weight.shape
    halves = weight.view(heads, 2, rows // heads // 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns)


def tiny_llama() -> LlamaForCausalLM:
    """Return the model that the tests write; its widths are whole blocks of quantised weights."""
    return tiny_model("llama", intermediate_size=64)
