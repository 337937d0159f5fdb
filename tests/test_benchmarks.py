"""The benchmarks run, in small, and what they compare is the same thing."""

from __future__ import annotations

import importlib
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer
from torch import Tensor

import tasks
from task_data import loading

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs a script of benchmarks/ in this process; returns what it writes with --json."""

    def run(name: str, *arguments: str) -> Any:
        file = tmp_path / "figures.json"
        with monkeypatch.context() as patched:
            patched.chdir(tmp_path)
            patched.setattr(sys, "path", [*sys.path])
            patched.setattr(sys, "argv", [name, *arguments, "--json", str(file)])
            runpy.run_path(str(ROOT / "benchmarks" / name), run_name="__main__")
        return json.loads(file.read_text(encoding="utf-8"))

    return run


@pytest.mark.slow
def test_step(measured: Callable[..., Any]) -> None:
    small = ("--model", "tiny", "--batch", "2", "--tokens", "4", "--repeats", "1")
    rows = measured("step.py", *small)
    for dtype, shifts in (("float32", 3), ("bfloat16", 0)):
        names = [row["what"] for row in rows if row["dtype"] == dtype]
        assert names[:3] == ["forward", "noise", "torch's noise"]
        assert sum(name.endswith("one shift") for name in names) == shifts
        assert sum(name.endswith("update") for name in names) == 3
        assert sum(name.endswith("whole step") for name in names) == 5
        assert names[-1] == "HiZOO: first step"
    assert all(row["seconds"] > 0 and row["over_noise"] > 0 for row in rows if "seconds" in row)
    ratios = [row["textbook_over_this"] for row in rows if row["what"].startswith("textbook")]
    assert ratios == [1, 1]


@pytest.mark.slow
def test_offload(measured: Callable[..., Any], tmp_path: Path) -> None:
    small = ("--layers", "3", "--hidden", "64", "--tokens", "8", "--steps", "1", "--batch", "1")
    rows = measured("offload.py", str(tmp_path / "model"), *small, "--methods", "HiZOO")
    steps = ["in memory", "1/8 kept", "none kept", "1/8 written"]
    assert [row["weights"] for row in rows] == [*steps, "warm", "cold"]
    assert [row["read_mib"] > 0 for row in rows] == [False, *[True] * 5]
    assert rows[3]["written_mib"] < rows[2]["written_mib"]
    assert rows[4]["written_mib"] == 0
    assert rows[2]["written_mib"] >= rows[1]["written_mib"] > 0


@pytest.mark.slow
def test_scoring(measured: Callable[..., Any]) -> None:
    small = ("--model", "tiny", "--examples", "4", "--usual_examples", "2", "--repeats", "1")
    rows = measured("scoring.py", *small, "--only", "icl", "SST2", "generation 20")
    in_context, training, generation = rows
    assert in_context["same_predictions"] and in_context["largest_difference"] < 1e-4
    assert training["over_bare"] > 0 and training["times"] > 0
    assert generation["same_text"]


@pytest.mark.slow
def test_precision(
    tmp_path: Path, measured: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = loading.load_samples

    def load_few(*arguments: Any) -> tuple[list[tasks.Sample], list[tasks.Sample]]:
        train, validation = load(*arguments)
        return train, validation[:50]

    monkeypatch.setattr(loading, "load_samples", load_few)
    small = ("--steps", "1", "--drift_steps", "20", "--long_steps", "20", "--seeds", "0")
    plot = tmp_path / "precision.png"
    figures = measured("precision.py", *small, "--plot", str(plot))
    drift = figures["drift"]
    assert drift["HiZOO"]["float16"] == drift["HiZOO"]["bfloat16"] == 0
    assert drift["textbook"]["bfloat16"] > drift["textbook"]["float16"] > 1e-4
    assert 0 < figures["float32_long"]["one by one"] < 1e-6
    assert all(
        len(values) == 1 for kind in figures["accuracy"].values() for values in kind.values()
    )
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_modes(measured: Callable[..., Any]) -> None:
    (row,) = measured("modes.py", "--only", "zero-shot")
    assert row["trained_parameters"] == 0 and row["checkpoint_mib"] is None
    assert row["after"] == pytest.approx(0.746, abs=0.01)
    assert row["peak_mib"] > 100


def test_demo_curves_are_drawn_from_their_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    demo_curves = importlib.import_module("demo_curves")
    runs = json.loads((ROOT / "benchmarks" / "demo_curves.json").read_text())
    assert {(run["method"], run["seed"]) for run in runs} == {
        (method, seed) for method in demo_curves.METHODS for seed in demo_curves.SEEDS
    }
    demo_curves.plot(runs, tmp_path / "demo_curves.png")
    assert (tmp_path / "demo_curves.png").stat().st_size > 10_000


def test_methods(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    methods = importlib.import_module("methods")
    monkeypatch.setattr(methods, "TRAIN", 20)
    monkeypatch.setattr(methods, "DEV", 4)
    curvature, mezo = "curvature batch=2 mode=lora", "mezo lr=1e-4 batch=2"
    prefix = "curvature batch=2 mode=prefix"
    for task, chosen in (("SST2", [mezo]), ("SST2", [curvature, mezo]), ("SQuAD", [prefix])):
        file = tmp_path / f"{task}.json"
        line = ["methods.py", "--task", task, "--passes", "3", "--points", "1", "--seeds", "0"]
        monkeypatch.setattr(sys, "argv", [*line, "--output", str(file), "--methods", *chosen])
        methods.main()
        runs = json.loads(file.read_text())["runs"]
        assert {run["method"] for run in runs} == set(chosen)
        for run in runs:
            before, after = run["curve"]
            assert before["passes"] == 0 and after["passes"] >= 3
            assert (before["accuracy"] is None) == (task == "SQuAD")
    # What stood in the file was not run again.
    assert capsys.readouterr().err.count(f"{mezo}, seed 0: 0 passes") == 1


def test_methods_beside_zeroth_order_on_pooled_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    methods, methods_table = map(importlib.import_module, ("methods", "methods_table"))
    monkeypatch.setattr(methods, "DEV_OF_POOL", 6)
    chosen = ["zeroshot", "probing", "adamw lr=1e-5 from=0.5 passes=4", "adamw lr=1e-5 mode=head"]
    chosen += ["broadcast passes=2"]
    file = tmp_path / "runs.json"
    line = ["methods.py", "--pool", "20", "--passes", "6", "--at", "3", "6", "--seeds", "0"]
    monkeypatch.setattr(sys, "argv", [*line, "--output", str(file), "--methods", *chosen])
    methods.main()
    runs = {run["method"]: run for run in json.loads(file.read_text())["runs"]}
    passes = [[row["passes"] for row in runs[method]["curve"]] for method in chosen]
    assert passes == [[0], [2], [6], [0, 3, 6], [2]]
    zero = runs["zeroshot"]["curve"][0]
    assert runs["adamw lr=1e-5 mode=head"]["curve"][0]["loss"] == pytest.approx(zero["loss"])
    assert runs["probing"]["curve"][0]["loss"] != zero["loss"]
    assert 0.5 <= runs["zeroshot"]["best_constant"]["accuracy"] <= 1
    monkeypatch.setattr(sys, "argv", ["methods_table.py", str(file)])
    methods_table.main()
    text = capsys.readouterr().out
    assert "| Linear probing | 1 |" in text and "AdamW, head tuning, learning rate 1e-5" in text
    curves = methods_table.points([*runs.values()], "loss")
    assert curves["broadcast"][2][0] == 2 and set(curves["adamw lr=1e-5 mode=head"]) == {0, 1, 2}
    assert methods_table.said("mezo lr=1e-6") == "MeZO, published rate"
    methods_table.draw([*runs.values()], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_adamw_trains_the_upper_blocks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    methods = importlib.import_module("methods")
    model, _ = methods.prepare_model(str(methods.BUNDLED), torch.float32, "ft", 0)
    methods.freeze_below(model, 0.5)
    blocks = len(model.model.decoder.layers)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    first = blocks // 2
    assert all(name.startswith("model.decoder.layers.") for name in trained)
    assert {int(name.split(".")[3]) for name in trained} == set(range(first, blocks))


def test_fzoo_is_its_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    fzoo = importlib.import_module("fzoo")
    weights = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)

    def loss_at(x: Tensor) -> Tensor:
        return (x.square() * torch.tensor([1.0, 2.0, 3.0])).sum()

    optimizer = fzoo.FZOO([weights], lr=1e-5, seed=3)
    u = torch.stack([next(optimizer.direction(i)) for i in range(8)])
    assert set(u.flatten().tolist()) == {-1, 1}
    center = loss_at(weights)
    losses = torch.stack([loss_at(weights + 1e-3 * each) for each in u])
    expected = weights - 1e-5 * (losses - center) @ u / (8 * 1e-3 * losses.std())
    assert optimizer.step(lambda: loss_at(weights)) == float(center)
    assert torch.allclose(weights, expected, rtol=1e-9)


@pytest.mark.slow
def test_variants_of_error_broadcast(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    variants = importlib.import_module("broadcast_variants")

    def run(*words: object) -> tuple[list[str], list[float]]:
        monkeypatch.setattr(sys, "argv", ["broadcast_variants.py", *map(str, words)])
        variants.main()
        rows = capsys.readouterr().out.splitlines()
        ends = [row.partition("dev loss ")[2].partition(",")[0] for row in rows]
        return rows, [float(end) for end in ends if end]

    of_opt = [variant for variant in variants.VARIANTS if variant != "gated"]
    shown, losses = run("--passes", 20, "--variants", *of_opt)
    assert len(losses) == len(of_opt) and max(losses) < 0.05
    assert sum(row.startswith("block ") for row in shown) == 3
    assert sum(row.startswith("step ") for row in shown) == 2

    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    few, many = (
        run("--model", tmp_path, "--passes", passes, "--variants", "gated")[1][0]
        for passes in (1, 20)
    )
    assert many < few
