"""Results of any number of runs as one table, and as a picture of their course.

python report.py result/demo --plot demo.png
python report.py result/*.json --columns seed --format latex
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from command_line.arguments import parse_arguments
from command_line.settings import changed_settings
from experiment.results import USED, history, read_result
from sweeps.tables import COLUMNS, FORMATS, FORMS, Loaded, Table
from training.checkpoints import last_checkpoint, read_trainer_state
from utils import InputError, check_writable, exit_code, write_text_atomically

RECORD = "sweep.json"
# Folders below those of results, with files of their own.
WITHOUT_RESULTS = ("checkpoint-", "slurm")


class OneLineParser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        """Raise InputError."""
        raise InputError(f"{message} (python report.py --help explains the arguments)")


def make_parser() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    parser = OneLineParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("places", nargs="+", type=Path, help="result files, and folders of them; of a sweep, too")
    add(
        "--columns",
        choices=COLUMNS,
        default="task",
        help="task (default): a column for each task, means over seeds. seed: one for each seed",
    )
    add("--show", choices=FORMS, default="metric", help="what the cells are. Default: metric")
    add(
        "--also",
        choices=FORMS,
        nargs="+",
        default=[],
        help="further columns, over all runs of a row. Default: none",
    )
    add("--percent", action="store_true", help="show metrics in percent. Default: fractions of 1")
    add("--format", choices=FORMATS, default="markdown", help="Default: markdown")
    add("--output", type=Path, help="file for the table. Default: it is printed")
    add("--plot", type=Path, help="file for a picture, .png, .pdf or .svg. Default: none")
    return parser


def load(places: Sequence[Path]) -> tuple[list[Loaded], int]:
    """Return the results in files and folders, those of running runs too, and how many are not.

    Raises:
        InputError: a place is not there, or holds no result.
    """
    found: dict[Path, Loaded | None] = {}
    for place in places:
        if not place.exists():
            raise InputError(f"{place}: no such file or folder")
        files = [place] if place.is_file() else sorted(_result_files(place))
        before = len(found)
        for file in files:
            result = read_result(file)
            if result:
                found[file.resolve()] = Loaded(file, result)
            elif place.is_file():
                raise InputError(f"{file}: this is no result of a run")
        if place.is_dir():
            found |= _unfinished(place, found)
            if not found or (len(found) == before and not files):
                raise InputError(f"{place}: there is no result of a run in it")
    loaded = [part for each in found.values() if each for part in _sets(each)]
    return loaded, sum(each is None or not each.is_finished for each in found.values())


def _result_files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*.json"):
        inside = path.relative_to(folder).parts[:-1]
        if not any(name.startswith(WITHOUT_RESULTS) for name in inside):
            yield path


def _sets(each: Loaded) -> Iterator[Loaded]:
    """Yield the runs of several training sets one by one."""
    for run in each.result.get("runs", [each.result]):
        settings = {**each.settings, "train_set_seed": run.get("train_set_seed")}
        yield Loaded(each.path, {**each.result, **run, "settings": settings}, each.is_finished)


def _unfinished(folder: Path, found: Mapping[Path, Any]) -> dict[Path, Loaded | None]:
    """Return the runs of sweeps in a folder that have no result yet; None: nothing saved."""
    unfinished: dict[Path, Loaded | None] = {}
    for record in sorted(folder.rglob(RECORD)):
        for name, words in json.loads(record.read_text(encoding="utf-8"))["runs"].items():
            path = record.parent / f"{name}.json"
            if path.resolve() not in found:
                unfinished[path.resolve()] = _running(record.parent / name, path, words)
    return unfinished


def _running(folder: Path, path: Path, words: Sequence[str]) -> Loaded | None:
    """Return what the newest checkpoint of a run says of its course."""
    checkpoint = last_checkpoint(folder)
    state = read_trainer_state(checkpoint) if checkpoint else None
    if not state:
        return None
    arguments = parse_arguments(words)
    settings = changed_settings(arguments)
    # What a result says in place of these is not known yet.
    known = {n: v for n, v in settings.items() if n not in USED or v not in (None, "auto")}
    result = {
        "task": arguments.task.name,
        "trainer": arguments.trainer,
        "settings": known,
        "history": history(state["log_history"], arguments.task.metric_name),
    }
    return Loaded(path, result, is_finished=False)


def report(argv: Sequence[str]) -> None:
    """Read the command line, and write its table and its picture."""
    arguments = make_parser().parse_args(argv)
    loaded, unfinished = load(arguments.places)
    for name in ("output", "plot"):
        if file := getattr(arguments, name):
            check_writable(f"--{name}", file)
    table = Table.of(loaded, arguments.columns, arguments.show, arguments.also)
    if arguments.plot:
        from sweeps.curves import draw  # matplotlib takes a second to load

        draw(loaded, arguments.plot)
    text = FORMATS[arguments.format](table, arguments.percent)
    if arguments.output:
        write_text_atomically(arguments.output, text)
    else:
        print(text, end="")
    if unfinished:
        print(f"{unfinished} runs have no result yet", file=sys.stderr)


def main(argv: Sequence[str]) -> int:
    """Run the command line; returns the exit code: 0 done, 1 not written, 2 bad input."""
    return exit_code(lambda: report(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
