"""The settings of HiZOO: one object for the command line, the optimizer, the journal and replay."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

AUTO = "auto"
HESSIANS = ("full", "lowrank")

Bound = tuple[str, Callable[[Any], bool]]
NOT_NEGATIVE: Bound = "at least 0 and finite", lambda value: 0 <= value < math.inf
POSITIVE: Bound = "larger than 0 and finite", lambda value: 0 < value < math.inf
AT_LEAST_1: Bound = "at least 1", lambda value: value >= 1
BOUNDS: dict[str, Bound] = {
    "lr": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "eps": POSITIVE,
    "hessian_smooth": ("in [0, 1)", lambda value: 0 <= value < 1),
    "hessian": (f"one of {', '.join(HESSIANS)}", lambda value: value in HESSIANS),
    "num_samples": AT_LEAST_1,
    "curvature_every": AT_LEAST_1,
}
# What a setting may be beside the values within its bounds.
SPECIAL = {"lr": AUTO, "curvature_every": None}


@dataclass(frozen=True)
class HiZOOConfig:
    """The settings of ``hizoo.HiZOO``; every value can be written as JSON.

    Raises:
        ValueError: values are out of their bounds.
    """

    lr: float | str = 1e-6  # η; "auto": η = k n / 2c̄ from the measured curvature
    eps: float = 1e-3  # perturbation scale μ
    hessian_smooth: float = 1e-8  # smoothing α of h; 0 is MeZO
    weight_decay: float = 0.0  # λ
    hessian: str = "full"  # or "lowrank": HiZOO-L, a row and a column vector for each matrix
    num_samples: int = 1  # directions a step, n
    curvature_every: int | None = None  # steps between two c; None: 1 if h needs c, else 10
    seed: int = 0  # of the noise
    compile: bool | None = None  # by torch.compile; None: for 16 million weights and more

    def __post_init__(self) -> None:
        settings = vars(self).items()
        check_settings({n: v for n, v in settings if n not in SPECIAL or v != SPECIAL[n]})


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise ValueError, which names all of them, if settings are out of their bounds."""
    wrong = []
    for name in sorted(BOUNDS.keys() & settings.keys()):
        (bound, is_within), value = BOUNDS[name], settings[name]
        try:
            fits = is_within(value)
        except TypeError:  # a text in place of a number
            fits = False
        if not fits:
            wrong.append(f"{name} must be {bound}, not {value!r}")
    if wrong:
        raise ValueError("; ".join(wrong))


def smoothing_of(text: str) -> float:
    """Return α, as scripts write it: ``constant1e-8``.

    Raises:
        ValueError: it is written otherwise, or not in [0, 1).
    """
    number = text.removeprefix("constant")
    try:
        value = math.nan if number == text else float(number)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise ValueError(
            f"{text}: give constant<number>, from 0 (MeZO) to below 1, as in constant1e-8"
        )
    return value
