"""What a trainer watches from step to step: the costs, and whether the losses diverge."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# A run has diverged if so many losses in a row lie above the first one by so many times the first
# one (or 1).
RISEN_STEPS, RISEN = 50, 2.0
# So does one without a finite loss in so many steps in a row.
SKIPPED_STEPS = 50


class Costs:
    """Counts what training has taken, before an interruption too.

    ``forward_passes`` and ``backward_passes`` are of training in this process, those of probes
    included; not those of dev losses and metrics.
    """

    def __init__(self) -> None:
        self.forward_passes = self.backward_passes = 0
        self._before = 0.0
        self._started = time.perf_counter()
        self._step_began: float | None = None
        self._is_warm = False
        # Of the steps since the last entry of the log.
        self._in_steps, self._steps = 0.0, 0

    @property
    def seconds(self) -> float:
        """The seconds until now, to a thousandth, dev losses and checkpoints included."""
        return round(self._before + time.perf_counter() - self._started, 3)

    def passes(self) -> dict[str, int]:
        """Return the passes until now, backward ones if there are any."""
        backward = {"backward_passes": self.backward_passes} if self.backward_passes else {}
        return {"forward_passes": self.forward_passes, **backward}

    def begin(self, saved: Mapping[str, Any] | None = None) -> None:
        """Start the clock; ``saved`` are the seconds and passes of a checkpoint."""
        self._started = time.perf_counter()
        if saved:
            self._before, self.forward_passes = saved["seconds"], saved["forward_passes"]
            self.backward_passes = saved.get("backward_passes", 0)

    def begin_step(self) -> None:
        """Note when a step begins; a further batch of the step changes nothing."""
        self._step_began = self._step_began or time.perf_counter()

    def end_step(self) -> None:
        """Count a step's time; the first one's compiles kernels and measures what is auto."""
        if self._is_warm:
            self._in_steps += time.perf_counter() - self._step_began
            self._steps += 1
        self._is_warm, self._step_began = True, None

    def logged(self) -> dict[str, float]:
        """Return what an entry of the log gets, with the seconds of a step since the last one."""
        costs: dict[str, float] = {**self.passes(), "seconds": self.seconds}
        if self._steps:
            costs["seconds_per_step"] = round(self._in_steps / self._steps, 6)
        self._in_steps, self._steps = 0.0, 0
        return costs


@dataclass
class Divergence:
    """Counts steps without a finite loss, and tells when a run has diverged (``reason``)."""

    first_loss: float | None = None
    risen_in_a_row: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    reason: str | None = None

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {name: value for name, value in vars(self).items() if name != "reason"}

    def look(self, loss: float, was_skipped: bool) -> None:
        """Look at the loss of a step, and at whether it was skipped."""
        self.skipped_steps += was_skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if was_skipped else 0
        if self.first_loss is None or not math.isfinite(self.first_loss):
            self.first_loss = loss  # a later one where the first is not finite
        limit = self.first_loss + RISEN * max(abs(self.first_loss), 1.0)
        self.risen_in_a_row = self.risen_in_a_row + 1 if loss > limit else 0
        if self.skipped_in_a_row >= SKIPPED_STEPS:
            self.reason = f"no finite loss in {SKIPPED_STEPS} steps in a row"
        elif self.risen_in_a_row >= RISEN_STEPS:
            self.reason = (
                f"the loss of each of the last {RISEN_STEPS} steps is above {limit:.3g}, the first "
                f"was {self.first_loss:.3g}"
            )
