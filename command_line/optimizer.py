"""The optimizer's settings, as the command line gives them."""

from __future__ import annotations

from command_line.arguments import Arguments
from command_line.declarations import AUTO
from zeroth_order.config import HiZOOConfig
from zeroth_order.smoothing import SmoothingSchedule

COMPILE = {"auto": None, "yes": True, "no": False}


def smoothing(arguments: Arguments) -> SmoothingSchedule:
    """Return the schedule of α, ``--hessian_smooth_type``.

    Raises:
        ValueError: it is none.
    """
    return SmoothingSchedule.parse(arguments.hessian_smooth_type)


def optimizer_config(arguments: Arguments) -> HiZOOConfig:
    """Return HiZOO's settings at the first step; where μ is ``auto``, its default."""
    eps, curvature_eps = arguments.zo_eps, arguments.curvature_eps
    dtype = arguments.hessian_dtype
    return HiZOOConfig(
        lr=arguments.learning_rate,
        eps=HiZOOConfig.eps if eps == AUTO else eps,
        hessian_smooth=smoothing(arguments).value,
        weight_decay=arguments.weight_decay,
        hessian=arguments.hessian,
        hessian_dtype=None if dtype == "auto" else dtype,
        num_samples=arguments.zo_num_samples,
        curvature_eps=None if curvature_eps == AUTO else curvature_eps,
        curvature_every=arguments.curvature_every,
        seed=arguments.seed,
        compile=COMPILE[arguments.zo_compile],
    )
