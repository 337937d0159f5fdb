"""What a step costs whose weights are streamed from disk: seconds, bytes moved and peak memory.

    python benchmarks/offload.py FOLDER
    python benchmarks/offload.py FOLDER --layers 48 --hidden 1024 --tokens 512 --dtype bfloat16

Writes a Llama of random weights into the folder, and takes steps of it in processes of their own:
in memory (layer by layer), streamed with 1/8 of the blocks' memory, with none, and with none and
an update that is written at every 8th visit only. The working file is read and written past the
page cache, so that streamed steps are always cold ones; a forward pass of an untrained model reads
the model's files, warm (from the page cache) and cold. "over libraries" is the peak of a process
over what it held before the model was loaded, "over the bound" the seconds over the larger one of
those in memory and of the bytes by the disk's rate, which is measured reading and writing at once.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from hizoo import HiZOO, Layers
from language_model.loading import leave_out_loading_bars, load_model
from language_model.streaming import Offload
from zeroth_order.block_file import WorkingFile, page_aligned
from zeroth_order.blocks import blocks_of
from zeroth_order.streamed import StreamedLayers

# How many bytes of the blocks are kept (one in so many, 0: none), and every which visit is written.
WAYS = {"in memory": None, "1/8 kept": (8, 1), "none kept": (0, 1), "1/8 written": (0, 8)}
FORWARD = ("warm", "cold")
METHODS = {
    "MeZO": {"hessian_smooth": 0.0},
    "HiZOO": {"hessian_smooth": 1e-6},
    "HiZOO-L": {"hessian_smooth": 1e-6, "hessian": "lowrank"},
}


def write_model(folder: Path, args: argparse.Namespace) -> None:
    """Write a model of random weights, unless it is there."""
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=4 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.hidden // 64),
        num_key_value_heads=max(1, args.hidden // 64),
        vocab_size=args.vocabulary,
        dtype=getattr(torch, args.dtype),
    )
    if (folder / "config.json").is_file():
        there = LlamaConfig.from_pretrained(folder)
        for name in ("hidden_size", "num_hidden_layers", "vocab_size", "dtype"):
            found, wanted = getattr(there, name), getattr(config, name)
            if found != wanted:
                raise SystemExit(
                    f"{folder} has a model of {name} {found}, not {wanted}: give another folder"
                )
        return
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=config.dtype).save_pretrained(folder)


def memory(field: str) -> float:
    """MiB of a memory field of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    return float("nan")


def disk_rate(folder: Path, size: int = 256 << 20) -> tuple[float, float]:
    """Return MiB a second that the disk reads alone, and that it reads and writes at once."""
    file, piece = WorkingFile(folder, 2 * size), page_aligned(8 << 20)

    def run(call: Any, start: int) -> None:
        memory = torch.zeros_like(piece) if call == file.write else piece
        memory = page_aligned(len(memory)).copy_(memory)
        for place in range(start, start + size, len(memory)):
            call(place, memory)

    run(file.write, 0)
    run(file.write, size)
    rates = []
    for calls in ([file.read], [file.read, file.write]):
        begun = time.perf_counter()
        with ThreadPoolExecutor(2) as threads:
            [*threads.map(run, calls, (0, size))]
        rates.append(len(calls) * size / 2**20 / (time.perf_counter() - begun))
    file.close()
    return rates[0], rates[1]


def leave_page_cache(folder: Path) -> None:
    """Let the page cache drop a model's files."""
    for path in folder.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def blocks_bytes(folder: Path, method: str) -> int:
    """Return what the blocks of a model take, with their h."""
    config = LlamaConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    size = sum(p.nbytes for p in model.model.layers.parameters())
    return size * (2 if method == "HiZOO" else 1)


def measure(folder: Path, way: str, method: str, args: argparse.Namespace) -> dict[str, Any]:
    """Take steps in this process."""
    torch.set_num_threads(args.threads)
    leave_out_loading_bars()
    dtype, device = getattr(torch, args.dtype), torch.device("cpu")
    before = memory("VmRSS")
    offload = None
    if kept := WAYS.get(way, (0, 1)):
        size = blocks_bytes(folder, method) // kept[0] if kept[0] else 0
        offload = Offload(folder, size, device, kept[1])
    model: PreTrainedModel = load_model(str(folder), dtype, offload=offload)
    layers = StreamedLayers(model) if offload else Layers(model)
    layers.checked = True
    settings = {"lr": 1e-6, "compile": args.compile} | METHODS.get(method, {})
    optimizer = HiZOO(model.parameters(), layers=layers, **settings)
    ids = torch.randint(5, args.vocabulary, (args.batch, args.tokens))
    seconds, traffic = [], blocks_of(model).traffic if offload else None
    counts = [(0, 0)]

    def loss() -> torch.Tensor:
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    for _ in range(args.steps + 2):
        if way == "cold":
            leave_page_cache(folder)
        start = time.perf_counter()
        if way in FORWARD:
            with torch.no_grad():
                loss()
        else:
            optimizer.step(loss)
        seconds.append(time.perf_counter() - start)
        counts.append((traffic.bytes_read, traffic.bytes_written) if traffic else (0, 0))
    # The first step checks, the second one is the first that writes.
    steps = seconds[2:]
    moved = [last - first for first, last in zip(counts[2], counts[-1], strict=True)]
    return {
        "method": method,
        "weights": way,
        "seconds": statistics.median(steps),
        "read_mib": moved[0] / len(steps) / 2**20,
        "written_mib": moved[1] / len(steps) / 2**20,
        "peak_mib": memory("VmHWM"),
        "over_libraries_mib": memory("VmHWM") - before,
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--compile", type=lambda text: text == "yes", default=False)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.folder, *args.only, args)))
        return
    write_model(args.folder, args)
    rows = []
    alone, both = disk_rate(args.folder)
    print(f"the disk reads {alone:,.0f} MiB/s, and reads and writes {both:,.0f} MiB/s at once\n")
    print("| method | weights | s a step | MiB read | written | over the bound | peak MiB | over |")
    print("|---|---|---|---|---|---|---|---|")
    for method, ways in [*((m, WAYS) for m in args.methods), ("forward pass", FORWARD)]:
        for way in ways:
            line = [sys.executable, __file__, *sys.argv[1:], "--only", way, method]
            done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            row = rows[-1]
            first = next((r for r in rows if r["method"] == method), row)
            moved = row["read_mib"] + row["written_mib"]
            bound = max(first["seconds"], moved / (both if row["written_mib"] else alone))
            row["over_bound"] = row["seconds"] / bound
            names = ("read_mib", "written_mib", "over_bound", "peak_mib", "over_libraries_mib")
            shown = " | ".join(f"{row[n]:,.{2 * (n == 'over_bound')}f}" for n in names)
            print(f"| {method} | {way} | {row['seconds']:.2f} | {shown} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
