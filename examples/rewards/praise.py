"""A reward: texts that speak well of a film.

python run.py --reward examples/rewards/praise.py:praise \
    --train_file examples/rewards/praise.jsonl …
"""

from __future__ import annotations

from typing import Any

GOOD = set(
    [
        "great",
        "warm",
        "funny",
        "lovely",
        "moving",
        "charming",
        "clever",
        "bright",
        "tender",
        "rich",
        "joy",
        "delight",
    ]
)
BAD = set(
    [
        "terrible",
        "dull",
        "boring",
        "lifeless",
        "shallow",
        "routine",
        "weak",
        "minor",
        "unbearable",
        "dated",
        "empty",
    ]
)


def praise(prompts: list[str], texts: list[str], rows: list[dict[str, Any]]) -> list[float]:
    """Return for each text the part of its words that praise, minus the part that blame."""
    rewards = []
    for text in texts:
        words = [word.strip(".,:;!?") for word in text.lower().split()]
        found = sum((word in GOOD) - (word in BAD) for word in words)
        rewards.append(found / max(1, len(words)))
    return rewards
