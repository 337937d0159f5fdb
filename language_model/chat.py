"""Texts as a conversation, in the format that an instruct model was trained on (chat template).

The user says the prompt, the assistant the answer; demonstrations are earlier turns, as in
lm-evaluation-harness (--apply_chat_template --fewshot_as_multiturn).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from utils import InputError, one_line

Message = dict[str, str]

# An answer, to find what a template appends to one.
ANSWER = "ANSWER"


@dataclass(frozen=True)
class Chat:
    """A tokenizer's template, and what the system says first (None: the template's own)."""

    tokenizer: PreTrainedTokenizerBase
    system_prompt: str | None = None

    def check(self, model_name: str) -> None:
        """Refuse a tokenizer without a template, or a template that refuses the system prompt."""
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
        if self.system_prompt and not (messages and messages[0]["role"] == "system"):
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )

    @functools.cached_property
    def end_of_answer(self) -> str:
        """What the template appends to an answer, stripped."""
        whole = self.tokenizer.apply_chat_template(
            [user("question"), assistant(ANSWER)], tokenize=False, add_generation_prompt=False
        )
        return whole.rpartition(ANSWER)[2].strip()

    def tokens(self, text: str) -> list[int]:
        """Return the tokens of a conversation; the template has its own start token."""
        return self.tokenizer.encode(text, add_special_tokens=False)


def user(content: str) -> Message:
    """Return what a user says."""
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    """Return what the assistant says."""
    return {"role": "assistant", "content": content}
