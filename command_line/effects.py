"""The conditions under which arguments have an effect, and why there is none where they fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter
from typing import Any

from command_line.declarations import Effect
from zeroth_order.config import smoothing_of

# Schedules that change the learning rate by what is measured on the dev set.
FOLLOW_DEV_METRIC = ("reduce_lr_on_plateau", "greedy")


def measures_dev_losses(v: Any) -> bool:
    """Whether the dev loss is computed during training."""
    return v.eval_strategy != "no" or bool(v.eval_on_start)


def evaluates(v: Any) -> bool:
    """Whether a metric is measured, before training or at the end."""
    return evaluates_at_end(v) or v.eval_before_training


def evaluates_at_end(v: Any) -> bool:
    """Whether the model is evaluated, after training if there is any."""
    return not v.no_eval or v.trainer == "none"


def is_(name: str, value: str, inside: Effect) -> Effect:
    """Return the condition that an argument has a value."""
    return Effect(f"without --{name} {value}", lambda v: getattr(v, name) == value, inside)


def with_(name: str, inside: Effect | None = None) -> Effect:
    """Return the condition that an argument is given."""
    return Effect(f"without --{name}", attrgetter(name), inside)


def trained_by(*trainers: str) -> Callable[[Any], bool]:
    """Return the condition that --trainer is one of these."""
    return lambda v: v.trainer in trainers


TRAINED = Effect("nothing is trained", lambda v: v.trainer != "none")
STEPS = Effect("--linear_probing has no steps", lambda v: not v.linear_probing, TRAINED)
BACKWARD = Effect("only --trainer regular has a backward pass", trained_by("regular"), STEPS)
ON_GPU = Effect("there is no GPU: float32", bool)  # arguments.py knows
GRADIENT = replace(BACKWARD, refused=True)
RETRIES = replace(GRADIENT, otherwise="only --trainer regular starts again with smaller batches")
SHARDS = replace(GRADIENT, otherwise="only --trainer regular has states to shard")
FORWARD, BROADCAST = is_("trainer", "zo", STEPS), is_("trainer", "broadcast", STEPS)
TAKE_ZO = {"refused": True, "way_out": "take --trainer zo, or leave it out"}
NO_GRADIENT = "it has no gradient for --trainer regular and broadcast"
WITHOUT_GRADIENT = Effect(NO_GRADIENT, trained_by("zo"), STEPS, **TAKE_ZO)
REWARD = Effect(NO_GRADIENT, trained_by("none", "zo"), **TAKE_ZO)
BLOCKS = "--trainer broadcast trains matrices of the blocks"
NOT_BROADCAST = Effect(BLOCKS, trained_by("regular", "zo"), TRAINED, **TAKE_ZO)
HEAD = Effect("--trainer broadcast trains no head", trained_by("regular", "zo"), TRAINED)
RATE = Effect("--trainer broadcast has --broadcast_rate", trained_by("regular", "zo"), STEPS)
DECAYS = replace(RATE, otherwise="--trainer broadcast has no weight decay", refused=True)
IN_MEMORY = "--trainer regular and broadcast need all weights in memory"
OFFLOADED = Effect(IN_MEMORY, lambda v: v.trainer in ("none", "zo") or v.linear_probing, **TAKE_ZO)
OFFLOAD = Effect("without --offload", lambda v: v.offload != "none")
ON_DISK = is_("offload", "disk", OFFLOAD)
WRITES_BLOCKS = is_("trainer", "zo", ON_DISK)
SMOOTHING_0 = "h stays 1 with a smoothing of 0"
HESSIAN = Effect(SMOOTHING_0, lambda v: smoothing_of(v.hessian_smooth_type) > 0, FORWARD)
REWARD_OBJECTIVE = with_("reward", is_("trainer", "zo", TRAINED))
LANGUAGE_MODEL_LOSS = Effect(
    "for the language-model loss",
    lambda v: not (v.train_as_classification or v.non_diff or v.reward),
    STEPS,
)
EPOCHS = Effect("--max_steps decides", lambda v: v.max_steps < 1, STEPS)
DECAY = Effect(
    "for --lr_scheduler_type linear, cosine and polynomial",
    lambda v: v.lr_scheduler_type in ("linear", "cosine", "polynomial"),
    STEPS,
)
LORA, PREFIX = with_("lora", TRAINED), with_("prefix_tuning", TRAINED)
PROBING = with_("linear_probing", TRAINED)
SAVED_LORA = with_("save_model", LORA)
DEV_EXAMPLES = Effect(
    "--no_eval, and no --eval_strategy", lambda v: not v.no_eval or measures_dev_losses(v), TRAINED
)
DEV_LOSSES = Effect("no dev loss is computed", measures_dev_losses, STEPS)
EVAL_STEPS = is_("eval_strategy", "steps", STEPS)
SAVES = Effect("no checkpoint is saved", lambda v: v.save_strategy != "no", STEPS)
SAVE_STEPS = is_("save_strategy", "steps", STEPS)
BEST = Effect(
    "no best model is looked for",
    lambda v: (
        v.load_best_model_at_end
        or v.save_strategy == "best"
        or v.lr_scheduler_type in FOLLOW_DEV_METRIC
    ),
    STEPS,
)
LOG_STEPS = Effect(
    "without --logging_strategy steps",
    # --eval_steps are as many where they are not given.
    lambda v: (
        v.logging_strategy in (None, "steps") or (v.eval_strategy == "steps" and not v.eval_steps)
    ),
    STEPS,
)

OWN_FILES = Effect("a task has its metrics", lambda v: v.train_file or v.validation_file)
OWN_COLUMNS = Effect(
    "a task has its columns",
    lambda v: v.train_file or v.validation_file or (v.predict_file and not v.task_name),
)
SAVED = "train with --save_model first, then give its folder as --model_name"
PREDICTION = Effect(SAVED, trained_by("none"), refused=True)
NO_SEED = Effect("--train_set_seed decides", lambda v: v.train_set_seed is None)
SETS = Effect("there are no demonstrations", lambda v: v.trainer != "none" or v.num_train, NO_SEED)
DRAWS = Effect(
    "demonstrations are drawn by --train_set_seed",
    lambda v: v.has_steps or v.sampling,
)
CONVERSATION = with_("apply_chat_template")
UNTRAINED = "scores are calibrated with --trainer none only"
CALIBRATION = Effect(UNTRAINED, trained_by("none"), refused=True)
EVALUATION = Effect(
    "nothing is evaluated",
    lambda v: (evaluates(v) and not v.predict_file) or (measures_dev_losses(v) and not v.num_dev),
)
SCORES = Effect(
    "nothing is evaluated", lambda v: evaluates(v) or v.linear_probing or measures_dev_losses(v)
)
END = Effect("nothing is evaluated", evaluates_at_end)
OPTIONS = Effect("the task has options", attrgetter("task.generation"))
GENERATES = Effect(
    "nothing is generated",
    lambda v: evaluates(v) or v.non_diff or v.reward or v.wants_dev_metric,
    OPTIONS,
)
SAMPLES = Effect("without --sampling", lambda v: v.sampling or v.reward_samples > 1, GENERATES)
