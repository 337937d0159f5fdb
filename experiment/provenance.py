"""Where a result comes from: the device, its memory at the peak, and the version of this code."""

from __future__ import annotations

import platform
import re
import resource
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def provenance(device: torch.device | None) -> dict[str, Any]:
    """Return what a result on a device says about its origin; None: on all GPUs.

    ``peak_memory_mib`` is what torch has allocated at most on this process's GPUs, or all of this
    process's memory without a GPU.
    """
    if torch.cuda.is_available() and (device is None or device.type == "cuda"):
        gpus = range(torch.cuda.device_count())
        name = f"{len(gpus)} x {torch.cuda.get_device_name()}".removeprefix("1 x ")
        peak = sum(torch.cuda.max_memory_allocated(gpu) for gpu in gpus)
    else:
        info = Path("/proc/cpuinfo")
        known = info.is_file() and re.search(r"model name\s*: (.*)", info.read_text("utf-8"))
        name = known[1] if known else platform.processor() or platform.machine()
        unit = 1 if platform.system() == "Darwin" else 1024  # macOS counts bytes
        peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"device": name, "peak_memory_mib": round(peak / 2**20, 1), "commit": commit()}


def commit(folder: Path = ROOT) -> str | None:
    """Return the commit of a repository, with + where files differ from it; None without git."""
    if not (folder / ".git").exists():
        return None  # a folder inside another repository is none
    words = ("describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+")
    command = ["git", "-C", str(folder), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
