"""Scoring beside the usual way, one option at a time: examples per second, seconds, memory.

    python benchmarks/scoring.py

OPT-125m's shape with random weights and invented texts of the tasks' lengths, float32, in one run.
"usual" reads the whole text again for every option and makes logits for the whole vocabulary at
every position. "bare" is a forward pass of the same tokens without any logits.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT)]

import torch
from step import SHAPES, added_memory, make_model, median_seconds
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from language_model import objectives, packing, scoring
from language_model.encoding import EncodedExample, EncodedOption
from language_model.generation import GenerationSettings, generate

VOCABULARY = 50272
NEWLINE = 50118  # OPT's


def draw(generator: torch.Generator, count: int) -> tuple[int, ...]:
    """Random tokens."""
    return tuple(torch.randint(4, VOCABULARY - 200, (count,), generator=generator).tolist())


def make_examples(
    count: int, prompt: tuple[int, int], options: int, own: int, before: int = 0
) -> list[EncodedExample]:
    """Examples with prompts of a random length, ``options`` of ``own`` tokens each.

    All begin with the same ``before`` tokens, the demonstrations.
    """
    generator = torch.Generator().manual_seed(0)
    shared = (2, *draw(generator, before))
    examples = []
    for _ in range(count):
        length = int(torch.randint(*prompt, (), generator=generator))
        text = shared + draw(generator, length)
        chosen = (EncodedOption(text + draw(generator, own), own) for _ in range(options))
        examples.append(EncodedExample(tuple(chosen)))
    return examples


@torch.no_grad()
def usual_scores(model: nn.Module, examples: Sequence[EncodedExample]) -> list[list[float]]:
    """Mean log-probability of every option: one whole text, all logits, after the other."""
    scores = []
    for example in examples:
        scores.append([])
        for option in example.options:
            logits = model(torch.tensor([option.tokens]), use_cache=False).logits[0].float()
            log_probabilities = logits[:-1].log_softmax(dim=-1)
            targets = torch.tensor(option.tokens[1:])
            of_tokens = log_probabilities.gather(1, targets.unsqueeze(1)).squeeze(1)
            scores[-1].append(of_tokens[-option.scored :].mean().item())
    return scores


def shared_scores(
    model: nn.Module, examples: Sequence[EncodedExample], batch_size: int
) -> list[list[float]]:
    """The same by scoring.py."""
    sums = scoring.score_options(model, examples, batch_size, None)
    return [[total / count for total, count in options] for options in sums]


@torch.no_grad()
def bare_forward(model: nn.Module, tokens: Tensor, mask: Tensor) -> None:
    """A forward pass of padded tokens, without logits."""
    model.get_decoder()(input_ids=tokens, attention_mask=mask, use_cache=False)


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Rows padded on the left, and their mask."""
    length = max(map(len, rows))
    tokens = [[1] * (length - len(row)) + list(row) for row in rows]
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(tokens), torch.tensor(mask)


def measure_icl(model: nn.Module, arguments: argparse.Namespace) -> dict[str, Any]:
    """Examples per second behind 32 shared demonstrations of SST2's length."""
    examples = make_examples(arguments.examples, (20, 31), 2, 1, before=32 * 25)
    few = examples[: arguments.usual_examples]
    usual = median_seconds(lambda: usual_scores(model, few), arguments.repeats, "cpu") / len(few)
    this = median_seconds(
        lambda: shared_scores(model, examples, arguments.batch), arguments.repeats, "cpu"
    ) / len(examples)
    expected, found = usual_scores(model, few), shared_scores(model, examples, arguments.batch)
    difference = largest_difference(expected, found[: len(few)])
    return {
        "what": "ICL, 32 shared demonstrations",
        "usual_examples_per_second": 1 / usual,
        "this_examples_per_second": 1 / this,
        "times": usual / this,
        "largest_difference": difference,
        "same_predictions": same_predictions(expected, found),
    }


def largest_difference(first: list[list[float]], second: list[list[float]]) -> float:
    """Largest difference of two lists of options' scores."""
    pairs = zip(first, second, strict=True)
    return max(abs(a - b) for x, y in pairs for a, b in zip(x, y, strict=True))


def same_predictions(first: list[list[float]], second: list[list[float]]) -> bool:
    """Whether the best options are the same, as far as the first list goes."""
    return all(
        max(range(len(a)), key=a.__getitem__) == max(range(len(b)), key=b.__getitem__)
        for a, b in zip(first, second, strict=False)
    )


TRAINING = {
    # what is trained: prompt lengths, options, tokens of an option, loss
    "SST2": ((20, 31), 2, 1, objectives.classification_loss),
    "CB": ((60, 91), 3, 1, objectives.classification_loss),
    "Copa, correct option": ((10, 16), 1, 7, objectives.language_model_loss),
    "Copa, both options": ((10, 16), 2, 7, objectives.classification_loss),
    "ReCoRD, correct option": ((200, 261), 1, 30, objectives.language_model_loss),
    "ReCoRD, 10 options": ((200, 261), 10, 30, objectives.classification_loss),
}


def measure_training(model: nn.Module, task: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a training loss on 16 examples, beside a bare forward of their distinct tokens."""
    prompt, options, own, option_loss = TRAINING[task]
    examples = make_examples(16, prompt, options, own)
    batch = packing.collate(examples)
    # Distinct tokens: the prompts, where options have one token; else all that the batch holds.
    rows = [packing.pack(example)[0].tokens for example in examples]
    whole = [option.tokens for example in examples for option in example.options]

    @torch.no_grad()
    def loss() -> None:
        option_loss(model, batch)

    @torch.no_grad()
    def usual() -> None:
        tokens, mask = padded(whole)
        logits = model(tokens, attention_mask=mask, use_cache=False).logits
        logits[:, :-1].log_softmax(dim=-1)

    tokens = padded(rows)
    # In turns, so that a machine that slows down slows both.
    turns = [
        [median_seconds(f, 1, "cpu") for f in (lambda: bare_forward(model, *tokens), loss)]
        for _ in range(arguments.repeats)
    ]
    bare, this = (statistics.median(seconds) for seconds in zip(*turns, strict=True))
    row = {"what": f"training loss, {task}, 16 examples", "bare": bare, "this": this}
    row["over_bare"] = statistics.median(this / its for its, this in turns)
    if len(whole) * max(map(len, whole)) < 10_000:  # the logits of more take gigabytes
        row["usual"] = median_seconds(usual, arguments.repeats, "cpu")
        row["times"] = row["usual"] / this
    return row


def measure_generation(
    model: nn.Module, arguments: argparse.Namespace, new_tokens: int
) -> dict[str, Any]:
    """Seconds for 32 answers to prompts of SQuAD's length, in batches and one at a time."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(120, 181, (32,), generator=generator).tolist()
    prompts = [(2, *draw(generator, length)) for length in lengths]
    settings = GenerationSettings(max_new_tokens=new_tokens)

    tokenizer = number_tokenizer()

    def texts(batch_size: int) -> list[str]:
        return generate(model, tokenizer, prompts, settings, batch_size, None)

    def usual_text(prompt: tuple[int, ...]) -> str:
        tokens = torch.tensor([prompt])
        rows = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=[NEWLINE, tokenizer.eos_token_id],
            pad_token_id=tokenizer.eos_token_id,
        )
        text = tokenizer.decode(rows[0, len(prompt) :], skip_special_tokens=True)
        return text.split("\n")[0].strip()

    # One run is enough for what takes longest; 32 answers are a warm-up for each other.
    start = time.perf_counter()
    expected = [usual_text(prompt) for prompt in prompts]
    usual = time.perf_counter() - start
    this = median_seconds(lambda: texts(32), arguments.repeats, "cpu")
    return {
        "what": f"generation, 32 answers of {new_tokens} tokens",
        "usual": usual,
        "this": this,
        "times": usual / this,
        "same_text": texts(32) == expected,
    }


def number_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose texts are the tokens' numbers, with a newline."""
    # transformers' search for a stop string looks each token up behind "abcdef".
    own = {NEWLINE: "\n", 3: "abcdef"}
    vocabulary = {own.get(number, str(number)): number for number in range(VOCABULARY)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="abcdef"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="2")


def measure_memory(model: nn.Module) -> dict[str, Any]:
    """Peak memory of a loss on 16 x 512 tokens, beside the forward without any logits."""
    examples = make_examples(16, (511, 512), 2, 1)
    batch = packing.collate(examples)
    rows = [packing.pack(example)[0].tokens for example in examples]

    @torch.no_grad()
    def loss() -> None:
        objectives.classification_loss(model, batch)

    bare = added_memory(lambda: bare_forward(model, *padded(rows)), "cpu")
    this = added_memory(loss, "cpu")
    logits = 16 * 512 * VOCABULARY * 4 / 2**20
    return {
        "what": "peak memory of a loss, 16 x 512 tokens",
        "bare_mib": bare,
        "this_mib": this,
        "over_bare": this / bare if this and bare else None,
        "all_logits_mib": logits,
    }


def main() -> None:
    """Measure, print a line for each goal, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SHAPES, default="opt-125m", help="shape of the OPT")
    parser.add_argument("--examples", type=int, default=64, help="ICL examples that are timed")
    parser.add_argument("--usual_examples", type=int, default=3, help="ICL examples, usual way")
    parser.add_argument("--batch", type=int, default=16, help="examples in a batch")
    parser.add_argument("--repeats", type=int, default=5, help="runs behind every median")
    parser.add_argument("--only", nargs="+", help="parts of the names of what to measure")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    arguments = parser.parse_args()
    model = make_model(arguments.model, torch.float32, "cpu")
    measurements: dict[str, Callable[[], dict[str, Any]]] = {
        "icl": lambda: measure_icl(model, arguments),
        **{task: lambda task=task: measure_training(model, task, arguments) for task in TRAINING},
        **{
            f"generation {n}": lambda n=n: measure_generation(model, arguments, n) for n in (20, 50)
        },
        "memory": lambda: measure_memory(model),
    }
    print(f"{arguments.model}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    rows = []
    for name, measurement in measurements.items():
        if arguments.only and not any(part in name for part in arguments.only):
            continue
        rows.append(measurement())
        values = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in rows[-1].items()}
        print(values.pop("what") + ": " + ", ".join(f"{k} {v}" for k, v in values.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
