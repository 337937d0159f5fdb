"""HiZOO in a loop of your own, over a model of transformers.

    python -m examples.plain_loop                                 # the bundled model
    python -m examples.plain_loop facebook/opt-1.3b --lr 1e-6     # one from the Hub

It needs transformers and hizoo (``pip install .``, or hizoo.py and zeroth_order/ beside your file).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from hizoo import HiZOO, Layers

REVIEWS = Path("data/samples/sst2/train.jsonl")
ANSWERS = (" terrible", " great")


def encode(tokenizer: Any, review: dict[str, Any]) -> dict[str, list[int]]:
    """Return a prompt and its answer as tokens; labels of -100 have no part in the loss."""
    prompt = review["sentence"].strip() + " It was"
    length = len(tokenizer.encode(prompt))
    tokens = tokenizer.encode(prompt + ANSWERS[review["label"]])
    return {"input_ids": tokens, "labels": [-100] * length + tokens[length:]}


def main() -> None:
    """Fine-tune a model, and print the mean training loss of every epoch."""
    parser = argparse.ArgumentParser(description="Fine-tune a model with HiZOO.")
    parser.add_argument("model", nargs="?", default="data/tiny-opt", help="folder or Hub id")
    parser.add_argument("--lr", type=float, default=5e-4, help="lower for a larger model")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    lines = REVIEWS.read_text(encoding="utf-8").splitlines()[:256]
    examples = [encode(tokenizer, json.loads(line)) for line in lines]
    collate = DataCollatorForSeq2Seq(tokenizer)
    batches = DataLoader(examples, batch_size=16, shuffle=True, collate_fn=collate)
    model = AutoModelForCausalLM.from_pretrained(arguments.model)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    model.eval()  # The losses of a step must differ by the perturbation alone, not by dropout.
    # With ``layers`` half-precision weights do not drift; float32 does without.
    layers = Layers(model)
    optimizer = HiZOO(model.parameters(), lr=arguments.lr, hessian_smooth=1e-5, layers=layers)
    for epoch in range(1, 4):
        losses = [optimizer.step(lambda: model(**batch.to(model.device)).loss) for batch in batches]
        print(f"epoch {epoch}: loss {sum(losses) / len(losses):.4f}")


if __name__ == "__main__":
    main()
