"""Values that make no sense: every numeric argument has bounds, and dictionaries are JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from running import command

from command_line.arguments import Arguments, parse_arguments
from command_line.checks import check
from command_line.unknown import NOT_OFFERED
from command_line.values import BOUNDS, LARGEST, check_number
from utils import InputError

KINDS = get_type_hints(Arguments)
NUMBERS = {
    field.name: float if float in (KINDS[field.name], *get_args(KINDS[field.name])) else int
    for field in dataclasses.fields(Arguments)
    if {int, float} & {KINDS[field.name], *get_args(KINDS[field.name])}
}
# Training runs of 12 examples: what is too much of something for them.
TOO_MUCH: dict[str, tuple[dict[str, Any], list[str]]] = {
    "more warmup than steps": ({"warmup_steps": 1e6}, ["--warmup_steps 1e+06", "6 steps"]),
    "more warmup than epochs": (
        {"max_steps": None, "num_train_epochs": 2, "warmup_steps": 7},
        ["--warmup_steps 7", "6 steps"],
    ),
    "decay after the epochs": (
        {
            **{"max_steps": None, "num_train_epochs": 2, "decay_step": 6},
            "lr_scheduler_type": "linear",
        },
        ["--decay_step 6", "6 steps"],
    ),
    "warmup into the decay": (
        {"warmup_steps": 4, "decay_step": 3, "lr_scheduler_type": "cosine"},
        ["--warmup_steps 4", "--decay_step 3"],
    ),
    "options of another schedule": (
        {"decay_step": 3, "lr_scheduler_type": "cosine", "lr_scheduler_kwargs": '{"a": 1}'},
        ["--lr_scheduler_kwargs", "--decay_step"],
    ),
    "unknown option of a schedule": (
        {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": '{"cycles": 1}'},
        ["--lr_scheduler_kwargs cycles", "--lr_scheduler_type cosine takes num_cycles"],
    ),
    "option of a constant": (
        {"lr_scheduler_kwargs": '{"num_cycles": 1}'},
        ["--lr_scheduler_kwargs num_cycles", "constant takes none"],
    ),
    "value of a schedule": (
        {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": '{"num_cycles": "many"}'},
        ["--lr_scheduler_type cosine"],
    ),
    "end above the start": (
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": '{"lr_end": 1}'},
        ["--lr_scheduler_type polynomial", "lr_end"],
    ),
}


def command_of_training(**arguments: Any) -> list[str]:
    values = {"trainer": "zo", "num_train": 12, "per_device_train_batch_size": 4, "max_steps": 6}
    return command(**(values | arguments))


def test_every_number_has_bounds() -> None:
    """A number that a new release of transformers brings has to be put into the table."""
    assert sorted(NUMBERS.keys() - BOUNDS.keys()) == []
    assert sorted(BOUNDS.keys() - NUMBERS.keys()) == []


@pytest.mark.parametrize("name", sorted(NUMBERS.keys() - NOT_OFFERED.keys()))
def test_numbers_outside_their_bounds(name: str) -> None:
    bounds = BOUNDS[name]
    bad = ["nan", "inf", "-inf", "1e400", "many"]
    lowest = max(bounds.least, bounds.above)
    bad += [str(lowest - 1)] if lowest > -math.inf else []
    if NUMBERS[name] is int:
        bad += ["1.5", str(10**30)]
    elif bounds.above == 0:
        bad += ["0"]
    for value in bad:
        with pytest.raises(InputError, match=f"--{name}"):
            parse_arguments([f"--{name}", value])


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("save_total_limit", [1], [0, -2]),
        ("logging_steps", [1, 0.5], [-1, 1.5]),
        ("warmup_steps", [0, 0.5, 3], [-1, 2.5]),
        ("dataloader_num_workers", [0, 1], [-1]),
        ("max_steps", [-1, 1], [0, -2]),
        ("top_p", [0.1, 1], [0, 1.1]),
        ("adam_beta1", [0, 0.9], [1, -0.1]),
        ("seed", [0, 2**32 - 1], [-1, 2**32]),
        ("num_train", [0, LARGEST], [-1, LARGEST + 1]),
    ],
)
def test_ends_of_the_bounds(name: str, good: list[float], bad: list[float]) -> None:
    for value in good:
        check_number(name, value)
    for value in bad:
        with pytest.raises(InputError, match=rf"^--{name} {value}: must be "):
            check_number(name, value)


@pytest.mark.parametrize("case", TOO_MUCH.values(), ids=TOO_MUCH)
def test_more_than_the_run_has(case: tuple[dict[str, Any], list[str]]) -> None:
    arguments, parts = case
    with pytest.raises(InputError) as error:
        check(parse_arguments(command_of_training(**arguments)))
    assert "\n" not in str(error.value)
    assert all(part in str(error.value) for part in parts), error.value


@pytest.mark.parametrize(
    "arguments",
    [
        {"warmup_steps": 6},
        {"warmup_steps": 0.5, "lr_scheduler_type": "linear"},
        {"warmup_steps": 2, "decay_step": 5, "lr_scheduler_type": "cosine"},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": '{"min_lr": 1e-7}'},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": '{"factor": 0.5}'}
        | {"num_dev": 4, "eval_strategy": "steps", "eval_steps": 2},
        {"learning_rate": 0, "lr_scheduler_type": "linear"},
    ],
    ids=str,
)
def test_schedules_that_fit(arguments: dict[str, Any]) -> None:
    check(parse_arguments(command_of_training(**arguments)))


def test_dictionaries(tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"split_batches": True}))
    for value in (file, '{"split_batches": true}'):
        arguments = parse_arguments(command_of_training(accelerator_config=value))
        assert arguments.accelerator_config.split_batches is True
    file.write_text("[1]")
    for value, part in (
        ('{"dispatch_batches": true}', "dispatch_batches: give split_batches"),
        ('{"gradient_accumulation_kwargs": {"num_steps": 3}}', "gradient_accumulation_kwargs"),
        ('{"nothing": 1}', "nothing: give split_batches"),
        ("{nothing", "Expecting property name"),
        (tmp_path / "nowhere.json", "No such file"),
        (tmp_path, "Is a directory"),
        (file, "no dictionary"),
    ):
        with pytest.raises(InputError) as error:
            parse_arguments(command_of_training(accelerator_config=value))
        assert str(error.value).startswith("--accelerator_config ") and part in str(error.value)
