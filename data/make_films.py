"""Write examples/films: 300 film reviews with a label, and 40 without one, in columns of their own.

The sentences are those of the bundled SST2 samples' kind, drawn with another seed.
"""

from __future__ import annotations

import csv
import random
from pathlib import Path

from make_data import TASKS, draw_rows
from sample_words import TOWNS

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "films"
WORDS = ("terrible", "great")


def write(path: Path, names: tuple[str, ...], rows: list[tuple[object, ...]]) -> None:
    """Write a CSV file, with the same bytes on every system."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        writer.writerows(rows)


def main() -> None:
    """Write both files."""
    rng, seen = random.Random("films"), set[str]()
    films = draw_rows(rng, TASKS["sst2"], 300, seen)
    new = draw_rows(rng, TASKS["sst2"], 40, seen)
    labelled = [(row["sentence"].strip(), WORDS[row["label"]]) for row in films]
    write(FOLDER / "films.csv", ("text", "label"), labelled)
    unlabelled = [
        (f"R{number:03}", rng.choice(TOWNS), row["sentence"].strip())
        for number, row in enumerate(new, start=1)
    ]
    write(FOLDER / "new.csv", ("id", "cinema", "text"), unlabelled)


if __name__ == "__main__":
    main()
