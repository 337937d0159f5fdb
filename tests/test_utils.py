"""Files that are whole or absent, folders that one process has, fingerprints."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from running import ROOT

import utils
from utils import (
    InputError,
    check_writable,
    fingerprint,
    locked_folder,
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
def test_failing_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail(*arguments: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(utils.os, failing, fail)
    with pytest.raises(OSError, match="disk full"):
        write_text_atomically(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]


def test_reader_never_sees_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ends the process before the rename, the path holds what it held."""
    path = tmp_path / "file.txt"
    seen = []
    replace = os.replace

    def look(source: str, target: Path) -> None:
        seen.append(path.exists())
        assert Path(source).read_text() == "x" * 100_000
        replace(source, target)

    monkeypatch.setattr(utils.os, "replace", look)
    write_text_atomically(path, "x" * 100_000)
    assert seen == [False] and path.stat().st_size == 100_000


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
    write_json_lines(tmp_path / "b.jsonl", [{"id": 1}, {"id": 2}])
    assert (tmp_path / "b.jsonl").read_text() == '{"id": 1}\n{"id": 2}\n'


def test_check_writable_leaves_nothing_behind(tmp_path: Path) -> None:
    check_writable("--result_file", tmp_path / "new" / "file.json")
    check_writable("--output_dir", tmp_path / "new" / "folder", is_folder=True)
    assert list(tmp_path.iterdir()) == []


def test_check_writable_refuses(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"--result_file .*is a file, no folder"):
        check_writable("--result_file", tmp_path / "file" / "x.json")
    with pytest.raises(InputError, match=r"--output_dir .*is a file, no folder"):
        check_writable("--output_dir", tmp_path / "file", is_folder=True)
    with pytest.raises(InputError, match="this is a folder"):
        check_writable("--result_file", tmp_path)


def test_check_writable_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**arguments: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(utils.tempfile, "TemporaryFile", refuse)
    with pytest.raises(InputError, match=r"cannot write there \(Permission denied\)"):
        check_writable("--result_file", tmp_path / "x.json")


def test_lock_of_another_process_ends_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "out"
    lock = (
        "import pathlib, sys, time; from utils import locked_folder\n"
        "with locked_folder('--output_dir', pathlib.Path(sys.argv[1])): print(1, flush=True); "
        "time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", lock, folder], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "1\n"
    holder = f"process {other.pid} on {socket.gethostname()}"
    for _ in range(2):  # a refusal leaves the other's lock as it is
        with (
            pytest.raises(InputError, match=rf"--output_dir {folder} is used by {holder}: wait "),
            locked_folder("--output_dir", folder),
        ):
            pass
    other.kill()
    other.wait()
    other.stdout.close()
    assert (folder / ".lock").read_text() == f"{holder}\n"
    with locked_folder("--output_dir", folder):
        assert f"process {os.getpid()} on " in (folder / ".lock").read_text()
    assert list(folder.iterdir()) == []


def test_folder_that_a_lock_made_goes_if_it_is_empty(tmp_path: Path) -> None:
    with locked_folder("--output_dir", tmp_path / "a" / "b"):
        (tmp_path / "a" / "file").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "file"]
    with locked_folder("--output_dir", tmp_path / "gone"):
        shutil.rmtree(tmp_path / "gone")  # by somebody else
    (tmp_path / "mine").mkdir()
    with (
        pytest.raises(KeyboardInterrupt),
        locked_folder("--output_dir", tmp_path / "mine"),
        locked_folder("--output_dir", tmp_path / "c" / "d"),
    ):
        raise KeyboardInterrupt
    assert {path.name for path in tmp_path.rglob("*")} == {"a", "file", "mine"}


def test_lock_file_that_its_holder_removed_meanwhile_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, path = fcntl.flock, tmp_path / ".lock"

    def remove_first(file: object, operation: int) -> None:
        monkeypatch.setattr(utils.fcntl, "flock", flock)
        path.unlink()
        flock(file, operation)

    monkeypatch.setattr(utils.fcntl, "flock", remove_first)
    with locked_folder("--output_dir", tmp_path):
        with pytest.raises(InputError), locked_folder("--output_dir", tmp_path):
            pass
        assert path.is_file()
    assert not path.exists()


def test_file_system_without_locks_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(file: object, operation: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(utils.fcntl, "flock", refuse)
    with locked_folder("--output_dir", tmp_path):
        assert "is not locked against a second run" in caplog.text


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


def test_last_line_is_said_by_the_first_process_and_kept_for_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, said in (("0", "error: a value\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / rank))
        utils.say_last("error: a value")
        assert capsys.readouterr().err == said
        assert json.loads((tmp_path / rank).read_text())["message"]["message"] == "error: a value"
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "file" / "0"))  # not writable
    utils.say_last("error: a value")
