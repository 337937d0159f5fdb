"""The user's own files: three formats, one meaning; runs on them; bad input in one line."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from running import MODEL, command, finish, log_of

import run
from language_model.encoding import Encoder
from language_model.loading import load_config_and_tokenizer
from task_data.loading import load_samples
from task_data.own_tasks import choose_task
from tasks import Sample, Task
from utils import InputError

Rows = list[dict[str, Any]]

CHOICE: Rows = [
    {
        "prompt": "The film is dull.\nGood?\n",
        "options": ["yes", "no"],
        "answer": "no",
        "source": "a",
    },
    {"prompt": "2 + 2 =", "options": ["3", "4", "five"], "answer": "4", "source": "b"},
    {"prompt": 'He said "é, ü".', "options": [" so, then", "not"], "answer": "0"},
    {"prompt": "One more than 0 is ", "options": ["0", "1"], "answer": "1"},
]
CANDIDATES = [("yes", "no"), ("3", "4", "five"), (" so, then", "not"), ("0", "1")]
CORRECT = ["no", "4", " so, then", "1"]

GENERATION: Rows = [
    {"prompt": "Capital of France?\nAnswer:", "answer": ["Paris"]},
    {"prompt": "Who wrote it?\nAnswer:", "answer": ["Ann Lee", "Lee", "Ann Lee"]},
    {"prompt": "How many?\nAnswer: ", "answer": ["12"]},
]


def write_jsonl(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_array(path: Path, rows: Rows) -> None:
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def write_csv(path: Path, rows: Rows) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for row in rows:
            values = [row.get(name, "") for name in names]
            writer.writerow([json.dumps(v) if isinstance(v, list) else v for v in values])


def write_parquet(path: Path, rows: Rows) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


WRITERS: dict[str, Callable[[Path, Rows], None]] = {
    "jsonl": write_jsonl,
    "json": write_array,
    "csv": write_csv,
    "parquet": write_parquet,
}


def samples_of(path: Path) -> tuple[Task, list[Sample]]:
    task = choose_task(None, None, str(path), None)
    return task, load_samples(task, None)[1]


def load(folder: Path, suffix: str, rows: Rows) -> tuple[Task, list[Sample]]:
    """The task of a file with the rows, and its samples."""
    path = folder / f"mine.{suffix}"
    WRITERS[suffix](path, rows)
    return samples_of(path)


# ------------------------------------------------------------------------------------ the samples


@pytest.mark.parametrize("suffix", WRITERS)
def test_choice(tmp_path: Path, suffix: str) -> None:
    task, samples = load(tmp_path, suffix, CHOICE)
    assert (task.name, task.generation, task.metric_name) == ("mine", False, "accuracy")
    assert [sample.id for sample in samples] == [0, 1, 2, 3]
    assert [sample.candidates for sample in samples] == CANDIDATES
    assert [sample.correct for sample in samples] == [(correct,) for correct in CORRECT]
    assert [sample.row["prompt"] for sample in samples] == [row["prompt"] for row in CHOICE]
    assert [sample.row["source"] for sample in samples[:2]] == ["a", "b"]


@pytest.mark.parametrize("suffix", WRITERS)
def test_generation(tmp_path: Path, suffix: str) -> None:
    task, samples = load(tmp_path, suffix, GENERATION)
    assert (task.name, task.generation, task.metric_name) == ("mine", True, "f1")
    assert [sample.candidates for sample in samples] == [(), (), ()]
    assert [sample.correct for sample in samples] == [("Paris",), ("Ann Lee", "Lee"), ("12",)]


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_number_is_an_option_or_else_a_position(tmp_path: Path, suffix: str) -> None:
    """In every format the same: text wins where it fits."""
    stars = ["1", "2", "3", "4", "5"]
    for options, answer, correct in (
        *((stars, 1, "1"), (stars, "5", "5"), (stars, 3.0, "3"), (stars, 0, "1")),
        *((["yes", "no"], 1, "no"), (["yes", "no"], "0", "yes"), (["1", "2", "0"], "1", "1")),
        # Spaces around an option do not count; numbers are texts.
        *(([" yes ", "no"], "yes", " yes "), (["yes", "no"], " yes", "yes")),
        *(([1, 2, 3], 2, "2"), ([1, 2, 3], "3", "3"), ([0.5, 1.5], 0.5, "0.5")),
    ):
        rows = [{"prompt": "p", "options": options, "answer": answer}]
        _, (sample,) = load(tmp_path, suffix, rows)
        assert sample.correct == (correct,), (options, answer)


def test_answers_in_a_cell(tmp_path: Path) -> None:
    for cell, correct in (
        ('["Ann Lee", "Lee"]', ("Ann Lee", "Lee")),
        ("['Ann Lee', 'Lee']", ("Ann Lee", "Lee")),
        ("{'text': ['Ann Lee'], 'answer_start': [3]}", ("Ann Lee",)),
        ("{'text': 'Ann Lee'}", ("Ann Lee",)),
        ('{"text": "Ann", "city": "Rome"}', ('{"text": "Ann", "city": "Rome"}',)),
        *((text, (text,)) for text in ("Paris", "[1] B", "[1, 2]", "{", "[" * 5000, "12")),
    ):
        _, (sample,) = load(tmp_path, "csv", [{"prompt": "Who?", "answer": cell}])
        assert sample.correct == correct
    for cell in ("['Ann Lee' 'Lee']", "{'text': array(['Lee'], dtype=object)}"):
        with pytest.raises(InputError, match=r"mine\.csv:2: .* NumPy array's text: give a JSON"):
            load(tmp_path, "csv", [{"prompt": "Who?", "answer": cell}])
    with pytest.raises(InputError, match=r"mine\.csv:2: answer is None: expected a text"):
        load(tmp_path, "csv", [{"prompt": "Who?", "answer": "['Ann Lee', None]"}])


def test_csv_of_a_spreadsheet(tmp_path: Path) -> None:
    """A byte order mark, Windows lines, blank lines, a long text, and one over several lines."""
    path = tmp_path / "mine.CSV"
    long = "word " * 50_000
    text = (
        f'\ufeffprompt, answer\r\n\r\n"One\r\ntwo, ""three""", "A "\r\nFour,[1] B\r\n{long},C\r\n'
    )
    path.write_bytes(text.encode("utf-8"))
    _, samples = samples_of(path)
    assert [s.row["prompt"] for s in samples] == ['One\r\ntwo, "three"', "Four", long]
    assert [s.correct for s in samples] == [("A ",), ("[1] B",), ("C",)]


def test_texts_of_json_stay_texts(tmp_path: Path) -> None:
    rows = [{"prompt": "When?", "answer": text} for text in ("2020-01-01", '["a"]', "1e3")]
    _, samples = load(tmp_path, "jsonl", rows)
    assert [sample.correct for sample in samples] == [("2020-01-01",), ('["a"]',), ("1e3",)]


def test_one_space_before_the_option(tmp_path: Path) -> None:
    for prompt, option, text in (
        ("It was", "great", " great"),
        ("It was ", "great", "great"),
        ("Good?\n", "yes", "yes"),
        ("It was", " great", " great"),
        ("It was", "\nyes", "\nyes"),
    ):
        rows: Rows = [{"prompt": prompt, "options": [option, "no"], "answer": 0}]
        task, (sample,) = load(tmp_path, "jsonl", rows)
        assert task.prompt(sample) == prompt
        assert task.option(sample, option) == text
        assert task.template.content_free_prompt(sample.row) == ""
        assert task.template.content_free_option(sample.row, option) == text
        task, (sample,) = load(tmp_path, "jsonl", [{"prompt": prompt, "answer": option}])
        assert task.prompt(sample) == prompt
        assert task.option(sample, option) == f"{text}\n"


def test_the_tokens_are_those_of_a_task_with_the_same_texts(tmp_path: Path) -> None:
    rows: Rows = [{"prompt": "a fine film It was", "options": ["terrible", "great"], "answer": 1}]
    own, (sample,) = load(tmp_path, "jsonl", rows)
    task = choose_task("SST2", None, None, None)
    same = task.sample({"sentence": "a fine film", "label": 1}, 0)
    _, tokenizer = load_config_and_tokenizer(str(MODEL), False)
    encoded = [
        Encoder(own, tokenizer, 99).options(sample, [sample]),
        Encoder(task, tokenizer, 99).options(same, [same]),
    ]
    assert encoded[0] == encoded[1]


def test_metrics_of_generated_text(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    write_jsonl(path, GENERATION)
    expected = {"f1": pytest.approx((1 + 2 / 3) / 3), "em": pytest.approx(1 / 3)}
    for metric, names in (("f1", ["f1", "em"]), ("em", ["em", "f1"])):
        task = choose_task(None, None, str(path), metric)
        scores = task.score(["paris.", "Ann", "13"], load_samples(task, None)[1])
        assert task.metric_name == metric and list(scores) == names and scores == expected


def test_without_a_validation_file_rows_are_held_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "mine.jsonl"
    write_jsonl(path, [{"prompt": f"{n}", "answer": "a"} for n in range(25)])
    task = choose_task(None, str(path), None, None)
    train, held_out = load_samples(task, None)
    assert len(train) == 23 and len(held_out) == 2
    assert sorted(int(sample.row["prompt"]) for sample in train + held_out) == [*range(25)]
    assert [held_out, held_out] == [load_samples(task, None)[1] for _ in range(2)]
    assert f"2 of the 25 rows of {path} are held out to report on" in caplog.text
    caplog.clear()
    # Nothing to report on is wanted: all rows are for training, without a word.
    assert len(load_samples(task, None, with_validation=False)[0]) == 25 and not caplog.text
    write_jsonl(path, [{"prompt": "1", "answer": "a"}] * 2)
    load_samples(choose_task(None, str(path), None, None), None)
    assert f"1 of the 2 rows of {path} is held out" in caplog.text
    write_jsonl(path, [{"prompt": "1", "answer": "a"}])
    with pytest.raises(InputError, match=r"has one row, .* give --validation_file"):
        load_samples(choose_task(None, str(path), None, None), None)


# -------------------------------------------------------------------------------------- bad files

GOOD = '{"prompt": "p", "options": ["yes", "no"], "answer": "no"}\n'
TEXT = '{"prompt": "p", "answer": "no"}\n'
OTHER = '{"prompt": "p", "options": ["yes", "no"], '
HEADER = "prompt,options,answer\n"
CELLS = 'p,"[""yes"", ""no""]",no\n'

# A file's name and content, and what the line has to say.
BAD_FILES: dict[str, tuple[str, str | bytes, list[str]]] = {
    "no answer": (
        "v.jsonl",
        GOOD + "\n" + OTHER.rstrip(", ") + "}\n",
        ["v.jsonl:3:", "no column answer;", "found prompt, options"],
    ),
    "answer is none": ("v.jsonl", GOOD + OTHER + '"answer": null}', ["v.jsonl:2:", "None", "yes"]),
    "answer is NaN": ("v.jsonl", GOOD + OTHER + '"answer": NaN}', ["v.jsonl:2:", "nan", "yes"]),
    "unknown answer": (
        "v.jsonl",
        "\n\n" + GOOD + OTHER + '"answer": "maybe"}',
        ["v.jsonl:4:", "answer is 'maybe'", "['yes', 'no']", "0 to 1"],
    ),
    "number too large": ("v.jsonl", OTHER + '"answer": 2}', ["v.jsonl:1:", "answer is 2", "0 to"]),
    "number below 0": ("v.jsonl", OTHER + '"answer": -1}', ["v.jsonl:1:", "answer is -1"]),
    "truth value": ("v.jsonl", OTHER + '"answer": true}', ["v.jsonl:1:", "answer is True"]),
    "fraction": ("v.jsonl", OTHER + '"answer": 0.5}', ["v.jsonl:1:", "answer is 0.5"]),
    "no prompt": (
        "v.jsonl",
        '{"review": "p", "stars": 1}',
        ["v.jsonl:1: no column text (or prompt)", "found review, stars; name", "--label_column"],
    ),
    "empty prompt": ("v.jsonl", TEXT + TEXT.replace('"p"', '" "'), ["v.jsonl:2:", "prompt is ' '"]),
    "prompt is none": ("v.jsonl", TEXT.replace('"p"', "null"), ["v.jsonl:1:", "prompt is None"]),
    "half a character": ("v.jsonl", TEXT.replace('"p"', r'"\ud83d"'), ["v.jsonl:1:", "half"]),
    "answer is a number": ("v.jsonl", TEXT.replace('"no"', "1"), ["v.jsonl:1:", "1", "options"]),
    "no acceptable answer": ("v.jsonl", TEXT.replace('"no"', "[]"), ["v.jsonl:1:", "answer is []"]),
    "empty answer": ("v.jsonl", TEXT.replace('"no"', '["a", ""]'), ["v.jsonl:1:", "answer is ''"]),
    "one option": ("v.jsonl", GOOD.replace('"yes", ', ""), ["v.jsonl:1:", "['no']", "at least 2"]),
    "options are none": ("v.jsonl", GOOD.replace('["yes", "no"]', "null"), ["options is None"]),
    "same option twice": ("v.jsonl", GOOD.replace("yes", " no"), ["v.jsonl:1:", "[' no', 'no']"]),
    "option is empty": ("v.jsonl", GOOD.replace("yes", ""), ["v.jsonl:1:", "options is ''"]),
    "option is none": ("v.jsonl", GOOD.replace('"yes"', "null"), ["v.jsonl:1:", "options is None"]),
    "nan in csv": ("v.csv", "prompt,answer\np,a\np,nan\n", ["v.csv:3: answer is nan"]),
    "NaN in csv": ("v.csv", "prompt,answer\np,a\nNaN,a\n", ["v.csv:3: prompt is nan"]),
    "alpaca": (
        "v.json",
        '[{"instruction": "Do.", "input": "", "output": "Done."}]',
        ["row 0", "--prompt_template '{instruction}\\n{input}' --answer_column output"],
    ),
    "completion": ("v.json", '{"prompt": "p", "completion": "c"}', ["--answer_column completion"]),
    "nested deeply": (
        "v.jsonl",
        TEXT + TEXT.replace('"no"', "[" * 9000 + "]" * 9000),  # torch.compile raises the limit
        ["v.jsonl:2: not JSON (maximum recursion depth"],
    ),
    "options in a later row": ("v.jsonl", TEXT + GOOD, ["v.jsonl:2: options", "in none"]),
    "options not in all rows": ("v.jsonl", GOOD + TEXT, ["v.jsonl:2: no options", "in every row"]),
    "not JSON": ("v.jsonl", GOOD + "\n{'prompt': 'p'}\n", ["v.jsonl:3: not JSON", "each line"]),
    "no object": ("v.json", GOOD + "7\n", ["v.json:2:", "JSON object"]),
    "no object in a list": ("v.json", f"[{GOOD}, 7]", ["v.json, row 1 ", "JSON object"]),
    "endless list": ("v.json", "[" * 100_000, ["v.json: not JSON"]),
    "not UTF-8": ("v.jsonl", b"\n" + TEXT.encode("utf-16"), ["v.jsonl:2: not UTF-8", "save it"]),
    "csv not UTF-8": ("v.csv", b"prompt,answer\np,caf\xe9\n", ["v.csv:2: not UTF-8"]),
    "blank": ("v.jsonl", "\n \n", ["v.jsonl has no rows"]),
    "empty list": ("v.json", "[]", ["v.json has no rows"]),
    "only a header": ("v.csv", HEADER, ["v.csv has no rows"]),
    "cells too few": ("v.csv", HEADER + CELLS + "\np,q\n", ["v.csv:4: 2 cells for the 3 columns"]),
    "comma too many": ("v.csv", "prompt,answer\np, q,a\n", ["v.csv:2: 3 cells for the 2 columns"]),
    "open quote": ("v.csv", HEADER + CELLS + 'p,"[""yes', ["v.csv:3: not CSV", "quotes"]),
    "semicolons": (
        "v.csv",
        "title;stars\na;b\n",
        ["v.csv:2: no column text (", "found title, stars"],
    ),
    "no label": ("v.csv", "text,mood\na,b\n", ["no column label (or answer); found text, mood;"]),
    "upper case": (
        "v.csv",
        "Text,label\na,b\nb,c\n",
        ["no column text (", "rename 'Text', or name"],
    ),
    "column twice": ("v.csv", "prompt,answer,answer\np,a,b\n", ["v.csv:1:", "'answer'"]),
    "many columns": ("v.csv", ",".join(map(str, range(200_000))) + "\na\n", ["v.csv:2: 1 cells"]),
    "options of csv": (
        "v.csv",
        HEADER + "p,yes|no,no\n",
        ["v.csv:2:", "'yes|no'", '["yes", "no"]'],
    ),
    "answer of csv": ("v.csv", HEADER + CELLS + CELLS.replace(",no", ",2"), ["v.csv:3:", "'2'"]),
    "no Parquet": ("v.parquet", "prompt", ["v.parquet: not a Parquet file"]),
    "suffix": ("v.txt", TEXT, ["--validation_file v.txt", ".jsonl, .json, .csv, .parquet"]),
    "no suffix": ("v", TEXT, ["--validation_file v:", "ends in"]),
}


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_bad_files_are_one_line() -> None:
    for case, (name, content, parts) in BAD_FILES.items():
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        with pytest.raises(InputError) as refusal:
            samples_of(Path(name))
        line = str(refusal.value)
        assert "\n" not in line and len(line) < 1000, case
        assert [part for part in parts if part not in line] == [], case


def test_a_row_of_parquet_is_named() -> None:
    rows = [{"prompt": "p", "answer": "a"}, {"prompt": None, "answer": "a"}]
    write_parquet(Path("v.parquet"), rows)
    with pytest.raises(InputError, match=r"v\.parquet, row 1 .*prompt is None"):
        samples_of(Path("v.parquet"))


# --------------------------------------------------------------------------------------- the runs


def own_command(folder: Path, rows: Rows, **arguments: Any) -> list[str]:
    """A run on files with the rows: three times for training, and once to report on."""
    write_jsonl(folder / "mine.jsonl", rows * 3)
    write_jsonl(folder / "held_out.jsonl", rows)
    files = {"train_file": "mine.jsonl", "validation_file": "held_out.jsonl"}
    values = {"task_name": None, "data_dir": None, "num_eval": None, "result_file": "result.json"}
    named = command(**(values | files | arguments))
    return [word for word in named if word != "None"]


def test_zero_shot_without_a_train_file(tmp_path: Path) -> None:
    result = finish(own_command(tmp_path, CHOICE, train_file=None, predictions_file="p.jsonl"))
    assert result["task"] == "held_out"
    assert list(result["metric"]) == ["accuracy"]
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert {line["id"]: len(line["scores"]) for line in lines} == {0: 2, 1: 3, 2: 2, 3: 2}
    assert sum(line["correct"] for line in lines) == 4 * result["metric"]["accuracy"]


def test_calibrated(tmp_path: Path) -> None:
    for calibration, shots in (("sfc", 0), ("icl_sfc", 2)):
        asked = {calibration: True, "result_file": f"{calibration}.json"}
        result = finish(own_command(tmp_path, CHOICE, num_train=shots, **asked))
        assert list(result["metric"]) == ["accuracy"]


def test_in_context_generation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = {"num_train": 2, "metric": "em", "max_new_tokens": 4, "verbose": True}
    result = finish(own_command(tmp_path, GENERATION, **arguments))
    assert (result["task"], list(result["metric"])) == ("mine", ["em", "f1"])
    assert "in-context em" in capsys.readouterr().out
    assert result["settings"]["train_file"] == "mine.jsonl"


@pytest.mark.parametrize("kind", ["choice", "classes", "generation"])
def test_training(tmp_path: Path, kind: str) -> None:
    arguments: dict[str, Any] = {"trainer": "zo", "max_steps": 2, "num_train": 6, "num_dev": 2}
    arguments |= {"output_dir": "out", "save_steps": 2, "logging_steps": 1}
    arguments |= {"per_device_train_batch_size": 4, "learning_rate": 1e-4}
    if kind == "classes":
        arguments["train_as_classification"] = True
    if kind == "generation":
        arguments["max_new_tokens"] = 4
    rows = GENERATION if kind == "generation" else CHOICE
    result = finish(own_command(tmp_path, rows, **arguments))
    metrics = ["f1", "em"] if kind == "generation" else ["accuracy"]
    assert (result["task"], result["steps"]) == ("mine", 2)
    assert list(result["metric"]) == list(result["dev_metric"]) == metrics
    losses = log_of(tmp_path / "out" / "checkpoint-2", "loss")
    assert len(losses) == 2 and all(loss > 0 for loss in losses)


BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "bad file": ({"validation_file": "bad.jsonl"}, ["bad.jsonl:1: prompt is None"]),
    "missing file": ({"validation_file": "no.jsonl"}, ["--validation_file no.jsonl", "no such"]),
    "missing train file": ({"train_file": "no.csv"}, ["--train_file no.csv", "no such"]),
    "a folder": ({"validation_file": "folder.json"}, ["--validation_file folder.json", "no such"]),
    "a fifo": ({"validation_file": "fifo.jsonl"}, ["--validation_file fifo.jsonl", "no such"]),
    "nothing to show": ({"num_train": 4}, ["nothing to draw 4 examples from", "--train_file"]),
    "nothing to train on": (
        {"num_train": 4, "num_dev": 2, "trainer": "zo", "max_steps": 2, "output_dir": "out"},
        ["nothing to draw 6 examples from", "--train_file"],
    ),
    "f1 of options": ({"metric": "f1"}, ["--metric f1", "v.jsonl", "options", "accuracy"]),
    "accuracy of texts": (
        {"metric": "accuracy", "validation_file": "texts.jsonl"},
        ["--metric accuracy", "texts.jsonl", "generated", "f1 or em"],
    ),
    "calibrated texts": ({"sfc": True, "validation_file": "texts.jsonl"}, ["--sfc", "texts"]),
    "train file without options": (
        {"train_file": "texts.jsonl"},
        ["v.jsonl:1: options", "texts.jsonl has none"],
    ),
    "validation file without options": (
        {"train_file": "v.jsonl", "validation_file": "texts.jsonl"},
        ["texts.jsonl:1: no options", "v.jsonl has some"],
    ),
    "no task at all": ({"validation_file": None}, ["--task_name is missing", "--train_file"]),
}


def test_bad_arguments_are_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("folder.json").mkdir()
    os.mkfifo("fifo.jsonl")
    Path("v.jsonl").write_text(GOOD)
    Path("texts.jsonl").write_text(TEXT)
    Path("bad.jsonl").write_text(TEXT.replace('"p"', "null"))
    values = {"task_name": None, "data_dir": None, "num_eval": None, "validation_file": "v.jsonl"}
    before, failures = sorted(tmp_path.iterdir()), []
    for case, (arguments, parts) in BAD_ARGUMENTS.items():
        argv = [word for word in command(**(values | arguments)) if word != "None"]
        code = run.main(argv)
        out, err = capfd.readouterr()
        one_line = err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1
        unchanged = sorted(tmp_path.iterdir()) == before
        if code != 2 or out or not one_line or not unchanged or any(p not in err for p in parts):
            failures.append((case, code, out, err))
    assert not failures
