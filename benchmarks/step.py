"""What a step costs beside its forward passes: seconds, ratios and memory, in one run.

    python benchmarks/step.py
    python benchmarks/step.py --model opt-1.3b --device cuda

The first is OPT-125m's shape with 16 examples of 16 tokens on the CPU: SST-2's training texts, most
of them phrases, with the prompt. Weights are random.
A step's bare forward passes are three, MeZO's two, error broadcast's one; one is timed before every
step. "noise" makes
the noise of a pass, with the same chunks and threads; "torch's noise" fills the same chunks with
torch's generator, on the CPU one core's work. "textbook" is the step as it is usually written:
whole-parameter noise drawn four times, and a new tensor for every operation.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

from error_broadcast import ErrorBroadcast
from hizoo import HiZOO, Layers
from zeroth_order.chunks import Noise, bundles, drawn
from zeroth_order.compiling import kernel
from zeroth_order.kernels import Pieces, write
from zeroth_order.weights import GroupStep

SHAPES = {
    "tiny": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 64},
    "opt-125m": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "ffn_dim": 3072,
    },
    "opt-1.3b": {
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "ffn_dim": 8192,
    },
    "opt-13b": {
        "hidden_size": 5120,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "ffn_dim": 20480,
    },
}


def make_model(shape: str, dtype: torch.dtype, device: str) -> nn.Module:
    """Build an OPT of a shape with random weights."""
    settings = SHAPES[shape]
    config = OPTConfig(word_embed_proj_dim=settings["hidden_size"], dropout=0.0, **settings)
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return OPTForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)


def synchronize(device: str) -> None:
    """Wait for the device to finish what it was given."""
    if device != "cpu":
        torch.cuda.synchronize()


def median_seconds(function: Callable[[], Any], repeats: int, device: str) -> float:
    """Time a call, after one that is not counted."""
    function()
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def added_memory(function: Callable[[], Any], device: str, warm_up: bool = True) -> float | None:
    """MiB that a call allocates at its peak; None if unknown.

    After a ``warm_up`` call, what the first one allocates and keeps (an optimizer's scratch) does
    not count.
    """
    if warm_up:
        function()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        reset.write_text("5")
        before = resident(status, "VmRSS")
        function()
        return (resident(status, "VmHWM") - before) / 1024
    except OSError:
        return None


def resident(status: Path, field: str) -> int:
    """Kilobytes of a memory field of /proc/self/status."""
    (line,) = (line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])


def write_noise(target: Pieces, noise: Noise) -> None:
    """Write u into a chunk, in its dtype."""
    write(target, drawn(noise, target))


def make_noise(optimizer: HiZOO, target: Tensor) -> None:
    """Make the noise of one pass, as a step does, in memory that is written over."""
    weights = optimizer.weights
    for chunk, noise in weights.chunks_with_noise(weights.parameters, 0):
        pieces = chunk.view(target[: chunk.of.parameter.numel()])
        if chunk.of.copies:
            pieces = [piece.to(torch.float32) for piece in pieces]
        kernel(write_noise, chunk.of)(pieces, noise)


def make_noise_with_torch(optimizer: HiZOO, target: Tensor) -> None:
    """Draw as many numbers with torch's generator, into the same memory."""
    for bundle in bundles(optimizer.weights.parameters):
        for chunk in bundle:
            for piece in chunk.view(target[: chunk.of.parameter.numel()]):
                piece.normal_()


# Forward passes of a step; three of all others.
PASSES = {"MeZO": 2, "error broadcast": 1}


class TextbookHiZOO:
    """The step as it is usually written: whole parameters, new tensors, four draws of the noise.

    h is kept in the weights' dtype. A step's noise is that of ``seed`` and the step's number.
    """

    def __init__(
        self, parameters: list[Tensor], eps: float, smooth: float, lr: float, seed: int = 0
    ) -> None:
        self.parameters, self.eps, self.smooth, self.lr = parameters, eps, smooth, lr
        self.seed, self.steps = seed, 0
        self.hessians = [torch.ones_like(parameter) for parameter in parameters]

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> None:
        """Do one step, with three forward passes."""
        center = float(closure())
        self._shift(1.0)
        plus = float(closure())
        self._shift(-2.0)
        minus = float(closure())
        self._shift(1.0)
        gradient = (plus - minus) / (2 * self.eps)
        curvature = abs(plus + minus - 2 * center) / (2 * self.eps**2)
        self._reset()
        for i, parameter in enumerate(self.parameters):
            noise = torch.randn_like(parameter)
            hessian = self.hessians[i]
            measured = curvature * hessian * noise * noise
            hessian = (1 - self.smooth) * hessian + self.smooth * measured
            self.hessians[i] = hessian
            parameter.data = parameter.data - self.lr * gradient * noise / torch.sqrt(hessian)
        self.steps += 1

    def _shift(self, scale: float) -> None:
        self._reset()
        for parameter, hessian in zip(self.parameters, self.hessians, strict=True):
            noise = torch.randn_like(parameter)
            parameter.data = parameter.data + scale * self.eps * noise / torch.sqrt(hessian)

    def _reset(self) -> None:
        torch.manual_seed(1_000_003 * self.seed + self.steps)


@dataclass
class Timed:
    """A call that is timed, what is done after it, and its seconds."""

    what: str
    call: Callable[[], Any]
    after: Callable[[], Any] | None = None
    seconds: list[float] = field(default_factory=list)

    @property
    def is_step(self) -> bool:
        """Whether the call is a whole step, with its forward passes."""
        return self.what.endswith("whole step")

    def run(self, device: str) -> None:
        """Time the call once."""
        synchronize(device)
        start = time.perf_counter()
        self.call()
        synchronize(device)
        self.seconds.append(time.perf_counter() - start)
        if self.after:
            self.after()


def measure(arguments: argparse.Namespace, dtype_name: str) -> list[dict[str, Any]]:
    """Measure every kind of step in one dtype."""
    dtype, device = getattr(torch, dtype_name), arguments.device
    model = make_model(arguments.model, dtype, device)
    parameters = list(model.parameters())
    count = sum(parameter.numel() for parameter in parameters)
    tokens = torch.randint(4, 50000, (arguments.batch, arguments.tokens), device=device)

    def loss() -> Tensor:
        return model(tokens, logits_to_keep=1).logits[:, -1, :2].float().mean()

    forward = torch.no_grad()(loss)
    broadcast = ErrorBroadcast(model, lr=1e-9)
    rows = torch.arange(arguments.batch, device=device)
    reads = (rows, torch.full_like(rows, arguments.tokens - 1))
    in_place = dtype == torch.float32
    kinds: dict[str, dict[str, Any]] = {
        "HiZOO": {"hessian_smooth": 1e-6},
        "HiZOO-L": {"hessian_smooth": 1e-6, "hessian": "lowrank"},
        "MeZO": {"hessian_smooth": 0.0},
    }
    optimizers = {
        name: HiZOO(
            parameters,
            lr=1e-9,
            eps=1e-3,
            layers=None if in_place else Layers(model),
            compile=False if arguments.not_compiled else None,
            **settings,
        )
        for name, settings in kinds.items()
    }
    first = first_step_memory(optimizers["HiZOO"], forward, device)
    textbook = TextbookHiZOO(parameters, 1e-3, 1e-6, 1e-9)
    largest = max(parameter.numel() for parameter in parameters)
    scratch = torch.empty(largest, dtype=dtype, device=device)
    timed = [
        Timed("forward", forward),
        Timed("noise", functools.partial(make_noise, optimizers["HiZOO"], scratch)),
        Timed(
            "torch's noise", functools.partial(make_noise_with_torch, optimizers["HiZOO"], scratch)
        ),
    ]
    for name, optimizer in optimizers.items():
        optimizer.step(forward)
        if in_place:
            shift = functools.partial(optimizer.loss_along, lambda: 0.0, 1e-3)
            timed.append(Timed(f"{name}: one shift", shift, optimizer.restore))
        timed += [
            Timed(f"{name}: update", functools.partial(update_only, optimizer)),
            Timed(f"{name}: whole step", functools.partial(optimizer.step, forward)),
        ]
    step = functools.partial(broadcast.step, loss, reads=reads)
    timed.append(Timed("error broadcast: whole step", step))
    timed.append(Timed("textbook HiZOO: whole step", functools.partial(textbook.step, forward)))
    # In turns, so that a machine that slows down slows all of them; the first round warms up.
    forward_pass = timed[0]
    for _ in range(arguments.repeats + 1):
        for one in timed:
            if one.is_step:
                forward_pass.run(device)
            one.run(device)
    seconds = {
        one.what: statistics.median(one.seconds[len(one.seconds) // (arguments.repeats + 1) :])
        for one in timed
    }
    table: list[dict[str, Any]] = []
    for one in timed:
        is_step = one.is_step
        row = {"what": one.what, "dtype": dtype_name, "seconds": seconds[one.what]}
        row["added_mib"] = added_memory(one.call, device) if is_step else None
        row["over_noise"] = seconds[one.what] / seconds["noise"]
        if is_step:
            row["textbook_over_this"] = seconds["textbook HiZOO: whole step"] / seconds[one.what]
            passes = PASSES.get(one.what.partition(":")[0], 3)
            row["over_passes"] = seconds[one.what] / passes / seconds["forward"]
        table.append(row)
        nanoseconds = f"{row['seconds'] / count * 1e9:7.2f} ns/weight"
        ratio = f"{row['over_noise']:6.2f} x noise"
        memory = "" if row["added_mib"] is None else f"{row['added_mib']:6.0f} MiB"
        against = ""
        if is_step:
            against = f"{row['over_passes']:.2f} x its passes, "
            against += f"textbook / this {row['textbook_over_this']:.2f}"
        print(
            f"{dtype_name:9s} {one.what:28s} {row['seconds']:7.3f} s {nanoseconds} {ratio} "
            f"{memory} {against}",
            flush=True,
        )
    table.append({"what": "HiZOO: first step", "dtype": dtype_name, "added_mib": first})
    if first is not None:
        print(f"{dtype_name:9s} HiZOO: first step, scratch and compiler included {first:.0f} MiB")
    return table


def first_step_memory(optimizer: HiZOO, closure: Callable[[], Any], device: str) -> float | None:
    """MiB that the first step adds at its peak to weights, h and what a forward pass takes.

    torch.compile's own memory in this process is part of it; a C++ compiler has another process.
    """
    optimizer.loss_along(closure, 0.0)  # h begins
    for state in optimizer.state.values():
        for tensor in state.values():
            tensor.zero_()  # until it is written to, it takes no memory
    forward = added_memory(closure, device)
    step = added_memory(lambda: optimizer.step(closure), device, warm_up=False)
    return None if step is None or forward is None else step - forward


def update_only(optimizer: HiZOO) -> None:
    """Update θ and h as at the end of a step, with the noise of the coming step."""
    if optimizer.layers is None:
        optimizer.weights.shift = (0, -1.0)
    smooth = optimizer.param_groups[0]["hessian_smooth"]
    optimizer.weights.update([GroupStep([1e-12], [1e-12], 1e-9, smooth, decay=0.0)])


def main() -> None:
    """Measure, print the table, and write it as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SHAPES, default="opt-125m", help="shape of the OPT")
    parser.add_argument("--device", default="cpu", help="torch device, for instance cuda")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="weights")
    parser.add_argument("--batch", type=int, default=16, help="examples in a batch")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of each example")
    parser.add_argument("--repeats", type=int, default=5, help="runs behind every median")
    parser.add_argument("--not_compiled", action="store_true", help="as without a compiler")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    arguments = parser.parse_args()
    print(f"{arguments.model}, {arguments.batch} x {arguments.tokens} tokens, {platform.machine()}")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {arguments.device}")
    rows = [row for dtype in arguments.dtypes for row in measure(arguments, dtype)]
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
