"""docs/memory.md's tables: memory by formula, as --dry_run has it, and measured.

    python benchmarks/memory.py
    python benchmarks/memory.py --model data/tiny-opt --data_dir data/samples
    python benchmarks/memory.py --model DIR/SmolLM2-135M-Instruct.Q4_1.gguf --data_dir DIR

With a model each method takes three steps on 16 examples of SST-2 in a process of its own, whose
peak is the system's (ru_maxrss); the first row is a process that evaluates four examples.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from transformers import AutoModelForCausalLM, OPTConfig

from command_line.arguments import parse_arguments
from experiment.plan import kept_for_a_weight, plan_of_offload
from language_model.streaming import Offload, stream_blocks

HIZOO = "--trainer zo --hessian_smooth_type constant1e-6"
METHODS = {
    "MeZO": "--trainer zo",
    "HiZOO": HIZOO,
    "HiZOO-L": f"{HIZOO} --hessian lowrank",
    "error broadcast": "--trainer broadcast",
    "SGD": "--trainer regular --optim sgd",
    "Adafactor": "--trainer regular --optim adafactor",
    "AdamW": "--trainer regular",
}
# Layers, hidden size and heads of OPT.
SHAPES = {
    **{"125M": (12, 768, 12), "1.3B": (24, 2048, 32), "6.7B": (32, 4096, 32)},
    **{
        "13B": (40, 5120, 40),
        "30B": (48, 7168, 56),
        "66B": (64, 9216, 72),
        "175B": (96, 12288, 96),
    },
}


def empty_model(shape: tuple[int, int, int], dtype: torch.dtype) -> torch.nn.Module:
    """Return an OPT without storage."""
    layers, hidden, heads = shape
    config = OPTConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        ffn_dim=4 * hidden,
        num_attention_heads=heads,
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def formula_table(dtype: torch.dtype) -> str:
    """Return what each method keeps of each model, in GiB."""
    said = "--task_name SST2 --model_name data/tiny-opt --num_train 16"
    kept = {
        name: kept_for_a_weight(parse_arguments([*said.split(), *words.split()]), dtype.itemsize)
        for name, words in METHODS.items()
    }
    groups: dict[int, list[str]] = {}
    for name, each in kept.items():
        groups.setdefault(each, []).append(name)
    names = [", ".join(group) for group in groups.values()]
    offload = ("offload: MeZO", "moved a step", "offload: HiZOO", "moved a step")
    lines = [f"| OPT | {' | '.join([*names, *offload])} |", "|" + "---|" * (len(names) + 5)]
    for model, shape in SHAPES.items():
        empty = empty_model(shape, dtype)
        weights = sum(p.numel() for p in empty.parameters())
        sizes = [weights * (dtype.itemsize + each) for each in groups]
        near = Offload(None, 0, torch.device("cuda"))
        with torch.device("meta"):
            blocks = stream_blocks(empty, None, near)
        for has_h in (False, True):
            states = dict.fromkeys(empty.parameters(), ("h", dtype)) if has_h else {}
            plan = plan_of_offload(blocks, empty, near, states, trains=True)
            sizes += [plan.in_memory, plan.read + plan.written]
        lines.append(f"| {model} | {' | '.join(f'{size / 2**30:,.1f}' for size in sizes)} |")
    return "\n".join(lines)


def peak(model: str, data_dir: str, words: str) -> float:
    """Return the MiB of a process of run.py at most."""
    names = ("--model_name", model, "--data_dir", data_dir)
    with tempfile.TemporaryDirectory() as folder:
        command = f"--task_name SST2 --num_eval 4 --result_file {folder}/r.json {words}"
        if words:
            command += " --num_train 16 --max_steps 3 --per_device_train_batch_size 16"
            command += f" --train_as_classification --save_strategy no --output_dir {folder}/out"
        done = subprocess.run(
            [sys.executable, ROOT / "run.py", *names, *command.split()],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=False,
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        return json.loads(Path(folder, "r.json").read_text())["peak_memory_mib"]


def measured_table(model: str, data_dir: str) -> str:
    """Return what processes of each method took at most, in MiB."""
    checkpointed = {
        f"{name}, activation checkpointing": f"{METHODS[name]} --activation_checkpointing"
        for name in ("Adafactor", "AdamW")
    }
    alone = peak(model, data_dir, "")
    lines = ["| process | peak MiB | beside evaluation |", "|---|---|---|"]
    lines.append(f"| evaluation alone | {alone:,.0f} | |")
    for name, words in (METHODS | checkpointed).items():
        found = peak(model, data_dir, words)
        lines.append(f"| {name} | {found:,.0f} | +{found - alone:,.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="measure with this model")
    parser.add_argument("--data_dir", help="folder with sst2/train.jsonl")
    arguments = parser.parse_args()
    if arguments.model:
        print(measured_table(arguments.model, arguments.data_dir))
        return
    for dtype in (torch.bfloat16, torch.float32):
        print(f"\n{str(dtype).removeprefix('torch.')}, GiB\n\n{formula_table(dtype)}")


if __name__ == "__main__":
    main()
