"""README and docs say what the code does: their lines run, their tables agree with the code."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import re
import runpy
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from running import MODEL, ROOT, SAMPLES, command

import replay
import report
import run
import sweep
import tasks
import templates
from command_line.arguments import check, parse_arguments
from command_line.contradictions import check_values
from command_line.reading import read_values
from command_line.settings import name_run, settle_dtype
from tasks import TASKS
from utils import InputError

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.name: page.read_text(encoding="utf-8") for page in PAGES}

# Stands in for Python: notes what it is called with. What the scripts ask of Python is answered.
NOTES_ITS_ARGUMENTS = f"""#!/bin/sh
case "$1" in -c) exec "{sys.executable}" "$@" ;; esac
exec "{sys.executable}" -c '
import json, os, sys
with open("calls.jsonl", "a") as calls:
    calls.write(json.dumps([sys.argv[1:], dict(os.environ)]) + chr(10))' "$@"
"""


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", TEXTS[page], re.DOTALL | re.MULTILINE)


def rows_of(page: str, heading: str) -> dict[str, list[str]]:
    """The cells of the table behind a heading, by what its first cell names in backticks."""
    section = re.split(rf"^#+ {re.escape(heading)}$", TEXTS[page], flags=re.MULTILINE)[1]
    table = re.search(r"(?:^\|.*\n)+", section, flags=re.MULTILINE)[0]
    cells = [line.strip("|").split(" | ") for line in table.splitlines()[2:]]
    return {row[0].strip(" `"): [cell.strip() for cell in row[1:]] for row in cells}


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: the repository's files, and no results."""
    for path in ROOT.iterdir():
        if path.name != "result" and not path.name.startswith("."):
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def calls_of(block: str, folder: Path) -> list[list[str]]:
    """Run a block; returns the arguments of every call of Python in it, a script's written out."""
    commands = folder / "commands"
    commands.mkdir(exist_ok=True)
    # Slurm's srun starts a command on a job's nodes.
    for name, script in {"python": NOTES_ITS_ARGUMENTS, "srun": '#!/bin/sh\nexec "$@"\n'}.items():
        (commands / name).write_text(script)
        (commands / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    lines = (folder / "calls.jsonl").read_text().splitlines()
    (folder / "calls.jsonl").unlink()
    return [written_out(*json.loads(line)) for line in lines]


def written_out(call: list[str], environment: dict[str, str]) -> list[str]:
    """The call of a script with what its variables and defaults say as arguments."""
    if call[1:2] != ["--script"]:
        return call
    words = read_values(call[1:], environment).words
    return [call[0], *(word for name, each in words.items() for word in (f"--{name}", *each))]


def shortened(argv: list[str]) -> list[str]:
    """The same run on the bundled model, with few steps and examples."""
    values = dict(itertools.pairwise(argv))
    short = {} if "--predict_file" in argv else {"num_eval": "6"}
    if not Path(values["--model_name"]).exists():  # of the Hub, or of whoever reads
        short |= {"model_name": str(MODEL), "data_dir": str(SAMPLES)}
    if values.get("--task_name", "").lower() in ("squad", "drop"):
        short |= {"max_new_tokens": "4"}
    if "--train_file" not in values and int(values.get("--num_train", 0)) > 24:
        short |= {"num_train": "24"}
    if values.get("--trainer", "none") != "none" and "--linear_probing" not in argv:
        short |= {"max_steps": "2"}
        if values.get("--learning_rate") == "auto":  # test_scripts.py runs it, with its probe
            short |= {"learning_rate": "1e-4"}
        if values.get("--zo_eps") == "auto":
            short |= {"per_device_train_batch_size": "4"}
        if "--train_file" not in values and "--num_dev" in values:
            short |= {"num_dev": "8"}
        evaluates = values.get("--evaluation_strategy", values.get("--eval_strategy"))
        if evaluates == "steps":
            short |= {"eval_steps": "1"}
        if evaluates == "steps" and values.get("--save_strategy") == "steps":
            short |= {"save_steps": "1"}
    return argv + [word for name, value in short.items() for word in (f"--{name}", value)]


def run_shortened(argv: list[str], checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Run run.py with few steps, and look at what it leaves."""
    argv = shortened(argv)
    assert run.main(argv) == 0, argv
    if "--predict_file" in argv:
        assert capsys.readouterr().out.splitlines()[-1].startswith("predictions: ")
        return
    result = json.loads(Path(capsys.readouterr().out.splitlines()[-1][8:]).read_text())
    assert all(0 <= value <= 1 or name == "reward" for name, value in result["metric"].items())
    if "--save_model" in argv and "--merge_adapter" not in argv:
        assert list(checkout.rglob("result/**/adapter_model.safetensors"))
    if "--load_best_model_at_end" in argv:
        adapted = "--lora" in argv or "--prefix_tuning" in argv
        file = "adapter_model.safetensors" if adapted else "model.safetensors"
        assert file in os.listdir(result["checkpoint"])


def accept(call: list[str], checkout: Path) -> None:
    """Have a documented call of Python read, and checked, by the command that it starts."""
    if call[0] == "-m":  # an example, which tests/test_examples.py runs
        assert (ROOT / call[1].replace(".", "/")).with_suffix(".py").is_file()
        return
    name, argv = Path(call[0]).name, call[1:]
    if name == "report.py":  # reads what a sweep has left
        report.make_parser().parse_args(argv)
    elif name == "replay.py":
        replay.parser().parse_args(argv)
    elif name == "sweep.py":
        _, grid = sweep.read_command_line(argv)
        assert len(sweep.Sweep(grid, checkout / "result").runs) > 1
    elif name in ("run.py", "probe.py"):
        argv = argv[: argv.index("--plot")] if "--plot" in argv else argv
        if "--fsdp" in argv:  # needs GPUs
            check_values(read_values(argv))
        else:
            check(parse_arguments(argv))


RUN = {"README.md", "own-data.md"}


@pytest.mark.parametrize("page", [page for page in TEXTS if blocks(page, "bash")])
def test_every_command_line_is_accepted(
    page: str, checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of README and own-data.md run, with few steps and examples."""
    failures = []
    for block in blocks(page, "bash"):
        try:
            calls = calls_of(block, checkout)
            # Every line that starts something has called Python once.
            starts = re.findall(r"\b(?:python|bash)\b (?:-m \S+|\S+\.(?:py|sh))", block)
            assert len(calls) == len(starts) > 0
            for call in calls:
                if page in RUN:
                    run_shortened(call[1:], checkout, capsys)
                else:
                    accept(call, checkout)
        except (AssertionError, InputError) as error:
            failures.append((block, error))
    assert not failures


# Lines of one letter's variables stand for several, those that end in --help print it, and those
# before a dagger need an earlier commit.
COMMAND = r"`((?:[A-Z_]+=\S{2,} )*(?:bash \w+\.sh|python run\.py)\b[^`…]*)`(?! †)"


def test_every_command_within_a_text_is_accepted(checkout: Path) -> None:
    failures = []
    for line in sorted({line for text in TEXTS.values() for line in re.findall(COMMAND, text)}):
        if "--help" not in line:
            try:
                ((script, *argv),) = calls_of(line, checkout)
                assert Path(script).name == "run.py"
                check(parse_arguments(argv))
            except (AssertionError, InputError) as error:
                failures.append((line, error))
    assert not failures


def test_every_python_block_runs(checkout: Path) -> None:
    printed = io.StringIO()
    for page in ("README.md", "optimizer.md"):
        namespace: dict[str, Any] = vars(templates).copy()
        for block in blocks(page, "python"):
            with contextlib.redirect_stdout(printed):
                exec(compile(block, page, "exec"), namespace)
        assert namespace["loss"] > 0, page
    losses = [float(line.split()[-1]) for line in printed.getvalue().splitlines()]
    shown = TEXTS["optimizer.md"].split("It prints\n\n```text\n")[1].split("```")[0]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.1 * losses[0]
    # Another processor rounds differently; the course is the same.
    expected = [float(line.split()[-1]) for line in shown.splitlines()]
    assert all(abs(a - b) < 0.05 * b for a, b in zip(losses, expected, strict=True))


def test_the_trainer_of_its_page_runs(checkout: Path) -> None:
    (block,), namespace = blocks("trl.md", "python"), {}
    exec(compile(block, "trl.md", "exec"), namespace)
    assert sum("curvature" in row for row in namespace["trainer"].state.log_history) == 3


def test_a_task_is_added_as_its_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    template, entry = blocks("tasks.md", "python")
    namespace = vars(templates).copy()
    exec(compile(template, "tasks.md", "exec"), namespace)
    name = "RottenTomatoes"
    monkeypatch.setattr(templates, name, namespace[name], raising=False)
    task = eval(entry, vars(tasks))
    monkeypatch.setitem(TASKS, task.name, task)
    folder = tmp_path / task.name.lower()
    folder.mkdir()
    rows = [{"text": "A warm and funny film.", "label": 1}, {"text": "Dull.", "label": 0}]
    for split in ("train", "validation"):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines)
    argv = command(task.name.lower(), data_dir=tmp_path, num_eval=None, verbose=True)
    assert run.main([*argv, "--result_file", str(tmp_path / "result.json")]) == 0
    printed = capsys.readouterr().out
    assert "A warm and funny film. It was" in printed and "(2 examples)" in printed


def test_every_block_runs_or_says_that_it_does_not() -> None:
    """A command line in a block of another language than bash is not run by any test."""
    languages = {
        language
        for text in TEXTS.values()
        for language in re.findall(r"^```([^\n]*)\n.*?^```$", text, re.DOTALL | re.MULTILINE)
    }
    assert languages == {"bash", "python", "text", "json", "bibtex"}
    commands = r"^(?:\w+=\S+ )*(?:bash|python|torchrun|srun|pip|make) .*"
    not_run = [
        line
        for page in TEXTS
        for block in blocks(page, "text")
        for line in re.findall(commands, block, re.MULTILINE)
    ]
    assert not_run == ["pip install git+<address of this repository>"]


def test_readme_takes_five_minutes() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= 130
    assert TEXTS["README.md"].count("![") == 1


def test_table_of_results_has_the_measured_numbers() -> None:
    runs = json.loads((ROOT / "benchmarks" / "demo_curves.json").read_text())
    for method, cells in rows_of("results.md", "The bundled model").items():
        of_method = [run for run in runs if run["method"] == method]
        assert len(of_method) == 3
        for step, cell in zip(("100", "200", "400"), cells[2:5], strict=True):
            losses = [run["dev_loss"][step] for run in of_method]
            error = statistics.stdev(losses) / len(losses) ** 0.5
            spread = f" ± {error:.3f}" if error >= 0.0005 else ""
            assert cell.strip("*") == f"{statistics.mean(losses):.3f}{spread}"
        for name, cell in (("zero_shot", cells[1]), ("accuracy", cells[5])):
            assert {f"{run[name]:.3f}" for run in of_method} == {cell}
        assert cells[0].startswith(f"{400 * of_method[0]['passes_a_step']:,}")


def test_table_of_the_real_model_has_the_measured_numbers() -> None:
    names = ("smollm2_sst2", "broadcast_smollm2_sst2", "broadcast_smollm2_sst2_rates")
    files = [ROOT / "runs" / f"{name}.json" for name in names]
    first, *others = (json.loads(file.read_text())["runs"] for file in files)
    rows, runs = rows_of("README.md", "Results"), sum(others, first)
    shown = {row[0].strip("`") for row in rows.values()}
    assert {run["method"] for run in first} < shown < {run["method"] for run in runs} | {"–"}
    for method, passes, *cells in rows.values():
        chosen = "curvature" if method == "–" else method.strip("`")
        curves = [run["curve"] for run in runs if run["method"] == chosen]
        reached = [row for curve in curves for row in curve if str(row["passes"]) == passes]
        assert len(reached) == 3
        for key, cell in zip(("loss", "accuracy"), cells, strict=True):
            values = [row[key] for row in reached]
            error = statistics.stdev(values) / len(values) ** 0.5
            assert cell.strip("*") == f"{statistics.mean(values):.3f} ± {error:.3f}"


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    lines = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


def test_links_lead_somewhere() -> None:
    for page in [*PAGES, *(ROOT / "docs" / "log").glob("*.md")]:
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                file, _, anchor = target.partition("#")
                there = page.parent / file if file else page
                assert there.exists(), (page.name, target)
                assert not anchor or anchor in headings(there), (page.name, target)


def test_help_of_a_script_is_in_its_page() -> None:
    shown = blocks("scripts.md", "text")
    missing = []
    for script in {*ROOT.glob("*.sh")} - {ROOT / "settings.sh"}:
        done = subprocess.run(
            ["bash", str(script), "--help"], capture_output=True, text=True, check=True
        )
        missing += [] if done.stdout in shown else [script.name]
    assert not missing


def test_task_table_has_the_prompts_of_the_templates() -> None:
    rows = rows_of("tasks.md", "The eleven tasks, and adding one")
    assert set(rows) == set(TASKS)
    for task in TASKS.values():
        prompt, options, metric, hub = rows[task.name]
        assert metric == task.metric_name
        assert task.hub_path in hub and (task.hub_config or "") in hub
        columns = task.template.columns + task.more_text_columns
        values = {column: f"{{{column}}}" for column in columns}
        if task.name == "Copa":
            values["question"] = "effect"
        written = task.template.prompt(values).replace("\n", "\\n")
        if task.name == "BoolQ":
            written = written.replace("{Question}", "{question}")
        assert f"`{written}`" in prompt, task.name
        for label, word in task.template.labels.items():
            assert f"`{word}` ({label})" in options, task.name


def test_both_commands_exist_and_ci_runs_the_second() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("demo", "test"):
        assert f"**`make {target}`**" in TEXTS["README.md"]
        assert f"\n{target}:" in makefile
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_demo_is_called_as_readme_shows(checkout: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (line,) = re.findall(r"bash HiZOO\.sh.*", makefile)
    ((_, *argv),) = calls_of(line, checkout)
    arguments = parse_arguments(argv)
    settle_dtype(arguments)
    name_run(arguments)
    shown = blocks("README.md", "text")[0]
    assert f"checkpoint: {arguments.output_dir}/checkpoint-150\n" in shown
    assert f"result: {arguments.result_path}\n" in shown


def test_every_room_is_in_the_table_of_rooms() -> None:
    text = TEXTS["architecture.md"]
    files = {path.name for kind in ("*.py", "*.sh") for path in ROOT.glob(kind)}
    folders = {path.parent.name + "/" for path in ROOT.glob("*/*.py")}
    assert {name for name in files | folders if f"`{name}`" not in text} == set()


def test_page_of_models_has_every_family_and_path() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_models.py"))
    rows = rows_of("models.md", "Models that were tried")
    assert [*rows] == made["FAMILIES"]
    assert f"| family | {' | '.join(made['PATHS'])} |" in TEXTS["models.md"]
    assert {cell for cells in rows.values() for cell in cells} == {"yes", "–"}


@pytest.mark.slow
def test_page_of_models_is_what_its_script_finds(tmp_path: Path) -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_models.py"))
    assert made["make_page"]() == TEXTS["models.md"], "run: python docs/make_models.py"


def test_table_of_memory_is_by_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    made = runpy.run_path(str(ROOT / "benchmarks" / "memory.py"))
    shapes = made["SHAPES"]
    for shape in [*shapes][1:]:
        del shapes[shape]
    for dtype in (torch.bfloat16, torch.float32):
        assert f"{made['formula_table'](dtype)}\n" in TEXTS["memory.md"], dtype


def test_results_are_short() -> None:
    assert (ROOT / "docs" / "results.md").stat().st_size <= 10 * 1024


def test_faults_of_the_mutants_are_faults_of_the_code() -> None:
    faults = runpy.run_path(str(ROOT / "tests" / "by_hand" / "mutants.py"))["FAULTS"]
    counts = {fault.name: (ROOT / fault.file).read_text().count(fault.right) for fault in faults}
    assert set(counts.values()) == {1}, counts
