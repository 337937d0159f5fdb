"""How a command line is read: words become values, and every problem is told at once.

Neither torch nor transformers is imported here: what is wrong is said in a fraction of a second.
"""

from __future__ import annotations

import difflib
import functools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from command_line import groups
from command_line.config_files import words_of_config
from command_line.declarations import OFF, Declaration, declared
from command_line.published import AS_HERE, IGNORED, NOT_HERE, TRANSLATED
from command_line.scripts import choose_defaults, replaced
from command_line.trainer_arguments import NOT_OFFERED, OTHERS, MostUsed
from task_data.columns import Columns
from task_data.files import own_file
from task_data.own_tasks import choose_task
from tasks import Task
from utils import InputError

GROUPS = (
    *(groups.TaskAndData, groups.Model, groups.InContextLearning, groups.TrainedWeights),
    *(groups.Training, groups.ZerothOrder, groups.ErrorBroadcast, groups.Rewards),
    *(groups.EvaluationAndResults, groups.Generation, MostUsed),
)
OWN: dict[str, Declaration] = {each.name: each for group in GROUPS for each in declared(group)}
DECLARED = OWN | OTHERS
# Every name of an argument, without its dashes.
NAMES = {name: name for name in DECLARED} | {
    alias.removeprefix("--"): name for name, each in OWN.items() for alias in each.aliases
}
# What MeZO, HiZOO and others call an argument -> its name here.
SYNONYMS = {
    **{"task": "task_name", "model": "model_name", "model_name_or_path": "model_name"},
    **{"lr": "learning_rate", "eps": "zo_eps", "batch_size": "per_device_train_batch_size"},
    **{"bs": "per_device_train_batch_size", "epochs": "num_train_epochs", "steps": "max_steps"},
    "no_cuda": "use_cpu",
}
# The ways to train something else than all weights, and what a run's name calls them.
TUNING_MODES = {
    **{"lora": "lora", "prefix_tuning": "prefix", "head_tuning": "head"},
    "linear_probing": "probe",
}


class Meaning:
    """What follows from the values of a command line, however they are held."""

    @functools.cached_property
    def task(self) -> Task:
        """The task of --task_name, or that of the user's own files as they are at the start."""
        own_file("--predict_file", self.predict_file)
        return choose_task(*self.words_of_task)

    @property
    def words_of_task(self) -> tuple[Any, ...]:
        """What the task is made of: the arguments of ``choose_task``."""
        return (
            self.task_name,
            self.train_file,
            self.validation_file or (None if self.task_name else self.predict_file),
            self.metric,
            self.reward,
            Columns(
                *(self.text_column, self.label_column, self.prompt_template, self.answer_column),
                self.label_words,
            ),
        )

    @property
    def has_steps(self) -> bool:
        """Whether weights are trained step by step."""
        return self.trainer != "none" and not self.linear_probing

    @property
    def calibration(self) -> str | None:
        """The content-free prompt that was asked for: sfc, icl_sfc or None."""
        return "sfc" if self.sfc else "icl_sfc" if self.icl_sfc else None

    @property
    def wants_dev_metric(self) -> bool:
        """Whether the task's metrics are measured on the dev set during training."""
        best = self.metric_for_best_model or "loss"
        return self.eval_metric or best not in ("loss", "eval_loss")

    def choose_schedule(self) -> None:
        """Set the learning rate's schedule where none is given, as in the published scripts."""
        default = "constant" if self.trainer in ("zo", "none") else "linear"
        self.lr_scheduler_type = self.lr_scheduler_type or default

    @property
    def shares_batches(self) -> bool:
        """Whether several processes make the steps of one, up to rounding."""
        return self.trainer in ("zo", "broadcast")

    @property
    def rate(self) -> str:
        """The argument that says how far a step goes."""
        return "broadcast_rate" if self.trainer == "broadcast" else "learning_rate"

    @property
    def result_path(self) -> Path:
        """Where the result JSON goes."""
        return Path(self.result_file or Path("result") / f"{self.name}.json")


class Values(Meaning):
    """The values of a command line, as attributes; of what is not given the default."""

    def __init__(self, reader: _Reader, of_user: dict[str, Any], of_script: dict[str, Any]) -> None:
        self.given = of_script | of_user
        self.given_by_user = frozenset(of_user)
        self.words = reader.words  # transformers reads those of the Trainer's other arguments
        self.ignored = reader.ignored  # published arguments that change nothing here, and why
        self.__dict__.update({name: each.default for name, each in DECLARED.items()} | self.given)
        if self.linear_probing and self.trainer in ("zo", "broadcast"):  # as in MeZO
            if "trainer" in of_user:
                reason = "--linear_probing is a logistic regression"
                self.ignored[f"--trainer {self.trainer}"] = reason
            self.trainer = self.given["trainer"] = "regular"
        self.choose_schedule()


def read_values(argv: Sequence[str], environment: Mapping[str, str] | None = None) -> Values:
    """Read a command line.

    ``--script NAME`` comes first where a script calls: its variables and defaults are read from
    ``environment`` (None: that of the process), and the arguments of a user win.

    Raises:
        InputError: names everything that is unknown or out of its bounds.
    """
    reader = _Reader()
    of_script = argv[:1] == ["--script"]
    script, words = ("".join(argv[1:2]), argv[2:]) if of_script else ("", argv)
    typed = {name: (each, "") for name, each in reader.split(words)}
    config = typed.get("config", ([], ""))[0]
    user = reader.read((reader.config(config) if any(config) else {}) | typed)
    chosen: dict[str, Any] = {}
    if of_script and not reader.problems:
        variables = os.environ if environment is None else environment
        reason = "the files of --train_file and --validation_file replace it"
        reader.ignored |= dict.fromkeys(replaced(variables, user), reason)
        words_of_script = {
            ours: ([each], label)
            for name, (word, label) in choose_defaults(script, variables, user).items()
            for ours, each in TRANSLATED.get((name, word.lower()), {name: word}).items()
            if ours not in user
        }
        chosen = reader.read(words_of_script)
    raise_problems(reader.problems)
    values = Values(reader, user, chosen)
    if _train_classes(values, of_script):
        values.given["train_as_classification"] = values.train_as_classification = True
        values.words["train_as_classification"] = ["True"]
    return values


def _train_classes(values: Values, of_script: bool) -> bool:
    """Whether rows with options train as classification though nobody says how they train.

    The user's own do, and in a script those of the tasks that are published so.
    """
    own = values.train_file or values.validation_file
    said = {"train_as_classification", "only_train_option"} & values.given.keys()
    if said or values.non_diff or values.reward or values.trainer == "none":
        return False
    try:
        return bool(own or of_script) and values.task.train_as_classification
    except InputError:
        return False  # ``check_values`` says it


class _Reader:
    """Turns words into values and collects what is wrong with them."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.ignored: dict[str, str] = {}
        self.unknown: list[str] = []
        self.missing: dict[str, list[str]] = {}  # why it is not here -> as typed
        self.words: dict[str, list[str]] = {}

    def split(self, words: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
        """Yield the arguments of a command line with the words that follow them."""
        found: list[tuple[str, list[str]]] = []
        for word in words:
            if word.startswith("--"):
                option, equals, value = word.partition("=")
                found.append((option, [value] if equals else []))
            elif found:
                found[-1][1].append(word)
            else:
                self.problems.append(f"{word}: no argument stands before it")
        for option, values in _in_order(found):
            yield from self._named(option, values)
        if self.unknown:
            self.problems.append(explain_unknown(*self.unknown))
        if self.missing:
            shown = (f"{', '.join(each)} ({reason})" for reason, each in self.missing.items())
            self.problems.append(f"not here: {', '.join(shown)}")
        self.unknown, self.missing = [], {}

    def _named(self, option: str, words: list[str]) -> Iterator[tuple[str, list[str]]]:
        typed = option.removeprefix("--").replace("-", "_")
        switched = typed.removeprefix("no_")
        name, value = NAMES.get(typed, typed), words[-1].lower() if words else ""
        trainers = OWN["trainer"].choices
        if (name, value) in TRANSLATED:
            yield from ((ours, [each]) for ours, each in TRANSLATED[name, value].items())
        elif name == "trainer" and words and value not in trainers:
            reason = f"choose from {', '.join(trainers)}"
            self.missing.setdefault(reason, []).append(f"{option} {words[-1]}")
        elif typed in NAMES:
            yield name, words
        elif switched in OWN and OWN[switched].kind is bool and not words:
            yield switched, ["False"]
        elif typed in IGNORED:
            self.ignored[option] = IGNORED[typed]
        elif typed in NOT_HERE:
            if not words or words[-1] not in OFF + AS_HERE:
                self.missing.setdefault(NOT_HERE[typed], []).append(" ".join([option, *words]))
        elif typed not in NOT_OFFERED:
            self.unknown.append(option)
        elif not words or words[-1] not in OFF:
            self.problems.append(f"{option} is not offered: {NOT_OFFERED[typed]}; leave it out")

    def config(self, words: list[str]) -> dict[str, tuple[list[str], str]]:
        """Return the words of a configuration file's arguments, and what they are called."""
        found: dict[str, tuple[list[str], str]] = {}
        for key, (place, word) in words_of_config(Path("".join(words[-1:]))).items():
            before = len(self.problems)
            for name, value in self.split([f"--{key}={word}"]):
                if name in found:
                    self.problems.append(f"--{name} is given twice, under another name before")
                found[name] = (value, f"{place}: --{name} {word}")
            self.problems[before:] = [f"{place}: {each}" for each in self.problems[before:]]
        return found

    def read(self, words: Mapping[str, tuple[list[str], str]]) -> dict[str, Any]:
        """Return values by name; beside the words stands what they are called, if not by it."""
        self.words |= {name: each for name, (each, _) in words.items()}
        values = {}
        for name, (each, label) in words.items():
            try:
                values[name] = DECLARED[name].read(each)
                if name == "max_steps" and values[name] == 0:
                    raise ValueError("must be at least 1, or -1 for --num_train_epochs")
            except ValueError as error:
                typed = " ".join((label or " ".join([f"--{name}", *each])).split())
                self.problems.append(f"{typed}: {error}")
        return values


def _in_order(found: Sequence[tuple[str, list[str]]]) -> list[tuple[str, list[str]]]:
    """Sort arguments of which some have two names: the last one wins.

    Steps of warm-up win over a ratio, unless they are 0, which the Trainer takes for not given.
    """

    def is_zero(words: Sequence[str]) -> bool:
        return re.fullmatch(r"0*\.?0*", "".join(words[-1:])) is not None

    def rank(argument: tuple[str, list[str]]) -> int:
        name, words = argument[0].replace("-", "_"), argument[1]
        if name == "__warmup_ratio":
            return -2 if is_zero(words) else -1
        if name in ("__warmup_steps", "__warmup_step"):
            return -2 if is_zero(words) and has_ratio else 0
        return int(name == "__zo_lr_scheduler_type")

    has_ratio = any(
        option.replace("-", "_") == "__warmup_ratio" and not is_zero(words)
        for option, words in found
    )
    return sorted(found, key=rank)


def raise_problems(problems: Sequence[str]) -> None:
    """Raise InputError with problems, a line each, if there are any."""
    if problems:
        raise InputError("\n       ".join(dict.fromkeys(problems)))


def explain_unknown(*options: str) -> str:
    """Return lines on words that are no arguments of run.py, as ``--lr`` or ``--lr=1e-6``."""
    lines, others = [], []
    for option in options:
        name = option.partition("=")[0].removeprefix("--").replace("-", "_").lower()
        near = [SYNONYMS[name]] if name in SYNONYMS else []
        near += difflib.get_close_matches(name, NAMES, 1, 0.75)
        if near:
            lines.append(f"unknown argument {option}: did you mean --{near[0]}?")
        else:
            others.append(option)
    if others:
        listed = "python run.py --help all lists the arguments"
        lines.append(f"unknown argument {', '.join(others)}: {listed}")
    return "\n       ".join(lines)


def argument_name(option: str) -> str | None:
    """Return the argument that an option means, under any of its names, or None."""
    return NAMES.get(option.removeprefix("--").replace("-", "_"))


def given_names(words: Sequence[str]) -> list[str]:
    """Return the names of the arguments of a command line; an unknown one is refused."""
    reader = _Reader()
    names = [name for name, _ in reader.split(words)]
    raise_problems(reader.problems)
    return names
