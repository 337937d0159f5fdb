"""Every line of the original's usage, on the bundled model, with fewer steps and examples."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from running import ROOT

# The lines as their users know them; MODEL is the bundled one, and the arguments behind them win.
ZEROTH_ORDER = "HESSIAN_SMOOTH_TYPE=constant1e-4"
SHORT = "--max_steps 4 --eval_steps 2 --save_steps 2 --num_train 24 --num_dev 8 --num_eval 8"
EVALUATION = "--num_eval 8"
EPOCH = "--num_train 16 --num_dev 4 --num_eval 8 --num_train_epochs 1"
USAGE = {
    "HiZOO, all parameters": (
        f"TASK=CB MODE=ft LR=1e-6 EPS=1e-3 {ZEROTH_ORDER} bash HiZOO.sh",
        SHORT,
    ),
    "HiZOO, prefix-tuning": (
        f"TASK=CB MODE=prefix LR=1e-2 EPS=1e-1 {ZEROTH_ORDER} bash HiZOO.sh",
        SHORT,
    ),
    "HiZOO, LoRA": (f"TASK=CB MODE=lora LR=1e-4 EPS=1e-2 {ZEROTH_ORDER} bash HiZOO.sh", SHORT),
    "objective without a gradient": (
        f"TASK=SQuAD MODE=prefix LR=1e-2 EPS=1e-1 {ZEROTH_ORDER} bash HiZOO.sh --non_diff "
        "--evaluation_strategy no --save_strategy no --save_model",
        "--max_steps 2 --num_train 24 --num_dev 4 --num_eval 4 --max_new_tokens 4",
    ),
    "zero-shot": ("TASK=SST2 bash icl.sh --num_train 0", EVALUATION),
    "in context": ("TASK=SST2 bash icl.sh", EVALUATION),
    "fine-tuning, all parameters": ("TASK=SST2 MODE=ft LR=1e-5 bash finetune.sh", EPOCH),
    "fine-tuning, prefix": ("TASK=SST2 MODE=prefix LR=1e-2 bash finetune.sh", EPOCH),
    "fine-tuning, LoRA": ("TASK=SST2 MODE=lora LR=1e-4 bash finetune.sh", EPOCH),
}


@pytest.mark.parametrize(("line", "shorter"), USAGE.values(), ids=USAGE)
def test_usage(tmp_path: Path, line: str, shorter: str) -> None:
    words = line.replace(" bash ", f" bash {ROOT}/")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    process = subprocess.run(
        ["bash", "-c", f"{words} {shorter} --result_file result.json"],
        cwd=tmp_path,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    task = line.split()[0].removeprefix("TASK=")
    assert result["task"] == task
    assert list(result["metric"]) == (["f1", "em"] if task == "SQuAD" else ["accuracy"])
    assert all(0 <= value <= 1 for value in result["metric"].values())
    last = process.stdout.splitlines()[-2]
    assert "accuracy" in last or "f1" in last
    if "--save_model" in line:
        assert list((tmp_path / "result").rglob("adapter_model.safetensors"))
        assert not list((tmp_path / "result").rglob("checkpoint-*"))
    elif "icl.sh" not in line:
        checkpoints = list((tmp_path / "result").rglob("checkpoint-*"))
        assert checkpoints
        file = "model.safetensors" if "MODE=ft" in line else "adapter_model.safetensors"
        assert all((folder / file).is_file() for folder in checkpoints)
