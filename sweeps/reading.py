"""The command line of sweep.py: its own options, and a grid."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from sweeps.grid import Grid, read_grid
from utils import InputError, OneLineParser, exit_code

USAGE = "python sweep.py [GRID.yaml] [--NAME VALUES…]… [OPTIONS] [-- ARGUMENTS OF run.py]"
DESCRIPTION = """\
  python sweep.py runs/grids/hizoo.yaml -- --model_name facebook/opt-13b --task_name CB
  python sweep.py --learning_rate 1e-6 1e-7 --seed 0 1 2 --jobs 2 -- --task_name SST2 …
  python sweep.py --method '{lora: True, zo_eps: 1e-2}' '{prefix_tuning: True, zo_eps: 1e-1}' -- …

GRID.yaml holds arguments of run.py. Lists multiply; lists of {…} under a name of your own are
values that belong together. --NAME gives a list of values; it replaces the file's. What follows --
goes to every run, and replaces the file's values, too.

--slurm takes options of sbatch, as in "--gres=gpu:1 --time=24:00:00". It needs submitit; --jobs
then bounds the array.

The same command again skips finished runs and resumes the others. Exit codes: 0 all runs have
finished, 1 some failed, 2 bad input, 130 interrupted."""
SHARE = "each with its share of the cores or a GPU of its own"


def make_parser() -> OneLineParser:
    """Return the parser of the sweep's own options."""
    parser = OneLineParser(
        "sweep.py",
        USAGE,
        DESCRIPTION,
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
    )
    add, folder = parser.add_argument, "result/<name of the file>, or result/sweep-<hash>"
    add("--output_dir", metavar="DIR", type=Path, help=f"folder of the runs. Default: {folder}")
    add("--jobs", metavar="N", type=at_least_one, help=f"runs at a time, {SHARE}. Default: 1")
    add("--slurm", metavar="OPTIONS", help="submit the runs as a job array; see above")
    add("--dry_run", action="store_true", help="print the runs and their passes, and do nothing")
    return parser


def at_least_one(text: str) -> int:
    """Return a number of jobs."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number, at least 1")
    return int(text)


def read_command_line(argv: Sequence[str]) -> tuple[argparse.Namespace, Grid]:
    """Return the sweep's own options and its grid.

    Raises:
        InputError: a value is missing or wrong, or something is given twice.
    """
    border = argv.index("--") if "--" in argv else len(argv)
    words, further = list(argv[:border]), list(argv[border + 1 :])
    if "--slurm" in words[:-1]:  # its value begins with dashes, too
        at = words.index("--slurm")
        words[at : at + 2] = [f"--slurm={words[at + 1]}"]
    options, words = make_parser().parse_known_args(words)
    files: list[str] = []
    lists: dict[str, list[str]] = {}
    values = files
    for word in words:
        if not word.startswith("--"):
            values.append(word)
            continue
        name, _, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if name in lists:
            raise InputError(f"--{name} is given twice: give all of its values once")
        values = lists[name] = [value] if value else []
    if len(files) > 1:
        raise InputError(f"{files[1]}: a second grid, beside {files[0]}; give one")
    if options.output_dir is None:
        content = hashlib.sha256(json.dumps([lists, further]).encode()).hexdigest()
        options.output_dir = Path("result") / (
            Path(files[0]).stem if files else f"sweep-{content[:8]}"
        )
    return options, read_grid(Path(files[0]) if files else None, lists, further)


def begin(argv: Sequence[str]) -> None:
    """Refuse a command line that makes no sense before torch is imported, and print the help.

    Raises:
        SystemExit: it makes no sense, or only help is wanted.
    """
    if not argv:
        make_parser().print_help()
        sys.exit(2)
    if code := exit_code(lambda: int(not read_command_line(argv)[1].runs())):
        sys.exit(code)
