"""What run.py does first: say what is wrong, or print the help."""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Mapping, MutableMapping, Sequence

from command_line.contradictions import check_values
from command_line.help import HELP, USAGE, help_text
from command_line.reading import Values, read_values
from command_line.scripts import BUNDLED_MODEL, unread_variables
from utils import InputError, exit_code, speaks_for_all

# How many processes srun or mpirun has started: torch.distributed does not read them.
OF_OTHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


def begin(argv: Sequence[str]) -> Values:
    """Read a command line that makes sense, and prepare the environment of the run.

    Raises:
        SystemExit: it makes no sense, or only help is wanted.
    """
    if not argv:
        print(USAGE)
        sys.exit(2)
    if not HELP.isdisjoint(argv):
        sys.exit(exit_code(lambda: print(help_text(argv))))
    problem = ""
    try:
        check_variables(os.environ)
        take_store_of_restart(os.environ)
        os.getcwd().encode()
    except FileNotFoundError:
        problem = "the working directory was deleted: change to another one"
    except UnicodeEncodeError:
        problem = "the name of the working directory is not UTF-8: rename it"
    except InputError as error:
        problem = str(error)
    if problem:
        # Which process speaks for all is what cannot be known here.
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    found: list[Values] = []
    if code := exit_code(lambda: found.append(_begin(argv))):
        sys.exit(code)
    return found[0]


def _begin(argv: Sequence[str]) -> Values:
    values = read_values(argv)
    check_values(values)
    if argv[0] == "--script":
        for line in unread_variables(argv[1], os.environ) if speaks_for_all() else ():
            print(line, file=sys.stderr)
        if values.model_name == str(BUNDLED_MODEL):
            # A model this small gains nothing from a second thread, and loses much beside others.
            os.environ.setdefault("OMP_NUM_THREADS", "1")
    return values


def check_variables(environment: Mapping[str, str]) -> None:
    """Refuse variables with which processes would wait for others, repeat them, or be silent."""
    if "WORLD_SIZE" not in environment:
        for name in ("RANK", "LOCAL_RANK"):
            if name in environment:
                raise _unusable(environment, name, "WORLD_SIZE beside it")
        for name in OF_OTHERS:
            if (environment.get(name) or "1") != "1":
                raise _unusable(environment, name, "one process")
        return
    processes = _number(environment, "WORLD_SIZE", 1)
    # With a local rank, accelerate connects even a single process.
    connects = processes > 1 or "LOCAL_RANK" in environment
    if connects or "RANK" in environment:
        _number(environment, "RANK", 0, processes - 1)
    if connects:
        of_node = processes
        if "LOCAL_WORLD_SIZE" in environment:
            of_node = _number(environment, "LOCAL_WORLD_SIZE", 1, processes)
        _number(environment, "LOCAL_RANK", 0, of_node - 1)
        _number(environment, "MASTER_PORT", 1, 2**16 - 1)
        try:
            socket.getaddrinfo(environment["MASTER_ADDR"], None)
        except (KeyError, OSError, UnicodeError):
            raise _unusable(environment, "MASTER_ADDR", "the first process's host") from None


def take_store_of_restart(environment: MutableMapping[str, str]) -> None:
    """Let processes that torchrun has restarted meet at a new store.

    torchrun's own still holds the addresses of the killed processes (PyTorch's issue 135712): two
    or four processes on one machine never found one another again.
    """
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    if restarts := _number(environment, "TORCHELASTIC_RESTART_COUNT"):
        environment["MASTER_PORT"] = str(_number(environment, "MASTER_PORT") + restarts)
        environment["TORCHELASTIC_USE_AGENT_STORE"] = "False"


def _number(
    environment: Mapping[str, str], name: str, least: int = 0, most: int = 2**32 - 1
) -> int:
    word = environment.get(name, "")
    if not re.fullmatch("[0-9]{1,10}", word) or not least <= int(word) <= most:
        raise _unusable(environment, name, f"a whole number from {least} to {most}")
    return int(word)


def _unusable(environment: Mapping[str, str], name: str, expected: str) -> InputError:
    shown = f"{name}={environment[name]}" if name in environment else f"{name} is not set"
    return InputError(f"{shown}: expected {expected}; start several with torchrun, or unset it")
