"""ZerothOrderTrainer, a transformers.Trainer, on a data set of your own.

``python -m examples.own_data_set`` runs it, from the repository's root and with requirements.txt.
"""

from __future__ import annotations

from typing import Any

from datasets import load_dataset
from torch import Tensor, cuda, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    TrainingArguments,
)

from trainer import ZerothOrderTrainer
from zeroth_order.config import HiZOOConfig

MODEL = "data/tiny-opt"
FILES = {"train": "data/samples/sst2/train.jsonl", "dev": "data/samples/sst2/validation.jsonl"}
ANSWERS = (" terrible", " great")

tokenizer = AutoTokenizer.from_pretrained(MODEL)


def encode(row: dict[str, Any]) -> dict[str, list[int]]:
    """Return a prompt and its answer as tokens; labels of -100 have no part in the loss."""
    prompt = row["sentence"].strip() + " It was"
    length = len(tokenizer.encode(prompt))
    tokens = tokenizer.encode(prompt + ANSWERS[row["label"]])
    return {"input_ids": tokens, "labels": [-100] * length + tokens[length:]}


def answer_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return what is to become small: any number, it needs no gradient."""
    return model(**batch).loss


rows = load_dataset("json", data_files=FILES)
examples = rows.map(encode).select_columns(["input_ids", "labels"])
ZerothOrderTrainer(
    model=AutoModelForCausalLM.from_pretrained(MODEL),
    args=TrainingArguments(
        output_dir="result/own-data-set",
        max_steps=45,
        per_device_train_batch_size=16,
        dataloader_pin_memory=cuda.is_available(),
        eval_strategy="steps",
        eval_steps=15,
    ),
    config=HiZOOConfig(lr=5e-4, hessian_smooth=1e-5, seed=42),
    objective=answer_loss,
    train_dataset=examples["train"],
    eval_dataset=examples["dev"],
    data_collator=DataCollatorForSeq2Seq(tokenizer),
).train()
