"""From pre-trained weights and a journal to the weights after any of its steps, without data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from hizoo import HiZOO
from language_model.streaming import read_hessians
from training.journal import Journal
from training.optimizers import checked_layers, described, make_optimizer, trained_weights
from training.recording import checksum_of_trained, replayed
from training.rows import Checksum, Header, Row, Scales, Step
from utils import InputError, one_line
from zeroth_order import noise
from zeroth_order.blocks import blocks_of


class Outcome(NamedTuple):
    """How many steps a replay did, and how its weights compare with the run's checksums."""

    steps: int
    compared: list[int]  # after so many steps checksums were compared
    different: int | None  # the first of these with other weights


def optimizer_of(header: Header, model: nn.Module, compile: bool | None) -> HiZOO:
    """Return the optimizer that a journal's run had, before its first step.

    Parameters that the run did not train are frozen. ``model`` has the weights, or the adapter,
    that the run began with.

    Raises:
        InputError: the model has other parameters, or the noise is another version's.
    """
    if header.noise != noise.VERSION:
        raise InputError(
            f"the journal's noise has version {header.noise}, this program's {noise.VERSION}"
        )
    trained = {name: text for group in header.groups for name, text in group.parameters.items()}
    parameters = dict(model.named_parameters())
    for name, text in trained.items():
        found = described(parameters[name]) if name in parameters else "missing"
        if found != text:
            raise InputError(f"{name} is {text} in the journal and {found} in the model")
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in trained)
    layers = checked_layers(model) if header.layerwise else None
    config = replace(header.optimizer, compile=compile)
    return make_optimizer(model, header.groups, config, layers, f"the journal's μ {config.eps:g}")


def rows_until(journal: Journal, done: int, steps: int | None) -> tuple[list[Row], str | None]:
    """Return the rows from ``done`` steps on until ``steps``, None: to the end or a damaged line.

    With them comes why they are fewer than asked for, None if they are not.

    Raises:
        InputError: the journal does not have them.
    """
    rows, _, fault = journal.after(done)
    found = done + sum(isinstance(row, Step) for row in rows)
    if steps is None:
        return rows, fault
    if steps < done:
        raise InputError(f"--steps {steps}: the checkpoint has {done} already")
    if found < steps:
        why = f" ({fault})" if fault else ""
        way_out = " or a checkpoint behind it as --model_name" if fault else ""
        raise InputError(
            f"{journal.path} has {found} steps{why}, not {steps}; give --steps {found}{way_out}"
        )
    return [row for row in rows if row.step + isinstance(row, Step) <= steps], None


def play(
    rows: Sequence[Row],
    optimizer: HiZOO,
    model: nn.Module,
    compare: bool = False,
    on_step: Callable[[], None] = lambda: None,
) -> Outcome:
    """Do the steps of a journal with its losses in place of forward passes.

    With ``compare`` the weights are compared with the run's checksums.

    Raises:
        InputError: a row does not fit the model.
    """
    steps, compared, different = 0, [], None
    for row in rows:
        if isinstance(row, Scales):
            for group in optimizer.param_groups:
                group["eps"], group["curvature_eps"] = row.eps, row.curvature_eps
        elif isinstance(row, Step):
            _do(row, optimizer)
            steps += 1
            on_step()
        elif isinstance(row, Checksum) and compare and different is None:
            compared.append(row.step)
            if checksum_of_trained(model) != row.checksum:
                different = row.step
    return Outcome(steps, compared, different)


def _do(step: Step, optimizer: HiZOO) -> None:
    """Do a recorded step."""
    for group in optimizer.param_groups:
        group["lr"], group["hessian_smooth"] = step.lr, step.alpha
    for losses, weight in zip(step.losses, step.weights, strict=True):
        try:
            optimizer.estimate(replayed(losses), weight)
        except ValueError as error:  # μ does not fit the weights
            raise InputError(f"step {step.step} of the journal: {one_line(error)}") from error
        if len(optimizer.losses) != len(losses):
            raise InputError(
                f"step {step.step} of the journal has {len(losses)} losses, where the optimizer "
                f"takes {len(optimizer.losses)}"
            )
    optimizer.step()


@torch.no_grad()
def return_to(
    model: nn.Module, began: nn.Module, journal: Journal, steps: int, compile: bool | None
) -> None:
    """Give a model the weights that it had after so many steps of its run.

    ``began`` is another model, with the weights that the run began with.

    Raises:
        InputError: the journal does not have these steps, or ``began`` is another model.
    """
    rows, _ = rows_until(journal, 0, steps)
    optimizer = optimizer_of(journal.header, model, compile)
    first = dict(began.named_parameters())
    if blocks := blocks_of(model):
        blocks.begin_again()
    for name, parameter in trained_weights(model).items():
        if not blocks or parameter not in blocks.block_of:
            parameter.data.copy_(first[name])
    if checksum_of_trained(model) != journal.header.start:
        raise InputError(f"{journal.path} begins with other weights than the model has now")
    play(rows, optimizer, model)


def load_state(model: nn.Module, optimizer: HiZOO, checkpoint: Path) -> int:
    """Load the optimizer's state of a checkpoint; returns how many steps were done.

    Raises:
        InputError: the state cannot be loaded, or is of another run.
    """
    try:
        state = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
        optimizer.load_state_dict(state)
        read_hessians(model, optimizer, checkpoint)
    except Exception as error:  # whatever a damaged pickle, or another model's state, leads to
        raise InputError(
            f"{checkpoint / 'optimizer.pt'} does not fit the journal ({type(error).__name__}); "
            "give a checkpoint of its run, or the model that it began with"
        ) from error
    return optimizer.param_groups[0]["step"]
