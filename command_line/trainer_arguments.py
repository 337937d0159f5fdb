"""The arguments of transformers' Trainer: the most used as ours, the others by name.

``transformers`` itself reads the others: here stand only their effects and the bounds that it does
not check.
"""

from __future__ import annotations

from typing import Any

from command_line import effects as when
from command_line.declarations import AUTO, NOTHING, RESULT, TRAINING, Declaration, argument, group
from command_line.published import by_name


@group("trainer", when.STEPS, TRAINING)
class MostUsed:
    """The Trainer's, most used."""

    output_dir: str | None = argument(None, path=True, effect=when.TRAINED, decides=NOTHING)
    """Folder of the checkpoints and of the saved model. Default: result/<name>."""
    max_steps: int = argument(-1, at_least=-1)
    """Training steps. -1: as many as --num_train_epochs has."""
    num_train_epochs: float = argument(3.0, above=0, effect=when.EPOCHS)
    """Passes over the training examples, where --max_steps is not given."""
    per_device_train_batch_size: int = argument(8, at_least=1)
    """Examples a step, in each process (MeZO and HiZOO papers: 16)."""
    per_device_eval_batch_size: int = argument(8, at_least=1, effect=when.SCORES, decides=NOTHING)
    """Examples that are scored together, in each process."""
    gradient_accumulation_steps: int = argument(1, at_least=1)
    """Batches a step."""
    learning_rate: float | str = argument(5e-5, at_least=0, words=(AUTO,), effect=when.RATE)
    """Learning rate η (MeZO and HiZOO papers, OPT-13B: 1e-6 or 1e-7; 1e-2 or 1e-3 for prefixes,
    1e-4 or 5e-5 for LoRA). auto, with --trainer zo: by the curvature measured along the run."""
    weight_decay: float = argument(0.0, at_least=0, effect=when.DECAYS)
    """Decoupled weight decay λ; none for biases and layer norms."""
    eval_steps: float | None = argument(
        None, above=0, fraction=True, effect=when.EVAL_STEPS, decides=RESULT
    )
    """Steps between dev losses, with --eval_strategy steps. Default: --logging_steps."""
    save_strategy: str = argument("steps", choices=("no", "steps", "epoch", "best"), decides=RESULT)
    """When checkpoints are saved: no, steps (every --save_steps), epoch or best."""
    save_steps: float = argument(
        500, above=0, fraction=True, effect=when.SAVE_STEPS, decides=RESULT
    )
    """Steps between checkpoints, with --save_strategy steps."""
    save_total_limit: int | None = argument(None, at_least=1, effect=when.SAVES, decides=NOTHING)
    """Checkpoints kept: the newest, and with --load_best_model_at_end the best. Default: all."""
    load_best_model_at_end: bool = argument(False, effect=when.SAVES, decides=RESULT)
    """Report and keep the checkpoint of the best --metric_for_best_model."""
    metric_for_best_model: str | None = argument(None, effect=when.BEST, decides=RESULT)
    """What the best checkpoint is best by (dev set): loss, accuracy, f1 or em. Default: loss."""
    resume_from_checkpoint: str | None = argument(None, path=True, decides=NOTHING)
    """Folder of a checkpoint to resume from. Default: the newest one in --output_dir."""
    report_to: str = argument("none", many=True, decides=NOTHING)
    """Where losses are reported: tensorboard, wandb, … or none."""
    seed: int = argument(42, at_least=0, below=2**32, effect=when.DRAWS)
    """Seed of the batches, the noise, an adapter's first weights and sampled text; --train_set_seed
    draws the examples."""


_ROWS = (  # effect, what they decide, names
    (None, NOTHING, "use_cpu ddp_backend local_rank ddp_timeout"),
    (None, RESULT, "tf32"),
    (when.STEPS, NOTHING, "disable_tqdm log_level log_level_replica log_on_each_node debug"),
    (when.STEPS, NOTHING, "logging_strategy logging_first_step skip_memory_metrics push_to_hub"),
    (when.STEPS, NOTHING, "include_num_input_tokens_seen restore_callback_states_from_checkpoint"),
    (when.STEPS, NOTHING, "dataloader_pin_memory dataloader_num_workers"),
    (when.STEPS, RESULT, "full_determinism eval_on_start"),
    (when.STEPS, TRAINING, "train_sampling_strategy use_liger_kernel ignore_data_skip"),
    (when.STEPS, TRAINING, "dataloader_drop_last lr_scheduler_kwargs data_seed"),
    (when.RETRIES, TRAINING, "auto_find_batch_size"),
    (when.DEV_LOSSES, RESULT, "eval_delay"),
    (when.SAVES, NOTHING, "save_only_model save_on_each_node"),
    (when.STEPS, NOTHING, "hub_token hub_private_repo hub_model_id hub_strategy hub_always_push"),
    (when.STEPS, NOTHING, "hub_revision run_name project trackio_space_id trackio_bucket_id"),
    (when.STEPS, NOTHING, "trackio_static_space_id dataloader_persistent_workers"),
    (when.STEPS, NOTHING, "dataloader_multiprocessing_context dataloader_in_order"),
    (when.STEPS, NOTHING, "dataloader_prefetch_factor"),
    (when.GRADIENT, TRAINING, "optim optim_args fp16 bf16 adam_beta1 adam_beta2 adam_epsilon"),
    (when.GRADIENT, TRAINING, "max_grad_norm neftune_noise_alpha"),
    (when.BACKWARD, TRAINING, "optim_target_modules"),
    (when.BACKWARD, NOTHING, "activation_checkpointing gradient_checkpointing ddp_static_graph"),
    (when.BACKWARD, NOTHING, "ddp_find_unused_parameters ddp_broadcast_buffers ddp_bucket_cap_mb"),
    (when.BACKWARD, NOTHING, "torch_empty_cache_steps"),
    (when.BACKWARD, RESULT, "torch_compile torch_compile_backend torch_compile_mode"),
    (when.BACKWARD, NOTHING, "activation_checkpointing_kwargs gradient_checkpointing_kwargs"),
    (when.SHARDS, RESULT, "fsdp fsdp_config"),
)
_FROM_0, _FROM_1 = {"kind": int, "at_least": 0}, {"kind": int, "at_least": 1}
_NOT_NEGATIVE = {"kind": float, "at_least": 0}
_NUMBERS: dict[str, dict[str, Any]] = {
    **{"ddp_timeout": _FROM_1, "ddp_bucket_cap_mb": _FROM_1, "torch_empty_cache_steps": _FROM_1},
    **{"dataloader_num_workers": _FROM_0, "dataloader_prefetch_factor": _FROM_1},
    **{"local_rank": {"kind": int, "at_least": -1}, "data_seed": _FROM_0 | {"below": 2**32}},
    **dict.fromkeys(("adam_beta1", "adam_beta2"), _NOT_NEGATIVE | {"below": 1}),
    **dict.fromkeys(("adam_epsilon", "max_grad_norm", "eval_delay"), _NOT_NEGATIVE),
    "neftune_noise_alpha": {"kind": float, "above": 0},
}
OTHERS: dict[str, Declaration] = {
    name: Declaration(
        name=name, effect=effect, decides=decides, **_NUMBERS.get(name, {"kind": object})
    )
    for effect, decides, names in _ROWS
    for name in names.split()
}


# The Trainer's arguments that would change nothing, or break a run -> why.
NOT_OFFERED = by_name(
    {
        "neither loss has label smoothing": "label_smoothing_factor",
        "the best loss is the lowest, the best metric the highest": "greater_is_better",
        "--save_on_interrupt saves a checkpoint on SIGTERM": "enable_jit_checkpoint",
        "scoring and generation decide where a cache saves time": "use_cache",
        "--use_liger_kernel takes its own defaults": "liger_kernel_config",
        "evaluation has the weights' dtype": "bf16_full_eval fp16_full_eval",
        "a training run measures the dev set by its loss and the task's metrics": (
            "prediction_loss_only include_for_metrics batch_eval_metrics eval_do_concat_batches "
            "eval_use_gather_object eval_accumulation_steps"
        ),
        "texts and labels are packed into batches of their own kind": (
            "remove_unused_columns label_names length_column_name average_tokens_across_devices "
            "accelerator_config"
        ),
        "weights are sharded with --fsdp": "deepspeed parallelism_config",
    }
)
