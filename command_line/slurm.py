"""One distributed job of the tasks that Slurm's srun has started: its variables as torchrun's.

`srun -n N bash HiZOO.sh` then is what torchrun with N processes is, on one node or on several.
"""

from __future__ import annotations

import re
from collections.abc import MutableMapping

from utils import InputError

# Where torchrun's own variables begin: the ports of a node that no service has.
FIRST_PORT, PORTS = 20000, 20000


def take_slurm_variables(environment: MutableMapping[str, str]) -> None:
    """Set what torch.distributed reads, where srun has started several tasks and nobody has set it.

    Each task is a process. The job script itself, and a step of one task, are left alone.

    Raises:
        InputError: srun's variables make no sense.
    """
    try:
        _take(environment)
    except (ValueError, KeyError, AttributeError, IndexError) as error:
        raise InputError(
            f"the variables of srun, SLURM_STEP_NUM_TASKS and others, cannot be read ({error}): "
            "unset them, or set RANK, WORLD_SIZE and MASTER_ADDR"
        ) from error


def _take(environment: MutableMapping[str, str]) -> None:
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS") or 1)
    if tasks < 2 or "WORLD_SIZE" in environment or "SLURM_PROCID" not in environment:
        return
    # Steps of one job may run side by side.
    number = int(environment["SLURM_JOB_ID"]) * 100 + int(environment["SLURM_STEP_ID"])
    found = {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_WORLD_SIZE": str(tasks_of_this_node(environment)),
        "MASTER_ADDR": first_host(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(FIRST_PORT + number % PORTS),
    }
    for name, value in found.items():
        environment.setdefault(name, value)


def take_store_of_restart(environment: MutableMapping[str, str]) -> None:
    """Let processes that torchrun has restarted meet at a new store.

    torchrun's own still holds the addresses of the killed processes (PyTorch's issue 135712): two
    or four processes on one machine never found one another again.
    """
    restarts = int(environment.get("TORCHELASTIC_RESTART_COUNT") or 0)
    if restarts and environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        environment["MASTER_PORT"] = str(int(environment["MASTER_PORT"]) + restarts)
        environment["TORCHELASTIC_USE_AGENT_STORE"] = "False"


def first_host(nodes: str) -> str:
    """Return the first host of a list as Slurm writes it: ``node[07-09,12],other`` is node07."""
    match = re.match(r"([^\[,]*)(?:\[([^\],-]+)[^\]]*\])?([^,\[]*)", nodes)
    return "".join(part or "" for part in match.groups())


def tasks_of_this_node(environment: MutableMapping[str, str]) -> int:
    """Return how many tasks of the step this node has: ``4(x2),3`` is 4, 4 and 3 of three nodes."""
    counts: list[int] = []
    for part in environment["SLURM_STEP_TASKS_PER_NODE"].split(","):
        count, times = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part).groups()
        counts += [int(count)] * int(times or 1)
    return counts[int(environment.get("SLURM_NODEID") or 0)]
