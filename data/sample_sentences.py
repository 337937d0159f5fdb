"""Invented rows for the tasks about one or two sentences: SST2, RTE, CB, WSC, WiC and COPA.

Each function takes a random generator and the wanted label and returns one row in the Hub's schema,
without its `idx`, which the writer of the files adds.
"""

from __future__ import annotations

import random
from typing import Any

from sample_words import (
    COLOURS,
    DAYS,
    FOODS,
    GAMES,
    JOBS,
    OBJECTS,
    PLACES,
    SKILLS,
    SUBJECTS,
    TOWNS,
    CausalPair,
    article,
    other,
    people,
    upper_first,
)

Row = dict[str, Any]

# ---------------------------------------------------------------------------------------- SST2

FILMS = (
    "adventure cartoon comedy documentary drama fable fantasy film movie musical mystery parody "
    "portrait romance saga satire sequel story thriller western"
).split()
PARTS = (
    "acting camera cast chase dialogue direction ending humor lead music opening pace plot script "
    "setting soundtrack"
).split()
GOOD_WORDS = (
    "brilliant charming clever delightful elegant exciting fresh funny gripping hilarious honest "
    "inspired lively lovely moving playful radiant rich sharp stunning superb tender thoughtful "
    "touching vivid warm wise witty wonderful"
).split()
HARSH_WORDS = (
    "awful boring clumsy dreadful foolish hateful horrible lifeless nasty painful ridiculous "
    "shoddy stupid ugly unbearable"
).split()
MILD_WORDS = (
    "bland dated dull flat forced hollow messy minor muddled predictable routine shallow slight "
    "slow stale thin tired uneven"
).split()
ADVERBS = "deeply fairly often quite rather really simply truly utterly very".split()
GOOD_TAILS = (
    "that never loses its way",
    "with a heart of gold",
    "that earns every laugh",
    "that stays with you for days",
    "full of small surprises",
    "that rewards a patient viewer",
)
BAD_TAILS = (
    "that never finds its way",
    "with nothing to say",
    "that wastes its cast",
    "that you forget at once",
    "full of empty noise",
    "that tests the patience of the viewer",
)
NEUTRAL_TAILS = (
    "about a family by the sea",
    "set in a small town",
    "about two brothers and a boat",
    "from a young director",
    "based on an old book",
    "about a teacher and her class",
)


def review_words(rng: random.Random, label: int) -> list[str]:
    """Two different adjectives of one sentiment; a bad review is harsh or mild throughout."""
    pool = GOOD_WORDS if label else rng.choice([HARSH_WORDS, MILD_WORDS])
    return rng.sample(pool, 2)


def sst2_row(rng: random.Random, label: int) -> Row:
    """A film review in lower case, 0 negative and 1 positive, with the Hub's trailing space."""
    first, second = review_words(rng, label)
    contrary = review_words(rng, 1 - label)[0]
    film, adverb = rng.choice(FILMS), rng.choice(ADVERBS)
    part, second_part = rng.sample(PARTS, 2)
    tail = rng.choice(GOOD_TAILS if label else BAD_TAILS)
    neutral = rng.choice(NEUTRAL_TAILS)
    sentence = rng.choice(
        [
            f"{article(first)} and {second} {film}",
            f"{article(first)} {film} {neutral}",
            f"{article(adverb)} {first} {film} {tail}",
            f"{article(film)} {neutral} , {first} and {second}",
            f"the {part} is {adverb} {first} and the {second_part} is {second} .",
            f"this {film} is {adverb} {first} .",
            f"the {film} {neutral} is {first} from start to finish .",
            f"{first} , {second} and {adverb} {rng.choice(review_words(rng, label))}",
            f"for all its {contrary} {part} , this is {article(first)} and {second} {film} .",
            f"the {part} may be {contrary} , but the {film} is {first} and {second} .",
            f"{article(film)} {tail} : {first} , {adverb} {second} .",
            f"what {article(first)} {film} , and what {article(second)} {part} !",
        ]
    )
    return {"sentence": f"{sentence} ", "label": label}


# ----------------------------------------------------------------------------------------- RTE


def transfer(rng: random.Random) -> tuple[str, str, str]:
    """An event between `{a}` and `{b}`: as told, turned round truly, turned round falsely."""
    thing = f"{rng.choice(COLOURS)} {rng.choice(OBJECTS)}"
    skill, game = rng.choice(SKILLS), rng.choice(GAMES)
    return rng.choice(
        [
            (
                f"{{a}} sold the {thing} to {{b}}",
                f"{{b}} bought the {thing} from {{a}}",
                f"{{a}} bought the {thing} from {{b}}",
            ),
            (
                f"{{a}} lent the {thing} to {{b}}",
                f"{{b}} borrowed the {thing} from {{a}}",
                f"{{a}} borrowed the {thing} from {{b}}",
            ),
            (
                f"{{a}} taught {{b}} to {skill}",
                f"{{b}} learned to {skill} from {{a}}",
                f"{{a}} learned to {skill} from {{b}}",
            ),
            (
                f"{{a}} beat {{b}} at {game}",
                f"{{b}} lost to {{a}} at {game}",
                f"{{a}} lost to {{b}} at {game}",
            ),
            (
                f"{{a}} sent the {thing} to {{b}}",
                f"{{b}} got the {thing} from {{a}}",
                f"{{a}} got the {thing} from {{b}}",
            ),
        ]
    )


def rte_row(rng: random.Random, label: int) -> Row:
    """A premise with four facts and a hypothesis that follows (0) or does not (1)."""
    a, b = (person.name for person in people(rng, 2))
    job, town, day = rng.choice(JOBS), rng.choice(TOWNS), rng.choice(DAYS)
    told, true, false = (form.format(a=a, b=b) for form in transfer(rng))
    premise = rng.choice(
        [
            f"On {day}, {told}. {a} is {article(job)} and lives in {town}.",
            f"{a} is {article(job)} and lives in {town}. On {day}, {told}.",
        ]
    )
    if label == 1:
        job, town, day = other(rng, JOBS, job), other(rng, TOWNS, town), other(rng, DAYS, day)
    hypothesis = rng.choice(
        [
            f"{a} is {article(job)}.",
            f"{a} lives in {town}.",
            f"It happened on {day}.",
            f"{false if label else true}.",
        ]
    )
    return {"premise": premise, "hypothesis": hypothesis, "label": label}


# ------------------------------------------------------------------------------------------ CB

COMMITMENTS = (
    (
        "{x} knew that {clause}.",
        "{x} was glad that {clause}.",
        "{x} saw that {clause}.",
        "{x} remembered that {clause}.",
    ),
    (
        "{x} only pretended that {clause}.",
        "{x} was wrong to think that {clause}.",
        "It was a lie of {x} that {clause}.",
        "{x} falsely claimed that {clause}.",
    ),
    (
        "{x} hoped that {clause}.",
        "{x} asked whether {clause}.",
        "{x} was not sure that {clause}.",
        "{x} had heard a rumour that {clause}.",
    ),
)
OPENINGS = (
    "The rain had stopped.",
    "It was late in the evening.",
    "The streets were empty.",
    "Nobody spoke for a while.",
    "The clock struck nine.",
    "The soup was getting cold.",
)


def happening(rng: random.Random, name: str) -> str:
    """A clause about `name` in the past perfect, without a full stop."""
    thing, town = f"{rng.choice(COLOURS)} {rng.choice(OBJECTS)}", rng.choice(TOWNS)
    return rng.choice(
        [
            f"{name} had sold the {thing}",
            f"{name} had broken the {thing}",
            f"{name} had found the {thing}",
            f"{name} had moved to {town}",
            f"{name} had become {article(rng.choice(JOBS))}",
            f"{name} had eaten the {rng.choice(FOODS)}",
            f"{name} had won at {rng.choice(GAMES)}",
        ]
    )


def cb_row(rng: random.Random, label: int) -> Row:
    """A clause under a verb that commits to it (0), denies it (1) or leaves it open (2)."""
    speaker, subject = (person.name for person in people(rng, 2))
    clause = happening(rng, subject)
    sentence = rng.choice(COMMITMENTS[label]).format(x=speaker, clause=clause)
    premise = f"{rng.choice(OPENINGS)} {sentence}"
    return {"premise": premise, "hypothesis": clause, "label": label}


# ----------------------------------------------------------------------------------------- WSC

# A sentence about {a} and {b}, with the pronoun {p}, and which of the two the pronoun stands for.
PERSON_SCHEMAS = (
    ("{a} thanked {b} because {p} had helped with the {thing} .", "b"),
    ("{a} thanked {b} because {p} was grateful for the {thing} .", "a"),
    ("{a} paid {b} because {p} had repaired the {thing} .", "b"),
    ("{a} paid {b} because {p} wanted to keep the {thing} .", "a"),
    ("{a} asked {b} for help because {p} knew a lot about {subject} .", "b"),
    ("{a} asked {b} for help because {p} knew nothing about {subject} .", "a"),
    ("{a} gave {b} the {thing} because {p} no longer needed it .", "a"),
    ("{a} gave {b} the {thing} because {p} had begged for it .", "b"),
    ("{a} could not hear {b} because {p} spoke too softly about {subject} .", "b"),
    ("{a} could not hear {b} because {p} had a {thing} over both ears .", "a"),
    ("{a} lost to {b} at {game} because {p} was the weaker player .", "a"),
    ("{a} lost to {b} at {game} because {p} was the stronger player .", "b"),
)
THING_SCHEMAS = (
    ("The {a} did not fit into the {b} because {p} was too big .", "a"),
    ("The {a} did not fit into the {b} because {p} was too small .", "b"),
    ("The {a} fell through the {b} because {p} was made of thin paper .", "b"),
    ("The {a} fell through the {b} because {p} was made of heavy stone .", "a"),
)


def wsc_row(rng: random.Random, label: int) -> Row:
    """A sentence with an ambiguous pronoun and one candidate: 1 when the pronoun means it."""
    if rng.random() < 0.8:
        first, second = people(rng, 2, same_gender=True)
        schema, answer = rng.choice(PERSON_SCHEMAS)
        a, b, pronoun, prefix = first.name, second.name, first.subject, ""
    else:
        a, b = (f"{rng.choice(COLOURS)} {thing}" for thing in rng.sample(OBJECTS, 2))
        schema, answer = rng.choice(THING_SCHEMAS)
        pronoun, prefix = "it", "the "
    text = schema.format(
        a=a,
        b=b,
        p=pronoun,
        thing=rng.choice(OBJECTS),
        subject=rng.choice(SUBJECTS),
        game=rng.choice(GAMES),
    )
    meant, not_meant = (a, b) if answer == "a" else (b, a)
    candidate = prefix + (meant if label else not_meant)
    start = text.lower().index(candidate.lower())
    return {
        "text": text,
        "span1_index": len(text[:start].split()),
        "span2_index": text.split().index(pronoun),
        "span1_text": text[start : start + len(candidate)],
        "span2_text": pronoun,
        "label": label,
    }


# ----------------------------------------------------------------------------------------- WiC

# Two senses of each word; each sense has sentences with room for a name, a place and a colour.
SENSES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "bank": (
        ("{n} put the money in the bank.", "The bank lent {n} money for the {p}."),
        ("{n} sat on the bank of the river.", "The grass on the river bank by the {p} was wet."),
    ),
    "bat": (
        ("{n} hit the ball with a {c} bat.", "The player {n} swung the bat at the ball."),
        ("A {c} bat flew out of the cave.", "{n} saw a bat hang in the cave by the {p}."),
    ),
    "ring": (
        ("{n} wore a gold ring with a {c} stone.", "The ring on the finger of {n} was gold."),
        ("{n} heard the telephone ring in the {p}.", "The bells of the {p} ring for {n}."),
    ),
    "match": (
        ("{n} lit the candle with a match.", "The match burned the {c} paper."),
        ("{n} won the tennis match at the {p}.", "The team of {n} lost the match in {c} shirts."),
    ),
    "spring": (
        ("Flowers bloom in spring near the {p}.", "{n} was born in spring, in April."),
        ("The metal spring in the {c} chair broke.", "{n} bent the steel spring."),
    ),
    "letter": (
        ("{n} posted a letter at the {p}.", "The letter in the {c} envelope was for {n}."),
        ("{n} forgot the last letter of the word.", "The word began with a {c} letter."),
    ),
    "wave": (
        ("A wave of the sea wet the feet of {n}.", "The {c} boat rose on a high sea wave."),
        ("{n} gave a wave of the hand.", "With a wave of the hand {n} left the {p}."),
    ),
    "nail": (
        ("{n} hit the nail with a hammer.", "The {c} picture hung on a steel nail."),
        ("{n} cut the nail of one finger.", "The nail on the finger of {n} was painted {c}."),
    ),
    "trunk": (
        ("{n} leaned on the trunk of the tree.", "The tree by the {p} had a {c} trunk."),
        ("The elephant lifted its trunk near {n}.", "The {c} elephant drank with its trunk."),
    ),
    "seal": (
        ("A {c} seal swam in the sea.", "{n} fed fish to the seal at the {p}."),
        ("{n} broke the wax seal of the envelope.", "The envelope had a {c} seal of wax."),
    ),
    "chest": (
        ("{n} had a pain in the chest.", "The doctor at the {p} heard the heart in the chest."),
        ("{n} kept gold in a wooden chest.", "The pirates hid the {c} chest of gold."),
    ),
    "bow": (
        ("{n} shot the arrow with a bow.", "The hunter by the {p} carried a bow and a {c} arrow."),
        ("{n} made a deep bow to the king.", "The singer at the {p} took a bow before the king."),
    ),
    "pitch": (
        ("The singer {n} found the right pitch.", "The pitch of the song in the {p} was high."),
        ("The football pitch was {c} and wet.", "{n} ran across the football pitch."),
    ),
    "row": (
        ("{n} sat in the first row of seats.", "The front row of {c} seats was empty."),
        ("{n} can row a boat to the {p}.", "They row the {c} boat with two oars."),
    ),
    "crane": (
        ("The crane at the {p} lifted the steel.", "{n} drove the crane that lifted a {c} car."),
        ("A {c} crane caught a fish with its beak.", "{n} fed the crane and its feathers shone."),
    ),
    "cold": (
        ("{n} caught a cold and sneezed.", "The nurse at the {p} had a cold and a cough."),
        ("The winter wind was cold by the {p}.", "{n} shivered in the cold {c} snow."),
    ),
}


def word_span(sentence: str, word: str) -> tuple[int, int]:
    """Where `word` stands as a word of its own in `sentence`: start and one past the end."""
    start = f" {sentence} ".replace(".", " ").replace(",", " ").index(f" {word} ")
    return start, start + len(word)


def wic_row(rng: random.Random, label: int) -> Row:
    """Two sentences with one word, used in the same sense (1) or in two senses (0)."""
    word = rng.choice(sorted(SENSES))
    first_sense = rng.randrange(2)
    second_sense = first_sense if label else 1 - first_sense
    first_form = rng.randrange(2)
    second_form = 1 - first_form if label else rng.randrange(2)
    sentences = [
        SENSES[word][sense][form].format(
            n=people(rng, 1)[0].name, p=rng.choice(PLACES), c=rng.choice(COLOURS)
        )
        for sense, form in ((first_sense, first_form), (second_sense, second_form))
    ]
    (start1, end1), (start2, end2) = (word_span(sentence, word) for sentence in sentences)
    return {
        "word": word,
        "sentence1": sentences[0],
        "sentence2": sentences[1],
        "start1": start1,
        "start2": start2,
        "end1": end1,
        "end2": end2,
        "label": label,
    }


# ---------------------------------------------------------------------------------------- COPA

# Of a person (who takes a name or a pronoun) and of a thing (always spelled out).
PERSON_PAIRS = (
    CausalPair("forgot the umbrella", "got wet in the rain"),
    CausalPair("ate too much cake", "had a stomach ache"),
    CausalPair("studied every evening", "passed the exam"),
    CausalPair("missed the train", "came late to work"),
    CausalPair("stayed up all night", "fell asleep at the desk"),
    CausalPair("lost the house key", "climbed in through the window"),
    CausalPair("trained for a year", "won the race"),
    CausalPair("walked into a wall", "had a bump on the head"),
    CausalPair("heard a funny joke", "laughed out loud"),
    CausalPair("saw a huge spider", "screamed in fear"),
    CausalPair("touched the hot stove", "burned a finger"),
    CausalPair("skipped lunch", "was very hungry at dinner"),
    CausalPair("left the wallet at home", "could not pay the bill"),
    CausalPair("drove far too fast", "got a fine from the police"),
    CausalPair("planted many seeds", "picked fresh carrots in the garden"),
    CausalPair("caught a bad cold", "sneezed all day"),
    CausalPair("wore thin gloves in the snow", "had freezing hands"),
    CausalPair("practised the piano daily", "played the song without a mistake"),
    CausalPair("stepped on a nail", "limped to the doctor"),
    CausalPair("told a lie to a friend", "felt guilty and said sorry"),
    CausalPair("saved money for years", "bought a small house"),
    CausalPair("read a sad book", "wiped away a tear"),
    CausalPair("drank salty water", "was terribly thirsty"),
    CausalPair("sat in the sun for hours", "had red and sore skin"),
    CausalPair("broke the neighbour's window", "paid for new glass"),
    CausalPair("forgot to set the alarm", "slept until noon"),
)
THING_PAIRS = (
    CausalPair("the {t} fell down the stairs", "the {t} broke into pieces"),
    CausalPair("the {t} was left in the rain", "the {t} was wet and rusty"),
    CausalPair("somebody painted the {t}", "the {t} had a new colour"),
    CausalPair("somebody polished the {t}", "the {t} shone in the light"),
    CausalPair("thieves came and took the {t}", "the {t} was gone"),
    CausalPair("the {t} stood next to the fire", "the {t} was warm"),
    CausalPair("nobody used the {t} for years", "the {t} was covered in dust"),
    CausalPair("the {t} was too heavy to lift", "the {t} stayed where it was"),
)


def copa_row(rng: random.Random, label: int) -> Row:
    """A premise with its true cause or effect and another one that has nothing to do with it."""
    question = rng.choice(["cause", "effect"])
    about_person = rng.random() < 0.7
    right, wrong = rng.sample(PERSON_PAIRS if about_person else THING_PAIRS, 2)
    premise = right.effect if question == "cause" else right.cause
    choices = [getattr(pair, question) for pair in (right, wrong)]
    if about_person:
        person = people(rng, 1)[0]
        premise = f"{person.name} {premise}"
        choices = [f"{person.subject} {choice}" for choice in choices]
    else:
        thing = f"{rng.choice(COLOURS)} {rng.choice(OBJECTS)}"
        premise, *choices = (text.format(t=thing) for text in (premise, *choices))
    if label == 1:
        choices.reverse()
    return {
        "premise": f"{upper_first(premise)}.",
        "choice1": f"{upper_first(choices[0])}.",
        "choice2": f"{upper_first(choices[1])}.",
        "question": question,
        "label": label,
    }
