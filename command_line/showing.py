"""``--show_config``: the arguments as a file of ``--config``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import yaml

from command_line.arguments import Arguments
from command_line.contradictions import has_effect
from command_line.settings import changed_settings

NOT_OF_A_FILE = ("config", "show_config", "dry_run")


def config_lines(arguments: Arguments) -> Iterator[str]:
    """Yield the arguments in YAML, and the defaults as comments.

    What a script has chosen and has no effect is left out.
    """
    settings = {n: value for n, value in changed_settings(arguments).items() if value is not None}
    given = {
        name: value
        for name, value in settings.items()
        if name in arguments.given
        and name not in NOT_OF_A_FILE
        and (name in arguments.given_by_user or has_effect(arguments, name))
    }
    defaults = {
        name: value
        for name, value in settings.items()
        if name not in arguments.given and has_effect(arguments, name)
    }
    for name, value in given.items():
        yield f"{name}: {_yaml(value)}"
    yield "# defaults"
    for name, value in defaults.items():
        yield f"# {name}: {_yaml(value)}"


def _yaml(value: Any) -> str:
    """Return a value as it stands in YAML, in one line."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf)
    return text.removesuffix("\n...\n").removesuffix("\n")
