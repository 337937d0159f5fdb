"""The conditions under which arguments have an effect."""

from __future__ import annotations

from dataclasses import replace
from operator import attrgetter
from typing import Any

from command_line.declarations import AUTO, Effect
from zeroth_order.smoothing import SmoothingSchedule


def measures_dev_losses(values: Any) -> bool:
    """Whether the dev loss is computed during training."""
    return values.eval_strategy != "no" or bool(values.eval_on_start)


def smooths(values: Any) -> bool:
    """Whether h changes: a smoothing above 0."""
    return SmoothingSchedule.parse(values.hessian_smooth_type).value > 0


def evaluates(values: Any) -> bool:
    """Whether a metric is measured, before training or at the end."""
    return not values.no_eval or values.eval_before_training


TRAINED = Effect(
    "training: `--trainer regular` or `zo`",
    lambda values: values.trainer != "none",
    "nothing is trained",
)
STEPS = Effect(
    "training in steps: no `--linear_probing`",
    lambda values: not values.linear_probing,
    "--linear_probing has no steps",
    inside=TRAINED,
)
BACKWARD = Effect(
    "`--trainer regular`",
    lambda values: values.trainer == "regular",
    "--trainer zo has no backward pass",
    inside=STEPS,
)
GRADIENT = replace(BACKWARD, otherwise=f"{BACKWARD.otherwise}; leave it out", refused=True)
FORWARD = Effect(
    "`--trainer zo`",
    lambda values: values.trainer == "zo",
    "for --trainer zo",
    inside=STEPS,
)
WITHOUT_GRADIENT = Effect(
    "`--trainer zo`",
    lambda values: values.trainer == "zo",
    "it has no gradient for --trainer regular; use --trainer zo",
    inside=STEPS,
    refused=True,
)
REWARD = Effect(
    "`--trainer none` or `zo`",
    lambda values: values.trainer != "regular",
    "it has no gradient for --trainer regular; use --trainer zo",
    refused=True,
)
HESSIAN = Effect(
    "a smoothing above 0",
    smooths,
    "h stays 1 with --hessian_smooth_type {values.hessian_smooth_type}",
    inside=FORWARD,
)
FULL_HESSIAN = Effect(
    "`--hessian full`",
    lambda values: values.hessian == "full",
    "--hessian lowrank is float64",
    inside=HESSIAN,
)
CURVATURE = Effect(
    "a smoothing above 0, or `--learning_rate auto`",
    lambda values: values.learning_rate == AUTO or smooths(values),
    "the curvature is not measured",
    inside=FORWARD,
)
METRIC_OBJECTIVE = Effect(
    "`--non_diff`", attrgetter("non_diff"), "for --non_diff", inside=WITHOUT_GRADIENT
)
REWARD_OBJECTIVE = Effect(
    "`--reward` with `--trainer zo`",
    lambda values: values.reward and values.trainer == "zo",
    "no reward is trained on",
)
LANGUAGE_MODEL_LOSS = Effect(
    "training in steps without `--train_as_classification`, `--non_diff` and `--reward`",
    lambda values: not (values.train_as_classification or values.non_diff or values.reward),
    "for the language-model loss",
    inside=STEPS,
)
EPOCHS = Effect(
    "training in steps without `--max_steps`",
    lambda values: values.max_steps < 1,
    "--max_steps {values.max_steps} decides",
    inside=STEPS,
)
DECAY = Effect(
    "`--lr_scheduler_type linear` or `cosine`",
    lambda values: values.lr_scheduler_type in ("linear", "cosine"),
    "for --lr_scheduler_type linear and cosine",
    inside=STEPS,
)
LORA = Effect("`--lora`", attrgetter("lora"), "for --lora", inside=TRAINED)
PREFIX = Effect("`--prefix_tuning`", attrgetter("prefix_tuning"), "for --prefix_tuning", TRAINED)
PROBING = Effect(
    "`--linear_probing`", attrgetter("linear_probing"), "for --linear_probing", TRAINED
)
SAVED_LORA = Effect(
    "`--lora` with `--save_model`",
    lambda values: values.lora and values.save_model,
    "for --lora with --save_model",
    inside=TRAINED,
)
DEV_EXAMPLES = Effect(
    "training with dev losses (`--eval_strategy`, `--eval_on_start`) or without `--no_eval`",
    lambda values: not values.no_eval or measures_dev_losses(values),
    "--no_eval, and no --eval_strategy",
    inside=TRAINED,
)
DEV_LOSSES = Effect(
    "`--eval_strategy steps` or `epoch`, or `--eval_on_start`",
    measures_dev_losses,
    "no dev loss is computed",
    inside=STEPS,
)
EVAL_STEPS = Effect(
    "`--eval_strategy steps`",
    lambda values: values.eval_strategy == "steps",
    "for --eval_strategy steps",
    inside=STEPS,
)
SAVES = Effect(
    "`--save_strategy steps`, `epoch` or `best`",
    lambda values: values.save_strategy != "no",
    "no checkpoint is saved",
    inside=STEPS,
)
SAVE_STEPS = Effect(
    "`--save_strategy steps`",
    lambda values: values.save_strategy == "steps",
    "for --save_strategy steps",
    inside=STEPS,
)
BEST = Effect(
    "`--load_best_model_at_end`, `--save_strategy best`, or a scheduler that follows the dev set",
    lambda values: (
        values.load_best_model_at_end
        or values.save_strategy == "best"
        or values.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
    ),
    "no best model is looked for",
    inside=STEPS,
)
LOG_STEPS = Effect(
    "`--logging_strategy steps`",
    lambda values: values.logging_strategy in (None, "steps"),
    "for --logging_strategy steps",
    inside=STEPS,
)
REPORTS = Effect(
    "`--report_to`",
    lambda values: values.report_to not in ("none", []),
    "nothing is reported",
    inside=STEPS,
)
HUB = Effect("`--push_to_hub`", attrgetter("push_to_hub"), "nothing goes to the Hub", STEPS)
WORKERS = Effect(
    "`--dataloader_num_workers` above 0",
    attrgetter("dataloader_num_workers"),
    "for --dataloader_num_workers",
    inside=STEPS,
)
CHECKPOINTING = Effect(
    "`--activation_checkpointing`",
    lambda values: values.activation_checkpointing or values.gradient_checkpointing,
    "for --activation_checkpointing",
    inside=BACKWARD,
)
SOME_MODULES = Effect(
    "an `--optim` of GaLore or APOLLO",
    lambda values: (values.optim or "").startswith(("galore", "apollo")),
    "for --optim of GaLore or APOLLO",
    inside=BACKWARD,
)
SHARDED = Effect("`--fsdp`", attrgetter("fsdp"), "nothing is sharded", inside=BACKWARD)

OWN_FILES = Effect(
    "`--train_file` or `--validation_file`",
    lambda values: values.train_file or values.validation_file,
    "for --train_file and --validation_file",
)
OWN_COLUMNS = Effect(
    "`--train_file`, `--validation_file`, or `--predict_file` without a task",
    lambda values: (
        values.train_file
        or values.validation_file
        or (values.predict_file and not values.task_name)
    ),
    "a task has its columns",
)
PREDICTION = Effect(
    "`--trainer none`",
    lambda values: values.trainer == "none",
    "train with --save_model first, then give its folder as --model_name",
    refused=True,
)
SETS = Effect(
    "training or demonstrations",
    lambda values: values.trainer != "none" or values.num_train,
    "there are no demonstrations",
)
DRAWS = Effect(
    "training in steps, or `--sampling`",
    lambda values: (values.trainer != "none" and not values.linear_probing) or values.sampling,
    "demonstrations are drawn by --train_set_seed",
)
CONVERSATION = Effect(
    "`--apply_chat_template`", attrgetter("apply_chat_template"), "for --apply_chat_template"
)
CALIBRATION = Effect(
    "`--trainer none`",
    lambda values: values.trainer == "none",
    "scores are calibrated with --trainer none only; leave it out",
    refused=True,
)
SCORES = Effect(
    "an evaluation, dev losses or `--linear_probing`",
    lambda values: evaluates(values) or values.linear_probing or measures_dev_losses(values),
    "nothing is evaluated",
)
EVALUATION = Effect(
    "an evaluation: no `--no_eval`, or `--eval_before_training`; no `--predict_file`",
    lambda values: evaluates(values) and not values.predict_file,
    "nothing is evaluated",
)
END = Effect(
    "an evaluation at the end: no `--no_eval`",
    lambda values: not values.no_eval,
    "nothing is evaluated",
)
GENERATES = Effect(
    "answers that are generated, by an evaluation or by `--non_diff`",
    lambda values: evaluates(values) or values.non_diff or values.reward or values.wants_dev_metric,
    "nothing is generated",
    inside=Effect(
        "answers that are generated",
        attrgetter("task.generation"),
        "{values.task.name} has options",
    ),
)
SAMPLES = Effect(
    "`--sampling`, or `--reward_samples` above 1",
    lambda values: values.sampling or values.reward_samples > 1,
    "for --sampling",
    inside=GENERATES,
)
