"""What MeZO, HiZOO, ZO-LLM, ZO2, LOZO and FZOO call arguments and values, beside our names."""

from __future__ import annotations


def by_name(reasons: dict[str, str]) -> dict[str, str]:
    """Return the reason of each name, of those that share it."""
    return {name: reason for reason, names in reasons.items() for name in names.split()}


_SCHEDULES = {
    "linear_with_warmup": ("linear", "{}"),
    "cosine_with_warmup": ("cosine", '{"num_cycles": 2}'),
    "cosine_with_hard_restarts_with_warmup": ("cosine_with_restarts", '{"num_cycles": 2}'),
    "polynomial_decay_with_warmup": ("polynomial", '{"power": 3, "lr_end": 1e-10}'),
    "constant_polynomial_decay_with_warmup": ("polynomial", '{"power": 3, "lr_end": 1e-7}'),
}
# Argument and published value -> the same in our arguments.
TRANSLATED: dict[tuple[str, str], dict[str, str]] = {
    ("lr_scheduler_type", name): {"lr_scheduler_type": ours, "lr_scheduler_kwargs": options}
    for name, (ours, options) in _SCHEDULES.items()
} | {("method", "mezo"): {"hessian_smooth_type": "constant0"}}
# Published arguments that change nothing here -> why.
IGNORED = by_name(
    {
        "--trainer and --no_eval decide": "do_train do_eval do_predict",
        "logs lie in --output_dir": "logging_dir",
        "checkpoints are safetensors": "save_safetensors",
        "batches are packed": "group_by_length",
        "transformers finds the layers": "fsdp_transformer_layer_cls_to_wrap",
        "the Trainer scales gradients with --fp16": "do_grad_scaling",
        "transformers has it no more": (
            "half_precision_backend fp16_backend fp16_opt_level jit_mode_eval use_ipex ray_scope "
            "use_mps_device use_legacy_prediction_loop past_index include_inputs_for_metrics"
        ),
        "for --method FZOO": "N thre D",
        "for --trainer LOZO": "step_interval rank_r",
        "for --prompt_tuning": "num_virtual_tokens prompt_init_by_real_tokens",
        "for --zo_method": "zo_mode working_device offloading_device",
        "for --module_wise_perturbation": "coordinate_perturbation",
    }
)
# Published arguments that need what is missing here -> what there is instead.
NOT_HERE = by_name(
    {
        "--trainer zo is MeZO, and HiZOO with --hessian_smooth_type": "method",
        "--trainer zo is MeZO in one process, without ZO2's offloading": "zo_method",
        "a step perturbs all trained weights, to both sides": (
            "perturbation_mode module_wise_perturbation gradient_sparsity"
        ),
        "--trainer zo has no momentum": "momentum",
        "--prefix_tuning trains a prefix": "prompt_tuning",
        "--offload streams weights that do not fit into memory": "load_int8 load_int4",
    }
)
# Values that ask for what is done anyway.
AS_HERE = ("two_side",)
