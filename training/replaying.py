"""From pre-trained weights and a journal to the weights after any of its steps, without data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from hizoo import HiZOO
from training.journal import Journal
from training.optimizers import checked_layers, make_optimizer
from training.recording import checksum_of_trained, replayed
from training.rows import Checksum, Header, Row, Scale, Step
from utils import InputError, one_line
from zeroth_order import noise


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
    trained = {name for group in header.groups for name in group.parameters}
    parameters = dict(model.named_parameters())
    if missing := sorted(trained - parameters.keys()):
        raise InputError(f"{missing[0]} is in the journal, and not in the model")
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in trained)
    layers = checked_layers(model) if header.layerwise else None
    config = replace(header.optimizer, compile=compile)
    return make_optimizer(model, header.groups, config, layers, f"the journal's μ {config.eps:g}")


def rows_until(journal: Journal, steps: int | None) -> tuple[list[Row], str | None]:
    """Return the rows of the first ``steps`` steps, None: to the end or a damaged line.

    With them comes why they are fewer than asked for, None if they are not.

    Raises:
        InputError: the journal does not have them.
    """
    if steps is None:
        return journal.rows, journal.fault
    if journal.steps < steps:
        why = f" ({journal.fault})" if journal.fault else ""
        raise InputError(
            f"{journal.path} has {journal.steps} steps{why}, not {steps}; give --steps "
            f"{journal.steps}"
        )
    return [row for row in journal.rows if row.step + isinstance(row, Step) <= steps], None


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
        if isinstance(row, Scale):
            for group in optimizer.param_groups:
                group["eps"] = row.eps
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
        group["lr"] = step.lr
    for losses, weight in zip(step.losses, step.weights, strict=True):
        try:
            optimizer.estimate(replayed(losses), weight)
        except ValueError as error:  # μ does not fit the weights
            raise InputError(f"step {step.step} of the journal: {one_line(error)}") from error
        taken = len(optimizer.losses[0])
        if taken != len(losses):
            raise InputError(
                f"step {step.step} of the journal has {len(losses)} losses, where the optimizer "
                f"takes {taken}"
            )
    optimizer.step()
