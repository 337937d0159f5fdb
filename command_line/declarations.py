"""How an argument is declared: its default, help, bounds, choices and where it has an effect."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

# A learning rate or a perturbation scale that is measured.
AUTO = "auto"
# Larger whole numbers do not fit into the integers of torch and numpy.
LARGEST = 2**31 - 1
# Bytes of a file's name: file systems allow 255, and suffixes come on top.
LONGEST_NAME = 240
TRUE, FALSE = ("true", "yes", "y", "t", "1"), ("false", "no", "n", "f", "0")
# Values that switch off what is off anyway.
OFF = (None, False, 0, "", "0", "0.0", "no", "none", "None", "False", "false")
# What an argument decides: the trained weights, the reported numbers alone, or neither.
TRAINING, RESULT, NOTHING = "training", "result", "nothing"


@dataclass(frozen=True)
class Effect:
    """A condition, inside a wider one, under which an argument has an effect."""

    otherwise: str  # why there is none where the condition is not met
    holds: Callable[[Any], object]  # takes the values of a command line
    inside: Effect | None = None
    refused: bool = False  # without the argument the result would be another
    way_out: str = "leave it out"  # where it is refused

    def unmet(self, values: Any) -> Effect | None:
        """Return the widest condition that is not met, None if all are."""
        outer = self.inside.unmet(values) if self.inside else None
        return outer or (None if self.holds(values) else self)


OF_THE_GROUP = Effect("", bool)


@dataclass(frozen=True)
class Declaration:
    """An argument; ``declared`` fills in the field's name, kind and default."""

    aliases: tuple[str, ...] = ()  # with their dashes
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    fraction: bool = False  # below 1 a fraction of the run's steps, else a whole number of them
    words: tuple[str, ...] = ()  # what may stand in place of a number
    choices: tuple[str, ...] = ()
    many: bool = False  # several words are a list
    path: bool = False  # becomes the name of a file or a folder
    effect: Effect | None = OF_THE_GROUP  # None: it has one in every run
    decides: str = ""  # TRAINING, RESULT or NOTHING; empty: the group's
    name: str = ""
    kind: type = str
    default: Any = None

    @property
    def listed_choices(self) -> str:
        """The choices as text; where one has a comma, with another separator."""
        has_comma = any("," in each for each in self.choices)
        return (" | " if has_comma else ", ").join(self.choices)

    def read(self, words: Sequence[str]) -> Any:
        """Return the value of the words that follow the argument's name.

        Raises:
            ValueError: says what the value must be.
        """
        if any("\ud800" <= character <= "\udfff" for character in "".join(words)):
            raise ValueError("not UTF-8; rename it")
        if not words and self.kind is bool:
            return True
        if self.kind is object:  # transformers reads it; conditions look at it
            word = words[-1] if words else "true"
            return {"true": True, "false": False}.get(word.lower(), word)
        if self.many and len(words) > 1:
            return list(words)
        if len(words) != 1:
            raise ValueError("give one value")
        (word,) = words
        if word in self.words:
            return word
        if self.kind is bool:
            if word.lower() not in TRUE + FALSE:
                raise ValueError("must be True or False")
            return word.lower() in TRUE
        if self.choices:
            if word.lower() not in self.choices:
                raise ValueError(f"choose from {self.listed_choices}")
            return word.lower()
        if self.path:
            if any(len(part) > LONGEST_NAME for part in word.encode().split(b"/")):
                raise ValueError(f"a name of more than {LONGEST_NAME} bytes")
            return word or None  # an empty variable names no file
        return self._number(word) if self.kind in (int, float) else word

    def _number(self, word: str) -> float:
        try:
            value = self.kind(word)
        except ValueError:
            kind = "a whole number" if self.kind is int else "a number"
            instead = "".join(f" or {each}" for each in self.words)
            raise ValueError(f"must be {kind}{instead}") from None
        if self.kind is float and not math.isfinite(value):
            raise ValueError("must be a finite number")
        below = LARGEST + 1 if self.kind is int and self.below is None else self.below
        for words, bound, holds in (
            ("at least", self.at_least, operator.ge),
            ("larger than", self.above, operator.gt),
            ("at most", self.at_most, operator.le),
            ("below", below, operator.lt),
        ):
            if bound is not None and not holds(value, bound):
                raise ValueError(f"must be {words} {bound}")
        if self.fraction and value > 1 and value != int(value):
            raise ValueError("must be a whole number of steps, or below 1 a fraction of the run")
        return value


def group(word: str, effect: Effect | None, decides: str) -> Callable[[type], type]:
    """Make a class a group of arguments, with what they have unless they say something else."""

    def made(kind: type) -> type:
        kind._word, kind._effect, kind._decides = word, effect, decides
        return dataclass(kind)

    return made


def argument(default: Any, *aliases: str, **declared: Any) -> Any:
    """Return a field of a group of arguments; ``declared`` are fields of ``Declaration``.

    The text below the field is its help (``help.help_texts``).
    """
    declaration = Declaration(aliases=aliases, **declared)
    return dataclasses.field(default=default, metadata={"declared": declaration})


def declared(group: type) -> Iterator[Declaration]:
    """Yield the arguments of a group, in order."""
    hints = get_type_hints(group)
    for field in dataclasses.fields(group):
        found: Declaration = field.metadata["declared"]
        yield dataclasses.replace(
            found,
            name=field.name,
            kind=next(iter(get_args(hints[field.name])), hints[field.name]),
            default=field.default,
            effect=group._effect if found.effect is OF_THE_GROUP else found.effect,
            decides=found.decides or group._decides,
        )
