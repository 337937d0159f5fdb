"""What step size and what μ a model, its data and its dtype want, measured by forward passes.

    python probe.py --task_name SST2 --model_name MODEL --trainer zo ... --plot probe.png

The arguments are those of run.py, and ``--plot``. ``--learning_rate auto`` and ``--zo_eps auto`` of
run.py make the same probe before the first step, and take what it finds.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from command_line.arguments import Arguments, parse_arguments
from command_line.checks import check
from command_line.settings import name_run, settle_dtype
from experiment.folders import locked
from experiment.preparation import choose_trained_weights, load_pretrained, make_trainer, prepare
from hizoo import FIRST_MEASUREMENTS, HiZOO
from language_model.loading import leave_out_loading_bars
from trainer import CURVATURE_PART, ZerothOrderTrainer
from training.step_sizes import StepSizes, find_step_sizes
from utils import InputError, exit_code, write_json

FILE = "probe.json"


def measure(trainer: ZerothOrderTrainer) -> StepSizes:
    """Probe the losses where a trainer stands: its weights, its training examples, its batch size.

    The weights are what they were afterwards, in place up to rounding.

    Raises:
        InputError: no μ or no step can be found; says why.
    """
    size, count = trainer.examples_of_a_batch, len(trainer.train_dataset)
    draw = np.random.RandomState([trainer.args.seed, trainer.state.global_step])
    order = draw.permutation(count)

    def loss_at(batch: int, direction: int, distance: float) -> float:
        numbers = [int(order[i % count]) for i in range(batch * size, (batch + 1) * size)]
        return trainer.loss_along(numbers, direction, distance)

    with kept_weights(trainer):
        found = find_step_sizes(loss_at)
    curvature = found.step.curvature
    part = CURVATURE_PART * (math.sqrt(size) if trainer.settings.directions == "example" else 1)
    return dataclasses.replace(found, learning_rate=part / (2 * curvature) if curvature else None)


@contextlib.contextmanager
def kept_weights(trainer: ZerothOrderTrainer) -> Iterator[None]:
    """Leave the weights as they are, whatever is tried in between.

    In place shifts are taken back, which rounds. In half precision a probe's many shifts would add
    up to more than a step's, so the trained weights are copied.
    """
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    in_place = trainer.optimizer.layers is None
    copied = [p.detach().clone() if in_place and p.element_size() < 4 else None for p in trained]
    try:
        yield
    finally:
        trainer.optimizer.restore()
        with torch.no_grad():
            for parameter, copy in zip(trained, copied, strict=True):
                if copy is not None:
                    parameter.copy_(copy)


def take(found: StepSizes, arguments: Arguments, optimizer: HiZOO) -> None:
    """Give the optimizer what was found for the arguments that are ``auto``.

    With ``--zo_eps auto`` alone, one μ for both g and c is taken if one serves both, since a second
    one takes further forward passes.
    """
    scales, probed = found.scales, arguments.probed
    eps, eps_of_c = optimizer.param_groups[0]["eps"], optimizer.param_groups[0]["curvature_eps"]
    chooses_both = "zo_eps" in probed and arguments.curvature_eps is None
    if "zo_eps" in probed:
        eps = scales.scale
        if chooses_both and optimizer.wants_curvature:
            eps = scales.shared_scale or scales.scale
    if "curvature_eps" in probed or chooses_both:
        own = scales.curvature_scale > eps
        eps_of_c = scales.curvature_scale if own and optimizer.wants_curvature else None
    for group in optimizer.param_groups:
        group["eps"], group["curvature_eps"] = eps, eps_of_c
        if "learning_rate" in probed:
            group["mean_curvature"] = found.step.curvature
            group["measured_steps"] = max(group["measured_steps"], FIRST_MEASUREMENTS)


def lines(found: StepSizes) -> Iterator[str]:
    """Yield what was found in words."""
    noise, scales, step = found.noise, found.scales, found.step
    yield (
        f"probe: noise of the loss {noise.noise:.2g}; μ of g {scales.scale:.2g} (exact to "
        f"{scales.error:.1%}), of c {scales.curvature_scale:.2g} ({scales.curvature_error:.1%})"
    )
    part = 2 * step.curvature * (found.learning_rate or 0)
    yield (
        f"probe: c̄ {step.curvature:.3g} ± {step.curvature_standard_error:.2g}, t* "
        f"{'none' if step.best is None else f'{step.best:.2g}'}; η = {part:.3g} / 2c̄ = "
        f"{found.learning_rate or 0:.2g}; {found.passes} forward passes"
    )
    for reason in (noise.reason, *scales.reasons, step.reason):
        if reason:
            yield f"probe: {reason}"


class Probing(TrainerCallback):
    """Probes before the first step, and every ``--probe_every`` steps, and takes what it finds.

    Where no argument is ``auto`` it does nothing.

    A run that goes on from a checkpoint finds its μ and c̄ there, and earlier probes in the file.

    Attributes:
        results: of all probes, each with its step.
    """

    def __init__(self, trainer: ZerothOrderTrainer, arguments: Arguments, folder: Path) -> None:
        self.trainer, self.arguments = trainer, arguments
        self.every = arguments.probe_every
        self.file = folder / FILE
        self.results: list[dict[str, Any]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Probe, or read what was found before the checkpoint."""
        if not self.arguments.probed:
            return
        if state.global_step == 0:
            self._probe(state.global_step)
        elif self.file.is_file():
            earlier = json.loads(self.file.read_text())["probes"]
            self.results = [probe for probe in earlier if probe["global_step"] <= state.global_step]

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Probe again."""
        if self.every and state.global_step % self.every == 0 < state.max_steps - state.global_step:
            self._probe(state.global_step)

    def _probe(self, step: int) -> None:
        found = measure(self.trainer)
        take(found, self.arguments, self.trainer.optimizer)
        self.trainer.recording.end_probe(step, self.trainer.optimizer)
        self.results.append({"global_step": step, **found.as_dict()})
        if self.trainer.args.process_index == 0:
            write_json(self.file, {"probes": self.results})
            for line in lines(found):
                tqdm.write(line)  # above the bar


def prepare_trainer(arguments: Arguments) -> ZerothOrderTrainer:
    """Return the trainer of a run's first set, with its optimizer, before the first step."""
    transformers.set_seed(arguments.seed)
    prepared = prepare(arguments)
    model = choose_trained_weights(
        arguments, load_pretrained(arguments), prepared.encoder.tokenizer, print
    )
    trainer = make_trainer(
        arguments, model, prepared, prepared.example_sets[0], Path(arguments.output_dir)
    )
    trainer.create_optimizer()
    return trainer


def run_command_line(argv: Sequence[str]) -> None:
    """Read the command line, measure, and write and draw what is found."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--plot", type=Path)
    own, others = parser.parse_known_args(argv)
    arguments = parse_arguments(others)
    check(arguments)
    if arguments.trainer != "zo":
        raise InputError(f"--trainer {arguments.trainer}: probe.py measures for --trainer zo")
    settle_dtype(arguments)
    name_run(arguments)
    file = Path(arguments.output_dir) / FILE
    with locked("--output_dir", file.parent, is_folder=True):
        found = measure(prepare_trainer(arguments))
        if found.step.best is None:
            raise InputError(found.step.reason)
        write_json(file, {"probes": [{"global_step": 0, **found.as_dict()}]})
    print("\n".join([*lines(found), f"result: {file}"]))
    if own.plot:
        from probe_plot import draw  # matplotlib takes a second to load

        draw(found, own.plot)
        print(f"picture: {own.plot}")


def main(argv: Sequence[str]) -> int:
    """Run the command line; returns the exit code (``utils.exit_code``)."""
    leave_out_loading_bars()
    return exit_code(lambda: run_command_line(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
