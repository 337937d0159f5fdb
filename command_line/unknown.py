"""What run.py says to arguments that it does not have: what they are called here, or why not."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# What the examples of MeZO, Hugging Face and others call an argument -> what to give here.
OTHER_NAMES = {
    **dict.fromkeys(("task", "dataset", "dataset_name", "tasks"), "--task_name"),
    **dict.fromkeys(
        ("model", "model_path", "model_name_or_path", "model_id", "pretrained", "base_model"),
        "--model_name",
    ),
    **dict.fromkeys(("data", "data_path", "dataset_dir"), "--data_dir, or --train_file"),
    **dict.fromkeys(("train_data", "train_path", "training_file"), "--train_file"),
    **dict.fromkeys(
        ("eval_file", "test_file", "dev_file", "valid_file", "validation"), "--validation_file"
    ),
    **dict.fromkeys(
        ("train", "num_train_samples", "max_train_samples", "shots", "num_shots", "n_shots"),
        "--num_train",
    ),
    **dict.fromkeys(("num_fewshot", "k_shot", "num_demos", "num_demonstrations"), "--num_train"),
    **dict.fromkeys(("dev", "num_valid", "num_validation"), "--num_dev"),
    **dict.fromkeys(
        ("eval", "test", "limit", "max_eval_samples", "num_eval_samples", "num_samples"),
        "--num_eval",
    ),
    **dict.fromkeys(
        ("load_in_8bit", "load_8bit", "int8", "load_in_int8", "use_8bit"), "--load_int8"
    ),
    **dict.fromkeys(
        ("load_in_4bit", "load_4bit", "int4", "load_in_int4", "qlora", "nf4"), "--load_int4"
    ),
    **dict.fromkeys(("load_fp16", "float16", "half", "load_half"), "--load_float16"),
    **dict.fromkeys(("load_bf16", "bfloat16"), "--load_bfloat16"),
    **dict.fromkeys(
        ("dtype", "torch_dtype", "precision"),
        "--load_float16 or --load_bfloat16 (float32: neither)",
    ),
    **dict.fromkeys(
        ("max_seq_length", "max_seq_len", "max_len", "seq_len", "model_max_length", "cutoff_len"),
        "--max_length",
    ),
    **dict.fromkeys(("trust_code", "remote_code"), "--trust_remote_code"),
    **dict.fromkeys(("device", "gpu", "cuda", "cpu"), "--use_cpu (default: the GPU, if any)"),
    **dict.fromkeys(
        ("icl", "zero_shot", "evaluate", "eval_only"), "--trainer none (which is the default)"
    ),
    **dict.fromkeys(("zo", "mezo", "hizoo", "zeroth_order"), "--trainer zo"),
    **dict.fromkeys(("ft", "finetune", "fine_tune", "training"), "--trainer regular or zo"),
    **dict.fromkeys(("mode", "tuning", "peft"), "--lora, --prefix_tuning or --head_tuning"),
    **dict.fromkeys(("rank", "lora_rank", "r"), "--lora_r"),
    **dict.fromkeys(("prefix", "use_prefix"), "--prefix_tuning"),
    **dict.fromkeys(("num_virtual_tokens", "prefix_length", "prefix_len"), "--num_prefix"),
    **dict.fromkeys(("head_only", "tune_head", "train_head"), "--head_tuning"),
    **dict.fromkeys(("linear_probe", "lp", "probing"), "--linear_probing"),
    **dict.fromkeys(("classification", "train_classification"), "--train_as_classification"),
    **dict.fromkeys(
        ("bs", "batch_size", "train_batch_size", "per_gpu_train_batch_size", "micro_batch_size"),
        "--per_device_train_batch_size",
    ),
    **dict.fromkeys(
        ("eval_batch_size", "test_batch_size", "per_gpu_eval_batch_size", "eval_bs"),
        "--per_device_eval_batch_size",
    ),
    **dict.fromkeys(
        ("grad_accum", "grad_acc_steps", "accumulation_steps", "gradient_accumulation"),
        "--gradient_accumulation_steps",
    ),
    **dict.fromkeys(("lr", "eta", "step_size"), "--learning_rate"),
    **dict.fromkeys(("wd", "decay"), "--weight_decay"),
    **dict.fromkeys(
        ("epochs", "epoch", "num_epochs", "n_epochs", "max_epochs"), "--num_train_epochs"
    ),
    **dict.fromkeys(
        ("steps", "step", "num_steps", "n_steps", "max_step", "num_train_steps", "train_steps"),
        "--max_steps",
    ),
    **dict.fromkeys(("iters", "max_iters", "num_iterations"), "--max_steps"),
    **dict.fromkeys(("scheduler", "lr_scheduler", "schedule"), "--lr_scheduler_type"),
    **dict.fromkeys(
        ("warmup", "warmup_ratio", "num_warmup_steps"), "--warmup_steps (below 1: a fraction)"
    ),
    **dict.fromkeys(("optimizer", "optimiser"), "--optim, or --trainer zo for HiZOO"),
    **dict.fromkeys(("clip", "grad_clip", "clip_grad", "gradient_clip_val"), "--max_grad_norm"),
    **dict.fromkeys(("eps", "mu", "epsilon", "zo_epsilon", "perturbation_scale"), "--zo_eps"),
    **dict.fromkeys(
        ("alpha", "smooth", "hessian_smooth", "smooth_type", "smoothing"), "--hessian_smooth_type"
    ),
    **dict.fromkeys(
        ("q", "n_spsa", "num_directions", "num_perturbations", "zo_samples", "num_pertub"),
        "--zo_num_samples",
    ),
    **dict.fromkeys(("lowrank", "low_rank", "hizoo_l", "hessian_type"), "--hessian lowrank"),
    **dict.fromkeys(("perturbation", "perturbation_mode"), "--zo_perturbation"),
    **dict.fromkeys(("directions", "per_example", "grzo"), "--zo_directions"),
    **dict.fromkeys(("compile",), "--zo_compile, or --torch_compile with --trainer regular"),
    **dict.fromkeys(("save_every", "checkpoint_steps", "ckpt_steps"), "--save_steps"),
    **dict.fromkeys(("eval_every", "evaluation_steps", "val_steps"), "--eval_steps"),
    **dict.fromkeys(("log_steps", "log_every", "log_interval"), "--logging_steps"),
    **dict.fromkeys(("output", "out", "out_dir", "save_dir", "logging_dir"), "--output_dir"),
    **dict.fromkeys(("resume", "checkpoint", "ckpt"), "--resume_from_checkpoint"),
    **dict.fromkeys(("overwrite", "overwrite_output", "fresh"), "--overwrite_output_dir"),
    **dict.fromkeys(("wandb", "use_wandb"), "--report_to wandb"),
    **dict.fromkeys(("tensorboard",), "--report_to tensorboard"),
    **dict.fromkeys(("name", "run", "exp_name", "experiment_name"), "--tag"),
    **dict.fromkeys(("config_file", "cfg", "yaml"), "--config"),
    **dict.fromkeys(("result", "results", "output_file"), "--result_file"),
    **dict.fromkeys(("predictions", "save_predictions"), "--predictions_file"),
    **dict.fromkeys(("random_seed", "rng_seed"), "--seed"),
    **dict.fromkeys(("do_sample", "sample"), "--sampling"),
    **dict.fromkeys(("beams", "beam_size", "beam_width"), "--num_beams"),
    **dict.fromkeys(("max_tokens", "max_gen_len", "max_generate_length"), "--max_new_tokens"),
    **dict.fromkeys(("stop", "stop_token", "end_token"), "--eos_token"),
    **dict.fromkeys(("f1", "objective"), "--non_diff"),
}

_LOSS_ONLY = "a training run measures the dev set by its loss alone"
_PACKED = "texts and labels are packed into batches of their own kind"
# Arguments of the Trainer that would do nothing in any run, or would break it -> why.
NOT_OFFERED = {
    **dict.fromkeys(
        ("do_train", "do_predict"), "--trainer zo or --trainer regular trains, none does not"
    ),
    "do_eval": "every run evaluates, unless --no_eval is given",
    **dict.fromkeys(
        ("prediction_loss_only", "include_for_metrics", "batch_eval_metrics"), _LOSS_ONLY
    ),
    **dict.fromkeys(
        ("eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps"), _LOSS_ONLY
    ),
    **dict.fromkeys(
        ("bf16_full_eval", "fp16_full_eval"),
        "evaluation has the precision of the weights: give --load_bfloat16 or --load_float16",
    ),
    **dict.fromkeys(("remove_unused_columns", "label_names", "length_column_name"), _PACKED),
    "average_tokens_across_devices": _PACKED,
    "label_smoothing_factor": "neither the options' losses nor the language-model loss has any",
    "use_cache": "scoring and generation decide for themselves where a cache saves time",
    "liger_kernel_config": "--use_liger_kernel takes its own defaults",
    "enable_jit_checkpoint": "--save_on_interrupt saves a checkpoint on SIGTERM, and on Ctrl-C too",
    "deepspeed": "weights are sharded with --fsdp (bash finetune_fsdp.sh)",
    "parallelism_config": "weights are sharded with --fsdp (bash finetune_fsdp.sh)",
}


def explain_unknown(word: str, known: Iterable[str]) -> str:
    """Return one line on a word of the command line that is no argument of run.py.

    Args:
        word: as it was typed, ``--lr`` or ``--lr=1e-6``.
        known: the arguments that there are, ``--learning_rate`` and so on.
    """
    option = word.split("=")[0]
    name = option.lstrip("-").replace("-", "_").lower()
    if name in NOT_OFFERED:
        return f"{option} is not offered: {NOT_OFFERED[name]}; leave it out"
    near = difflib.get_close_matches(f"--{name}", known, n=1)
    if name in OTHER_NAMES:
        hint = f"did you mean {OTHER_NAMES[name]}?"
    elif near:
        hint = f"did you mean {near[0]}?"
    else:
        hint = "python run.py --help lists the arguments"
    return f"unknown argument {word}: {hint}"
