"""Make docs/models.md: what works with which family of models, tried with tiny random ones.

python docs/make_models.py [FAMILY ...]

The models are those of tests/tiny_models.py. Each path of the package runs as a user would start it
(two steps of training, six examples of evaluation); a cell is "yes" where it ended with a result.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny_models

import run
from language_model.loading import leave_out_loading_bars

_TABLES = ("_PACKABLE", "_OTHER", "_WINDOWED", "_OTHER_NAMES")
FAMILIES = [name for table in _TABLES for name in getattr(tiny_models, table)]
_ZO = "--trainer zo --hessian_smooth_type constant1e-6 --learning_rate 1e-4"
PATHS = {
    "evaluates": "",
    "generates": "--task_name SQuAD --max_new_tokens 2",
    "HiZOO": _ZO,
    "HiZOO in bfloat16": f"{_ZO} --load_bfloat16 --zo_eps 1e-2",
    "LoRA": f"{_ZO} --lora --zo_eps 1e-2",
    "prefix": f"{_ZO} --prefix_tuning --zo_eps 1e-1",
    "offload": f"{_ZO} --offload disk",
    "error broadcast": "--trainer broadcast",
    "AdamW": "--trainer regular --learning_rate 1e-4",
}
HEAD = """# Models that were tried

Made by `python docs/make_models.py` with tiny models of random weights, float32 unless the column
says otherwise, on one CPU: which paths of `run.py` end with a result. Other causal language models
of transformers may work, too. Of real models, SmolLM2-135M (llama) and Gemma 3 270M (gemma3) were
trained ([results](results.md)).

"""


def outcome(folder: str, path: str) -> str:
    """Return "yes" if a path ends with a result, or else the reason in one line."""
    words = {"task_name": "SST2", "model_name": folder, "data_dir": str(ROOT / "data/samples")}
    words |= {"num_eval": "6", "result_file": f"{folder}/result.json"}
    argv = [word for name, value in words.items() for word in (f"--{name}", value)]
    if path.startswith("--task_name"):
        argv = argv[2:]
    if "--trainer" in path:
        path += f" --num_train 8 --max_steps 2 --output_dir {folder}/out --save_strategy no"
        path += " --per_device_train_batch_size 4"
        path += " --train_as_classification" * ("SQuAD" not in path)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = run.main([*argv, *path.split(), "--overwrite_output_dir"])
        except Exception as error:
            return f"{type(error).__name__}: {error}".splitlines()[0]
    errors = [line for line in said.getvalue().splitlines() if line.startswith("error: ")]
    return "yes" if code == 0 else "; ".join(errors) or f"exit code {code}"


def rows(families: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return the outcome of each path with each family."""
    found = {}
    for family in families:
        with tempfile.TemporaryDirectory() as folder:
            tiny_models.tiny_model(family).save_pretrained(folder)
            tiny_models.tiny_tokenizer().save_pretrained(folder)
            found[family] = {name: outcome(folder, path) for name, path in PATHS.items()}
    return found


def reason_in(line: str) -> str:
    """Return why a path does not work, without the model's class and the way out."""
    reason = line.removeprefix("error: ").partition("; ")[0].partition(" (")[0]
    return re.sub(r"^--[^:]+: |(of )?\w+For\w+:? ", "", reason)


def make_page(families: Iterable[str] = FAMILIES) -> str:
    """Return the page; what does not work is explained below the table."""
    lines = [f"| family | {' | '.join(PATHS)} |", "| --- " * (len(PATHS) + 1) + "|"]
    reasons = {}
    for family, cells in rows(families).items():
        texts = []
        for name, text in cells.items():
            if text != "yes":
                reasons.setdefault((name, reason_in(text)), []).append(family)
            texts.append("yes" if text == "yes" else "–")
        lines.append(f"| {family} | {' | '.join(texts)} |")
    why = [f"- {name} ({', '.join(of)}): {reason}" for (name, reason), of in reasons.items()]
    return HEAD + "\n".join(
        [*lines, "", "Where there is a dash, the command says why:", "", *why, ""]
    )


if __name__ == "__main__":
    leave_out_loading_bars()
    page = make_page(sys.argv[1:] or FAMILIES)
    if sys.argv[1:]:
        print(page)
    else:
        (ROOT / "docs" / "models.md").write_text(page, encoding="utf-8")
