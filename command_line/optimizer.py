"""The optimizer's settings, as the command line gives them."""

from __future__ import annotations

from command_line.arguments import Arguments
from command_line.declarations import AUTO
from zeroth_order import step_rule
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


def passes_of_a_batch(config: HiZOOConfig) -> tuple[int, int, int]:
    """Return the passes for g, those for c, and n of "every n-th step measures c", 0 for none."""
    grows, directions = config.hessian_smooth > 0, config.num_samples
    own_scale = config.curvature_eps not in (None, config.eps)
    every = config.curvature_every or (1 if grows and not own_scale else step_rule.RARELY)
    is_measured = grows or config.lr == AUTO
    return 2 * directions, 1 + 2 * directions * own_scale, every if is_measured else 0


def method(arguments: Arguments) -> str | None:
    """Return what trains, and its forward passes: ``HiZOO, α 1e-8: 3 forward passes a step``.

    None: backpropagation.
    """
    unit = "step" if arguments.gradient_accumulation_steps == 1 else "batch"
    if arguments.trainer == "broadcast":
        return f"{_error_broadcast(arguments)}: 1 forward pass a {unit}"
    return _zeroth_order(arguments, unit) if arguments.trainer == "zo" else None


def _error_broadcast(arguments: Arguments) -> str:
    rate, damping = arguments.broadcast_rate, arguments.broadcast_damping
    parts = [f"error broadcast, κ {rate:g}, λ {damping:g}", trained_blocks(arguments)]
    if arguments.broadcast_matrices != "o,d":
        parts.append(f"{arguments.broadcast_matrices} alone")
    return ", ".join(parts)


def trained_blocks(arguments: Arguments) -> str:
    """Return in words which blocks error broadcast trains."""
    first = arguments.broadcast_from
    if first == 0.5:
        return "upper half of the blocks"
    return f"upper {100 * (1 - first):.3g}% of the blocks" if first else "all blocks"


def _zeroth_order(arguments: Arguments, unit: str) -> str:
    config, schedule = optimizer_config(arguments), smoothing(arguments)
    of_g, of_c, every = passes_of_a_batch(config)
    name = "HiZOO-L" if config.hessian == "lowrank" else "HiZOO"
    course = "" if schedule.kind == "constant" else f" ({schedule.kind})"
    parts = [name, f"α {schedule.value:g}{course}".replace("e-0", "e-")]
    parts = parts if schedule.value else ["MeZO"]
    parts += [f"{config.num_samples} directions"] if config.num_samples > 1 else []
    parts += ["η auto"] if config.lr == AUTO else []
    passes = of_g + (of_c if every == 1 else 0)
    more = f", {of_c} more in every {every}th" if every > 1 else ""
    return f"{', '.join(parts)}: {passes} forward passes a {unit}{more}"
