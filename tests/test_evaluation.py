"""Evaluation: what samples share is read once, batches shrink to fit, processes share the work.

Scores are compared with test_scoring.py's oracle, one option at a time, and the tokens that go
through the model are counted.
"""

from __future__ import annotations

import itertools
import json
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from running import command, finish, log_of, start, training
from test_scoring import (
    WINDOWED,
    Oracle,
    assert_equal_predictions,
    assert_equal_sums,
    log_probabilities,
    model_of,
    samples_of,
)
from tiny_models import FAMILIES, OTHER_FAMILIES, newline_writing_model, tiny_model, tiny_tokenizer
from transformers import PreTrainedModel

from language_model import scoring
from language_model.batches import run_in_batches
from language_model.encoding import EncodedExample, EncodedOption, Encoder
from language_model.generation import GenerationSettings, generate
from language_model.prediction import predict
from language_model.shared_tokens import SHORTEST_PREFIX
from tasks import Sample, get_task

SUM_TOLERANCE = 1e-4
SHOWN = {"SST2": 6, "CB": 6, "Copa": 6, "ReCoRD": 3, "SQuAD": 3, "DROP": 3}
CHOICES = [
    ("SST2", None),
    ("SST2", "icl_sfc"),
    ("CB", "sfc"),
    ("Copa", None),
    ("Copa", "icl_sfc"),
    ("ReCoRD", None),
    ("ReCoRD", "sfc"),
]


def draw_shared(task: str, number: int) -> tuple[list[Sample], list[list[Sample]]]:
    """Return validation samples of different answers, and the same demonstrations for each."""
    train, validation = samples_of(task)
    return validation[:number], [train[: SHOWN[task]]] * number


@contextmanager
def forward_shapes(model: PreTrainedModel) -> Iterator[list[tuple[int, int]]]:
    """Collect (rows, tokens in a row) of every forward pass."""
    shapes: list[tuple[int, int]] = []

    def note(_: Any, __: Any, arguments: dict[str, Any]) -> None:
        shapes.append(tuple(arguments["input_ids"].shape))

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield shapes
    finally:
        hook.remove()


def count(shapes: Sequence[tuple[int, int]]) -> int:
    return sum(rows * length for rows, length in shapes)


def shared_length(texts: Sequence[Sequence[int]]) -> int:
    columns = zip(*texts, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))


def shared_tokens(examples: Sequence[Sequence[tuple[list[int], int]]]) -> tuple[int, int]:
    """Return the length of what all options can share, and what is left, each token once.

    An example is its options' tokens, and how many at the end are scored. The token before those
    predicts the first, and the last of all is never read.
    """
    options = [option for example in examples for option in example]
    prefix = shared_length([tokens[:-1] for tokens, _ in options])
    prefix = min(prefix, *(len(tokens) - scored - 1 for tokens, scored in options))
    rest = 0
    for example in examples:
        inner = shared_length([tokens[:-1] for tokens, _ in example])
        rest += inner - prefix + sum(len(tokens) - 1 - inner for tokens, _ in example)
    return prefix, rest


# -------------------------------------------------------------------- scores behind a shared prefix


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("task", "calibration"), CHOICES)
def test_shared_demonstrations_are_read_once(
    family: str, task: str, calibration: str | None
) -> None:
    samples, shown = draw_shared(task, 8)
    model, setting = model_of(family), (get_task(task), tiny_tokenizer(), 1024)
    oracle, encoder = Oracle(model, *setting), Encoder(*setting)
    expected = oracle.predict(samples, shown, calibration)
    texts = [[oracle.tokens(s, shown[0], c) for c in s.candidates] for s in samples]
    prefix, rest = shared_tokens(texts)
    assert prefix > 5 * SHORTEST_PREFIX
    sums = [
        [(log_probabilities(model, *text).sum().item(), text[1]) for text in example]
        for example in texts
    ]
    for batch_size in (1, 3, 8):
        with forward_shapes(model) as shapes:
            encoded = [encoder.options(*pair) for pair in zip(samples, shown, strict=True)]
            found = scoring.score_options(model, encoded, batch_size, "")
        assert_equal_sums(found, sums)
        assert shapes[0] == (1, prefix)
        assert count(shapes) == prefix + rest
        assert len(shapes) == 1 + -(-8 // batch_size)
        predictions = predict(model, encoder, samples, shown, batch_size, calibration)
        tolerance = SUM_TOLERANCE if calibration else 1e-5
        assert_equal_predictions(predictions, expected, tolerance)


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_different_demonstrations_are_padded(family: str) -> None:
    samples, shown = draw_shared("SST2", 4)
    train = samples_of("SST2")[0]
    shown = [train[6 * index : 6 * index + 6] for index in range(4)]
    model, setting = model_of(family), (get_task("SST2"), tiny_tokenizer(), 1024)
    expected = Oracle(model, *setting).predict(samples, shown)
    with forward_shapes(model) as shapes:
        found = predict(model, Encoder(*setting), samples, shown, 3)
    assert_equal_predictions(found, expected)
    assert [rows for rows, _ in shapes] == [3, 1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("task", ["SST2", "Copa"])
def test_a_cut_that_takes_the_shared_tokens_away(family: str, task: str) -> None:
    samples, shown = draw_shared(task, 6)
    model, setting = model_of(family), (get_task(task), tiny_tokenizer(), 50)
    oracle = Oracle(model, *setting)
    texts = [[oracle.tokens(s, shown[0], c) for c in s.candidates] for s in samples]
    assert shared_tokens(texts)[0] < SHORTEST_PREFIX
    with forward_shapes(model) as shapes:
        found = predict(model, Encoder(*setting), samples, shown, 3)
    assert_equal_predictions(found, oracle.predict(samples, shown))
    assert [rows for rows, _ in shapes] == [3, 3]


PREFIX = (2, *range(100, 129))
BEHIND_THE_PREFIX = {
    # Only the last tokens differ: the token that predicts them must not be in the prefix.
    "last token": [[((*PREFIX, 200), 1)], [((*PREFIX, 201), 1)], [((*PREFIX, 202), 1)]],
    "directly behind": [
        [((*PREFIX, 200, 9), 2), ((*PREFIX, 201, 9, 10), 3)],
        [((*PREFIX, 202), 1), ((*PREFIX, 203, 11), 2)],
    ],
    "scored and shared": [[((*PREFIX, 200), 6)], [((*PREFIX, 201, 12), 2)]],
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", BEHIND_THE_PREFIX.values(), ids=BEHIND_THE_PREFIX)
def test_tokens_scored_behind_the_prefix(
    family: str, case: list[list[tuple[tuple[int, ...], int]]]
) -> None:
    model = model_of(family)
    prefix, rest = shared_tokens(case)
    examples = [EncodedExample(tuple(EncodedOption(*o) for o in options)) for options in case]
    with torch.no_grad():
        expected = [
            [(log_probabilities(model, *option).sum().item(), option[1]) for option in options]
            for options in case
        ]
    for batch_size in (1, 3):
        with forward_shapes(model) as shapes:
            assert_equal_sums(scoring.score_options(model, examples, batch_size, ""), expected)
        assert shapes[0] == (1, prefix) and count(shapes) == prefix + rest


@pytest.mark.parametrize(
    ("family", "overrides"), [*WINDOWED.items(), *((family, {}) for family in OTHER_FAMILIES)]
)
@pytest.mark.parametrize("task", ["SST2", "Copa"])
def test_families_that_cannot_share_are_right(
    family: str, overrides: dict[str, Any], task: str
) -> None:
    samples, shown = draw_shared(task, 4)
    model, setting = tiny_model(family, **overrides), (get_task(task), tiny_tokenizer(), 1024)
    with forward_shapes(model) as shapes:
        found = predict(model, Encoder(*setting), samples, shown, 3)
    assert_equal_predictions(found, Oracle(model, *setting).predict(samples, shown))
    assert [rows for rows, _ in shapes] == [6, 2]  # two options an example


@pytest.mark.parametrize("calibration", ["sfc", "icl_sfc"])
def test_equal_content_free_prompts_are_scored_once(calibration: str) -> None:
    samples, shown = draw_shared("SST2", 8)
    assert len({sample.correct[0] for sample in samples}) == 2
    model, setting = model_of("opt"), (get_task("SST2"), tiny_tokenizer(), 1024)
    with forward_shapes(model) as without:
        predict(model, Encoder(*setting), samples, shown, 3)
    with forward_shapes(model) as shapes:
        predict(model, Encoder(*setting), samples, shown, 3, calibration)
    before = shown[0] if calibration == "icl_sfc" else []
    tokens, _ = Oracle(model, *setting).tokens(samples[0], before, 1, content_free=True)
    assert shapes == [*without, (1, len(tokens) - 1)]


# ------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("task", ["SQuAD", "DROP"])
def test_generation_behind_shared_demonstrations(
    family: str, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = newline_writing_model(family), tiny_tokenizer()
    samples, shown = draw_shared(task, 6)
    encoder = Encoder(get_task(task), tokenizer, 1024, 8)
    prompts = [encoder.prompt(*pair) for pair in zip(samples, shown, strict=True)]
    assert len({len(prompt) for prompt in prompts}) > 2
    prefix = shared_length(prompts)
    settings = GenerationSettings(max_new_tokens=8)
    with monkeypatch.context() as patched, forward_shapes(model) as alone:
        patched.setattr("language_model.shared_tokens.SHORTEST_PREFIX", 10**9)
        expected = generate(model, tokenizer, prompts, settings, 1, "")
    assert [length for _, length in alone if length > 1] == sorted(map(len, prompts), reverse=True)
    # The random Gemma 2 writes one text behind every SQuAD prompt; the others tell them apart.
    assert len(set(expected)) > (0 if (family, task) == ("gemma2", "SQuAD") else 1)
    assert len(alone) < 6 * 8  # a newline stops a text
    for batch_size in (1, 4):
        with forward_shapes(model) as shapes:
            found = predict(model, encoder, samples, shown, batch_size, generation=settings)
        assert [prediction.answer for prediction in found] == expected
        assert not any("\n" in text for text in expected)
        longest = sorted(map(len, prompts), reverse=True)[::batch_size]
        read = [length for _, length in shapes if length > 1]
        assert read == [prefix, *(length - prefix for length in longest)]
    for other in (
        GenerationSettings(max_new_tokens=4, num_beams=2),
        GenerationSettings(max_new_tokens=4, sampling=True, temperature=0.7),
    ):
        texts = generate(model, tokenizer, prompts, other, 4, "")
        assert len(texts) == 6 and not any("\n" in text for text in texts)


@pytest.mark.parametrize("family", WINDOWED)
def test_generated_tokens_count_for_a_sliding_window(family: str) -> None:
    tokenizer = tiny_tokenizer()
    encoder = Encoder(get_task("SQuAD"), tokenizer, 1024, 12)
    prompts = [encoder.prompt(*pair) for pair in zip(*draw_shared("SQuAD", 6), strict=True)]
    window = {"sliding_window": max(map(len, prompts))}
    model = tiny_model(family, **{**WINDOWED[family], **window})
    settings = GenerationSettings(max_new_tokens=12)
    expected = [generate(model, tokenizer, [p], settings, 1, "")[0] for p in prompts]
    assert generate(model, tokenizer, prompts, settings, 4, "") == expected


# ------------------------------------------------------------------------------- lack of memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        torch.OutOfMemoryError("a device of its own words"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        MemoryError(),
    ],
    ids=["cuda", "other device", "cpu", "python"],
)
@pytest.mark.parametrize(("limit", "sizes"), [(4, [5, 2]), (3, [5, 2]), (1, [5, 2, 1])])
def test_a_batch_that_does_not_fit_is_halved(
    error: Exception, limit: int, sizes: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    lengths, tried, done = [3, 9, 1, 7, 5, 8, 2, 4], [], []

    def work(indices: list[int]) -> None:
        tried.append(len(indices))
        if len(indices) > limit:
            raise error
        done.extend(indices)

    run_in_batches(work, 8, lengths.__getitem__, 5, "SST2")
    assert done == sorted(range(8), key=lengths.__getitem__, reverse=True)
    assert list(dict.fromkeys(tried)) == sizes  # and never a larger one again
    said = [f"SST2: {size} examples at a time, for lack of memory" for size in sizes[1:]]
    assert [record.message for record in caplog.records] == said


def test_what_a_smaller_batch_does_not_help_is_raised() -> None:
    def fail_with(error: Exception) -> Callable[[list[int]], None]:
        def work(indices: list[int]) -> None:
            tried.append(len(indices))
            raise error

        return work

    tried: list[int] = []
    with pytest.raises(RuntimeError, match="size mismatch"):
        run_in_batches(fail_with(RuntimeError("size mismatch")), 8, abs, 4, "")
    assert tried == [4]
    tried.clear()
    with pytest.raises(torch.OutOfMemoryError):
        run_in_batches(fail_with(torch.OutOfMemoryError("full")), 8, abs, 4, "")
    assert tried == [4, 2, 1]


@pytest.mark.parametrize("share", [True, False])
def test_scores_after_lack_of_memory(share: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, shown = draw_shared("Copa", 7)
    model, setting = model_of("llama"), (get_task("Copa"), tiny_tokenizer(), 1024)
    read, failed = scoring.token_log_probabilities, []

    def read_two(model: Any, batch: dict[str, Any], cache: Any = None) -> torch.Tensor:
        values = read(model, batch, cache)
        examples = len(batch["option_examples"].unique())
        if examples > 2:
            failed.append(examples)
            raise torch.OutOfMemoryError("full")
        return values

    monkeypatch.setattr(scoring, "token_log_probabilities", read_two)
    if not share:
        monkeypatch.setattr("language_model.shared_tokens.SHORTEST_PREFIX", 10**9)
    found = predict(model, Encoder(*setting), samples, shown, 7)
    assert failed == [7, 3]
    assert_equal_predictions(found, Oracle(model, *setting).predict(samples, shown))


# --------------------------------------------------------------------------------- two processes


# One launch for several runs: loading the libraries takes longer than they do.
DRIVER = """
import json, os, sys
import run, trainer
train = trainer.ObjectiveTrainer.train
def train_and_note(self, **arguments):
    train(self, **arguments)
    with open(f"rank{os.environ['RANK']}.json", "w") as file:
        json.dump(self.state.log_history, file)
trainer.ObjectiveTrainer.train = train_and_note
for line in json.loads(sys.argv[1]):
    if code := run.main(line):
        sys.exit(code)
"""


def evaluations(folder: Path) -> list[list[str]]:
    """Command lines; 7 examples are an odd number for two processes."""
    return [
        command(
            task,
            num_eval=7,
            num_train=4,
            train_set_seed=0,
            per_device_eval_batch_size=3,
            max_new_tokens=6 if task == "SQuAD" else None,
            result_file=folder / f"{task}.json",
            predictions_file=folder / f"{task}.jsonl",
        )
        for task in ("SST2", "SQuAD")
    ]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    regular = training(
        folder,
        trainer="regular",
        hessian_smooth_type=None,
        max_steps=2,
        save_steps=2,
        per_device_train_batch_size=2,
        result_file=folder / "regular.json",
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = folder / "driver.py"
    driver.write_text(DRIVER)
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port))
    lines = json.dumps([*evaluations(folder), regular])
    process = start([lines], folder, *launcher, script=driver)
    out, errors = process.communicate(timeout=150)
    assert process.returncode == 0, errors
    (folder / "printed.txt").write_text(out)
    return folder


@pytest.mark.parametrize("number", [0, 1], ids=["SST2", "SQuAD"])
def test_two_processes_evaluate_as_one(two_processes: Path, tmp_path: Path, number: int) -> None:
    task = ("SST2", "SQuAD")[number]
    one = finish(evaluations(tmp_path)[number])
    two = json.loads((two_processes / f"{task}.json").read_text())
    assert two["metric"] == one["metric"]
    rows = [
        [json.loads(line) for line in (folder / f"{task}.jsonl").read_text().splitlines()]
        for folder in (tmp_path, two_processes)
    ]
    assert len({str(row["scores"] or row["prediction"]) for row in rows[0]}) > 2
    for alone, together in zip(*rows, strict=True):
        assert together.pop("scores") == pytest.approx(alone.pop("scores"), abs=1e-5)
        assert together == alone
    assert len({row["id"] for row in rows[0]}) == 7


def test_two_processes_write_once(two_processes: Path) -> None:
    files = {path.name for path in two_processes.glob("*.json*")}
    ranks, tasks = {"rank0.json", "rank1.json"}, {"SST2.json", "SST2.jsonl"}
    assert files == ranks | tasks | {"SQuAD.json", "SQuAD.jsonl", "regular.json"}
    printed = (two_processes / "printed.txt").read_text()
    assert printed.count("result: ") == 3 and printed.count("(7 examples)") == 2


def test_first_order_training_in_two_processes(two_processes: Path, tmp_path: Path) -> None:
    assert [path.name for path in (two_processes / "out").iterdir()] == ["checkpoint-2"]
    logs = [json.loads((two_processes / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    losses = [[row["loss"] for row in log if "loss" in row] for log in logs]
    assert losses[0] == losses[1] == log_of(two_processes / "out/checkpoint-2", "loss")
    # Two halves of a batch of four are one batch of four.
    finish(training(tmp_path, trainer="regular", hessian_smooth_type=None, max_steps=2))
    assert losses[0] == pytest.approx(log_of(tmp_path / "out/checkpoint-2", "loss"), abs=1e-4)
