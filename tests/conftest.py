"""Tests import the project's modules from the repository root, and never reach the Hub."""

import functools
import gc
import os
import signal
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# pytest-xdist runs one process a core: more threads each would only wait for one another.
os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


# A shell's background job ignores Ctrl-C, and so would every process that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def samples_are_read_once() -> Iterator[None]:
    """Hundreds of runs read the bundled samples, which no test changes."""
    from task_data import loading

    samples = ROOT / "data" / "samples"
    load = loading.read_samples
    load_once = functools.cache(load)

    def load_bundled_once(task: object, path: Path, **settings: bool) -> list[object]:
        bundled = path.resolve().is_relative_to(samples)
        return [*load_once(task, path, **settings)] if bundled else load(task, path, **settings)

    loading.read_samples = load_bundled_once
    yield
    loading.read_samples = load


def leave_out_of_garbage_collection() -> None:
    """Leave out what there is: Accelerate collects before every training.

    What the libraries hold is most of it, and what a compilation leaves behind: to look through it
    took two fifths of the time of short runs.
    """
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Let the libraries load without it, too."""
    gc.disable()
    try:
        return (yield)
    finally:
        leave_out_of_garbage_collection()
        gc.enable()


@pytest.fixture(scope="module", autouse=True)
def what_a_module_leaves_is_no_garbage() -> Iterator[None]:
    yield
    leave_out_of_garbage_collection()
