"""Several processes: the variables that torchrun sets."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping, MutableMapping

from utils import InputError

# How many processes srun or mpirun has started: torch.distributed does not read them.
OF_OTHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


def check_variables(environment: Mapping[str, str]) -> None:
    """Refuse variables with which processes would wait for, or repeat, one another, or be silent.

    Raises:
        InputError: names the variable and its value.
    """
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
        _number(environment, "RANK", below=processes)
    if connects:
        of_node = processes
        if "LOCAL_WORLD_SIZE" in environment:
            of_node = _number(environment, "LOCAL_WORLD_SIZE", 1, processes + 1)
        _number(environment, "LOCAL_RANK", below=of_node)
        _number(environment, "MASTER_PORT", 1, 2**16)
        try:
            socket.getaddrinfo(environment["MASTER_ADDR"], None)
        except (KeyError, OSError, UnicodeError):
            raise _unusable(environment, "MASTER_ADDR", "the first process's host") from None


def take_store_of_restart(environment: MutableMapping[str, str]) -> None:
    """Let processes that torchrun has restarted meet at a new store.

    torchrun's own still holds the addresses of the killed processes (PyTorch's issue 135712): two
    or four processes on one machine never found one another again.

    Raises:
        InputError: names a variable of torchrun that makes no sense.
    """
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    if restarts := _number(environment, "TORCHELASTIC_RESTART_COUNT"):
        environment["MASTER_PORT"] = str(_number(environment, "MASTER_PORT") + restarts)
        environment["TORCHELASTIC_USE_AGENT_STORE"] = "False"


def _number(
    environment: Mapping[str, str], name: str, at_least: int = 0, below: int = 2**32
) -> int:
    word = environment.get(name, "")
    if not re.fullmatch("[0-9]{1,10}", word) or not at_least <= int(word) < below:
        raise _unusable(environment, name, f"a whole number from {at_least} to {below - 1}")
    return int(word)


def _unusable(environment: Mapping[str, str], name: str, expected: str) -> InputError:
    shown = f"{name}={environment[name]}" if name in environment else f"{name} is not set"
    return InputError(f"{shown}: expected {expected}; start several with torchrun, or unset it")
