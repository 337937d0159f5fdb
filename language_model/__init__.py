"""From samples to losses and predictions of a causal language model.

- model: loading, gguf_files, weight_names, adapters, saved_adapters, head (trained alone)
- samples to tokens to batches: encoding, chat, packing, batches
- batches to answers: scoring, generation, prediction; shared_tokens reads common tokens once
- training: objectives; precision says what to do about numbers that are not finite
"""
