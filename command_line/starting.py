"""What run.py does first: say what is wrong, print the help, or start the processes of a script."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from command_line.contradictions import check_values
from command_line.help import HELP, USAGE, help_text
from command_line.reading import read_values
from command_line.scripts import (
    BUNDLED_MODEL,
    become_torchrun,
    processes_of,
    warnings_of_variables,
)
from command_line.slurm import take_slurm_variables, take_store_of_restart
from utils import exit_code, speaks_for_all


def begin(argv: Sequence[str]) -> None:
    """Refuse a command line that makes no sense, and prepare the environment of the run.

    Raises:
        SystemExit: it makes no sense, or only help is wanted.
    """
    if not argv:
        print(USAGE)
        sys.exit(2)
    if asked := [word for word in argv if word in HELP]:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as in --help | head
        print(help_text(everything="--help_all" in asked))
        sys.exit(0)
    if code := exit_code(lambda: _begin(list(argv))):
        sys.exit(code)


def _begin(argv: list[str]) -> None:
    by_torchrun = "WORLD_SIZE" in os.environ  # its processes would warn a second time
    take_slurm_variables(os.environ)
    take_store_of_restart(os.environ)
    values = read_values(argv)
    check_values(values)
    if argv[0] != "--script":
        return
    script = argv[1]
    processes = processes_of(script, os.environ, values.given)
    if speaks_for_all() and not by_torchrun:
        for line in warnings_of_variables(script, os.environ):
            print(line, file=sys.stderr)
    if processes:
        become_torchrun(processes, argv)
    if values.model_name == str(BUNDLED_MODEL):
        # A model this small gains nothing from a second thread, and loses much beside a process.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
