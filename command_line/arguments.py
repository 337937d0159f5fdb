"""The arguments of an experiment: those of ours, and all of transformers' Trainer."""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import HfArgumentParser, TrainingArguments

from command_line.contradictions import warning, without_effect
from command_line.declarations import AUTO
from command_line.effects import ON_GPU
from command_line.reading import GROUPS, OWN, Meaning, Values, read_values
from command_line.trainer_arguments import OTHERS
from training.processes import join, naming_lost_processes
from utils import InputError, one_line


@dataclass
class Arguments(Meaning, *reversed(GROUPS), TrainingArguments):
    """The arguments of the experiment, and all of transformers.TrainingArguments."""

    # The names of what a user or a script gives, and of what a user gives.
    given: frozenset[str] = field(default=frozenset(), init=False)
    given_by_user: frozenset[str] = field(default=frozenset(), init=False)
    # Names what is given without an effect.
    warning: str | None = field(default=None, init=False)
    # The hash of all settings that change the result, and the run's name (settings.name_run).
    experiment: str = field(default="", init=False)
    name: str = field(default="", init=False)

    def __post_init__(self) -> None:
        output_dir = self.output_dir
        if not torch.accelerator.is_available():
            self.use_cpu = True  # else processes of torchrun on CPUs would not find one another
        if self.ddp_backend and "LOCAL_RANK" not in os.environ:
            raise InputError(
                f"--ddp_backend {self.ddp_backend}: there is one process only; start several with "
                "torchrun, or leave it out"
            )
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()  # in a file a bar is one endless line
        if self.offload != "none" and self.trainer == "zo" and self.zo_perturbation == AUTO:
            # Streamed weights are perturbed as copies: a run may resume in memory, or streamed.
            self.zo_perturbation = "layerwise"
        self.choose_schedule()
        join(self.use_cpu, self.ddp_backend, self.ddp_timeout)
        with naming_lost_processes(self.ddp_timeout):
            super().__post_init__()
        # The Trainer would call it trainer_output; settings.name_run names it after the run.
        self.output_dir = output_dir
        # Batches of encoded examples have no columns that a model's forward could name.
        self.remove_unused_columns = False


@functools.cache
def _trainers_parser() -> HfArgumentParser:
    return HfArgumentParser(TrainingArguments, allow_abbrev=False, exit_on_error=False)


def _read_others(values: Values, names: Sequence[str]) -> dict[str, Any]:
    """Return the values of the Trainer's other arguments, as transformers reads them."""
    line = []
    for name in names:
        words = values.words[name]
        if name == "fsdp" and words == ["True"]:
            words = []  # "True" would be a sharding of that name
        # A value that begins with a dash would be taken for an argument.
        line += [f"--{name}={words[0]}"] if len(words) == 1 else [f"--{name}", *words]
    try:
        read = vars(_trainers_parser().parse_args(line))
    except argparse.ArgumentError as error:
        raise InputError(one_line(error)) from error
    return {name: read[name] for name in names}


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Read a command line; what has no effect is left out, and stands in ``warning``.

    ``checks.check`` then says whether the values go together.

    Raises:
        InputError: an argument is unknown, or its value is not of its kind or out of its bounds.
    """
    return make_arguments(read_values(argv))


def make_arguments(values: Values) -> Arguments:
    """Return the arguments of a command line that was read; see ``parse_arguments``."""
    unmet = without_effect(values)
    on_gpu = torch.accelerator.is_available() and not values.use_cpu
    if values.trainer == "regular" and not on_gpu:
        of_a_gpu = ("fp16", "bf16") if "bf16" not in values.given_by_user else ("fp16",)
        unmet |= {name: ON_GPU for name in of_a_gpu if getattr(values, name)}
    names = [name for name in values.given if name not in unmet]
    try:
        arguments = Arguments(
            **{name: values.given[name] for name in names if name in OWN},
            **_read_others(values, [name for name in names if name in OTHERS]),
        )
    except (ValueError, TypeError, ImportError, OSError, RuntimeError) as error:
        raise InputError(one_line(error)) from error
    arguments.given = frozenset(names)
    arguments.given_by_user = values.given_by_user.intersection(names)
    arguments.warning = warning(values, unmet)
    return arguments


def plain_value(value: Any) -> Any:
    """Return a value as JSON has it: that of an enumeration, the dictionary of a configuration."""
    return value.to_dict() if hasattr(value, "to_dict") else getattr(value, "value", value)
