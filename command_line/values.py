"""Which values make sense: the bounds of every numeric argument, and dictionaries in JSON."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils import InputError, one_line


@dataclass(frozen=True)
class Bounds:
    """An interval of numbers. Infinity and nan are in none.

    Attributes:
        least, most: its ends, which belong to it.
        above, below: ends that do not.
    """

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def violation(self, value: float) -> str | None:
        """Return what ``value`` has to be, or None if it is inside."""
        if not math.isfinite(value):
            return "must be a finite number"
        if value < self.least:
            return f"must be at least {self.least}"
        if value <= self.above:
            return f"must be larger than {self.above}"
        if value > self.most:
            return f"must be at most {self.most}"
        return f"must be below {self.below}" if value >= self.below else None


# What a probe of the losses finds.
AUTO = "auto"
# Larger whole numbers do not fit into the integers of torch and numpy.
LARGEST = 2**31 - 1
FROM_0 = Bounds(least=0, most=LARGEST)
FROM_1 = Bounds(least=1, most=LARGEST)
POSITIVE = Bounds(above=0)
NOT_NEGATIVE = Bounds(least=0)
STEPS = Bounds(above=0, most=LARGEST)
SEED = Bounds(least=0, below=2**32)
DECAY_RATE = Bounds(least=0, below=1)

BOUNDS = {
    **{"num_train": FROM_0, "num_dev": FROM_0, "num_eval": FROM_1, "num_train_sets": FROM_1},
    **{"seed": SEED, "data_seed": SEED, "train_set_seed": SEED},
    **{"per_device_train_batch_size": FROM_1, "per_device_eval_batch_size": FROM_1},
    **{"gradient_accumulation_steps": FROM_1, "max_length": FROM_1},
    # The lengths of texts and the sizes of matrices are bounded by the model, where it is known.
    **{"lora_r": FROM_1, "lora_alpha": FROM_1, "num_prefix": FROM_1, "max_new_tokens": FROM_1},
    **{"num_beams": FROM_1, "top_k": FROM_1, "top_p": Bounds(above=0, most=1)},
    **{"temperature": POSITIVE, "zo_eps": POSITIVE, "zo_num_samples": FROM_1},
    **{"curvature_eps": POSITIVE, "curvature_every": FROM_1, "zo_clip": POSITIVE},
    **{"check_every": FROM_1, "probe_every": FROM_1, "reward_samples": FROM_1},
    **{"max_skipped_steps": FROM_1, "decay_step": FROM_0, "max_steps": Bounds(-1, LARGEST)},
    **{"num_train_epochs": POSITIVE, "learning_rate": NOT_NEGATIVE, "weight_decay": NOT_NEGATIVE},
    **{"warmup_steps": FROM_0, "logging_steps": STEPS, "eval_steps": STEPS, "save_steps": STEPS},
    **{"eval_delay": NOT_NEGATIVE, "save_total_limit": FROM_1},
    **{"adam_beta1": DECAY_RATE, "adam_beta2": DECAY_RATE, "adam_epsilon": NOT_NEGATIVE},
    **{"max_grad_norm": NOT_NEGATIVE, "label_smoothing_factor": DECAY_RATE},
    **{"neftune_noise_alpha": POSITIVE, "torch_empty_cache_steps": FROM_1},
    **{"dataloader_num_workers": FROM_0, "dataloader_prefetch_factor": FROM_1},
    **{"eval_accumulation_steps": FROM_1, "ddp_bucket_cap_mb": FROM_1, "ddp_timeout": FROM_1},
    "local_rank": Bounds(least=-1, most=LARGEST),
}
# Words that stand for a number.
WORDS = {"learning_rate": AUTO, "zo_eps": AUTO, "curvature_eps": AUTO, "zo_clip": "none"}
# A number of steps, or below 1 a fraction of the run.
STEPS_OR_FRACTION = ("warmup_steps", "logging_steps", "eval_steps", "save_steps")


def number_or(word: str) -> Callable[[str], float | str]:
    """Return what reads an argument that is a number or a word."""

    def read(text: str) -> float | str:
        if text == word:
            return word
        try:
            return float(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is no number, nor {word}") from error

    return read


def check_number(name: str, value: float) -> None:
    """Refuse a value of a numeric argument that makes no sense.

    Raises:
        InputError: names the argument, the value and what it has to be.
    """
    violation = BOUNDS[name].violation(value)
    if not violation and name in STEPS_OR_FRACTION and value > 1 and value != int(value):
        violation = "must be a whole number of steps, or below 1 a fraction of the run"
    if name == "max_steps" and value < 1 and value != -1:
        violation = "must be at least 1, or -1 for --num_train_epochs"
    if violation:
        shown = f"{value:g}" if isinstance(value, float) else value
        raise InputError(f"--{name} {shown}: {violation}")


# What the dictionaries of these arguments may hold; the others are looked at where they are used.
KEYS = {
    # The other settings cut a packed batch, or count steps beside --gradient_accumulation_steps.
    "accelerator_config": ("split_batches", "use_seedable_sampler", "non_blocking"),
}


def read_dictionary(name: str, text: str) -> dict[str, Any]:
    """Read an argument that is JSON in braces, or the name of a file that holds it.

    Raises:
        InputError: there is no such file, it is no dictionary, or it holds what it must not.
    """
    try:
        value = json.loads(text if text.startswith("{") else Path(text).read_text("utf-8"))
    except (ValueError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else one_line(error)
        raise InputError(
            f"--{name} {text}: {reason}; give a JSON file, or JSON as in '{{\"name\": 1}}'"
        ) from error
    if not isinstance(value, dict):
        raise InputError(f'--{name} {text}: the file holds no dictionary as {{"name": 1}}')
    for key in value:
        if key not in KEYS.get(name, (key,)):
            raise InputError(f"--{name} {key}: give {', '.join(KEYS[name])} at most")
    return value
