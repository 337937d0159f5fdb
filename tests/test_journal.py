"""The journal: its lines, what damage does to it, and runs that resume from it."""

from __future__ import annotations

import json
import math
import os
import shutil
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from running import (
    assert_same_checkpoint,
    assert_same_tensors,
    contents,
    finish,
    flip_bit,
    training,
    weights,
)

import run
from training.journal import (
    JOURNAL,
    VERSION,
    Checksum,
    Group,
    Header,
    Journal,
    JournalFile,
    Row,
    Scale,
    Step,
    line_of,
    read_journal,
    row_of,
)
from training.objective_trainer import ObjectiveTrainer
from training.recording import Recording, checksum_of
from utils import InputError, NotWritten
from zeroth_order.config import HiZOOConfig

HEADER = Header(
    version=VERSION,
    noise=3,
    step=0,
    max_steps=9,
    start="0123456789abcdef",
    groups=(Group(0.1, ("weight",)), Group(0.0, ("bias",))),
    layerwise=False,
    optimizer=HiZOOConfig(lr="auto"),
    model={"name": "µ"},
    settings={"lora": True, "learning_rate": "auto", "seed": 1},
)
ROWS: list[Row] = [
    Scale(0, 1e-3),
    Step(0, 1e-6, ((0.7, 0.7001, 0.6999),), (1.0,), g=0.1, c=0.2, eta=1e-6),
    Step(1, 2e-6, ((0.1 + 0.2, 1e300),), (1.0,), g=5e-324),
    Step(2, 2e-6, ((0.5, 0.25), (1.5, 2.0)), (3.0, 7.0)),
    Step(3, 2e-6, ((math.inf, -math.inf, 1.0),), (1.0,)),
    Checksum(4, "fedcba9876543210"),
]


def written(path: Path, rows: list[Row] = ROWS, header: Header = HEADER) -> Journal:
    file = JournalFile(path, header)
    for row in rows:
        file.add(row)
    file.close()
    return read_journal(path)


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    """Losses of all sizes too, and those that are not finite; pandas reads them."""
    journal = written(tmp_path / JOURNAL)
    assert journal.header == HEADER and journal.rows == ROWS and journal.steps == 4
    assert journal.ends[-1] == (tmp_path / JOURNAL).stat().st_size
    table = pandas.read_json(tmp_path / JOURNAL, lines=True)
    steps = table[table.kind == "step"]
    assert steps.step.tolist() == [0, 1, 2, 3] and steps.g.tolist()[0] == pytest.approx(0.1)
    assert steps.losses.tolist()[3] == ["inf", "-inf", 1.0] or steps.losses.tolist()[3] == [
        ["inf", "-inf", 1.0]
    ]
    for line in (tmp_path / JOURNAL).read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
    nan = row_of(line_of(Step(0, 1.0, ((math.nan, 1.0),), (1.0,))))
    assert math.isnan(nan.losses[0][0]) and nan.losses[0][1] == 1.0
    sizes = 10.0 ** torch.randint(-300, 300, (1000,)).double()
    losses = (torch.randn(1000, dtype=torch.float64) * sizes).tolist()
    step = Step(7, 1e-6, (tuple(losses),), (1 / 3,))
    assert row_of(line_of(step)) == step


# Values that no run writes, each with a right checksum -> what the line says.
ODD_HEADERS: dict[str, tuple[dict[str, Any], str]] = {
    "text for a number": ({"noise": "3"}, "'3' is no int"),
    "a number for a yes": ({"layerwise": 1}, "1 is no bool"),
    "none for a text": ({"start": None}, "None is no str"),
    "no groups": ({"groups": []}, "must have parameters"),
    "groups of another kind": ({"groups": {}}, "is no tuple"),
    "a yes for a number": ({"step": True}, "True is no int"),
    "before the first step": ({"step": -1}, "step must be at least 0"),
    "decay": ({"groups": [{"weight_decay": -1, "parameters": ["a"]}]}, "weight_decay must"),
    "twice": ({"groups": [{"weight_decay": 0, "parameters": ["a"]}] * 2}, "each of them once"),
    "μ": ({"optimizer": {"eps": -1.0}}, "eps must be larger than 0"),
    "a huge number": ({"optimizer": {"lr": 10**400}}, "too large"),
}
STEP = {"step": 0, "lr": 1e-3, "losses": [[0.5, 0.25]], "weights": [1.0]}
ODD_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "no kind": ({"step": 0}, "'kind'"),
    "an unknown kind": ({"kind": "jump", "step": 0}, "'jump' is no kind of row"),
    "a kind that is a list": ({"kind": [], "step": 0}, "unhashable"),
    "a header": (json.loads(line_of(HEADER)), "a second header"),
    "a missing key": ({"kind": "step", "step": 0, "lr": 1.0}, "missing 2 required"),
    "a list for a number": ({"kind": "step"} | STEP | {"lr": [1.0]}, "[1.0] is no float"),
    "a number for a list": ({"kind": "step"} | STEP | {"losses": 0.5}, "0.5 is no tuple"),
    "text for a loss": ({"kind": "step"} | STEP | {"losses": [["a", 1]]}, "'a' is no float"),
    "one loss": ({"kind": "step"} | STEP | {"losses": [[0.5]]}, "fewer losses than 2"),
    "no losses": ({"kind": "step"} | STEP | {"losses": [], "weights": []}, "0 batches"),
    "a weight too many": ({"kind": "step"} | STEP | {"weights": [1, 2]}, "1 batches and 2 weights"),
    "a NaN learning rate": ({"kind": "step"} | STEP | {"lr": "nan"}, "lr must be at least 0"),
    "a bare NaN": ({"kind": "step"} | STEP | {"lr": math.nan}, "lr must be"),
    "a negative weight": ({"kind": "step"} | STEP | {"weights": [-1]}, "a weight must be"),
    "an infinite weight": ({"kind": "step"} | STEP | {"weights": ["inf"]}, "a weight must be"),
    "a huge number": ({"kind": "step"} | STEP | {"lr": 10**400}, "too large"),
    "a negative step": ({"kind": "step"} | STEP | {"step": -1}, "step -1 where 0 was due"),
    "half a step": ({"kind": "step"} | STEP | {"step": 0.5}, "0.5 is no int"),
    "a later step": ({"kind": "step"} | STEP | {"step": 2}, "step 2 where 0 was due"),
    "a far step": ({"kind": "step"} | STEP | {"step": 10**30}, "where 0 was due"),
    "μ of 0": ({"kind": "scale", "step": 0, "eps": 0}, "eps must be larger"),
    "late μ": ({"kind": "scale", "step": 1, "eps": 1}, "before the first"),
    "a checksum": ({"kind": "checksum", "step": 0, "checksum": 5}, "5 is no str"),
}


def test_odd_records_with_a_right_checksum_are_named(tmp_path: Path) -> None:
    """A value of another type, or an unknown field, is never taken from a file."""
    path, failures = tmp_path / JOURNAL, []
    values = json.loads(line_of(HEADER))
    for name, (changed, words) in ODD_HEADERS.items():
        path.write_bytes(line_of_values(values | changed))
        try:
            failures.append(f"{name}: {read_journal(path)}")
        except InputError as error:
            found = str(error).removeprefix(f"{path}: its header is damaged (")
            if words not in found or found == str(error):
                failures.append(f"{name}: {error}")
    for name, (row, words) in ODD_ROWS.items():
        path.write_bytes(line_of(HEADER) + line_of_values(row) + line_of(ROWS[1]))
        found = read_journal(path)
        if found.rows or not found.fault.startswith("line 2: ") or words not in found.fault:
            failures.append(f"{name}: {found.fault}")
    assert not failures
    optimizer = values["optimizer"] | {"trust_remote_code": True}
    assert row_of(line_of_values(values | {"optimizer": optimizer, "other": 1})) == HEADER


def line_of_values(values: dict[str, Any]) -> bytes:
    text = json.dumps({name: value for name, value in values.items() if name != "crc32"})
    return f'{text[:-1]}, "crc32": {zlib.crc32(text.encode())}}}\n'.encode()


def test_half_written_line_is_dropped_wherever_it_ends(tmp_path: Path) -> None:
    path = tmp_path / JOURNAL
    ends = written(path).ends
    content = path.read_bytes()
    for size in (*range(0, ends[0], 50), *range(ends[0] - 1, len(content), 3)):
        path.write_bytes(content[:size])
        journal, whole = read_journal(path), sum(end <= size for end in ends)
        assert (journal is None) == (whole == 0)
        if journal:
            assert journal.rows == ROWS[: whole - 1] and journal.ends == ends[:whole]
        if journal and size % 20 == 0:
            file = JournalFile(path, HEADER, journal.ends[-1])
            for row in ROWS[whole - 1 :]:
                file.add(row)
            file.close()
            assert read_journal(path).rows == ROWS, size


def test_flipped_bits_are_noticed_and_end_a_replay(tmp_path: Path) -> None:
    path = tmp_path / JOURNAL
    journal = written(path)
    content = path.read_bytes()
    for index, (start, end) in enumerate(zip(journal.ends, journal.ends[1:], strict=False)):
        for place in range(start, end, 3):
            flip_bit(path, place)
            found = read_journal(path)
            assert found.rows == ROWS[:index] and found.ends[-1] == start, place
            assert found.fault or place == len(content) - 1  # the last line is half written
            path.write_bytes(content)


def test_damaged_header_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / JOURNAL
    assert read_journal(path) is None
    begin = written(path).ends[0]
    content = path.read_bytes()
    for place in range(0, begin, 7):
        flip_bit(path, place)
        with pytest.raises(InputError, match=r"its header is damaged|no journal"):
            read_journal(path)
        path.write_bytes(content)
    path.write_bytes(line_of(replace(HEADER, version=1)) + content[begin:])
    with pytest.raises(InputError, match="journal version 1; this program reads version 3"):
        read_journal(path)
    path.write_bytes(b"something else\n")
    with pytest.raises(InputError, match="no journal"):
        read_journal(path)


def test_steps_behind_a_checkpoint(tmp_path: Path) -> None:
    journal = written(tmp_path / JOURNAL)
    assert (journal.after(0), journal.fault) == (ROWS, None)
    assert journal.after(2) == ROWS[3:] and journal.end_of(2) == journal.ends[3]
    # A checkpoint is written after the checksum of its step.
    assert journal.after(4) == [] and journal.end_of(4) == journal.ends[-1]
    later = written(tmp_path / "later", ROWS[3:], replace(HEADER, step=2))
    assert (later.after(2), later.steps) == (ROWS[3:], 4)
    recording = Recording(rows=ROWS)
    for kind, row in ((Step, ROWS[3]), (Checksum, None)):
        assert [recording.take(kind, 2) for _ in range(2)] == [row, None]
    # A missing step ends a journal, too.
    short = written(tmp_path / "short", [*ROWS[:3], *ROWS[4:]])
    assert (short.rows, short.fault) == (ROWS[:3], "line 5: step 3 where 2 was due")


def test_lines_are_written_from_the_first_step_on_and_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = JournalFile(tmp_path / JOURNAL, HEADER)
    file.add(ROWS[0])
    file.close()
    assert not (tmp_path / JOURNAL).exists()
    file = JournalFile(tmp_path / JOURNAL, HEADER)
    file.add(ROWS[1])
    write = os.write

    def write_half(descriptor: int, content: bytes) -> int:
        if len(content) < 10:
            raise OSError(28, "No space left on device")
        return write(descriptor, content[: len(content) // 2])

    with monkeypatch.context() as patched, pytest.raises(NotWritten, match="No space left"):
        patched.setattr(os, "write", write_half)
        file.add(ROWS[2])
    file.add(ROWS[2])
    assert read_journal(tmp_path / JOURNAL).rows == ROWS[1:3]

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(NotWritten, match="No space left"):
        patched.setattr(os, "fsync", fail)
        file.close()
    file.close()


def test_checksum_changes_with_every_bit_and_index() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        tensors = [torch.randn(70, 30).to(dtype), torch.randn(5).to(dtype)]
        whole = checksum_of(tensors)
        assert checksum_of([t.clone() for t in tensors]) == whole
        transposed = [tensors[0].T.contiguous(), tensors[1]]
        seen = {whole, checksum_of(tensors[::-1]), checksum_of(transposed)}
        for row, column in ((0, 0), (69, 29), (3, 7)):
            changed = tensors[0].clone()
            changed[row, column] = -changed[row, column]
            seen.add(checksum_of([changed, tensors[1]]))
        assert len(seen) == 6


# ---------------------------------------------------------------------------------------- runs

NO_CHECKPOINTS = {"save_strategy": "no", "save_steps": None, "save_on_interrupt": "False"}
PLAIN = {
    **{"num_dev": 8, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2},
    "logging_steps": 3,  # not before every checkpoint
}
PROBED = PLAIN | {"learning_rate": "auto", "zo_eps": "auto"}


@pytest.fixture
def forward_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps in which losses were computed."""
    steps: list[int] = []
    compute = ObjectiveTrainer.compute_loss

    def count(self: ObjectiveTrainer, *args: Any, **kwargs: Any) -> Any:
        steps.append(self.state.global_step)
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(ObjectiveTrainer, "compute_loss", count)
    return steps


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with dev losses, and a checkpoint after each second one."""
    folder = tmp_path_factory.mktemp("plain")
    finish(training(folder, **PLAIN))
    return folder


def test_probed_run_is_replayed_without_a_forward_pass(
    tmp_path: Path, forward_passes: list[int]
) -> None:
    whole, again = tmp_path / "whole", tmp_path / "again"
    finish(training(whole, **PROBED))
    (again / "out").mkdir(parents=True)
    shutil.copy(whole / "out" / JOURNAL, again / "out")
    forward_passes.clear()
    result = finish(training(again, **PROBED))
    assert set(forward_passes) == {2, 4, 6}  # dev losses alone
    assert result["resumed_from"] == str(again / "out" / JOURNAL)
    for step in (2, 4, 6):
        name = f"out/checkpoint-{step}"
        assert_same_checkpoint(whole / name, again / name)
    assert (again / "out" / JOURNAL).read_bytes() == (whole / "out" / JOURNAL).read_bytes()
    assert isinstance(read_journal(again / "out" / JOURNAL).rows[0], Scale)


def test_journal_shows_g_c_and_eta_of_every_step(plain: Path) -> None:
    steps = [row for row in read_journal(plain / "out" / JOURNAL).rows if isinstance(row, Step)]
    for step in steps:
        loss, higher, lower, *_ = step.losses[0]
        assert step.g == pytest.approx((higher - lower) / 2e-3, rel=1e-4)
        assert step.c == pytest.approx(abs(higher + lower - 2 * loss) / 2e-6, rel=1e-4)
        assert step.eta == step.lr == 1e-4


def cut_within(folder: Path, new: Path, kind: type[Row], step: int) -> list[Row]:
    """Copy a run's journal; the copy ends within the last row of a kind when so many are done."""
    journal = read_journal(folder / "out" / JOURNAL)
    (new / "out").mkdir(exist_ok=True, parents=True)
    shutil.copy(folder / "out" / JOURNAL, new / "out")
    rows = journal.rows
    index = max(i for i, r in enumerate(rows) if isinstance(r, kind) and r.step == step)
    os.truncate(new / "out" / JOURNAL, journal.ends[index + 1] - 1)
    return rows


def test_run_resumes_behind_its_last_line(
    plain: Path, tmp_path: Path, forward_passes: list[int]
) -> None:
    for checkpoint in (None, 2, 4):
        folder = tmp_path / f"from-{checkpoint}"
        rows = cut_within(plain, folder, Step, 4)
        if checkpoint:
            name = f"out/checkpoint-{checkpoint}"
            shutil.copytree(plain / name, folder / name)
        forward_passes.clear()
        finish(training(folder, **PLAIN))
        # Steps 4 and 5, and dev losses behind the checkpoint.
        evaluated = {2, 4, 6} if checkpoint is None else {4, 6} if checkpoint == 2 else {6}
        assert set(forward_passes) == {4, 5} | evaluated, folder
        assert_same_checkpoint(plain / "out/checkpoint-6", folder / "out/checkpoint-6")
        assert read_journal(folder / "out" / JOURNAL).rows == rows, folder


def course(result: dict[str, Any]) -> dict[str, Any]:
    """What a result says about the course of its run, but for the time that it took."""
    return {name: kept for name, kept in result["history"].items() if "seconds" not in name}


def end_in_step(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a run end between two forward passes, without a checkpoint."""
    compute, passes = ObjectiveTrainer.compute_loss, []

    def compute_or_end(self: ObjectiveTrainer, *args: Any, **kwargs: Any) -> Any:
        passes.append(self.state.global_step)
        if passes.count(step) == 2:
            raise KeyboardInterrupt
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(ObjectiveTrainer, "compute_loss", compute_or_end)


def test_run_without_checkpoints_loses_no_step(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    forward_passes: list[int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    arguments = NO_CHECKPOINTS | {"save_model": True, "lr_scheduler_type": "linear"}
    expected = finish(training(whole, **arguments))
    with monkeypatch.context() as patched:
        end_in_step(4, patched)
        assert run.main(training(parted, **arguments)) == 130
    forward_passes.clear()
    result = finish(training(parted, **arguments))
    file = parted / "out" / JOURNAL
    assert f"resuming from 4 steps of {file}" in capsys.readouterr().out.splitlines()
    assert set(forward_passes) == {4, 5} and result["resumed_from"] == str(file)
    assert course(result) == course(expected) and result["steps"] == 6
    assert_same_tensors(weights(whole / "out"), weights(parted / "out"))
    # The very same command makes the result of a finished run again, without a forward pass.
    forward_passes.clear()
    (parted / "result.json").unlink()
    assert course(finish(training(parted, **arguments))) == course(expected)
    assert forward_passes == []


def test_overwrite_resumes_an_unfinished_journal_and_begins_a_finished_one_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forward_passes: list[int]
) -> None:
    argv = training(tmp_path, **NO_CHECKPOINTS, overwrite_output_dir=True)
    with monkeypatch.context() as patched:
        end_in_step(4, patched)
        assert run.main(argv) == 130
    forward_passes.clear()
    assert finish(argv)["resumed_from"].endswith(JOURNAL) and 3 not in forward_passes
    content = (tmp_path / "out" / JOURNAL).read_bytes()
    assert finish(argv)["resumed_from"] is None and 0 in forward_passes
    assert (tmp_path / "out" / JOURNAL).read_bytes() == content


def test_journal_of_another_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = NO_CHECKPOINTS | {"max_steps": 2}
    finish(training(tmp_path, **few))
    (tmp_path / "result.json").unlink()
    file = tmp_path / "out" / JOURNAL
    content, journal = file.read_bytes(), read_journal(file)
    before = contents(tmp_path)

    def refused(words: str, **changed: Any) -> None:
        assert run.main(training(tmp_path, **few | changed)) == 2
        assert words in capsys.readouterr().err.splitlines()[-1]

    refused("comes from a run with --learning_rate 0.0001, not 0.001", learning_rate=1e-3)
    refused("has more than --max_steps 1", max_steps=1)
    refused("has more than --num_train_epochs 0.3", max_steps=None, num_train_epochs=0.3)
    assert contents(tmp_path) == before
    for changed, words in (
        ({"start": "0" * 16}, "begins with other weights"),
        ({"noise": 99}, "other noise"),
    ):
        header = line_of(replace(journal.header, **changed))
        file.write_bytes(header + content[journal.ends[0] :])
        refused(words)
        assert file.read_bytes() == header + content[journal.ends[0] :]
    file.write_bytes(content.replace(b'"layerwise"', b'"Layerwise"'))
    refused("its header is damaged (its checksum is wrong); give another --output_dir, or remove")
    assert file.read_bytes() == content.replace(b'"layerwise"', b'"Layerwise"')


def test_damaged_step_and_those_behind_it_are_computed_again(
    plain: Path, tmp_path: Path, forward_passes: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    journal = read_journal(plain / "out" / JOURNAL)
    rows = journal.rows
    third = next(i for i, r in enumerate(rows) if isinstance(r, Step) and r.step == 3)
    for name, computed in {"checkpoint-2": {3, 4, 5, 6}, "checkpoint-4": {4, 5, 6}}.items():
        folder = tmp_path / name
        shutil.copytree(plain / "out" / name, folder / "out" / name)
        shutil.copy(plain / "out" / JOURNAL, folder / "out")
        flip_bit(folder / "out" / JOURNAL, journal.ends[third] + 30)
        caplog.clear()
        forward_passes.clear()
        finish(training(folder, **PLAIN))
        assert set(forward_passes) == computed
        told = [line for line in caplog.messages if "is damaged after step 3" in line]
        assert len(told) == 1
        assert_same_checkpoint(plain / "out/checkpoint-6", folder / "out/checkpoint-6")


def test_named_checkpoint_is_resumed_without_the_journal(
    plain: Path, tmp_path: Path, forward_passes: list[int]
) -> None:
    shutil.copytree(plain / "out", tmp_path / "out")
    named = {"resume_from_checkpoint": tmp_path / "out/checkpoint-4"}
    finish(training(tmp_path, **PLAIN, **named))
    assert {4, 5} <= set(forward_passes)
    assert (tmp_path / "out" / JOURNAL).read_bytes() == (plain / "out" / JOURNAL).read_bytes()
    # A journal that begins behind the checkpoint is of no use to it.
    (tmp_path / "out" / JOURNAL).unlink()
    for step in (4, 2):
        named = {"resume_from_checkpoint": tmp_path / f"out/checkpoint-{step}"}
        finish(training(tmp_path, **PLAIN, **named))
        assert read_journal(tmp_path / "out" / JOURNAL).header.step == step
    (tmp_path / "result.json").unlink()
    argv = training(tmp_path, **PLAIN, resume_from_checkpoint="False")
    assert finish(argv)["resumed_from"] is None
    assert read_journal(tmp_path / "out" / JOURNAL).after(0)[0].step == 0
