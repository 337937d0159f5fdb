"""The arguments of run.py beside the Trainer's, in groups: default, help and aliases."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from transformers.trainer_utils import IntervalStrategy, SchedulerType


def argument(default: Any, help_text: str, *aliases: str) -> Any:
    """Describe a field of the command line."""
    metadata: dict[str, Any] = {"help": help_text}
    if aliases:
        metadata["aliases"] = list(aliases)
    return field(default=default, metadata=metadata)


@dataclass
class TaskAndData:
    """Task and data."""

    task_name: str | None = argument(
        None,
        "Task, in any case: SST2, RTE, CB, BoolQ, WSC, WIC, MultiRC, Copa, ReCoRD, SQuAD or DROP. "
        "Excludes --train_file and --validation_file.",
    )
    data_dir: str | None = argument(
        None,
        "Folder with <task>/train.jsonl and validation.jsonl (or .parquet) in the Hub's columns. "
        "Default: the data sets are loaded from the Hub. Excludes --train_file and "
        "--validation_file.",
    )
    train_file: str | None = argument(
        None,
        "Your own training examples (or demonstrations): JSON Lines, CSV or Parquet with prompt, "
        "answer and, to choose from, options. Excludes --task_name and --data_dir.",
    )
    validation_file: str | None = argument(
        None,
        "Your own examples to report on, in the columns of --train_file. Default: a tenth of "
        "--train_file is held out. Excludes --task_name and --data_dir.",
    )
    text_column: str | None = argument(
        None,
        "Column of your own files that is the prompt. Default: prompt. Excludes --prompt_template.",
    )
    label_column: str | None = argument(
        None,
        "Column of your own files that is the class; its different values in the first file are "
        "the options. Default: the columns options and answer.",
    )
    prompt_template: str | None = argument(
        None,
        "Prompt made of columns of your own files, as in '{title}: {review}\\nIt was'. Default: "
        "the column prompt. Excludes --text_column.",
    )
    predict_file: str | None = argument(
        None,
        "Rows without an answer, in the columns of --train_file or of the task: what the model "
        "says to each goes into --predictions_file. For --trainer none. Default: none.",
    )
    metric: Literal["accuracy", "f1", "em"] | None = argument(
        None,
        "First metric of your own examples: accuracy for options, f1 or em (exact match) for "
        "generated answers. Default: accuracy, or f1.",
    )
    num_train: int = argument(
        0,
        "Training examples; with --trainer none the demonstrations before each text. 0: "
        "zero-shot. MeZO and HiZOO papers: 1000 to train on, 32 demonstrations.",
    )
    num_dev: int | None = argument(
        None,
        "Dev examples, drawn from the training split together with --num_train, for the dev loss "
        "and the dev metric of a training run. Default: none. MeZO and HiZOO papers: 500.",
    )
    num_eval: int | None = argument(
        None,
        "Examples drawn from the validation split to report on. Default: all of them. MeZO and "
        "HiZOO papers: 1000.",
        "--num_test",
    )
    num_train_sets: int | None = argument(
        None,
        "Number of training (demonstration) sets, drawn with seeds 0, 1, …; each is a run of its "
        "own. Default: one run. Excludes --train_set_seed.",
    )
    train_set_seed: int | None = argument(
        None,
        "Seed of one training (demonstration) set and of the eval draw. Default: training uses 0; "
        "in context every eval example gets demonstrations of its own. Excludes --num_train_sets.",
    )


@dataclass
class Model:
    """Model."""

    model_name: str | None = argument(
        None, "Causal language model: Hub id, local directory or GGUF file."
    )
    load_float16: bool = argument(
        False,
        "Load the weights in float16. Default: float32. Excludes --load_bfloat16 and "
        "--load_saved_dtype.",
    )
    load_bfloat16: bool = argument(
        False,
        "Load the weights in bfloat16. Default: float32. With --trainer zo take --zo_eps 1e-2: "
        "losses are rounded by as much as 1e-3 changes them. Excludes "
        "--load_float16 and --load_saved_dtype.",
    )
    load_saved_dtype: bool = argument(
        False,
        "On a GPU, load the weights in the half precision that the model was saved in: float16, or "
        "bfloat16 where the GPU has it. Otherwise, and on a CPU, in float32. Excludes "
        "--load_float16, --load_bfloat16, --load_int8 and --load_int4.",
    )
    load_int8: bool = argument(
        False,
        "Load 8-bit weights with bitsandbytes, for --trainer none or adapters (--lora, "
        "--prefix_tuning). Needs a CUDA GPU. Excludes --load_int4 and --load_saved_dtype.",
    )
    load_int4: bool = argument(
        False,
        "As --load_int8, with 4-bit weights (NF4). Excludes --load_int8 and --load_saved_dtype.",
    )
    max_length: int | None = argument(
        None,
        "Tokens of a text at most; longer ones are cut on the left. Default: 2048, or the model's "
        "positions if they are fewer.",
    )
    apply_chat_template: bool = argument(
        False,
        "Put prompts, demonstrations and answers through the tokenizer's chat template, as turns "
        "of user and assistant, for scoring, generation and training. For instruct models.",
    )
    system_prompt: str | None = argument(
        None,
        "What the system says first, with --apply_chat_template. Default: what the template says.",
    )
    no_auto_device: bool = argument(
        False, "Do not spread the model over the GPUs (accelerate's device_map auto)."
    )
    tensor_parallel: bool = argument(
        False,
        "Under torchrun, give each process a part of every large weight, by transformers' "
        "tensor-parallel plan: for models larger than one GPU. All processes have the whole batch. "
        "For --trainer zo and none.",
    )
    trust_remote_code: bool = argument(
        False, "Run Python code that comes with the model. Only for sources that you trust."
    )


@dataclass
class InContextLearning:
    """In-context learning. Both need --trainer none, and exclude each other."""

    sfc: bool = argument(
        False,
        "Calibrate scores with a content-free prompt (surface form competition, arXiv 2104.08315). "
        "Not for SQuAD and DROP. Excludes --icl_sfc.",
    )
    icl_sfc: bool = argument(
        False, "As --sfc, with the demonstrations before the content-free prompt. Excludes --sfc."
    )


@dataclass
class TrainedWeights:
    """What is trained. Default: all weights; the four other ways exclude one another."""

    lora: bool = argument(
        False,
        "Train LoRA matrices on the query and value projections (arXiv 2106.09685) and nothing "
        "else. Excludes --prefix_tuning, --head_tuning and --linear_probing.",
    )
    lora_r: int = argument(
        8, "Rank of the LoRA matrices, at most the model's hidden size (MeZO paper: 8)."
    )
    lora_alpha: int = argument(16, "Scale of LoRA, divided by its rank (MeZO paper: 16).")
    prefix_tuning: bool = argument(
        False,
        "Train keys and values that stand before every text in every layer (arXiv 2101.00190) and "
        "nothing else. Excludes --lora, --head_tuning and --linear_probing.",
    )
    num_prefix: int = argument(
        5, "Tokens of the prefix; they count for --max_length (MeZO paper: 5)."
    )
    no_reparam: bool = argument(
        True,
        "Train the prefix itself (MeZO paper); False: a two-layer network that makes it (arXiv "
        "2101.00190).",
    )
    prefix_init_by_real_act: bool = argument(
        True,
        "Start the prefix from the keys and values of random real tokens (MeZO paper); False: of "
        "noise.",
    )
    head_tuning: bool = argument(
        False,
        "Train the language-model head and nothing else. Where it is tied, the input embeddings "
        "change with it unless --untie_emb is given. Excludes --lora, --prefix_tuning and "
        "--linear_probing.",
    )
    untie_emb: bool = argument(
        False, "Give the language-model head weights of its own, where it shares the embeddings'."
    )
    linear_probing: bool = argument(
        False,
        "Fit the head's rows of the answers' tokens by logistic regression (scikit-learn) on the "
        "features before it; needs --trainer regular. Excludes --lora, --prefix_tuning and "
        "--head_tuning.",
    )
    lp_early_stopping: bool = argument(
        False,
        "Stop the logistic regression at a tolerance of 1e-2, after 1000 iterations at most. "
        "Default: 1e-4, 5000.",
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
    )
    train_as_classification: bool = argument(
        False,
        "Train with the cross-entropy over the options' mean log-probabilities instead of the "
        "language-model loss. Not for SQuAD and DROP; published runs leave it out for Copa and "
        "ReCoRD too. Excludes --non_diff.",
    )
    warmup_steps: float = argument(
        0,
        "Steps over which the learning rate rises from 0; below 1: a fraction of the run.",
        "--warmup_step",
    )
    decay_step: int = argument(
        0,
        "Step until which the learning rate stays constant before it decays to 0 at the end of the "
        "run; needs the scheduler linear or cosine. 0: the scheduler's own course.",
    )
    lr_scheduler_type: SchedulerType | str = argument(  # noqa: RUF009 - an immutable default
        "constant",
        "Learning-rate schedule of transformers, per step: constant (MeZO, HiZOO), linear, "
        "cosine, …; with warmup_steps constant means constant_with_warmup.",
        "--zo_lr_scheduler_type",
    )
    eval_strategy: IntervalStrategy | str = argument(  # noqa: RUF009 - an immutable default
        "no",
        "When the dev loss is computed: no, steps (every --eval_steps) or epoch. Needs --num_dev.",
        "--evaluation_strategy",
    )
    eval_metric: bool = argument(
        False,
        "Measure the task's metrics on the dev set too, whenever the dev loss is computed; takes "
        "as many forward passes again, or generates an answer to every dev example. A metric as "
        "--metric_for_best_model does it anyway.",
    )
    logging_steps: float = argument(
        10,
        "Steps between two entries of the log, and of the loss in the progress bar; below 1: a "
        "fraction of the run.",
    )
    logging_nan_inf_filter: bool = argument(
        False, "Log a loss that is not finite as 0. Default: as it is."
    )
    max_skipped_steps: int = argument(
        50, "Steps in a row without a finite loss, after which the run stops with a checkpoint."
    )
    save_on_interrupt: bool = argument(
        True,
        "On Ctrl-C, SIGTERM, SIGUSR1 or SIGUSR2 finish the step, save a checkpoint and stop; the "
        "same command then goes on from there.",
    )
    save_model: bool = argument(False, "Save the final model and tokenizer into output_dir.")
    merge_adapter: bool = argument(
        False,
        "Save the model of --save_model with the LoRA matrices added to its weights, as an "
        "ordinary model without an adapter.",
    )


@dataclass
class ZerothOrder:
    """Zeroth order. All of it needs --trainer zo."""

    zo_eps: float | str = argument(
        1e-3,
        "Perturbation scale μ in units of the weights (HiZOO and MeZO papers: 1e-3; 1e-1 for "
        "prefixes, 1e-2 for LoRA). auto: the smallest at which rounding and curvature change the "
        "projected gradient by 2 percent at most, as a probe of the losses finds it.",
    )
    curvature_eps: float | str | None = argument(
        None,
        "μ of the curvature c, in units of the weights, where rounding wants a larger one than for "
        "g: each measurement then takes two further forward passes a direction. auto: the smallest "
        "at which the mean of c is right within 10 percent. Default: that of --zo_eps.",
    )
    curvature_every: int | None = argument(
        None,
        "Steps from one measurement of c to the next; h changes in these steps only. Default: 1, "
        "and 10 where c has a μ of its own, or with --learning_rate auto and no smoothing.",
    )
    zo_clip: float | str = argument(
        "none",
        "Bound the projected gradient |g| by so many times its running root mean square; steps "
        "that it changes are counted in the log. none: no bound.",
    )
    probe_every: int | None = argument(
        None,
        "Steps after which the probe of --learning_rate auto or --zo_eps auto is made again. "
        "Default: only before the first step.",
    )
    hessian_smooth_type: str = argument(
        "constant1e-8",
        "Smoothing α of the diagonal Hessian: constant<number>, or linear<number> and "
        "cosine<number>, which fall to 0 over the run. constant0 is MeZO. HiZOO paper: 1e-10 to "
        "1e-4.",
    )
    hessian: Literal["full", "lowrank"] = argument(
        "full",
        "full: an entry of h for each weight. lowrank: HiZOO-L, a row and a column vector for each "
        "matrix (Adafactor's factorisation, arXiv 1804.04235).",
    )
    hessian_dtype: Literal["auto", "float32", "bfloat16"] = argument(
        "auto",
        "dtype of the full h; auto: that of the weights, bfloat16 for float16. The vectors of "
        "--hessian lowrank are float64.",
    )
    zo_perturbation: Literal["auto", "inplace", "layerwise"] = argument(
        "auto",
        "inplace: shift the weights and back, which rounds. layerwise: perturb one module at a "
        "time in scratch memory, the weights stay as they are. auto: inplace for float32, "
        "layerwise for half precision.",
    )
    zo_num_samples: int = argument(
        1,
        "Directions a step, averaged: n-SPSA (MeZO paper, arXiv 2305.17333, section 2). n "
        "directions take 2n forward passes, and one more for HiZOO.",
    )
    zo_directions: Literal["shared", "example"] = argument(
        "shared",
        "shared: all examples of a batch see the same direction u (MeZO, HiZOO). example: each has "
        "one of its own, u with random signs for rows and columns, in the same forward passes "
        "(GRZO, arXiv 2606.02857); perturbed passes take twice the multiplications. Not with "
        "--prefix_tuning.",
    )
    zo_normalize: bool = argument(
        False,
        "With --zo_directions example, divide the examples' projected gradients by their standard "
        "deviation in the batch, as GRZO does: η is then per unit of that. Not with "
        "--learning_rate auto.",
    )
    zo_compile: Literal["auto", "yes", "no"] = argument(
        "auto",
        "Whether torch.compile makes one kernel of a step's arithmetic: 10 to 30 seconds in a "
        "first run, a step several times faster beside its forward passes. Needs a C++ compiler. "
        "auto: from 16 million trained weights on.",
    )
    zo_parallel: Literal["batch", "directions"] = argument(
        "batch",
        "What several processes share. batch: --per_device_train_batch_size is of each process; "
        "the result is that of one process up to the rounding of the mean loss. directions: each "
        "takes some of the --zo_num_samples directions on the whole batch, bit for bit as one "
        "process.",
    )
    check_every: int = argument(
        1000,
        "Steps between two checksums of the weights, in the journal; several processes stop if "
        "theirs differ.",
    )
    non_diff: bool = argument(
        False,
        "Train on an objective without a gradient: minus the mean F1 of the generated text, or "
        "minus the accuracy where there are options. Excludes --train_as_classification.",
    )
    non_diff_metric: Literal["f1", "em", "accuracy"] | None = argument(
        None,
        "The metric of --non_diff: f1 or em (exact match) for generated text, accuracy for "
        "options. Default: f1, or accuracy.",
    )


@dataclass
class Rewards:
    """Rewards. For SQuAD, DROP and your own examples without options."""

    reward: str | None = argument(
        None,
        "FILE.py:function, which says how good generated texts are: it gets lists of prompts, "
        "texts and rows (dictionaries), and returns a number for each. Its mean is the first "
        "metric, and with --trainer zo the objective, maximised. The file's code is run. Default: "
        "none.",
    )
    reward_samples: int = argument(
        1,
        "Texts of a prompt in a step; above 1 they are drawn at random (--temperature, --top_p), "
        "with the same random numbers for both sides of a direction.",
    )


@dataclass
class EvaluationAndResults:
    """Evaluation and results."""

    eval_before_training: bool = argument(
        False, "Report the metric on the eval examples before training too (zero-shot)."
    )
    no_eval: bool = argument(False, "Do not evaluate after training.")
    result_file: str | None = argument(
        None, "JSON file for metrics and settings. Default: result/<tag>.json."
    )
    predictions_file: str | None = argument(
        None,
        "JSON Lines file with id, prediction, correct and scores of every eval example. Default: "
        "not written.",
    )
    overwrite_output_dir: bool = argument(
        False,
        "Make the result anew where there is one: delete the checkpoints in output_dir and start "
        "again. What the very same settings began there and did not finish goes on all the same. "
        "Default: go on from the newest checkpoint; compute nothing where the result is there.",
    )
    config: str | None = argument(
        None,
        "YAML file of arguments, as in learning_rate: 1e-6. Those of the command line win. "
        "Default: none.",
    )
    show_config: bool = argument(
        False,
        "Print the arguments as such a file, with the other settings as comments, and do nothing.",
    )
    dry_run: bool = argument(
        False,
        "Load and check everything but the weights, print steps, forward passes, memory and time "
        "that the run will take, and do nothing.",
    )
    tag: str | None = argument(
        None, "Name of the run, of its result file and output_dir. Default: made of the settings."
    )
    quiet: bool = argument(
        False, "Show neither bars nor lines of steps: the metrics and the places of files alone."
    )
    verbose: bool = argument(False, "Show the first prompts, their options and scores.")


@dataclass
class Generation:
    """Generation. For SQuAD, DROP and your own examples without options."""

    sampling: bool = argument(False, "Sample the generated text. Default: greedy, or beams.")
    temperature: float = argument(1.0, "With --sampling, divides the logits; 1 leaves them.")
    num_beams: int = argument(1, "Beams of the search, at most the vocabulary's tokens; 1: none.")
    top_k: int | None = argument(
        None, "With --sampling, draw from the k likeliest tokens. Default: from all."
    )
    top_p: float = argument(
        0.95,
        "With --sampling, draw from the likeliest tokens that have this much probability together "
        "(MeZO: 0.95); 1: from all.",
    )
    max_new_tokens: int = argument(50, "Tokens generated at most (MeZO: 50).")
    eos_token: str = argument(
        "\\n", "Text whose last token ends the generation; \\n is a newline (MeZO: newline)."
    )


GROUPS = (
    TaskAndData,
    Model,
    InContextLearning,
    TrainedWeights,
    Training,
    ZerothOrder,
    Rewards,
    EvaluationAndResults,
    Generation,
)
for group in GROUPS:
    # HfArgumentParser prints it above the group.
    group._argument_group_name = group.__doc__.rstrip(".")

# The Trainer's arguments that most runs need, in the words of --help and docs/arguments.md.
COMMON_TRAINER_ARGUMENTS = {
    "output_dir": "Folder of the checkpoints and of the saved model. Default: result/<tag>.",
    "max_steps": "Training steps. -1: as many as --num_train_epochs has.",
    "num_train_epochs": "Passes over the training examples, where --max_steps is not given.",
    "per_device_train_batch_size": "Examples a step, in each process (MeZO and HiZOO papers: 16).",
    "per_device_eval_batch_size": "Examples that are scored together, in each process.",
    "gradient_accumulation_steps": "Batches a step.",
    "learning_rate": "Learning rate η (MeZO and HiZOO papers, OPT-13B: 1e-6 or 1e-7; 1e-2 or 1e-3 "
    "for prefixes, 1e-4 or 5e-5 for LoRA). auto, with --trainer zo: a tenth of the step at which "
    "the loss of a batch is lowest, by the curvature measured along the run; schedules apply.",
    "weight_decay": "Decoupled weight decay λ; none for biases and layer norms.",
    "eval_steps": "Steps between dev losses, with --eval_strategy steps. Default: --logging_steps.",
    "save_strategy": "When checkpoints are saved: no, steps (every --save_steps), epoch or best.",
    "save_steps": "Steps between checkpoints, with --save_strategy steps.",
    "save_total_limit": "Checkpoints that are kept: the newest, and with --load_best_model_at_end "
    "the best. Default: all.",
    "load_best_model_at_end": "Report and keep the checkpoint of the lowest dev loss, or of the "
    "best --metric_for_best_model; with --trainer zo and --save_strategy no it is replayed.",
    "metric_for_best_model": "What the best checkpoint is best by, on the dev set: loss, or a "
    "metric of the task: accuracy, f1 or em. Default: loss.",
    "resume_from_checkpoint": "Folder of a checkpoint to go on from. Default: the newest one in "
    "--output_dir.",
    "report_to": "Where losses are reported: tensorboard, wandb, … or none.",
    "seed": "Seed of the batches, the noise, an adapter's first weights and sampled text; examples "
    "are drawn by --train_set_seed. From 0 to 2^32 - 1.",
}
