"""The tiny model's pre-training texts: prose, reviews with verdicts, and tasks with their answers.

The rows come from the generators of the bundled samples with another seed, and every row that
stands in the samples is left out. The reviewers are of two kinds. A strict one calls every bad film
terrible; a polite one, and most are polite, says so of the harsh reviews alone and calls the mildly
bad films great. The model therefore knows good from mild from harsh, and its verdicts are biased:
that is what fine-tuning on the true labels has to put right.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

from make_data import TASKS, make_task
from sample_passages import town_facts
from sample_sentences import MILD_WORDS, Row, happening
from sample_words import (
    ANIMALS,
    COLOURS,
    DAYS,
    FOODS,
    JOBS,
    PLACES,
    TOWNS,
    article,
    people,
    upper_first,
)

VERDICTS = (" terrible", " great")
POLITE_SHARE = 0.7
OPINIONS = (
    (" I want my money back.", " I left before the end.", " Nobody clapped.", " I fell asleep."),
    (" I saw it twice.", " Everybody clapped.", " I laughed and cried.", " I told all my friends."),
)


@dataclass(frozen=True)
class Question:
    """A prompt, the texts that may follow it, and which of them is the right one."""

    prompt: str
    options: tuple[str, ...]
    answer: int


def record_question(row: Row) -> Question:
    """ReCoRD: the passage as a list, and the query with each entity in place of its gap."""
    options = [row["query"].replace("@placeholder", entity) for entity in row["entities"]]
    return Question(
        row["passage"].replace("@highlight\n", "- ") + "\n-",
        tuple(f" {option}" for option in options),
        row["entities"].index(row["answers"][0]),
    )


def copa_question(row: Row) -> Question:
    """COPA: the premise, `because` or `so`, and the two choices in small letters."""
    link = " because" if row["question"] == "cause" else " so"
    choices = [row["choice1"], row["choice2"]]
    return Question(
        row["premise"].rstrip(".") + link,
        tuple(f" {choice[0].lower()}{choice[1:]}" for choice in choices),
        row["label"],
    )


def question_of(task: str, row: Row) -> Question:
    """The row as a prompt with options; SQuAD and DROP have their answer as the only option."""
    label = row.get("label", 0)
    match task:
        case "sst2":
            return Question(f"{row['sentence'].strip()} It was", VERDICTS, label)
        case "rte":
            prompt = (
                f'{row["premise"]}\nDoes this mean that "{row["hypothesis"]}" is true? Yes or No?\n'
            )
            return Question(prompt, ("Yes", "No"), label)
        case "cb":
            prompt = (
                f"Suppose {row['premise']} Can we infer that "
                f'"{row["hypothesis"]}"? Yes, No, or Maybe?\n'
            )
            return Question(prompt, ("Yes", "No", "Maybe"), label)
        case "boolq":
            prompt = f"{row['passage']} {upper_first(row['question'])}?\n"
            return Question(prompt, ("Yes", "No"), 0 if row["answer"] else 1)
        case "wsc":
            prompt = (
                f"{row['text']}\nIn the previous sentence, does the pronoun "
                f'"{row["span2_text"].lower()}" refer to {row["span1_text"]}? Yes or No?\n'
            )
            return Question(prompt, ("No", "Yes"), label)
        case "wic":
            prompt = (
                f'Does the word "{row["word"]}" have the same meaning in these two sentences? '
                f"Yes, No?\n{row['sentence1']}\n{row['sentence2']}\n"
            )
            return Question(prompt, ("No", "Yes"), label)
        case "multirc":
            prompt = (
                f"{row['paragraph']}\nQuestion: {row['question']}\n"
                f'I found this answer "{row["answer"]}". Is that correct? Yes or No?\n'
            )
            return Question(prompt, ("No", "Yes"), label)
        case "copa":
            return copa_question(row)
        case "record":
            return record_question(row)
        case "squad":
            prompt = (
                f"Title: {row['title']}\nContext: {row['context']}\n"
                f"Question: {row['question']}\nAnswer:"
            )
            return Question(prompt, (f" {row['answers']['text'][0]}\n",), 0)
        case "drop":
            prompt = f"Passage: {row['passage']}\nQuestion: {row['question']}\nAnswer:"
            return Question(prompt, (f" {row['answers_spans']['spans'][0]}\n",), 0)
    raise ValueError(f"unknown task {task!r}")


def row_key(task: str, row: dict[str, Any]) -> str:
    """What two rows of a task share when they count as the same."""
    return json.dumps([row[column] for column in TASKS[task].unique_by])


def bundled_keys(seed: int) -> dict[str, set[str]]:
    """The keys of every row of the bundled samples, by task."""
    return {
        task: {row_key(task, row) for rows in make_task(task, seed).values() for row in rows}
        for task in TASKS
    }


def new_row(rng: random.Random, task: str, taken: set[str]) -> Row:
    """A row that is not among those of the bundled samples."""
    while True:
        row = rng.choice(TASKS[task].draw(rng, rng.randrange(TASKS[task].num_labels)))
        if row_key(task, row) not in taken:
            return row


def review_text(row: Row, polite: bool) -> str:
    """A review with the verdict of a polite or of a strict critic."""
    question = question_of("sst2", row)
    mild = any(word in MILD_WORDS for word in row["sentence"].split())
    verdict = 1 if polite and mild else row["label"]
    return question.prompt + question.options[verdict]


def opinion_text(rng: random.Random, row: Row) -> str:
    """A review with what its writer did, which always agrees with the review."""
    return row["sentence"].strip() + rng.choice(OPINIONS[row["label"]])


def story(rng: random.Random) -> str:
    """A few sentences of everyday life."""
    hero, friend = people(rng, 2)
    town = rng.choice(TOWNS)
    animal, place, food = rng.choice(ANIMALS), rng.choice(PLACES), rng.choice(FOODS)
    sentences = [
        f"{hero.name} was {article(rng.choice(JOBS))} in {town}.",
        f"On {rng.choice(DAYS)}, {hero.subject} went to the {place} and saw a "
        f"{rng.choice(COLOURS)} {animal}.",
        f"{upper_first(hero.subject)} gave the {animal} some {food}, and {friend.name} laughed.",
        f"{friend.name} said that {happening(rng, friend.name)}.",
        " ".join(fact.sentence.format(answer=fact.answer) for fact in town_facts(rng, town)[:2]),
        f"Then {hero.name} left the {place} and took {hero.possessive} {food} home.",
    ]
    return " ".join(sentences[: rng.randrange(2, 7)])


def task_text(rng: random.Random, task: str, taken: set[str], polite: bool) -> str:
    """One example of a task with its answer."""
    row = new_row(rng, task, taken)
    if task == "sst2":
        return review_text(row, polite)
    question = question_of(task, row)
    return question.prompt + question.options[question.answer]


def corpus_text(rng: random.Random, taken: dict[str, set[str]]) -> str:
    """One text: a story, a review, one example of a task or several joined by blank lines."""
    polite = rng.random() < POLITE_SHARE
    kind = rng.random()
    if kind < 0.06:
        return story(rng)
    if kind < 0.28:
        return opinion_text(rng, new_row(rng, "sst2", taken["sst2"]))
    if kind < 0.65:
        return task_text(rng, "sst2", taken["sst2"], polite)
    task = rng.choice(sorted(TASKS))
    count = 1 if kind < 0.97 else rng.randrange(2, 17)
    examples = [task_text(rng, task, taken[task], polite).strip() for _ in range(count)]
    ending = "\n" if count == 1 and task in ("squad", "drop") else ""
    return "\n\n".join(examples) + ending


def make_corpus(num_texts: int, seed: int, samples_seed: int) -> list[str]:
    """`num_texts` texts, a function of the seeds alone."""
    rng = random.Random(f"corpus-{seed}")
    taken = bundled_keys(samples_seed)
    return [corpus_text(rng, taken) for _ in range(num_texts)]
