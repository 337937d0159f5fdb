"""What half precision does to a zeroth-order run: drift at learning rate 0, and accuracy.

    python benchmarks/precision.py
    python benchmarks/precision.py --plot precision.png
    python benchmarks/precision.py --dtypes bfloat16 --eps 1e-2

Drift is the root mean square of how far the weights moved, over theirs, after steps that should not
move them at all. Accuracy is that of the bundled demo (data/tiny-opt, SST2) after the same steps
with the textbook step (shifts in place, nearest rounding, h in the weights' dtype) and with HiZOO.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import matplotlib
import torch
from matplotlib import pyplot
from step import TextbookHiZOO
from torch import Tensor, nn

from hizoo import HiZOO, HiZOOConfig, Layers
from language_model.encoding import EncodedExample, Encoder
from language_model.loading import load_config_and_tokenizer, load_model
from language_model.objectives import classification_loss
from language_model.packing import collate
from language_model.scoring import predict
from task_data.loading import load_samples
from task_data.sampling import permutation_subset, sample_train_dev
from tasks import Sample, get_task

MODEL, SAMPLES = str(ROOT / "data" / "tiny-opt"), str(ROOT / "data" / "samples")
DTYPES = ("float32", "float16", "bfloat16")
# A fixed learning rate that suits the bundled model.
LEARNING_RATE, SMOOTHING, BATCH = 1e-4, 1e-5, 16
# Its accuracy before training.
ZERO_SHOT = 0.746

Step = Callable[[Callable[[], Tensor]], Any]


def textbook_step(model: nn.Module, lr: float, eps: float, seed: int) -> Step:
    """The step as it is usually written."""
    return TextbookHiZOO(list(model.parameters()), eps, SMOOTHING, lr, seed).step


def hizoo_step(model: nn.Module, lr: float, eps: float, seed: int, compile: bool = False) -> Step:
    """HiZOO as run.py uses it: layer by layer where the weights are half precision."""
    half = next(model.parameters()).element_size() < 4
    layers = Layers(model) if half else None
    config = HiZOOConfig(lr=lr, eps=eps, hessian_smooth=SMOOTHING, seed=seed, compile=compile)
    return HiZOO(model.parameters(), config, layers=layers).step


KINDS = {"textbook": textbook_step, "HiZOO": hizoo_step}


def drift(make_step: Callable[..., Step], dtype: str, eps: float, steps: int) -> float:
    """Move of the weights after steps with learning rate 0, relative to their size."""
    torch.manual_seed(0)
    model = nn.Linear(256, 256).to(getattr(torch, dtype))
    nn.init.normal_(model.weight, std=0.02)
    before = model.weight.detach().double()
    inputs = torch.randn(4, 256, dtype=before.dtype).to(model.weight.dtype)
    step = make_step(model, 0.0, eps, 0)
    for _ in range(steps):
        step(lambda: model(inputs).float().square().mean())
    moved = model.weight.detach().double() - before
    return (moved.square().mean() / before.square().mean()).sqrt().item()


def accuracy(
    kind: str, dtype: str, eps: float, seed: int, steps: int, data: dict[str, Any]
) -> float:
    """Test accuracy of the demo after ``steps`` steps."""
    encoder: Encoder = data["encoder"]
    model = load_model(MODEL, getattr(torch, dtype))
    chosen, _ = sample_train_dev(data["train"], 1000, 0, seed)
    examples: list[EncodedExample] = [data["encoded"][sample.id] for sample in chosen]
    order = torch.Generator().manual_seed(seed)
    step = KINDS[kind](model, LEARNING_RATE, eps, seed)
    for _ in range(steps):
        drawn = torch.randint(len(examples), (BATCH,), generator=order).tolist()
        batch = collate([examples[index] for index in drawn])
        step(lambda batch=batch: classification_loss(model, batch))
    validation: list[Sample] = data["validation"]
    answers = predict(model, encoder, validation, [[]] * len(validation), 64)
    task = encoder.task
    return task.score([prediction.answer for prediction in answers], validation)["accuracy"]


def load_data() -> dict[str, Any]:
    """The bundled SST2 samples, their encoder, and those of training as tokens."""
    task = get_task("SST2")
    _, tokenizer = load_config_and_tokenizer(MODEL)
    train, validation = load_samples(task, SAMPLES)
    validation = permutation_subset(validation, len(validation), 0)
    encoder = Encoder(task, tokenizer, 1024)
    encoded = [encoder.options(sample) for sample in train]
    return {"encoder": encoder, "train": train, "encoded": encoded, "validation": validation}


def plot(drifts: dict[str, Any], accuracies: dict[str, Any], path: Path) -> None:
    """Draw both measurements as one picture."""
    dtypes = list(drifts["HiZOO"])
    matplotlib.use("Agg")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    colors = {"textbook": "tab:orange", "HiZOO": "tab:blue"}
    for shift, kind in enumerate(KINDS):
        for place, dtype in enumerate(dtypes):
            position = place + 0.3 * shift - 0.15
            value, values = drifts[kind][dtype], accuracies[kind][dtype]
            if value:
                left.plot(position, value, "o", color=colors[kind])
            else:  # A logarithm has no place for it.
                place_of_zero = {"xycoords": ("data", "axes fraction"), "ha": "center"}
                left.annotate("0", (position, 0.02), color=colors[kind], **place_of_zero)
            right.plot([position] * len(values), values, "o", color=colors[kind], alpha=0.5)
            mean = statistics.mean(values)
            right.hlines(mean, position - 0.1, position + 0.1, color=colors[kind], label=kind)
    left.set(yscale="log", ylim=(1e-8, 1), title="200 steps at learning rate 0")
    left.set_ylabel("drift, relative to the weights")
    right.axhline(ZERO_SHOT, color="gray", linewidth=0.8, linestyle=":")
    right.text(-0.45, ZERO_SHOT - 0.05, "zero-shot", color="gray", fontsize=8)
    right.set(ylim=(0, 1.05), title="bundled SST2 demo: three seeds and their mean")
    right.set_ylabel("test accuracy")
    for axes in (left, right):
        axes.set_xticks(range(len(dtypes)), dtypes)
        axes.set_xlim(-0.5, len(dtypes) - 0.5)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = right.get_legend_handles_labels()
    distinct = dict(zip(labels, handles, strict=True))
    right.legend(distinct.values(), distinct.keys(), frameon=False, loc="lower left")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print both tables, and write JSON and a plot if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400, help="steps of the demo")
    parser.add_argument("--drift_steps", type=int, default=200, help="steps at learning rate 0")
    parser.add_argument("--long_steps", type=int, default=20000, help="the same, float32 HiZOO")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES, help="weights")
    parser.add_argument("--eps", type=float, default=1e-3, help="perturbation scale")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the demo")
    parser.add_argument("--plot", type=Path, help="PNG file to draw")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    arguments = parser.parse_args()
    eps, dtypes = arguments.eps, arguments.dtypes
    drifts: dict[str, dict[str, float]] = {kind: {} for kind in KINDS}
    for kind, make_step in KINDS.items():
        for dtype in dtypes:
            drifts[kind][dtype] = drift(make_step, dtype, eps, arguments.drift_steps)
            print(f"drift    {kind:9s} {dtype:9s} {drifts[kind][dtype]:.2e}", flush=True)
    long: dict[str, float] = {}
    for kernels, compile in (("one by one", False), ("compiled", True)):
        if "float32" in dtypes:
            make_step = functools.partial(hizoo_step, compile=compile)
            long[kernels] = drift(make_step, "float32", eps, arguments.long_steps)
            steps = f"after {arguments.long_steps} steps, {kernels}"
            print(f"drift    HiZOO     float32   {long[kernels]:.2e} {steps}", flush=True)
    data = load_data()
    accuracies: dict[str, dict[str, list[float]]] = {kind: {} for kind in KINDS}
    for kind in KINDS:
        for dtype in dtypes:
            values = [
                accuracy(kind, dtype, eps, seed, arguments.steps, data) for seed in arguments.seeds
            ]
            accuracies[kind][dtype] = values
            shown = " ".join(f"{value:.3f}" for value in values)
            print(f"accuracy {kind:9s} {dtype:9s} {shown}", flush=True)
    if arguments.json:
        values = {"drift": drifts, "float32_long": long, "accuracy": accuracies}
        arguments.json.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    if arguments.plot:
        plot(drifts, accuracies, arguments.plot)


if __name__ == "__main__":
    main()
