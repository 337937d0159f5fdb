"""Rewards: a function of a file as the metric, and as what training maximises."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from running import ROOT, SAMPLES, finish, training

import run
from command_line.arguments import parse_arguments
from command_line.settings import experiment_hash
from command_line.starting import begin
from language_model import objectives
from language_model.generation import GenerationSettings
from language_model.objectives import NegativeTextMetric, collate_prompts
from task_data.loading import load_samples
from task_data.own_tasks import choose_task
from task_data.rewards import Reward
from utils import InputError

EXAMPLES = ROOT / "examples" / "rewards"

REWARD = """\
import sys, torch
calls = []

def length(prompts, texts, rows):
    calls.append((prompts, texts, rows))
    return [len(text) / 100 for text in texts]

def fails(prompts, texts, rows):
    return [1 / 0 for text in texts]

def endless(prompts, texts, rows):
    while True:
        yield 1.0


def too_few(prompts, texts, rows):
    return [1.0]

def no_numbers(prompts, texts, rows):
    return [None for text in texts]

def one_number(prompts, texts, rows):
    return 3.0

def infinite(prompts, texts, rows):
    return [float("nan") for text in texts]

def leaves(prompts, texts, rows):
    raise SystemExit(0)

def digits(prompts, texts, rows):
    return "1" * len(texts)

def by_number(prompts, texts, rows):
    return {float(number): 1 for number in range(len(texts))}

def huge(prompts, texts, rows):
    return [10**400 for text in texts]

def too_large_for_a_mean(prompts, texts, rows):
    return [1e308 for text in texts]

def minus_infinite(prompts, texts, rows):
    return [0.0, float("-inf"), 1.0, 1.0]

def texts_of_numbers(prompts, texts, rows):
    return ["1" for text in texts]

def keys(prompts, texts, rows):
    return {number: 1 for number in range(len(texts))}.keys()

def fails_late(prompts, texts, rows):
    return (1 / 0 for text in texts)

def leaves_late(prompts, texts, rows):
    return (sys.exit(0) for text in texts)

class Leaves:
    def __float__(self):
        sys.exit(0)

def leaves_as_number(prompts, texts, rows):
    return [Leaves() for text in texts]

class Other(BaseException):
    pass

def fails_otherwise(prompts, texts, rows):
    raise Other("x")

def vectors(prompts, texts, rows):
    return torch.ones(len(texts), 2)

def tensor(prompts, texts, rows):
    return torch.arange(len(texts)) / 2
"""


@pytest.fixture
def reward_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(REWARD)
    return path


def rows_file(folder: Path, **columns: str) -> Path:
    path = folder / "rows.jsonl"
    rows = [{"prompt": f"Number {n} is", "kind": n, **columns} for n in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def own(folder: Path, rows: Path, **arguments: Any) -> list[str]:
    """A short run on rewards."""
    files = {"train_file": rows, "validation_file": rows, "task_name": None, "data_dir": None}
    few = {"num_train": 6, "max_steps": 2, "save_steps": 2, "max_new_tokens": 4}
    files |= {"train_as_classification": None, "zo_eps": 0.1, **few}
    return training(folder, **(files | arguments))


def test_the_objective_is_minus_the_mean_reward(
    tmp_path: Path, reward_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_file(tmp_path)
    result = finish(
        own(
            tmp_path,
            rows,
            **{"reward": f"{reward_file}:length", "reward_samples": 2, "no_eval": None},
            **{
                "num_eval": 3,
                "predictions_file": tmp_path / "p.jsonl",
                "eval_before_training": True,
            },
            **{"num_dev": 2, "num_train": 4, "eval_strategy": "steps", "eval_steps": 1},
            **{"eval_metric": True, "logging_steps": 1, "hessian_smooth_type": "constant0"},
        )
    )
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [set(line) for line in lines] == [{"id", "prompt", "prediction", "reward"}] * 3
    assert all(line["reward"] == len(line["prediction"]) / 100 for line in lines)
    mean = sum(line["reward"] for line in lines) / 3
    assert result["metric"] == {"reward": pytest.approx(mean)}
    assert result["history"]["dev_metric"]["2"] == result["dev_metric"]["reward"]
    assert result["settings"]["reward_samples"] == 2
    assert result["settings"]["reward"] == f"{reward_file}:length"
    out = capsys.readouterr().out
    assert out.startswith("zero-shot reward: ") and "step 2 of 2: reward " in out
    assert "step 2: dev reward " in out


def test_both_sides_of_a_direction_draw_the_same_numbers(
    reward_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_file(tmp_path)
    task = choose_task(None, str(rows), str(rows), None, f"{reward_file}:length")
    samples, _ = load_samples(task, None)
    drawn: list[list[float]] = []

    def draw(model: Any, tokenizer: Any, prompts: Any, *_: Any) -> list[str]:
        drawn.append(torch.rand(len(prompts)).tolist())
        return ["x" * (10 * len(drawn))] * len(prompts)

    monkeypatch.setattr(objectives, "generate", draw)
    objective = NegativeTextMetric(
        task, "reward", None, GenerationSettings(sampling=True), 3, seed=5
    )
    batch = collate_prompts([((1, 2), sample) for sample in samples[:2]])
    model = torch.nn.Linear(1, 1)
    model.device = torch.device("cpu")
    before = torch.get_rng_state()

    def loss() -> float:
        return objective(model, batch).item()

    objective.step = 7
    assert [loss(), loss()] == pytest.approx([-0.1, -0.2])
    objective.step = None
    between = loss()
    objective.step = 8
    loss()
    objective.step = None
    assert between != loss()  # by the function alone
    same, again, dev, other, later = drawn
    assert same == again and dev == later and len({same[0], dev[0], other[0]}) == 3
    assert len(same) == 6 and torch.equal(before, torch.get_rng_state())
    # Each text with the prompt and the whole row that it is of.
    prompts, _, given = task.reward.function.__globals__["calls"][0]
    assert prompts == ["Number 0 is"] * 3 + ["Number 1 is"] * 3
    assert [row["kind"] for row in given] == [0, 0, 0, 1, 1, 1]


def test_answers_are_compared_too_where_there_are_some(tmp_path: Path, reward_file: Path) -> None:
    rows = rows_file(tmp_path, answer="small")
    task = choose_task(None, None, str(rows), None, f"{reward_file}:length")
    _, samples = load_samples(task, None)
    assert task.metric_names == ("reward", "f1", "em") and task.metric_name == "reward"
    assert task.score(["small", "large"], samples[:2]) == {"reward": 0.05, "f1": 0.5, "em": 0.5}
    squad = choose_task("SQuAD", None, None, None, f"{reward_file}:length")
    _, samples = load_samples(squad, str(SAMPLES))
    assert set(squad.score(["a"], samples[:1])) == {"reward", "f1", "em"}


def test_the_file_runs_once(tmp_path: Path) -> None:
    runs, file = tmp_path / "runs", tmp_path / "counted.py"
    file.write_text(f"open({str(runs)!r}, 'a').write('x')\n{REWARD}")
    argv = [*own(tmp_path, rows_file(tmp_path), reward=f"{file}:length"), "--dry_run"]
    assert run.main(argv, begin(argv)) == 0
    assert runs.read_text() == "x"


def test_another_content_of_the_file_is_another_experiment(
    tmp_path: Path, reward_file: Path
) -> None:
    argv = own(tmp_path, rows_file(tmp_path), reward=f"{reward_file}:length")
    first = experiment_hash(parse_arguments(argv))
    moved = tmp_path / "moved.py"
    moved.write_text(REWARD)
    elsewhere = [word.replace(str(reward_file), str(moved)) for word in argv]
    assert experiment_hash(parse_arguments(elsewhere)) == first
    reward_file.write_text(REWARD.replace("100", "10"))
    assert experiment_hash(parse_arguments(argv)) != first
    other = [word.replace("mine.py:length", "mine.py:one_number") for word in argv]
    assert experiment_hash(parse_arguments(other)) != first


BAD_REWARDS = (
    ("length", "--reward length: give FILE.py:function"),
    ("none.py:length", "there is no file none.py"),
    ("mine.py:lenght", "mine.py has no function lenght"),
    ("mine.py:calls", "has no function calls"),
    ("broken.py:f", "broken.py raised NameError: name 'undefined' is not defined"),
    ("cut.py:f", "cut.py raised SyntaxError: "),
    ("leaves.py:f", "leaves.py raised SystemExit: 0"),
    ("mine.py:fails", "--reward: fails raised ZeroDivisionError: division by zero"),
    ("mine.py:leaves", "--reward: leaves raised SystemExit: 0"),
    ("mine.py:endless", "--reward: endless returned more values for 4 texts"),
    ("mine.py:too_few", "--reward: too_few returned 1 values for 4 texts; return a list"),
    ("mine.py:no_numbers", "--reward: no_numbers returned a list with NoneType for 4 texts"),
    ("mine.py:one_number", "--reward: one_number returned float for 4 texts"),
    (
        "mine.py:infinite",
        "--reward: infinite returned a list with nan for 4 texts; return a list with a number",
    ),
    ("mine.py:digits", "--reward: digits returned str for 4 texts"),
    ("mine.py:by_number", "--reward: by_number returned dict for 4 texts"),
    ("mine.py:huge", "--reward: huge returned a list with int for 4 texts"),
    ("mine.py:too_large_for_a_mean", "returned a list with 1e+308 for 4 texts; return a list with"),
    ("mine.py:minus_infinite", "--reward: minus_infinite returned a list with -inf"),
    ("mine.py:texts_of_numbers", "--reward: texts_of_numbers returned a list with str"),
    ("mine.py:keys", "--reward: keys returned dict_keys for 4 texts"),
    ("mine.py:fails_late", "--reward: fails_late raised ZeroDivisionError: division by zero"),
    ("mine.py:leaves_late", "--reward: leaves_late raised SystemExit: 0"),
    ("mine.py:leaves_as_number", "returned a list with Leaves for 4 texts"),
    ("mine.py:fails_otherwise", "--reward: fails_otherwise raised Other: x"),
    ("mine.py:vectors", "--reward: vectors returned a list with Tensor"),
)


def test_bad_functions_are_told_in_one_line(
    tmp_path: Path, reward_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text("undefined\n")
    (tmp_path / "cut.py").write_text("def f(:\n")
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.chdir(tmp_path)
    for reward, said in BAD_REWARDS:
        with pytest.raises(InputError) as refusal:
            Reward.load(reward)(["a"] * 4, ["b"] * 4, [{}] * 4)
        assert said in str(refusal.value) and "\n" not in str(refusal.value)
    assert Reward.load("mine.py:tensor")(["a"] * 3, ["b"] * 3, [{}] * 3) == [0, 0.5, 1]


# As TRL's documentation has them.
OF_TRL = """\
def length(completions, **kwargs):
    return [float(len(completion)) for completion in completions]

def right(prompts, completions, kind, **kwargs):
    assert kwargs == {"other": ["x", "y"]} and prompts == ["Is 1?", "Is 2?"]
    return [float(c == k) for c, k in zip(completions, kind)]

def of_messages(completions, answer, **kwargs):
    assert kwargs == {"prompts": [[{"role": "user", "content": "Hi"}]] * 2}
    return [float(c[0]["content"] == a) for c, a in zip(completions, answer)]

def no_keywords(completions):
    return [1.0 for _ in completions]
"""


def test_rewards_of_trl_are_taken_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "trl_rewards.py"
    file.write_text(OF_TRL)
    prompts, texts = ["Is 1?", "Is 2?"], ["yes", "no"]
    rows = [
        {"prompt": prompt, "kind": kind, "other": other}
        for prompt, kind, other in zip(prompts, ["yes", "yes"], ["x", "y"], strict=True)
    ]
    assert Reward.load(f"{file}:length")(prompts, texts, rows) == [3, 2]
    assert Reward.load(f"{file}:right")(prompts, texts, rows) == [1, 0]
    said = {"messages": [{"role": "user", "content": "Hi"}], "prompt": "Hi", "answer": "no"}
    assert Reward.load(f"{file}:of_messages")(["Hi"] * 2, texts, [said] * 2) == [0, 1]
    with pytest.raises(InputError, match=r"no_keywords raised TypeError: .*unexpected keyword"):
        Reward.load(f"{file}:no_keywords")(prompts, texts, rows)
    assert finish(own(tmp_path, rows_file(tmp_path), reward=f"{file}:length"))["steps"] == 2


def test_a_function_that_fails_in_training_ends_it(
    tmp_path: Path, reward_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_file(tmp_path)
    for name, said in (
        ("fails", "fails raised ZeroDivisionError: division by zero\n"),
        ("leaves", "leaves raised SystemExit: 0\n"),
        ("infinite", "infinite returned a list with nan for"),
    ):
        assert run.main(own(tmp_path, rows, reward=f"{reward_file}:{name}")) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: --reward: {said}") and err.count("\n") == 1
        assert not (tmp_path / "result.json").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"trainer": "regular"}, "it has no gradient for --trainer regular"),
        ({"trainer": "broadcast"}, "regular and broadcast; take --trainer zo, or leave it out"),
        ({"non_diff": True}, "--reward and --non_diff exclude each other"),
        ({"reward_samples": 0}, "--reward_samples 0: must be at least 1"),
        ({"num_beams": 2, "reward_samples": 2}, "--num_beams 2: --reward_samples 2 draws"),
    ],
)
def test_what_does_not_go_with_a_reward(
    tmp_path: Path,
    reward_file: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: dict[str, Any],
    said: str,
) -> None:
    rows = rows_file(tmp_path, answer="a")
    reward = {"reward": f"{reward_file}:length"}
    assert run.main(own(tmp_path, rows, **(reward | arguments))) == 2
    assert said in capsys.readouterr().err


def test_options_have_no_reward(
    tmp_path: Path, reward_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(training(tmp_path, reward=f"{reward_file}:length")) == 2
    assert "the answers of SST2 are chosen from options" in capsys.readouterr().err


# ---------------------------------------------------------------------------------- the examples


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_for_short_answers() -> None:
    rewards = example("arithmetic").nearness
    texts = ["12", "The sum is 12.", "13", "none", "-3"]
    assert rewards(completions=texts, answer=["12"] * 5) == pytest.approx([1, 0.97, 0.5, 0, 1 / 16])
    for name in ("arithmetic.jsonl", "arithmetic-validation.jsonl"):
        for line in (EXAMPLES / name).read_text().splitlines():
            row = json.loads(line)
            first, second = (int(word) for word in row["prompt"][8:-1].split(" + "))
            assert int(row["answer"]) == first + second


def test_the_example_that_trains_the_bundled_model() -> None:
    reward = Reward.load(f"{EXAMPLES}/praise.py:praise")
    assert reward(["a"] * 3, ["a great joy", "dull, boring", ""], [{}] * 3) == [2 / 3, -1, 0]
    train, validation = (
        {json.loads(line)["prompt"] for line in (EXAMPLES / name).read_text().splitlines()}
        for name in ("praise.jsonl", "praise-validation.jsonl")
    )
    assert len(train) == 24 and len(validation) == 8 and not train & validation
