"""How a model's weights are perturbed in the zeroth-order step, tried on a batch before the first.

In place, one module at a time (layerwise.py), or example by example (example_directions.py): what a
model does not allow shows before any weight has changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

from example_directions import ExampleDirections, NotByExample
from hizoo import HiZOO
from language_model.adapters import prefix_length
from language_model.objectives import Objective, losses_of_examples
from training.processes import Exchange
from utils import InputError
from zeroth_order.layerwise import LayerwiseWeights, OnlyInPlace

Warn = Callable[[str], None]


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that require a gradient."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@torch.no_grad()
def choose_layers(
    model: nn.Module, perturbation: str, loss: Callable[[], Tensor], warn: Warn
) -> LayerwiseWeights | None:
    """Return what perturbs one module at a time, None to perturb in place.

    A batch's ``loss`` shows whether that works for this model, and which weights no text passes
    through: these are frozen.

    Args:
        model: in evaluation mode.
        perturbation: "inplace", "layerwise" or "auto": layerwise where weights are half precision.
        loss: of a batch, with the weights as they are.
        warn: takes a line for the user.

    Raises:
        InputError: it was asked for and does not work.
    """
    half_precision = any(p.element_size() < 4 for p in trained_parameters(model))
    if perturbation == "inplace" or (perturbation == "auto" and not half_precision):
        return None
    layers = LayerwiseWeights(model)
    try:
        unused = layers.check(loss)
    except OnlyInPlace as error:
        reason = f"{type(model).__name__} cannot be perturbed layer by layer: {error}"
        if perturbation == "layerwise":
            raise InputError(f"{reason}; use --zo_perturbation inplace") from error
        warn(f"{reason}; its weights are shifted in place and back, which rounds")
        return None
    if unused:
        freeze(model, unused, warn)
        layers = LayerwiseWeights(model)
        layers.checked = True
    return layers


@torch.no_grad()
def choose_directions(
    model: nn.Module, eps: float, losses: Callable[[], Tensor], warn: Warn
) -> ExampleDirections:
    """Return what gives every example its own direction; weights that no loss depends on freeze.

    Args:
        model: in evaluation mode.
        eps: perturbation scale μ.
        losses: those of the examples of a batch, (examples,), with the weights as they are.
        warn: takes a line for the user.

    Raises:
        InputError: the model uses a weight in a way that is not known, or orders its tokens so.
    """
    shown = f"--zo_directions example: {type(model).__name__}"
    if prefix_length(model):
        raise InputError(
            f"{shown} has a prefix that all examples of a row share; use --lora, or "
            "--zo_directions shared"
        )
    directions = ExampleDirections(model)
    trial = HiZOO(trained_parameters(model), eps=eps, hessian_smooth=0, directions=directions)
    try:
        unused = trial.unused_by_examples(losses)
    except NotByExample as error:
        raise InputError(f"{shown}: {error}; use --zo_directions shared") from error
    if unused:
        freeze(model, unused, warn)
        directions = ExampleDirections(model)
        directions.checked = True
    return directions


def freeze(model: nn.Module, unused: list[str], warn: Warn) -> None:
    """Leave weights as they are, and say so."""
    for name in unused:
        model.get_parameter(name).requires_grad_(False)
    of = f", the first of {len(unused)} such weights" if len(unused) > 1 else ""
    warn(f"not trained, since no text passes through: {unused[0]}{of}")


# -------------------------------------------------------------------------- losses by example


def losses_by_example(objective: Objective) -> Objective:
    """Return what gives the losses of a batch's examples, (examples,).

    Raises:
        InputError: the objective has one loss for all of them.
    """
    losses = losses_of_examples(objective)
    if losses is None:
        name = getattr(objective, "__name__", type(objective).__name__)
        raise InputError(
            f"--zo_directions example: {name} has no losses of the examples; use shared"
        )
    return losses


class GatheredLosses:
    """The losses of all processes' examples of a batch, from those of this one.

    Their mean is the loss of the batch. One float goes around for each example.

    Args:
        inputs: this process's examples.
        part: what its loss counts in that of the batch, a tensor of one number; 0: not at all.
        exchange: between the processes.
        directions: learns which numbers the examples of this process have.
    """

    def __init__(
        self,
        inputs: dict[str, Any],
        part: Tensor,
        exchange: Exchange,
        directions: ExampleDirections,
    ) -> None:
        self.exchange, state = exchange, PartialState()
        self.own = len(inputs["correct"] if "correct" in inputs else inputs["prompts"])
        self.own = self.own if part > 0 else 0
        counts = torch.zeros(state.num_processes, dtype=torch.long)
        counts[state.process_index] = self.own
        counts = exchange.sum(counts).tolist()
        self.first, self.count = sum(counts[: state.process_index]), sum(counts)
        self.factor = part * self.count / max(1, self.own)
        directions.first_example = self.first

    def __call__(self, losses: Tensor) -> Tensor:
        """Gather (examples,) in the order of the processes."""
        whole = losses.new_zeros(self.count)
        whole[self.first : self.first + self.own] = losses[: self.own] * self.factor
        return self.exchange.sum(whole)
