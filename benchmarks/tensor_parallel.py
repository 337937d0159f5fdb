"""What --tensor_parallel changes in the weights, and what its processes exchange.

    python benchmarks/tensor_parallel.py [--steps 50] [--processes 2 4]

The bundled OPT, and a Llama and a Qwen2 with random weights, each trained by one process with all
weights and by several with parts; on CPUs (gloo). SST2 samples, 16 examples a step. The units are
those in the last place of the largest number that a tensor's weights are shifted to, which rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config

import run
from hizoo import LARGEST_NOISE, HiZOO
from language_model.loading import leave_out_loading_bars
from trainer import ZerothOrderSettings

BUNDLED = ROOT / "data" / "tiny-opt"
SHAPE = {
    **{"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4},
    **{"num_attention_heads": 4, "num_key_value_heads": 4, "initializer_range": 0.1},
    **{"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1},
}
RANDOM = {"Llama": LlamaConfig, "Qwen2": Qwen2Config}
METHODS = {
    "MeZO": ("--hessian_smooth_type", "constant0"),
    "HiZOO": ("--hessian_smooth_type", "constant1e-5"),
    "HiZOO-L": ("--hessian_smooth_type", "constant1e-5", "--hessian", "lowrank"),
}
# What transformers, torch's DTensors and this package exchange by.
COLLECTIVE = (
    *("c10d.allreduce_", "c10d.broadcast_", "_c10d_functional.all_reduce"),
    "_c10d_functional.all_gather_into_tensor",
)


class Exchanged(TorchDispatchMode):
    """Counts the bytes that this process gives to collective operations."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.operations = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        """Run an operation, and count it if it is a collective one."""
        if any(name in str(function) for name in COLLECTIVE):
            given = args[0] if isinstance(args[0], list | tuple) else [args[0]]
            tensors = [each for each in given if isinstance(each, torch.Tensor)]
            if tensors:
                self.bytes += sum(each.nbytes for each in tensors)
                self.operations += 1
        return function(*args, **kwargs or {})


def make_models(folder: Path) -> dict[str, Path]:
    """Return the folders of the models, by family."""
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    models = {"OPT": BUNDLED}
    for family, kind in RANDOM.items():
        torch.manual_seed(0)
        config = kind(vocab_size=len(tokenizer), tie_word_embeddings=family == "Qwen2", **SHAPE)
        models[family] = folder / family
        AutoModelForCausalLM.from_config(config).save_pretrained(models[family])
        tokenizer.save_pretrained(models[family])
    return models


def training(model: Path, folder: Path, steps: int, *more: str) -> list[str]:
    """Return run.py's arguments of a training run that saves its model."""
    line = ["--task_name", "SST2", "--data_dir", str(ROOT / "data/samples"), "--model_name"]
    line += [str(model), "--trainer", "zo", "--train_as_classification", "--num_train", "200"]
    line += ["--per_device_train_batch_size", "16", "--learning_rate", "1e-4", "--max_steps"]
    line += [str(steps), "--save_strategy", "no", "--quiet", "--logging_steps", "1000"]
    line += ["--no_eval", "--save_model", "--output_dir", str(folder)]
    return [*line, "--result_file", str(folder / "result.json"), *more]


def work(lines: list[list[str]], file: Path) -> None:
    """Do the runs, as one of the processes; write what each has exchanged in its estimates."""
    figures = []
    estimate = HiZOO.estimate
    for line in lines:
        counted, calls = Exchanged(), []

        def counting(self: HiZOO, *args: Any, counted=counted, calls=calls, **kwargs: Any) -> float:
            calls.append(self.param_groups[0]["step"])
            with counted:
                return estimate(self, *args, **kwargs)

        HiZOO.estimate = counting
        assert run.main(line) == 0
        figures.append((counted.bytes / len(calls), counted.operations / len(calls)))
    if os.environ.get("RANK", "0") == "0":
        file.write_text(json.dumps(figures))


def launched(lines: list[list[str]], processes: int, folder: Path) -> list[tuple[float, float]]:
    """Do the runs with so many processes; return bytes and operations of a step, of each."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    if processes > 1:
        lines = [[*line, "--tensor_parallel"] for line in lines]
    file = folder / f"figures-{processes}.json"
    command = [sys.executable, *(launcher if processes > 1 else [])]
    command += [__file__, "--work", json.dumps(lines), "--file", str(file)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads(file.read_text())


def difference(one: Path, other: Path) -> tuple[float, float]:
    """Return the largest difference of two models' weights, and the largest in units."""
    largest = units = 0.0
    second = load_file(other / "model.safetensors")
    for name, tensor in load_file(one / "model.safetensors").items():
        apart = float((tensor.double() - second[name].double()).abs().max())
        shifted = tensor.abs().max() + LARGEST_NOISE * ZerothOrderSettings.eps
        unit = torch.finfo(tensor.dtype).eps * 2.0 ** float(shifted.log2().floor())
        largest, units = max(largest, apart), max(units, apart / unit)
    return largest, units


def main() -> None:
    """Print a table, or do the runs of one process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--work", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    leave_out_loading_bars()
    if options.work:
        work(options.work, options.file)
        return
    print("| model | method | parts | largest difference | in units | bytes a step | operations |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        models = make_models(folder)
        names = [(family, method) for family in models for method in METHODS]

        def place(processes: int, family: str, method: str) -> Path:
            return folder / f"{processes}-{family}-{method}"

        figures = {}
        for processes in (1, *options.processes):
            lines = [
                training(models[f], place(processes, f, m), options.steps, *METHODS[m])
                for f, m in names
            ]
            figures[processes] = launched(lines, processes, folder)
        for number, name in enumerate(names):
            for processes in options.processes:
                apart, units = difference(place(1, *name), place(processes, *name))
                sent, operations = figures[processes][number]
                print(
                    f"| {' | '.join(name)} | {processes} | {apart:.1e} | {units:.1f} | "
                    f"{sent:,.0f} | {operations:.0f} |"
                )


if __name__ == "__main__":
    main()
