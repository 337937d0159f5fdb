"""What training minimises: losses of options and of answers, and metrics that have no gradient.

Every objective takes a model and a batch and returns a scalar.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from language_model.batches import NotFinite
from language_model.generation import GenerationSettings, generate
from language_model.scoring import option_sums, token_log_probabilities
from tasks import Sample, Task

Objective = Callable[[nn.Module, dict[str, Any]], Tensor]


def language_model_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the mean negative log-probability of the batch's scored tokens."""
    return -token_log_probabilities(model, batch).mean()


def classification_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the cross-entropy over the options' mean log-probabilities, averaged over examples."""
    scores = option_scores(model, batch)
    return nn.functional.cross_entropy(scores, batch["correct"].to(scores.device))


@torch.no_grad()
def negative_accuracy(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return minus the fraction of examples whose best option is acceptable; NaN if a score is."""
    scores = option_scores(model, batch)
    acceptable = by_example(batch["acceptable"].to(scores.device), batch, False)
    chosen = acceptable.gather(1, scores.argmax(dim=1, keepdim=True))
    return -chosen.float().mean().where(~scores.isnan().any(), torch.nan)


def option_scores(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the options' mean log-probabilities, (examples, most options), missing ones -inf."""
    sums = option_sums(token_log_probabilities(model, batch), batch)
    lengths = torch.bincount(batch["read_options"], minlength=len(sums)).to(sums.device)
    return by_example(sums / lengths, batch, -torch.inf)


def by_example(of_options: Tensor, batch: dict[str, Tensor], missing: float) -> Tensor:
    """Return (examples, most options) from (options,), with ``missing`` where an example has fewer.

    The options are in the order of their examples.
    """
    counts = torch.bincount(batch["option_examples"], minlength=len(batch["correct"])).tolist()
    rows = of_options.split(counts)
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=missing)


def collate_prompts(examples: Sequence[tuple[tuple[int, ...], Sample]]) -> dict[str, Any]:
    """Make a batch for ``NegativeTextMetric`` of prompts' tokens, each with its sample."""
    prompts, samples = zip(*examples, strict=True)
    return {"prompts": prompts, "samples": samples}


@dataclass
class NegativeTextMetric:
    """Minus the mean of a task's metric of the texts that the model generates; no gradient.

    Where texts are sampled, all losses of a step use the same random numbers, so that they differ
    by the weights alone. Between steps, for dev losses, the random numbers are always the same.
    """

    task: Task
    metric: str  # "reward", "f1" or "em"
    tokenizer: PreTrainedTokenizerBase
    settings: GenerationSettings
    samples: int = 1  # texts of a prompt
    seed: int = 0
    step: int | None = None  # None between steps

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Generate texts after every prompt of the batch; NaN if logits are."""
        prompts = [prompt for prompt in batch["prompts"] for _ in range(self.samples)]
        samples = [sample for sample in batch["samples"] for _ in range(self.samples)]
        numbers = (self.seed, 0 if self.step is None else self.step + 1)
        seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
        devices = [model.device] if model.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=devices):
                torch.manual_seed(seed)
                texts = generate(model, self.tokenizer, prompts, self.settings, len(prompts), None)
            value = self.task.score(texts, samples)[self.metric]
        except NotFinite:
            value = math.nan
        return torch.tensor(-value, dtype=torch.float32, device=model.device)
