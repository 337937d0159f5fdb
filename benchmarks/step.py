"""What a HiZOO step costs beside its forward passes: seconds, ratios and memory, in one run.

    python benchmarks/step.py
    python benchmarks/step.py --model opt-1.3b --device cuda

The first is OPT-125m's shape with 16 examples of SST-2's length, on the CPU; weights are random.
"draw" only draws the numbers of a pass, with the same tiles and threads. "textbook" is the step as
it is usually written: whole-parameter noise drawn four times, and a new tensor for every operation.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

from hizoo import SCRATCH, HiZOO, draw_noise, run_packets, tile_seed
from layerwise import LayerwiseWeights

SHAPES = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 256},
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


def added_memory(function: Callable[[], Any], device: str) -> float | None:
    """MiB that a repeated call allocates at its peak; None if unknown.

    What the first call allocates and keeps, an optimizer's state and scratch, does not count.
    """
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


def draw_only(optimizer: HiZOO) -> None:
    """Draw the numbers of one pass and throw them away."""

    def draw(packet: Any) -> None:
        for slot, tiles in packet:
            generator = SCRATCH.generator(slot.parameter.device)
            for tile, weights in zip(tiles, slot.views(slot.parameter, tiles), strict=True):
                noise = SCRATCH.buffer("noise", weights)
                draw_noise(noise, generator, tile_seed(1, slot.first_tile + tile))

    for _ in run_packets(draw, optimizer._slots):
        pass


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


def measure(arguments: argparse.Namespace, dtype_name: str) -> list[dict[str, Any]]:
    """Measure every kind of step in one dtype."""
    dtype, device, repeats = getattr(torch, dtype_name), arguments.device, arguments.repeats
    model = make_model(arguments.model, dtype, device)
    parameters = list(model.parameters())
    count = sum(parameter.numel() for parameter in parameters)
    tokens = torch.randint(4, 50000, (arguments.batch, arguments.tokens), device=device)

    @torch.no_grad()
    def forward() -> Tensor:
        return model(tokens, logits_to_keep=1).logits[:, -1, :2].float().mean()

    def constant() -> float:
        return 1.0

    rows: list[dict[str, Any]] = []

    def row(what: str, function: Callable[[], Any], memory: bool = False, **extra: Any) -> float:
        seconds = median_seconds(function, repeats, device)
        added = added_memory(function, device) if memory else None
        rows.append({"what": what, "dtype": dtype_name, "seconds": seconds, "added_mib": added})
        rows[-1] |= extra
        shown = "" if added is None else f"{added:8.0f} MiB"
        ns = f"{seconds / count * 1e9:7.2f} ns/weight"
        print(f"{dtype_name:9s} {what:44s} {seconds:8.3f} s {ns} {shown}", flush=True)
        return seconds

    bare = row("one bare forward pass", forward, memory=True)
    kinds = {
        "HiZOO": {"hessian_smooth": 1e-6},
        "HiZOO-L": {"hessian_smooth": 1e-6, "hessian": "lowrank"},
        "MeZO": {"hessian_smooth": 0.0},
    }
    ours = {}
    for name, settings in kinds.items():
        layers = None if dtype == torch.float32 else LayerwiseWeights(model)
        optimizer = HiZOO(parameters, lr=1e-9, eps=1e-3, layers=layers, **settings)
        if name == "HiZOO":
            draw = row("drawing the noise of one pass", lambda o=optimizer: draw_only(o))
        if layers is None:
            optimizer.step(constant)
            optimizer._move_to((0, 1))

            def back_and_forth(o: HiZOO = optimizer) -> None:
                o._move_to((0, -o._point[1]))

            shift = row(f"{name}: one shift", back_and_forth, memory=True)
            rows[-1]["over_draw"] = shift / draw
            optimizer.restore()
        update = row(f"{name}: update", lambda o=optimizer: update_only(o), memory=True)
        rows[-1]["over_draw"] = update / draw
        ours[name] = row(f"{name}: whole step", lambda o=optimizer: o.step(forward), memory=True)
        passes = 2 if name == "MeZO" else 3
        rows[-1]["over_forward"] = ours[name] / (passes * bare)
        del optimizer
    textbook = TextbookHiZOO(parameters, 1e-3, 1e-6, 1e-9)
    plain = row("textbook HiZOO: whole step", lambda: textbook.step(forward), memory=True)
    rows[-1]["over_ours"] = plain / ours["HiZOO"]
    print(f"{dtype_name}: textbook / HiZOO step = {plain / ours['HiZOO']:.2f}")
    return rows


def update_only(optimizer: HiZOO) -> None:
    """Update θ and h as at the end of a step, with the noise of the coming step."""
    optimizer._start_hessians()
    if optimizer.hessian == "lowrank":
        for slot in optimizer._slots:
            state = optimizer.state[slot.parameter]
            if "hessian_rows" in state:
                optimizer._moments[slot, 0] = (state["hessian_rows"], state["hessian_columns"])
    if optimizer.layers is None:
        optimizer._point = (0, -1)
    optimizer._apply([[1e-12, 1e-12]])
    optimizer._forget_estimates()


def main() -> None:
    """Measure, print the table, and write it as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SHAPES, default="opt-125m", help="shape of the OPT")
    parser.add_argument("--device", default="cpu", help="torch device, for instance cuda")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="weights")
    parser.add_argument("--batch", type=int, default=16, help="examples in a batch")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of each example")
    parser.add_argument("--repeats", type=int, default=5, help="runs behind every median")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    arguments = parser.parse_args()
    print(f"{arguments.model}, {arguments.batch} x {arguments.tokens} tokens, {platform.machine()}")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {arguments.device}")
    rows = [row for dtype in arguments.dtypes for row in measure(arguments, dtype)]
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
