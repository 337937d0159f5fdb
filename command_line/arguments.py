"""The command line of run.py: how it is read, and its help."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import torch
from transformers import HfArgumentParser, TrainingArguments

from command_line.config_files import words_of_config
from command_line.groups import (
    COMMON_TRAINER_ARGUMENTS,
    GROUPS,
    EvaluationAndResults,
    Generation,
    InContextLearning,
    Model,
    Rewards,
    TaskAndData,
    TrainedWeights,
    Training,
    ZerothOrder,
)
from command_line.unknown import NOT_OFFERED, explain_unknown
from command_line.values import AUTO, BOUNDS, WORDS, check_number, number_or, read_dictionary
from task_data.columns import Columns
from task_data.own_tasks import choose_task
from tasks import Task
from utils import InputError, one_line

USAGE = """\
python run.py --task_name TASK --model_name MODEL [arguments]

  zero-shot      python run.py --task_name SST2 --model_name facebook/opt-125m --num_eval 1000
  in context     python run.py --task_name SST2 --model_name facebook/opt-125m --num_train 32
  HiZOO          python run.py --task_name SST2 --model_name facebook/opt-125m --trainer zo \\
                     --train_as_classification --num_train 1000 --num_dev 500 --num_eval 1000 \\
                     --max_steps 20000 --learning_rate 1e-6 --zo_eps 1e-3

  MODEL is a Hub id, a local directory or a GGUF file (pip install gguf); --data_dir DIR reads
  DIR/<task>/*.jsonl, no Hub needed.
  bash HiZOO.sh does the same with environment variables. python run.py --help explains the
  arguments, python run.py --help_all those of transformers' Trainer too.
"""

# The ways to train something else than all weights, and what belongs to each of them.
TUNING_MODES = {
    "lora": ("lora_r", "lora_alpha"),
    "prefix_tuning": ("num_prefix", "no_reparam", "prefix_init_by_real_act"),
    "head_tuning": (),
    "linear_probing": ("lp_early_stopping",),
}


@dataclass
class Arguments(
    Generation,
    EvaluationAndResults,
    Rewards,
    ZerothOrder,
    Training,
    TrainedWeights,
    InContextLearning,
    Model,
    TaskAndData,
    TrainingArguments,
):
    """The arguments of the experiment, and all of transformers.TrainingArguments."""

    # Names of the arguments on the command line; and without those that are a script's choice.
    given: frozenset[str] = field(default=frozenset(), init=False)
    given_by_user: frozenset[str] = field(default=frozenset(), init=False)
    # What tells this experiment from others (settings.name_run).
    experiment: str = field(default="", init=False)

    def __post_init__(self) -> None:
        output_dir = self.output_dir
        if not torch.accelerator.is_available():
            # Without it, processes that torchrun starts on CPUs would not find one another.
            self.use_cpu = True
        if self.ddp_backend and "LOCAL_RANK" not in os.environ:
            raise InputError(
                f"--ddp_backend {self.ddp_backend}: there is one process only; start several with "
                "torchrun, or leave it out"
            )
        if self.disable_tqdm is None or self.quiet:
            # In a file a bar would be one endless line.
            self.disable_tqdm = self.quiet or not sys.stderr.isatty()
        # The Trainer knows nothing of the journal, from which it comes without checkpoints.
        replays_best = self.replays_best
        if replays_best:
            self.metric_for_best_model = self.metric_for_best_model or "loss"
            self.load_best_model_at_end = False
        super().__post_init__()
        self.load_best_model_at_end = self.load_best_model_at_end or replays_best
        # The Trainer would call it trainer_output; settings.name_run names it after the run.
        self.output_dir = output_dir
        # Batches of encoded examples have no columns that a model's forward could name.
        self.remove_unused_columns = False

    @functools.cached_property
    def task(self) -> Task:
        """The task of --task_name, or that of the user's own files as they are at the start."""
        return choose_task(
            self.task_name,
            self.train_file,
            self.validation_file or (None if self.task_name else self.predict_file),
            self.metric,
            self.reward,
            Columns(self.text_column, self.label_column, self.prompt_template),
        )

    @property
    def calibration(self) -> str | None:
        """The content-free prompt that was asked for: sfc, icl_sfc or None."""
        return "sfc" if self.sfc else "icl_sfc" if self.icl_sfc else None

    @property
    def wants_dev_metric(self) -> bool:
        """Whether the task's metrics are measured on the dev set during training."""
        return self.eval_metric or self.metric_for_best_model not in (None, "loss", "eval_loss")

    @property
    def replays_best(self) -> bool:
        """Whether the best model is to be made by a replay, as there are no checkpoints."""
        saves = self.trainer != "zo" or plain_value(self.save_strategy) != "no"
        return self.load_best_model_at_end and not saves

    @property
    def shared_by_processes(self) -> str:
        """What the processes of a zeroth-order step share: batch, directions, or weights."""
        return "weights" if self.tensor_parallel else self.zo_parallel

    @property
    def probed(self) -> list[str]:
        """The arguments whose values a probe of the losses finds."""
        return [name for name in WORDS if getattr(self, name) == AUTO]

    @property
    def result_path(self) -> Path:
        """Where the result JSON goes."""
        return Path(self.result_file or Path("result") / f"{self.tag}.json")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows an argument without its names in dashes, and no default where it is None."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = copy.copy(action)
        shown.option_strings = [name for name in action.option_strings if "-" not in name[2:]]
        return super()._format_action_invocation(shown)


class HelpOnEverything(argparse.Action):
    """--help_all: the help with the Trainer's arguments too."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        """Print it and leave."""
        OneLineParser(everything=True).print_help()
        parser.exit()


class OneLineParser(HfArgumentParser):
    """The command line in groups; its errors are one line.

    Args:
        everything: whether the help tells the Trainer's arguments, too.
    """

    def __init__(self, everything: bool = False) -> None:
        own = {field.name for group in GROUPS for field in dataclasses.fields(group)}
        others = {
            field.name: field.metadata["help"] if everything else argparse.SUPPRESS
            for field in dataclasses.fields(TrainingArguments)
            if field.name not in {*own, *COMMON_TRAINER_ARGUMENTS, *NOT_OFFERED}
        }
        super().__init__(
            [
                *GROUPS,
                trainer_group("The Trainer's, most used", COMMON_TRAINER_ARGUMENTS),
                trainer_group("The Trainer's others", others),
            ],
            usage=USAGE,
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )
        for action in self._actions:
            if action.nargs == 0 and action.const is False:
                action.help = argparse.SUPPRESS  # the --no_… of what is on by default
            if action.dest in WORDS:
                action.type = number_or(WORDS[action.dest])
        self.add_argument(
            "--help_all",
            action=HelpOnEverything,
            nargs=0,
            default=argparse.SUPPRESS,
            help="show this help with all of the Trainer's arguments, and exit",
        )

    def error(self, message: str) -> NoReturn:
        """Raise InputError."""
        raise InputError(f"{message.splitlines()[0]} (python run.py --help lists the arguments)")

    def read(self, argv: Sequence[str]) -> dict[str, Any]:
        """Return the values of what stands on a command line, and of nothing else."""
        absent = object()
        nothing = argparse.Namespace(**dict.fromkeys((a.dest for a in self._actions), absent))
        namespace, unknown = self.parse_known_args(list(argv), nothing)
        if unknown:
            raise InputError(explain_unknown(unknown[0], self.options()))
        return {name: value for name, value in vars(namespace).items() if value is not absent}

    def read_config(self, path: Path) -> dict[str, Any]:
        """Return the values of a YAML file.

        Raises:
            InputError: names the line that is wrong, and of an unknown argument the nearest.
        """
        values: dict[str, Any] = {}
        for place, words in words_of_config(path).values():
            try:
                read = self.read(words)
            except InputError as error:
                raise InputError(f"{place}: {error}") from error
            twice = next((name for name in read if name in values), None)
            if twice:
                raise InputError(f"{place}: --{twice} is given twice, under another name before")
            values |= read
        return values

    def options(self) -> list[str]:
        """Return every argument as it is typed, the short and the other names too."""
        return [option for action in self._actions for option in action.option_strings]

    def name_of(self, option: str) -> str | None:
        """Return the setting that an argument means, under any of its names, or None."""
        action = self._option_string_actions.get(option)
        return action.dest if action and option != "--help" else None


def trainer_group(title: str, texts: Mapping[str, str]) -> type:
    """Return some of the Trainer's arguments, by name with their help, as a dataclass."""
    types = get_type_hints(TrainingArguments)
    chosen = []
    for inherited in dataclasses.fields(TrainingArguments):
        if inherited.name in texts:
            described = copy.copy(inherited)
            described.metadata = {**inherited.metadata, "help": texts[inherited.name]}
            chosen.append((inherited.name, types[inherited.name], described))
    return dataclasses.make_dataclass(
        "TrainerGroup", chosen, namespace={"_argument_group_name": title}
    )


@functools.cache
def command_line() -> OneLineParser:
    """Return the parser of the command line: a sweep reads many."""
    return OneLineParser()


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Read the command line; ``checks.check`` then says whether its values go together.

    What stands before a word ``--`` are a script's own choices: the arguments behind it win, and
    what they leave without an effect is not refused. Those of a file (``--config``) come in
    between: they are the user's.

    Raises:
        InputError: an argument is unknown, or its value is not of its kind or makes no sense.
    """
    words = list(argv)
    border = words.index("--") if "--" in words else -1
    by_script = command_line().read(words[: max(border, 0)])
    by_user = command_line().read(words[border + 1 :])
    if "config" in by_user:
        by_user = command_line().read_config(Path(by_user["config"])) | by_user
    values = by_script | by_user
    for name, value in values.items():
        if name in BOUNDS and value is not None and value != WORDS.get(name):
            check_number(name, value)
        if name in TrainingArguments._VALID_DICT_FIELDS:
            values[name] = read_dictionary(name, value)
    try:
        arguments = Arguments(**values)
    except (ValueError, TypeError, ImportError, OSError, RuntimeError) as error:
        raise InputError(one_line(error)) from error
    arguments.given = frozenset(values)
    arguments.given_by_user = frozenset(by_user)
    return arguments


def plain_value(value: Any) -> Any:
    """Return a value as JSON has it: that of an enumeration, the dictionary of a configuration."""
    return value.to_dict() if hasattr(value, "to_dict") else getattr(value, "value", value)
