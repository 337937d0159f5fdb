"""The settings of HiZOO: one object for the command line, the optimizer, the journal and replay."""

from __future__ import annotations

import math
from dataclasses import dataclass

AUTO = "auto"
HESSIANS = ("full", "lowrank")
HESSIAN_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class HiZOOConfig:
    """The settings of ``hizoo.HiZOO``; every value can be written as JSON.

    Attributes:
        lr: learning rate η; ``"auto"``: η = k n / 2c̄ from the measured curvature.
        eps: perturbation scale μ.
        hessian_smooth: smoothing α of h; 0 is MeZO.
        weight_decay: λ.
        hessian: ``"full"``, or ``"lowrank"`` (HiZOO-L: a row and a column vector for each matrix).
        hessian_dtype: dtype of the full h; None: the weights' dtype, bfloat16 for float16.
        num_samples: directions a step, n.
        curvature_eps: μ of c; None: that of g.
        curvature_every: steps between two measurements of c; None: 1 where h takes c from the
            losses of g, else 10.
        seed: of the noise.
        compile: whether torch.compile makes the kernels; None: for 16 million weights and more.

    Raises:
        ValueError: a value is out of its bounds.
    """

    lr: float | str = 1e-6
    eps: float = 1e-3
    hessian_smooth: float = 1e-8
    weight_decay: float = 0.0
    hessian: str = "full"
    hessian_dtype: str | None = None
    num_samples: int = 1
    curvature_eps: float | None = None
    curvature_every: int | None = None
    seed: int = 0
    compile: bool | None = None

    def __post_init__(self) -> None:
        if self.hessian_dtype is not None:
            # A torch.dtype is kept by its name.
            name = str(self.hessian_dtype).removeprefix("torch.")
            object.__setattr__(self, "hessian_dtype", name)
        if self.lr != AUTO:
            check_at_least_0("lr", self.lr)
        check_at_least_0("weight_decay", self.weight_decay)
        check_above_0("eps", self.eps)
        check_smoothing(self.hessian_smooth)
        if self.hessian not in HESSIANS:
            raise ValueError(f"hessian must be one of {', '.join(HESSIANS)}, not {self.hessian!r}")
        if self.hessian_dtype not in (None, *HESSIAN_DTYPES):
            known = ", ".join(HESSIAN_DTYPES)
            raise ValueError(f"hessian_dtype must be one of {known}, not {self.hessian_dtype!r}")
        if self.num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, not {self.num_samples!r}")
        if self.curvature_eps is not None:
            check_above_0("curvature_eps", self.curvature_eps)
        if self.curvature_every is not None and self.curvature_every < 1:
            raise ValueError(f"curvature_every must be at least 1, not {self.curvature_every!r}")


def check_at_least_0(name: str, value: float | str) -> None:
    """Raise ValueError unless a number is finite and at least 0."""
    if isinstance(value, str) or not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be at least 0 and finite, not {value!r}")


def check_above_0(name: str, value: float) -> None:
    """Raise ValueError unless a number is finite and above 0."""
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be larger than 0 and finite, not {value!r}")


def check_smoothing(value: float) -> None:
    """Raise ValueError unless α is in [0, 1)."""
    if not 0 <= value < 1:
        raise ValueError(f"hessian_smooth must be in [0, 1), not {value!r}")
