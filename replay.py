"""Make a fine-tuned model from the model it began with and the journal of its run, without data.

    python replay.py --model_name MODEL --journal result/<run>/journal.jsonl --output_dir DIR

The weights are those after the last step, or after any other (--steps), bit for bit on the same
kind of machine. --verify compares with the checksums that the run has left.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    # Before torch is imported: idle threads leave the cores to other programs.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from command_line.settings import COMPILE
from experiment.folders import locked
from experiment.options import ModelOptions, TrainedWeights
from experiment.preparation import choose_trained_weights, load_pretrained
from experiment.training import save_model
from hizoo import HiZOO
from language_model.loading import choose_dtype, leave_out_loading_bars, load_config_and_tokenizer
from training.journal import Journal, read_journal
from training.recording import checksum_of, checksum_of_trained
from training.replaying import Outcome, optimizer_of, play, rows_until
from training.rows import Header, Step
from utils import InputError, OneLineParser, exit_code


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


def model_and_weights(
    header: Header, options: argparse.Namespace
) -> tuple[ModelOptions, TrainedWeights]:
    """Return which model the run began with, and which of its weights were trained.

    Of the header only values of known names and types are taken.

    Raises:
        InputError: a value is not one that an argument takes, or the model has no name.
    """
    settings = header.settings
    name = options.model_name or header.model.get("name")
    if not name or not isinstance(name, str):
        raise InputError(f"{options.journal} names no model: give --model_name")
    gpu = None if options.use_cpu else torch.accelerator.current_accelerator(check_available=True)
    model = ModelOptions(
        name,
        choose_dtype(settings.get("load_float16") is True, settings.get("load_bfloat16") is True),
        spread=not options.use_cpu,
        device=gpu or torch.device("cpu"),
        trust_remote_code=options.trust_remote_code,
    )
    return model, TrainedWeights.of(settings)


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

    Raises:
        InputError: the model is not the one that the run began with.
    """
    began, weights = model_and_weights(header, options)
    _, tokenizer = load_config_and_tokenizer(began.name, began.trust_remote_code)
    pretrained = load_pretrained(began)
    # Of all weights: those below an adapter are not trained.
    checksum = checksum_of(pretrained.parameters())
    model = choose_trained_weights(pretrained, weights, tokenizer, print)
    optimizer = optimizer_of(header, model, COMPILE[options.compile])
    is_same = header.settings.get("weights", checksum) == checksum
    if not is_same or checksum_of_trained(model) != header.start:
        raise InputError(
            f"--model_name {began.name}: its weights are not those that the run began with; give "
            f"{header.model.get('name')}, as it was then"
        )
    return model, tokenizer, optimizer


def replay(options: argparse.Namespace, journal: Journal) -> int:
    """Load the model, do the steps, save it, and print what came of it; returns the exit code.

    Raises:
        InputError: the model does not fit, or steps are missing.
        NotWritten: the disk is full.
    """
    rows, fault = rows_until(journal, options.steps)
    model, tokenizer, optimizer = load_start(options, journal.header)
    total = sum(isinstance(row, Step) for row in rows)
    with tqdm(total=total, unit="step", disable=None) as bar:
        outcome = play(rows, optimizer, model, options.verify, bar.update)
    print(f"{outcome.steps:,} steps")
    if fault:
        print(f"damaged: {options.journal} ends there ({fault})")
    if options.verify:
        print(verdict(outcome))
    if outcome.different is not None:
        return 1
    if options.output_dir:
        save_model(model.save_pretrained, tokenizer, options.output_dir)
        print(f"model: {options.output_dir}")
    return 1 if fault else 0


def verdict(outcome: Outcome) -> str:
    """Return what the checksums tell."""
    if outcome.different is not None:
        return (
            f"different: after step {outcome.different:,} the weights are not, bit for bit, those "
            "of the run; another device, or --compile, rounds differently (without --verify they "
            "are saved)"
        )
    if outcome.compared:
        return f"verified: bit for bit the weights of the run after step {outcome.compared[-1]:,}"
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
