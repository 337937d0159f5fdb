"""Files and folders that one process has."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest

from experiment.folders import locked
from utils import InputError


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_lock_of_another_process_ends_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "out"
    reading, writing = os.pipe()
    other = os.fork()
    if not other:
        with contextlib.suppress(BaseException), locked("--output_dir", folder, is_folder=True):
            os.write(writing, b"1")
            time.sleep(60)
        os._exit(1)
    os.close(writing)
    with open(reading, "rb") as pipe:
        assert pipe.read(1) == b"1"
    holder = f"process {other} on {socket.gethostname()}"
    for _ in range(2):  # a refusal leaves the other's lock as it is
        with (
            pytest.raises(InputError, match=rf"--output_dir {folder} is used by {holder}: wait "),
            locked("--output_dir", folder, is_folder=True),
        ):
            pass
    os.kill(other, signal.SIGKILL)
    os.waitpid(other, 0)
    assert (folder / ".lock").read_text() == f"{holder}\n"
    with locked("--output_dir", folder, is_folder=True):
        assert f"process {os.getpid()} on " in (folder / ".lock").read_text()
    assert list(folder.iterdir()) == []


def test_folder_that_a_lock_made_goes_if_it_is_empty(tmp_path: Path) -> None:
    with locked("--output_dir", tmp_path / "a" / "b", is_folder=True):
        (tmp_path / "a" / "file").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "file"]
    with locked("--output_dir", tmp_path / "gone", is_folder=True):
        shutil.rmtree(tmp_path / "gone")  # by somebody else
    (tmp_path / "mine").mkdir()
    with (
        pytest.raises(KeyboardInterrupt),
        locked("--output_dir", tmp_path / "mine", is_folder=True),
        locked("--output_dir", tmp_path / "c" / "d", is_folder=True),
    ):
        raise KeyboardInterrupt
    assert {path.name for path in tmp_path.rglob("*")} == {"a", "file", "mine"}


def test_lock_file_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / ".rows.jsonl.lock").mkdir()
    with (
        pytest.raises(InputError, match=r"--predictions_file .*/rows\.jsonl: cannot lock .*\.lock"),
        locked("--predictions_file", tmp_path / "rows.jsonl"),
    ):
        pass
