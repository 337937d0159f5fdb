"""The arguments of run.py about tasks, models, evaluation and results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from command_line.declarations import NOTHING, RESULT, argument
from command_line.effects import (
    CALIBRATION,
    CONVERSATION,
    DEV_EXAMPLES,
    END,
    EVALUATION,
    GENERATES,
    OWN_COLUMNS,
    OWN_FILES,
    PREDICTION,
    REWARD,
    REWARD_OBJECTIVE,
    SAMPLES,
    SETS,
    TRAINED,
)


@dataclass
class TaskAndData:
    """Task and data."""

    task_name: str | None = argument(
        None,
        "Task, in any case: SST2, RTE, CB, BoolQ, WSC, WIC, MultiRC, Copa, ReCoRD, SQuAD or DROP. "
        "Excludes --train_file and --validation_file.",
        decides=NOTHING,
    )
    data_dir: str | None = argument(
        None,
        "Folder with <task>/train.jsonl and validation.jsonl (or .parquet) in the Hub's columns. "
        "Default: the data sets are loaded from the Hub. Excludes --train_file and "
        "--validation_file.",
        decides=NOTHING,
    )
    train_file: str | None = argument(
        None,
        "Your own training examples (or demonstrations): JSON Lines, CSV or Parquet with prompt, "
        "answer and, to choose from, options. Excludes --task_name and --data_dir.",
        decides=NOTHING,
    )
    validation_file: str | None = argument(
        None,
        "Your own examples to report on, in the columns of --train_file. Default: a tenth of "
        "--train_file is held out. Excludes --task_name and --data_dir.",
        decides=NOTHING,
    )
    text_column: str | None = argument(
        None,
        "Column of your own files that is the prompt. Default: prompt. Excludes --prompt_template.",
        effect=OWN_COLUMNS,
    )
    label_column: str | None = argument(
        None,
        "Column of your own files that is the class; its different values in the first file are "
        "the options. Default: the columns options and answer.",
        effect=OWN_COLUMNS,
    )
    prompt_template: str | None = argument(
        None,
        "Prompt made of columns of your own files, as in '{title}: {review}\\nIt was'. Default: "
        "the column prompt. Excludes --text_column.",
        effect=OWN_COLUMNS,
    )
    predict_file: str | None = argument(
        None,
        "Rows without an answer, in the columns of --train_file or of the task: what the model "
        "says to each goes into --predictions_file. For --trainer none. Default: none.",
        effect=PREDICTION,
        decides=NOTHING,
    )
    metric: Literal["accuracy", "f1", "em"] | None = argument(
        None,
        "First metric of your own examples: accuracy for options, f1 or em (exact match) for "
        "generated answers. Default: accuracy, or f1.",
        effect=OWN_FILES,
        decides=RESULT,
    )
    num_train: int = argument(
        0,
        "Training examples; with --trainer none the demonstrations before each text. 0: "
        "zero-shot. MeZO and HiZOO papers: 1000 to train on, 32 demonstrations.",
        at_least=0,
    )
    num_dev: int | None = argument(
        None,
        "Dev examples, drawn from the training split together with --num_train, for the dev loss "
        "and the dev metric of a training run. Default: none. MeZO and HiZOO papers: 500.",
        at_least=0,
        effect=DEV_EXAMPLES,
    )
    num_eval: int | None = argument(
        None,
        "Examples drawn from the validation split to report on. Default: all of them. MeZO and "
        "HiZOO papers: 1000.",
        "--num_test",
        at_least=1,
        effect=EVALUATION,
        decides=RESULT,
    )
    num_train_sets: int | None = argument(
        None,
        "Number of training (demonstration) sets, drawn with seeds 0, 1, …; each is a run of its "
        "own. Default: one run. Excludes --train_set_seed.",
        at_least=1,
        effect=SETS,
        decides=RESULT,
    )
    train_set_seed: int | None = argument(
        None,
        "Seed of one training (demonstration) set and of the eval draw. Default: training uses 0; "
        "in context every eval example gets demonstrations of its own. Excludes --num_train_sets.",
        at_least=0,
        below=2**32,
    )


@dataclass
class Model:
    """Model."""

    model_name: str | None = argument(
        None, "Causal language model: Hub id, local directory or GGUF file.", decides=NOTHING
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
        decides=RESULT,
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
        at_least=1,
    )
    apply_chat_template: bool = argument(
        False,
        "Put prompts, demonstrations and answers through the tokenizer's chat template, as turns "
        "of user and assistant, for scoring, generation and training. For instruct models.",
    )
    system_prompt: str | None = argument(
        None,
        "What the system says first, with --apply_chat_template. Default: what the template says.",
        effect=CONVERSATION,
    )
    no_auto_device: bool = argument(
        False,
        "Do not spread the model over the GPUs (accelerate's device_map auto).",
        decides=NOTHING,
    )
    trust_remote_code: bool = argument(
        False,
        "Run Python code that comes with the model. Only for sources that you trust.",
        decides=NOTHING,
    )


@dataclass
class InContextLearning:
    """In-context learning. Both need --trainer none, and exclude each other."""

    sfc: bool = argument(
        False,
        "Calibrate scores with a content-free prompt (surface form competition, arXiv 2104.08315). "
        "Not for SQuAD and DROP. Excludes --icl_sfc.",
        effect=CALIBRATION,
        decides=RESULT,
    )
    icl_sfc: bool = argument(
        False,
        "As --sfc, with the demonstrations before the content-free prompt. Excludes --sfc.",
        effect=CALIBRATION,
        decides=RESULT,
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
        effect=REWARD,
        decides=NOTHING,
    )
    reward_samples: int = argument(
        1,
        "Texts of a prompt in a step; above 1 they are drawn at random (--temperature, --top_p), "
        "with the same random numbers for both sides of a direction.",
        at_least=1,
        effect=REWARD_OBJECTIVE,
    )


@dataclass
class EvaluationAndResults:
    """Evaluation and results."""

    eval_before_training: bool = argument(
        False,
        "Report the metric on the eval examples before training too (zero-shot).",
        effect=TRAINED,
        decides=RESULT,
    )
    no_eval: bool = argument(
        False, "Do not evaluate after training.", effect=TRAINED, decides=RESULT
    )
    result_file: str | None = argument(
        None, "JSON file for metrics and settings. Default: result/<tag>.json.", decides=NOTHING
    )
    predictions_file: str | None = argument(
        None,
        "JSON Lines file with id, prediction, correct and scores of every eval example. Default: "
        "not written.",
        effect=END,
        decides=NOTHING,
    )
    overwrite_output_dir: bool = argument(
        False,
        "Make the result anew where there is one: delete the checkpoints in output_dir and start "
        "again. What the very same settings began there and did not finish goes on all the same. "
        "Default: go on from the newest checkpoint; compute nothing where the result is there.",
        decides=NOTHING,
    )
    config: str | None = argument(
        None,
        "YAML file of arguments, as in learning_rate: 1e-6. Those of the command line win. "
        "Default: none.",
        decides=NOTHING,
    )
    show_config: bool = argument(
        False,
        "Print the arguments as such a file, with the other settings as comments, and do nothing.",
        decides=NOTHING,
    )
    dry_run: bool = argument(
        False,
        "Load and check everything but the weights, print steps, forward passes, memory and time "
        "that the run will take, and do nothing.",
        decides=NOTHING,
    )
    tag: str | None = argument(
        None,
        "Name of the run, of its result file and output_dir. Default: made of the settings.",
        decides=NOTHING,
    )
    quiet: bool = argument(
        False,
        "Show neither bars nor lines of steps: the metrics and the places of files alone.",
        decides=NOTHING,
    )
    verbose: bool = argument(
        False, "Show the first prompts, their options and scores.", effect=END, decides=NOTHING
    )


@dataclass
class Generation:
    """Generation. For SQuAD, DROP and your own examples without options."""

    sampling: bool = argument(
        False,
        "Sample the generated text. Default: greedy, or beams.",
        effect=GENERATES,
        decides=RESULT,
    )
    temperature: float = argument(
        1.0,
        "With --sampling, divides the logits; 1 leaves them.",
        above=0,
        effect=SAMPLES,
        decides=RESULT,
    )
    num_beams: int = argument(
        1,
        "Beams of the search, at most the vocabulary's tokens; 1: none.",
        at_least=1,
        effect=GENERATES,
        decides=RESULT,
    )
    top_k: int | None = argument(
        None,
        "With --sampling, draw from the k likeliest tokens. Default: from all.",
        at_least=1,
        effect=SAMPLES,
        decides=RESULT,
    )
    top_p: float = argument(
        0.95,
        "With --sampling, draw from the likeliest tokens that have this much probability together "
        "(MeZO: 0.95); 1: from all.",
        above=0,
        at_most=1,
        effect=SAMPLES,
        decides=RESULT,
    )
    max_new_tokens: int = argument(
        50, "Tokens generated at most (MeZO: 50).", at_least=1, effect=GENERATES, decides=RESULT
    )
    eos_token: str = argument(
        "\\n",
        "Text whose last token ends the generation; \\n is a newline (MeZO: newline).",
        effect=GENERATES,
        decides=RESULT,
    )
