"""Results of any number of runs as one table, and as a picture of their course.

python report.py result/demo --plot demo.png
python report.py result/*.json --columns seed --format latex
"""

from __future__ import annotations

import re
import sys
from argparse import RawTextHelpFormatter
from collections.abc import Sequence
from pathlib import Path

from sweeps.results import RECORD, Outcome, read_outcomes, read_sweep, with_names
from sweeps.slurm import FOLDER, JOBS
from sweeps.tables import COLUMNS, FORMATS, FORMS, make_table
from utils import (
    InputError,
    OneLineParser,
    check_writable,
    exit_code,
    read_json,
    write_text_atomically,
)

# Folders with such names hold JSON files that are no results.
WITHOUT_RESULTS = re.compile(rf"{FOLDER}|checkpoint-\d+")
NO_RESULT = "this is no result of a run"


def make_parser() -> OneLineParser:
    """Return the parser of the command line."""
    raw = RawTextHelpFormatter
    parser = OneLineParser("report.py", None, __doc__, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    add("places", nargs="+", type=Path, help="result files, and folders of results or sweeps")
    columns = "task (default): a column for each task, means over seeds. seed: one for each seed"
    add("--columns", choices=COLUMNS, default="task", help=columns)
    add("--show", choices=FORMS, default="metric", help="what the cells show. Default: metric")
    add("--also", choices=FORMS, nargs="+", default=[], help="further columns. Default: none")
    add("--percent", action="store_true", help="show metrics in percent. Default: fractions of 1")
    add("--format", choices=FORMATS, default="markdown", help="Default: markdown")
    add("--output", type=Path, help="file for the table. Default: it is printed")
    add("--plot", type=Path, help="file for a picture, .png, .pdf or .svg. Default: none")
    add("--overwrite", action="store_true", help="replace the files of --output and --plot")
    return parser


def load(places: Sequence[Path]) -> list[Outcome]:
    """Return the runs of files and folders, those of sweeps even without a result.

    Raises:
        InputError: a place is not there, or holds no result.
    """
    found: dict[Path, list[Outcome]] = {}
    for place in places:
        if not place.exists():
            raise InputError(f"{place}: no such file or folder")
        if place.name in (RECORD, JOBS):  # as a shell finds them beside results
            outcomes = read_sweep(place.parent)
        else:
            outcomes = _in_folder(place) if place.is_dir() else {place: read_outcomes(place)}
        if not any(outcomes.values()):
            what = "there is no result of a run in it" if place.is_dir() else NO_RESULT
            raise InputError(f"{place}: {what}")
        found |= {path.resolve(): runs for path, runs in outcomes.items()}
    return with_names([each for runs in found.values() for each in runs])


def _in_folder(folder: Path) -> dict[Path, list[Outcome]]:
    """Return the runs of a folder by their result files."""
    outcomes = {}
    for file in sorted(folder.rglob("*.json")):
        if any(map(WITHOUT_RESULTS.fullmatch, file.relative_to(folder).parts[:-1])):
            continue
        if runs := read_outcomes(file):
            outcomes[file] = runs
        elif not read_json(file):
            print(f"{file}: {NO_RESULT}; it is left out", file=sys.stderr)
    for record in sorted(folder.rglob(RECORD)):
        outcomes |= read_sweep(record.parent)
    return outcomes


def check_new(option: str, path: Path, replaces: bool) -> None:
    """Check that a file can be written, and replaces none that the user may need.

    Raises:
        InputError: it is there already, or cannot be written.
    """
    check_writable(option, path)
    if read_outcomes(path) or path.name == RECORD:
        raise InputError(f"{option} {path}: this is a result; give another name")
    if path.exists() and not replaces:
        raise InputError(f"{option} {path} is there: give another name, or --overwrite")


def report(argv: Sequence[str]) -> None:
    """Write the table and the picture that a command line asks for."""
    arguments = make_parser().parse_args(argv)
    outcomes = load(arguments.places)
    for name in ("output", "plot"):
        if file := getattr(arguments, name):
            check_new(f"--{name}", file, arguments.overwrite)
    output, plot = arguments.output, arguments.plot
    if output and plot and output.resolve() == plot.resolve():
        raise InputError(f"--output {output} --plot {plot}: the same file; give two names")
    table = make_table(outcomes, arguments.columns, arguments.show, arguments.also)
    if arguments.plot:
        from sweeps.curves import draw  # matplotlib takes a second to load

        draw(outcomes, arguments.plot)
    text = FORMATS[arguments.format](table, arguments.percent)
    if arguments.output:
        write_text_atomically(arguments.output, text)
    else:
        print(text, end="")
    if left := sum(not each.is_finished for each in outcomes):
        print(f"{left} runs have no result yet", file=sys.stderr)


def main(argv: Sequence[str]) -> int:
    """Run the command line; returns the exit code: 0 done, 1 not written, 2 bad input."""
    return exit_code(lambda: report(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
