"""From files or the Hub to the samples of a task."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from task_data.files import PlacedRow, errors_name, read_rows, row_place
from task_data.own_tasks import OwnTask
from task_data.sampling import permutation_subset
from tasks import Sample, Task, listed
from utils import InputError, first_line

logger = logging.getLogger(__name__)


def load_samples(
    task: Task, data_dir: str | None, with_validation: bool = True
) -> tuple[list[Sample], list[Sample]]:
    """Return all train and all validation samples; none of validation if they are not wanted.

    They come from ``split_files``, or else from the Hub or its local cache, whose test splits have
    no labels and are never used. Without a validation file a tenth of the training file is held
    out.
    """
    files = split_files(task, data_dir)
    if files is None:
        return _load_hub(task)
    train, validation = files
    for doubt in task.own_columns.doubts() if isinstance(task, OwnTask) else ():
        logger.warning("%s", doubt)
    samples = read_samples(task, train) if train else []
    if not with_validation:
        return samples, []
    return (samples, read_samples(task, validation)) if validation else _held_out(samples, train)


def _held_out(samples: list[Sample], file: Path) -> tuple[list[Sample], list[Sample]]:
    """Return nine tenths of the samples to train on, and the others, always the same ones."""
    if len(samples) < 2:
        raise InputError(f"{file} has one row, too few to hold any out: give --validation_file")
    held_out = permutation_subset(samples, max(1, len(samples) // 10), seed=0)
    rows = f"{len(held_out)} of the {len(samples)} rows of {file}"
    are = "is" if len(held_out) == 1 else "are"
    logger.warning(f"no --validation_file: {rows} {are} held out to report on")
    chosen = {sample.id for sample in held_out}
    return [sample for sample in samples if sample.id not in chosen], held_out


def split_files(task: Task, data_dir: str | None) -> tuple[Path | None, Path | None] | None:
    """Return the files of train and validation; None for one that the user lacks, or for the Hub.

    With ``data_dir`` they are ``DIR/<task>/train.jsonl`` and ``validation.jsonl`` (or ``.parquet``;
    ``.jsonl`` wins) in the Hub's schema; the folder's name may be in any case.
    """
    if isinstance(task, OwnTask):
        return task.train_file, task.validation_file
    if data_dir is None:
        return None
    root = Path(data_dir)
    if not root.is_dir():
        raise InputError(f"--data_dir {data_dir}: no such folder")
    folders = [path for path in sorted(root.iterdir()) if path.is_dir()]
    for folder in folders:
        if folder.name.lower() == task.name.lower():
            return _split_file(folder, "train"), _split_file(folder, "validation")
    found = listed(folder.name for folder in folders) or "none"
    raise InputError(f"--data_dir {data_dir}: no folder for {task.name}; folders found: {found}")


def _split_file(folder: Path, split: str) -> Path:
    for path in (folder / f"{split}.jsonl", folder / f"{split}.parquet"):
        if path.is_file():
            return path
    raise InputError(f"{folder}: neither {split}.jsonl nor {split}.parquet is there")


def read_samples(task: Task, path: Path, with_answers: bool = True) -> list[Sample]:
    """Return the samples of a file in their order; without answers the rows need none."""
    rows = task.rows(path, with_answers) if isinstance(task, OwnTask) else read_rows(path)
    return _samples(task, rows, with_answers)


def _samples(task: Task, rows: Iterable[PlacedRow], with_answers: bool = True) -> list[Sample]:
    samples = []
    for index, (place, row) in enumerate(rows):
        with errors_name(place):
            samples.append(task.sample(row, index, with_answers))
    return samples


def _load_hub(task: Task) -> tuple[list[Sample], list[Sample]]:
    import datasets  # Takes a second; runs with files do without it.

    hub_id = f"{task.hub_path} ({task.hub_config})" if task.hub_config else task.hub_path
    names = ["train", "validation"]
    try:
        splits = datasets.load_dataset(task.hub_path, task.hub_config, split=names)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"cannot load {hub_id} from the Hub ({first_line(error)}): "
            f"give the files with --data_dir DIR, in DIR/{task.name}"
        ) from error

    def samples_of(name: str, split: datasets.Dataset) -> list[Sample]:
        rows = enumerate(split.to_list())
        return _samples(task, ((row_place(f"{hub_id} {name}", i), row) for i, row in rows))

    train, validation = map(samples_of, names, splits)
    return train, validation
