"""The command line of run.py: every argument with its help, and what belongs to a run."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SchedulerType

from tasks import Task, choose_task
from utils import InputError, one_line

USAGE = """\
python run.py --task_name TASK --model_name MODEL [arguments]

  zero-shot      python run.py --task_name SST2 --model_name facebook/opt-125m --num_eval 1000
  in context     python run.py --task_name SST2 --model_name facebook/opt-125m --num_train 32
  HiZOO          python run.py --task_name SST2 --model_name facebook/opt-125m --trainer zo \\
                     --train_as_classification --num_train 1000 --num_dev 500 --num_eval 1000 \\
                     --max_steps 20000 --learning_rate 1e-6 --zo_eps 1e-3

  MODEL is a Hub id or a local directory; --data_dir DIR reads DIR/<task>/*.jsonl, no Hub needed.
  bash HiZOO.sh does the same with environment variables. python run.py --help lists everything.
"""

# The ways to train something else than all weights, and what belongs to each of them.
TUNING_MODES = {
    "lora": ("lora_r", "lora_alpha"),
    "prefix_tuning": ("num_prefix", "no_reparam", "prefix_init_by_real_act"),
    "head_tuning": (),
    "linear_probing": ("lp_early_stopping",),
}


def argument(default: Any, help_text: str, *aliases: str) -> Any:
    """Describe a field of the command line."""
    metadata: dict[str, Any] = {"help": help_text}
    if aliases:
        metadata["aliases"] = list(aliases)
    return field(default=default, metadata=metadata)


@dataclass
class Arguments(TrainingArguments):
    """All of transformers.TrainingArguments, and the arguments of the experiment."""

    # ---- task and data
    task_name: str | None = argument(
        None,
        "Task, in any case: SST2, RTE, CB, BoolQ, WSC, WIC, MultiRC, Copa, ReCoRD, SQuAD, DROP.",
    )
    data_dir: str | None = argument(
        None,
        "Folder with <task>/train.jsonl and validation.jsonl (or .parquet) in the Hub's schema. "
        "Default: the data sets are loaded from the Hub.",
    )
    train_file: str | None = argument(
        None,
        "Your own training examples (or demonstrations): JSON Lines, CSV or Parquet with prompt, "
        "answer and, to choose from, options. Excludes --task_name and --data_dir.",
    )
    validation_file: str | None = argument(
        None, "Your own examples to report on, in the columns of --train_file."
    )
    metric: Literal["accuracy", "f1", "em"] | None = argument(
        None,
        "First metric of your own examples: accuracy for options, f1 or em (exact match) for "
        "generated answers. Default: accuracy, or f1.",
    )
    num_train: int = argument(
        0, "Training examples, or demonstrations in context with --trainer none. 0: zero-shot."
    )
    num_dev: int | None = argument(
        None, "Dev examples, drawn from the training split with --num_train. Training only."
    )
    num_eval: int | None = argument(
        None, "Examples drawn from the validation split to report on. Default: all.", "--num_test"
    )
    num_train_sets: int | None = argument(
        None, "Number of training (demonstration) sets, drawn with seeds 0, 1, …; each is a run."
    )
    train_set_seed: int | None = argument(
        None,
        "Seed of one training (demonstration) set and of the eval draw. Excludes "
        "--num_train_sets. With neither, training uses 0, and in context every eval example gets "
        "demonstrations of its own.",
    )

    # ---- model
    model_name: str | None = argument(None, "Hub id or local directory of a causal language model.")
    load_float16: bool = argument(
        False, "Load the weights in float16. Default float32. Excludes --load_bfloat16."
    )
    load_bfloat16: bool = argument(
        False, "Load the weights in bfloat16. Default float32. Excludes --load_float16."
    )
    load_int8: bool = argument(
        False,
        "Load 8-bit weights with bitsandbytes, for --trainer none or adapters (--lora, "
        "--prefix_tuning). Needs a CUDA GPU. Excludes --load_int4.",
    )
    load_int4: bool = argument(
        False, "As --load_int8, with 4-bit weights (NF4). Excludes --load_int8."
    )
    max_length: int | None = argument(
        None,
        "Tokens of a text at most; longer ones are cut on the left. Default: 2048, or the model's "
        "positions if they are fewer.",
    )
    no_auto_device: bool = argument(
        False, "Do not spread the model over the GPUs (accelerate's device_map auto)."
    )
    trust_remote_code: bool = argument(
        False, "Run Python code that comes with the model. Only for sources that you trust."
    )

    # ---- in-context learning
    sfc: bool = argument(
        False,
        "Calibrate scores with a content-free prompt (surface form competition, arXiv 2104.08315). "
        "Excludes --icl_sfc.",
    )
    icl_sfc: bool = argument(
        False, "As --sfc, with the demonstrations before the content-free prompt. Excludes --sfc."
    )

    # ---- what is trained
    lora: bool = argument(
        False,
        "Train LoRA matrices on the query and value projections (arXiv 2106.09685) and nothing "
        "else. Excludes --prefix_tuning, --head_tuning and --linear_probing.",
    )
    lora_r: int = argument(8, "Rank of the LoRA matrices (MeZO paper: 8).")
    lora_alpha: int = argument(16, "Scale of LoRA, divided by its rank (MeZO paper: 16).")
    prefix_tuning: bool = argument(
        False,
        "Train keys and values that stand before every text in every layer (arXiv 2101.00190) and "
        "nothing else. Excludes --lora, --head_tuning and --linear_probing.",
    )
    num_prefix: int = argument(5, "Tokens of the prefix (MeZO paper: 5).")
    no_reparam: bool = argument(
        True,
        "Train the prefix itself; False: a two-layer network that makes it (arXiv 2101.00190).",
    )
    prefix_init_by_real_act: bool = argument(
        True, "Start the prefix from the keys and values of random real tokens; False: of noise."
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
        False, "Stop the logistic regression at a tolerance of 1e-2. Default: 1e-4."
    )

    # ---- training
    trainer: Literal["none", "regular", "zo"] = argument(
        "none",
        "none: no training, zero-shot or in context. regular: backpropagation with --optim. "
        "zo: HiZOO (MeZO with --hessian_smooth_type constant0), forward passes only.",
    )
    only_train_option: bool = argument(
        True,
        "Language-model loss on the correct option's tokens only; False: on the prompt's too. "
        "Without effect with --train_as_classification.",
    )
    train_as_classification: bool = argument(
        False,
        "Train with the cross-entropy over the options' mean log-probabilities. Not for SQuAD and "
        "DROP; published runs leave it out for Copa and ReCoRD too.",
    )
    non_diff: bool = argument(
        False,
        "Train on an objective without a gradient: minus the mean F1 of the generated text, or "
        "minus the accuracy where there are options. Needs --trainer zo.",
    )
    non_diff_metric: Literal["f1", "em", "accuracy"] | None = argument(
        None,
        "The metric of --non_diff: f1 or em for generated text, accuracy for options. Default: f1, "
        "or accuracy.",
    )
    zo_eps: float = argument(
        1e-3, "Perturbation scale μ in units of the weights (HiZOO and MeZO papers: 1e-3)."
    )
    hessian_smooth_type: str = argument(
        "constant1e-8",
        "Smoothing α of the diagonal Hessian: constant<number>, or linear<number> and "
        "cosine<number>, which fall to 0 over max_steps. constant0 is MeZO. HiZOO paper: 1e-10 to "
        "1e-4.",
    )
    hessian: Literal["full", "lowrank"] = argument(
        "full",
        "full: an entry of h for each weight. lowrank: HiZOO-L, a row and a column vector for each "
        "matrix (Adafactor's factorisation, arXiv 1804.04235).",
    )
    hessian_dtype: Literal["auto", "float32", "bfloat16"] = argument(
        "auto", "dtype of the full h; auto: that of the weights, bfloat16 for float16."
    )
    zo_perturbation: Literal["auto", "inplace", "layerwise"] = argument(
        "auto",
        "inplace: shift the weights and back, which rounds. layerwise: perturb one module at a "
        "time in scratch memory, the weights stay as they are. auto: inplace for float32, "
        "layerwise for half precision.",
    )
    zo_num_samples: int = argument(
        1, "Directions a step, averaged: n-SPSA (MeZO paper, arXiv 2305.17333, section 2)."
    )
    zo_compile: Literal["auto", "yes", "no"] = argument(
        "auto",
        "Whether torch.compile makes one kernel of a step's arithmetic: 10 to 30 seconds in a "
        "first run, a step several times faster beside its forward passes. Needs a C++ compiler. "
        "auto: from 16 million trained weights on.",
    )
    max_skipped_steps: int = argument(
        50, "Steps in a row without a finite loss, after which the run stops with a checkpoint."
    )
    warmup_steps: float = argument(
        0,
        "Steps over which the learning rate rises from 0; below 1: a fraction of max_steps.",
        "--warmup_step",
    )
    decay_step: int = argument(
        0,
        "Step until which the learning rate stays constant before it decays to 0 at max_steps; "
        "needs the scheduler linear or cosine. 0: the scheduler's own course.",
    )
    lr_scheduler_type: SchedulerType | str = argument(  # noqa: RUF009 - an immutable default
        "constant",
        "Learning-rate schedule of transformers, per step: constant (MeZO, HiZOO), linear, "
        "cosine, …; with warmup_steps constant means constant_with_warmup.",
        "--zo_lr_scheduler_type",
    )
    eval_strategy: IntervalStrategy | str = argument(  # noqa: RUF009 - an immutable default
        "no", "When the dev loss is computed: no, steps or epoch.", "--evaluation_strategy"
    )
    logging_steps: float = argument(
        10, "Steps between two entries of the log, and of the loss in the progress bar."
    )
    logging_nan_inf_filter: bool = argument(
        False, "Log a loss that is not finite as 0; default: as it is."
    )
    overwrite_output_dir: bool = argument(
        False,
        "Delete the checkpoints in output_dir and start anew. Default: go on from the newest one.",
    )
    save_on_interrupt: bool = argument(
        False,
        "On Ctrl-C, SIGTERM, SIGUSR1 or SIGUSR2 finish the step, save a checkpoint and stop; the "
        "same command then goes on from there.",
    )
    save_model: bool = argument(False, "Save the final model and tokenizer into output_dir.")

    # ---- evaluation and results
    eval_before_training: bool = argument(
        False, "Report the metric on the eval examples before training too (zero-shot)."
    )
    no_eval: bool = argument(False, "Do not evaluate after training.")
    result_file: str | None = argument(
        None, "JSON file for metrics and settings. Default: result/<tag>.json."
    )
    predictions_file: str | None = argument(
        None, "JSON Lines file with id, prediction, correct and scores of every eval example."
    )
    tag: str | None = argument(
        None, "Name of the run, of its result file and output_dir. Default: made of the settings."
    )
    verbose: bool = argument(False, "Show the first prompts, their options and scores.")

    # ---- generation (SQuAD, DROP)
    sampling: bool = argument(False, "Sample the generated text. Default: greedy, or beams.")
    temperature: float = argument(1.0, "Temperature of --sampling.")
    num_beams: int = argument(1, "Beams of the search; 1: none.")
    top_k: int | None = argument(None, "With --sampling, draw from the k likeliest tokens.")
    top_p: float = argument(0.95, "With --sampling, draw from this much probability mass.")
    max_new_tokens: int = argument(50, "Tokens generated at most.")
    eos_token: str = argument("\\n", "Text whose last token ends the generation; \\n is a newline.")

    # Names of the arguments on the command line whose value is not the default.
    given: frozenset[str] = field(default=frozenset(), init=False)

    def __post_init__(self) -> None:
        if self.tag is None:
            self.tag = default_tag(self)
        if self.output_dir is None:
            self.output_dir = str(Path("result") / self.tag)
        if not torch.accelerator.is_available():
            # Without it, processes that torchrun starts on CPUs would not find one another.
            self.use_cpu = True
        super().__post_init__()
        # Batches of encoded examples have no columns that a model's forward could name.
        self.remove_unused_columns = False

    @functools.cached_property
    def task(self) -> Task:
        """The task of --task_name, or that of the user's own files as they are at the start."""
        return choose_task(self.task_name, self.train_file, self.validation_file, self.metric)

    @property
    def calibration(self) -> str | None:
        """The content-free prompt that was asked for: sfc, icl_sfc or None."""
        return "sfc" if self.sfc else "icl_sfc" if self.icl_sfc else None

    @property
    def result_path(self) -> Path:
        """Where the result JSON goes."""
        return Path(self.result_file or Path("result") / f"{self.tag}.json")


def default_tag(arguments: Arguments) -> str:
    """Name a run after what distinguishes it."""
    model = Path(arguments.model_name or "model").name
    own = Path(arguments.train_file or arguments.validation_file or "task").absolute()
    parts = [arguments.task_name or f"{own.parent.name}-{own.stem}", model, arguments.trainer]
    parts += [name for name in (*TUNING_MODES, "non_diff") if getattr(arguments, name)]
    if arguments.trainer == "none":
        parts += [f"{arguments.num_train}-shot"]
        parts += [name for name in ("sfc", "icl_sfc") if getattr(arguments, name)]
    else:
        parts += [f"lr{arguments.learning_rate:g}", f"bs{arguments.per_device_train_batch_size}"]
    if arguments.trainer == "zo":
        parts += [f"eps{arguments.zo_eps:g}", arguments.hessian_smooth_type]
    if arguments.train_set_seed is not None:
        parts += [f"set{arguments.train_set_seed}"]
    return "-".join([*parts, f"seed{arguments.seed}"])


class OneLineParser(HfArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Raise InputError, with the nearest argument's name where one was unknown."""
        raise InputError(f"{message.splitlines()[0]} (python run.py --help lists the arguments)")


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Read the command line; ``checks.check`` then says whether its values go together.

    Raises:
        InputError: an argument is unknown, or its value is not of its kind.
    """
    parser = OneLineParser(Arguments, usage=USAGE, allow_abbrev=False)
    namespace, unknown = parser.parse_known_args(list(argv))
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1)
        hint = f"did you mean {near[0]}?" if near else "python run.py --help lists the arguments"
        raise InputError(f"unknown argument {unknown[0]}: {hint}")
    try:
        arguments = parser.parse_dict(vars(namespace))[0]
    except (ValueError, ImportError, RuntimeError) as error:
        raise InputError(one_line(error)) from error
    defaults = vars(parser.parse_args([]))
    arguments.given = frozenset(
        name for name, value in vars(namespace).items() if value != defaults[name]
    )
    return arguments


# What belongs to an experiment, whether it was given or not.
EXAMPLES = ("num_train", "num_dev", "num_train_sets", "train_set_seed")
WEIGHTS = ("load_float16", "load_bfloat16", "load_int8", "load_int4")
EVALUATION = ("num_eval", "max_length", "sfc", "icl_sfc", "per_device_eval_batch_size")
GENERATION = (
    *("sampling", "temperature", "num_beams", "top_k", "top_p"),
    *("max_new_tokens", "eos_token"),
)
TRAINING = (
    *("train_as_classification", "only_train_option", "seed", "learning_rate", "weight_decay"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "decay_step"),
    *("per_device_train_batch_size", "gradient_accumulation_steps"),
    *("data_seed", "dataloader_drop_last"),
)
FIRST_ORDER = (
    *("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("bf16", "fp16"),
)
ZEROTH_ORDER = (
    *("zo_eps", "hessian_smooth_type", "hessian", "hessian_dtype", "zo_perturbation"),
    "zo_num_samples",
)
OF_TRAINER = {"none": (), "regular": FIRST_ORDER, "zo": (*ZEROTH_ORDER, "non_diff")}
TUNING = (*TUNING_MODES, "untie_emb")


def changed_settings(arguments: Arguments) -> dict[str, Any]:
    """Return what the user gave and what belongs to the experiment; no secrets."""
    names = {*arguments.given, *EXAMPLES, *WEIGHTS, *EVALUATION, *OF_TRAINER[arguments.trainer]}
    if arguments.trainer != "none":
        length = "max_steps" if arguments.max_steps > 0 else "num_train_epochs"
        names |= {length, *_names_of_training(arguments)}
    if arguments.task.generation:
        names |= {*GENERATION}
    return _plain_values(arguments, names - {"hub_token"})


def settings_of_a_checkpoint(arguments: Arguments) -> dict[str, Any]:
    """Return what decides the course of a training run, whatever its length and its folders."""
    names = {*EXAMPLES, *WEIGHTS, *_names_of_training(arguments)}
    # Every set has a folder of its own, whatever their number.
    names.remove("num_train_sets")
    return {
        "trainer": arguments.trainer,
        "task_name": arguments.task.name,
        "train_file": arguments.train_file and str(Path(arguments.train_file).resolve()),
        "model_name": Path(arguments.model_name).name,
        "nproc_per_node": arguments.world_size,
        **_plain_values(arguments, names),
    }


def _names_of_training(arguments: Arguments) -> set[str]:
    names = {*TRAINING, *TUNING, *OF_TRAINER[arguments.trainer]}
    for mode, settings in TUNING_MODES.items():
        if getattr(arguments, mode):
            names |= {*settings}
    if arguments.non_diff:
        names |= {"non_diff_metric", *GENERATION}
    return names


def _plain_values(arguments: Arguments, names: Collection[str]) -> dict[str, Any]:
    """Return the values as JSON has them, in the order of the fields."""
    values = {
        field.name: getattr(arguments, field.name)
        for field in dataclasses.fields(arguments)
        if field.name in names
    }
    return {name: _plain_value(value) for name, value in values.items()}


def _plain_value(value: Any) -> Any:
    return value.to_dict() if hasattr(value, "to_dict") else getattr(value, "value", value)
