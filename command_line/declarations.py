"""How an argument is declared: its default, help, bounds, choices and where it has an effect."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

# A learning rate or a perturbation scale that is measured.
AUTO = "auto"
# Larger whole numbers do not fit into the integers of torch and numpy.
LARGEST = 2**31 - 1
TRUE, FALSE = ("true", "yes", "y", "t", "1"), ("false", "no", "n", "f", "0")
# Values that switch off what is off anyway.
OFF = (None, False, 0, "", "0", "0.0", "no", "none", "None", "False", "false")
# What an argument decides: the trained weights, the reported numbers alone, or neither.
TRAINING, RESULT, NOTHING = "training", "result", "nothing"


@dataclass(frozen=True)
class Effect:
    """A condition under which an argument has an effect.

    Attributes:
        otherwise: why there is no effect where it is not met; ``{task}`` is the task's name.
        holds: whether it is met; takes the values of a command line.
        inside: a wider condition, which has to be met as well.
        refused: ignoring the argument would give another result than the user asked for, so the
            run is refused.
    """

    otherwise: str
    holds: Callable[[Any], object]
    inside: Effect | None = None
    refused: bool = False

    def unmet(self, values: Any) -> Effect | None:
        """Return the widest condition that is not met, None if all are."""
        outer = self.inside.unmet(values) if self.inside else None
        return outer or (None if self.holds(values) else self)


OF_THE_GROUP = Effect("", bool)


@dataclass(frozen=True)
class Declaration:
    """An argument.

    Attributes:
        aliases: other names, with their dashes.
        at_least, above, at_most, below: bounds of a number.
        fraction: below 1 it is a fraction of the run's steps, otherwise a whole number of them.
        words: texts that may stand in place of a number.
        choices: all values there are.
        many: several words are a list of values.
        effect: where it has one; None: in every run; ``OF_THE_GROUP``: the group's ``_effect``.
        decides: ``TRAINING``, ``RESULT`` or ``NOTHING``; empty: the group's ``_decides``.
        name, kind, default: those of the dataclass field, filled in by ``declared``.
    """

    aliases: tuple[str, ...] = ()
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    fraction: bool = False
    words: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    many: bool = False
    effect: Effect | None = OF_THE_GROUP
    decides: str = ""
    name: str = ""
    kind: type = str
    default: Any = None

    def read(self, words: Sequence[str]) -> Any:
        """Return the value of the words that follow the argument's name.

        Raises:
            ValueError: says what the value must be.
        """
        if not words and self.kind is bool:
            return True
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
            return self._choose(word)
        return self._number(word) if self.kind in (int, float) else word

    def _choose(self, word: str) -> str:
        found = next((choice for choice in self.choices if choice == word.lower()), None)
        if found is None:
            raise ValueError(f"choose from {', '.join(self.choices)}")
        return found

    def _number(self, word: str) -> float:
        try:
            value = self.kind(word)
        except ValueError:
            kind = "a whole number" if self.kind is int else "a number"
            instead = "".join(f" or {each}" for each in self.words)
            raise ValueError(f"must be {kind}{instead}") from None
        if violation := self.violation(value):
            raise ValueError(violation)
        return value

    def violation(self, value: float) -> str | None:
        """Return what a number must be, None if it is within the bounds."""
        if not math.isfinite(value):
            return "must be a finite number"
        if self.at_least is not None and value < self.at_least:
            return f"must be at least {self.at_least}"
        if self.above is not None and value <= self.above:
            return f"must be larger than {self.above}"
        most = LARGEST if self.at_most is None and self.kind is int else self.at_most
        if most is not None and value > most and self.below is None:
            return f"must be at most {most}"
        if self.below is not None and value >= self.below:
            return f"must be below {self.below}"
        if self.fraction and value > 1 and value != int(value):
            return "must be a whole number of steps, or below 1 a fraction of the run"
        return None


def argument(default: Any, *aliases: str, **declared: Any) -> Any:
    """Return a field of a group of arguments; ``declared`` are fields of ``Declaration``.

    The text below the field is its help (``help.help_texts``).
    """
    declaration = Declaration(aliases=aliases, **declared)
    return dataclasses.field(default=default, metadata={"declared": declaration})


def declared(group: type) -> Iterator[Declaration]:
    """Yield the arguments of a group, in order."""
    kinds = get_type_hints(group)
    for field in dataclasses.fields(group):
        parts = [part for part in get_args(kinds[field.name]) if part is not type(None)]
        if get_origin(kinds[field.name]) is Literal:
            parts = [kinds[field.name]]
        kind = parts[0] if parts else kinds[field.name]
        found: Declaration = field.metadata["declared"]
        choices = get_args(kind) if get_origin(kind) is Literal else found.choices
        yield dataclasses.replace(
            found,
            name=field.name,
            kind=str if get_origin(kind) is Literal else kind,
            choices=choices,
            default=field.default,
            effect=group._effect if found.effect is OF_THE_GROUP else found.effect,
            decides=found.decides or group._decides,
        )
