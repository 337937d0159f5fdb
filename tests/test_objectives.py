"""Objectives without a gradient, beside a computation by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from oracle_scoring import draw, log_probabilities, model_of, samples_of
from tiny_models import newline_writing_model, tiny_model, tiny_tokenizer
from torch import Tensor

from hizoo import HiZOO, Layers
from language_model import objectives, packing
from language_model.encoding import Encoder
from language_model.generation import GenerationSettings, generate
from language_model.scoring import predict
from metrics import exact_match, f1, mean
from tasks import get_task
from zeroth_order.layerwise import LayerwiseWeights


def encoder(task: str) -> Encoder:
    return Encoder(get_task(task), tiny_tokenizer(), 1024, 8)


@pytest.mark.parametrize("family", ["opt", "llama", "gpt_neox"])
@pytest.mark.parametrize(("task", "share"), [("SST2", True), ("Copa", False), ("ReCoRD", True)])
def test_negative_accuracy(family: str, task: str, share: bool) -> None:
    model, samples = model_of(family), samples_of(task)[1][:8]
    examples = [encoder(task).options(sample) for sample in samples]
    right = 0
    for sample, example in zip(samples, examples, strict=True):
        scores = [log_probabilities(model, o.tokens, o.scored).mean() for o in example.options]
        best = max(range(len(scores)), key=scores.__getitem__)
        right += sample.candidates[best] in sample.correct
    loss = objectives.negative_accuracy(model, packing.collate(examples, share_prompt=share))
    assert loss.item() == pytest.approx(-right / 8)
    assert not loss.requires_grad


def test_what_is_not_finite_is_a_loss_that_is_not_finite() -> None:
    """So that the step is skipped: no option and no text follows from NaN."""
    model = tiny_model("llama")
    model.lm_head.weight.data[7] = torch.nan
    examples = [encoder("SST2").options(sample) for sample in samples_of("SST2")[1][:4]]
    assert objectives.negative_accuracy(model, packing.collate(examples)).isnan()
    sample = samples_of("SQuAD")[1][0]
    example = (encoder("SQuAD").prompt(sample), sample)
    settings = GenerationSettings(4)
    objective = objectives.NegativeTextMetric(get_task("SQuAD"), "f1", tiny_tokenizer(), settings)
    assert objective(model, objectives.collate_prompts([example])).isnan()


def test_any_of_several_answers_is_right() -> None:
    sample = samples_of("ReCoRD")[1][0]
    sample = dataclasses.replace(sample, correct=(sample.candidates[2], sample.candidates[0]))
    example = encoder("ReCoRD").options(sample)
    right = {example.correct, *example.also_correct}
    assert {sample.candidates[index] for index in right} == set(sample.correct)
    batch = packing.collate([example, encoder("ReCoRD").options(samples_of("ReCoRD")[1][0])])
    assert batch["acceptable"][: len(example.options)].nonzero().flatten().tolist() == sorted(right)


def test_no_option_is_right_where_none_is_correct() -> None:
    """Not the first one: the classification loss leaves the example out."""
    model, (first, second) = model_of("llama"), samples_of("ReCoRD")[1][:2]
    without = dataclasses.replace(first, correct=("another name",))
    one, other = (encoder("ReCoRD").options(sample) for sample in (without, second))
    assert objectives.negative_accuracy(model, packing.collate([one])) == 0
    both, alone = (
        objectives.classification_loss(model, packing.collate(examples))
        for examples in ([one, other], [other])
    )
    assert both.item() == pytest.approx(alone.item(), abs=1e-6)
    answers = [
        prediction.answer for prediction in predict(model, encoder("ReCoRD"), [without], [[]], 1)
    ]
    assert get_task("ReCoRD").score(answers, [without]) == {"accuracy": 0.0}


@pytest.mark.parametrize(("name", "metric"), [("f1", f1), ("em", exact_match)])
def test_negative_metric_of_generated_text(name: str, metric: object) -> None:
    model, tokenizer = model_of("llama"), tiny_tokenizer()
    settings = GenerationSettings(max_new_tokens=6)
    samples, _ = draw("SQuAD", 6, 0)
    prompts = [encoder("SQuAD").prompt(sample) for sample in samples]
    texts = [generate(model, tokenizer, [p], settings, 1, None)[0] for p in prompts]
    assert sum(map(bool, texts)) > 3
    # Some of the texts are right, so that the value is neither 0 nor 1.
    answers = [(texts[0],), (texts[1], "another"), *((f"{text} word",) for text in texts[2:])]
    examples = [
        (prompt, dataclasses.replace(sample, correct=right))
        for prompt, sample, right in zip(prompts, samples, answers, strict=True)
    ]
    objective = objectives.NegativeTextMetric(get_task("SQuAD"), name, tokenizer, settings)
    loss = objective(model, objectives.collate_prompts(examples))
    assert loss.item() == pytest.approx(-mean([*map(metric, texts, answers)]))
    assert -1 < loss.item() < 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generation_inside_a_layerwise_loss(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text is that of the perturbed weights, whose noise is drawn once for all tokens."""
    model, tokenizer = newline_writing_model("llama").to(dtype), tiny_tokenizer()
    samples, _ = draw("SQuAD", 4, 0)
    prompts = [encoder("SQuAD").prompt(sample) for sample in samples]
    settings = GenerationSettings(max_new_tokens=6)
    parameters = [p for p in model.parameters() if p.requires_grad]
    before = [p.clone() for p in parameters]
    texts: list[list[str]] = []

    def closure() -> Tensor:
        texts.append(generate(model, tokenizer, prompts, settings, 4, None))
        return torch.tensor(0.0)

    drawn: list[int] = []
    chunks_with_noise = LayerwiseWeights.chunks_with_noise

    def count(self: LayerwiseWeights, parameters: list, direction: int) -> Any:
        drawn.append(len(parameters))
        return chunks_with_noise(self, parameters, direction)

    monkeypatch.setattr(LayerwiseWeights, "chunks_with_noise", count)
    layers = Layers(model)
    assert layers.check(closure) == []
    texts.clear()
    optimizer = HiZOO(parameters, lr=0.0, eps=0.5, hessian_smooth=0.0, layers=layers)
    optimizer.estimate(closure)
    # Every weight twice: in the first run of its module and, kept from then on, in the second.
    assert sum(drawn) <= len(texts) * 2 * len(parameters)
    assert all(torch.equal(p, q) for p, q in zip(parameters, before, strict=True))
    optimizer.restore()
    for number, sign in enumerate((1, -1)):
        moved = newline_writing_model("llama").to(dtype)
        other = HiZOO(moved.parameters(), lr=0.0, eps=0.5, hessian_smooth=0.0)
        other.loss_along(lambda: 0.0, sign * 0.5)
        assert generate(moved, tokenizer, prompts, settings, 4, None) == texts[number]
    assert texts[0] != texts[1]
