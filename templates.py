"""Prompts and options of the tasks: plain text, no tokens and no model.

Prompts are part of what published numbers measure: every space and newline counts, and the tests
spell each one out.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Template:
    """How a row becomes text: ``prompt(row) + option(row, candidate)`` is a whole example."""

    text: str  # the prompt, with columns in braces
    # The text of each label, in the order of the options; empty: see ``write``.
    labels: Mapping[Any, str] = field(default_factory=dict)
    # Makes the text of a candidate that each row brings along.
    write: Callable[[Row, Any], str] | None = None
    # What changes a column before it goes into a prompt.
    clean: Mapping[str, Callable[[str], str]] = field(default_factory=dict)
    # The prompt that says nothing about the row, against which ``--sfc`` calibrates (surface form
    # competition; Holtzman et al. 2021, arXiv 2104.08315), and what goes before an option there.
    content_free: str = ""
    before_content_free_option: str = ""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the prompt is made of."""
        return tuple(name for _, name, _, _ in string.Formatter().parse(self.text) if name)

    def prompt(self, row: Row) -> str:
        """Return the text before the option."""
        return self._filled(self.text, row)

    def option(self, row: Row, candidate: Any) -> str:
        """Return the text that is scored or generated, with its leading space and final newline."""
        return self.labels[candidate] if self.labels else self.write(row, candidate)

    def content_free_prompt(self, row: Row) -> str:
        """Return the prompt without the example."""
        return self._filled(self.content_free, row)

    def content_free_option(self, row: Row, candidate: Any) -> str:
        """Return the option as it follows ``content_free_prompt``."""
        return self.before_content_free_option + self.option(row, candidate)

    def _filled(self, text: str, row: Row) -> str:
        cleaned = {name: change(row[name]) for name, change in self.clean.items() if name in row}
        return text.format_map({**row, **cleaned})


def one_question(text: str) -> str:
    """Return a question with a capital and without question marks; BoolQ's have neither."""
    text = text.strip().rstrip("? ")
    return text[:1].upper() + text[1:]


def without_full_stop(text: str) -> str:
    """Return a premise that a conjunction can follow."""
    return text.rstrip().removesuffix(".")


def continued(row: Row, choice: str) -> str:
    """Return a choice that continues the premise's sentence: only the pronoun keeps its capital."""
    first, space, rest = choice.partition(" ")
    return (first if first == "I" else first.lower()) + space + rest


def with_highlights(passage: str) -> str:
    """Return a passage with its summary as a list."""
    return passage.replace("@highlight\n", "- ")


def filled_query(row: Row, entity: str) -> str:
    """Return the query with an entity in its place."""
    return " " + row["query"].replace("@placeholder", entity)


def answer(row: Row, text: str) -> str:
    """Return an answer that is generated: a space, the text, and the newline that ends it."""
    return f" {text}\n"


def own_option(row: Row, option: str) -> str:
    """Return an option of the user's own, one space or newline behind the prompt."""
    apart = row["prompt"][-1:].isspace() or option[:1].isspace()
    return option if apart else f" {option}"


def own_answer(row: Row, text: str) -> str:
    """Return a generated answer of the user's own; a newline ends it."""
    return own_option(row, text) + "\n"


CONJUNCTIONS: Mapping[str, str] = {"effect": "so", "cause": "because"}
NO_YES = {0: "No", 1: "Yes"}

SST2 = Template(
    "{sentence} It was",
    {0: " terrible", 1: " great"},
    clean={"sentence": str.strip},
    content_free=" It was",
)
RTE = Template(
    '{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n', {0: "Yes", 1: "No"}
)
CB = Template(
    'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n',
    {0: "Yes", 1: "No", 2: "Maybe"},
)
BoolQ = Template(
    "{passage} {question}?\n", {True: "Yes", False: "No"}, clean={"question": one_question}
)
WSC = Template(
    '{text}\nIn the previous sentence, does the pronoun "{span2_text}" refer to {span1_text}? '
    "Yes or No?\n",
    NO_YES,
    clean={"span2_text": str.lower},
)
WIC = Template(
    'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n'
    "{sentence1}\n{sentence2}\n",
    NO_YES,
)
MultiRC = Template(
    '{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? '
    "Yes or No?\n",
    NO_YES,
)
Copa = Template(
    "{premise} {question} ",
    write=continued,
    clean={"premise": without_full_stop, "question": CONJUNCTIONS.__getitem__},
    content_free="{question}",
    before_content_free_option=" ",
)
ReCoRD = Template(
    "{passage}\n-", write=filled_query, clean={"passage": with_highlights}, content_free="-"
)
SQuAD = Template(
    "Title: {title}\nContext: {context}\nQuestion: {question}\nAnswer:",
    write=answer,
    clean={"question": str.strip},
)
DROP = Template(
    "Passage: {passage}\nQuestion: {question}\nAnswer:", write=answer, clean={"question": str.strip}
)
# The user's own files: the prompt as it is.
OWN_CHOICE = Template("{prompt}", write=own_option)
OWN_ANSWER = Template("{prompt}", write=own_answer)
