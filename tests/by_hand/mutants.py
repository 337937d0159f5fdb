"""Small faults, one at a time: does the suite catch each of them?

    python tests/by_hand/mutants.py                  every fault, each in a copy of the repository
    python tests/by_hand/mutants.py rounding resume  those whose names contain a word

Prints a table: the fault, the test that failed first, and the seconds until then. Exits with 1 if a
fault was not caught.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent


class Fault(NamedTuple):
    """A line that is wrong.

    Attributes:
        name: what it does.
        file: where.
        right: text of the file.
        wrong: what stands there instead.
        tests: the files of tests that know this part, without ``tests/test_`` and ``.py``.
    """

    name: str
    file: str
    right: str
    wrong: str
    tests: str


STEP = "hizoo curvature_step reference"
FAULTS = [
    Fault(
        "step: an update 1% too large",
        "zeroth_order/weights.py",
        "*(-step.learning_rate * g for g in step.gradients)",
        "*(-1.01 * step.learning_rate * g for g in step.gradients)",
        STEP,
    ),
    Fault(
        "step: weight decay with the wrong sign",
        "zeroth_order/weights.py",
        "                -decay,",
        "                decay,",
        STEP,
    ),
    Fault(
        "step: batches of an accumulation count alike",
        "hizoo.py",
        "float(weight), [slopes, bends]))",
        "1.0, [slopes, bends]))",
        "hizoo_in_use trainer",
    ),
    Fault("c: doubled", "hizoo.py", "(2 * eps**2)", "(eps**2)", STEP),
    Fault(
        "h: grows 2% too fast",
        "zeroth_order/weights.py",
        "*(smooth * c for c in",
        "*(1.02 * smooth * c for c in",
        STEP,
    ),
    Fault(
        "h: the step takes h before the average",
        "zeroth_order/kernels.py",
        "change.mul_((offsets[i].to(compute_dtype) + 1).rsqrt_())",
        "change.mul_(before[i].rsqrt())",
        STEP,
    ),
    Fault(
        "h of HiZOO-L: without the mean of r",
        "zeroth_order/curvature.py",
        "factors = (rows / rows.mean())",
        "factors = (rows / 1)",
        STEP,
    ),
    Fault("η: without n", "zeroth_order/step_rule.py", "lr * num_samples /", "lr /", STEP),
    Fault(
        "η: c̄ forgets too slowly",
        "zeroth_order/step_rule.py",
        "min(count, MEMORY)",
        "count",
        STEP,
    ),
    Fault(
        "rounding: bfloat16 to the nearest",
        "zeroth_order/rounding.py",
        "total.view(torch.int32) + ((bits >> 16) & 0xFFFF)",
        "total.view(torch.int32) + 0x8000",
        "hizoo",
    ),
    Fault(
        "rounding: float16 towards zero by a tenth of a unit",
        "zeroth_order/rounding.py",
        "moves = fraction.add_(",
        "moves = fraction.sub_(0.1).add_(",
        "hizoo",
    ),
    Fault(
        "noise: every parameter has the same",
        "zeroth_order/noise.py",
        "mixed = mix_seed(stream, parameter)",
        "mixed = mix_seed(stream, 0)",
        "hizoo",
    ),
    Fault(
        "noise: 1% too large",
        "zeroth_order/noise.py",
        "radius = logarithm.mul_(-2).sqrt_()",
        "radius = logarithm.mul_(-2.04).sqrt_()",
        "hizoo",
    ),
    Fault(
        "noise: a chunk begins one number late",
        "zeroth_order/chunks.py",
        "chunk_key(stream, chunk.of.number, chunk.starts[0])",
        "chunk_key(stream, chunk.of.number, chunk.starts[0] + (chunk.starts[0] > 0))",
        "hizoo",
    ),
    Fault(
        "restore: a thousandth of the shift stays",
        "zeroth_order/weights.py",
        "self._add(direction, -sign, None)",
        "self._add(direction, -0.999 * sign, None)",
        "hizoo hizoo_in_use",
    ),
    Fault(
        "restore: the NaN of a check stay",
        "zeroth_order/layerwise.py",
        "                give(own)\n                self.scratch.give_back(kept)",
        "                self.scratch.give_back(kept)",
        "hizoo layerwise",
    ),
    Fault(
        "resume: h is saved in the weights' dtype",
        "hizoo.py",
        "self.state[parameter][name] = tensor.to(parameter.device, copy=True)",
        "self.state[parameter][name] = tensor.to(parameter, copy=True)",
        "hizoo zeroth_order",
    ),
    Fault(
        "packing: a text sees the one before it",
        "language_model/packing.py",
        "visible = same & (key >= 0)",
        "visible = (key >= 0)",
        "packing scoring",
    ),
    Fault(
        "calibration: the prior is added",
        "language_model/scoring.py",
        "[total - prior for",
        "[total + prior for",
        "evaluation scoring",
    ),
    Fault(
        "scores: sums in place of means",
        "language_model/scoring.py",
        "scores = [[total / count for total, count in options] for options in scored]",
        "scores = [[total for total, count in options] for options in scored]",
        "evaluation scoring",
    ),
    Fault(
        "prompts: a blank is missing",
        "templates.py",
        '"{sentence} It was"',
        '"{sentence}It was"',
        "templates",
    ),
    Fault(
        "sampling: another permutation",
        "task_data/sampling.py",
        "np.random.RandomState(seed).permutation(len(samples))[:k]",
        "np.random.RandomState(seed + 1).permutation(len(samples))[:k]",
        "sampling",
    ),
    Fault("metrics: articles count", "metrics.py", r"\b(?:a|an|the)\b", r"\b(?:a|an)\b", "metrics"),
    Fault(
        "broadcast: an update 1% too large",
        "error_broadcast.py",
        "scale = -share / len(errors)",
        "scale = -1.01 * share / len(errors)",
        "error_broadcast",
    ),
    Fault(
        "broadcast: errors keep their length",
        "error_broadcast.py",
        "return errors * (squares / ",
        "return errors * (squares.sqrt() / ",
        "error_broadcast",
    ),
    Fault(
        "broadcast: half of the damping",
        "error_broadcast.py",
        "ridge = max(damping / positions",
        "ridge = max(damping / 2 / positions",
        "error_broadcast",
    ),
    Fault(
        "broadcast: around the norms behind the matrices",
        "error_broadcast.py",
        "if w.norm is not None:",
        "if False:",
        "error_broadcast",
    ),
    Fault(
        "broadcast: options of one position apart",
        "zeroth_order/residual_stream.py",
        "of_positions.index_add_(0, ",
        "of_positions.index_copy_(0, ",
        "error_broadcast",
    ),
    Fault(
        "broadcast: bfloat16 rounded to nearest",
        "zeroth_order/rounding.py",
        "bits = hashed(counters(key, index)).view(change.shape)",
        "bits = torch.full(change.shape, -(1 << 31), dtype=torch.int32)",
        "error_broadcast",
    ),
    Fault(
        "offload: the oldest update of a block left out",
        "zeroth_order/streamed.py",
        "for update in updates:",
        "for update in updates[1:]:",
        "streamed",
    ),
    Fault(
        "offload: an update that is computed again begins with the present low-rank h",
        "zeroth_order/streamed.py",
        "self.states.update(self._states_then.pop(block, {}))",
        "self._states_then.pop(block, {})",
        "streamed",
    ),
]


def outcome_of(fault: Fault, folder: Path) -> tuple[str | None, float]:
    """Return the test that failed first, None if all passed, and the seconds."""
    source = (ROOT / fault.file).read_text(encoding="utf-8")
    if source.count(fault.right) != 1:
        raise SystemExit(f"{fault.file} has {source.count(fault.right)} times: {fault.right}")
    (folder / fault.file).write_text(source.replace(fault.right, fault.wrong), encoding="utf-8")
    files = [f"tests/test_{name}.py" for name in fault.tests.split()]
    started = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", *files],
            cwd=folder,
            capture_output=True,
            text=True,
        )
    finally:
        shutil.copy(ROOT / fault.file, folder / fault.file)
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, flags=re.MULTILINE)
    if not failed and done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return failed and failed[1].removeprefix("tests/"), time.perf_counter() - started


def main() -> int:
    """Try every fault, and print the table."""
    words = sys.argv[1:]
    missed = 0
    with TemporaryDirectory() as temporary:
        folder = Path(temporary, "repository")
        ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", "result")
        shutil.copytree(ROOT, folder, ignore=ignored)
        print("| fault | caught by | seconds |\n|---|---|---|")
        for fault in FAULTS:
            if words and not any(word in fault.name for word in words):
                continue
            test, seconds = outcome_of(fault, folder)
            missed += test is None
            print(f"| {fault.name} | {test or '**nothing**'} | {seconds:.0f} |", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
