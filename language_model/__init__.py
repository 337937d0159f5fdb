"""From samples to losses and predictions of a causal language model.

- model: loading (weight_files, streaming), adapters, head (trained alone)
- samples to tokens to batches: encoding, packing
- batches to answers: scoring, generation; batches halves them where memory is short, shared_tokens
  reads common tokens once
- training: objectives
"""
