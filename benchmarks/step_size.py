"""A step bounded by the curvature beside fixed learning rates, on the bundled model.

    python benchmarks/step_size.py
    python benchmarks/step_size.py --rules "k 0.1" --seeds 0

Along a direction u the loss falls fastest at η = 1/2c, where c is the absolute curvature that
HiZOO measures. A rule "k 0.1" takes η = k / 2c̄ with c̄ = max(0.95 c̄ + 0.05 c, 0.3 c); "every 10"
measures c in the first ten steps and in every tenth one after. The step is written plainly, with
noise from torch's generator, so that rules can be tried before they are built into hizoo.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch
from torch import Tensor

from language_model.encoding import EncodedExample, Encoder
from language_model.loading import load_config_and_tokenizer, load_model
from language_model.objectives import classification_loss
from language_model.packing import collate
from task_data.sampling import sample_train_dev
from tasks import get_task, load_samples

MODEL, SAMPLES = str(ROOT / "data" / "tiny-opt"), str(ROOT / "data" / "samples")
EPS, BATCH, TRAIN, DEV, SHOWN = 1e-3, 16, 1000, 200, (50, 100, 200, 300)


@dataclass(frozen=True)
class Rule:
    """How long a step is.

    Attributes:
        eta: fixed learning rate η; None: by the curvature.
        part: k, of the step at which the loss along u is lowest.
        every: steps between two measurements of c.
        smooth: α of HiZOO's h; 0 is MeZO.
    """

    eta: float | None = None
    part: float = 0.1
    every: int = 1
    smooth: float = 0.0


RULES = {
    "η 8e-4": Rule(eta=8e-4),
    "η 1.6e-3": Rule(eta=1.6e-3),
    "k 0.1": Rule(),
    "k 0.1, every 10": Rule(every=10),
    "k 0.2, every 10": Rule(part=0.2, every=10),
    "k 0.05, every 10": Rule(part=0.05, every=10),
    "k 0.1, α 1e-4": Rule(smooth=1e-4),
    "k 0.1, α 1e-5": Rule(smooth=1e-5),
    "η 3.2e-3, α 1e-4": Rule(eta=3.2e-3, smooth=1e-4),
}


def batches(
    examples: list[EncodedExample], seed: int, size: int = BATCH
) -> Iterator[dict[str, Tensor]]:
    """Yield batches of whole epochs, for ever."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while True:
        if len(order) < size:
            order = torch.randperm(len(examples), generator=generator).tolist()
        numbers, order = order[:size], order[size:]
        yield collate([examples[number] for number in numbers])


@torch.no_grad()
def measure(rule: Rule, seed: int) -> tuple[list[float], int]:
    """Return the dev losses after the steps in ``SHOWN``, and the forward passes."""
    model = load_model(MODEL, torch.float32)
    _, tokenizer = load_config_and_tokenizer(MODEL)
    task = get_task("SST2")
    encoder = Encoder(task, tokenizer, 1024)
    drawn = sample_train_dev(load_samples(task, SAMPLES)[0], TRAIN, DEV, seed)
    train, dev = ([encoder.options(sample) for sample in part] for part in drawn)
    parameters = list(model.parameters())
    offsets = [torch.zeros_like(parameter) for parameter in parameters]  # h - 1
    mean_curvature, losses, passes = 0.0, [], 0
    data = batches(train, seed)
    for step in range(max(SHOWN)):
        batch = next(data)

        def loss(batch: dict[str, Tensor] = batch) -> float:
            return float(classification_loss(model, batch))

        def directions(step: int = step) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            generator = torch.Generator().manual_seed(seed * 1000003 + step)
            for parameter, offset in zip(parameters, offsets, strict=True):
                yield parameter, torch.randn(parameter.shape, generator=generator), offset

        def shift(scale: float) -> None:
            for parameter, noise, offset in directions():
                parameter.add_(noise / torch.sqrt(1 + offset), alpha=scale)

        measures = rule.smooth > 0 or (
            rule.eta is None and (step % rule.every == 0 or step < rule.every)
        )
        center = loss() if measures else 0.0
        shift(EPS)
        plus = loss()
        shift(-2 * EPS)
        minus = loss()
        shift(EPS)
        passes += 2 + measures
        gradient, growth = (plus - minus) / (2 * EPS), 0.0
        if measures:
            curvature = abs(plus + minus - 2 * center) / (2 * EPS**2)
            growth = rule.smooth * curvature
            average = 0.95 * mean_curvature + 0.05 * curvature
            mean_curvature = max(average, 0.3 * curvature) if mean_curvature else curvature
        eta = rule.part / (2 * mean_curvature) if rule.eta is None else rule.eta
        for parameter, noise, offset in directions():
            if rule.smooth:
                offset.add_((1 + offset) * (growth * noise.square() - rule.smooth))
            parameter.add_(noise / torch.sqrt(1 + offset), alpha=-eta * gradient)
        if step + 1 in SHOWN:
            losses.append(float(classification_loss(model, collate(dev))))
    return losses, passes


def main() -> None:
    """Measure every rule with every seed, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES), help="to measure")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of data and noise")
    arguments = parser.parse_args()
    print(f"{'rule':17s} seed  dev loss after {', '.join(map(str, SHOWN))} steps  forward passes")
    for name in arguments.rules:
        for seed in arguments.seeds:
            losses, passes = measure(RULES[name], seed)
            print(f"{name:17s} {seed:4d}  {' '.join(f'{loss:.4f}' for loss in losses)}  {passes}")


if __name__ == "__main__":
    main()
