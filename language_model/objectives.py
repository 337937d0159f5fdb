"""What training makes small: the options' losses, and metrics that have no gradient.

Every objective takes a model and a batch and returns a scalar. ``losses_of_examples`` turns one
into what returns the losses of the examples, (examples,), whose mean the scalar is.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

import metrics
from language_model.generation import GenerationSettings, generate
from language_model.precision import NotFinite
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


def language_model_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the examples' parts of ``language_model_loss``: each token counts alike."""
    losses = -token_log_probabilities(model, batch)
    examples = batch["option_examples"][batch["read_options"]].to(losses.device)
    count = len(batch["correct"])
    sums = torch.zeros(count, device=losses.device).index_add(0, examples, losses)
    return sums * (count / len(losses))


def classification_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the examples' parts of ``classification_loss``; 0 where no option is correct."""
    scores = option_scores(model, batch)
    correct = batch["correct"].to(scores.device)
    losses = nn.functional.cross_entropy(scores, correct, reduction="none")
    return losses * (len(losses) / correct.ge(0).sum())


def negative_accuracies(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return -1 for examples whose best option is acceptable, 0 for the others; no gradient.

    NaN if a score is.
    """
    with torch.no_grad():
        scores = option_scores(model, batch)
    acceptable = by_example(batch["acceptable"].to(scores.device), batch, False)
    chosen = acceptable.gather(1, scores.argmax(dim=1, keepdim=True)).squeeze(1)
    return (-chosen.float()).where(~scores.isnan().any(dim=1), torch.nan)


def negative_accuracy(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return minus the fraction of examples whose best option is acceptable; no gradient.

    NaN if a score is.
    """
    return negative_accuracies(model, batch).mean()


def option_scores(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the options' mean log-probabilities, (examples, most options), missing ones -inf."""
    sums, lengths = option_sums(token_log_probabilities(model, batch), batch)
    return by_example(sums / lengths, batch, -torch.inf)


def by_example(of_options: Tensor, batch: dict[str, Tensor], missing: float) -> Tensor:
    """Return (examples, most options) from (options,), with ``missing`` where an example has fewer.

    The options lie in the order of their examples.
    """
    examples = batch["option_examples"].to(of_options.device)
    counts = torch.bincount(examples, minlength=len(batch["correct"]))
    first = counts.cumsum(0) - counts
    within = torch.arange(len(examples), device=of_options.device) - first[examples]
    rows = of_options.new_full((len(counts), int(counts.max())), missing)
    return rows.index_put((examples, within), of_options)


@dataclass(frozen=True)
class GenerationExample:
    """Tokens of a prompt, and the texts that may follow."""

    prompt: tuple[int, ...]
    answers: tuple[str, ...]


def collate_generation(examples: Sequence[GenerationExample]) -> dict[str, Any]:
    """Make a batch for ``NegativeTextMetric``."""
    return {
        "prompts": [example.prompt for example in examples],
        "answers": [example.answers for example in examples],
    }


@dataclass(frozen=True)
class RewardExample:
    """Tokens of a prompt, and the sample that its text's reward depends on."""

    prompt: tuple[int, ...]
    sample: Sample


def collate_rewards(examples: Sequence[RewardExample]) -> dict[str, Any]:
    """Make a batch for ``NegativeReward``."""
    return {
        "prompts": [example.prompt for example in examples],
        "samples": [example.sample for example in examples],
    }


@dataclass
class NegativeReward:
    """Minus the mean reward of the texts that the model generates; no gradient.

    Where texts are drawn at random, all losses of a step draw with the same random numbers, so that
    they differ by the weights alone. Between steps, for dev losses, the numbers are always the
    same.

    Attributes:
        task: with a reward.
        tokenizer: the model's own.
        settings: how text is generated.
        samples: texts of a prompt.
        seed: of the run.
        step: the number of the step; None between steps.
    """

    task: Task
    tokenizer: PreTrainedTokenizerBase
    settings: GenerationSettings
    samples: int
    seed: int
    step: int | None = None

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Generate texts behind every prompt of the batch, and ask for their rewards.

        NaN if logits or a reward are.
        """
        prompts = [prompt for prompt in batch["prompts"] for _ in range(self.samples)]
        samples = [sample for sample in batch["samples"] for _ in range(self.samples)]
        try:
            with self._random_numbers(model.device):
                texts = generate(model, self.tokenizer, prompts, self.settings, len(prompts), None)
            value = metrics.mean(self.task.rewards(texts, samples))
        except NotFinite:
            value = math.nan
        return torch.tensor(-value, dtype=torch.float32, device=model.device)

    @contextlib.contextmanager
    def _random_numbers(self, device: torch.device) -> Iterator[None]:
        """Draw with numbers of the step, and leave those of everything else as they are."""
        numbers = (self.seed, 0 if self.step is None else self.step + 1)
        seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            yield


TEXT_METRICS = {"f1": metrics.mean_f1, "em": metrics.mean_exact_match}


@dataclass(frozen=True)
class NegativeTextMetric:
    """Minus the mean F1 or exact match of the text that the model generates; no gradient.

    Attributes:
        metric: "f1" or "em".
        tokenizer: the model's own.
        settings: how text is generated; greedy or beams, for the same text every time.
    """

    metric: str
    tokenizer: PreTrainedTokenizerBase
    settings: GenerationSettings

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Generate an answer behind every prompt of the batch, and compare; NaN if logits are."""
        return self.losses(model, batch).mean()

    def losses(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Return the same of every example, (examples,)."""
        prompts, answers = batch["prompts"], batch["answers"]
        try:
            texts = generate(model, self.tokenizer, prompts, self.settings, len(prompts), None)
        except NotFinite:
            return torch.full((len(prompts),), math.nan, device=model.device)
        metric = TEXT_METRICS[self.metric]
        values = [metric([text], [right]) for text, right in zip(texts, answers, strict=True)]
        return torch.tensor(values, dtype=torch.float32, device=model.device).neg()


BY_EXAMPLE: dict[Objective, Objective] = {
    language_model_loss: language_model_losses,
    classification_loss: classification_losses,
    negative_accuracy: negative_accuracies,
}


def losses_of_examples(objective: Objective) -> Objective | None:
    """Return what gives an objective's losses example by example; None if that is not known."""
    if isinstance(objective, NegativeTextMetric):
        return objective.losses
    return next((losses for known, losses in BY_EXAMPLE.items() if known is objective), None)
