"""The step size from the curvature: no learning rate has to be known.

Along u/√h a batch's loss is lowest at η = 1/2c. ``lr="auto"`` takes a part k of that from the
running mean c̄: η = k n / 2c̄ for n directions. Where the curvature rises, steps become shorter.
"""

from __future__ import annotations

from typing import Any

# k of ``lr="auto"``.
CURVATURE_PART = 0.1
# Measurements that c̄ remembers. A single c raises c̄ to LEAST_PART of itself at least; over the
# first measurements, which may lie far below the mean, the step grows to its length.
MEMORY, LEAST_PART, FIRST_MEASUREMENTS = 20, 0.3, 5
# Steps between two measurements of c whose forward passes serve nothing else.
RARELY = 10


def is_measured(step: int, every: int) -> bool:
    """Return whether a step, counted from 0, measures c: each of the first ``every`` does."""
    return step < every or step % every == 0


def averaged_curvature(group: dict[str, Any], curvature: float) -> dict[str, Any]:
    """Return c̄ and the count of its measurements after a further one, as a group keeps them."""
    count = group["measured_steps"] + 1
    mean = group["mean_curvature"]
    mean = max(mean + (curvature - mean) / min(count, MEMORY), LEAST_PART * curvature)
    return {"mean_curvature": mean, "measured_steps": count}


def learning_rate(group: dict[str, Any], is_auto: bool, num_samples: int) -> float:
    """Return η of a group's next step, its ``lr`` being k if ``is_auto``.

    0 where no curvature was found, as in a flat loss.
    """
    lr = float(group["lr"])
    if not is_auto:
        return lr
    if not group["mean_curvature"]:
        return 0.0
    lr *= min(1.0, group["measured_steps"] / FIRST_MEASUREMENTS)
    return lr * num_samples / (2 * group["mean_curvature"])
