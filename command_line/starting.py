"""What run.py does first: say what is wrong, or print the help."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from command_line import launchers
from command_line.contradictions import check_values
from command_line.help import HELP, USAGE, help_text
from command_line.reading import read_values
from command_line.scripts import BUNDLED_MODEL, unread_variables
from utils import InputError, exit_code, speaks_for_all


def begin(argv: Sequence[str]) -> None:
    """Refuse a command line that makes no sense, and prepare the environment of the run.

    Raises:
        SystemExit: it makes no sense, or only help is wanted.
    """
    if not argv:
        print(USAGE)
        sys.exit(2)
    if not HELP.isdisjoint(argv):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as in --help | head
        print(help_text(argv))
        sys.exit(0)
    try:
        _check_environment()
    except InputError as error:
        # Which process speaks for all is what cannot be known here.
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if code := exit_code(lambda: _begin(argv)):
        sys.exit(code)


def _check_environment() -> None:
    launchers.check_variables(os.environ)
    launchers.take_store_of_restart(os.environ)
    try:
        os.getcwd().encode()
    except FileNotFoundError as error:
        raise InputError("the working directory was deleted: change to another one") from error
    except UnicodeEncodeError as error:
        raise InputError(f"the working directory {os.getcwd()} is not UTF-8: rename it") from error


def _begin(argv: Sequence[str]) -> None:
    values = read_values(argv)
    check_values(values)
    if argv[0] != "--script":
        return
    if speaks_for_all():
        for line in unread_variables(argv[1], os.environ):
            print(line, file=sys.stderr)
    if values.model_name == str(BUNDLED_MODEL):
        # A model this small gains nothing from a second thread, and loses much beside a process.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
