"""Prompts and verbalizers of the tasks: plain text, no tokens and no model.

The whole text of an example is ``prompt(row) + option(row, candidate)``. Prompts are part of what
published numbers measure, so every space and newline counts; the tests spell each out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

Row = Mapping[str, Any]


class Template(ABC):
    """How a row of a data set becomes text. Stateless; one subclass per task.

    The ``content_free_*`` texts calibrate for surface form competition (SFC; Holtzman et al. 2021,
    arXiv 2104.08315): the same option behind a prompt that says nothing about the row.
    """

    supports_calibration: ClassVar[bool] = True

    @abstractmethod
    def prompt(self, row: Row) -> str:
        """Return the text before the option."""

    @abstractmethod
    def option(self, row: Row, candidate: Any) -> str:
        """Return the text that is scored or generated, with its leading space and final newline."""

    def content_free_prompt(self, row: Row) -> str:
        """Return the prompt without the example; empty unless the task says otherwise."""
        return ""

    def content_free_option(self, row: Row, candidate: Any) -> str:
        """Return the option as it follows ``content_free_prompt``."""
        return self.option(row, candidate)


class LabelTemplate(Template):
    """A task with fixed labels: ``verbalizer`` maps each to its text, in the options' order."""

    verbalizer: ClassVar[Mapping[Any, str]]

    def option(self, row: Row, candidate: Any) -> str:
        return self.verbalizer[candidate]


class SST2Template(LabelTemplate):
    """Sentiment of a film review's sentence."""

    verbalizer = {0: " terrible", 1: " great"}

    def prompt(self, row: Row) -> str:
        return f"{row['sentence'].strip()} It was"

    def content_free_prompt(self, row: Row) -> str:
        return " It was"


class RTETemplate(LabelTemplate):
    """Textual entailment, two ways."""

    verbalizer = {0: "Yes", 1: "No"}

    def prompt(self, row: Row) -> str:
        return f'{row["premise"]}\nDoes this mean that "{row["hypothesis"]}" is true? Yes or No?\n'


class CBTemplate(LabelTemplate):
    """CommitmentBank: textual entailment, three ways."""

    verbalizer = {0: "Yes", 1: "No", 2: "Maybe"}

    def prompt(self, row: Row) -> str:
        return (
            f"Suppose {row['premise']} "
            f'Can we infer that "{row["hypothesis"]}"? Yes, No, or Maybe?\n'
        )


class BoolQTemplate(LabelTemplate):
    """Yes/no questions about a passage."""

    verbalizer = {True: "Yes", False: "No"}

    def prompt(self, row: Row) -> str:
        # The data set's questions are in lower case, and most have no question mark.
        question = row["question"].strip().rstrip("? ")
        return f"{row['passage']} {question[:1].upper()}{question[1:]}?\n"


class WSCTemplate(LabelTemplate):
    """Winograd schemas: whom does a pronoun mean?"""

    verbalizer = {0: "No", 1: "Yes"}

    def prompt(self, row: Row) -> str:
        return (
            f"{row['text']}\n"
            f'In the previous sentence, does the pronoun "{row["span2_text"].lower()}" '
            f"refer to {row['span1_text']}? Yes or No?\n"
        )


class WICTemplate(LabelTemplate):
    """Word in context: is a word used in the same sense twice?"""

    verbalizer = {0: "No", 1: "Yes"}

    def prompt(self, row: Row) -> str:
        return (
            f'Does the word "{row["word"]}" have the same meaning '
            "in these two sentences? Yes, No?\n"
            f"{row['sentence1']}\n"
            f"{row['sentence2']}\n"
        )


class MultiRCTemplate(LabelTemplate):
    """Is one proposed answer to a question about a paragraph correct?"""

    verbalizer = {0: "No", 1: "Yes"}

    def prompt(self, row: Row) -> str:
        return (
            f"{row['paragraph']}\n"
            f"Question: {row['question']}\n"
            f'I found this answer "{row["answer"]}". Is that correct? Yes or No?\n'
        )


class CopaTemplate(Template):
    """The more plausible cause or effect of a premise."""

    conjunctions: ClassVar[Mapping[str, str]] = {"effect": "so", "cause": "because"}

    def prompt(self, row: Row) -> str:
        premise = row["premise"].rstrip().removesuffix(".")
        return f"{premise} {self.conjunctions[row['question']]} "

    def option(self, row: Row, candidate: str) -> str:
        first, space, rest = candidate.partition(" ")
        # The choice continues the premise's sentence, so only the pronoun keeps its capital.
        return (first if first == "I" else first.lower()) + space + rest

    def content_free_prompt(self, row: Row) -> str:
        return self.conjunctions[row["question"]]

    def content_free_option(self, row: Row, candidate: str) -> str:
        return " " + self.option(row, candidate)


class ReCoRDTemplate(Template):
    """Which entity fills the placeholder of a query about a news passage?"""

    def prompt(self, row: Row) -> str:
        passage = row["passage"].replace("@highlight\n", "- ")
        return f"{passage}\n-"

    def option(self, row: Row, candidate: str) -> str:
        return " " + row["query"].replace("@placeholder", candidate)

    def content_free_prompt(self, row: Row) -> str:
        return "-"


class AnswerTemplate(Template):
    """A task whose answer is generated: a space, the text, and the newline that ends it."""

    supports_calibration = False

    def option(self, row: Row, candidate: str) -> str:
        return f" {candidate}\n"


class SQuADTemplate(AnswerTemplate):
    """Span questions about a Wikipedia paragraph."""

    def prompt(self, row: Row) -> str:
        return (
            f"Title: {row['title']}\n"
            f"Context: {row['context']}\n"
            f"Question: {row['question'].strip()}\n"
            "Answer:"
        )


class DROPTemplate(AnswerTemplate):
    """Questions that need discrete reasoning over a paragraph."""

    def prompt(self, row: Row) -> str:
        return f"Passage: {row['passage']}\nQuestion: {row['question'].strip()}\nAnswer:"


class OwnTemplate(Template):
    """Rows of the user's own files: the prompt as it is, and an option a space behind it.

    A prompt that ends in a space or a new line, or an option that begins with one, gets no other.
    The content-free prompt is empty.
    """

    def prompt(self, row: Row) -> str:
        return row["prompt"]

    def option(self, row: Row, candidate: str) -> str:
        apart = row["prompt"][-1:].isspace() or candidate[:1].isspace()
        return candidate if apart else f" {candidate}"


class OwnAnswerTemplate(OwnTemplate):
    """As ``OwnTemplate``, with an answer that is generated: a newline ends it."""

    supports_calibration = False

    def option(self, row: Row, candidate: str) -> str:
        return super().option(row, candidate) + "\n"
