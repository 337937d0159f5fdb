"""``run.py --help``: what matters first, a group of arguments, or all of them."""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence

from command_line.contradictions import EXCLUDE_EACH_OTHER
from command_line.declarations import Declaration, declared
from command_line.reading import GROUPS, OWN

USAGE = """\
python run.py --task_name TASK --model_name MODEL [arguments]

  zero-shot      python run.py --task_name SST2 --model_name facebook/opt-125m --num_eval 1000
  in context     python run.py --task_name SST2 --model_name facebook/opt-125m --num_train 32
  HiZOO          python run.py --task_name SST2 --model_name facebook/opt-125m --trainer zo \\
                     --train_as_classification --num_train 1000 --num_dev 500 --num_eval 1000 \\
                     --max_steps 20000 --learning_rate 1e-6 --hessian_smooth_type constant1e-8

  MODEL is a Hub id, a local directory or a GGUF file (pip install gguf); --data_dir DIR reads
  DIR/<task>/*.jsonl, no Hub needed.
  bash HiZOO.sh does the same with environment variables. python run.py --help shows the arguments
  that matter first, and the groups of all.
"""
HELP = {"-h", "--help"}
FIRST = (
    *("task_name", "model_name", "data_dir", "train_file", "num_train", "num_dev", "num_eval"),
    *("trainer", "max_steps", "per_device_train_batch_size", "learning_rate", "output_dir"),
)
INDENT = " " * 24


def help_text(words: Sequence[str]) -> str:
    """Return what a command line with ``--help`` among its words asks for.

    ``--help GROUP`` explains a group, ``--help all`` all arguments of ours.
    """
    asked = next(i for i, word in enumerate(words) if word in HELP)
    word = next(iter(words[asked + 1 :]), "")
    of_word = {group._word: [group] for group in GROUPS} | {"all": GROUPS}
    if word in of_word:
        return "\n".join([*_groups(of_word[word])]).lstrip("\n")
    lines = [f"usage: {USAGE}", "What matters first:", *(_line(OWN[name]) for name in FIRST)]
    lines += ["", "All arguments, group by group: python run.py --help GROUP"]
    lines += [f"  {group._word:<12}{_title(group)}" for group in GROUPS]
    lines += ["  all         all of these; the Trainer's others: transformers.TrainingArguments"]
    return "\n".join(lines)


def _groups(groups: Iterable[type]) -> Iterator[str]:
    for group in groups:
        remark = group.__doc__.partition(".")[2].strip()
        yield from ["", f"{_title(group)}:", *([f"  {remark}", ""] if remark else [])]
        yield from map(_line, declared(group))


def _title(group: type) -> str:
    return group.__doc__.partition(".")[0]


def _line(declaration: Declaration) -> str:
    text = explanation(declaration)
    text += "" if declaration.default is None else f" (default: {declaration.default})"
    width = min(100, max(60, shutil.get_terminal_size().columns))
    indents = {"initial_indent": INDENT, "subsequent_indent": INDENT}
    shown = textwrap.fill(text, width, **indents, break_on_hyphens=False)
    return f"  {_shown_name(declaration)}\n{shown}"


def _shown_name(declaration: Declaration) -> str:
    names = ", ".join((f"--{declaration.name}", *declaration.aliases))
    if declaration.choices and len(declaration.choices) < 6:
        return f"{names} {{{declaration.listed_choices.replace(' ', '')}}}"
    value = "[True|False]" if declaration.kind is bool else declaration.name.upper()
    return f"{names} {value}"


@functools.cache
def help_texts() -> dict[str, str]:
    """Return the texts below the fields of the groups: Python itself does not keep them."""
    texts = {}
    for module in {sys.modules[group.__module__] for group in GROUPS}:
        for group in ast.parse(inspect.getsource(module)).body:
            for field, text in itertools.pairwise(getattr(group, "body", ())):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                    texts[field.target.id] = " ".join(ast.literal_eval(text.value).split())
    return texts


def explanation(declaration: Declaration) -> str:
    """Return the help of an argument, with what it excludes."""
    text = help_texts()[declaration.name]
    pairs = [pair for pair in EXCLUDE_EACH_OTHER if declaration.name in pair]
    others = [f"--{name}" for pair in pairs for name in pair if name != declaration.name]
    return f"{text} Excludes {', '.join(others)}." if others else text
