"""HiZOO in a Lightning module, with manual optimization, on one device.

    pip install lightning
    python -m examples.lightning_module

It needs transformers and hizoo (``pip install .``, or hizoo.py and zeroth_order/ beside your file).
"""

from __future__ import annotations

import json
from pathlib import Path

import lightning
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from hizoo import HiZOO, Layers

MODEL = "data/tiny-opt"
REVIEWS = Path("data/samples/sst2/train.jsonl")
ANSWERS = (" terrible", " great")


class ReviewModule(lightning.LightningModule):
    """A language model that learns to say whether a film was found terrible or great."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False  # There is no backward pass.
        self.model = AutoModelForCausalLM.from_pretrained(MODEL)
        self.model.eval()  # The losses of a step must differ by the perturbation, not by dropout.
        self.losses: list[float] = []

    def configure_optimizers(self) -> HiZOO:
        """Return the optimizer; ``layers`` keeps half-precision weights from drifting."""
        return HiZOO(self.parameters(), lr=5e-4, hessian_smooth=1e-5, layers=Layers(self))

    def training_step(self, batch: dict[str, Tensor], index: int) -> None:
        """Do a whole step: three forward passes and the update."""
        self.losses.append(self.optimizers().step(lambda: self.model(**batch).loss))
        if len(self.losses) % 16 == 0:
            print(f"step {self.global_step}: loss {sum(self.losses[-16:]) / 16:.4f}")

    def train_dataloader(self) -> DataLoader:
        """Return batches of prompts and answers; labels of -100 have no part in the loss."""
        tokenizer, examples = AutoTokenizer.from_pretrained(MODEL), []
        for review in map(json.loads, REVIEWS.open(encoding="utf-8")):
            prompt = review["sentence"].strip() + " It was"
            length = len(tokenizer.encode(prompt))
            tokens = tokenizer.encode(prompt + ANSWERS[review["label"]])
            examples.append({"input_ids": tokens, "labels": [-100] * length + tokens[length:]})
        return DataLoader(examples, 16, shuffle=True, collate_fn=DataCollatorForSeq2Seq(tokenizer))


if __name__ == "__main__":
    lightning.Trainer(max_steps=48, logger=False, enable_checkpointing=False).fit(ReviewModule())
