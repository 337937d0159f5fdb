"""The files of examples/ run as their users run them, and what they print falls."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import datasets
import pytest
from running import MODEL, ROOT, SAMPLES

# tests/test_reference.py has the steps to copy, tests/test_forward_only.py TRL.
EXAMPLES = sorted(
    path.stem
    for path in (ROOT / "examples").glob("*.py")
    if not path.stem.endswith("_reference") and path.stem != "trl_sft"
)


def slow_but_the_plain_loop(name: str) -> object:
    return name if name == "plain_loop" else pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [*map(slow_but_the_plain_loop, EXAMPLES)])
def test_losses_fall(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    lines = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 60
    # The examples read below the working directory and write there: not in the repository.
    samples = tmp_path / "data/samples/sst2"
    samples.mkdir(parents=True)
    (tmp_path / "data/tiny-opt").symlink_to(MODEL)
    for split, count in (("train", 800), ("validation", 100)):
        rows = (SAMPLES / f"sst2/{split}.jsonl").read_text(encoding="utf-8").splitlines()
        (samples / f"{split}.jsonl").write_text("\n".join(rows[:count]), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(sys, "argv", [name])
    runpy.run_module(f"examples.{name}", run_name="__main__")
    printed = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"loss (\d\.\d{4})$", printed, flags=re.MULTILINE)]
    assert len(losses) >= 3
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.7 * losses[0]


def test_there_are_three() -> None:
    assert EXAMPLES == ["lightning_module", "own_data_set", "plain_loop"]
