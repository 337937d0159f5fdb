"""The arguments of transformers' Trainer: the most used as ours, the others by name.

``transformers`` itself reads the others: here stand only their effects and the bounds that it does
not check.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from command_line.declarations import (
    AUTO,
    NOTHING,
    RESULT,
    TRAINING,
    Declaration,
    Effect,
    argument,
)
from command_line.effects import (
    BACKWARD,
    BEST,
    CHECKPOINTING,
    DRAWS,
    EPOCHS,
    EVAL_STEPS,
    GRADIENT,
    HUB,
    REPORTS,
    SAVE_STEPS,
    SAVES,
    SCORES,
    SHARDED,
    SOME_MODULES,
    STEPS,
    TRAINED,
    WORKERS,
)


@dataclass
class MostUsed:
    """The Trainer's, most used."""

    output_dir: str | None = argument(
        None,
        "Folder of the checkpoints and of the saved model. Default: result/<tag>.",
        effect=TRAINED,
        decides=NOTHING,
    )
    max_steps: int = argument(
        -1, "Training steps. -1: as many as --num_train_epochs has.", at_least=-1, effect=STEPS
    )
    num_train_epochs: float = argument(
        3.0,
        "Passes over the training examples, where --max_steps is not given.",
        above=0,
        effect=EPOCHS,
    )
    per_device_train_batch_size: int = argument(
        8, "Examples a step, in each process (MeZO and HiZOO papers: 16).", at_least=1, effect=STEPS
    )
    per_device_eval_batch_size: int = argument(
        8,
        "Examples that are scored together, in each process.",
        at_least=1,
        effect=SCORES,
        decides=NOTHING,
    )
    gradient_accumulation_steps: int = argument(1, "Batches a step.", at_least=1, effect=STEPS)
    learning_rate: float | str = argument(
        5e-5,
        "Learning rate η (MeZO and HiZOO papers, OPT-13B: 1e-6 or 1e-7; 1e-2 or 1e-3 for prefixes, "
        "1e-4 or 5e-5 for LoRA). auto, with --trainer zo: a tenth of the step at which the loss of "
        "a batch is lowest, by the curvature measured along the run; schedules apply.",
        at_least=0,
        words=(AUTO,),
        effect=STEPS,
    )
    weight_decay: float = argument(
        0.0, "Decoupled weight decay λ; none for biases and layer norms.", at_least=0, effect=STEPS
    )
    eval_steps: float | None = argument(
        None,
        "Steps between dev losses, with --eval_strategy steps. Default: --logging_steps.",
        above=0,
        fraction=True,
        effect=EVAL_STEPS,
        decides=RESULT,
    )
    save_strategy: str = argument(
        "steps",
        "When checkpoints are saved: no, steps (every --save_steps), epoch or best.",
        choices=("no", "steps", "epoch", "best"),
        effect=STEPS,
        decides=RESULT,
    )
    save_steps: float = argument(
        500,
        "Steps between checkpoints, with --save_strategy steps.",
        above=0,
        fraction=True,
        effect=SAVE_STEPS,
        decides=RESULT,
    )
    save_total_limit: int | None = argument(
        None,
        "Checkpoints that are kept: the newest, and with --load_best_model_at_end "
        "the best. Default: all.",
        at_least=1,
        effect=SAVES,
        decides=NOTHING,
    )
    load_best_model_at_end: bool = argument(
        False,
        "Report and keep the checkpoint of the lowest dev loss, or of the "
        "best --metric_for_best_model; with --trainer zo and --save_strategy no it is replayed.",
        effect=STEPS,
        decides=RESULT,
    )
    metric_for_best_model: str | None = argument(
        None,
        "What the best checkpoint is best by, on the dev set: loss, or a "
        "metric of the task: accuracy, f1 or em. Default: loss.",
        effect=BEST,
        decides=RESULT,
    )
    resume_from_checkpoint: str | None = argument(
        None,
        "Folder of a checkpoint to resume from. Default: the newest one in --output_dir.",
        effect=STEPS,
        decides=NOTHING,
    )
    report_to: str = argument(
        "none",
        "Where losses are reported: tensorboard, wandb, … or none.",
        effect=STEPS,
        decides=NOTHING,
    )
    seed: int = argument(
        42,
        "Seed of the batches, the noise, an adapter's first weights and sampled text; examples "
        "are drawn by --train_set_seed. From 0 to 2^32 - 1.",
        at_least=0,
        below=2**32,
        effect=DRAWS,
    )


def _numbers(effect: Effect, decides: str, **bounds: tuple[type, dict]) -> dict[str, Declaration]:
    """Declare numbers by name: their kind and bounds."""
    return {
        name: Declaration(name=name, kind=kind, effect=effect, decides=decides, **limits)
        for name, (kind, limits) in bounds.items()
    }


def _others(effect: Effect | None, decides: str, names: str) -> dict[str, Declaration]:
    """Declare arguments by name, separated by spaces; transformers reads their values."""
    each = Declaration(kind=object, effect=effect, decides=decides)
    return {name: replace(each, name=name) for name in names.split()}


_AT_LEAST_0, _AT_LEAST_1 = {"at_least": 0}, {"at_least": 1}
_RATE = {"at_least": 0, "below": 1}
SHARDS = replace(BACKWARD, otherwise="it shards the states of AdamW; leave it out", refused=True)
OTHERS: dict[str, Declaration] = {
    **_others(None, NOTHING, "use_cpu ddp_backend"),
    **_others(None, RESULT, "tf32"),
    **_numbers(None, NOTHING, local_rank=(int, {"at_least": -1}), ddp_timeout=(int, _AT_LEAST_1)),
    **_others(
        STEPS,
        NOTHING,
        "disable_tqdm log_level log_level_replica log_on_each_node logging_strategy debug "
        "logging_first_step skip_memory_metrics include_num_input_tokens_seen "
        "dataloader_pin_memory push_to_hub restore_callback_states_from_checkpoint",
    ),
    **_numbers(STEPS, NOTHING, dataloader_num_workers=(int, _AT_LEAST_0)),
    **_others(
        STEPS,
        RESULT,
        "full_determinism train_sampling_strategy auto_find_batch_size accelerator_config "
        "use_liger_kernel eval_on_start ignore_data_skip",
    ),
    **_others(STEPS, TRAINING, "dataloader_drop_last lr_scheduler_kwargs"),
    **_numbers(STEPS, TRAINING, data_seed=(int, {"at_least": 0, "below": 2**32})),
    **_numbers(EVAL_STEPS, RESULT, eval_delay=(float, _AT_LEAST_0)),
    **_others(SAVES, NOTHING, "save_only_model save_on_each_node"),
    **_others(BEST, RESULT, "greater_is_better"),
    **_others(
        HUB,
        NOTHING,
        "hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision",
    ),
    **_others(
        REPORTS,
        NOTHING,
        "run_name project trackio_space_id trackio_bucket_id trackio_static_space_id",
    ),
    **_others(
        WORKERS,
        NOTHING,
        "dataloader_persistent_workers dataloader_multiprocessing_context dataloader_in_order",
    ),
    **_numbers(WORKERS, NOTHING, dataloader_prefetch_factor=(int, _AT_LEAST_1)),
    **_others(GRADIENT, TRAINING, "optim optim_args fp16 bf16"),
    **_numbers(
        GRADIENT,
        TRAINING,
        adam_beta1=(float, _RATE),
        adam_beta2=(float, _RATE),
        adam_epsilon=(float, _AT_LEAST_0),
        max_grad_norm=(float, _AT_LEAST_0),
        neftune_noise_alpha=(float, {"above": 0}),
    ),
    **_others(SOME_MODULES, RESULT, "optim_target_modules"),
    **_others(
        BACKWARD,
        NOTHING,
        "activation_checkpointing gradient_checkpointing ddp_find_unused_parameters "
        "ddp_broadcast_buffers ddp_static_graph",
    ),
    **_others(BACKWARD, RESULT, "torch_compile torch_compile_backend torch_compile_mode"),
    **_numbers(
        BACKWARD,
        NOTHING,
        ddp_bucket_cap_mb=(int, _AT_LEAST_1),
        torch_empty_cache_steps=(int, _AT_LEAST_1),
    ),
    **_others(
        CHECKPOINTING, NOTHING, "activation_checkpointing_kwargs gradient_checkpointing_kwargs"
    ),
    **_others(SHARDS, RESULT, "fsdp"),
    **_others(SHARDED, RESULT, "fsdp_config"),
}
# Published command lines have them; here they change nothing -> why.
IGNORED = {
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), "--trainer and --no_eval decide"),
    "logging_dir": "logs lie in --output_dir",
    "save_safetensors": "checkpoints are safetensors",
    "group_by_length": "batches are packed",
    "fsdp_transformer_layer_cls_to_wrap": "transformers finds the layers",
    "overwrite_cache": "there is no cache",
}
_LOSS_ONLY = "a training run measures the dev set by its loss and the task's metrics"
_PACKED = "texts and labels are packed into batches of their own kind"
_SHARDED = "weights are sharded with --fsdp (bash finetune_fsdp.sh)"
# The Trainer's arguments that would change nothing, or break a run -> why.
NOT_OFFERED = {
    "label_smoothing_factor": "neither loss has label smoothing",
    "enable_jit_checkpoint": "--save_on_interrupt saves a checkpoint on SIGTERM and Ctrl-C",
    "use_cache": "scoring and generation decide where a cache saves time",
    "liger_kernel_config": "--use_liger_kernel takes its own defaults",
    **dict.fromkeys(
        ("bf16_full_eval", "fp16_full_eval"),
        "evaluation has the dtype of the weights: --load_bfloat16 or --load_float16",
    ),
    **dict.fromkeys(
        (
            *("prediction_loss_only", "include_for_metrics", "batch_eval_metrics"),
            *("eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps"),
        ),
        _LOSS_ONLY,
    ),
    **dict.fromkeys(
        (
            *("remove_unused_columns", "label_names", "length_column_name"),
            "average_tokens_across_devices",
        ),
        _PACKED,
    ),
    **dict.fromkeys(("deepspeed", "parallelism_config"), _SHARDED),
}
