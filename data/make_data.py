"""Write the bundled samples: small invented data sets for all eleven tasks, in the Hub's schemas.

    python data/make_data.py

writes `data/samples/<task>/{train,validation}.jsonl`, one JSON object a line, with the column
names and types of the data sets that the tasks load from the Hub. No line is taken from any of
them: the sentences come from the templates of sample_sentences.py and sample_passages.py and the
word lists of sample_words.py. The same seed writes the same bytes on every machine. Needs Python
alone.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sample_passages import boolq_row, drop_row, multirc_rows, record_row, squad_row
from sample_sentences import Row, cb_row, copa_row, rte_row, sst2_row, wic_row, wsc_row

# A draw is a list of rows that belong together and are never split between the two files.
Draw = Callable[[random.Random, int], list[Row]]


@dataclass(frozen=True)
class TaskSamples:
    """How one task's rows are drawn, how many there are, and what makes a row a new one."""

    draw: Draw
    unique_by: tuple[str, ...]
    num_labels: int = 2
    num_train: int = 700
    num_validation: int = 200


def one(make_row: Callable[[random.Random, int], Row]) -> Draw:
    """A draw of one labelled row."""
    return lambda rng, label: [make_row(rng, label)]


def unlabelled(make_row: Callable[[random.Random], Row]) -> Draw:
    """A draw of one row that has an answer in place of a label."""
    return lambda rng, label: [make_row(rng)]


TASKS: dict[str, TaskSamples] = {
    "sst2": TaskSamples(one(sst2_row), ("sentence",), num_train=1600, num_validation=500),
    "rte": TaskSamples(one(rte_row), ("premise",)),
    "cb": TaskSamples(one(cb_row), ("premise",), num_labels=3, num_train=400, num_validation=100),
    "boolq": TaskSamples(one(boolq_row), ("passage",)),
    "wsc": TaskSamples(one(wsc_row), ("text",)),
    "wic": TaskSamples(one(wic_row), ("sentence1", "sentence2")),
    "multirc": TaskSamples(lambda rng, label: multirc_rows(rng), ("paragraph",)),
    "copa": TaskSamples(
        one(copa_row),
        ("premise", "choice1", "choice2"),
        num_train=400,
        num_validation=100,
    ),
    "record": TaskSamples(unlabelled(record_row), ("passage",)),
    "squad": TaskSamples(unlabelled(squad_row), ("context",)),
    "drop": TaskSamples(unlabelled(drop_row), ("passage",)),
}


def draw_rows(rng: random.Random, task: TaskSamples, count: int, seen: set[str]) -> list[Row]:
    """`count` shuffled rows, labels in turn, none like those already in `seen`, which grows."""
    groups: list[list[Row]] = []
    drawn = 0
    while drawn < count:
        group = task.draw(rng, len(groups) % task.num_labels)
        key = json.dumps([group[0][column] for column in task.unique_by])
        if key not in seen:
            seen.add(key)
            groups.append(group)
            drawn += len(group)
    rng.shuffle(groups)
    return [row for group in groups for row in group][:count]


def number_rows(name: str, split: str, rows: list[Row]) -> list[Row]:
    """The rows with the running numbers and identifiers that the Hub's schema of `name` has."""
    if name == "boolq":
        return rows
    if name == "squad":
        return [{"id": f"{split}-{number:05d}", **row} for number, row in enumerate(rows)]
    if name == "drop":
        return [
            {"section_id": f"game_{number}", "query_id": f"{split}-{number:05d}", **row}
            for number, row in enumerate(rows)
        ]
    if name == "record":
        return [{**row, "idx": {"passage": n, "query": n}} for n, row in enumerate(rows)]
    if name == "multirc":
        return number_answers(rows)
    return [{"idx": number, **row} for number, row in enumerate(rows)]


def number_answers(rows: list[Row]) -> list[Row]:
    """MultiRC rows with paragraphs, questions and answers numbered through the whole file."""
    paragraphs: dict[str, int] = {}
    questions: dict[tuple[str, str], int] = {}
    numbered = []
    for number, row in enumerate(rows):
        text, question = row["paragraph"], row["question"]
        idx = {
            "paragraph": paragraphs.setdefault(text, len(paragraphs)),
            "question": questions.setdefault((text, question), len(questions)),
            "answer": number,
        }
        numbered.append({**row, "idx": idx})
    return numbered


def make_task(name: str, seed: int) -> dict[str, list[Row]]:
    """Both splits of one task, a function of its name and the seed alone."""
    task, rng, seen = TASKS[name], random.Random(f"{name}-{seed}"), set[str]()
    sizes = {"train": task.num_train, "validation": task.num_validation}
    return {
        split: number_rows(name, split, draw_rows(rng, task, size, seen))
        for split, size in sizes.items()
    }


def write_jsonl(path: Path, rows: list[Row]) -> None:
    """Write one JSON object a line, with the same bytes on every system."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(text.encode())


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).resolve().parent / "samples",
        help="folder to write <task>/{train,validation}.jsonl into (default: samples, here)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of every random choice (default: 0)"
    )
    parser.add_argument(
        "--task",
        nargs="+",
        choices=sorted(TASKS),
        default=sorted(TASKS),
        help="tasks to write (default: all)",
    )
    return parser.parse_args()


def main() -> None:
    """Write the files and say how large they are."""
    arguments = parse_arguments()
    for name in arguments.task:
        for split, rows in make_task(name, arguments.seed).items():
            path = arguments.output / name / f"{split}.jsonl"
            write_jsonl(path, rows)
            print(f"{path}: {len(rows)} rows, {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
