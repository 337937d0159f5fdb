"""Results as a table and a picture."""

from __future__ import annotations

import csv
import io
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running import contents, training

import report
import run
from sweeps.curves import curves
from sweeps.tables import Loaded, Table


def written(folder: Path, name: str, accuracy: float, **settings: Any) -> Path:
    """A result file as run.py writes it, as far as a table reads it."""
    task = settings.pop("task", "SST2")
    losses = {"10": 0.5, "20": 1 - accuracy}
    result = {
        "task": task,
        "trainer": "zo",
        "metric": {"accuracy": accuracy},
        "dev_metric": {"accuracy": accuracy / 2},
        "forward_passes": 60,
        "seconds": 100 * accuracy,
        "history": {
            "dev_loss": losses,
            "forward_passes": {"10": 31, "20": 61},
            "seconds": {"10": 1.0, "20": 1 + accuracy},
        },
        "settings": {"task_name": task, "seed": 0, "output_dir": name} | settings,
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(result))
    return path


def printed(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert report.main([str(word) for word in argv]) == 0
    return capsys.readouterr().out


def cells(text: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]


def refusal(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert report.main([str(word) for word in argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    return err


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    """Two tasks, two learning rates, three seeds; what differs with the task is no setting."""
    for task, base in (("SST2", 0.8), ("CB", 0.6)):
        for rate in (1e-3, 1e-4):
            for seed in (0, 1, 2):
                accuracy = base + 100 * rate + 0.01 * seed
                settings = {"learning_rate": rate, "seed": seed, "num_train": len(task)}
                written(tmp_path, f"{task}-{rate:g}-{seed}", accuracy, task=task, **settings)
    return tmp_path


def test_rows_are_settings_and_columns_tasks(
    grid: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = cells(printed(capsys, grid))
    assert table[0] == ["learning_rate", "CB", "SST2"]
    rows = {row[0]: row[1:] for row in table[2:]}
    assert rows == {
        "0.001": ["0.7100 ± 0.0100", "0.9100 ± 0.0100"],
        "0.0001": ["0.6200 ± 0.0100", "0.8200 ± 0.0100"],
    }
    assert "Mean ± standard deviation of 3 runs." in printed(capsys, grid)
    percent = cells(printed(capsys, grid, "--percent", "--also", "forward_passes", "dev_loss"))
    assert percent[0] == ["learning_rate", "CB", "SST2", "forward_passes", "dev_loss"]
    assert ["0.001", "71.0 ± 1.0", "91.0 ± 1.0", "60 ± 0"] in [row[:4] for row in percent]
    dev = cells(printed(capsys, grid, "--show", "dev_metric"))
    assert dev[2][1:] in (
        ["0.3550 ± 0.0050", "0.4550 ± 0.0050"],
        ["0.3100 ± 0.0050", "0.4100 ± 0.0050"],
    )


def test_columns_are_seeds_of_one_task(grid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted(grid.glob("SST2*"))
    table = cells(printed(capsys, *files, "--columns", "seed"))
    assert table[0] == ["learning_rate", "seed 0", "seed 1", "seed 2"]
    assert ["0.001", "0.9000", "0.9100", "0.9200"] in table
    said = refusal(capsys, grid, "--columns", "seed")
    assert "result files of different tasks (CB, SST2) in one column: give --columns task" in said


def test_other_formats_have_the_same_numbers(
    grid: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tex = printed(capsys, grid, "--format", "latex")
    assert "\\begin{tabular}{lrr}\n\\toprule\nlearning\\_rate & CB & SST2 \\\\\n\\midrule\n" in tex
    assert "0.001 & 0.7100 $\\pm$ 0.0100 & 0.9100 $\\pm$ 0.0100 \\\\\n" in tex
    file = tmp_path / "tables" / "table.csv"
    assert printed(capsys, grid, "--format", "csv", "--output", file) == ""
    rows = list(csv.DictReader(io.StringIO(file.read_text())))
    of_rate = next(row for row in rows if row["learning_rate"] == "0.001")
    assert float(of_rate["SST2"]) == pytest.approx(statistics.mean((0.9, 0.91, 0.92)))
    assert float(of_rate["SST2_std"]) == pytest.approx(0.01) and of_rate["runs"] == "6"


def test_settings_of_one_trainer_are_no_difference(tmp_path: Path) -> None:
    files = [
        written(tmp_path, "a", 0.5, trainer="zo", zo_eps=1e-3, model_name="m"),
        written(tmp_path, "b", 0.6, trainer="regular", optim="adamw", model_name="m"),
    ]
    loaded, _ = report.load(files)
    assert Table.of(loaded).names == ("trainer",)
    loaded, _ = report.load([*files, written(tmp_path, "c", 0.6, trainer="zo", zo_eps=1e-2)])
    assert Table.of(loaded).names == ("trainer", "zo_eps")


def test_several_sets_are_several_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, "sets", 0.5)
    result = json.loads(path.read_text())
    result["runs"] = [
        {"train_set_seed": seed, "metric": {"accuracy": value}}
        for seed, value in enumerate((0.2, 0.4))
    ]
    path.write_text(json.dumps(result))
    assert "| 0.3000 ± 0.1414 |" in printed(capsys, path)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["none.json"], "none.json: no such file or folder"),
        (["empty"], "empty: there is no result of a run in it"),
        (["other.json"], "other.json: this is no result of a run"),
        (["a.json", "--show", "f1"], "argument --show: invalid choice: 'f1'"),
        (["a.json", "--also", "backward_passes"], "none of the 1 results has backward_passes"),
        (["a.json", "twin.json"], "a.json and twin.json are of the same settings and seed"),
        (["a.json", "--plot", "a.txt"], "--plot a.txt: give a name that ends in .png"),
        (["a.json", "cb.json", "--plot", "a.png"], "--plot a.png: a picture shows one task"),
        (["bare.json", "--plot", "a.png"], "--plot a.png: no run has dev losses"),
        (["a.json", "--output", "empty"], "--output empty: this is a folder"),
    ],
)
def test_bad_input(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    argv: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.json").write_text('{"a": 1}')
    for name in ("a", "twin"):
        written(tmp_path, name, 0.5)
    written(tmp_path, "cb", 0.5, task="CB")
    bare = json.loads(written(tmp_path, "bare", 0.5).read_text())
    (tmp_path / "bare.json").write_text(json.dumps(bare | {"history": {}}))
    before = contents(tmp_path)
    assert said in refusal(capsys, *argv)
    assert contents(tmp_path) == before


def test_curves_are_means_over_seeds_at_the_same_step(grid: Path) -> None:
    loaded, _ = report.load(sorted(grid.glob("SST2*")))
    found = {curve.label: curve for curve in curves(loaded, "dev_loss", "seconds")}
    curve = found["learning_rate 0.001"]
    assert curve.runs == 3
    assert np.allclose(curve.widths, [1.0, 1.91]) and np.allclose(curve.means, [0.5, 0.09])
    assert np.allclose(curve.deviations, [0, 0.01])
    history = {"dev_loss": {"1": 0.5, "2": None}, "forward_passes": {"1": 5, "2": 10}}
    history["backward_passes"] = {"1": 5, "2": 10}
    only = Loaded(Path("a"), {"task": "SST2", "settings": {}, "history": history})
    (curve,) = curves([only], "dev_loss", "passes")
    assert curve.widths.tolist() == [15] and curve.label == "the runs"


def test_picture_and_table_of_a_running_sweep(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    runs = {}
    for seed in (0, 1, 2):
        place = {
            "output_dir": tmp_path / f"seed={seed}",
            "result_file": tmp_path / f"seed={seed}.json",
        }
        curve = {
            "num_dev": 4,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "max_steps": 2,
            "save_steps": 1,
        }
        argv = training(tmp_path, **place, **curve, seed=seed, no_eval=None)
        runs[f"seed={seed}"] = argv
        if seed < 2:
            assert run.main(argv) == 0
    # The second has saved checkpoints, and no result yet; the third has not begun.
    (tmp_path / "seed=1.json").unlink()
    (tmp_path / "sweep.json").write_text(json.dumps({"runs": runs, "choices": {}}))
    capsys.readouterr()
    assert report.main([str(tmp_path), "--plot", str(tmp_path / "a" / "b.svg")]) == 0
    out, err = capsys.readouterr()
    assert err == "2 runs have no result yet\n"
    assert cells(out)[0] == ["SST2"] and len(cells(out)) == 3
    picture = (tmp_path / "a" / "b.svg").read_text()
    assert picture.startswith("<?xml") and len(picture) > 10_000
    loaded, unfinished = report.load([tmp_path])
    assert unfinished == 2 and [each.is_finished for each in loaded] == [True, False]
    (curve,) = curves(loaded, "dev_loss", "passes")
    assert curve.runs == 2 and curve.widths.tolist() == [4, 7]
