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

from tqdm.auto import tqdm

from command_line.arguments import TUNING_MODES, Arguments, parse_arguments
from command_line.settings import WEIGHTS
from experiment.folders import locked
from experiment.preparation import choose_trained_weights, load_pretrained
from language_model.loading import leave_out_loading_bars, load_config_and_tokenizer
from training.journal import Journal, Step, read_journal
from training.recording import checksum_of_trained
from training.replaying import Outcome, load_state, optimizer_of, play, records_until
from utils import InputError, NotWritten, exit_code

# What decides which weights a run trains, beside its model.
OF_THE_WEIGHTS = (*WEIGHTS, *TUNING_MODES, "untie_emb", "seed")


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


def arguments_of(journal: Journal, options: argparse.Namespace) -> Arguments:
    """Return run.py's arguments, as far as they decide which weights were trained."""
    settings = journal.header["settings"]
    name = options.model_name or journal.header["model"]["name"]
    line = ["--trainer", "zo", "--model_name", name]
    modes = [mode for mode in TUNING_MODES if settings.get(mode)]
    names = (*OF_THE_WEIGHTS, *(own for mode in modes for own in TUNING_MODES[mode]))
    for each in names:
        if settings.get(each) is not None:
            line += [f"--{each}", str(settings[each])]
    for flag in ("use_cpu", "trust_remote_code"):
        line += [f"--{flag}"] if getattr(options, flag) else []
    return parse_arguments(line)


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
    arguments = arguments_of(journal, options)
    name = arguments.model_name
    _, tokenizer = load_config_and_tokenizer(name, arguments.trust_remote_code)
    model = choose_trained_weights(arguments, load_pretrained(arguments), tokenizer, print)
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
