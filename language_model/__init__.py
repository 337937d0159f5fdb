"""From samples to losses and predictions of a causal language model.

loading.py and adapters.py make the model, encoding.py its tokens, packing.py a batch of them,
scoring.py their log-probabilities and generated text, objectives.py a loss. head.py is the
language-model head trained alone.
"""
