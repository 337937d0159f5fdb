"""The optimizer's settings, as the command line gives them."""

from __future__ import annotations

from command_line.arguments import Arguments
from command_line.declarations import AUTO
from zeroth_order import step_rule
from zeroth_order.config import HiZOOConfig, smoothing_of

COMPILE = {"auto": None, "yes": True, "no": False}


def optimizer_config(arguments: Arguments) -> HiZOOConfig:
    """Return HiZOO's settings at the first step; where μ is ``auto``, its default."""
    eps = arguments.zo_eps
    return HiZOOConfig(
        lr=arguments.learning_rate,
        eps=HiZOOConfig.eps if eps == AUTO else eps,
        hessian_smooth=smoothing_of(arguments.hessian_smooth_type),
        weight_decay=arguments.weight_decay,
        hessian=arguments.hessian,
        num_samples=arguments.zo_num_samples,
        seed=arguments.seed,
        compile=COMPILE[arguments.zo_compile],
    )


def passes_of_a_batch(config: HiZOOConfig) -> tuple[int, int]:
    """Return the passes for g, and n of "every n-th step takes one more, for c", 0 for none."""
    rarely = step_rule.RARELY if config.lr == AUTO else 0
    return 2 * config.num_samples, 1 if config.hessian_smooth else rarely


def method(arguments: Arguments) -> str | None:
    """Return what trains, and its forward passes: ``HiZOO, α 1e-8: 3 forward passes a step``.

    None: backpropagation.
    """
    unit = "step" if arguments.gradient_accumulation_steps == 1 else "batch"
    if arguments.trainer == "broadcast":
        rate, damping = arguments.broadcast_rate, arguments.broadcast_damping
        return f"error broadcast, κ {rate:g}, λ {damping:g}: 1 forward pass a {unit}"
    if arguments.trainer != "zo":
        return None
    config = optimizer_config(arguments)
    of_g, every = passes_of_a_batch(config)
    parts = ["MeZO"]
    if config.hessian_smooth:
        name = "HiZOO-L" if config.hessian == "lowrank" else "HiZOO"
        parts = [name, f"α {config.hessian_smooth:g}".replace("e-0", "e-")]
    parts += [f"{config.num_samples} directions"] if config.num_samples > 1 else []
    parts += ["η auto"] if config.lr == AUTO else []
    more = f", 1 more in every {every}th" if every > 1 else ""
    return f"{', '.join(parts)}: {of_g + (every == 1)} forward passes a {unit}{more}"
