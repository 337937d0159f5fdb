"""Samples to tokens: the whole text, the scored span, cuts, content-free prompts."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from oracle_scoring import TOKENIZERS, draw
from tiny_models import appending_tokenizer, tiny_tokenizer, tokenizer_without_start, word_tokenizer

from language_model.encoding import EncodedExample, EncodedOption, Encoder
from tasks import Sample, get_task
from utils import InputError


def sst2(sentence: str, label: int) -> Sample:
    return get_task("SST2").sample({"sentence": sentence, "label": label}, 0)


def copa(premise: str, choices: tuple[str, str], question: str, label: int) -> Sample:
    row = {"premise": premise, "question": question, "label": label}
    return get_task("Copa").sample({**row, "choice1": choices[0], "choice2": choices[1]}, 0)


def squad(title: str, context: str, question: str, answer: str) -> Sample:
    row = {"title": title, "context": context, "question": question, "answers": {"text": [answer]}}
    return get_task("SQuAD").sample(row, 0)


WRITTEN_OUT: list[tuple[str, Sample, list[Sample], str, list[str]]] = [
    (
        "SST2",
        sst2("the film is charming . ", 1),
        [sst2("quite ridiculous . ", 0), sst2(" clever and honest ", 1)],
        "quite ridiculous . It was terrible\n\nclever and honest It was great\n\n"
        "the film is charming . It was",
        [" terrible", " great"],
    ),
    (
        "Copa",
        copa("Vera heard a joke.", ("She laughed.", "I left the town."), "effect", 0),
        [
            copa("The hat was gone.", ("Tom took it.", "It was red."), "cause", 0),
            copa("It was late.", ("I was early.", "I went home."), "effect", 1),
        ],
        "The hat was gone because tom took it.\n\nIt was late so I went home.\n\n"
        "Vera heard a joke so",
        [" she laughed.", " I left the town."],
    ),
    (
        "SQuAD",
        squad("Hexley", "Hexley is a town.", " What is Hexley? ", "a town"),
        [squad("Quarn", "It is red.", "Which colour?", "red"), squad("A", "B.", "C?", "B")],
        "Title: Quarn\nContext: It is red.\nQuestion: Which colour?\nAnswer: red\n\n"
        "Title: A\nContext: B.\nQuestion: C?\nAnswer: B\n\n"
        "Title: Hexley\nContext: Hexley is a town.\nQuestion: What is Hexley?\nAnswer:",
        [" a town\n"],
    ),
]


@pytest.mark.parametrize(("task", "sample", "shown", "before", "options"), WRITTEN_OUT)
@pytest.mark.parametrize("start", ["</s>", ""])
def test_the_whole_text_and_the_scored_span(
    task: str, sample: Sample, shown: list[Sample], before: str, options: list[str], start: str
) -> None:
    tokenizer = TOKENIZERS["start" if start else "no start"]()
    encoder = Encoder(get_task(task), tokenizer, 1024, 10)
    candidates = sample.candidates or sample.correct
    example = encoder.options(sample, shown, candidates)
    assert [tokenizer.decode(option.tokens) for option in example.options] == [
        start + before + option for option in options
    ]
    spans = [option.tokens[option.targets.start :] for option in example.options]
    assert [tokenizer.decode(span) for span in spans] == options
    assert tokenizer.decode(encoder.prompt(sample, shown)) == start + before
    # A cut takes tokens on the left, after the first, and a generated text needs room.
    short = Encoder(get_task(task), tokenizer, 20, 10)
    cuts = short.options(sample, shown, candidates).options
    for option, cut in zip(example.options, cuts, strict=True):
        assert cut == EncodedOption((option.tokens[0], *option.tokens[-19:]), option.scored)
    whole = encoder.prompt(sample, shown)
    assert short.prompt(sample, shown) == (whole[0], *whole[-9:])


def test_the_correct_option() -> None:
    task, sample = get_task("SST2"), sst2("the film is charming . ", 1)
    encoder = Encoder(task, tiny_tokenizer(), 1024)
    example = encoder.options(sample)
    assert [example.correct, len(example.options)] == [1, 2]
    assert encoder.correct_option(sample) == EncodedExample((example.options[1],))
    (everything,) = encoder.correct_option(sample, only_option=False).options
    assert everything.tokens == example.options[1].tokens
    assert everything.targets == range(1, len(everything.tokens))


def test_content_free_prompts() -> None:
    tokenizer = tiny_tokenizer()
    shown = [sst2("quite ridiculous . ", 0)]

    def texts(task: str, sample: Sample, shown: Sequence[Sample] = ()) -> list[tuple[str, str]]:
        options = Encoder(get_task(task), tokenizer, 1024).options(sample, shown, content_free=True)
        return [
            (tokenizer.decode(o.tokens), tokenizer.decode(o.tokens[o.targets.start :]))
            for o in options.options
        ]

    assert texts("SST2", shown[0])[0] == ("</s>It was terrible", " terrible")
    assert texts("SST2", shown[0], shown)[1] == (
        "</s>quite ridiculous . It was terrible\n\nIt was great",
        " great",
    )
    (cb,) = draw("CB", 1, 0)[0]
    assert texts("CB", cb) == [("</s>" + word, word) for word in ("Yes", "No", "Maybe")]


def test_an_end_token_behind_every_text_is_left_out() -> None:
    """It would be scored in the option's place, and would end a prompt before its answer."""
    tokenizers = appending_tokenizer(), tiny_tokenizer()
    assert tokenizers[0].encode("Yes") == [*tokenizers[1].encode("Yes"), 2]
    for task in ("SST2", "Copa", "CB", "SQuAD"):
        one, other = (Encoder(get_task(task), tokenizer, 100, 8) for tokenizer in tokenizers)
        for sample, shown in zip(*draw(task, 3, 2), strict=True):
            assert one.prompt(sample, shown) == other.prompt(sample, shown)
            assert one.correct_option(sample) == other.correct_option(sample)
            assert one.options(sample, shown) == other.options(sample, shown)
            if task in ("SST2", "CB"):
                free = {"content_free": True}
                assert one.options(sample, **free) == other.options(sample, **free)


def test_nothing_stands_before_an_option_without_start_and_end_token() -> None:
    (cb,) = draw("CB", 1, 0)[0]
    encoder = Encoder(get_task("CB"), word_tokenizer(), 1024)
    assert encoder.options(cb).options
    with pytest.raises(InputError, match=r"neither a start token .* nor an end token .* --sfc"):
        encoder.options(cb, content_free=True)


def test_a_text_without_a_start_gets_one_where_nothing_precedes_the_option() -> None:
    encoder = Encoder(get_task("CB"), tokenizer_without_start(), 1024)
    (cb,) = draw("CB", 1, 0)[0]
    end = encoder.tokenizer.eos_token_id
    for option in encoder.options(cb, content_free=True).options:
        assert option.tokens[0] == end and len(option.targets) == len(option.tokens) - 1
    assert end not in encoder.options(cb).options[0].tokens
