"""Write docs/arguments.md from the declarations: ``python docs/make_arguments.py``."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from command_line.declarations import Declaration, declared
from command_line.help import explanation
from command_line.published import IGNORED, NOT_HERE
from command_line.reading import DECLARED, GROUPS
from command_line.trainer_arguments import NOT_OFFERED, OTHERS

PAGE = ROOT / "docs" / "arguments.md"
INTRODUCTION = """\
# Arguments of run.py

Made from the code by `python docs/make_arguments.py`. `python run.py --help all` prints all but
some of the Trainer's, which the documentation of transformers explains.

- A flag is on with `--flag` or `--flag True`, off with `--flag False`. Of an argument that is given
  twice the last value counts. Names may be written with dashes.
- "No effect" says where an argument has none. There it is left out, and one line names all of
  these: `warning: no effect here: --top_k (the task has options)`. "Refused" marks those without
  which the result would be another than the one that was asked for.
- Everything that is wrong with a command line is said at once, with exit code 2.
- "—": not given.
"""


def make_page() -> str:
    """Return the text of docs/arguments.md."""
    sections = [INTRODUCTION]
    for group in GROUPS:
        title, _, remark = group.__doc__.partition(".")
        remark = f"{marked(remark.strip())}\n\n" if remark.strip() else ""
        sections.append(f"## {title}\n\n{remark}{argument_table(declared(group))}")
    others = {name: where(each) for name, each in OTHERS.items()}
    sections.append(f"""\
## The Trainer's other arguments

The documentation of transformers explains these arguments of `TrainingArguments`:

{table(("arguments", "no effect"), grouped(others))}
These change nothing and are accepted, as published command lines have them:

{table(("arguments", "why"), grouped(IGNORED))}
These are refused:

{table(("arguments", "why"), grouped(NOT_OFFERED | NOT_HERE))}""")
    return "\n".join(sections)


def argument_table(declarations: Iterable[Declaration]) -> str:
    """Return the table of some arguments."""
    rows = []
    for each in declarations:
        names = ", ".join(f"`{option}`" for option in (f"--{each.name}", *each.aliases))
        choices = ", ".join(f"`{choice}`" for choice in each.choices)
        rows.append((names, shown_default(each), choices, marked(explanation(each)), where(each)))
    return table(("argument", "default", "choices", "meaning", "no effect"), rows)


def where(declaration: Declaration) -> str:
    """Return where an argument has no effect."""
    effect, reasons = declaration.effect, []
    refused = effect is not None and effect.refused
    while effect:
        reasons.insert(0, marked(effect.otherwise.format(task="the task")))
        effect = effect.inside
    return "; ".join(reasons) + (" (refused)" if refused else "") if reasons else "—"


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


def shown_default(declaration: Declaration) -> str:
    """Return a default as it may be typed."""
    value = declaration.default
    if value is None:
        return "—"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def marked(text: str) -> str:
    """Return a text with its arguments as code, and nothing in it that Markdown takes for HTML."""

    def as_code(match: re.Match[str]) -> str:
        name, word = match["name"], match["word"]
        choices = DECLARED[name].choices if name in DECLARED else ()
        belongs = word and (word in choices or any(map(str.isdigit, word)))
        return f"`--{name} {word}`" if belongs else match[0].replace(f"--{name}", f"`--{name}`")

    code = re.sub(r"(?<![`\w])--(?P<name>\w+)(?: (?P<word>[\w-]+))?", as_code, text)
    return code.replace("<", r"\<")


if __name__ == "__main__":
    PAGE.write_text(make_page(), encoding="utf-8")
