"""Invented rows for the tasks about a passage: BoolQ, MultiRC, ReCoRD, SQuAD and DROP.

Each function takes a random generator (and the wanted label where there is one) and returns rows in
the Hub's schema, without the running numbers that the writer of the files adds.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from sample_words import (
    DAYS,
    FOODS,
    GOODS,
    HABITATS,
    JOBS,
    MONTHS,
    OBJECTS,
    PLACES,
    RIVERS,
    TEAMS,
    TOWNS,
    article,
    full_names,
    other,
    people,
    upper_first,
)

Row = dict[str, Any]


# --------------------------------------------------------------------------------------- BoolQ


def boolq_row(rng: random.Random, label: int) -> Row:
    """A passage about a town and a lower-case question without its mark; the answer is `label`."""
    town, goods, day, building = (rng.choice(words) for words in (TOWNS, GOODS, DAYS, PLACES))
    habitat, month = rng.choice(HABITATS), rng.choice(MONTHS)
    facts = [
        ("It is known for its {w}.", goods, GOODS, "is {t} known for its {w}"),
        ("The market is held on {w}.", day, DAYS, "is the market of {t} held on {w}"),
        (
            "Its oldest building is the {w}.",
            building,
            PLACES,
            "is the {w} the oldest building in {t}",
        ),
        ("Visitors come for the {w} around it.", habitat, HABITATS, "are there {w} around {t}"),
        ("There is a fair every {w}.", month, MONTHS, "is there a fair in {t} every {w}"),
    ]
    told = rng.sample(facts, 4)
    sentences = [sentence.format(w=word) for sentence, word, _, _ in told]
    passage = " ".join([f"{town} is a town with a long history.", *sentences])
    _, true_word, words, form = rng.choice(told)
    word = true_word if label else other(rng, words, true_word)
    question = form.format(t=town, w=word).lower()
    return {"question": question, "answer": bool(label), "passage": passage}


# ------------------------------------------------------------------------------------- MultiRC


def multirc_rows(rng: random.Random) -> list[Row]:
    """One paragraph with two questions, each with one right and one wrong answer, shuffled."""
    first, second = (person.name for person in people(rng, 2))
    day, month = rng.choice(DAYS), rng.choice(MONTHS)
    place, far_place = rng.sample(PLACES, 2)
    food, lost = rng.choice(FOODS), rng.choice(OBJECTS)
    paragraph = (
        f"On {article(day)} in {month}, {first} went to the {place}. There {first} bought {food} "
        f"for dinner. {second} lost {article(lost)} near the {far_place}."
    )
    questions = [
        (f"Where did {first} go?", f"To the {place}", f"To the {other(rng, PLACES, place)}"),
        (f"What did {first} buy?", upper_first(food), upper_first(other(rng, FOODS, food))),
        (f"Who lost the {lost}?", second, first),
        (f"Who went to the {place}?", first, second),
        (f"On which day did {first} buy {food}?", day, other(rng, DAYS, day)),
        (f"In which month did {first} go?", month, other(rng, MONTHS, month)),
        (f"What did {second} lose?", f"The {lost}", f"The {other(rng, OBJECTS, lost)}"),
    ]
    rows = []
    for number, (question, right, wrong) in enumerate(rng.sample(questions, 2)):
        answers = rng.sample([(right, 1), (wrong, 0)], 2)
        for place_in_list, (answer, label) in enumerate(answers):
            rows.append(
                {
                    "paragraph": paragraph,
                    "question": question,
                    "answer": answer,
                    "idx": {"question": number, "answer": place_in_list},
                    "label": label,
                }
            )
    return rows


# -------------------------------------------------------------------------------------- ReCoRD


def entity_spans(passage: str, entities: list[str]) -> dict[str, list[Any]]:
    """Every place in `passage` where an entity stands, in order, ends exclusive."""
    found: list[tuple[int, str]] = []
    for entity in entities:
        start = passage.find(entity)
        while start >= 0:
            found.append((start, entity))
            start = passage.find(entity, start + 1)
    found.sort()
    return {
        "text": [entity for _, entity in found],
        "start": [start for start, _ in found],
        "end": [start + len(entity) for start, entity in found],
    }


def record_row(rng: random.Random) -> Row:
    """A short news item with two highlights and a query whose placeholder is one of its names."""
    mayor, builder, critic = full_names(rng, 3)
    town, building, day = rng.choice(TOWNS), rng.choice(PLACES), rng.choice(DAYS)
    job = rng.choice(JOBS)
    money = rng.randrange(2, 10)
    sentences = [
        f"{mayor} opened the new {building} in {town} on {day}.",
        f"It was built by {builder} for {money} million crowns.",
        f"The {job} {critic} said that it was too expensive.",
    ]
    highlights = rng.sample(
        [
            f"The new {building} was opened on {day}",
            f"It cost {money} million crowns",
            f"Not everybody likes the new {building}",
        ],
        2,
    )
    passage = " ".join(sentences) + "".join(f"\n@highlight\n{line}" for line in highlights)
    query, answer = rng.choice(
        [
            (f"The new {building} was opened by @placeholder", mayor),
            (f"On {day} the {building} was opened by @placeholder", mayor),
            (f"The {building} was built by @placeholder", builder),
            (f"For {money} million crowns it was built by @placeholder", builder),
            (f"Too much money was spent, said the {job} @placeholder", critic),
            (f"The {building} that was opened on {day} stands in @placeholder", town),
        ]
    )
    entities = sorted([mayor, builder, critic, town])
    return {
        "passage": passage,
        "query": f"{query}.",
        "entities": entities,
        "entity_spans": entity_spans(passage, entities),
        "answers": [answer],
    }


# --------------------------------------------------------------------------------------- SQuAD


@dataclass(frozen=True)
class Fact:
    """A sentence with `{answer}` in it, a question that asks for it, and the answer."""

    sentence: str
    question: str
    answer: str


def town_facts(rng: random.Random, town: str) -> list[Fact]:
    """Facts about one town, in random order."""
    facts = [
        Fact(
            "It was founded in {answer}.",
            f"When was {town} founded?",
            str(rng.randrange(1100, 1900)),
        ),
        Fact(
            "The town lies on the river {answer}.",
            f"On which river does {town} lie?",
            rng.choice(RIVERS),
        ),
        Fact(
            "Its people make {answer}.",
            f"What do the people of {town} make?",
            rng.choice(GOODS),
        ),
        Fact("The mayor is {answer}.", f"Who is the mayor of {town}?", full_names(rng, 1)[0]),
        Fact(
            "Every summer the town holds a feast of {answer}.",
            f"What is the feast of {town} about?",
            rng.choice(FOODS),
        ),
        Fact(
            "Most visitors come to see the {answer}.",
            f"What do visitors of {town} come to see?",
            rng.choice(PLACES),
        ),
    ]
    return rng.sample(facts, len(facts))


def squad_row(rng: random.Random) -> Row:
    """A town in two to four sentences, a question about one of them, the answer and its place."""
    town = rng.choice(TOWNS)
    facts = town_facts(rng, town)[: rng.randrange(1, 4)]
    opening = f"{town} is a town in the {rng.choice(['north', 'south', 'east', 'west'])}."
    asked = rng.choice(facts)
    context = opening
    answer_start = 0
    for fact in facts:
        if fact is asked:
            answer_start = len(context) + 1 + fact.sentence.index("{answer}")
        context += " " + fact.sentence.format(answer=fact.answer)
    return {
        "title": town,
        "context": context,
        "question": asked.question,
        "answers": {"text": [asked.answer], "answer_start": [answer_start]},
    }


# ---------------------------------------------------------------------------------------- DROP


def drop_row(rng: random.Random) -> Row:
    """A game in three sentences and a question whose answer is a number or a team."""
    home, away = rng.sample(TEAMS, 2)
    town, day = rng.choice(TOWNS), rng.choice(DAYS)
    first, second, third = rng.sample(range(3, 30), 3)
    if first + third == second:
        third += 1
    winner = home if first + third > second else away
    passage = (
        f"The {home} met the {away} in {town} on {day}. In the first half the {home} scored "
        f"{first} points and the {away} scored {second} points. In the second half only the "
        f"{home} scored, with {third} points."
    )
    question, answer, kind = rng.choice(
        [
            (f"How many points did the {home} score in the first half?", str(first), "number"),
            (f"How many points did the {away} score in the first half?", str(second), "number"),
            (f"How many points did the {home} score in the second half?", str(third), "number"),
            (f"How many points did the {home} score in all?", str(first + third), "number"),
            ("Which team scored in the second half?", home, "span"),
            ("Which team won the game?", winner, "span"),
            ("In which town was the game?", town, "span"),
            (f"On which day did the {home} meet the {away}?", day, "span"),
        ]
    )
    return {
        "passage": passage,
        "question": question,
        "answers_spans": {"spans": [answer], "types": [kind]},
    }
