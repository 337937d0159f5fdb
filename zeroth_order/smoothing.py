"""Schedules of the Hessian smoothing α over the steps of a run."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


@dataclass(frozen=True)
class SmoothingSchedule:
    """α over the steps of a run: ``value`` times a factor that falls from 1 to 0 or stays 1."""

    kind: str
    value: float

    @classmethod
    def parse(cls, text: str) -> SmoothingSchedule:
        """Read a schedule: ``constant1e-8``, ``linear1e-6``, ``cosine1e-6``.

        Raises:
            ValueError: the kind is unknown, or the number is not in [0, 1).
        """
        match = re.fullmatch(rf"({'|'.join(SCHEDULES)})(.+)", text)
        try:
            value = float(match[2]) if match else math.nan
        except ValueError:
            value = math.nan
        if not match or not 0 <= value < 1:
            kinds = ", ".join(f"{kind}<number>" for kind in SCHEDULES)
            raise ValueError(
                f"{text}: give one of {kinds}, the number from 0 (MeZO) to below 1, as in "
                "constant1e-8"
            )
        return cls(match[1], value)

    def at(self, step: int, max_steps: int) -> float:
        """Return α at a step, counted from 0."""
        return self.value * SCHEDULES[self.kind](min(1.0, step / max(1, max_steps)))
