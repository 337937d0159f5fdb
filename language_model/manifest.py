"""Whether a folder's files are what was written: a list of their SHA-256 sums beside them."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from utils import write_json

MANIFEST = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Write the names and SHA-256 sums of a folder's files into its manifest, as the last file.

    All of them are on the disk before the manifest is: a power failure leaves none of half a
    folder.
    """
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())
    files = [folder / name for name in names]
    sums = dict(zip(names, sha256_of(files), strict=True))
    for path in {*files, *(file.parent for file in files)}:
        _flush(path)
    write_json(folder / MANIFEST, {"sha256": sums})
    for path in (folder, folder.parent):
        _flush(path)


def manifest_of(folder: Path) -> dict[str, str] | None:
    """Return the SHA-256 sums in a folder's manifest; None if there is none that can be read."""
    try:
        return dict(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["sha256"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def missing_file(folder: Path) -> str | None:
    """Return the first of a folder's files that is not there, by its manifest; None if all are."""
    manifest = manifest_of(folder)
    names = [MANIFEST] if manifest is None else manifest
    return next((name for name in names if manifest is None or not (folder / name).is_file()), None)


def damage(folder: Path) -> str | None:
    """Return why a folder is not as it was written, None if it is. Reads every file in full."""
    if missing := missing_file(folder):
        return f"{missing} is missing or cut off"
    manifest = manifest_of(folder)
    try:
        sums = sha256_of([folder / name for name in manifest])
    except OSError as error:
        return f"{Path(error.filename).name} cannot be read ({error.strerror})"
    for (name, written), found in zip(manifest.items(), sums, strict=True):
        if found != written:
            return f"{name} is not what was written (SHA-256)"
    return None


def sha256_of(files: list[Path]) -> list[str]:
    """Return the SHA-256 sums of files in hexadecimal digits; several are read at a time."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(_sha256, files))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
