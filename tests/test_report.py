"""Results as a table and a picture."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running import refused_line, training

import report
import run
from sweeps.curves import curves, draw
from sweeps.results import Outcome, differing_settings, shown


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
        "data": settings.pop("data", "0"),
        "settings": {"task_name": task, "seed": 0, "output_dir": name} | settings,
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(result))
    return path


def printed(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert report.main([str(word) for word in argv]) == 0
    return capsys.readouterr().out


def cells(text: str) -> list[list[str]]:
    lines = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line] for line in lines]


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
        "1e-3": ["**0.7100 ± 0.0100**", "**0.9100 ± 0.0100**"],
        "1e-4": ["0.6200 ± 0.0100", "0.8200 ± 0.0100"],
    }
    assert "Mean ± standard deviation of 3 runs." in printed(capsys, grid)
    percent = cells(printed(capsys, grid, "--percent", "--also", "forward_passes", "dev_loss"))
    also = [f"{task} {name}" for name in ("forward_passes", "dev_loss") for task in ("CB", "SST2")]
    assert percent[0] == ["learning_rate", "CB", "SST2", *also]
    assert ["1e-3", "**71.0 ± 1.0**", "**91.0 ± 1.0**", "60", "60"] in [row[:5] for row in percent]
    assert {row[0]: row[6] for row in percent[2:]}["1e-3"] == "**0.0900 ± 0.0100**"
    one = cells(printed(capsys, *grid.glob("CB*"), "--also", "dev_loss"))
    assert one[0] == ["learning_rate", "CB", "dev_loss"]
    dev = cells(printed(capsys, grid, "--show", "dev_metric"))
    assert ["1e-4", "0.3100 ± 0.0050", "0.4100 ± 0.0050"] in dev


def test_columns_are_seeds_of_one_task(grid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted(grid.glob("SST2*"))
    table = cells(printed(capsys, *files, "--columns", "seed"))
    assert table[0] == ["learning_rate", "seed 0", "seed 1", "seed 2"]
    assert ["1e-3", "**0.9000**", "**0.9100**", "**0.9200**"] in table
    said = refused_line([grid, "--columns", "seed"], capsys, grid, report.main)
    assert "result files of different tasks (CB, SST2) in one column: give --columns task" in said


def test_unfinished_settings_are_marked_and_never_best(
    grid: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rates, seeds, tasks = (1e-3, 1e-4, 1e-5), (0, 1, 2), ("SST2", "CB")
    recorded = {
        f"{task}-{rate:g}-{seed}": {
            "task": task,
            "settings": {"learning_rate": rate, "seed": seed, "num_train": len(task)},
        }
        for task, rate, seed in itertools.product(tasks, rates, seeds)
    }
    for seed in seeds:
        settings = {"learning_rate": 1e-5, "seed": seed, "num_train": 4}
        written(grid, f"SST2-1e-05-{seed}", 0.5, task="SST2", **settings)
    (grid / "sweep.json").write_text(json.dumps({"runs": recorded}))
    for gone in ("SST2-0.001-1", "SST2-0.001-2", "CB-0.001-0"):
        (grid / f"{gone}.json").unlink()
    table = cells(printed(capsys, grid, "--also", "forward_passes"))
    assert {row[0]: row[1:4] for row in table[2:]} == {
        "1e-3": ["0.7150 ± 0.0071 (n = 2)", "0.9000 (n = 1)", "60 (n = 2)"],
        "1e-4": ["0.6200 ± 0.0100", "**0.8200 ± 0.0100**", "60"],
        "1e-5": ["–", "0.5000", "–"],
    }
    tex = printed(capsys, grid, "--format", "latex")
    assert "1e-3 & 0.7150 $\\pm$ 0.0071 (n = 2) & 0.9000 (n = 1) \\\\\n" in tex
    for task in grid.glob("CB*"):
        task.unlink()
    of_task = {n: run for n, run in recorded.items() if n.startswith("SST2")}
    (grid / "sweep.json").write_text(json.dumps({"runs": of_task}))
    table = cells(printed(capsys, grid, "--columns", "seed", "--also", "dev_loss"))
    assert {row[0]: row[1:] for row in table[2:]} == {
        "1e-3": ["0.9000", "–", "–", "0.1000 (n = 1)"],
        "1e-4": ["**0.8100**", "**0.8200**", "**0.8300**", "**0.1800 ± 0.0100**"],
        "1e-5": ["0.5000"] * 4,
    }


def test_other_formats_have_the_same_numbers(
    grid: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tex = printed(capsys, grid, "--format", "latex")
    assert "\\begin{tabular}{lrr}\n\\toprule\nlearning\\_rate & CB & SST2 \\\\\n\\midrule\n" in tex
    assert "1e-4 & 0.6200 $\\pm$ 0.0100 & 0.8200 $\\pm$ 0.0100 \\\\\n" in tex
    assert "1e-3 & \\textbf{0.7100 $\\pm$ 0.0100} & " in tex
    file = tmp_path / "tables" / "table.csv"
    assert printed(capsys, grid, "--format", "csv", "--output", file) == ""
    rows = list(csv.DictReader(io.StringIO(file.read_text())))
    of_rate = next(row for row in rows if row["learning_rate"] == "1e-3")
    assert float(of_rate["SST2"]) == pytest.approx(statistics.mean((0.9, 0.91, 0.92)))
    assert float(of_rate["SST2_std"]) == pytest.approx(0.01) and of_rate["SST2_runs"] == "3"


# A setting, and how it is written in Markdown, LaTeX and CSV.
ESCAPED = (
    ("=cmd|' /C calc'!A0", r"=cmd\|' /C calc'!A0", r"=cmd\textbar{}' /C calc'!A0", "'=cmd|"),
    (
        "a\n^~\\{}",
        r"a\\n^~\\{}",
        r"\textasciicircum{}\textasciitilde{}\textbackslash{}\{\}",
        r"a\n^",
    ),
    ("*[<b>]", r"\*[\<b>]", r"{*}{[}\textless{}b\textgreater{}{]} & ", "*[<b>]"),
    ("_%&#$", "_%&#$", r"\_\%\&\#\$ & ", "_%&#$"),
    ("-1+1|cmd", "-1+1\\|cmd", r"-1+1\textbar{}cmd & ", "'-1+1|cmd"),
    (" @sum", " @sum", " @sum & ", "' @sum"),
    ("+tab\t", "+tab", r"+tab\textbackslash{}t", r"'+tab\t"),
    (-0.5, "-0.5", "-0.5 & ", "-0.5"),
    ("\x1b[31m", r"\\x1b[31m", r"x1b{[}31m", r"\x1b[31m"),
)


def test_text_is_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [
        written(tmp_path, f"{number}", 0.5, system_prompt=each[0])
        for number, each in enumerate(ESCAPED)
    ]
    markdown = printed(capsys, *files).splitlines()[2:]
    tex = printed(capsys, *files, "--format", "latex").splitlines()[4:]
    rows = list(csv.reader(io.StringIO(printed(capsys, *files, "--format", "csv"))))[1:]
    failures = [
        (setting, line, row, tex_line)
        for (setting, *expected), line, tex_line, row in zip(
            ESCAPED, markdown, tex, rows, strict=False
        )
        if not line.startswith(f"| {expected[0]}")
        or expected[1] not in tex_line
        or not row[0].startswith(expected[2])
    ]
    assert not failures


def test_a_file_that_is_there_is_not_written_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path, "a", 0.5)
    (tmp_path / "sweep.json").write_text("{}")
    (tmp_path / "notes.md").write_text("mine")
    for option, name, more, said in (
        ("--output", "a.json", ["--overwrite"], "this is a result"),
        ("--plot", "sweep.json", ["--overwrite"], "this is a result"),
        ("--output", "notes.md", [], "is there: give another name, or --overwrite"),
        ("--plot", "notes.md", [], "is there: give another name, or --overwrite"),
    ):
        line = refused_line(["a.json", option, name, *more], capsys, tmp_path, report.main)
        assert said in line and line.startswith(f"{option} {name}")
    printed(capsys, "a.json", "--output", "notes.md", "--overwrite")
    assert (tmp_path / "notes.md").read_text().startswith("| SST2   |")


def test_models_have_short_names_where_these_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("org/opt-1.3b", "/models/Smol.Q4_1.gguf", "tuned/")
    files = [written(tmp_path, str(n), 0.5, model_name=name) for n, name in enumerate(names)]
    shown = printed(capsys, *files)
    assert [row[0] for row in cells(shown)[2:]] == ["opt-1.3b", "Smol.Q4_1", "tuned"]
    lines = [line for line in shown.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1  # columns stand below each other
    files += [written(tmp_path, "3", 0.5, model_name="other/tuned")]
    assert [row[0] for row in cells(printed(capsys, *files))[2:]] == [*names, "other/tuned"]


def test_settings_are_shown_as_given_where_they_differ(tmp_path: Path) -> None:
    values = {
        1e-3: "1e-3",
        0.05: "0.05",
        1e-05: "1e-5",
        float("inf"): "inf",
        2.5e-8: "2.5e-8",
        5.0: "5",
        None: "–",
    }
    assert {value: shown(value) for value in values} == values
    # What only one trainer has is no difference.
    files = [
        written(tmp_path, "a", 0.5, trainer="zo", zo_eps=1e-3, model_name="m"),
        written(tmp_path, "b", 0.6, trainer="regular", optim="adamw", model_name="m"),
    ]
    assert differing_settings(report.load(files)) == ("trainer",)
    files.append(written(tmp_path, "c", 0.6, trainer="zo", zo_eps=1e-2))
    assert differing_settings(report.load(files)) == ("trainer", "zo_eps")


def test_other_data_and_other_seeds_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [written(tmp_path, n, 0.5, train_file=f"{n}/films.csv", seed=1) for n in "ab"]
    assert cells(printed(capsys, *files))[0] == ["SST2 a/films.csv", "SST2 b/films.csv"]
    files = [written(tmp_path, n, 0.5, train_file="films.csv", data=n, seed=1) for n in "ab"]
    assert cells(printed(capsys, *files))[0] == ["SST2 a", "SST2 b"]
    files = [written(tmp_path, f"s{n}", 0.5, seed=n, train_set_seed=0) for n in (0, 1)]
    table = cells(printed(capsys, *files, "--columns", "seed"))
    assert table[0] == ["seed 0", "seed 1, train_set_seed 0"]


def test_a_task_may_be_named_like_a_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [written(tmp_path, n, 0.25 * i, task=n) for i, n in enumerate(("seconds", "CB"), 1)]
    table = cells(printed(capsys, *files, "--show", "seconds"))
    assert (table[0], table[2]) == (["seconds", "CB"], ["25", "50"])


ODD = {
    "no_settings": {"task": "SST2"},
    "no_task": {"settings": {}},
    "a_list": [1],
    "metric_is_text": {"metric": "good", "history": []},
    "metric_is_nan": {"metric": {"accuracy": float("nan")}},
    "metric_is_huge": {"metric": {"accuracy": 10**400}},
    "metric_of_text": {"metric": {"accuracy": "0.5"}, "dev_metric": {}},
    "runs_of_text": {"runs": ["a", 1]},
    "odd_history": {"history": {"dev_loss": {"x": 1, "1": "a", "2": True}, "seconds": 3}},
    "odd_settings": {"settings": {"learning_rate": [1, {"a": 2}], "seed": {"a": 1}}},
    "no_utf_8": {"settings": {"\ud800": 1, "\x1b[31m": "\ud800"}},
}
NO_JSON = {"cut": '{"task": "SST2", "settings": {', "deep": "[" * 100_000, "empty": "", "nul": "\0"}


def test_odd_results_end_in_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = json.loads(written(tmp_path, "good", 0.75, learning_rate=0.5, seed=50).read_text())
    for name, text in NO_JSON.items():
        (tmp_path / f"{name}.json").write_text(text)
    os.mkfifo(tmp_path / "pipe.json")
    for n, (name, content) in enumerate(ODD.items()):
        if isinstance(content, dict) and not name.startswith("no_"):
            settings = {"learning_rate": 0.5, "seed": n} | content.get("settings", {})
            content = good | content | {"settings": settings}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert report.main([str(tmp_path), "--plot", str(tmp_path / "a.png")]) == 0
    out, err = capsys.readouterr()
    left_out = {Path(line.split(": ")[0]).stem for line in err.splitlines()}
    assert left_out == {*NO_JSON, "pipe", "a_list"}
    table = cells(out)
    # A mean over some of a setting's runs would mislead: that cell is empty.
    assert table == [
        ["learning_rate", "SST2"],
        ["-" * 13, "-" * 6],
        ["0.5", "–"],
        ["[1, {'a': 2}]", "0.7500"],
    ]
    # A sweep's record is read, and nothing in it is imported.
    evil = tmp_path / "evil.py"
    evil.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    words = ["--reward", f"{evil}:f", "--trust_remote_code"]
    run = {"words": words, "task": 5, "settings": {"reward": f"{evil}:f", "seed": 9}}
    (tmp_path / "sweep.json").write_text(
        json.dumps({"runs": {"x": run, "y": [], "../z": run, "a" * 300: run, "b\0": run}})
    )
    assert report.main([str(tmp_path)]) == 0
    assert "1 runs have no result yet" in capsys.readouterr().err
    assert refused_line([tmp_path / "pipe.json"], capsys, None, report.main).endswith("of a run")
    assert not (tmp_path / "ran").exists()


def test_dev_loss_is_that_of_the_reported_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, "best", 0.25, load_best_model_at_end=True)
    result = json.loads(path.read_text())
    for checkpoint, loss in (("out/checkpoint-20", "0.7500"), (None, "0.5000")):
        path.write_text(json.dumps(result | {"checkpoint": checkpoint}))
        assert f"| {loss} " in printed(capsys, path, "--show", "dev_loss"), checkpoint


def test_several_sets_are_several_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, "sets", 0.5)
    result = json.loads(path.read_text())
    result["runs"] = [
        {"train_set_seed": seed, "metric": {"accuracy": value}}
        for seed, value in enumerate((0.2, 0.4))
    ]
    path.write_text(json.dumps(result))
    assert "| 0.3000 ± 0.1414 |" in printed(capsys, path)


BAD_INPUT = (
    ("none.json", "none.json: no such file or folder"),
    ("n" * 300, f"{'n' * 300}: File name too long; give another place"),
    ("empty", "empty: there is no result of a run in it"),
    ("other.json", "other.json: this is no result of a run"),
    ("a.json --show f1", "--show: invalid choice: 'f1'"),
    ("a.json --also backward_passes", "none of the 1 results has backward_passes"),
    ("a.json twin.json", "a.json and twin.json have the same settings and seed"),
    ("a.json --plot a.txt", "--plot a.txt: give a name that ends in .png"),
    ("a.json cb.json --plot a.png", "--plot a.png: a picture shows one task"),
    ("bare.json --plot a.png", "--plot a.png: no run has dev losses"),
    ("a.json --output b.svg --plot ./b.svg", "--output b.svg --plot b.svg: the same file"),
    ("a.json --output empty", "--output empty: this is a folder"),
)


def test_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.json").write_text('{"a": 1}')
    for name in ("a", "twin"):
        written(tmp_path, name, 0.5)
    written(tmp_path, "cb", 0.5, task="CB")
    bare = json.loads(written(tmp_path, "bare", 0.5).read_text())
    (tmp_path / "bare.json").write_text(json.dumps(bare | {"history": {}}))
    for argv, said in BAD_INPUT:
        assert refused_line(argv.split(), capsys, tmp_path, report.main).startswith(said)


def test_curves_are_means_over_seeds_at_the_same_step(grid: Path) -> None:
    outcomes = report.load(sorted(grid.glob("SST2*")))
    curve = curves(outcomes, "dev_loss", "seconds")["learning rate 1e-3"]
    assert (curve["runs"] == 3).all()
    assert np.allclose(curve["width"], [1.0, 1.91]) and np.allclose(curve["mean"], [0.5, 0.09])
    assert np.allclose(curve["low"], [0.5, 0.08]) and np.allclose(curve["high"], [0.5, 0.1])
    history = {"dev_loss": {"1": 0.5, "2": None}, "forward_passes": {"1": 5, "2": 10}}
    history["backward_passes"] = {"1": 5, "2": 10}
    only = Outcome.of(Path("a"), {"task": "SST2", "settings": {}, "history": history})
    ((label, curve),) = curves([only], "dev_loss", "passes").items()
    assert curve["width"].tolist() == [15] and label == "the runs"


def test_lines_beyond_ten_have_styles_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    figures: list[Any] = []
    monkeypatch.setattr("sweeps.curves.save_figure", lambda figure, path: figures.append(figure))
    files = [written(tmp_path, f"{n}", 0.5, learning_rate=n) for n in range(12)]
    draw(report.load(files), tmp_path / "a.png")
    for panel in figures[0].axes:
        assert len({(line.get_color(), line.get_linestyle()) for line in panel.lines}) == 12


def test_folders_of_slurm_and_of_checkpoints_hold_no_results(tmp_path: Path) -> None:
    folders = ("slurm", "slurm-cb", "checkpoint-5", "checkpoint-best", "a/slurm", "a/checkpoint-10")
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
        written(tmp_path / folder, "a", 0.5)
    found = {f"{each.path.parent.relative_to(tmp_path)}" for each in report.load([tmp_path])}
    assert found == {"slurm-cb", "checkpoint-best"}


def test_lines_have_the_names_that_people_say(tmp_path: Path) -> None:
    files = [
        written(tmp_path, kind, 0.5, hessian_smooth_type=kind)
        for kind in ("constant0", "constant1e-8")
    ]
    assert list(curves(report.load(files), "dev_loss", "passes")) == ["MeZO", "HiZOO, α 1e-8"]


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
        if seed < 2:
            assert run.main(argv) == 0
            result = json.loads((tmp_path / f"seed={seed}.json").read_text())
        runs[f"seed={seed}"] = {
            "task": "SST2",
            "metric": "accuracy",
            "settings": result["settings"] | {"seed": seed},
        }
    # The second has saved checkpoints, and no result yet; the third has not begun.
    (tmp_path / "seed=1.json").unlink()
    (tmp_path / "sweep.json").write_text(json.dumps({"runs": runs}))
    capsys.readouterr()
    assert report.main([str(tmp_path), "--plot", str(tmp_path / "a" / "b.svg")]) == 0
    out, err = capsys.readouterr()
    assert err == "2 runs have no result yet\n"
    assert cells(out)[0] == ["SST2"] and len(cells(out)) == 3
    picture = (tmp_path / "a" / "b.svg").read_text()
    assert picture.startswith("<?xml") and len(picture) > 10_000
    # As a shell finds the files.
    (tmp_path / "slurm.json").write_text("{}")
    assert printed(capsys, *tmp_path.glob("*.json")) == out
    outcomes = report.load([tmp_path])
    assert [each.is_finished for each in outcomes] == [True, False, False]
    (curve,) = curves(outcomes, "dev_loss", "passes").values()
    assert (curve["runs"] == 2).all() and curve["width"].tolist() == [4, 7]
