"""The benchmarks run, in small, and what they compare is the same thing."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import runpy
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from matplotlib.colors import to_hex
from tiny_models import tiny_model, tiny_tokenizer
from torch import Tensor

import tasks
from task_data import loading
from utils import InputError

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


def test_offload_takes_a_folder_of_the_same_model_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    offload = importlib.import_module("offload")
    size = {"layers": 1, "hidden": 64, "vocabulary": 32, "dtype": "float32"}
    offload.write_model(tmp_path, Namespace(**size))
    offload.write_model(tmp_path, Namespace(**size))
    others = {"layers": 2, "hidden": 128, "vocabulary": 64, "dtype": "bfloat16"}
    for name, value in others.items():
        with pytest.raises(SystemExit, match=f"not .*{value}: give another folder"):
            offload.write_model(tmp_path, Namespace(**size | {name: value}))


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


@pytest.fixture
def methods(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """benchmarks/methods.py, which sets the number of threads."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    threads = torch.get_num_threads()
    yield importlib.import_module("methods")
    torch.set_num_threads(threads)


@pytest.fixture
def methods_table(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/methods_table.py."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("methods_table")


def curve(*losses: float | None, step: int = 2) -> list[dict[str, Any]]:
    """The curve of a run that measures after every step, as it stands in a file."""
    return [
        {"passes": step * i, "steps": i, "seconds": 0.1, "loss": loss, "accuracy": 0.5}
        for i, loss in enumerate(losses)
    ]


def test_methods(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    methods: ModuleType,
) -> None:
    torch.set_num_threads(2)
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
    said = capsys.readouterr().err
    assert said.count(f"{mezo}, seed 0: 0 passes") == 1
    assert f"{mezo}, seed 0: stands in" in said
    assert torch.get_num_threads() == 1  # whose CPU seconds were counted


def test_a_file_of_runs_takes_runs_of_the_same_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, methods: ModuleType
) -> None:
    file, other = tmp_path / "runs.json", {"method": "fzoo lr=1e-5", "seed": 5}

    def measure(arguments: Any, method: str, seed: int) -> dict[str, Any]:
        shared = {name: getattr(arguments, name) for name in methods.SHARED}
        shared |= {"model": "tiny-opt"}
        methods.add_run(file, shared, other | {"curve": curve(0.5)})  # by another process
        return {"method": method, "seed": seed, "curve": curve(0.5, math.nan)}

    def run(*words: str) -> None:
        line = ["methods.py", "--output", str(file), "--seeds", "0", "1", "--methods", "mezo"]
        monkeypatch.setattr(sys, "argv", [*line, *words])
        methods.main()

    monkeypatch.setattr(methods, "measure", measure)
    run("--task", "sst2")
    run("--data_dir", "elsewhere", "--passes", "50")
    content = json.loads(file.read_text())
    assert [run["seed"] for run in content["runs"]] == [5, 0, 1]
    assert content["task"] == "SST2" and "passes" not in content
    assert [*tmp_path.iterdir()] == [file]
    before = file.read_text()
    for words in (
        ("--model", "gpt2"),
        ("--task", "CB"),
        ("--dtype", "bfloat16"),
        ("--pool", "50"),
        ("--objective", "language"),
        ("--max_length", "100"),
    ):
        with pytest.raises(InputError, match=f"{words[0][2:]} .*, not {words[1]}: give another"):
            run(*words)
    for method in ("meso lr=1", "mezo rl=1"):
        with pytest.raises(InputError, match="unknown"):
            run("--methods", method)
    assert file.read_text() == before
    file.write_text("[]")
    with pytest.raises(InputError, match="is no file of"):
        run()


def test_threads_that_add_runs_to_one_file_lose_none(tmp_path: Path, methods: ModuleType) -> None:
    def add(seed: int) -> None:
        run = {"method": "mezo", "seed": seed, "curve": curve(0.5)}
        methods.add_run(tmp_path / "runs.json", dict(methods.SHARED), run)

    with ThreadPoolExecutor(4) as threads:
        [*threads.map(add, range(20))]
    runs = methods.read_runs(tmp_path / "runs.json", dict(methods.SHARED))
    assert sorted(run["seed"] for run in runs) == [*range(20)]


# The python of the system alone is found; a run of benchmarks/methods.py is noted, not done.
NOTES_ITS_ARGUMENTS = """#!/bin/sh
case "$1" in -c) exit 0 ;; esac
for word in "$@"; do printf '%s\\t' "$word"; done >> calls
echo >> calls
"""


@pytest.mark.parametrize("script", ["smollm2_sst2.sh", "broadcast.sh"])
def test_the_files_of_runs_are_those_of_their_scripts(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, methods: ModuleType
) -> None:
    (tmp_path / "runs").mkdir()
    for name in (f"runs/{script}", "settings.sh"):
        shutil.copy(ROOT / name, tmp_path / name)
    commands = tmp_path / "commands"
    commands.mkdir()
    for name in ("bash", "dirname"):
        (commands / name).symlink_to(shutil.which(name))
    (commands / "python3").write_text(NOTES_ITS_ARGUMENTS)
    (commands / "python3").chmod(0o755)
    models = {"SMOLLM2": "/files/SmolLM2-135M-Instruct.Q4_1.gguf"}
    models |= {"MODEL": models["SMOLLM2"], "GEMMA3": "/files/gemma-3-270m-q4_k_m.gguf"}
    environment = {"PATH": str(commands), "OUT": str(ROOT / "runs"), "DATA_DIR": "/files"} | models
    subprocess.run([commands / "bash", tmp_path / "runs" / script], env=environment, check=True)
    calls = [line.split("\t")[:-1] for line in (tmp_path / "calls").read_text().splitlines()]
    measured = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(methods, "measure", lambda *words: measured.append(words[1:]))
    calls = [call for call in calls if call[0] == "benchmarks/methods.py"]
    assert len(calls) > 3
    named: dict[str, set[tuple[str, int]]] = {}
    for call in calls:
        monkeypatch.setattr(sys, "argv", call)
        methods.main()
        seeds = [int(seed) for seed in values_of(call, "--seeds") or (0, 1, 2)]
        runs = itertools.product(values_of(call, "--methods"), seeds)
        named.setdefault(*values_of(call, "--output"), set()).update(runs)
    assert not measured
    for file, runs in named.items():
        recorded = json.loads(Path(file).read_text())["runs"]
        assert {(run["method"], run["seed"]) for run in recorded} == runs, file


def values_of(call: list[str], option: str) -> list[str]:
    """What follows an option up to the next one."""
    rest = call[call.index(option) + 1 :] if option in call else []
    return [*itertools.takewhile(lambda word: not word.startswith("--"), rest)]


def test_the_table_names_every_setting(methods_table: ModuleType) -> None:
    many = ["mezo lr=1e-5", "hizoo lr=1e-5", "hizoo lr=1e-5 alpha=1e-6"]
    settings = ("hessian=lowrank", "n=8", "eps=1e-2", "batch=4", "every=5", "every=10")
    settings += ("from=0.5", "hold=0.25", "hold=0.5", "mode=lora", "decay=linear", "passes=9")
    many += [f"{method} {setting}" for method in many for setting in settings]
    assert len({*map(methods_table.label, many)}) == len(many)
    assert methods_table.label("mezo n=8 lr=1e-6") == "MeZO, learning rate 1e-6, 8 directions"


def test_the_table_finds_points_less_than_a_step_late(methods_table: ModuleType) -> None:
    rows = [
        {"passes": passes, "steps": round(passes / 16), "seconds": 1.0, "loss": 0.5, "accuracy": 1}
        for passes in (0, 65, 113, 209)
    ]
    run = {"method": "mezo n=8", "seed": 0, "curve": rows}
    found = methods_table.fitting(run, (0, 50, 96, 100, 200))
    assert {column: row["passes"] for column, row in found.items()} == {
        0: 0,
        50: 65,
        100: 113,
        200: 209,
    }
    near = [rows[0], *({"passes": p, "steps": p // 3, "loss": 0.5} for p in (51, 54))]
    assert methods_table.fitting(run | {"curve": near}, (50,))[50]["passes"] == 51


def test_a_loss_that_is_not_finite_is_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    methods_table: ModuleType,
) -> None:
    files = tmp_path / "a.json", tmp_path / "b.json"
    runs = [
        {"method": method, "seed": seed, "curve": curve(0.7, loss, step=50)}
        for seed, loss in enumerate((math.nan, 0.6))
        for method in ("mezo lr=1", "mezo lr=2", "adamw lr=1")
    ]
    runs[4]["curve"][1]["loss"] = runs[5]["curve"][1]["loss"] = math.inf
    shared = dict(methods_table.SHARED) | {"model": "tiny", "task": "SST2"}
    for run in runs:
        methods_files = importlib.import_module("methods_files")
        methods_files.add_run(files[run["method"] == "adamw lr=1"], shared, run)

    def table(*words: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["methods_table.py", *map(str, files), *words])
        methods_table.main()
        return capsys.readouterr().out.splitlines()

    plot = tmp_path / "new" / "runs.png"
    lines = table("--methods", "adamw lr=1", "mezo lr=1", "--plot", str(plot))
    assert lines[1] == "tiny, SST2"
    assert lines[-2:] == [
        "| AdamW, learning rate 1 | 2 | .700, .500 | diverged | 0.00 |",
        "| MeZO, learning rate 1 | 2 | .700, .500 | 1 of 2 diverged | 0.00 |",
    ]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert len(table()) == len(lines) + 1
    with pytest.raises(InputError, match="no file has a run of 'mezo'"):
        table("--methods", "mezo lr=1", "mezo")
    with pytest.raises(InputError, match="give files of one model"):
        table(str(ROOT / "runs" / "smollm2_sst2.json"), "--plot", str(plot))


@pytest.mark.parametrize("number", [3, 11, 25])
def test_every_line_of_a_picture_has_its_colour(number: int, methods_table: ModuleType) -> None:
    assert len({*map(to_hex, methods_table.colors(number))}) == number


def test_methods_beside_zeroth_order_on_pooled_rows(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    methods: ModuleType,
    methods_table: ModuleType,
) -> None:
    monkeypatch.setattr(methods, "DEV_OF_POOL", 6)
    chosen = ["zeroshot", "probing", "adamw lr=1e-5 from=0.5 passes=4", "adamw lr=1e-5 mode=head"]
    chosen += ["broadcast passes=2"]
    file = tmp_path / "runs.json"
    line = ["methods.py", "--pool", "20", "--passes", "6", "--at", "3", "6", "--seeds", "0"]
    monkeypatch.setattr(sys, "argv", [*line, "--output", str(file), "--methods", *chosen])
    methods.main()
    runs = {run["method"]: run for run in json.loads(file.read_text())["runs"]}
    passes = [[row["passes"] for row in runs[method]["curve"]] for method in chosen]
    assert passes == [[0], [2], [4], [0, 3, 6], [2]]
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


def test_adapters_start_from_the_seed(methods: ModuleType) -> None:
    first, second, other = (
        methods.prepare_model(str(methods.BUNDLED), torch.float32, "lora", seed)[0].state_dict()
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())
    assert not all(torch.equal(weight, other[name]) for name, weight in first.items())


def test_adamw_trains_the_upper_blocks_alone(methods: ModuleType) -> None:
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
