"""The arguments of run.py about tasks, models, evaluation and results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from command_line import effects as when
from command_line.declarations import NOTHING, RESULT, TRAINING, argument


@dataclass
class TaskAndData:
    """Task and data."""

    _effect, _decides = None, NOTHING

    task_name: str | None = argument(
        None,
        "Task, in any case: SST2, RTE, CB, BoolQ, WSC, WIC, MultiRC, Copa, ReCoRD, SQuAD or DROP.",
    )
    data_dir: str | None = argument(
        None,
        "Folder with <task>/train.jsonl and validation.jsonl (or .parquet) in the Hub's columns. "
        "Default: the Hub.",
    )
    train_file: str | None = argument(
        None,
        "Your own training examples or demonstrations: JSON Lines, CSV or Parquet with prompt, "
        "answer and, to choose from, options.",
    )
    validation_file: str | None = argument(
        None,
        "Your own examples to report on, in the columns of --train_file. Default: a tenth of "
        "--train_file is held out.",
    )
    text_column: str | None = argument(
        None,
        "Column of your own files that is the prompt. Default: prompt.",
        effect=when.OWN_COLUMNS,
        decides=TRAINING,
    )
    label_column: str | None = argument(
        None,
        "Column of your own files with classes; its different values in the first file are the "
        "options. Default: the columns options and answer.",
        effect=when.OWN_COLUMNS,
        decides=TRAINING,
    )
    answer_column: str | None = argument(
        None,
        "Column of your own files with answers to generate. Default: answer.",
        effect=when.OWN_COLUMNS,
        decides=TRAINING,
    )
    prompt_template: str | None = argument(
        None,
        "Prompt made of columns of your own files, as in '{title}: {review}\\nIt was'. Default: "
        "the column prompt.",
        effect=when.OWN_COLUMNS,
        decides=TRAINING,
    )
    predict_file: str | None = argument(
        None,
        "Rows without an answer, in the columns of --train_file or of the task; the model's "
        "answers go to --predictions_file. Default: none.",
        effect=when.PREDICTION,
    )
    metric: Literal["accuracy", "f1", "em"] | None = argument(
        None,
        "First metric of your own examples: accuracy for options, f1 or em (exact match) for "
        "generated answers. Default: accuracy, or f1.",
        effect=when.OWN_FILES,
        decides=RESULT,
    )
    num_train: int = argument(
        0,
        "Training examples; with --trainer none the demonstrations before each text. MeZO and "
        "HiZOO papers: 1000 to train on, 32 demonstrations.",
        at_least=0,
        decides=TRAINING,
    )
    num_dev: int | None = argument(
        None,
        "Dev examples for dev loss and dev metric, drawn from the training split together with "
        "--num_train. Default: none. MeZO and HiZOO papers: 500.",
        at_least=0,
        effect=when.DEV_EXAMPLES,
        decides=TRAINING,
    )
    num_eval: int | None = argument(
        None,
        "Examples of the validation split to report on. Default: all. MeZO and HiZOO papers: 1000.",
        "--num_test",
        at_least=1,
        effect=when.EVALUATION,
        decides=RESULT,
    )
    num_train_sets: int | None = argument(
        None,
        "Training (demonstration) sets, drawn with seeds 0, 1, …; each is a run of its own. "
        "Default: one.",
        at_least=1,
        effect=when.SETS,
        decides=RESULT,
    )
    train_set_seed: int | None = argument(
        None,
        "Seed of one training (demonstration) set and of the eval draw. Default: training uses 0; "
        "in context every eval example gets demonstrations of its own.",
        at_least=0,
        below=2**32,
        decides=TRAINING,
    )


@dataclass
class Model:
    """Model."""

    _effect, _decides = None, TRAINING

    model_name: str | None = argument(
        None, "Causal language model: Hub id, local directory or GGUF file.", decides=NOTHING
    )
    load_float16: bool = argument(False, "Load the weights in float16. Default: float32.")
    load_bfloat16: bool = argument(
        False,
        "Load the weights in bfloat16. With --trainer zo take --zo_eps 1e-2: losses are rounded "
        "by as much as 1e-3 changes them. Default: float32.",
    )
    load_saved_dtype: bool = argument(
        False,
        "On a GPU, load the weights in the half precision that the model was saved in: float16, "
        "or bfloat16 where the GPU has it. Otherwise float32.",
        decides=RESULT,
    )
    load_int8: bool = argument(
        False,
        "Load 8-bit weights with bitsandbytes, for --trainer none or adapters. Needs a CUDA GPU.",
    )
    load_int4: bool = argument(False, "As --load_int8, with 4-bit weights (NF4).")
    max_length: int | None = argument(
        None,
        "Tokens of a text at most; longer ones are cut on the left. Default: 2048, or the model's "
        "positions if they are fewer.",
        at_least=1,
    )
    apply_chat_template: bool = argument(
        False,
        "Put prompts, demonstrations and answers through the tokenizer's chat template, for "
        "scoring, generation and training. For instruct models.",
    )
    system_prompt: str | None = argument(
        None,
        "What the system says first. Default: what the chat template says.",
        effect=when.CONVERSATION,
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

    _effect, _decides = when.CALIBRATION, RESULT

    sfc: bool = argument(
        False,
        "Calibrate scores with a content-free prompt (surface form competition, arXiv "
        "2104.08315). Not for SQuAD and DROP.",
    )
    icl_sfc: bool = argument(
        False, "As --sfc, with the demonstrations before the content-free prompt."
    )


@dataclass
class Rewards:
    """Rewards. For SQuAD, DROP and your own examples without options."""

    _effect, _decides = when.REWARD_OBJECTIVE, TRAINING

    reward: str | None = argument(
        None,
        "FILE.py:function: takes lists of prompts, texts and rows (dictionaries), returns a "
        "number for each. Its mean is the first metric, and the objective of --trainer zo. The "
        "file's code is run. Default: none.",
        effect=when.REWARD,
        decides=NOTHING,
    )
    reward_samples: int = argument(
        1,
        "Texts of a prompt in a step; above 1 they are drawn at random, with the same random "
        "numbers for both sides of a direction.",
        at_least=1,
    )


@dataclass
class EvaluationAndResults:
    """Evaluation and results."""

    _effect, _decides = None, NOTHING

    eval_before_training: bool = argument(
        False,
        "Report the metric on the eval examples before training too (zero-shot).",
        effect=when.TRAINED,
        decides=RESULT,
    )
    no_eval: bool = argument(
        False, "Do not evaluate after training.", effect=when.TRAINED, decides=RESULT
    )
    result_file: str | None = argument(
        None, "JSON file for metrics and settings. Default: result/<tag>.json."
    )
    predictions_file: str | None = argument(
        None,
        "JSON Lines file with the prediction, scores and correctness of every eval example. "
        "Default: none.",
        effect=when.END,
    )
    overwrite_output_dir: bool = argument(
        False,
        "Make the result anew: delete the checkpoints in output_dir and start again. Default: "
        "resume from the newest checkpoint; compute nothing where the result is there.",
    )
    config: str | None = argument(
        None,
        "YAML file of arguments, as in learning_rate: 1e-6. Those of the command line win. "
        "Default: none.",
    )
    show_config: bool = argument(False, "Print the arguments as such a file, and do nothing.")
    dry_run: bool = argument(
        False,
        "Check everything but the weights, print steps, forward passes, memory and time, and do "
        "nothing.",
    )
    tag: str | None = argument(
        None, "Name of the run, of its result file and output_dir. Default: made of the settings."
    )
    quiet: bool = argument(
        False, "Show neither bars nor lines of steps: only the metrics and the places of files."
    )
    verbose: bool = argument(
        False, "Show the first prompts, their options and scores.", effect=when.END
    )


@dataclass
class Generation:
    """Generation. For SQuAD, DROP and your own examples without options."""

    _effect, _decides = when.GENERATES, RESULT

    sampling: bool = argument(False, "Sample the generated text. Default: greedy, or beams.")
    temperature: float = argument(
        1.0, "With --sampling, divides the logits; 1 leaves them.", above=0, effect=when.SAMPLES
    )
    num_beams: int = argument(
        1, "Beams of the search, at most the vocabulary's tokens; 1: none.", at_least=1
    )
    top_k: int | None = argument(
        None,
        "With --sampling, draw from the k likeliest tokens. Default: from all.",
        at_least=1,
        effect=when.SAMPLES,
    )
    top_p: float = argument(
        0.95,
        "With --sampling, draw from the likeliest tokens of this probability together (MeZO: "
        "0.95); 1: from all.",
        above=0,
        at_most=1,
        effect=when.SAMPLES,
    )
    max_new_tokens: int = argument(50, "Tokens generated at most (MeZO: 50).", at_least=1)
    eos_token: str = argument(
        "\\n", "Text whose last token ends the generation; \\n is a newline (MeZO: newline)."
    )
