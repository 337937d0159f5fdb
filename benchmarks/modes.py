"""Every way of tuning on the bundled model: what is trained, what it gains, and what it costs.

    python benchmarks/modes.py

Each row is one command, run in a folder of its own: SST2, 1,000 training examples, seed 0, 500
validation examples. Peak memory is that of the whole process (resident set), Python and its
libraries included; "CPU s" is the processor time of the whole command, the start of Python and
evaluations included, on one thread; a checkpoint's size includes the optimizer's state.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Row:
    """A way of tuning and its command, as it is written in docs/tuning.md."""

    name: str
    command: str


PROBING = (
    "python run.py --task_name SST2 --model_name data/tiny-opt --data_dir data/samples "
    "--trainer regular --linear_probing --num_train 1000 --eval_before_training"
)
ROWS = (
    Row("zero-shot", "bash icl.sh --num_train 0"),
    Row("in context, 32 demonstrations", "bash icl.sh"),
    Row("HiZOO", "bash HiZOO.sh"),
    Row("HiZOO-L", "bash HiZOO.sh --hessian lowrank"),
    Row("MeZO", "HESSIAN_SMOOTH_TYPE=constant0 bash HiZOO.sh"),
    Row("HiZOO, LoRA", "MODE=lora bash HiZOO.sh"),
    Row("HiZOO, prefix", "MODE=prefix bash HiZOO.sh"),
    Row("HiZOO, head", "LR=1e-3 bash HiZOO.sh --head_tuning --untie_emb"),
    Row("HiZOO, accuracy as the objective", "EPS=1e-2 bash HiZOO.sh --non_diff"),
    Row("error broadcast", "bash broadcast.sh"),
    Row("linear probing", PROBING),
    Row("AdamW", "bash finetune.sh"),
    Row("AdamW, LoRA", "MODE=lora LR=1e-3 bash finetune.sh"),
    Row("AdamW, prefix", "MODE=prefix bash finetune.sh"),
)


def run(row: Row, folder: Path) -> dict[str, Any]:
    """Run a command in ``folder``; return what the table of docs/tuning.md shows of it."""
    for name in ("run.py", "data"):
        (folder / name).symlink_to(ROOT / name)
    for name in ("HiZOO.sh", "broadcast.sh", "finetune.sh", "icl.sh"):
        # A script finds the others beside itself, so no link to it.
        (folder / name).write_text(f'exec bash "{ROOT / name}" "$@"\n', encoding="utf-8")
    interpreters = str(Path(sys.executable).parent)
    process = subprocess.Popen(
        ["bash", "-c", f"{row.command} --result_file result.json"],
        cwd=folder,
        env=os.environ | {"PATH": f"{interpreters}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{row.command} failed:\n{errors}")
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    checkpoint = result.get("checkpoint")
    files = (folder / checkpoint).rglob("*") if checkpoint else ()
    return {
        "mode": row.name,
        "trained_parameters": result.get("trained_parameters", 0),
        "before": result.get("metric_before_training", {}).get("accuracy"),
        "after": result["metric"]["accuracy"],
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_mib": usage.ru_maxrss / 1024,
        "checkpoint_mib": sum(file.stat().st_size for file in files) / 2**20 or None,
        "command": row.command,
    }


def shown(value: float | None, digits: int) -> str:
    """A number of a table's cell, or a dash."""
    return "–" if value is None else f"{value:,.{digits}f}"


def main() -> None:
    """Run every command and print the table of docs/tuning.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", help="names of the rows to run; default: all")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    arguments = parser.parse_args()
    rows = []
    print("| | trained | before | after | CPU s | peak MiB | checkpoint MiB | command |")
    print("|---|---|---|---|---|---|---|---|")
    for row in ROWS:
        if arguments.only and row.name not in arguments.only:
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows.append(run(row, Path(folder)))
        found = rows[-1]
        cells = [
            found["mode"],
            f"{found['trained_parameters']:,}",
            shown(found["before"], 3),
            shown(found["after"], 3),
            shown(found["cpu_seconds"], 0),
            shown(found["peak_mib"], 0),
            shown(found["checkpoint_mib"], 2),
            f"`{found['command']}`",
        ]
        print("| " + " | ".join(cells) + " |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
