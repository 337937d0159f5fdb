"""From pre-trained weights and a journal to the weights after any of its steps, without data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from example_directions import ExampleDirections
from hizoo import LARGEST_NOISE, HiZOO
from language_model.tensor_parallel import parts_of, whole_shape
from training.journal import Checksum, Journal, Record, Settings, Step
from training.recording import NOISE, checksum_of_trained, replayed, short, trained_weights
from utils import InputError
from zeroth_order.layerwise import LayerwiseWeights

# Shifts of the weights in place that a forward pass takes, at most: there, and to the next point.
SHIFTS_OF_A_PASS = 2
# Part of u by which another device's functions, or another order of operations, may change it.
NOISE_ERROR = 1e-5


class Outcome(NamedTuple):
    """What came of a replay.

    Attributes:
        steps: how many steps were done.
        compared: after how many steps checksums were compared.
        different: after the first of these the weights were not, bit for bit, those of the run;
            None: they always were.
        rounding: by as much a weight may differ from the run's, if that had another device.
    """

    steps: int
    compared: list[int]
    different: int | None
    rounding: float


def optimizer_of(header: Mapping[str, Any], model: nn.Module, compile: bool | None) -> HiZOO:
    """Return the optimizer that a journal's run had, before its first step.

    Parameters that the run did not train are frozen.

    Args:
        header: of the journal.
        model: with the weights, or the adapter, that the run began with.
        compile: as of ``HiZOO``.

    Raises:
        InputError: the model has other parameters, or the noise is another version's.
    """
    if header["noise"] != NOISE:
        raise InputError(f"the journal's noise is that of another version: {header['noise']}")
    parameters = dict(model.named_parameters())
    for name, (dtype, *shape) in header["parameters"].items():
        there = parameters.get(name)
        found = None if there is None else [short(there.dtype), *whole_shape(model, there)]
        if found != [dtype, *shape]:
            raise InputError(f"{name} is {[dtype, *shape]} in the journal and {found} in the model")
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in header["parameters"])
    saved = header["optimizer"]
    groups = [
        {key: value for key, value in group.items() if key != "parameters"}
        | {"params": [parameters[name] for name in group["parameters"]]}
        for group in saved["groups"]
    ]
    layers = directions = None
    if saved["layerwise"]:
        layers = LayerwiseWeights(model)
        layers.checked = True
    if saved["by_example"]:
        directions = ExampleDirections(model)
        directions.checked = True
    dtype = saved["hessian_dtype"]
    return HiZOO(
        groups,
        hessian=saved["hessian"],
        hessian_dtype=dtype and getattr(torch, dtype),
        num_samples=saved["num_samples"],
        step_size=saved["step_size"],
        curvature_every=saved["curvature_every"],
        clip=saved["clip"],
        layers=layers,
        directions=directions,
        shards=parts_of(model),
        normalize=saved["normalize"],
        seed=header["seed"],
        compile=compile,
    )


def records_until(journal: Journal, done: int, steps: int | None) -> list[Record]:
    """Return the records from ``done`` steps on, until so many steps are done in all.

    Raises:
        InputError: the journal does not have them.
    """
    records, _ = journal.after(done)
    wanted = journal.steps if steps is None else steps
    kept = [
        record
        for record in records
        if record.step < wanted or (record.step == wanted and not isinstance(record, Step))
    ]
    found = done + sum(isinstance(record, Step) for record in kept)
    if wanted < done:
        raise InputError(f"--steps {wanted}: the checkpoint has {done} already")
    if found < wanted:
        damaged = " before a damaged record" if found < journal.steps else ""
        raise InputError(
            f"{journal.path} has {found} steps{damaged}, not {wanted}; give --steps {found}"
            + (", or a checkpoint behind it as --model_name" if damaged else "")
        )
    return kept


def play(
    records: Sequence[Record],
    optimizer: HiZOO,
    model: nn.Module,
    compare: bool = False,
    on_step: Callable[[], None] = lambda: None,
) -> Outcome:
    """Do the steps of a journal with its losses in place of forward passes.

    Args:
        records: of the journal.
        optimizer: ``optimizer_of``, or with the state of a checkpoint.
        model: whose weights it changes.
        compare: whether the run's checksums are compared.
        on_step: called after every step.
    """
    steps, passes, compared, different = 0, 0, [], None
    by_example = optimizer.directions is not None
    for record in records:
        if isinstance(record, Settings):
            for group in optimizer.param_groups:
                group |= record.values
        elif isinstance(record, Step):
            set_rates(optimizer, record)
            for estimate in record.estimates:
                optimizer.estimate(replayed(estimate, by_example), estimate.weight)
                passes += len(estimate.passes)
            optimizer.step()
            steps += 1
            on_step()
        elif isinstance(record, Checksum) and compare and different is None:
            compared.append(record.step)
            if checksum_of_trained(model) != record.value:
                different = record.step
    return Outcome(steps, compared, different, rounding_of(optimizer, model, steps, passes))


@torch.no_grad()
def go_back(
    model: nn.Module, began: nn.Module, journal: Journal, steps: int, compile: bool | None
) -> None:
    """Give a model the weights that it had after so many steps of its run.

    Args:
        model: of the run.
        began: another one, with the weights that the run began with.
        journal: of the run.
        steps: how many.
        compile: as of the run.

    Raises:
        InputError: the journal does not have these steps, or ``began`` is another model.
    """
    records = records_until(journal, 0, steps)
    optimizer = optimizer_of(journal.header, model, compile)
    first = dict(began.named_parameters())
    for name, parameter in trained_weights(model).items():
        parameter.data.copy_(first[name])
    if checksum_of_trained(model) != journal.header["start"]:
        raise InputError(f"{journal.path} begins with other weights than the model has now")
    play(records, optimizer, model)


def set_rates(optimizer: HiZOO, record: Step) -> None:
    """Give the optimizer a step's η and α, where the journal has them."""
    for group in optimizer.param_groups:
        if record.rate is not None:
            group["lr"] = record.rate
        if record.smoothing is not None:
            group["hessian_smooth"] = record.smoothing


def rounding_of(optimizer: HiZOO, model: nn.Module, steps: int, passes: int) -> float:
    """Return by how much a weight may differ from that of a run on another device, at most.

    Every addition to a weight rounds by up to half a unit in its last place, here and there; a
    stochastic one by a unit. And u, as another device computes it, may differ in its last digits.
    """
    trained = list(trained_weights(model).values())
    in_place = optimizer.layers is None and optimizer.directions is None
    additions = steps + (SHIFTS_OF_A_PASS * passes if in_place else 0)
    rounding = 0.0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.numel():
                largest = (
                    float(parameter.detach().abs().max()) + LARGEST_NOISE * group["eps"] * in_place
                )
                unit = torch.finfo(parameter.dtype).eps * largest
                rounding = max(rounding, additions * unit)
    moved = max((group["eps"] for group in optimizer.param_groups), default=0.0) * LARGEST_NOISE
    return rounding + passes * moved * NOISE_ERROR * (len(trained) > 0)


def load_state(optimizer: HiZOO, checkpoint: Path) -> int:
    """Load the optimizer's state of a checkpoint; returns how many steps were done.

    Raises:
        InputError: the state cannot be loaded, or is of another run.
    """
    try:
        state = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
        optimizer.load_state_dict(state)
    except Exception as error:  # whatever a damaged pickle, or another model's state, leads to
        raise InputError(
            f"{checkpoint / 'optimizer.pt'} does not fit the journal ({type(error).__name__}); "
            "give a checkpoint of its run, or the model that it began with"
        ) from error
    return optimizer.param_groups[0]["step"]
