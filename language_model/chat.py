"""Texts as a conversation, in the format that an instruct model was trained on (chat template).

The user says the prompt, the assistant the answer; demonstrations are earlier turns, as in
lm-evaluation-harness (--apply_chat_template --fewshot_as_multiturn).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from tasks import shown
from utils import InputError, one_line

logger = logging.getLogger(__name__)

Message = dict[str, str]

# An answer, to find what a template appends to one.
ANSWER = "ANSWER"
# Processor time that a template may take for one conversation: a loop in it may never end.
SECONDS = 5.0


@dataclass(frozen=True)
class Chat:
    """A tokenizer's template, and what the system says first (None: the template's own)."""

    tokenizer: PreTrainedTokenizerBase
    system_prompt: str | None = None

    @property
    def _way_out(self) -> str:
        """What to do about a conversation that the template does not take."""
        also = " and --system_prompt" if self.system_prompt else ""
        return f"give another model, or leave out --apply_chat_template{also}"

    def check(self, model_name: str) -> None:
        """Refuse a tokenizer without a template; warn of one that writes today's date.

        Raises:
            InputError: there is no template.
        """
        template = self.tokenizer.chat_template
        if not template:
            raise InputError(
                f"--apply_chat_template: the tokenizer of {model_name} has no chat template; give "
                "an instruct model, or leave it out"
            )
        if "strftime_now" in str(template):
            logger.warning(
                "the chat template of %s writes today's date: prompts differ from day to day",
                model_name,
            )

    def check_conversation(self, messages: Sequence[Message], answer: str | None) -> None:
        """Refuse a conversation that the template changes: it would be scored as another one.

        Earlier answers may be changed; templates drop the reasoning in them.

        Raises:
            InputError: shows what the template makes of it.
        """
        opening = self.text(messages)
        for turn in self._with_system(messages):
            if turn["role"] != "assistant" and turn["content"].strip() not in opening:
                raise InputError(
                    f"the chat template changes or leaves out what the {turn['role']} says, "
                    f"{shown(turn['content'])}: it makes {shown(opening)}; {self._way_out}"
                )
        if not answer:
            return
        whole = self._rendered([*messages, assistant(answer)])
        if self._after_answer is None or not whole.endswith(answer + self._after_answer):
            raise InputError(
                f"the chat template changes or leaves out the answer {shown(answer)}: the "
                f"conversation ends in {whole[-80:]!r}; {self._way_out}"
            )

    def text(self, messages: Sequence[Message]) -> str:
        """Return a conversation, up to where the assistant's next answer begins.

        Raises:
            InputError: the template refuses it, or takes too long.
        """
        return self._rendered(messages, add_generation_prompt=True)

    @property
    def end_of_answer(self) -> str:
        """What the template appends to an answer, stripped."""
        return (self._after_answer or "").strip()

    @functools.cached_property
    def _after_answer(self) -> str | None:
        """What the template appends to an answer; None if it changes answers."""
        conversation = [{"role": "user", "content": "question"}, assistant(ANSWER)]
        _, answer, after = self._rendered(conversation).rpartition(ANSWER)
        return after if answer else None

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        if self.system_prompt and not (messages and messages[0]["role"] == "system"):
            return [{"role": "system", "content": self.system_prompt}, *messages]
        return list(messages)

    def _rendered(self, messages: Sequence[Message], **options: Any) -> str:
        messages = self._with_system(messages)
        try:
            with _limited_time():
                return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:  # templates raise errors of their own
            raise InputError(
                f"the chat template refuses {shown(messages)} ({one_line(error)}); {self._way_out}"
            ) from error

    def tokens(self, text: str) -> list[int]:
        """Return the tokens of a conversation; the template has its own start token."""
        return self.tokenizer.encode(text, add_special_tokens=False)


@contextlib.contextmanager
def _limited_time() -> Iterator[None]:
    """Raise TimeoutError after ``SECONDS`` of processor time; in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"it takes longer than {SECONDS:g} seconds")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def assistant(content: str) -> Message:
    """Return what the assistant says."""
    return {"role": "assistant", "content": content}
