"""Where a result comes from: the device, its memory at the peak, and the version of this code."""

from __future__ import annotations

import platform
import resource
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent


def provenance(device: torch.device) -> dict[str, Any]:
    """Return what a result says about its origin.

    ``device`` is the GPUs' or the processor's name. ``peak_memory_mib`` is what torch has allocated
    at most on this process's GPUs, or all of this process's memory where there is none. ``commit``
    is git's of this package, with a + behind it where files differ from it; None outside of git.
    """
    return {
        "device": device_name(device),
        "peak_memory_mib": round(peak_memory(device) / 2**20, 1),
        "commit": commit(),
    }


def device_name(device: torch.device) -> str:
    """Return the name of all GPUs that this process may use, or of the processor."""
    if device.type == "cuda":
        count = torch.cuda.device_count()
        name = torch.cuda.get_device_name(device)
        return f"{count} x {name}" if count > 1 else name
    if device.type != "cpu":
        return device.type
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2] for line in lines if line.startswith("model name")), "")
    return name.strip() or platform.processor() or platform.machine()


def peak_memory(device: torch.device) -> int:
    """Return the bytes that this process has held at most: on GPUs, or else altogether."""
    if device.type == "cuda":
        return sum(torch.cuda.max_memory_allocated(n) for n in range(torch.cuda.device_count()))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else 1024 * peak  # macOS counts bytes


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
    done = subprocess.run(
        ["git", "-C", str(folder), *words],
        capture_output=True,
        text=True,
        check=True,
        timeout=10,
    )
    return done.stdout
