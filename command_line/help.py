"""``run.py --help`` and ``--help_all``."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import shutil
import sys
import textwrap

from command_line.contradictions import EXCLUDE_EACH_OTHER
from command_line.declarations import Declaration, declared
from command_line.reading import GROUPS
from command_line.trainer_arguments import OTHERS

USAGE = """\
python run.py --task_name TASK --model_name MODEL [arguments]

  zero-shot      python run.py --task_name SST2 --model_name facebook/opt-125m --num_eval 1000
  in context     python run.py --task_name SST2 --model_name facebook/opt-125m --num_train 32
  HiZOO          python run.py --task_name SST2 --model_name facebook/opt-125m --trainer zo \\
                     --train_as_classification --num_train 1000 --num_dev 500 --num_eval 1000 \\
                     --max_steps 20000 --learning_rate 1e-6 --hessian_smooth_type constant1e-8

  MODEL is a Hub id, a local directory or a GGUF file (pip install gguf); --data_dir DIR reads
  DIR/<task>/*.jsonl, no Hub needed.
  bash HiZOO.sh does the same with environment variables. python run.py --help explains the
  arguments, python run.py --help_all those of transformers' Trainer too.
"""
HELP = ("-h", "--help", "--help_all")
INDENT = " " * 24


def help_text(everything: bool = False) -> str:
    """Return the explanation of every argument of ours; ``everything``: of the Trainer's too."""
    lines = [f"usage: {USAGE}", "options:"]
    lines.append(_explained("-h, --help", "show this help message and exit"))
    text = "show this help with all of the Trainer's arguments, and exit"
    lines.append(_explained("--help_all", text))
    for group in GROUPS:
        title, _, remark = group.__doc__.partition(".")
        lines += ["", f"{title}:", *([f"  {remark.strip()}", ""] if remark.strip() else [])]
        for each in declared(group):
            lines.append(_explained(_shown_name(each), explanation(each), each.default))
    if everything:
        from transformers import TrainingArguments  # takes seconds

        lines += ["", "The Trainer's others:"]
        for field in dataclasses.fields(TrainingArguments):
            if field.name in OTHERS:
                names = f"--{field.name} {field.name.upper()}"
                lines.append(_explained(names, field.metadata["help"], field.default))
    return "\n".join(lines)


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


def _explained(names: str, text: str, default: object = None) -> str:
    text += "" if default is None else f" (default: {getattr(default, 'value', default)})"
    width = min(100, max(60, shutil.get_terminal_size().columns))
    indents = {"initial_indent": INDENT, "subsequent_indent": INDENT}
    return f"  {names}\n" + textwrap.fill(text, width, **indents, break_on_hyphens=False)
