"""From samples to losses and predictions of a causal language model.

loading.py, adapters.py and saved_adapters.py make the model, encoding.py its tokens, packing.py a
batch of them, scoring.py their log-probabilities, generation.py text, prediction.py an answer of
either, objectives.py a loss. head.py is the language-model head trained alone; shared_tokens.py and
batches.py spare time and memory; precision.py says what to do where numbers are not finite.
"""
