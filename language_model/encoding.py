"""Samples to tokens: demonstrations, prompt and option as one text, cut to the model's length.

How texts are joined and stripped, which tokens are scored, and what is cut follows MeZO (Malladi et
al. 2023, arXiv 2305.17333), so that published numbers compare. With a chat template the user says
the prompt and the assistant the answer; demonstrations are earlier turns, as in
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

from tasks import Sample, Task, shown
from utils import InputError, one_line

logger = logging.getLogger(__name__)

# An answer, to find what a template appends to one.
ANSWER = "ANSWER"
# Processor time that a template may take for one conversation: a loop in it may never end.
SECONDS = 5.0
DEMONSTRATION_SEPARATOR = "\n\n"
# A cross-entropy leaves examples with this label out.
NONE_CORRECT = -100

Message = dict[str, str]


@dataclass(frozen=True)
class EncodedOption:
    """Tokens of demonstrations, prompt and option; the last ``scored`` of them are the option's."""

    tokens: tuple[int, ...]
    scored: int

    @property
    def targets(self) -> range:
        """Indices of the scored tokens. The first token of a text is never predicted."""
        return range(max(1, len(self.tokens) - self.scored), len(self.tokens))


@dataclass(frozen=True)
class EncodedExample:
    """All options of an example, in the task's order, and the indices of the correct ones."""

    options: tuple[EncodedOption, ...]
    correct: int = 0  # used in training; ``NONE_CORRECT`` in some rows of ReCoRD
    also_correct: tuple[int, ...] = ()  # counted in evaluation too


@dataclass(frozen=True)
class Encoder:
    """Turns samples into tokens, at most ``max_length`` with generated ones.

    A longer text loses tokens on the left, after its first.
    """

    task: Task
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    max_new_tokens: int = 0  # the room that a prompt leaves
    chat: Chat | None = None  # None: plain text, no conversation

    def options(
        self,
        sample: Sample,
        demonstrations: Sequence[Sample] = (),
        candidates: Sequence[Any] | None = None,
        content_free: bool = False,
    ) -> EncodedExample:
        """Encode the prompt, or the content-free prompt of SFC, with every candidate."""
        template = self.task.template
        prompt_of = template.content_free_prompt if content_free else template.prompt
        option_of = template.content_free_option if content_free else template.option
        prompt = prompt_of(sample.row)
        candidates = sample.candidates if candidates is None else candidates
        texts = [option_of(sample.row, candidate) for candidate in candidates]
        encoded = []
        for tokens, added in self._with_options(prompt, texts, sample, demonstrations):
            # Where the tokenizer merges an option into its prompt, its last token is still scored.
            scored = max(1, added)
            if len(tokens) <= scored:
                # Neither prompt nor start token: something has to predict the first token.
                tokens = [self._start_token(), *tokens]
            encoded.append(EncodedOption(self._cut(tokens, self.max_length), scored))
        right = [index for index, c in enumerate(candidates) if c in sample.correct]
        correct = right[0] if right else NONE_CORRECT
        return EncodedExample(tuple(encoded), correct, tuple(right[1:]))

    def correct_option(self, sample: Sample, only_option: bool = True) -> EncodedExample:
        """Encode the correct answer alone, for language-model training.

        Without ``only_option`` training uses every token after the first, the prompt's too.
        """
        (option,) = self.options(sample, candidates=sample.correct[:1]).options
        scored = option.scored if only_option else len(option.tokens) - 1
        return EncodedExample((EncodedOption(option.tokens, scored),))

    def prompt(self, sample: Sample, demonstrations: Sequence[Sample] = ()) -> tuple[int, ...]:
        """Encode the prompt of an answer that is generated."""
        prompt = self.task.prompt(sample)
        if self.chat:
            messages = self._messages(prompt, sample, demonstrations)
            tokens = self.chat.tokens(self.chat.text(messages))
        else:
            tokens = self._tokens(self._whole_text(demonstrations, prompt.strip(" ")))
        return self._cut(tokens, self.max_length - self.max_new_tokens)

    def check_conversation(self, sample: Sample, demonstrations: Sequence[Sample] = ()) -> None:
        """Raise ``InputError`` if the chat template changes a sample's turns or its answer."""
        messages = self._messages(self.task.prompt(sample), sample, demonstrations)
        self.chat.check_conversation(messages, self._answer(sample) if sample.correct else None)

    def _with_options(
        self, prompt: str, options: Sequence[str], sample: Sample, demonstrations: Sequence[Sample]
    ) -> Iterator[tuple[list[int], int]]:
        """Yield the tokens of the text with each option, and how many the option has added."""
        if self.chat:
            opening = self.chat.text(self._messages(prompt, sample, demonstrations))
            length = len(self.chat.tokens(opening))
            # Answers of generation tasks end as the template ends them.
            end = self.chat.end_of_answer if self.task.generation else ""
            for option in options:
                tokens = self.chat.tokens(opening + option.strip() + end)
                yield tokens, len(tokens) - length
            return
        length = len(self._tokens(prompt.strip(" ")))
        for option in options:
            text = (prompt + option).strip(" ")
            added = len(self._tokens(text)) - length
            yield self._tokens(self._whole_text(demonstrations, text)), added

    def _messages(
        self, prompt: str, sample: Sample, demonstrations: Sequence[Sample]
    ) -> list[Message]:
        """Return the turns of a conversation before the answer."""
        turns: list[Message] = []
        for each in demonstrations:
            turns += self.task.messages(self.task.prompt(each), each)
            turns.append(assistant(self._answer(each)))
        return [*turns, *self.task.messages(prompt, sample)]

    def _answer(self, sample: Sample) -> str:
        return self.task.option(sample, sample.correct[0]).strip()

    def _whole_text(self, demonstrations: Sequence[Sample], text: str) -> str:
        answered = (
            (self.task.prompt(each) + self.task.option(each, each.correct[0])).strip()
            for each in demonstrations
        )
        before = DEMONSTRATION_SEPARATOR.join(answered).strip()
        return (before + DEMONSTRATION_SEPARATOR + text).lstrip().strip(" ")

    def _tokens(self, text: str) -> list[int]:
        tokens = self.tokenizer.encode(text)
        return tokens[: len(tokens) - self._appended]

    @functools.cached_property
    def _appended(self) -> int:
        """How many tokens the tokenizer appends to every text, as with ``add_eos_token``.

        They would be scored in place of the option, and would end a prompt before its answer.
        """
        text = "a"
        alone = self.tokenizer.encode(text, add_special_tokens=False)
        whole = self.tokenizer.encode(text)
        starts = range(len(whole) - len(alone) + 1)
        start = next(start for start in starts if whole[start : start + len(alone)] == alone)
        return len(whole) - start - len(alone)

    def _start_token(self) -> int:
        tokenizer = self.tokenizer
        token = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if token is None:
            raise InputError(
                "the tokenizer has neither a start token (bos_token) nor an end token (eos_token) "
                "to put before an option whose prompt is empty: give another model, or leave out "
                "--sfc"
            )
        return token

    def _cut(self, tokens: list[int], length: int) -> tuple[int, ...]:
        if len(tokens) <= length:
            return tuple(tokens)
        return (tokens[0], *tokens[len(tokens) - length + 1 :])


# ------------------------------------------------------------------------------------ conversations


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
        """Raise ``InputError`` without a template; warn of one that writes today's date."""
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
        """Raise ``InputError`` if the template changes a conversation; shows what it makes of it.

        Earlier answers may be changed; templates drop the reasoning in them.
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
        if not whole.endswith(answer + self._after_answer):
            raise InputError(
                f"the chat template changes or leaves out the answer {shown(answer)}: the "
                f"conversation ends in {whole[-80:]!r}; {self._way_out}"
            )

    def text(self, messages: Sequence[Message]) -> str:
        """Return a conversation up to the next answer; raise ``InputError`` if it is refused."""
        return self._rendered(messages, add_generation_prompt=True)

    @property
    def end_of_answer(self) -> str:
        """What the template appends to an answer, stripped."""
        return self._after_answer.strip()

    @functools.cached_property
    def _after_answer(self) -> str:
        """What the template appends to an answer; nothing if it changes answers."""
        conversation = [{"role": "user", "content": "question"}, assistant(ANSWER)]
        _, answer, after = self._rendered(conversation).rpartition(ANSWER)
        return after if answer else ""

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
