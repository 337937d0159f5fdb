"""Tests import the project's modules from the repository root, and never reach the Hub."""

import gc
import os
import signal
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# pytest-xdist runs one process a core: more threads each would only wait for one another.
os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


# A shell's background job ignores Ctrl-C, and so would every process that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Leave the imported libraries out of garbage collection.

    Accelerate collects before every training, and what the libraries hold is most of what there is:
    it was a fifth of the time that a short run takes.
    """
    gc.collect()
    gc.freeze()
