"""Compare methods on one model and task at equal numbers of forward passes.

    python benchmarks/methods.py                                    the bundled model, SST2
    python benchmarks/methods.py --methods "curvature" "mezo lr=1e-4" "adamw lr=1e-5" --seeds 0
    python benchmarks/methods.py --output FILE.json --methods --plot FILE.png     its picture

A method is a kind and its settings:

    mezo        lr, n (directions)
    hizoo       lr, alpha, n, hessian (full, lowrank)
    curvature   the step from the measured curvature: lr is its k; alpha 0 is MeZO's direction
    fzoo        lr (fzoo.py)
    adamw       lr

and for all of them, where they know it: eps, curvature_eps, every (curvature_every), decay
(linear, to 0 at the end), mode (ft, lora, prefix, head), batch. A first-order step counts as three
forward passes. Every finished run stands in --output and is not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch
from fzoo import FZOO
from torch import Tensor, nn

from hizoo import HiZOO, Layers
from language_model.adapters import add_lora, add_prefix
from language_model.encoding import EncodedExample, Encoder
from language_model.head import freeze_all_but_head, untie_head
from language_model.loading import load_config_and_tokenizer, load_model
from language_model.objectives import (
    classification_loss,
    language_model_loss,
    option_scores,
)
from language_model.packing import collate
from task_data.loading import load_samples
from task_data.sampling import sample_train_dev
from tasks import get_task
from utils import write_json

BUNDLED, SAMPLES = ROOT / "data" / "tiny-opt", ROOT / "data" / "samples"
TRAIN, DEV, BATCH = 1000, 200, 16
DEFAULTS = (
    "mezo lr=1e-4",
    "mezo lr=8e-4",
    "hizoo lr=1e-4 alpha=1e-5",
    "curvature",
    "adamw lr=1e-4",
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FIRST_ORDER_PASSES = 3
NAMES = {
    "mezo": "MeZO",
    "hizoo": "HiZOO",
    "curvature": "MeZO, LR=auto",
    "fzoo": "FZOO",
    "adamw": "AdamW",
}
Loss = Callable[[], Tensor]
Step = Callable[[Loss], tuple[float, int]]


def settings_of(method: str) -> dict[str, Any]:
    """Return the kind of a method and its settings, numbers as numbers."""
    kind, *pairs = method.split()
    settings: dict[str, Any] = {"kind": kind}
    for pair in pairs:
        name, _, value = pair.partition("=")
        settings[name] = value if value.isalpha() else float(value)
    return settings


def prepare_model(name: str, dtype: torch.dtype, mode: str, seed: int) -> tuple[nn.Module, Any]:
    """Return the model with the weights of a mode set to be trained, and its tokenizer."""
    model = load_model(name, dtype)
    _, tokenizer = load_config_and_tokenizer(name)
    if mode == "lora":
        model = add_lora(model, 8, 16)
    elif mode == "prefix":
        tokens = torch.randint(len(tokenizer), (5,), generator=torch.Generator().manual_seed(seed))
        model = add_prefix(model, 5, False, tokens)
    elif mode == "head":
        untie_head(model)
        freeze_all_but_head(model)
    return model.eval(), tokenizer


def make_step(model: nn.Module, settings: dict[str, Any], seed: int) -> tuple[Step, Any]:
    """Return what does one step and counts its forward passes, and the optimizer for its rate."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kind, lr = settings["kind"], settings.get("lr", 0.1)
    if kind == "adamw":
        first_order = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)

        def first_order_step(loss: Loss) -> tuple[float, int]:
            with torch.enable_grad():
                value = loss()
                value.backward()
            first_order.step()
            first_order.zero_grad()
            return float(value), FIRST_ORDER_PASSES

        return first_order_step, first_order
    if kind == "fzoo":
        fzoo = FZOO(trained, lr=lr, eps=settings.get("eps", 1e-3), seed=seed)
        return lambda loss: (fzoo.step(loss), 1 + fzoo.directions), fzoo
    layers = Layers(model) if trained[0].dtype.itemsize < 4 else None
    optimizer = HiZOO(
        trained,
        lr="auto" if kind == "curvature" else lr,
        eps=settings.get("eps", 1e-3),
        hessian_smooth=settings.get("alpha", 0.0),
        hessian=settings.get("hessian", "full"),
        num_samples=int(settings.get("n", 1)),
        curvature_every=int(settings.get("every", 1)),
        curvature_eps=settings.get("curvature_eps"),
        layers=layers,
        seed=seed,
    )
    for group in optimizer.param_groups:
        group["lr"] = lr  # k, with lr="auto"

    def step(loss: Loss) -> tuple[float, int]:
        passes = 0

        def counted() -> Tensor:
            nonlocal passes
            passes += 1
            return loss()

        return optimizer.step(counted), passes

    return step, optimizer


def batches(examples: list[EncodedExample], seed: int, size: int) -> Iterator[dict[str, Tensor]]:
    """Yield batches of whole epochs, without end."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while True:
        if len(order) < size:
            order = torch.randperm(len(examples), generator=generator).tolist()
        numbers, order = order[:size], order[size:]
        yield collate([examples[number] for number in numbers])


@torch.no_grad()
def evaluate(
    model: nn.Module, examples: list[EncodedExample], with_options: bool
) -> tuple[float, float | None]:
    """Return the loss of examples, and the accuracy where they have options."""
    losses, right = [], 0
    for start in range(0, len(examples), 4 * BATCH):
        part = examples[start : start + 4 * BATCH]
        batch = collate(part)
        if not with_options:
            losses.append((float(language_model_loss(model, batch)), len(batch["targets"])))
            continue
        scores = option_scores(model, batch).float()
        losses.append((float(nn.functional.cross_entropy(scores, batch["correct"])), len(part)))
        right += int((scores.argmax(dim=1) == batch["correct"]).sum())
    weight = sum(number for _, number in losses)
    loss = sum(value * number for value, number in losses) / weight
    return loss, right / len(examples) if with_options else None


@torch.no_grad()
def measure(arguments: argparse.Namespace, method: str, seed: int) -> dict[str, Any]:
    """Do one run; returns its curve: passes, seconds, dev loss and dev accuracy, and η and c̄."""
    settings = settings_of(method)
    model, tokenizer = prepare_model(
        arguments.model, DTYPES[arguments.dtype], settings.get("mode", "ft"), seed
    )
    task = get_task(arguments.task)
    encoder = Encoder(task, tokenizer, 512)
    data_dir = None if arguments.data_dir == "hub" else arguments.data_dir
    drawn = sample_train_dev(load_samples(task, data_dir)[0], TRAIN, DEV, seed)
    encode = encoder.correct_option if task.generation else encoder.options
    train, dev = ([encode(sample) for sample in part] for part in drawn)
    objective = language_model_loss if task.generation else classification_loss
    step, optimizer = make_step(model, settings, seed)
    curve, passes, steps, seconds = [], 0, 0, 0.0
    targets = [round(arguments.passes * i / arguments.points) for i in range(arguments.points + 1)]
    data = batches(train, seed, int(settings.get("batch", BATCH)))
    largest = 0.0
    while True:
        if passes >= targets[0]:
            loss, accuracy = evaluate(model, dev, not task.generation)
            row = {"passes": passes, "steps": steps, "seconds": seconds, "loss": loss}
            row |= {"accuracy": accuracy, "largest_loss": largest}
            if isinstance(optimizer, HiZOO):
                group = optimizer.param_groups[0]
                row |= {"eta": optimizer.learning_rate(group)}
                row |= {"mean_curvature": group["mean_curvature"]}
            curve.append(row)
            tell(method, seed, row)
            while targets and passes >= targets[0]:
                targets.pop(0)
            if not targets or not loss < arguments.give_up:
                return {"method": method, "seed": seed, "curve": curve}
        if settings.get("decay") == "linear":
            for group in optimizer.param_groups:
                start = group.setdefault("initial_lr", group["lr"])
                group["lr"] = start * (1 - passes / arguments.passes)
        batch = next(data)
        started = time.perf_counter()
        value, used = step(lambda batch=batch: objective(model, batch))
        seconds += time.perf_counter() - started
        largest = max(largest, value)
        passes, steps = passes + used, steps + 1


def tell(method: str, seed: int, row: dict[str, Any]) -> None:
    """Say on stderr where a run is, which may take an hour."""
    accuracy = "" if row["accuracy"] is None else f", accuracy {row['accuracy']:.3f}"
    print(
        f"{method}, seed {seed}: {row['passes']} passes, {row['seconds']:.0f} s, loss "
        f"{row['loss']:.4f}{accuracy}",
        file=sys.stderr,
        flush=True,
    )


def mean_and_error(values: Sequence[float]) -> str:
    """Return a mean with its standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4f} ± {error:.4f}"


def table(runs: list[dict[str, Any]]) -> str:
    """Return a line for each method: final and lowest losses, accuracy, passes to loss levels."""
    lines = []
    for method in dict.fromkeys(run["method"] for run in runs):
        curves = [run["curve"] for run in runs if run["method"] == method]
        last = [curve[-1] for curve in curves]
        losses = " ".join(f"{row['loss']:.3f}" for row in last)
        accuracy = ""
        if last[0]["accuracy"] is not None:
            accuracy = f"accuracy {mean_and_error([row['accuracy'] for row in last])}"
        middle = [curve[len(curve) // 2]["loss"] for curve in curves]
        final = mean_and_error([row["loss"] for row in last])
        lines.append(
            f"{method:38s} passes {last[0]['passes']:5d} loss {final} ({losses}) half-way "
            f"{mean_and_error(middle)} {accuracy}"
        )
    return "\n".join(lines)


def label(method: str) -> str:
    """Return a method as people say it."""
    settings = settings_of(method)
    words = [NAMES[settings["kind"]]]
    words += [f"learning rate {settings['lr']:g}"] if "lr" in settings else []
    words += [f"α {settings['alpha']:g}"] if settings.get("alpha") else []
    return ", ".join(words)


def draw(runs: list[dict[str, Any]], methods: Sequence[str], path: Path) -> None:
    """Draw dev loss and accuracy over forward passes: mean and standard error of the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    names = [name for name in ("loss", "accuracy") if runs[0]["curve"][0][name] is not None]
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for method in methods:
            curves = [run["curve"] for run in runs if run["method"] == method]
            shortest = min(map(len, curves))
            passes = [row["passes"] for row in curves[0][:shortest]]
            values = torch.tensor([[row[name] for row in curve[:shortest]] for curve in curves])
            mean = values.mean(dim=0)
            error = values.std(dim=0, correction=int(len(curves) > 1)) / len(curves) ** 0.5
            axes.plot(passes, mean, label=label(method), marker="o", markersize=3)
            axes.fill_between(passes, mean - error, mean + error, alpha=0.2, linewidth=0)
        axes.set(xlabel="forward passes (a backward pass counts as two)", ylabel=f"dev {name}")
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure what is not there yet, and print a line for each method."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(BUNDLED), help="Hub id or folder")
    parser.add_argument("--task", default="SST2", help="one of the eleven tasks")
    parser.add_argument(
        "--data_dir", default=str(SAMPLES), help="folder with the task's rows, or hub"
    )
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of the weights")
    parser.add_argument("--methods", nargs="*", default=list(DEFAULTS), help="see above")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of data and noise")
    parser.add_argument("--passes", type=int, default=900, help="forward passes of a run")
    parser.add_argument("--points", type=int, default=9, help="dev losses of a run")
    parser.add_argument("--give_up", type=float, default=20.0, help="dev loss that ends a run")
    parser.add_argument("--output", type=Path, help="JSON file of all runs; gone on with")
    parser.add_argument("--plot", type=Path, help="picture of all runs in --output")
    arguments = parser.parse_args()
    runs = []
    if arguments.output and arguments.output.exists():
        runs = json.loads(arguments.output.read_text())["runs"]
    done = {(run["method"], run["seed"]) for run in runs}
    for seed in arguments.seeds:
        for method in arguments.methods:
            if (method, seed) in done:
                continue
            runs.append(measure(arguments, method, seed))
            print(table(runs[-1:]), flush=True)
            if arguments.output:
                names = ("model", "task", "dtype", "passes")
                shared = {name: getattr(arguments, name) for name in names}
                shared["model"] = Path(shared["model"]).name
                write_json(arguments.output, {**shared, "runs": runs})
    print(table(runs))
    if arguments.plot:
        draw(
            runs,
            arguments.methods or list(dict.fromkeys(r["method"] for r in runs)),
            arguments.plot,
        )


if __name__ == "__main__":
    main()
