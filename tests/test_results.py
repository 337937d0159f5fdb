"""Results: never computed twice nor written over in silence, and what they say about a run."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from running import (
    ROOT,
    SAMPLES,
    command,
    contents,
    finish,
    refused_line,
    small_model,
    training,
)

import run
from command_line.arguments import parse_arguments
from command_line.settings import name_run
from experiment import preparation
from experiment.folders import locked
from experiment.options import options_of
from experiment.preparation import load_pretrained, prepare
from experiment.results import commit, history, over_sets
from experiment.resuming import find_start, with_contents
from experiment.telling import concerns
from trainer import ZerothOrderTrainer
from training.resumable_trainer import Costs

SHORT = {"max_steps": 2, "num_train": 4, "per_device_train_batch_size": 2}


def run_again(
    argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """Run to the end without loading a model; return what is printed."""
    capsys.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr(preparation, "load_pretrained", None)
        assert run.main(argv) == 0
    return capsys.readouterr().out


def test_result_that_is_there_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for trained in (False, True):
        folder = tmp_path / str(trained)
        folder.mkdir()
        monkeypatch.chdir(folder)
        capsys.readouterr()
        more = {**SHORT, "no_eval": None, "output_dir": "", "result_file": None, "save_steps": 1}
        argv = training(folder, **more) if trained else command()
        assert run.main(argv) == 0
        lines = capsys.readouterr().out.splitlines()
        (path,) = Path("result").glob("*.json")
        before, written = json.loads(path.read_text()), contents(folder)
        shown = run_again(argv, monkeypatch, capsys).splitlines()
        assert shown[0] == (
            "these settings have a result already (--overwrite_output_dir makes it anew)"
        )
        assert sum(line.startswith(shown[-2]) for line in lines) == 1 and shown[-1] == lines[-1]
        assert contents(folder) == written
        # Files that are asked for later are written, from what is there.
        assert run.main([*argv, "--predictions_file", "rows.jsonl"]) == 0
        assert len(Path("rows.jsonl").read_text().splitlines()) == 6
        after = json.loads(path.read_text())
        assert after["metric"] == before["metric"]
        if trained:
            # Without the time that writing the last checkpoint took.
            assert after["train_seconds"] > before["train_seconds"] / 2
            assert after["resumed_from"] and after["history"] == before["history"]
        assert run.main([*argv, "--overwrite_output_dir"]) == 0
        anew = json.loads(path.read_text())
        assert anew["metric"] == before["metric"] and not anew.get("resumed_from")


def test_other_results_and_predictions_in_the_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "result.json"
    argv = command(result_file=file)
    finish(argv)
    for other, part in (
        (command(result_file=file, num_eval=2), f"{file} is of a run with --num_eval 6, not 2: "),
        (
            command(result_file=file, load_float16=True, num_eval=2),
            "with --load_float16 False, not True: ",
        ),
        (training(tmp_path, **SHORT), "with --trainer none, not zo: "),
    ):
        line = refused_line(other, capsys, tmp_path)
        assert part in line and "give another place (--result_file, " in line
    for text in ("", "[]", '{"experiment": "1"}', '{"settings": {}}'):
        file.write_text(text)
        assert f"{file} is no result of a run: " in refused_line(argv, capsys, tmp_path)
    finish([*argv, "--overwrite_output_dir"])
    rows = tmp_path / "rows.jsonl"
    rows.write_text("mine")
    more = command(result_file=tmp_path / "new.json", predictions_file=rows)
    assert f"--predictions_file {rows}" in refused_line(more, capsys, tmp_path)
    assert rows.read_text() == "mine"


def test_runs_of_another_length(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A longer run resumes, and is told where its schedule has another course; no shorter one."""
    linear = {"lr_scheduler_type": "linear"}
    in_journal = {"save_strategy": "no", "save_steps": None}
    broadcast = {"trainer": "broadcast", "learning_rate": None}
    for name, (schedule, told) in {
        "none": ({}, ""),
        "journal": ({**in_journal}, ""),
        "rate": (linear, "--lr_scheduler_type linear depends"),
        "rate in a journal": (linear | in_journal, "--lr_scheduler_type linear depends"),
        "warmup": ({"warmup_steps": 0.5}, "--warmup_steps 0.5 depends"),
        "AdamW": ({"trainer": "regular", **linear}, "--lr_scheduler_type linear depends"),
        "κ": ({**broadcast, "lr_scheduler_type": "constant"}, "--broadcast_rate auto depends"),
        "both": ({**broadcast, **linear}, "type linear, --broadcast_rate auto depend on"),
        "a given κ": (
            {**broadcast, "lr_scheduler_type": "constant", "broadcast_rate": 1},
            "",
        ),
    }.items():
        folder, caplog_before = tmp_path / name, len(caplog.messages)
        more = SHORT | {"save_steps": 1} | schedule
        finish(training(folder, **more))
        shorter = training(folder, **more | {"max_steps": 1})
        assert "--max_steps 2, not 1: " in refused_line(shorter, capsys, folder)
        longer = finish(training(folder, **more | {"max_steps": 3}))
        assert longer["steps"] == 3 and longer["resumed_from"], name
        lines = [m for m in caplog.messages[caplog_before:] if "depend" in m]
        assert len(lines) == bool(told) and all(told in line for line in lines), name
        for line in lines:
            assert line.startswith("--"), name
            assert f"{folder}/out/" in line, name
            assert "a run with --max_steps 3 from its start" in line, name


def test_what_was_trained_on_counts_by_its_content(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data, reward = tmp_path / "model", tmp_path / "data", tmp_path / "reward.py"
    shutil.copytree(small_model().name, model)
    for task in ("sst2", "squad"):
        shutil.copytree(SAMPLES / task, data / task)
    reward.write_text("def short(prompts, texts, rows):\n    return [-len(t) for t in texts]\n")
    given = {"model_name": model, "data_dir": data}
    generated = {"train_as_classification": None, "max_new_tokens": 2}
    runs = {
        "checkpoint": ("SST2", {"trainer": "regular"}),
        "adapter": ("SST2", {"lora": True}),
        "journal": ("SST2", {"prefix_tuning": True, "save_strategy": "no", "save_steps": None}),
        "reward": ("SQuAD", {"reward": f"{reward}:short", **generated}),
    }

    def argv(name: str, **changed: Any) -> list[str]:
        task, more = runs[name]
        return training(tmp_path / name, task, **SHORT | given | more | changed)

    for name in runs:
        finish(argv(name))
        (tmp_path / name / "result.json").unlink()
    both = ("SST2", "SQuAD")
    lowercase = rb'\1{"type": "Lowercase"}'
    failures = []
    for file, old, new, words, tasks in (
        (data / "sst2/train.jsonl", b'("sentence": ")', rb"\1Now ", "other examples", both[:1]),
        (data / "squad/train.jsonl", b'("question": ")', rb"\1Now ", "other examples", both[1:]),
        (model / "model.safetensors", b"(?s).{4}$", b"1234", "other weights", both),
        (model / "tokenizer.json", b'("normalizer": )null', lowercase, "other tokens", both),
        (reward, b"-len", b"len", "other rewards", both[1:]),
    ):
        content = file.read_bytes()
        file.write_bytes(re.sub(old, new, content))
        assert file.read_bytes() != content
        for name in (name for name, (task, _) in runs.items() if task in tasks):
            line = refused_line(argv(name, max_steps=3), capsys, tmp_path)
            if words not in line or "give another --output_dir, or --overwrite_output" not in line:
                failures.append((name, line))
        file.write_bytes(content)
    assert not failures
    # Only their content counts.
    model.rename(tmp_path / "elsewhere")
    data.rename(tmp_path / "rows")
    for name in runs:
        moved = {"model_name": tmp_path / "elsewhere", "data_dir": tmp_path / "rows"}
        assert finish(argv(name, max_steps=3, **moved))["resumed_from"], name
    rows = [{"prompt": f"{n}?", "options": ["no", "yes"], "answer": n % 2} for n in range(9)]
    own = {"task_name": None, "data_dir": None}
    for name, steps in {"first": 1, "second": 2}.items():
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = {"train_file": file, "validation_file": file}
        result = finish(training(tmp_path / "own", **SHORT | own | files | {"max_steps": steps}))
        assert bool(result["resumed_from"]) == (name == "second")


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Ctrl-C arrive during a step."""
    training_step = ZerothOrderTrainer.training_step

    def interrupted_step(self: ZerothOrderTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step - 1:
            signal.raise_signal(signal.SIGINT)
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(ZerothOrderTrainer, "training_step", interrupted_step)


def test_overwriting_goes_on_with_what_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = training(tmp_path, **SHORT | {"max_steps": 3}, overwrite_output_dir=True)
    for resumed in (False, True):
        # The second time a finished run and its result lie there.
        with monkeypatch.context() as patched:
            stop_after(2, patched)
            assert run.main(argv) == 130
        assert capsys.readouterr().err.splitlines()[-1] == (
            f"interrupted: SIGINT: stopped after step 2, checkpoint in "
            f"{tmp_path}/out/checkpoint-2; the same command resumes there"
        )
        assert not (tmp_path / "out/.lock").exists()
        assert (tmp_path / "result.json").exists() is resumed
        result = finish(argv)
        assert result["resumed_from"] == str(tmp_path / "out/checkpoint-2")
        assert list(result["history"]["loss"]) == ["1", "2", "3"]
    # A finished run begins anew; so does one with other settings, or of another length.
    last = tmp_path / "out/checkpoint-3"

    def found(has_result: bool = False, **changed: Any) -> Path | None:
        few = SHORT | {"max_steps": 3} | changed
        arguments = parse_arguments(training(tmp_path, **few, overwrite_output_dir=True))
        name_run(arguments)
        options = options_of(arguments)
        (encoder, (examples,)), model = prepare(options), load_pretrained(options.model)
        options = with_contents(options, encoder, examples, model)
        steps = arguments.max_steps
        return find_start(options, tmp_path / "out", has_result, steps).checkpoint

    assert found() == last
    assert found(has_result=True) is found(learning_rate=1e-5) is found(max_steps=4) is None
    # A damaged one is passed over, for the one before it.
    (last / "optimizer.pt").write_bytes(b"damaged")
    assert found() == tmp_path / "out/checkpoint-2"


def test_interrupt_that_saves_nothing_has_its_own_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_after(2, monkeypatch)
    more = {"save_on_interrupt": "False", "save_strategy": "no", "save_steps": None}
    assert run.main(training(tmp_path, **SHORT, **more)) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"
    assert set(contents(tmp_path)) == {"out", "out/journal.jsonl"}


def test_bad_input_during_preparation_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    too_small = training(tmp_path, **SHORT, zo_eps=1e-30)
    assert "--zo_eps" in refused_line(too_small, capsys, tmp_path)
    finish(training(tmp_path, **SHORT, save_steps=2))
    (tmp_path / "result.json").unlink()
    written = contents(tmp_path / "out")
    capsys.readouterr()
    assert run.main([*too_small, "--overwrite_output_dir"]) == 2
    assert contents(tmp_path / "out") == written
    refused = training(tmp_path, **SHORT, max_length=9999, output_dir=tmp_path / "new")
    assert "--max_length 9999" in refused_line(refused, capsys, tmp_path)


def test_places_in_use_are_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"predictions_file": tmp_path / "rows.jsonl", "no_eval": None}
    places = {"output_dir": "out", "result_file": "result.json", "predictions_file": "rows.jsonl"}
    with contextlib.ExitStack() as stack:
        for option, name in places.items():
            stack.enter_context(locked(f"--{option}", tmp_path / name, option == "output_dir"))
        line = refused_line(training(tmp_path, **SHORT, **more), capsys, tmp_path)
        for option, name in places.items():
            assert f"--{option} {tmp_path / name} is used by process {os.getpid()} on " in line
    assert contents(tmp_path) == {}


def test_result_says_what_was_used_and_keeps_the_losses(tmp_path: Path) -> None:
    curve = {"eval_strategy": "steps", "eval_steps": 2, "num_dev": 4, "save_strategy": "no"}
    curve |= {"num_train": 5000, "save_steps": None, "no_eval": None}
    argv = training(tmp_path, **SHORT | curve)
    result = finish(argv)
    assert result["settings"]["num_train"] == 1596 and result["settings"]["num_dev"] == 4
    assert result["settings"]["num_eval"] == 6 and result["settings"]["max_length"] == 1024
    assert result["settings"]["zo_perturbation"] == "inplace"
    losses = result["history"]
    assert list(losses["loss"]) == ["1", "2"] and list(losses["dev_loss"]) == ["2"]
    assert all(0 < loss < 5 for kind in ("loss", "dev_loss") for loss in losses[kind].values())
    assert losses["forward_passes"] == {"1": 4, "2": 7} and result["forward_passes"] == 7
    assert 0 < losses["seconds"]["1"] <= losses["seconds"]["2"] <= result["train_seconds"]
    assert 50 < result["peak_memory_mib"] < 8000 and result["device"]
    assert result["commit"] == commit(ROOT)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["journal.jsonl"]


def test_commit_of_a_folder(tmp_path: Path) -> None:
    assert commit(tmp_path) is None

    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(
            ["git", "-C", tmp_path, *who, *words], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    git("init", "-q")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-q", "-m", "a")
    assert commit(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "b").touch()  # no file of the repository
    assert commit(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "a").write_text("2")
    assert commit(tmp_path) == git("rev-parse", "HEAD") + "+"
    (tmp_path / "inside").mkdir()
    assert commit(tmp_path / "inside") is None


def test_result_says_what_auto_came_to_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (
        {"load_float16": True},
        {"load_bfloat16": True, "hessian_smooth_type": "constant0"},
    ):
        folder = tmp_path / str(len(arguments))
        settings = finish(training(folder, **SHORT, zo_eps=1e-2, **arguments))["settings"]
        assert settings["zo_perturbation"] == "layerwise"
        # It is not what tells another experiment apart.
        other = training(folder, **SHORT, zo_eps=1e-1, **arguments)
        assert "--zo_eps 0.01, not 0.1: " in refused_line(other, capsys, folder)
    # A finished run that is only loaded says the same.
    argv = training(tmp_path / "probed", **SHORT, zo_eps="auto")
    first = finish(argv)
    (tmp_path / "probed/result.json").unlink()
    again = finish(argv)
    assert again["resumed_from"] and again["probe"] == first["probe"] is not None
    assert again["settings"] == first["settings"] and again["settings"]["zo_perturbation"] != "auto"


def test_mean_and_deviation_of_several_sets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = {"num_eval": 8, "num_train": 2, "num_train_sets": 3}
    rows = tmp_path / "rows.jsonl"
    result = finish(command(**few, result_file=tmp_path / "r.json", predictions_file=rows))
    values = [one["metric"]["accuracy"] for one in result["runs"]]
    mean = sum(values) / 3
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / 2)
    assert result["metric"] == {"accuracy": pytest.approx(mean)}
    assert result["metric_std"] == {"accuracy": pytest.approx(deviation)}
    assert capsys.readouterr().out.splitlines()[-2] == (
        f"in-context accuracy: {mean:.4f} (mean of 3 sets, standard deviation {deviation:.4f})"
    )
    assert result["settings"]["num_train"] == 2
    assert sorted(path.name for path in tmp_path.glob("rows*")) == [
        f"rows-set{seed}.jsonl" for seed in range(3)
    ]
    # Of several metrics each has its own.
    runs = [{"metric": {"f1": f1, "em": 0.5}, "dev_metric": {"f1": 1.0}} for f1 in (0.2, 0.4)]
    assert over_sets(runs) == {
        "dev_metric": {"f1": 1.0},
        "dev_metric_std": {"f1": 0.0},
        "metric": {"f1": pytest.approx(0.3), "em": 0.5},
        "metric_std": {"f1": pytest.approx(0.1 * math.sqrt(2)), "em": 0.0},
    }


CONCERNS = {
    "diverged": ({"dev_loss": {"1": 0.7, "2": 8.7e10}}, {}, ["from 0.7 to 8.7e+10"]),
    "not finite": ({"loss": {"1": 0.7, "2": None}, "dev_loss": {}}, {}, ["is not finite"]),
    "learned": ({"loss": {"1": 0.7, "2": 0.4}}, {}, []),
    "noise": ({"loss": {"1": 0.01, "2": 0.7}, "dev_loss": {}}, {}, []),
    "dev loss counts": ({"loss": {"1": 0.1, "2": 9}, "dev_loss": {"1": 0.7, "2": 0.6}}, {}, []),
    "one loss": ({"loss": {"1": 0.7}, "dev_loss": {}}, {}, []),
    "a metric that grows": ({"loss": {"1": -0.5, "2": -0.1}}, {}, []),
    "harm": ({}, {"metric_before_training": {"f1": 0.7}, "metric": {"f1": 0.6}}, ["0.7000"]),
    "help": ({}, {"metric_before_training": {"f1": 0.7}, "metric": {"f1": 0.7}}, []),
}


def test_history_and_concerns(monkeypatch: pytest.MonkeyPatch) -> None:
    # What is done once, in the first step, is no part of the time that is left.
    monkeypatch.setattr("time.perf_counter", iter((0.0, 1.0, 60.0, 60.0, 61.0, 62.0)).__next__)
    costs = Costs()
    costs.begin_step()
    costs.end_step()
    assert "seconds_per_step" not in costs.logged()
    costs.begin_step()
    costs.end_step()
    assert costs.logged()["seconds_per_step"] == 1.0
    monkeypatch.undo()
    log = [{"loss": 0.5, "step": 1}, {"eval_loss": math.inf, "step": 1}, {"loss": 0.4, "step": 2}]
    expected = {"loss": {"1": 0.5, "2": 0.4}, "dev_loss": {"1": None}}
    assert history([*log, {"train_runtime": 3.0, "step": 2}]) == expected
    for name, (losses, metrics, parts) in CONCERNS.items():
        lines = list(concerns({"history": losses, **metrics}))
        assert len(lines) == len(parts), name
        for line, part in zip(lines, parts, strict=True):
            assert line.startswith("warning: ") and part in line and "--learning_rate" in line, name
    (line,) = concerns({"history": {"loss": {"1": 0.7, "2": None}}}, "broadcast_rate")
    assert line.endswith("lower --broadcast_rate")


def test_diverged_run_says_so_and_no_json_holds_nan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finish(training(tmp_path, **SHORT | {"save_steps": 2}, learning_rate=1e30))
    *_, concern, last = capsys.readouterr().out.splitlines()
    assert "the last loss is not finite" in concern and last == f"result: {tmp_path}/result.json"
    files = [path for path in tmp_path.rglob("*") if path.suffix in (".json", ".jsonl")]
    assert len(files) > 3
    for text in "\n".join(path.read_text() for path in files).splitlines():
        assert not re.search(r"\bNaN\b|\bInfinity\b", text)
