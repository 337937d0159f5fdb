"""A model's answer to every sample: the option with the best score, or a generated text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from language_model.encoding import Encoder
from language_model.generation import GenerationSettings, generate
from language_model.scoring import score_options
from tasks import Sample
from utils import InputError, process_index


@dataclass(frozen=True)
class Prediction:
    """What the model says about an example: a candidate or a text, and every option's score."""

    answer: Any
    scores: tuple[float, ...] | None = None


def predict(
    model: PreTrainedModel,
    encoder: Encoder,
    samples: Sequence[Sample],
    demonstrations: Sequence[Sequence[Sample]],
    batch_size: int,
    calibration: str | None = None,
    generation: GenerationSettings | None = None,
    progress: str | None = "evaluation",
) -> list[Prediction]:
    """Return the model's answer to every sample, each with ``demonstrations`` of its own.

    ``calibration`` is "sfc", "icl_sfc" (content-free prompt after the demonstrations too) or None;
    ``progress`` is the label of the progress bar, None for no bar.
    """
    model.eval()
    if encoder.task.generation and calibration:
        raise InputError(f"--{calibration}: {encoder.task.name} has no options to calibrate")
    # With FSDP a forward pass gathers weights from all processes: they must run the same ones.
    shares = torch.distributed.is_initialized() and not isinstance(model, FSDPModule)
    processes = torch.distributed.get_world_size() if shares else 1
    pairs = list(zip(samples, demonstrations, strict=True))
    own = pairs[process_index() % processes :: processes]
    if not own:
        predictions = []
    elif encoder.task.generation:
        prompts = [encoder.prompt(sample, shown) for sample, shown in own]
        settings = generation or GenerationSettings()
        texts = generate(model, encoder.tokenizer, prompts, settings, batch_size, progress)
        predictions = [Prediction(text) for text in texts]
    else:
        predictions = _chosen(model, encoder, own, batch_size, calibration, progress)
    gathered = [predictions] * processes
    if processes > 1:
        torch.distributed.all_gather_object(gathered, predictions)
    return [gathered[number % processes][number // processes] for number in range(len(pairs))]


def _chosen(
    model: PreTrainedModel,
    encoder: Encoder,
    pairs: Sequence[tuple[Sample, Sequence[Sample]]],
    batch_size: int,
    calibration: str | None,
    progress: str | None,
) -> list[Prediction]:
    """Score the options of every sample, and choose the best of each."""
    encoded = [encoder.options(sample, shown) for sample, shown in pairs]
    scored = score_options(model, encoded, batch_size, progress)
    scores = [[total / count for total, count in options] for options in scored]
    if calibration:
        content_free = [
            encoder.options(sample, shown if calibration == "icl_sfc" else (), content_free=True)
            for sample, shown in pairs
        ]
        label = progress and f"{progress} ({calibration})"
        priors = score_options(model, content_free, batch_size, label)
        scores = [
            [total - prior for (total, _), (prior, _) in zip(options, of_prompt, strict=True)]
            for options, of_prompt in zip(scored, priors, strict=True)
        ]
    predictions = []
    for (sample, _), values in zip(pairs, scores, strict=True):
        best = max(range(len(values)), key=values.__getitem__)
        predictions.append(Prediction(sample.candidates[best], tuple(values)))
    return predictions
