"""Make a fine-tuned model from the model it began with and the journal of its run, without data.

    python replay.py --model_name MODEL --journal result/<run>/journal.jsonl --output_dir DIR

The weights are those after the last step, or after any other (--steps), bit for bit on the same
kind of machine. --verify compares with the checksums that the run has left.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":
    # Before torch is imported: idle threads leave the cores to other programs.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from peft import PeftModel
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from command_line.settings import COMPILE
from experiment.folders import locked
from experiment.options import ModelOptions, TrainedWeights
from experiment.preparation import choose_trained_weights, load_pretrained
from experiment.training import save_model
from hizoo import HiZOO
from language_model.loading import choose_dtype, leave_out_loading_bars, load_config_and_tokenizer
from training.journal import Checksum, Header, Journal, Row, Scale, Step, read_journal
from training.optimizers import layers_of, make_optimizer
from training.recording import checksum_of, checksum_of_trained, replayed
from utils import InputError, OneLineParser, exit_code, one_line
from zeroth_order import noise


def parser() -> OneLineParser:
    """Return the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    made = OneLineParser("replay.py", description=__doc__, formatter_class=raw, allow_abbrev=False)
    add = made.add_argument
    add("--journal", type=Path, required=True, help="journal.jsonl of the run")
    add(
        "--model_name",
        help="the model that the run began with: Hub id, local directory or GGUF file. Default: "
        "the journal's",
    )
    add("--output_dir", type=Path, help="folder of the model; without it nothing is saved")
    add("--steps", type=int, help="how many steps of the run. Default: all")
    add(
        "--verify",
        action="store_true",
        help="compare with the run's checksums of the weights; exit code 1 if one differs",
    )
    add("--compile", choices=[*COMPILE], default="auto", help="as --zo_compile of run.py")
    add("--use_cpu", action="store_true", help="do not use a GPU. Default: if any")
    add("--trust_remote_code", action="store_true", help="run code that comes with the model")
    return made


def check(options: argparse.Namespace) -> Journal:
    """Read the journal, and refuse what cannot be done before a model is loaded.

    Raises:
        InputError: names the argument and the way out.
    """
    if options.steps is not None and options.steps < 0:
        raise InputError(f"--steps {options.steps}: must be at least 0")
    if options.output_dir is None and not options.verify:
        raise InputError("give --output_dir to save the model, or --verify to compare it")
    configs = ("config.json", "adapter_config.json")
    if options.output_dir and any((options.output_dir / name).exists() for name in configs):
        raise InputError(f"--output_dir {options.output_dir}: there is a model; give another one")
    journal = read_journal(options.journal)
    if journal is None:
        raise InputError(f"--journal {options.journal}: there is none, or it has no step")
    if journal.header.step:
        raise InputError(
            f"--journal {options.journal}: it begins with step {journal.header.step}, behind a "
            "checkpoint; the first steps are missing"
        )
    return journal


def load_start(
    options: argparse.Namespace, header: Header
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase, HiZOO]:
    """Return the model, its tokenizer and its optimizer, as they were before the first step.

    Of the header only values of known names and types are taken.

    Raises:
        InputError: a value does not fit, or the model is not the one that the run began with.
    """
    settings = header.settings
    name = options.model_name or header.model.get("name")
    if not name or not isinstance(name, str):
        raise InputError(f"{options.journal} names no model: give --model_name")
    gpu = None if options.use_cpu else torch.accelerator.current_accelerator(check_available=True)
    began = ModelOptions(
        name,
        choose_dtype(settings.get("load_float16") is True, settings.get("load_bfloat16") is True),
        spread=not options.use_cpu,
        device=gpu or torch.device("cpu"),
        trust_remote_code=options.trust_remote_code,
    )
    weights = TrainedWeights.of(settings)
    _, tokenizer = load_config_and_tokenizer(name, options.trust_remote_code)
    pretrained = load_pretrained(began)
    # Of all weights: those below an adapter are not trained.
    checksum = checksum_of(pretrained.parameters())
    model = choose_trained_weights(pretrained, weights, tokenizer, print)
    optimizer = optimizer_of(header, model, COMPILE[options.compile])
    is_same = settings.get("weights", checksum) == checksum
    if not is_same or checksum_of_trained(model) != header.start:
        raise InputError(
            f"--model_name {name}: its weights are not those that the run began with; give "
            f"{header.model.get('name')}, as it was then"
        )
    return model, tokenizer, optimizer


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
    layers = layers_of(model, checked=True) if header.layerwise else None
    config = replace(header.optimizer, compile=compile)
    return make_optimizer(model, header.groups, config, layers, f"the journal's μ {config.eps:g}")


def rows_until(journal: Journal, steps: int) -> list[Row]:
    """Return the rows of the first ``steps`` steps; raises InputError if there are fewer."""
    if journal.steps < steps:
        why = f" ({journal.fault})" if journal.fault else ""
        raise InputError(
            f"{journal.path} has {journal.steps} steps{why}, not {steps}; give --steps "
            f"{journal.steps}"
        )
    return [row for row in journal.rows if row.step + isinstance(row, Step) <= steps]


def play(
    rows: Sequence[Row],
    optimizer: HiZOO,
    model: nn.Module,
    compare: bool = False,
    on_step: Callable[[], object] = lambda: None,
) -> tuple[list[int], int | None]:
    """Do the steps of a journal with its losses in place of forward passes.

    With ``compare`` the weights are compared with the run's checksums. Returns the steps after
    which they were, and the first of these with other weights, where comparing ends.

    Raises:
        InputError: a row does not fit the model.
    """
    compared, different = [], None
    for row in rows:
        if isinstance(row, Scale):
            for group in optimizer.param_groups:
                group["eps"] = row.eps
        elif isinstance(row, Step):
            _do(row, optimizer)
            on_step()
        elif isinstance(row, Checksum) and compare and different is None:
            compared.append(row.step)
            if checksum_of_trained(model) != row.checksum:
                different = row.step
    return compared, different


def _do(step: Step, optimizer: HiZOO) -> None:
    """Do a recorded step."""
    for group in optimizer.param_groups:
        group["lr"] = step.lr
    for losses, weight in zip(step.losses, step.weights, strict=True):
        try:
            optimizer.estimate(replayed(losses), weight)
        except ValueError as error:  # μ does not fit the weights
            raise InputError(f"step {step.step} of the journal: {one_line(error)}") from error
    optimizer.step()


def replay(options: argparse.Namespace, journal: Journal) -> int:
    """Load the model, do the steps, save it, and print what came of it; returns the exit code.

    Raises:
        InputError: the model does not fit, or steps are missing.
        NotWritten: the disk is full.
    """
    to_the_end = options.steps is None
    rows = journal.rows if to_the_end else rows_until(journal, options.steps)
    model, tokenizer, optimizer = load_start(options, journal.header)
    total = sum(isinstance(row, Step) for row in rows)
    with tqdm(total=total, unit="step", disable=None) as bar:
        compared, different = play(rows, optimizer, model, options.verify, bar.update)
    print(f"{total:,} steps")
    is_damaged = to_the_end and journal.fault
    if is_damaged:
        print(f"damaged: {options.journal} ends there ({journal.fault})")
    if options.verify:
        print(verdict(compared, different))
    if different is not None:
        return 1
    if options.output_dir:
        save_model(model.save_pretrained, tokenizer, options.output_dir)
        print(f"model: {options.output_dir}")
    return 1 if is_damaged else 0


def verdict(compared: Sequence[int], different: int | None) -> str:
    """Return what the checksums tell."""
    if different is not None:
        return (
            f"different: after step {different:,} the weights are not, bit for bit, those of the "
            "run; another device, or --compile, rounds differently (without --verify they are "
            "saved)"
        )
    if compared:
        return f"verified: bit for bit the weights of the run after step {compared[-1]:,}"
    return "not verified: the journal has no checksum of these steps"


def run_command_line(argv: Sequence[str]) -> int:
    """Read the command line, and do what it says; returns the exit code."""
    options = parser().parse_args(argv)
    journal = check(options)
    if not options.output_dir:
        return replay(options, journal)
    with locked("--output_dir", options.output_dir, is_folder=True):
        return replay(options, journal)


def main(argv: Sequence[str]) -> int:
    """Run the command line; returns the exit code (``utils.exit_code``)."""
    leave_out_loading_bars()
    return exit_code(lambda: run_command_line(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
