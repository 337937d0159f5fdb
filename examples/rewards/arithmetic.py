"""A reward: short answers to sums, the nearer the better.

python run.py --reward examples/rewards/arithmetic.py:nearness --apply_chat_template \
    --system_prompt "Answer with a number." --train_file examples/rewards/arithmetic.jsonl …
"""

from __future__ import annotations

import re
from typing import Any


def nearness(prompts: list[str], texts: list[str], rows: list[dict[str, Any]]) -> list[float]:
    """Return 1 for the right number, less for one further off, and 0 without a number.

    Each word beside the number costs a hundredth: the answer is to be short.
    """
    rewards = []
    for text, row in zip(texts, rows, strict=True):
        number = re.search(r"-?\d+", text)
        if number is None:
            rewards.append(0.0)
            continue
        distance = abs(int(number[0]) - int(row["answer"]))
        rewards.append(1 / (1 + distance) - 0.01 * (len(text.split()) - 1))
    return rewards
