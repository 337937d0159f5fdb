"""The journal: its format, what damage does to it, and runs that go on from it."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

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
    FILE,
    Checksum,
    Estimate,
    Evaluation,
    Journal,
    JournalFile,
    Record,
    Settings,
    Step,
    decode,
    encode,
    read_journal,
)
from training.objective_trainer import ObjectiveTrainer
from training.recording import Replay, checksum_of
from utils import InputError, NotWritten

HEADER = {"first_step": 0, "rate": 1e-6, "smoothing": 1e-8, "settings": {}, "max_steps": 9}
SINGLE = [float(torch.tensor(value)) for value in (0.7, 0.7001, 0.6999)]


def one_batch(step: int, *losses: float, **settings: float) -> Step:
    return Step(step, (Estimate(tuple((loss,) for loss in losses)),), **settings)


RECORDS = [
    Settings(0, {"eps": 1e-3, "curvature_eps": None}),
    one_batch(0, *SINGLE, rate=1e-6, smoothing=1e-8),
    one_batch(1, *SINGLE, rate=1e-6, smoothing=1e-8),
    Evaluation(2, {"eval_loss": 0.123456789, "eval_f1": math.inf}),
    one_batch(2, 0.1, 0.2, rate=2e-6, smoothing=1e-8),  # none of float32
    Step(
        3,
        (Estimate(((0.5, 0.25), (1.5, 2.0)), 3.0), Estimate(((0.125, 8.0), (0.5, 1.0)), 7.0)),
        2e-6,
        0.0,
    ),
    one_batch(4, math.inf, -math.inf, 1e300, rate=2e-6, smoothing=0.0),
    Checksum(5, 2**64 - 1),
]


def written(path: Path, records: list[Record], header: dict[str, Any] = HEADER) -> Journal:
    file = JournalFile(path, header)
    for record in records:
        file.add(record)
    file.close()
    return read_journal(path)


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    journal = written(tmp_path / FILE, RECORDS)
    assert journal.segments == [RECORDS]
    assert journal.header == HEADER and journal.steps == 5 and journal.damaged == 0
    assert journal.ends[0][-1] == (tmp_path / FILE).stat().st_size


def test_losses_that_are_not_finite_come_back() -> None:
    step, _ = decode(encode(one_batch(0, math.nan, math.inf, 1.0)), 0)
    (nan,), *others = step.estimates[0].passes
    assert math.isnan(nan) and others == [(math.inf,), (1.0,)]


@pytest.mark.parametrize(
    ("losses", "changed", "size"),
    [
        (2, {}, 20),  # MeZO
        (3, {}, 24),  # HiZOO
        (3, {"rate": 2e-6}, 32),  # a learning rate that changes from step to step
        (3, {"rate": 2e-6, "smoothing": 2e-8}, 40),
        (5, {"rate": 2e-6, "smoothing": 2e-8}, 48),  # c has a μ of its own
    ],
)
def test_bytes_of_a_step(losses: int, changed: dict[str, float], size: int) -> None:
    before = one_batch(6, *SINGLE, rate=1e-6, smoothing=1e-8)
    step = one_batch(
        7, *SINGLE[:2], *SINGLE[: losses - 2], **{"rate": 1e-6, "smoothing": 1e-8} | changed
    )
    assert len(encode(step, before)) == size <= 48


def test_20000_steps_of_opt_13b_are_less_than_half_a_megabyte(tmp_path: Path) -> None:
    hidden, layers = 5120, 40
    shapes = {"embed_tokens": [50272, hidden], "embed_positions": [2050, hidden]}
    for layer in range(layers):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes[f"layers.{layer}.self_attn.{name}.weight"] = [hidden, hidden]
            shapes[f"layers.{layer}.self_attn.{name}.bias"] = [hidden]
        for name, shape in {"fc1": [4 * hidden, hidden], "fc2": [hidden, 4 * hidden]}.items():
            shapes[f"layers.{layer}.{name}.weight"] = shape
            shapes[f"layers.{layer}.{name}.bias"] = shape[:1]
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            shapes[f"layers.{layer}.{name}.weight"] = [hidden]
            shapes[f"layers.{layer}.{name}.bias"] = [hidden]
    parameters = {f"model.decoder.{name}": ["float16", *shape] for name, shape in shapes.items()}
    assert 12.8e9 < sum(math.prod(shape) for shape in shapes.values()) < 13e9
    groups = [{"parameters": [*parameters]}]
    header = HEADER | {"parameters": parameters, "optimizer": {"groups": groups}}
    noise = torch.randn(20_000, 3).tolist()
    steps = [one_batch(i, *noise[i], rate=1e-6, smoothing=1e-8) for i in range(20_000)]
    journal = written(tmp_path / FILE, steps, header)
    assert journal.segments[0] == steps
    assert (tmp_path / FILE).stat().st_size < 500_000


def test_half_written_record_is_cut_off_wherever_it_ends(tmp_path: Path) -> None:
    path = tmp_path / FILE
    ends = written(path, RECORDS).ends[0]
    content = path.read_bytes()
    for size in (0, 1, 17, 40, *range(read_journal(path).begin - 1, len(content))):
        path.write_bytes(content[:size])
        journal = read_journal(path)
        whole = sum(end <= size for end in ends)
        if journal is None:
            assert size < ends[0] and not whole
            continue
        assert journal.segments == [RECORDS[:whole]], size
        if size % 40:
            continue
        file = JournalFile(path, {}, ends[whole - 1] if whole else journal.begin)
        for record in RECORDS[whole:]:
            file.add(record)
        file.close()
        assert read_journal(path).segments == [RECORDS], size


def test_flipped_bits_are_noticed_and_what_follows_is_found(tmp_path: Path) -> None:
    path = tmp_path / FILE
    journal = written(path, RECORDS)
    content, ends = path.read_bytes(), [journal.begin, *journal.ends[0]]
    for index in range(len(RECORDS)):
        for place in range(ends[index], ends[index + 1]):
            harmed = bytearray(content)
            harmed[place] ^= 1 << place % 8
            path.write_bytes(harmed)
            found = read_journal(path)
            assert found.segments[0] == RECORDS[:index], place
            others = [record for segment in found.segments[1:] for record in segment]
            assert [type(r) for r in others] == [type(r) for r in RECORDS[index + 1 :]], place
            if others:
                assert found.damaged == ends[index + 1] - ends[index]


def test_steps_behind_a_checkpoint(tmp_path: Path) -> None:
    journal = written(tmp_path / FILE, RECORDS)
    assert journal.after(0) == (RECORDS, journal.ends[0][-1])
    assert journal.after(2) == (RECORDS[4:], journal.ends[0][-1])
    # What a checkpoint after step 2 holds, its dev loss, stays before it.
    assert journal.end_of(2) == journal.ends[0][3]
    assert journal.after(5) == ([], journal.ends[0][-1])
    content = bytearray((tmp_path / FILE).read_bytes())
    content[journal.ends[0][4] + 9] ^= 1
    (tmp_path / FILE).write_bytes(content)
    harmed = read_journal(tmp_path / FILE)
    assert harmed.after(0)[0] == RECORDS[:5] and harmed.after(2)[0] == RECORDS[4:5]
    assert harmed.after(3) == ([], journal.ends[0][4])
    assert [record.step for record in harmed.after(4)[0]] == [4, 5]


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / FILE
    assert read_journal(path) is None
    path.write_bytes(b"something else, which is not ours")
    with pytest.raises(InputError, match="is no journal"):
        read_journal(path)
    written(path, RECORDS)
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="its header is damaged"):
        read_journal(path)


def test_nothing_is_written_before_the_first_step(tmp_path: Path) -> None:
    file = JournalFile(tmp_path / FILE, HEADER)
    file.add(RECORDS[0])
    file.close()
    assert not (tmp_path / FILE).exists()


def test_full_disk_leaves_whole_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = JournalFile(tmp_path / FILE, HEADER)
    file.add(RECORDS[1])
    write = os.write

    def write_half(descriptor: int, content: bytes) -> int:
        if len(content) < 10:
            raise OSError(28, "No space left on device")
        return write(descriptor, content[: len(content) // 2])

    with monkeypatch.context() as patched, pytest.raises(NotWritten, match="No space left"):
        patched.setattr(os, "write", write_half)
        file.add(RECORDS[2])
    file.add(RECORDS[2])
    assert read_journal(tmp_path / FILE).segments == [RECORDS[1:3]]


def test_records_of_a_replay_are_taken_in_order() -> None:
    replay = Replay(RECORDS)
    assert replay.steps == 5
    assert replay.take(Step, 1) is None  # not before step 0
    assert replay.take(Settings, 0) == RECORDS[0] and replay.take(Settings, 0) is None
    assert replay.take(Step, 0) == RECORDS[1]
    assert replay.take(Step, 1) == RECORDS[2]
    assert replay.take(Evaluation, 2) == RECORDS[3]
    assert replay.take(Checksum, 2) is None
    assert [replay.take(Step, step) for step in (2, 3, 4, 5)] == [*RECORDS[4:7], None]
    assert replay.take(Checksum, 5) == RECORDS[7]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_checksum_changes_with_every_bit_and_place(dtype: torch.dtype) -> None:
    tensors = [torch.randn(70, 30).to(dtype), torch.randn(5).to(dtype)]
    whole = checksum_of(tensors)
    assert 0 <= whole < 2**64 and checksum_of([t.clone() for t in tensors]) == whole
    seen = {whole, checksum_of(tensors[::-1]), checksum_of([tensors[0].T.contiguous(), tensors[1]])}
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
def probed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with probes and dev losses, and a checkpoint after each second one."""
    folder = tmp_path_factory.mktemp("probed")
    finish(training(folder, **PROBED))
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without probes."""
    folder = tmp_path_factory.mktemp("plain")
    finish(training(folder, **PLAIN))
    return folder


def test_run_with_probes_and_dev_losses_is_replayed(
    probed: Path, tmp_path: Path, forward_passes: list[int]
) -> None:
    (tmp_path / "out").mkdir()
    shutil.copy(probed / "out" / FILE, tmp_path / "out")
    result = finish(training(tmp_path, **PROBED))
    assert forward_passes == []
    assert result["resumed_from"] == str(tmp_path / "out" / FILE)
    for step in (2, 4, 6):
        name = f"out/checkpoint-{step}"
        assert_same_checkpoint(probed / name, tmp_path / name)
    assert (tmp_path / "out" / FILE).read_bytes() == (probed / "out" / FILE).read_bytes()


def cut_within(folder: Path, new: Path, kind: type[Record], step: int) -> Journal:
    """Copy a run's journal; the copy ends within the last record of a kind when so many are done.

    Returns the whole journal.
    """
    journal = read_journal(folder / "out" / FILE)
    (records,), (ends,) = journal.segments, journal.ends
    (new / "out").mkdir(exist_ok=True, parents=True)
    shutil.copy(folder / "out" / FILE, new / "out")
    index = max(i for i, r in enumerate(records) if isinstance(r, kind) and r.step == step)
    os.truncate(new / "out" / FILE, ends[index] - 1)
    return journal


@pytest.mark.parametrize("checkpoint", [None, 2, 4])
@pytest.mark.parametrize("kind", [Evaluation, Step])
def test_run_goes_on_behind_its_last_record(
    plain: Path,
    tmp_path: Path,
    checkpoint: int | None,
    kind: type[Record],
    forward_passes: list[int],
) -> None:
    journal = cut_within(plain, tmp_path, kind, 4)
    if checkpoint:
        name = f"out/checkpoint-{checkpoint}"
        shutil.copytree(plain / name, tmp_path / name)
    finish(training(tmp_path, **PLAIN))
    assert set(forward_passes) == {4, 5, 6}
    assert_same_checkpoint(plain / "out/checkpoint-6", tmp_path / "out/checkpoint-6")
    if kind is Step or checkpoint != 4:  # which holds its dev loss
        assert read_journal(tmp_path / "out" / FILE).segments == journal.segments


def told(result: dict[str, Any]) -> dict[str, Any]:
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
    file = parted / "out" / FILE
    assert f"going on from 4 steps of {file}" in capsys.readouterr().out.splitlines()
    assert set(forward_passes) == {4, 5} and result["resumed_from"] == str(file)
    assert told(result) == told(expected) and result["steps"] == 6
    assert_same_tensors(weights(whole / "out"), weights(parted / "out"))
    # The very same command makes the result of a finished run again, without a forward pass.
    forward_passes.clear()
    (parted / "result.json").unlink()
    assert told(finish(training(parted, **arguments))) == told(expected)
    assert forward_passes == []


def test_unfinished_journal_goes_on_with_overwrite_and_a_finished_one_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forward_passes: list[int]
) -> None:
    argv = training(tmp_path, **NO_CHECKPOINTS, overwrite_output_dir=True)
    with monkeypatch.context() as patched:
        end_in_step(4, patched)
        assert run.main(argv) == 130
    forward_passes.clear()
    assert finish(argv)["resumed_from"].endswith(FILE) and 3 not in forward_passes
    content = (tmp_path / "out" / FILE).read_bytes()
    assert finish(argv)["resumed_from"] is None and 0 in forward_passes
    assert (tmp_path / "out" / FILE).read_bytes() == content


def test_journal_of_another_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = NO_CHECKPOINTS | {"max_steps": 2}
    finish(training(tmp_path, **few))
    (tmp_path / "result.json").unlink()
    written_before = contents(tmp_path)
    for changed, words in (
        (
            {"learning_rate": 1e-3},
            "comes from a run with --learning_rate 0.0001, not 0.001",
        ),
        ({"max_steps": 1}, "has more than --max_steps 1"),
    ):
        assert run.main(training(tmp_path, **few | changed)) == 2
        assert f"{FILE} {words}" in capsys.readouterr().err.splitlines()[-1]
        assert contents(tmp_path) == written_before
    # The same settings, and other weights to begin with.
    from test_families import save_model

    model = save_model("gpt2", tmp_path / "model")
    other = tmp_path / "model" / Path(training(tmp_path)[3]).name
    model_dir = Path(model)
    other.mkdir()
    for file in [path for path in model_dir.iterdir() if path.is_file()]:
        shutil.move(file, other)
    assert run.main(training(tmp_path, **few, model_name=other)) == 2
    assert "begins with other weights" in capsys.readouterr().err.splitlines()[-1]


def test_damaged_step_and_those_behind_it_are_computed_again(
    plain: Path, tmp_path: Path, forward_passes: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    journal = read_journal(plain / "out" / FILE)
    (records,), (ends,) = journal.segments, journal.ends
    third = next(i for i, r in enumerate(records) if isinstance(r, Step) and r.step == 3)
    for name, computed in {"checkpoint-2": {3, 4, 5, 6}, "checkpoint-4": set()}.items():
        folder = tmp_path / name
        shutil.copytree(plain / "out" / name, folder / "out" / name)
        shutil.copy(plain / "out" / FILE, folder / "out")
        flip_bit(folder / "out" / FILE, ends[third] - 6)
        caplog.clear()
        forward_passes.clear()
        finish(training(folder, **PLAIN))
        assert set(forward_passes) == computed
        assert len([line for line in caplog.messages if "is damaged" in line]) == bool(computed)
        assert_same_checkpoint(plain / "out/checkpoint-6", folder / "out/checkpoint-6")


def test_named_checkpoint_is_gone_on_from_without_the_journal(
    plain: Path, tmp_path: Path, forward_passes: list[int]
) -> None:
    shutil.copytree(plain / "out", tmp_path / "out")
    named = {"resume_from_checkpoint": tmp_path / "out/checkpoint-4"}
    finish(training(tmp_path, **PLAIN, **named))
    assert {4, 5} <= set(forward_passes)
    assert (tmp_path / "out" / FILE).read_bytes() == (plain / "out" / FILE).read_bytes()
    (tmp_path / "result.json").unlink()
    argv = training(tmp_path, **PLAIN, resume_from_checkpoint="False")
    assert finish(argv)["resumed_from"] is None
    assert read_journal(tmp_path / "out" / FILE).after(0)[0][0].step == 0
