"""Where a result comes from: the device, its memory at the peak, and the version of this code."""

from __future__ import annotations

import platform
import resource
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def provenance(device: torch.device | None) -> dict[str, Any]:
    """Return what a result on a device says about its origin; None: on all GPUs.

    ``peak_memory_mib`` is what torch has allocated at most on this process's GPUs, or all of this
    process's memory without a GPU. ``commit`` is git's of this package, with a + where files differ
    from it; None outside of git.
    """
    if torch.cuda.is_available() and (device is None or device.type == "cuda"):
        gpus = range(torch.cuda.device_count())
        name = torch.cuda.get_device_name()
        name = f"{len(gpus)} x {name}" if len(gpus) > 1 else name
        peak = sum(torch.cuda.max_memory_allocated(gpu) for gpu in gpus)
    else:
        name = _processor()
        unit = 1 if platform.system() == "Darwin" else 1024  # macOS counts bytes
        peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"device": name, "peak_memory_mib": round(peak / 2**20, 1), "commit": commit()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2] for line in lines if line.startswith("model name")), "")
    return name.strip() or platform.processor() or platform.machine()


def commit(folder: Path = ROOT) -> str | None:
    """Return the commit that a folder is at, with + if its files differ from it; None without git.

    A folder that merely lies inside another repository has none.
    """
    if not (folder / ".git").exists():
        return None
    try:
        head = _git(folder, "rev-parse", "HEAD").strip()
        changes = _git(folder, "status", "--porcelain", "--untracked-files=no").strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{head}+" if changes else head


def _git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
