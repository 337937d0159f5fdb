"""What the command line says: ``Arguments``, and what rooms below take, which do not see them."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.modeling import convert_file_size_to_int

from command_line.arguments import Arguments
from command_line.declarations import AUTO
from command_line.reading import OWN, TUNING_MODES
from command_line.settings import changed_settings, length_of_run, settings_of_a_checkpoint
from language_model.generation import GenerationSettings
from language_model.loading import choose_dtype
from language_model.streaming import Offload
from task_data.sampling import ExampleSet, draw_example_sets
from tasks import Sample, Task
from utils import InputError, one_line


@dataclass(frozen=True)
class ModelOptions:
    """Which model is loaded, and how."""

    name: str
    dtype: torch.dtype
    spread: bool  # over all GPUs of one process
    device: torch.device | None  # None: sharding moves each layer itself
    trust_remote_code: bool
    offload: Offload | None = None


@dataclass(frozen=True)
class TrainedWeights:
    """Which weights are trained; ``mode`` is one of ``TUNING_MODES``, or None: all weights."""

    mode: str | None
    seed: int
    untie_emb: bool
    lora_r: int
    lora_alpha: int
    num_prefix: int
    no_reparam: bool
    prefix_init_by_real_act: bool
    lp_early_stopping: bool

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> TrainedWeights:
        """Read settings by their names, those of an earlier run too; others are ignored.

        Raises InputError for a value of another type, or out of its argument's bounds.
        """
        values = {}
        for field in dataclasses.fields(cls)[1:]:
            name, argument = field.name, OWN[field.name]
            given = settings.get(name)
            values[name] = value = argument.default if given is None else given
            try:
                if type(value) is not argument.kind:
                    raise ValueError(f"must be of type {argument.kind.__name__}")
                argument.read([str(value)])
            except ValueError as error:
                raise InputError(f"{name} {reprlib.repr(value)}: {error}") from error
        mode = next((mode for mode in TUNING_MODES if settings.get(mode) is True), None)
        return cls(mode, **values)


@dataclass(frozen=True)
class Options:
    """What an experiment is told."""

    arguments: Arguments
    model: ModelOptions
    weights: TrainedWeights
    generation: GenerationSettings
    folders: tuple[Path, ...]  # of each set's checkpoints, journal and model
    predictions: tuple[Path, ...]  # each set's rows; empty: not written
    settings: Mapping[str, Any]  # of the result
    course: Mapping[str, Any]  # what decides the course of the training
    length: Mapping[str, float]  # max_steps or num_train_epochs; empty without steps

    @property
    def task(self) -> Task:
        """The task, or the user's own examples."""
        return self.arguments.task

    @property
    def trains(self) -> bool:
        """Whether weights are trained."""
        return self.arguments.trainer != "none"

    @property
    def resume_from(self) -> str | None:
        """A checkpoint, "true" or "false"; None: the newest, if any."""
        given = self.arguments.resume_from_checkpoint
        return given.lower() if str(given).lower() in ("true", "false") else given

    def draw(self, train: list[Sample], validation: list[Sample]) -> list[ExampleSet]:
        """Draw the examples of every run."""
        arguments = self.arguments
        return draw_example_sets(
            train,
            validation,
            num_train=arguments.num_train,
            num_dev=arguments.num_dev or 0,
            num_eval=None if arguments.predict_file else arguments.num_eval,
            num_train_sets=arguments.num_train_sets,
            train_set_seed=arguments.train_set_seed,
            in_context=not self.trains,
        )

    @property
    def of_run(self) -> dict[str, Any]:
        """What decides the course of the training, and its length."""
        return {**self.course, **self.length}


def options_of(arguments: Arguments) -> Options:
    """Return what checked arguments say."""
    generation = {
        field.name: getattr(arguments, field.name)
        for field in dataclasses.fields(GenerationSettings)
    }
    generation["eos_token"] = arguments.eos_token.replace("\\n", "\n")
    # Several sets have a folder each.
    sets = arguments.num_train_sets or 1
    names = [f"set{seed}" for seed in range(sets)] if sets > 1 else [""]
    rows = arguments.predictions_file and Path(arguments.predictions_file)
    return Options(
        arguments,
        ModelOptions(
            arguments.model_name,
            choose_dtype(arguments.load_float16, arguments.load_bfloat16),
            not arguments.no_auto_device,
            None if arguments.fsdp else arguments.device,
            arguments.trust_remote_code,
            _offload_of(arguments),
        ),
        TrainedWeights.of(vars(arguments)),
        GenerationSettings(**generation),
        tuple(Path(arguments.output_dir or "", name) for name in names),
        tuple(rows.with_stem(f"{rows.stem}-{name}") if name else rows for name in names if rows),
        changed_settings(arguments),
        settings_of_a_checkpoint(arguments),
        length_of_run(arguments),
    )


def _offload_of(arguments: Arguments) -> Offload | None:
    """Return where the weights of blocks lie; None: all of them in memory."""
    if arguments.offload == "none":
        return None
    folder = Path(arguments.offload_dir or arguments.output_dir or ".")
    try:
        memory = convert_file_size_to_int(arguments.offload_memory)
    except ValueError as error:
        raise InputError(f"--offload_memory: {one_line(error)}") from error
    every = arguments.offload_write_every
    on_disk = folder if arguments.offload == "disk" else None
    return Offload(on_disk, memory, arguments.device, None if every == AUTO else every)
