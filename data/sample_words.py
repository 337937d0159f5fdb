"""Word lists of the invented world that the bundled samples and the tiny model's corpus share.

Everything here was made up for this project. A short list is a feature: a model of under a million
parameters has to meet each word often enough to learn it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple

WOMEN = (
    "Anna Clara Edith Flora Greta Hilda Ingrid Julia Karin Lydia Marta Nora Olga Paula Rosa Sofia "
    "Thea Ursula Vera Wilma"
).split()
MEN = (
    "Adam Bruno Carl David Emil Frank Georg Henry Ivan Jonas Kurt Leo Martin Niels Oscar Peter "
    "Ralph Simon Tom Victor"
).split()
SURNAMES = (
    "Ash Bell Crane Dale Field Grove Hart Holm Kent Lake Marsh North Pike Reed Stone Vale Ward "
    "Webb Wood York"
).split()
TOWNS = (
    "Arlen Belmor Corvik Dunfell Elstow Farrow Gilby Hexley Ildon Jarrow Kelso Lunden Morvik "
    "Nesby Orford Pellin Quarn Redmor Selby Torvik Ulford Varen Wexley Yarrow"
).split()
RIVERS = "Alder Brant Cole Derry Elm Fenn Garry Irwin Lorn Mere Ouse Tarn".split()
JOBS = (
    "baker carpenter doctor driver farmer fisher gardener judge lawyer miner nurse painter pilot "
    "plumber poet sailor singer soldier tailor teacher"
).split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = (
    "January February March April May June July August September October November December"
).split()
OBJECTS = (
    "basket bell bicycle boat book bottle camera carpet chair clock coat drum flute guitar hammer "
    "hat key ladder lamp map mirror piano pillow table tent"
).split()
COLOURS = "black blue brown green grey red white yellow".split()
FOODS = (
    "apples beans bread butter carrots cheese cherries eggs fish grapes honey lemons milk nuts "
    "onions pears plums potatoes rice salt soup sugar tea tomatoes"
).split()
PLACES = (
    "bakery beach bridge castle church factory farm forest garden harbour hospital library market "
    "mill museum park school station theatre tower"
).split()
GOODS = "bricks candles clocks drums furniture glass gloves hats paper pottery rope shoes".split()
ANIMALS = "bear cat cow deer dog duck fox goat goose hare horse mouse owl pig sheep wolf".split()
HABITATS = "caves fields forests hills lakes marshes meadows mountains swamps valleys".split()
TEAMS = (
    "Badgers Bears Eagles Falcons Foxes Hawks Lions Otters Panthers Rams Ravens Sharks Stags "
    "Tigers Wolves Wrens"
).split()
GAMES = "cards chess darts golf rugby squash tennis".split()
SKILLS = "cook dance draw drive fish juggle paint read sail sing ski sew swim weave".split()
SUBJECTS = "art birds engines history law maps medicine music plants ships stars stones".split()


class Person(NamedTuple):
    """A first name with the pronouns that go with it."""

    name: str
    subject: str
    possessive: str


@dataclass(frozen=True)
class CausalPair:
    """What happened first and what came of it; both complete a sentence about the same subject."""

    cause: str
    effect: str


def article(noun: str) -> str:
    """`noun` with `a` or `an` before it."""
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def upper_first(text: str) -> str:
    """`text` with its first letter a capital and the rest as it is."""
    return text[:1].upper() + text[1:]


def other(rng: random.Random, words: list[str], *taken: str) -> str:
    """A word of `words` that is none of `taken`."""
    return rng.choice([word for word in words if word not in taken])


def people(rng: random.Random, count: int, same_gender: bool = False) -> list[Person]:
    """`count` different people, of one gender or of both."""
    women = [Person(name, "she", "her") for name in WOMEN]
    men = [Person(name, "he", "his") for name in MEN]
    pool = rng.choice([women, men]) if same_gender else women + men
    return rng.sample(pool, count)


def full_names(rng: random.Random, count: int) -> list[str]:
    """`count` names with surnames, all first names and all surnames different."""
    firsts = rng.sample(WOMEN + MEN, count)
    return [
        f"{first} {last}" for first, last in zip(firsts, rng.sample(SURNAMES, count), strict=True)
    ]
