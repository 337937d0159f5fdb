"""Write docs/arguments.md from the command line itself: ``python docs/make_arguments.py``."""

from __future__ import annotations

import dataclasses
import enum
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import get_args, get_type_hints

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from command_line.applicability import SCOPES
from command_line.arguments import Arguments
from command_line.groups import COMMON_TRAINER_ARGUMENTS, GROUPS
from command_line.unknown import NOT_OFFERED

PAGE = ROOT / "docs" / "arguments.md"
INTRODUCTION = """\
# Arguments of run.py

Made from the code by `python docs/make_arguments.py`. `python run.py --help` prints the same, and
`python run.py --help_all` the Trainer's other arguments too.

- A flag is on with `--flag` or `--flag True`, off with `--flag False`. Of an argument that is given
  twice the last value counts. Names may be written with dashes.
- "Only with" says where an argument has an effect; an argument named there has a line of its own.
  Given where it has none, it is refused in one line, with exit code 2, unless its value switches
  off what is off anyway: a flag at its default, `no`, `none` or `0`.
- What stands before a word `--` are a script's own choices. The arguments behind it win, and those
  before it may be without effect: `bash HiZOO.sh --save_strategy no` works, although HiZOO.sh
  passes `--save_steps`.
- "—": not given.
"""
FIELDS = {field.name: field for field in dataclasses.fields(Arguments)}
CONDITIONS = {name: scope.where for scope in SCOPES for name in scope.names}


def make_page() -> str:
    """Return the text of docs/arguments.md."""
    sections = [INTRODUCTION]
    explained = dict(COMMON_TRAINER_ARGUMENTS)
    for group in GROUPS:
        texts = {field.name: field.metadata["help"] for field in dataclasses.fields(group)}
        explained |= texts
        title, _, remark = group.__doc__.partition(".")
        remark = f"{marked(remark.strip())}\n\n" if remark else ""
        sections.append(f"## {title}\n\n{remark}{argument_table(texts)}")
    conditions = {name: where for name, where in CONDITIONS.items() if name not in explained}
    sections.append(f"""\
## The Trainer's arguments

All of transformers' `TrainingArguments` work too, where they have an effect. Most runs need some of
these:

{argument_table(COMMON_TRAINER_ARGUMENTS)}
`--help_all` and the documentation of transformers explain the others:

{table(("arguments", "only with"), grouped(conditions))}
These are not offered:

{table(("arguments", "why"), grouped(NOT_OFFERED))}""")
    return "\n".join(sections)


def argument_table(texts: Mapping[str, str]) -> str:
    """Return the table of some arguments, by name with their meaning."""
    rows = []
    for name, text in texts.items():
        aliases = FIELDS[name].metadata.get("aliases", ())
        names = ", ".join(f"`{option}`" for option in (f"--{name}", *aliases))
        choices = ", ".join(f"`{choice}`" for choice in choices_of(name))
        rows.append((names, default_of(name), choices, marked(text), CONDITIONS[name]))
    return table(("argument", "default", "choices", "meaning", "only with"), rows)


def grouped(texts: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return rows of arguments that have the same text."""
    rows: dict[str, list[str]] = {}
    for name, text in texts.items():
        rows.setdefault(text, []).append(f"`--{name}`")
    return [(", ".join(names), marked(text)) for text, names in rows.items()]


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def choices_of(name: str) -> Iterator[str]:
    """Yield the values that an argument is chosen from, if it is one of a few."""
    annotation = get_type_hints(Arguments)[name]
    for part in (annotation, *get_args(annotation)):
        yield from (value for value in get_args(part) if isinstance(value, str))
        if isinstance(part, type) and issubclass(part, enum.Enum):
            yield from (member.value for member in part)


def default_of(name: str) -> str:
    """Return a default as it may be typed."""
    value = getattr(FIELDS[name].default, "value", FIELDS[name].default)
    if value is None:
        return "—"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def marked(text: str) -> str:
    """Return a text with its arguments as code, and nothing in it that Markdown takes for HTML."""

    def as_code(match: re.Match[str]) -> str:
        name, word = match["name"], match["word"]
        belongs = word and (word in choices_of(name) or any(map(str.isdigit, word)))
        return f"`--{name} {word}`" if belongs else match[0].replace(f"--{name}", f"`--{name}`")

    code = re.sub(r"(?<![`\w])--(?P<name>\w+)(?: (?P<word>[\w-]+))?", as_code, text)
    return code.replace("<", r"\<")


if __name__ == "__main__":
    PAGE.write_text(make_page(), encoding="utf-8")
