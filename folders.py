"""Where the files of a run go, and how its folders are kept from other runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from accelerate.utils import broadcast_object_list

from command_line.arguments import Arguments
from utils import InputError, locked_folder


def set_names(arguments: Arguments) -> list[str]:
    """Return what each run's folder in output_dir is called: nothing where there is only one."""
    sets = arguments.num_train_sets or 1
    return [f"set{seed}" for seed in range(sets)] if sets > 1 else [""]


def run_folders(arguments: Arguments) -> list[Path]:
    """Return the folders of all runs, for their checkpoints and models."""
    return [Path(arguments.output_dir, name) for name in set_names(arguments)]


def predictions_files(arguments: Arguments) -> list[Path]:
    """Return where the predictions of each run go; none if they are not asked for."""
    if not arguments.predictions_file:
        return []
    path = Path(arguments.predictions_file)
    names = set_names(arguments)
    return [path.with_stem(f"{path.stem}-{name}") if name else path for name in names]


def has_all_files(arguments: Arguments) -> bool:
    """Whether the predictions and the model lie where they are asked for, beside a result."""
    predictions = all(path.is_file() for path in predictions_files(arguments))
    configs = ("config.json", "adapter_config.json")
    models = not arguments.save_model or all(
        any((folder / name).is_file() for name in configs) for folder in run_folders(arguments)
    )
    return predictions and models


@contextlib.contextmanager
def locked_folders(arguments: Arguments) -> Iterator[None]:
    """Keep the folders of all runs from other jobs; the first process locks them for all.

    An evaluation alone has none.

    Raises:
        InputError: another job has one of them.
    """
    with contextlib.ExitStack() as stack:
        refusal = None
        if arguments.process_index == 0 and arguments.trainer != "none":
            try:
                for folder in run_folders(arguments):
                    stack.enter_context(locked_folder("--output_dir", folder))
            except InputError as error:
                refusal = str(error)
        (refusal,) = broadcast_object_list([refusal])
        if refusal:
            raise InputError(refusal)
        yield
