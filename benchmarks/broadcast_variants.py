"""What was tried with error broadcast and left out: figures of docs/error-broadcast.md.

python benchmarks/broadcast_variants.py --model DIR --data_dir DIR --variants plain buffer

plain      κ falls linearly to 0, as everywhere
buffer     inputs are whitened by those of the last 256 scored tokens
averaged   the weights are the mean over the second half of the steps
blocks     one forward pass for each block on the first batch, behind the step of that block
           alone; those whose loss falls by a quarter of the most are trained
gated      the matrices before the MLP's product get steps, too (Llama's gate_proj and up_proj)
curvature  every tenth step: the losses of this batch and the next one behind multiples of the
           step, and the multiple at which this batch's parabola is lowest
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch
from methods import BUNDLED, SAMPLES, Rows, batches, draw_rows, evaluate, prepare_model
from torch import Tensor, nn

import error_broadcast
from error_broadcast import ErrorBroadcast
from language_model.encoding import Encoder
from tasks import get_task
from zeroth_order.residual_stream import PassRecord, Writer

Batch = dict[str, Tensor]
VARIANTS = ("plain", "buffer", "averaged", "blocks", "gated", "curvature")
BUFFER, BATCH = 256, 16
MULTIPLES = (0.5, 1.0, 2.0)


class Run:
    """Error broadcast on one model and seed."""

    def __init__(self, arguments: argparse.Namespace, seed: int) -> None:
        self.model, tokenizer = prepare_model(arguments.model, torch.float32, "ft", seed)
        encoder = Encoder(get_task(arguments.task), tokenizer, 512)
        self.rows: Rows = draw_rows(arguments, encoder, seed)
        self.batches: Iterator[Batch] = batches(self.rows.train, seed, BATCH)

    def loss(self, batch: Batch) -> Tensor:
        """Return the loss of a batch."""
        return self.rows.objective(self.model, batch)

    def step(self, optimizer: ErrorBroadcast, batch: Batch) -> None:
        """Take a step."""
        reads = batch["read_rows"], batch["read_columns"]
        optimizer.step(lambda: self.loss(batch), reads=reads)

    def train(self, optimizer: ErrorBroadcast, passes: int, after: Callable[[int], None]) -> None:
        """Take so many steps; κ falls from 1 to 0."""
        for step in range(passes):
            optimizer.param_groups[0]["lr"] = 1 - step / passes
            self.step(optimizer, next(self.batches))
            after(step + 1)

    @torch.no_grad()
    def losses_behind(self, optimizer: ErrorBroadcast, batch: Batch, *others: Batch) -> list[Any]:
        """Return the losses of batches behind the step of the first, which is taken back."""
        weights = [writer.weight for writer in optimizer.writers]
        before = [weight.clone() for weight in weights]
        self.step(optimizer, batch)
        values = [float(self.loss(each)) for each in (batch, *others)]
        for weight, old in zip(weights, before, strict=True):
            weight.copy_(old)
        return values


def buffered() -> Callable[[Tensor, float], Tensor]:
    """Return what whitens by the inputs of the last scored tokens, scaled as without a buffer."""
    seen: dict[int, Tensor] = {}
    calls = 0

    def whitened(inputs: Tensor, damping: float) -> Tensor:
        nonlocal calls
        number, calls = calls % whitened.matrices, calls + 1
        rows = torch.cat([seen.get(number, inputs[:0]), inputs])[-BUFFER:]
        seen[number], count = rows, len(rows)
        ridge = damping * rows.square().sum() / count**2
        inner = rows @ rows.T / count + ridge * torch.eye(count)
        solved = torch.linalg.solve(inner, rows @ inputs.T / count)
        moved = (inputs - solved.T @ rows) / ridge
        return moved * len(inputs) / (moved * inputs).sum(dim=1).mean()

    whitened.matrices = 1
    return whitened


class LastPass(PassRecord):
    """A forward pass that ``BeforeProduct`` finds again."""

    last: LastPass

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        LastPass.last = self


@dataclass(frozen=True, eq=False)
class BeforeProduct(Writer):
    """A matrix whose output reaches the stream through its MLP's product and down_proj."""

    mlp: nn.Module

    def errors(self, output: Tensor, of_stream: Tensor) -> Tensor:
        """Return the gradient at its output, (S, m), from that at the stream."""
        output = output.detach().requires_grad_()
        values = {writer.matrix: value for writer, value in LastPass.last.outputs.items()}
        values[self.matrix] = output
        with torch.enable_grad():
            gate = self.mlp.act_fn(values[self.mlp.gate_proj])
            written = self.mlp.down_proj(gate * values[self.mlp.up_proj])
        return torch.autograd.grad(written, output, of_stream)[0]


def train_before_product(optimizer: ErrorBroadcast) -> None:
    """Let ``optimizer`` train gate_proj and up_proj, too."""
    if not hasattr(optimizer.blocks[0], "mlp"):
        sys.exit("gated: the model's blocks have no gate_proj and up_proj; give a Llama")
    error_broadcast.PassRecord = LastPass
    # The first pass would keep the outputs of matrices that write to the stream alone.
    optimizer._stream_is_checked = True
    for mlp in (block.mlp for block in optimizer.blocks):
        matrices = (mlp.gate_proj, mlp.up_proj)
        optimizer.writers += [BeforeProduct(matrix, nn.Identity(), mlp) for matrix in matrices]


@torch.no_grad()
def blocks_that_help(run: Run) -> list[nn.Module]:
    """Return the matrices of the blocks that ``blocks`` trains; prints each block's loss."""
    batch, falls = next(run.batches), []
    before = float(run.loss(batch))
    everything = ErrorBroadcast(run.model, first=0.0)
    for number in range(len(everything.blocks)):
        alone = ErrorBroadcast(run.model, first=0.0)
        alone.writers = alone.writers[2 * number : 2 * number + 2]
        falls.append(before - run.losses_behind(alone, batch)[0])
        print(f"block {number}: loss {before:.4f} -> {before - falls[-1]:.4f}", flush=True)
    kept = [n for n, fall in enumerate(falls) if fall >= max(falls) / 4]
    return [writer for n in kept for writer in everything.writers[2 * n : 2 * n + 2]]


def look_along(run: Run, optimizer: ErrorBroadcast) -> None:
    """Print the losses behind multiples of the next step."""
    batch, other = next(run.batches), next(run.batches)
    with torch.no_grad():
        found = {0.0: [float(run.loss(batch)), float(run.loss(other))]}
    group = optimizer.param_groups[0]
    kappa, step = group["lr"], group["step"]
    for multiple in MULTIPLES:
        group["lr"] = multiple
        found[multiple] = run.losses_behind(optimizer, batch, other)
    group["lr"], group["step"] = kappa, step
    start, middle, end = (found[multiple][0] for multiple in (0.0, 0.5, 1.0))
    curvature = 4 * (end - 2 * middle + start)
    lowest = (curvature / 2 - (end - start)) / curvature if curvature > 0 else float("inf")
    pairs = ", ".join(f"κ {m:g}: {a:.4f} / {b:.4f}" for m, (a, b) in found.items())
    print(f"step {step}: {pairs}; lowest at κ {lowest:.1f}", flush=True)


def measure(arguments: argparse.Namespace, variant: str, seed: int) -> tuple[float, float | None]:
    """Do one run; returns dev loss and accuracy."""
    run = Run(arguments, seed)
    optimizer = ErrorBroadcast(run.model, seed=seed)
    sums: list[Tensor] = []
    plain = error_broadcast.whitened
    if variant == "buffer":
        error_broadcast.whitened = buffered()
        error_broadcast.whitened.matrices = len(optimizer.writers)
    if variant == "gated":
        train_before_product(optimizer)
    if variant == "blocks":
        chosen = blocks_that_help(run)
        optimizer = ErrorBroadcast(run.model, first=0.0, seed=seed)
        names = {writer.matrix for writer in chosen}
        optimizer.writers = [w for w in optimizer.writers if w.matrix in names]
        run.batches = batches(run.rows.train, seed, BATCH)

    def after(step: int) -> None:
        if variant == "curvature" and step % 10 == 0:
            look_along(run, optimizer)
        if variant == "averaged" and step > arguments.passes // 2:
            weights = [writer.weight for writer in optimizer.writers]
            sums[:] = [w + s for w, s in zip(weights, sums or [0.0] * len(weights), strict=True)]

    run.train(optimizer, arguments.passes, after)
    error_broadcast.whitened, error_broadcast.PassRecord = plain, PassRecord
    for writer, total in zip(optimizer.writers if sums else [], sums, strict=True):
        writer.weight.copy_(total / (arguments.passes - arguments.passes // 2))
    return evaluate(run.model, run.rows.dev, run.rows.with_options)


def main() -> None:
    """Print dev loss and accuracy of every variant and seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(BUNDLED), help="Hub id, folder or GGUF file")
    parser.add_argument("--task", default="SST2", help="one of the eleven tasks")
    parser.add_argument("--data_dir", default=str(SAMPLES), help="folder with rows, or hub")
    parser.add_argument("--variants", nargs="+", default=["plain"], choices=VARIANTS, help="above")
    parser.add_argument("--passes", type=int, default=100, help="forward passes of a run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[3], help="of the data")
    parser.set_defaults(pool=None, objective="task")
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        for variant in arguments.variants:
            loss, accuracy = measure(arguments, variant, seed)
            right = "" if accuracy is None else f", accuracy {accuracy:.3f}"
            print(f"{variant}, seed {seed}: dev loss {loss:.4f}{right}", flush=True)


if __name__ == "__main__":
    main()
