"""Sizes of memory as people write them: 8GB, 500 MiB."""

from __future__ import annotations

import re

UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
BINARY_UNITS = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def bytes_of_size(text: str) -> int:
    """Read a size: ``8GB``, ``500 MiB``, ``0``.

    Raises:
        ValueError: it is none.
    """
    match = re.fullmatch(r"(\d+\.?\d*) *([kmgt]?i?)b?", text.strip().lower())
    unit = match and {**UNITS, **BINARY_UNITS}.get(match[2])
    if not unit:
        raise ValueError(f"{text}: give a number and a unit, as in 8GB or 500MiB")
    return int(float(match[1]) * unit)
