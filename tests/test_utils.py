"""Files that are whole or absent, fingerprints, the line in which a command fails."""

from __future__ import annotations

import datetime
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest

import probe
import replay
import report
import run
import sweep
import utils
from utils import (
    InputError,
    NotWritten,
    check_writable,
    exit_code,
    fingerprint,
    write_json,
    write_json_lines,
    write_text_atomically,
)


def test_text_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file.txt"
    write_text_atomically(path, "grüße\n")
    assert path.read_text(encoding="utf-8") == "grüße\n"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_file_is_whole_or_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail(*arguments: object) -> None:
        assert path.read_text() == "old"
        raise OSError("disk full")

    monkeypatch.setattr(utils.os, failing, fail)
    with pytest.raises(NotWritten, match="disk full"):
        write_text_atomically(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]


def test_file_mode_is_that_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_text_atomically(tmp_path / "written", "")
    modes = {(tmp_path / name).stat().st_mode for name in ("plain", "written")}
    assert len(modes) == 1


def test_json_and_json_lines(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"ü": [1, None]})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == (
        '{\n  "ü": [\n    1,\n    null\n  ]\n}\n'
    )
    write_json_lines(tmp_path / "b.jsonl", [{"id": 1}, {"id": [math.nan, -math.inf]}])
    assert (tmp_path / "b.jsonl").read_text() == '{"id": 1}\n{"id": [null, null]}\n'
    write_json_lines(tmp_path / "b.jsonl", [{"id": datetime.date(2026, 1, 2)}])  # of Parquet
    assert (tmp_path / "b.jsonl").read_text() == '{"id": "2026-01-02"}\n'
    write_json(tmp_path / "a.json", {"path": "\udcff"})  # a byte that is no UTF-8
    assert json.loads((tmp_path / "a.json").read_bytes()) == {"path": "\udcff"}


def test_check_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_writable("--result_file", tmp_path / "new" / "file.json")
    check_writable("--output_dir", tmp_path / "new" / "folder", is_folder=True)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"--result_file .*is a file; give another place"):
        check_writable("--result_file", tmp_path / "file" / "x.json")
    with pytest.raises(InputError, match=r"--output_dir .*is a file; give another place"):
        check_writable("--output_dir", tmp_path / "file", is_folder=True)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="this is a device; give the name of a file"):
        check_writable("--result_file", tmp_path / "pipe")
    with pytest.raises(InputError, match="this is a folder"):
        check_writable("--result_file", tmp_path)
    with pytest.raises(InputError, match=r"cannot write there \(File name too long\)"):
        check_writable("--result_file", tmp_path / ("x" * 300))

    def refuse(**arguments: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(utils.tempfile, "TemporaryFile", refuse)
    with pytest.raises(InputError, match=r"cannot write there \(Permission denied\)"):
        check_writable("--result_file", tmp_path / "x.json")


def test_fingerprints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    content = bytes(range(256)) * 8
    for whole in (2**28, 1024):  # large files: 64 samples of 8 bytes
        monkeypatch.setattr(utils, "WHOLLY_READ", whole)
        monkeypatch.setattr(utils, "SAMPLE_SIZE", 8)
        first.write_bytes(content)
        second.write_bytes(content)
        assert fingerprint([first]) == fingerprint([second])
        assert fingerprint([first, second]) != fingerprint([first])
        # A change of as much as lies between two samples is seen, wherever it is.
        second.write_bytes(content[:999] + bytes(32) + content[1031:])
        assert fingerprint([first]) != fingerprint([second])
        second.write_bytes(content + b"x")
        assert fingerprint([first]) != fingerprint([second])


def test_last_line_is_said_by_the_first_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.delenv("WORLD_SIZE", raising=False)  # a rank of nothing
    utils.say_last("error: a value")
    assert capsys.readouterr().err == "error: a value\n"
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, said in (("0", "error: a value\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        utils.say_last("error: a value")
        assert capsys.readouterr().err == said


def test_a_reader_who_has_gone_ends_a_command_without_a_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for flush in (True, False):
        reader, writer = os.pipe()
        os.close(reader)
        with monkeypatch.context() as patched, os.fdopen(writer, "w") as output:
            patched.setattr(sys, "stdout", output)
            assert exit_code(lambda flush=flush: print("line", flush=flush)) == 141
    assert capsys.readouterr() == ("", "")

    def another_pipe() -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        exit_code(another_pipe)


@pytest.mark.parametrize("command", [probe, replay, report, run, sweep])
def test_every_command_refuses_in_one_line(
    command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = {replay: ["--journal", "none"], report: ["none"]}.get(command, [])
    # The words before -- are lists of values to sweep.py.
    value = ["3"] if command is sweep else []
    assert command.main([*needed, "--nonsense", *value]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1
    assert err.startswith("error: ") and "unknown argument --nonsense" in err and "--help" in err
