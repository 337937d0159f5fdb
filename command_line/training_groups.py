"""The arguments of run.py about training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from command_line.declarations import AUTO, NOTHING, RESULT, argument
from command_line.effects import (
    CURVATURE,
    DECAY,
    DEV_LOSSES,
    FORWARD,
    FULL_HESSIAN,
    HESSIAN,
    LANGUAGE_MODEL_LOSS,
    LOG_STEPS,
    LORA,
    METRIC_OBJECTIVE,
    PREFIX,
    PROBING,
    SAVED_LORA,
    STEPS,
    TRAINED,
    WITHOUT_GRADIENT,
)

SCHEDULES = (
    *("linear", "cosine", "cosine_with_restarts", "polynomial", "constant"),
    *("constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau", "cosine_with_min_lr"),
    *("cosine_warmup_with_min_lr", "warmup_stable_decay", "greedy"),
)


@dataclass
class TrainedWeights:
    """What is trained. Default: all weights; the four other ways exclude one another."""

    lora: bool = argument(
        False,
        "Train LoRA matrices on the query and value projections (arXiv 2106.09685) and nothing "
        "else. Excludes --prefix_tuning, --head_tuning and --linear_probing.",
        effect=TRAINED,
    )
    lora_r: int = argument(
        8,
        "Rank of the LoRA matrices, at most the model's hidden size (MeZO paper: 8).",
        at_least=1,
        effect=LORA,
    )
    lora_alpha: int = argument(
        16, "Scale of LoRA, divided by its rank (MeZO paper: 16).", at_least=1, effect=LORA
    )
    prefix_tuning: bool = argument(
        False,
        "Train keys and values that stand before every text in every layer (arXiv 2101.00190) and "
        "nothing else. Excludes --lora, --head_tuning and --linear_probing.",
        effect=TRAINED,
    )
    num_prefix: int = argument(
        5,
        "Tokens of the prefix; they count for --max_length (MeZO paper: 5).",
        at_least=1,
        effect=PREFIX,
    )
    no_reparam: bool = argument(
        True,
        "Train the prefix itself (MeZO paper); False: a two-layer network that makes it (arXiv "
        "2101.00190).",
        effect=PREFIX,
    )
    prefix_init_by_real_act: bool = argument(
        True,
        "Start the prefix from the keys and values of random real tokens (MeZO paper); False: of "
        "noise.",
        effect=PREFIX,
    )
    head_tuning: bool = argument(
        False,
        "Train the language-model head and nothing else. Where it is tied, the input embeddings "
        "change with it unless --untie_emb is given. Excludes --lora, --prefix_tuning and "
        "--linear_probing.",
        effect=TRAINED,
    )
    untie_emb: bool = argument(
        False,
        "Give the language-model head weights of its own, where it shares the embeddings'.",
        effect=TRAINED,
    )
    linear_probing: bool = argument(
        False,
        "Fit the head's rows of the answers' tokens by logistic regression (scikit-learn) on the "
        "features before it; needs --trainer regular. Excludes --lora, --prefix_tuning and "
        "--head_tuning.",
        effect=TRAINED,
    )
    lp_early_stopping: bool = argument(
        False,
        "Stop the logistic regression at a tolerance of 1e-2, after 1000 iterations at most. "
        "Default: 1e-4, 5000.",
        effect=PROBING,
    )


@dataclass
class Training:
    """Training. What belongs to steps, gradients or checkpoints needs --trainer regular or zo."""

    trainer: Literal["none", "regular", "zo"] = argument(
        "none",
        "none: no training, zero-shot or in context. regular: backpropagation with --optim. "
        "zo: HiZOO (MeZO with --hessian_smooth_type constant0), forward passes only.",
    )
    only_train_option: bool = argument(
        True,
        "Language-model loss on the correct option's tokens only (MeZO paper); False: on the "
        "prompt's too. Not with --train_as_classification or --non_diff, which are other "
        "objectives.",
        effect=LANGUAGE_MODEL_LOSS,
    )
    train_as_classification: bool = argument(
        False,
        "Train with the cross-entropy over the options' mean log-probabilities instead of the "
        "language-model loss. Not for SQuAD and DROP; published runs leave it out for Copa and "
        "ReCoRD too. Excludes --non_diff.",
        effect=STEPS,
    )
    warmup_steps: float = argument(
        0,
        "Steps over which the learning rate rises from 0; below 1: a fraction of the run.",
        "--warmup_step",
        at_least=0,
        fraction=True,
        effect=STEPS,
    )
    decay_step: int = argument(
        0,
        "Step until which the learning rate stays constant before it decays to 0 at the end of the "
        "run; needs the scheduler linear or cosine. 0: the scheduler's own course.",
        at_least=0,
        effect=DECAY,
    )
    lr_scheduler_type: str = argument(
        "constant",
        "Learning-rate schedule of transformers, per step: constant (MeZO, HiZOO), linear, "
        "cosine, …; with warmup_steps constant means constant_with_warmup.",
        "--zo_lr_scheduler_type",
        effect=STEPS,
        choices=SCHEDULES,
    )
    eval_strategy: str = argument(
        "no",
        "When the dev loss is computed: no, steps (every --eval_steps) or epoch. Needs --num_dev.",
        "--evaluation_strategy",
        effect=STEPS,
        choices=("no", "steps", "epoch"),
        decides=RESULT,
    )
    eval_metric: bool = argument(
        False,
        "Measure the task's metrics on the dev set too, whenever the dev loss is computed; takes "
        "as many forward passes again, or generates an answer to every dev example. A metric as "
        "--metric_for_best_model does it anyway.",
        effect=DEV_LOSSES,
        decides=NOTHING,
    )
    logging_steps: float = argument(
        10,
        "Steps between two entries of the log, and of the loss in the progress bar; below 1: a "
        "fraction of the run.",
        above=0,
        fraction=True,
        effect=LOG_STEPS,
        decides=NOTHING,
    )
    logging_nan_inf_filter: bool = argument(
        False,
        "Log a loss that is not finite as 0. Default: as it is.",
        effect=STEPS,
        decides=NOTHING,
    )
    max_skipped_steps: int = argument(
        50,
        "Steps in a row without a finite loss, after which the run stops with a checkpoint.",
        at_least=1,
        effect=STEPS,
        decides=RESULT,
    )
    save_on_interrupt: bool = argument(
        True,
        "On Ctrl-C, SIGTERM, SIGUSR1 or SIGUSR2 finish the step, save a checkpoint and stop; the "
        "same command then resumes.",
        effect=STEPS,
        decides=NOTHING,
    )
    save_model: bool = argument(
        False,
        "Save the final model and tokenizer into output_dir.",
        effect=TRAINED,
        decides=NOTHING,
    )
    merge_adapter: bool = argument(
        False,
        "Save the model of --save_model with the LoRA matrices added to its weights, as an "
        "ordinary model without an adapter.",
        effect=SAVED_LORA,
        decides=NOTHING,
    )


@dataclass
class ZerothOrder:
    """Zeroth order. All of it needs --trainer zo."""

    zo_eps: float | str = argument(
        1e-3,
        "Perturbation scale μ in units of the weights (HiZOO and MeZO papers: 1e-3; 1e-1 for "
        "prefixes, 1e-2 for LoRA). auto: the smallest at which rounding and curvature change the "
        "projected gradient by 2 percent at most, as a probe of the losses finds it.",
        above=0,
        words=(AUTO,),
        effect=FORWARD,
    )
    curvature_eps: float | str | None = argument(
        None,
        "μ of the curvature c, in units of the weights, where rounding wants a larger one than for "
        "g: each measurement then takes two further forward passes a direction. auto: the smallest "
        "at which the mean of c is right within 10 percent. Default: that of --zo_eps.",
        above=0,
        words=(AUTO,),
        effect=CURVATURE,
    )
    curvature_every: int | None = argument(
        None,
        "Steps from one measurement of c to the next; h changes in these steps only. Default: 1, "
        "and 10 where c has a μ of its own, or with --learning_rate auto and no smoothing.",
        at_least=1,
        effect=CURVATURE,
    )
    hessian_smooth_type: str = argument(
        "constant1e-8",
        "Smoothing α of the diagonal Hessian: constant<number>, or linear<number> and "
        "cosine<number>, which fall to 0 over the run. constant0 is MeZO. HiZOO paper: 1e-10 to "
        "1e-4.",
        effect=FORWARD,
    )
    hessian: Literal["full", "lowrank"] = argument(
        "full",
        "full: an entry of h for each weight. lowrank: HiZOO-L, a row and a column vector for each "
        "matrix (Adafactor's factorisation, arXiv 1804.04235).",
        effect=HESSIAN,
    )
    hessian_dtype: Literal["auto", "float32", "bfloat16"] = argument(
        "auto",
        "dtype of the full h; auto: that of the weights, bfloat16 for float16. The vectors of "
        "--hessian lowrank are float64.",
        effect=FULL_HESSIAN,
    )
    zo_perturbation: Literal["auto", "inplace", "layerwise"] = argument(
        "auto",
        "inplace: shift the weights and back, which rounds. layerwise: perturb one module at a "
        "time in scratch memory, the weights stay as they are. auto: inplace for float32, "
        "layerwise for half precision.",
        effect=FORWARD,
    )
    zo_num_samples: int = argument(
        1,
        "Directions a step, averaged: n-SPSA (MeZO paper, arXiv 2305.17333, section 2). n "
        "directions take 2n forward passes, and one more for HiZOO.",
        at_least=1,
        effect=FORWARD,
    )
    zo_compile: Literal["auto", "yes", "no"] = argument(
        "auto",
        "Whether torch.compile makes one kernel of a step's arithmetic: 10 to 30 seconds in a "
        "first run, a step several times faster beside its forward passes. Needs a C++ compiler. "
        "auto: from 16 million trained weights on.",
        effect=FORWARD,
        decides=RESULT,
    )
    zo_parallel: Literal["batch", "directions"] = argument(
        "batch",
        "What several processes share. batch: --per_device_train_batch_size is of each process; "
        "the result is that of one process up to the rounding of the mean loss. directions: each "
        "takes some of the --zo_num_samples directions on the whole batch, bit for bit as one "
        "process.",
        effect=FORWARD,
        decides=NOTHING,
    )
    check_every: int = argument(
        1000,
        "Steps between two checksums of the weights, in the journal; several processes stop if "
        "theirs differ.",
        at_least=1,
        effect=FORWARD,
        decides=NOTHING,
    )
    non_diff: bool = argument(
        False,
        "Train on an objective without a gradient: minus the mean F1 of the generated text, or "
        "minus the accuracy where there are options. Excludes --train_as_classification.",
        effect=WITHOUT_GRADIENT,
    )
    non_diff_metric: Literal["f1", "em", "accuracy"] | None = argument(
        None,
        "The metric of --non_diff: f1 or em (exact match) for generated text, accuracy for "
        "options. Default: f1, or accuracy.",
        effect=METRIC_OBJECTIVE,
    )
