"""A reward with the signature of TRL's: short answers to sums, the nearer the better.

python run.py --reward examples/rewards/arithmetic.py:nearness --apply_chat_template \
    --system_prompt "Answer with a number." --train_file examples/rewards/arithmetic.jsonl …
"""

from __future__ import annotations

import re
from typing import Any


def nearness(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """Return 1 for the right number, less for one further off, and 0 without a number.

    Each word beside the number costs a hundredth: the answer is to be short.
    """
    rewards = []
    for text, right in zip(completions, answer, strict=True):
        number = re.search(r"-?\d+", text)
        if number is None:
            rewards.append(0.0)
            continue
        distance = abs(int(number[0]) - int(right))
        rewards.append(1 / (1 + distance) - 0.01 * (len(text.split()) - 1))
    return rewards
