"""Compare methods on one model and task at equal numbers of forward passes.

    python benchmarks/methods.py                                    the bundled model, SST2
    python benchmarks/methods.py --methods "curvature" "mezo lr=1e-4" "adamw lr=1e-5" --seeds 0
    python benchmarks/methods.py --output FILE.json                 the runs are kept there
    python benchmarks/methods_table.py FILE.json --plot FILE.png    their table and picture

A method is a kind and its settings:

    mezo        lr, n (directions)
    hizoo       lr, alpha, n, hessian (full, lowrank)
    curvature   the step from the measured curvature: lr is its k; alpha 0 is MeZO's direction
    fzoo        lr (fzoo.py)
    adamw       lr, from (0.5: the upper half of the blocks alone)
    broadcast   error broadcast: kappa (as --broadcast_rate auto), damping, from, matrices (o,d)
    probing     linear probing: one pass over the training rows
    zeroshot    the model as it is

and for all that take steps, where they know it: eps, every (curvature_every), decay (linear, to 0
at the end: broadcast always), hold (the share of the steps before the decay), mode (ft, lora,
prefix, head), batch, passes (instead of --passes, with a dev loss at the end alone). A backward
pass counts as two forward passes, in part of the blocks as that part of two. Seconds are one
thread's CPU seconds. Every finished run stands in --output and is not repeated.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch
from fzoo import FZOO
from methods_files import SHARED, add_run, read_runs
from methods_table import settings_of, table
from torch import Tensor, nn

from command_line.settings import rate_of_run
from error_broadcast import ErrorBroadcast
from hizoo import HiZOO, Layers
from language_model.adapters import add_lora, add_prefix
from language_model.encoding import EncodedExample, Encoder
from language_model.head import fit_head, freeze_all_but_head, untie_head
from language_model.loading import load_config_and_tokenizer, load_model
from language_model.objectives import (
    Objective,
    by_example,
    classification_loss,
    language_model_loss,
    option_scores,
)
from language_model.packing import collate
from task_data.loading import load_samples
from task_data.sampling import sample_train_dev, with_a_correct_option
from tasks import Sample, get_task
from utils import check_writable, exit_code

BUNDLED, SAMPLES = ROOT / "data" / "tiny-opt", ROOT / "data" / "samples"
TRAIN, DEV, BATCH = 1000, 200, 16
DEV_OF_POOL = 300
DEFAULTS = (
    "mezo lr=1e-4",
    "mezo lr=8e-4",
    "hizoo lr=1e-4 alpha=1e-5",
    "curvature",
    "adamw lr=1e-4",
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Loss = Callable[[], Tensor]
Step = Callable[[Loss, dict[str, Tensor]], tuple[float, float]]


@dataclass(frozen=True)
class Rows:
    """What a run trains on, how, and what its dev loss is of."""

    samples: list[Sample]
    train: list[EncodedExample]
    dev: list[EncodedExample]
    objective: Objective
    with_options: bool

    def best_constant(self) -> dict[str, float] | None:
        """Return loss and accuracy of the best answer that looks at no text."""
        if not self.with_options:
            return None
        counts = torch.tensor([*Counter(example.correct for example in self.dev).values()])
        shares = counts / counts.sum()
        return {"loss": float(-(shares * shares.log()).sum()), "accuracy": float(shares.max())}


def draw_rows(arguments: argparse.Namespace, encoder: Encoder, seed: int) -> Rows:
    """Draw the rows of a seed and encode them."""
    task = encoder.task
    samples, validation = load_samples(
        task, None if arguments.data_dir == "hub" else arguments.data_dir
    )
    sizes = TRAIN, DEV
    if arguments.pool:
        samples = samples + validation
        sizes = arguments.pool, min(DEV_OF_POOL, len(samples) - arguments.pool)
    train, dev = with_a_correct_option(*sample_train_dev(samples, *sizes, seed))
    of_options = task.train_as_classification
    if arguments.objective != "task":
        of_options = arguments.objective == "options"
    encode_dev = encoder.correct_option if task.generation else encoder.options
    return Rows(
        samples=train,
        train=[*map(encoder.options if of_options else encoder.correct_option, train)],
        # Texts of one length stand together, which leaves little to pad.
        dev=sorted(map(encode_dev, dev), key=lambda example: len(example.options[0].tokens)),
        objective=classification_loss if of_options else language_model_loss,
        with_options=not task.generation,
    )


def prepare_model(name: str, dtype: torch.dtype, mode: str, seed: int) -> tuple[nn.Module, Any]:
    """Return the model with the weights of a mode set to be trained, and its tokenizer."""
    model = load_model(name, dtype)
    _, tokenizer = load_config_and_tokenizer(name)
    if mode == "lora":
        torch.manual_seed(seed)
        model = add_lora(model, 8, 16)
    elif mode == "prefix":
        tokens = torch.randint(len(tokenizer), (5,), generator=torch.Generator().manual_seed(seed))
        model = add_prefix(model, 5, False, tokens)
    elif mode == "head":
        untie_head(model)
        freeze_all_but_head(model)
    return model.eval(), tokenizer


def freeze_below(model: nn.Module, share: float) -> None:
    """Leave only the blocks from that share of the depth on to train."""
    blocks = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)
    model.requires_grad_(False)
    for block in blocks[int(share * len(blocks)) :]:
        block.requires_grad_(True)


def passes_of_first_order_step(settings: dict[str, Any]) -> float:
    """Return the forward passes that a step costs, whose backward pass goes as far as it has to.

    It takes a forward pass for the gradients of activations, and another one for those of weights.
    """
    share = 1 - settings.get("from", 0)
    of_modes = {"head": 1, "lora": 1 + share, "prefix": 1 + share}
    return of_modes.get(settings.get("mode"), 1 + 2 * share)


def make_step(
    model: nn.Module, settings: dict[str, Any], seed: int, budget: int
) -> tuple[Step, Any]:
    """Return what does one step and counts its forward passes, and the optimizer for its rate."""
    if settings["kind"] == "broadcast":
        return make_broadcast_step(model, settings, seed, budget)
    if "from" in settings:
        freeze_below(model, settings["from"])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kind, lr = settings["kind"], settings.get("lr", 0.1)
    if kind == "adamw":
        first_order = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0, fused=True)

        def first_order_step(loss: Loss, _: dict[str, Tensor]) -> tuple[float, int]:
            with torch.enable_grad():
                value = loss()
                value.backward()
            first_order.step()
            first_order.zero_grad()
            return float(value), passes_of_first_order_step(settings)

        return first_order_step, first_order
    if kind == "fzoo":
        fzoo = FZOO(trained, lr=lr, eps=settings.get("eps", 1e-3), seed=seed)
        return lambda loss, _: (fzoo.step(loss), 1 + fzoo.directions), fzoo
    layers = Layers(model) if trained[0].dtype.itemsize < 4 else None
    optimizer = HiZOO(
        trained,
        lr="auto" if kind == "curvature" else lr,
        eps=settings.get("eps", 1e-3),
        hessian_smooth=settings.get("alpha", 0.0),
        hessian=settings.get("hessian", "full"),
        num_samples=int(settings.get("n", 1)),
        curvature_every=int(settings.get("every", 1)),
        layers=layers,
        seed=seed,
    )
    for group in optimizer.param_groups:
        group["lr"] = lr  # k, with lr="auto"

    def step(loss: Loss, _: dict[str, Tensor]) -> tuple[float, int]:
        passes = 0

        def counted() -> Tensor:
            nonlocal passes
            passes += 1
            return loss()

        return optimizer.step(counted), passes

    return step, optimizer


def make_broadcast_step(
    model: nn.Module, settings: dict[str, Any], seed: int, budget: int
) -> tuple[Step, Any]:
    """Return the same of error broadcast, whose step is one forward pass."""
    optimizer = ErrorBroadcast(
        model,
        lr=settings.get("kappa", rate_of_run(budget)),
        damping=settings.get("damping", 0.1),
        first=settings.get("from", 0.5),
        matrices=tuple(settings.get("matrices", "o,d").split(",")),
        seed=seed,
    )

    def step(loss: Loss, batch: dict[str, Tensor]) -> tuple[float, int]:
        reads = batch["read_rows"], batch["read_columns"]
        return float(optimizer.step(loss, reads=reads)), 1

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
        acceptable = by_example(batch["acceptable"], batch, False)
        right += int(acceptable.gather(1, scores.argmax(dim=1, keepdim=True)).sum())
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
    encoder = Encoder(get_task(arguments.task), tokenizer, arguments.max_length)
    rows = draw_rows(arguments, encoder, seed)
    run: dict[str, Any] = {"method": method, "seed": seed, "best_constant": rows.best_constant()}
    if settings["kind"] in ("zeroshot", "probing"):
        passes, started = 0, time.process_time()
        if settings["kind"] == "probing":
            passes = -(-len(rows.train) // BATCH)
            fit_head(model, tokenizer, [*map(encoder.correct_option, rows.samples)], BATCH)
        seconds = time.process_time() - started
        loss, accuracy = evaluate(model, rows.dev, rows.with_options)
        row = {"passes": passes, "seconds": seconds, "loss": loss, "accuracy": accuracy}
        tell(method, seed, row)
        return run | {"curve": [row]}
    points = arguments.at or [
        round(arguments.passes * i / arguments.points) for i in range(1, arguments.points + 1)
    ]
    targets = [int(settings["passes"])] if "passes" in settings else [0, *points]
    return run | {"curve": train(model, settings, seed, rows, targets, arguments.give_up)}


def train(
    model: nn.Module,
    settings: dict[str, Any],
    seed: int,
    rows: Rows,
    targets: list[int],
    give_up: float,
) -> list[dict[str, Any]]:
    """Take steps until the last of the numbers of passes; returns what was measured at each."""
    step, optimizer = make_step(model, settings, seed, targets[-1])
    decays = settings.get("decay") == "linear" or settings["kind"] == "broadcast"
    held = settings.get("hold", 0.0)
    curve, passes, steps, seconds, largest, budget = [], 0.0, 0, 0.0, 0.0, targets[-1]
    data = batches(rows.train, seed, int(settings.get("batch", BATCH)))
    while True:
        if passes >= targets[0]:
            loss, accuracy = evaluate(model, rows.dev, rows.with_options)
            row = {"passes": round(passes), "steps": steps, "seconds": seconds, "loss": loss}
            row |= {"accuracy": accuracy, "largest_loss": largest}
            if isinstance(optimizer, HiZOO):
                group = optimizer.param_groups[0]
                row |= {"eta": optimizer.learning_rate(group)}
                row |= {"mean_curvature": group["mean_curvature"]}
            curve.append(row)
            tell(settings["method"], seed, row)
            while targets and passes >= targets[0]:
                targets.pop(0)
            if not targets or not loss < give_up:
                return curve
        if decays:
            for group in optimizer.param_groups:
                start = group.setdefault("initial_lr", group["lr"])
                group["lr"] = start * min(1.0, (1 - passes / budget) / (1 - held))
        batch = next(data)
        started = time.process_time()
        value, used = step(lambda batch=batch: rows.objective(model, batch), batch)
        seconds += time.process_time() - started
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


def main() -> None:
    """Measure what is not there yet, and print a line for each method."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(BUNDLED), help="Hub id or folder")
    parser.add_argument("--task", default="SST2", help="one of the eleven tasks")
    parser.add_argument(
        "--data_dir", default=str(SAMPLES), help="folder with the task's rows, or hub"
    )
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of the weights")
    parser.add_argument("--methods", nargs="+", default=list(DEFAULTS), help="see above")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of data and noise")
    parser.add_argument("--passes", type=int, default=900, help="forward passes of a run")
    parser.add_argument("--points", type=int, default=9, help="dev losses of a run")
    parser.add_argument(
        "--at",
        type=int,
        nargs="+",
        help="dev losses at these passes; the last ends a run, instead of --passes",
    )
    parser.add_argument(
        "--pool",
        type=int,
        help="so many training rows, and up to 300 of dev, from training and validation file "
        "together; default: 1000 and 200 from the training file",
    )
    parser.add_argument(
        "--objective",
        default="task",
        choices=("task", "options", "language"),
        help="cross-entropy over the options, or the correct one's tokens; default: the task's",
    )
    parser.add_argument("--max_length", type=int, default=512, help="tokens of a text")
    parser.add_argument("--give_up", type=float, default=20.0, help="dev loss that ends a run")
    parser.add_argument("--output", type=Path, help="JSON file of all runs; processes may share it")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the CPU seconds of several would be added up
    arguments.passes = arguments.at[-1] if arguments.at else arguments.passes
    arguments.task = get_task(arguments.task).name
    shared = {name: getattr(arguments, name) for name in SHARED}
    shared |= {"model": Path(arguments.model).absolute().name}
    for method in arguments.methods:
        settings_of(method)  # refuses what it does not know, before the first run
    output, runs = arguments.output, []
    if output:
        check_writable("--output", output)
    for seed, method in itertools.product(arguments.seeds, arguments.methods):
        runs = read_runs(output, shared) if output else runs
        if (method, seed) in [(run["method"], run["seed"]) for run in runs]:
            print(f"{method}, seed {seed}: stands in {output}", file=sys.stderr)
            continue
        run = measure(arguments, method, seed)
        runs = add_run(output, shared, run) if output else [*runs, run]
    print(table(runs))


if __name__ == "__main__":
    sys.exit(exit_code(main))
