"""A list of a folder's files with their SHA-256, and whether they still are what was written."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from utils import write_json

MANIFEST = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Write the names and SHA-256 sums of a folder's files into its manifest, the last file.

    All of them are on the disk then, whatever fails afterwards.
    """
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())
    files = [folder / name for name in names]
    sums = dict(zip(names, sha256_of(files), strict=True))
    for path in {*files, *(file.parent for file in files)}:
        flush(path)
    write_json(folder / MANIFEST, {"sha256": sums})
    flush(folder)


def damage(folder: Path) -> str | None:
    """Return why a folder is not as it was written, None if it is. Reads every file in full."""
    try:
        manifest = dict(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["sha256"])
    except (OSError, ValueError, TypeError, KeyError):
        return f"{MANIFEST} is missing or cut off"
    try:
        sums = sha256_of([folder / name for name in manifest])
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"{Path(error.filename).name} cannot be read ({error.strerror})"
    changed = (name for name, found in zip(manifest, sums, strict=True) if found != manifest[name])
    name = next(changed, None)
    return name and f"{name} is not what was written (SHA-256)"


def sha256_of(files: list[Path]) -> list[str]:
    """Return the SHA-256 sums of files in hexadecimal digits; several are read at a time."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(_sha256, files))


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
