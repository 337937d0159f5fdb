"""Texts as a conversation, in the form that an instruct model was trained on (chat templates).

The prompt is what a user says, the answer what the assistant says; demonstrations are turns before
them. That is how lm-evaluation-harness does it (--apply_chat_template, demonstrations as turns).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from utils import InputError, one_line

Message = dict[str, str]

# Stands for an answer, to find what a template puts behind one.
ANSWER = "ANSWER"


@dataclass(frozen=True)
class Chat:
    """A tokenizer's template.

    Attributes:
        tokenizer: the model's own.
        system_prompt: what the system says before everything; None: what the template itself says.
    """

    tokenizer: PreTrainedTokenizerBase
    system_prompt: str | None = None

    def check(self, model_name: str) -> None:
        """Refuse a tokenizer without a template, or one that does not take the system prompt.

        Raises:
            InputError: says so.
        """
        if not self.tokenizer.chat_template:
            raise InputError(
                f"--apply_chat_template: the tokenizer of {model_name} has no chat template; give "
                "an instruct model, or leave it out"
            )
        try:
            self.text([user("question"), assistant("answer"), user("question")])
        except Exception as error:  # templates raise errors of their own
            system = "--system_prompt" if self.system_prompt else "--apply_chat_template"
            raise InputError(
                f"{system}: the chat template of {model_name} refuses it ({one_line(error)}); "
                "leave it out"
            ) from error

    def text(self, messages: Sequence[Message]) -> str:
        """Return a conversation, up to where the assistant's next answer begins."""
        has_own = bool(messages) and messages[0]["role"] == "system"
        said = self.system_prompt if not has_own else None
        system = [{"role": "system", "content": said}] if said else []
        return self.tokenizer.apply_chat_template(
            [*system, *messages], tokenize=False, add_generation_prompt=True
        )

    @functools.cached_property
    def end_of_answer(self) -> str:
        """What the template puts behind an answer, without spaces and newlines around it."""
        whole = self.tokenizer.apply_chat_template(
            [user("question"), assistant(ANSWER)], tokenize=False, add_generation_prompt=False
        )
        return whole.rpartition(ANSWER)[2].strip()

    def tokens(self, text: str) -> list[int]:
        """Return the tokens of a conversation; the template brings its own start token."""
        return self.tokenizer.encode(text, add_special_tokens=False)


def user(content: str) -> Message:
    """Return what a user says."""
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    """Return what the assistant says."""
    return {"role": "assistant", "content": content}
