"""Several processes: the variables of torchrun and Slurm's srun, and torchrun for finetune.sh.

`srun -n N bash HiZOO.sh` is what torchrun with N processes is, on one node or on several.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from utils import NO_GPU, InputError

# Where torchrun's own variables begin: the ports of a node that no service has.
FIRST_PORT, PORTS = 20000, 20000
_HOST = re.compile(r"(?:[\w.-]|\[[\d,-]+\])+")
_TASKS = re.compile(r"([1-9]\d{0,5})(?:\(x([1-9]\d{0,4})\))?", re.ASCII)


def take_slurm_variables(environment: MutableMapping[str, str]) -> None:
    """Set what torch.distributed reads, where srun has started several tasks and nobody has set it.

    Each task is a process. The job script itself, and a step of one task, are left alone.

    Raises:
        InputError: names a variable of srun that makes no sense.
    """
    of_step = environment.get("SLURM_STEP_NUM_TASKS")
    if not of_step or "RANK" in environment or "SLURM_PROCID" not in environment:
        return
    tasks = _number(environment, "SLURM_STEP_NUM_TASKS", 1)
    if tasks == 1:
        return
    # Steps of one job may run side by side.
    job, step_id = (_number(environment, name) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    of_node = tasks_of_this_node(environment)
    found = {
        "RANK": _number(environment, "SLURM_PROCID", below=tasks),
        "LOCAL_RANK": _number(environment, "SLURM_LOCALID", below=of_node),
        "WORLD_SIZE": tasks,
        "LOCAL_WORLD_SIZE": of_node,
        "MASTER_ADDR": first_host(environment),
        "MASTER_PORT": FIRST_PORT + (job * 100 + step_id) % PORTS,
    }
    for name, value in found.items():
        environment.setdefault(name, str(value))


def check_variables(environment: Mapping[str, str]) -> None:
    """Refuse variables of torchrun with which processes would wait for one another, or be silent.

    Raises:
        InputError: names the variable and its value.
    """
    if "WORLD_SIZE" not in environment:
        for name in ("RANK", "LOCAL_RANK"):
            if name in environment:
                raise _unusable(environment, name, "WORLD_SIZE beside it")
        for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"):  # of mpirun
            if environment.get(name, "1") != "1":
                raise _unusable(environment, name, "one process, or WORLD_SIZE beside it")
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


def first_host(environment: Mapping[str, str]) -> str:
    """Return a step's first host: ``node[07-09,12],other``, as Slurm writes it, is node07."""
    name = "SLURM_STEP_NODELIST"
    host = _HOST.match(environment.get(name, ""))
    if not host:
        raise _unusable(environment, name, "a list of hosts")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", host[0])


def tasks_of_this_node(environment: Mapping[str, str]) -> int:
    """Return how many tasks of the step this node has: ``4(x2),3`` is 4, 4 and 3 of three nodes."""
    name = "SLURM_STEP_TASKS_PER_NODE"
    counts: list[int] = []
    for part in environment.get(name, "").split(","):
        found = _TASKS.fullmatch(part)
        if not found:
            raise _unusable(environment, name, "numbers of tasks, as in 4(x2),3")
        counts += [int(found[1])] * int(found[2] or 1)
    has_number = environment.get("SLURM_NODEID")
    return counts[_number(environment, "SLURM_NODEID", below=len(counts)) if has_number else 0]


def _number(
    environment: Mapping[str, str], name: str, at_least: int = 0, below: int = 2**32
) -> int:
    word = environment.get(name, "")
    if not re.fullmatch("[0-9]{1,10}", word) or not at_least <= int(word) < below:
        raise _unusable(environment, name, f"a whole number from {at_least} to {below - 1}")
    return int(word)


def _unusable(environment: Mapping[str, str], name: str, expected: str) -> InputError:
    shown = f"{name}={environment[name]}" if name in environment else f"{name} is not set"
    launcher = "srun" if name.startswith("SLURM_") else "torchrun or srun"
    return InputError(f"{shown}: expected {expected}; start with {launcher}, or unset it")


# ------------------------------------------------------------------------------------ finetune.sh


def processes_to_start(script: str, environment: Mapping[str, str], has_fsdp: bool) -> int:
    """Return how many processes finetune.sh starts; 0: this one does it all.

    Raises:
        InputError: NUM_GPU is no number, or there is no GPU.
    """
    if not script.startswith("finetune") or "WORLD_SIZE" in environment:
        return 0
    number = environment.get("NUM_GPU") or ""
    if not number and script == "finetune_fsdp.sh":
        visible = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
        number = str(len([name for name in visible if name not in NO_GPU] or gpus("index")))
        if number == "0":
            raise InputError("no NVIDIA GPU found: run finetune.sh, or give NUM_GPU for other GPUs")
    if number and (not number.isdecimal() or int(number) < 1):
        raise InputError(f"NUM_GPU={number}: give the number of GPUs, at least 1")
    # The Trainer shards only in processes that torchrun has started, even if it is one.
    return int(number or 1) if has_fsdp or int(number or 1) > 1 else 0


def gpus(query: str) -> list[str]:
    """Return what nvidia-smi answers for each GPU; nothing if there is none, or all are hidden."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in NO_GPU:
        return []
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.split()


def become_torchrun(processes: int, argv: list[str]) -> None:
    """Replace this process by torchrun, which starts so many of them."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    run = Path(__file__).resolve().parent.parent / "run.py"
    # What ends a run lets it save a checkpoint first: the processes get the signal, and the time.
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGINT,SIGTERM,SIGHUP,SIGUSR1,SIGUSR2")
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    os.execv(sys.executable, [*launcher, "--nproc_per_node", str(processes), str(run), *argv])
