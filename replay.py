"""Make a fine-tuned model from the model it began with and the journal of its run, without data.

    python replay.py --model_name MODEL --journal result/<run>/journal.bin --output_dir DIR

The weights are those after the last step, or after any other (--steps), bit for bit on the same
kind of machine. --verify compares with the checksums that the run has left.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from experiment.folders import locked
from experiment.options import ModelOptions, TrainedWeights
from experiment.preparation import choose_trained_weights, load_pretrained
from language_model.loading import (
    choose_dtype,
    leave_out_loading_bars,
    load_config_and_tokenizer,
)
from training.journal import Journal, Step, read_journal
from training.recording import checksum_of_trained
from training.replaying import Outcome, load_state, optimizer_of, play, records_until
from utils import InputError, NotWritten, exit_code


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--journal", type=Path, required=True, help="journal.bin of the run")
    made.add_argument(
        "--model_name",
        help="the model that the run began with: Hub id, local directory or GGUF file; or a "
        "checkpoint of the run, behind which the journal goes on. Default: the journal's",
    )
    made.add_argument(
        "--output_dir", type=Path, help="folder of the model; without it nothing is saved"
    )
    made.add_argument("--steps", type=int, help="how many steps of the run. Default: all")
    made.add_argument(
        "--verify",
        action="store_true",
        help="compare with the checksums of the weights that the run has left, every 1,000 steps "
        "and at its end; exit code 1 if one differs",
    )
    made.add_argument(
        "--compile",
        choices=("auto", "yes", "no"),
        default="auto",
        help="as --zo_compile of run.py. Default: auto",
    )
    made.add_argument("--use_cpu", action="store_true", help="do not use a GPU. Default: if any")
    made.add_argument(
        "--trust_remote_code", action="store_true", help="run code that comes with the model"
    )
    return made


def model_and_weights(
    journal: Journal, options: argparse.Namespace
) -> tuple[ModelOptions, TrainedWeights]:
    """Return which model the run began with, and which of its weights were trained."""
    settings = journal.header["settings"]
    bits = 8 if settings.get("load_int8") else 4 if settings.get("load_int4") else None
    gpu = None if options.use_cpu else torch.accelerator.current_accelerator(check_available=True)
    model = ModelOptions(
        options.model_name or journal.header["model"]["name"],
        choose_dtype(bool(settings.get("load_float16")), bool(settings.get("load_bfloat16"))),
        bits,
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
    return journal


def replay(options: argparse.Namespace, journal: Journal) -> Outcome:
    """Load the model, do the steps, and save it.

    Raises:
        InputError: the model is not the one that the run began with, or steps are missing.
    """
    began, weights = model_and_weights(journal, options)
    name = began.name
    _, tokenizer = load_config_and_tokenizer(name, began.trust_remote_code)
    model = choose_trained_weights(load_pretrained(began), weights, tokenizer, print)
    compile = {"auto": None, "yes": True, "no": False}[options.compile]
    optimizer = optimizer_of(journal.header, model, compile)
    done = journal.header["first_step"]
    if (Path(name) / "optimizer.pt").is_file():
        done = load_state(optimizer, Path(name))
    elif done:
        raise InputError(
            f"{journal.path} begins with step {done}: give a checkpoint of its run as --model_name"
        )
    elif checksum_of_trained(model) != journal.header["start"]:
        raise InputError(
            f"--model_name {name}: its weights are not those that the run began with; give "
            f"{journal.header['model']['name']}, as it was then"
        )
    records = records_until(journal, done, options.steps)
    total = sum(isinstance(record, Step) for record in records)
    with tqdm(total=total, unit="step", disable=None) as bar:
        outcome = play(records, optimizer, model, options.verify, bar.update)
    if options.output_dir:
        save(model, tokenizer, options.output_dir)
    return outcome._replace(steps=done + outcome.steps)


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write the model, or its adapter, and the tokenizer.

    Raises:
        NotWritten: the disk is full.
    """
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except OSError as error:
        raise NotWritten.of(folder, error) from error


def lines(outcome: Outcome, options: argparse.Namespace) -> list[str]:
    """Return what came of it in words."""
    told = [f"{outcome.steps:,} steps"]
    if options.verify and outcome.different is not None:
        told.append(
            f"different: after step {outcome.different:,} the weights are not those of the run; on "
            f"another device or without its compiler a weight may differ by {outcome.rounding:.2g}"
        )
    elif options.verify and outcome.compared:
        last = outcome.compared[-1]
        told.append(f"verified: bit for bit the weights of the run after step {last:,}")
    elif options.verify:
        told.append("not verified: the journal has no checksum of these steps")
    return [*told, f"model: {options.output_dir}"] if options.output_dir else told


def run_command_line(argv: Sequence[str]) -> int:
    """Read the command line, and do what it says; returns 1 if the weights are not the run's."""
    options = parser().parse_args(argv)
    journal = check(options)
    if options.output_dir:
        with locked("--output_dir", options.output_dir, is_folder=True):
            outcome = replay(options, journal)
    else:
        outcome = replay(options, journal)
    print("\n".join(lines(outcome, options)))
    return 1 if outcome.different is not None else 0


def main(argv: Sequence[str]) -> int:
    """Run the command line; returns the exit code (``utils.exit_code``)."""
    leave_out_loading_bars()
    return exit_code(lambda: run_command_line(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
