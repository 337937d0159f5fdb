"""The zeroth-order optimizer of a run: which weights it trains, and how it perturbs them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from hizoo import HiZOO, HiZOOConfig, Layers, OnlyInPlace
from training.journal import Group
from utils import InputError, speaks_for_all
from zeroth_order.blocks import NoBlocks, blocks_of
from zeroth_order.streamed import StreamedLayers

logger = logging.getLogger(__name__)
logger.addFilter(lambda _: speaks_for_all())


def trained_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def groups_of(
    model: nn.Module, decaying: Collection[str], weight_decay: float
) -> tuple[Group, ...]:
    """Return the groups of a model's trained weights: matrices among ``decaying``, and others."""
    trained = trained_weights(model)
    # Some norms go by unusual names.
    decays = {name: name in decaying and p.dim() > 1 for name, p in trained.items()}
    groups = (
        Group(weight_decay if decay else 0.0, tuple(n for n in trained if decays[n] == decay))
        for decay in (True, False)
    )
    return tuple(group for group in groups if group.parameters)


def make_optimizer(
    model: nn.Module,
    groups: Sequence[Group],
    config: HiZOOConfig,
    layers: Layers | None,
    named: str,
) -> HiZOO:
    """Return the optimizer of a model's trained weights.

    The noise depends on the order of the parameters, so a replay makes its optimizer here, too.
    ``named`` is what the user calls μ.

    Raises:
        InputError: the weights do not fit, or μ does not fit them.
    """
    parameters = dict(model.named_parameters())
    param_groups = [
        {"params": [parameters[name] for name in g.parameters], "weight_decay": g.weight_decay}
        for g in groups
    ]
    try:
        optimizer = HiZOO(param_groups, config, layers=layers)
    except ValueError as error:  # a weight of an adapter may be the view of another one
        raise InputError(f"--trainer zo: {error}") from error
    check_scale(optimizer, named)
    return optimizer


def check_scale(optimizer: HiZOO, named: str) -> None:
    """Raise InputError if μ is too small or too large beside the weights."""
    try:
        optimizer.check_perturbation_scale()
    except ValueError as error:
        raise InputError(f"{named}: {error}") from error


@torch.no_grad()
def choose_layers(model: nn.Module, perturbation: str, loss: Callable[[], Tensor]) -> Layers | None:
    """Return what perturbs one module at a time, None to perturb in place.

    The loss of a batch shows whether the model, in evaluation mode, allows it, before any weight
    has changed. Weights that no text passes through are frozen. ``perturbation`` is "inplace",
    "layerwise" or "auto": layerwise where weights are half precision.

    Raises:
        InputError: "layerwise" does not work for this model.
    """
    half_precision = any(p.element_size() < 4 for p in trained_weights(model).values())
    in_place = perturbation == "inplace" or (perturbation == "auto" and not half_precision)
    if in_place and not blocks_of(model):
        return None
    layers = layers_of(model)
    try:
        unused = layers.check(loss)
    except OnlyInPlace as error:
        reason = f"{type(model).__name__} cannot be perturbed layer by layer: {error}"
        if blocks_of(model):
            raise InputError(f"--offload: {reason}; leave it out") from error
        if perturbation == "layerwise":
            raise InputError(f"{reason}; use --zo_perturbation inplace") from error
        logger.warning(f"{reason}; its weights are shifted in place and back, which rounds")
        return None
    if not unused:
        return layers
    for name in unused:
        model.get_parameter(name).requires_grad_(False)
    of = f", the first of {len(unused)} such weights" if len(unused) > 1 else ""
    logger.warning(f"not trained, since no text passes through: {unused[0]}{of}")
    return layers_of(model, checked=True)


def layers_of(model: nn.Module, checked: bool = False) -> Layers:
    """Return what perturbs one module at a time, or one block of a streamed model.

    Raises:
        InputError: the model cannot be streamed.
    """
    try:
        layers = StreamedLayers(model) if blocks_of(model) else Layers(model)
    except NoBlocks as error:
        raise InputError(f"--offload: {error}; leave it out") from error
    layers.checked = checked
    return layers
