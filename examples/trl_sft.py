"""TRL's SFTTrainer without a backward pass: HiZOO, or error broadcast with ``--broadcast``.

``python -m examples.trl_sft`` runs it, from the repository's root. It needs trl.
"""

import sys

from datasets import load_dataset
from transformers import Trainer
from trl import SFTConfig, SFTTrainer

from error_broadcast import ErrorBroadcast
from forward_only import ForwardOnlyMixin
from hizoo import HiZOO


class ForwardOnlySFT(ForwardOnlyMixin, SFTTrainer):
    """SFTTrainer that takes forward passes only."""


class BroadcastSFT(ForwardOnlySFT):
    """The same, with the logits that TRL's fused loss leaves out."""

    compute_loss = Trainer.compute_loss


rows = load_dataset("json", data_files="data/samples/sst2/train.jsonl", split="train[:800]").map(
    lambda row: {
        "prompt": f"{row['sentence'].strip()} It was",
        "completion": (" terrible", " great")[row["label"]],
    }
)
if broadcasts := "--broadcast" in sys.argv:
    kind, method = BroadcastSFT, (ErrorBroadcast, {"lr": 1.0})
else:
    kind, method = ForwardOnlySFT, (HiZOO, {"lr": 5e-4, "hessian_smooth": 1e-5})
# Autocast, which TRL chooses, would round the losses to bfloat16.
args = SFTConfig("result/trl", bf16=False, max_steps=45, logging_steps=15, use_cpu=True)
kind("data/tiny-opt", args, train_dataset=rows, optimizer_cls_and_kwargs=method).train()
