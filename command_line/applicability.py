"""Which argument belongs to which mode: one table, and what is said where an argument does nothing.

Whatever the user gives where it has no effect is refused in one line. An argument is given if it is
typed, with any value but one that switches off what is off anyway: a flag at its default, ``no``,
``none`` or 0. What a script puts before ``--`` is not given by the user. What only the machine
decides (GPUs, processes) is never refused: the same command line runs on other machines, too.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter

from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType

from command_line.arguments import TUNING_MODES, Arguments, plain_value
from command_line.values import AUTO
from utils import InputError
from zeroth_order.smoothing import SmoothingSchedule


@dataclass(frozen=True)
class Scope:
    """Arguments that have an effect under one condition, and under those of the scopes around it.

    Attributes:
        names: the arguments.
        where: the condition in words, for docs/arguments.md.
        holds: whether it is met.
        reason: why the arguments have no effect where it is not; ``{arguments}`` is the command
            line.
        instead: what to do, beside leaving them out.
        outer: the scope around this one.
    """

    names: tuple[str, ...]
    where: str = ""
    holds: Callable[[Arguments], object] = lambda arguments: True
    reason: str = ""
    instead: str = ""
    outer: Scope | None = None

    def chain(self) -> Iterator[Scope]:
        """Yield the scopes around this one, the widest first, and this one last."""
        if self.outer:
            yield from self.outer.chain()
        yield self


def _is_on(arguments: Arguments, name: str) -> bool:
    """Whether one of the three strategies, when to log, evaluate or save, is not ``no``."""
    return plain_value(getattr(arguments, name)) != "no"


def _has_dev_losses(arguments: Arguments) -> bool:
    return _is_on(arguments, "eval_strategy") or arguments.eval_on_start


EVERY_RUN = Scope(
    (
        *("task_name", "data_dir", "train_file", "validation_file", "num_train"),
        *("train_set_seed", "model_name", "load_float16", "load_bfloat16", "load_int8"),
        *("load_int4", "load_saved_dtype", "max_length", "no_auto_device", "trust_remote_code"),
        *("trainer", "tag", "result_file", "overwrite_output_dir", "use_cpu", "tf32"),
        *("local_rank", "ddp_backend", "ddp_timeout", "config", "show_config", "dry_run"),
        *("apply_chat_template", "quiet"),
    ),
    where="every run",
)
TRAINING = Scope(
    (
        *("lora", "prefix_tuning", "head_tuning", "linear_probing", "untie_emb", "save_model"),
        *("eval_before_training", "no_eval", "output_dir"),
    ),
    where="training: `--trainer regular` or `zo`",
    holds=lambda arguments: arguments.trainer != "none",
    reason="nothing is trained with --trainer none, the default",
    instead="add --trainer zo or --trainer regular",
)
STEPS = Scope(
    (
        *("max_steps", "learning_rate", "weight_decay", "per_device_train_batch_size"),
        *("gradient_accumulation_steps", "lr_scheduler_type", "lr_scheduler_kwargs"),
        *("warmup_steps", "train_as_classification", "max_skipped_steps", "full_determinism"),
        *("data_seed", "train_sampling_strategy", "dataloader_drop_last", "auto_find_batch_size"),
        *("dataloader_num_workers", "dataloader_pin_memory", "accelerator_config"),
        *("use_liger_kernel", "debug", "skip_memory_metrics", "include_num_input_tokens_seen"),
        *("logging_strategy", "logging_first_step", "logging_nan_inf_filter"),
        *("log_on_each_node", "log_level", "log_level_replica", "disable_tqdm", "report_to"),
        *("eval_strategy", "eval_on_start", "save_strategy", "load_best_model_at_end"),
        *("resume_from_checkpoint", "save_on_interrupt", "push_to_hub"),
        *("ignore_data_skip", "restore_callback_states_from_checkpoint"),
    ),
    where="training in steps: no `--linear_probing`",
    holds=lambda arguments: not arguments.linear_probing,
    reason="--linear_probing fits without steps",
    outer=TRAINING,
)
BACKPROPAGATION = Scope(
    (
        *("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
        *("activation_checkpointing", "gradient_checkpointing", "neftune_noise_alpha"),
        *("torch_empty_cache_steps", "ddp_find_unused_parameters", "ddp_bucket_cap_mb"),
        *("ddp_broadcast_buffers", "ddp_static_graph"),
    ),
    where="`--trainer regular`",
    holds=lambda arguments: arguments.trainer == "regular",
    reason="--trainer zo has no backward pass, and an optimizer of its own",
    outer=STEPS,
)
ZEROTH_ORDER = Scope(
    (
        *("zo_eps", "hessian_smooth_type", "zo_num_samples", "zo_compile", "zo_clip"),
        *("zo_directions", "zo_parallel", "check_every"),
    ),
    where="`--trainer zo`",
    holds=lambda arguments: arguments.trainer == "zo",
    reason="--trainer regular trains by backpropagation",
    instead="use --trainer zo",
    outer=STEPS,
)
SHARED_DIRECTIONS = Scope(
    ("zo_perturbation",),
    where="`--zo_directions shared`",
    holds=lambda arguments: arguments.zo_directions == "shared",
    reason="with --zo_directions example no weight is perturbed",
    outer=ZEROTH_ORDER,
)
EXAMPLE_DIRECTIONS = Scope(
    ("zo_normalize",),
    where="`--zo_directions example`",
    holds=lambda arguments: arguments.zo_directions == "example",
    reason="all examples share one projected gradient",
    instead="add --zo_directions example",
    outer=ZEROTH_ORDER,
)
HESSIAN = Scope(
    ("hessian",),
    where="a smoothing above 0",
    holds=lambda arguments: SmoothingSchedule.parse(arguments.hessian_smooth_type).value > 0,
    reason="with --hessian_smooth_type {arguments.hessian_smooth_type} h stays 1 (MeZO)",
    instead="give a smoothing above 0",
    outer=ZEROTH_ORDER,
)
CURVATURE = Scope(
    ("curvature_eps", "curvature_every"),
    where="a smoothing above 0, or `--learning_rate auto`",
    holds=lambda arguments: arguments.learning_rate == AUTO or HESSIAN.holds(arguments),
    reason="with --hessian_smooth_type {arguments.hessian_smooth_type} and a fixed learning rate "
    "the curvature is not measured",
    instead="give a smoothing above 0, or --learning_rate auto",
    outer=ZEROTH_ORDER,
)
PROBE = Scope(
    ("probe_every",),
    where="`auto` as `--learning_rate`, `--zo_eps` or `--curvature_eps`",
    holds=attrgetter("probed"),
    reason="nothing is probed",
    instead="give --learning_rate auto or --zo_eps auto",
    outer=ZEROTH_ORDER,
)
WITHOUT_GRADIENT = Scope(
    ("non_diff",),
    where="`--trainer zo`",
    holds=ZEROTH_ORDER.holds,
    reason="a metric has no gradient for --trainer regular",
    instead="use --trainer zo",
    outer=STEPS,
)
REPORTS = Scope(
    ("run_name",),
    where="`--report_to`",
    holds=attrgetter("report_to"),
    reason="nothing is reported",
    instead="add --report_to",
    outer=STEPS,
)
IN_CONTEXT = Scope(
    ("sfc",),
    where="`--trainer none`",
    holds=lambda arguments: arguments.trainer == "none",
    reason="scores are calibrated with --trainer none only",
)
GENERATED_ANSWERS = Scope(
    (),
    where="answers that are generated",
    holds=attrgetter("task.generation"),
    reason="the answers of {arguments.task.name} are chosen from options, nothing is generated",
)
GENERATION = Scope(
    ("sampling", "num_beams", "max_new_tokens", "eos_token"),
    where="answers that are generated, by an evaluation or by `--non_diff`",
    holds=lambda arguments: (
        not arguments.no_eval
        or arguments.eval_before_training
        or arguments.non_diff
        or arguments.reward
        or arguments.wants_dev_metric
    ),
    reason="nothing is generated with --no_eval",
    outer=GENERATED_ANSWERS,
)

# Every argument is in one scope, and in no other.
SCOPES = (
    EVERY_RUN,
    Scope(
        ("metric",),
        where="`--train_file` or `--validation_file`",
        holds=lambda arguments: arguments.train_file or arguments.validation_file,
        reason="it is for --train_file and --validation_file, a task has its metrics",
    ),
    Scope(
        ("text_column", "label_column", "prompt_template"),
        where="`--train_file`, `--validation_file`, or `--predict_file` without a task",
        holds=lambda arguments: (
            arguments.train_file
            or arguments.validation_file
            or (arguments.predict_file and not arguments.task_name)
        ),
        reason="a task has its columns",
    ),
    Scope(
        ("predict_file",),
        where="`--trainer none`",
        holds=lambda arguments: arguments.trainer == "none",
        reason="it is predicted with a model that is trained: train with --save_model first",
        instead="then give its folder as --model_name",
    ),
    Scope(
        ("merge_adapter",),
        where="`--lora` with `--save_model`",
        holds=lambda arguments: arguments.lora and arguments.save_model,
        reason="no model with LoRA matrices is saved",
        instead="add --lora and --save_model",
        outer=TRAINING,
    ),
    Scope(
        ("num_train_sets",),
        where="training or demonstrations",
        holds=lambda arguments: arguments.trainer != "none" or arguments.num_train,
        reason="there are no demonstrations to draw",
        instead="give --num_train",
    ),
    Scope(
        ("seed",),
        where="training in steps, or `--sampling`",
        holds=lambda arguments: (
            (arguments.trainer != "none" and not arguments.linear_probing) or arguments.sampling
        ),
        reason="nothing is drawn but examples, which have a seed of their own",
        instead="give --train_set_seed",
    ),
    Scope(
        ("per_device_eval_batch_size",),
        where="an evaluation, dev losses or `--linear_probing`",
        holds=lambda arguments: (
            not arguments.no_eval
            or arguments.eval_before_training
            or arguments.linear_probing
            or _has_dev_losses(arguments)
        ),
        reason="nothing is evaluated with --no_eval",
    ),
    Scope(
        ("num_eval",),
        where="an evaluation: no `--no_eval`, or `--eval_before_training`; no `--predict_file`",
        holds=lambda arguments: (
            (not arguments.no_eval or arguments.eval_before_training) and not arguments.predict_file
        ),
        reason="nothing is evaluated with --no_eval, nor with --predict_file",
    ),
    Scope(
        ("predictions_file", "verbose"),
        where="an evaluation at the end: no `--no_eval`",
        holds=lambda arguments: not arguments.no_eval,
        reason="nothing is predicted with --no_eval",
    ),
    Scope(
        ("system_prompt",),
        where="`--apply_chat_template`",
        holds=attrgetter("apply_chat_template"),
        reason="there is no conversation",
        instead="add --apply_chat_template",
    ),
    IN_CONTEXT,
    Scope(
        ("icl_sfc",),
        where="demonstrations",
        holds=attrgetter("num_train"),
        reason="there are no demonstrations",
        instead="give --num_train, or --sfc instead",
        outer=IN_CONTEXT,
    ),
    GENERATED_ANSWERS,
    GENERATION,
    Scope(
        ("temperature", "top_k", "top_p"),
        where="`--sampling`, or `--reward_samples` above 1",
        holds=lambda arguments: arguments.sampling or arguments.reward_samples > 1,
        reason="the likeliest text is taken",
        instead="add --sampling",
        outer=GENERATION,
    ),
    Scope(
        ("tensor_parallel",),
        where="`--trainer none` or `zo`",
        holds=lambda arguments: arguments.trainer != "regular",
        reason="parts of weights are trained without gradients",
        instead="use --trainer zo, or finetune_fsdp.sh, which shards weights otherwise",
    ),
    Scope(
        ("reward",),
        where="`--trainer none` or `zo`",
        holds=lambda arguments: arguments.trainer != "regular",
        reason="a reward has no gradient for --trainer regular",
        instead="use --trainer zo",
    ),
    Scope(
        ("reward_samples",),
        where="`--reward` with `--trainer zo`",
        holds=lambda arguments: arguments.reward and arguments.trainer == "zo",
        reason="no reward is trained on",
        instead="give --reward and --trainer zo",
    ),
    TRAINING,
    *(
        Scope(
            settings,
            where=f"`--{mode}`",
            holds=attrgetter(mode),
            reason=f"it belongs to --{mode}",
            outer=TRAINING,
        )
        for mode, settings in TUNING_MODES.items()
    ),
    Scope(
        ("num_dev",),
        where="training with dev losses (`--eval_strategy`, `--eval_on_start`) or without "
        "`--no_eval`",
        holds=lambda arguments: not arguments.no_eval or _has_dev_losses(arguments),
        reason="with --no_eval and without --eval_strategy no dev example is looked at",
        outer=TRAINING,
    ),
    STEPS,
    Scope(
        ("num_train_epochs",),
        where="training in steps without `--max_steps`",
        holds=lambda arguments: arguments.max_steps < 1,
        reason="--max_steps {arguments.max_steps} says how long the run is",
        instead="give --max_steps -1",
        outer=STEPS,
    ),
    Scope(
        ("only_train_option",),
        where="training in steps without `--train_as_classification`, `--non_diff` and `--reward`",
        holds=lambda arguments: (
            not (arguments.train_as_classification or arguments.non_diff or arguments.reward)
        ),
        reason="it is of the language-model loss; --train_as_classification, --non_diff and "
        "--reward have objectives of their own",
        outer=STEPS,
    ),
    Scope(
        ("decay_step",),
        where="`--lr_scheduler_type linear` or `cosine`",
        holds=lambda arguments: arguments.lr_scheduler_type in ("linear", "cosine"),
        reason="--lr_scheduler_type {arguments.lr_scheduler_type.value} does not decay from a step",
        instead="give --lr_scheduler_type linear or cosine",
        outer=STEPS,
    ),
    Scope(
        ("logging_steps",),
        where="`--logging_strategy steps`",
        holds=lambda arguments: arguments.logging_strategy == IntervalStrategy.STEPS,
        reason="--logging_strategy {arguments.logging_strategy.value} does not go by steps",
        instead="give --logging_strategy steps",
        outer=STEPS,
    ),
    REPORTS,
    Scope(
        ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        where="`--report_to trackio`",
        holds=lambda arguments: "trackio" in arguments.report_to,
        reason="it is for --report_to trackio",
        outer=REPORTS,
    ),
    Scope(
        ("eval_metric",),
        where="`--eval_strategy steps` or `epoch`, or `--eval_on_start`",
        holds=_has_dev_losses,
        reason="no dev loss is computed",
        instead="give --eval_strategy steps or epoch",
        outer=STEPS,
    ),
    Scope(
        ("eval_delay",),
        where="`--eval_strategy steps` or `epoch`",
        holds=lambda arguments: _is_on(arguments, "eval_strategy"),
        reason="--eval_strategy no computes no dev loss",
        instead="give --eval_strategy steps or epoch",
        outer=STEPS,
    ),
    Scope(
        ("eval_steps",),
        where="`--eval_strategy steps`",
        holds=lambda arguments: arguments.eval_strategy == IntervalStrategy.STEPS,
        reason="--eval_strategy {arguments.eval_strategy.value} does not go by steps",
        instead="give --eval_strategy steps",
        outer=STEPS,
    ),
    Scope(
        ("save_total_limit", "save_only_model", "save_on_each_node"),
        where="`--save_strategy steps`, `epoch` or `best`",
        holds=lambda arguments: _is_on(arguments, "save_strategy"),
        reason="--save_strategy no saves no checkpoints",
        instead="give --save_strategy steps, epoch or best",
        outer=STEPS,
    ),
    Scope(
        ("save_steps",),
        where="`--save_strategy steps`",
        holds=lambda arguments: arguments.save_strategy == SaveStrategy.STEPS,
        reason="--save_strategy {arguments.save_strategy.value} does not go by steps",
        instead="give --save_strategy steps",
        outer=STEPS,
    ),
    Scope(
        ("metric_for_best_model", "greater_is_better"),
        where="`--load_best_model_at_end`, `--save_strategy best`, or a scheduler that follows the "
        "dev set",
        holds=lambda arguments: (
            arguments.load_best_model_at_end
            or arguments.save_strategy == SaveStrategy.BEST
            or arguments.lr_scheduler_type
            in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
        ),
        reason="no best model is looked for",
        instead="add --load_best_model_at_end",
        outer=STEPS,
    ),
    Scope(
        (
            *("hub_token", "hub_private_repo", "hub_model_id", "hub_strategy"),
            *("hub_always_push", "hub_revision"),
        ),
        where="`--push_to_hub`",
        holds=attrgetter("push_to_hub"),
        reason="nothing goes to the Hub",
        instead="add --push_to_hub",
        outer=STEPS,
    ),
    Scope(
        (
            *("dataloader_prefetch_factor", "dataloader_persistent_workers"),
            *("dataloader_multiprocessing_context", "dataloader_in_order"),
        ),
        where="`--dataloader_num_workers` above 0",
        holds=attrgetter("dataloader_num_workers"),
        reason="the batches are made in this process",
        instead="give --dataloader_num_workers",
        outer=STEPS,
    ),
    BACKPROPAGATION,
    Scope(
        ("fp16", "bf16"),
        where="`--trainer regular`",
        holds=BACKPROPAGATION.holds,
        reason="mixed precision is for gradients, --trainer zo has none",
        instead="use --load_float16 or --load_bfloat16",
        outer=STEPS,
    ),
    Scope(
        ("torch_compile", "torch_compile_backend", "torch_compile_mode"),
        where="`--trainer regular`",
        holds=BACKPROPAGATION.holds,
        reason="--trainer zo does not compile the model",
        instead="use --zo_compile, which compiles the step",
        outer=STEPS,
    ),
    Scope(
        ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"),
        where="`--activation_checkpointing`",
        holds=attrgetter("activation_checkpointing"),
        reason="nothing is computed twice",
        instead="add --activation_checkpointing",
        outer=BACKPROPAGATION,
    ),
    Scope(
        ("optim_target_modules",),
        where="an `--optim` of GaLore or APOLLO",
        holds=lambda arguments: arguments.optim.startswith(("galore", "apollo")),
        reason="--optim {arguments.optim.value} takes all modules alike",
        instead="give an --optim of GaLore or APOLLO",
        outer=BACKPROPAGATION,
    ),
    Scope(
        ("fsdp",),
        where="`--trainer regular`",
        holds=BACKPROPAGATION.holds,
        reason="it shards what AdamW needs, --trainer zo does not",
        outer=STEPS,
    ),
    Scope(
        ("fsdp_config",),
        where="`--fsdp`",
        holds=attrgetter("fsdp"),
        reason="nothing is sharded",
        instead="add --fsdp",
        outer=BACKPROPAGATION,
    ),
    ZEROTH_ORDER,
    SHARED_DIRECTIONS,
    EXAMPLE_DIRECTIONS,
    HESSIAN,
    CURVATURE,
    PROBE,
    Scope(
        ("hessian_dtype",),
        where="`--hessian full`",
        holds=lambda arguments: arguments.hessian == "full",
        reason="the vectors of --hessian lowrank are float64",
        outer=HESSIAN,
    ),
    WITHOUT_GRADIENT,
    Scope(
        ("non_diff_metric",),
        where="`--non_diff`",
        holds=attrgetter("non_diff"),
        reason="it belongs to --non_diff",
        outer=WITHOUT_GRADIENT,
    ),
)


def has_effect(arguments: Arguments, name: str) -> bool:
    """Whether an argument does anything beside the others."""
    return all(
        scope.holds(arguments) for each in SCOPES if name in each.names for scope in each.chain()
    )


def check_applicability(arguments: Arguments) -> None:
    """Refuse the arguments that the user has given where they have no effect.

    Raises:
        InputError: names them, the reason and the way out.
    """
    without_effect: dict[str, list[str]] = {}
    for scope in SCOPES:
        given = [name for name in scope.names if _asks_for_something(arguments, name)]
        unmet = next((s for s in scope.chain() if not s.holds(arguments)), None) if given else None
        if unmet:
            reason = unmet.reason.format(arguments=arguments)
            way_out = f"{unmet.instead}, or leave" if unmet.instead else "leave"
            without_effect.setdefault(f"{reason}; {way_out}", []).extend(given)
    for reason, names in without_effect.items():
        shown = ", ".join(show_argument(arguments, name) for name in names)
        raise InputError(f"{shown}: {reason} {'it' if len(names) == 1 else 'them'} out")


def show_argument(arguments: Arguments, name: str) -> str:
    """Return an argument with its value, as it may be typed; secrets are left out."""
    value = plain_value(getattr(arguments, name))
    if value is True or name == "hub_token":
        return f"--{name}"
    if isinstance(value, dict):
        return f"--{name} '{json.dumps(value)}'"
    return f"--{name} {value:g}" if isinstance(value, float) else f"--{name} {value}"


def _asks_for_something(arguments: Arguments, name: str) -> bool:
    """Whether the user has given an argument, and not to switch off what is off."""
    if name not in arguments.given_by_user:
        return False
    value = plain_value(getattr(arguments, name))
    if isinstance(value, bool):
        (default,) = (f.default for f in dataclasses.fields(arguments) if f.name == name)
        return value != bool(default)
    return value not in (0, "no", "none", [])
