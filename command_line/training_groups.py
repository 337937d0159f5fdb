"""The arguments of run.py about training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from command_line import effects as when
from command_line.declarations import AUTO, NOTHING, RESULT, TRAINING, argument

SCHEDULES = (
    *("linear", "cosine", "cosine_with_restarts", "polynomial", "constant"),
    *("constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau", "cosine_with_min_lr"),
    *("cosine_warmup_with_min_lr", "warmup_stable_decay", "greedy"),
)


@dataclass
class TrainedWeights:
    """What is trained. Default: all weights; the four other ways exclude one another."""

    _effect, _decides = when.TRAINED, TRAINING

    lora: bool = argument(
        False,
        "Train LoRA matrices on the query and value projections (arXiv 2106.09685) and nothing "
        "else.",
    )
    lora_r: int = argument(
        8,
        "Rank of the LoRA matrices, at most the model's hidden size (MeZO paper: 8).",
        at_least=1,
        effect=when.LORA,
    )
    lora_alpha: int = argument(
        16, "Scale of LoRA, divided by its rank (MeZO paper: 16).", at_least=1, effect=when.LORA
    )
    prefix_tuning: bool = argument(
        False,
        "Train keys and values that stand before every text in every layer (arXiv 2101.00190) and "
        "nothing else.",
    )
    num_prefix: int = argument(
        5,
        "Tokens of the prefix; they count for --max_length (MeZO paper: 5).",
        at_least=1,
        effect=when.PREFIX,
    )
    no_reparam: bool = argument(
        True,
        "Train the prefix itself (MeZO paper); False: a two-layer network that makes it.",
        effect=when.PREFIX,
    )
    prefix_init_by_real_act: bool = argument(
        True,
        "Start the prefix from the keys and values of random real tokens (MeZO paper); False: of "
        "noise.",
        effect=when.PREFIX,
    )
    head_tuning: bool = argument(
        False,
        "Train the language-model head and nothing else. Tied input embeddings change with it "
        "unless --untie_emb is given.",
    )
    untie_emb: bool = argument(
        False, "Give the language-model head weights of its own, where it shares the embeddings'."
    )
    linear_probing: bool = argument(
        False,
        "Fit the head's rows of the answers' tokens by logistic regression (scikit-learn) on the "
        "features before it; needs --trainer regular.",
    )
    lp_early_stopping: bool = argument(
        False,
        "Stop the logistic regression at a tolerance of 1e-2 (not 1e-4), after 1000 iterations at "
        "most (not 5000).",
        effect=when.PROBING,
    )


@dataclass
class Training:
    """Training. What belongs to steps, gradients or checkpoints needs --trainer regular or zo."""

    _effect, _decides = when.STEPS, TRAINING

    trainer: Literal["none", "regular", "zo"] = argument(
        "none",
        "none: zero-shot or in context. regular: backpropagation with --optim. zo: HiZOO (MeZO "
        "with --hessian_smooth_type constant0), forward passes only.",
        effect=None,
    )
    only_train_option: bool = argument(
        True,
        "Language-model loss on the correct option's tokens only (MeZO paper); False: on the "
        "prompt's too.",
        effect=when.LANGUAGE_MODEL_LOSS,
    )
    train_as_classification: bool = argument(
        False,
        "Train with the cross-entropy over the options' mean log-probabilities. Not for SQuAD and "
        "DROP; published runs leave it out for Copa and ReCoRD too.",
    )
    warmup_steps: float = argument(
        0,
        "Steps over which the learning rate rises from 0; below 1: a fraction of the run.",
        "--warmup_step",
        at_least=0,
        fraction=True,
    )
    decay_step: int = argument(
        0,
        "Step until which the learning rate stays constant before it decays to 0 at the end of "
        "the run. 0: the scheduler's own course.",
        at_least=0,
        effect=when.DECAY,
    )
    lr_scheduler_type: str = argument(
        "constant",
        "Learning-rate schedule of transformers, per step; with warmup_steps constant means "
        "constant_with_warmup.",
        "--zo_lr_scheduler_type",
        choices=SCHEDULES,
    )
    eval_strategy: str = argument(
        "no",
        "When the dev loss is computed: no, steps (every --eval_steps) or epoch. Needs --num_dev.",
        "--evaluation_strategy",
        choices=("no", "steps", "epoch"),
        decides=RESULT,
    )
    eval_metric: bool = argument(
        False,
        "Measure the task's metrics on the dev set with every dev loss: as many forward passes "
        "again. A metric as --metric_for_best_model does it anyway.",
        effect=when.DEV_LOSSES,
        decides=NOTHING,
    )
    logging_steps: float = argument(
        10,
        "Steps between two entries of the log; below 1: a fraction of the run.",
        above=0,
        fraction=True,
        effect=when.LOG_STEPS,
        decides=NOTHING,
    )
    logging_nan_inf_filter: bool = argument(
        False, "Log a loss that is not finite as 0. Default: as it is.", decides=NOTHING
    )
    max_skipped_steps: int = argument(
        50,
        "Steps in a row without a finite loss, after which the run stops with a checkpoint.",
        at_least=1,
        decides=RESULT,
    )
    save_on_interrupt: bool = argument(
        True,
        "On Ctrl-C, SIGTERM, SIGUSR1 or SIGUSR2 finish the step, save a checkpoint and stop; the "
        "same command then resumes.",
        decides=NOTHING,
    )
    save_model: bool = argument(
        False,
        "Save the final model and tokenizer into output_dir.",
        effect=when.TRAINED,
        decides=NOTHING,
    )
    merge_adapter: bool = argument(
        False,
        "Save the model with the LoRA matrices added to its weights, without an adapter.",
        effect=when.SAVED_LORA,
        decides=NOTHING,
    )


@dataclass
class ZerothOrder:
    """Zeroth order. All of it needs --trainer zo."""

    _effect, _decides = when.FORWARD, TRAINING

    zo_eps: float | str = argument(
        1e-3,
        "Perturbation scale μ in units of the weights (HiZOO and MeZO papers: 1e-3; 1e-1 for "
        "prefixes, 1e-2 for LoRA). auto: by the noise and the curvature of the loss.",
        above=0,
        words=(AUTO,),
    )
    curvature_eps: float | str | None = argument(
        None,
        "μ of the curvature c, where rounding wants a larger one than for g: two further forward "
        "passes a direction. auto: by the noise of c. Default: that of --zo_eps.",
        above=0,
        words=(AUTO,),
        effect=when.CURVATURE,
    )
    curvature_every: int | None = argument(
        None,
        "Steps from one measurement of c to the next. Default: 1; 10 where c has a μ of its own, "
        "or with --learning_rate auto and no smoothing.",
        at_least=1,
        effect=when.CURVATURE,
    )
    hessian_smooth_type: str = argument(
        "constant1e-8",
        "Smoothing α of the diagonal Hessian: constant<number>, or linear<number> and "
        "cosine<number>, which fall to 0. constant0 is MeZO. HiZOO paper: 1e-10 to 1e-4.",
    )
    hessian: Literal["full", "lowrank"] = argument(
        "full",
        "full: an entry of h for each weight. lowrank: HiZOO-L, a row and a column vector for "
        "each matrix (Adafactor's factorisation, arXiv 1804.04235).",
        effect=when.HESSIAN,
    )
    hessian_dtype: Literal["auto", "float32", "bfloat16"] = argument(
        "auto",
        "dtype of the full h; auto: that of the weights, bfloat16 for float16.",
        effect=when.FULL_HESSIAN,
    )
    zo_perturbation: Literal["auto", "inplace", "layerwise"] = argument(
        "auto",
        "inplace: shift the weights and back, which rounds. layerwise: perturb one module at a "
        "time in scratch memory. auto: layerwise for half precision.",
    )
    zo_num_samples: int = argument(
        1,
        "Directions a step, averaged: n-SPSA (arXiv 2305.17333). n directions take 2n forward "
        "passes, and one more for HiZOO.",
        at_least=1,
    )
    zo_compile: Literal["auto", "yes", "no"] = argument(
        "auto",
        "Whether torch.compile makes the step's kernels: 10 to 30 seconds in a first run, faster "
        "steps. Needs a C++ compiler. auto: from 16 million trained weights on.",
        decides=RESULT,
    )
    zo_parallel: Literal["batch", "directions"] = argument(
        "batch",
        "What several processes share. batch: each has --per_device_train_batch_size examples of "
        "it. directions: each takes some of --zo_num_samples on the whole batch.",
        decides=NOTHING,
    )
    check_every: int = argument(
        1000,
        "Steps between two checksums of the weights, in the journal; several processes stop if "
        "theirs differ.",
        at_least=1,
        decides=NOTHING,
    )
    non_diff: bool = argument(
        False,
        "Train on a metric without a gradient: minus the mean F1 of the generated text, or minus "
        "the accuracy of options.",
        effect=when.WITHOUT_GRADIENT,
    )
    non_diff_metric: Literal["f1", "em", "accuracy"] | None = argument(
        None,
        "The metric of --non_diff: f1 or em (exact match) for generated text, accuracy for "
        "options. Default: f1, or accuracy.",
        effect=when.METRIC_OBJECTIVE,
    )
