"""From the user's own columns to answers: templates, labels, messages, rows without an answer."""

from __future__ import annotations

import ast
import csv
import importlib
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from running import (
    ROOT,
    SAMPLES,
    assert_same_tensors,
    command,
    contents,
    finish,
    refused_line,
    small_model,
    training,
    weights,
)
from test_chat import TEMPLATE, save
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import run
from language_model.encoding import Chat, Encoder
from task_data.columns import Columns
from task_data.loading import load_samples, read_samples
from task_data.own_tasks import choose_task
from tasks import get_task
from utils import InputError

REVIEWS = (
    'title,review,stars\nUp,"A warm, funny film.",2\nDown,Two hours of nothing.,1\nUp,Fine.,2\n'
)


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    path = tmp_path / "reviews.csv"
    path.write_text(REVIEWS)
    return path


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def own(file: Path, **arguments: Any) -> list[str]:
    files = {"validation_file": file, "task_name": None, "data_dir": None, "num_eval": None}
    return command(**(files | {"model_name": small_model().name} | arguments))


def test_a_label_column_gives_options_and_answers(reviews: Path) -> None:
    task = choose_task(None, None, str(reviews), None, None, Columns("review", "stars"))
    _, samples = load_samples(task, None)
    assert not task.generation and {sample.candidates for sample in samples} == {("1", "2")}
    assert [sample.correct for sample in samples] == [("2",), ("1",), ("2",)]
    assert task.prompt(samples[0]) + task.option(samples[0], "2") == "A warm, funny film. 2"


def test_a_template_puts_columns_together(reviews: Path, tmp_path: Path) -> None:
    columns = Columns(label="stars", template="{title}: {review}\\nStars:")
    task = choose_task(None, None, str(reviews), None, None, columns)
    _, samples = load_samples(task, None)
    assert task.prompt(samples[1]) == "Down: Two hours of nothing.\nStars:"
    # Beside a column answer alone the answers are generated.
    rows = write(tmp_path / "q.jsonl", [{"n": 3, "answer": "three"}, {"n": 4, "answer": ["four"]}])
    task = choose_task(None, None, str(rows), None, None, Columns(template="Spell {n}:"))
    _, samples = load_samples(task, None)
    assert task.generation and task.prompt(samples[0]) == "Spell 3:"
    assert [sample.correct for sample in samples] == [("three",), ("four",)]


def test_labels_are_those_of_the_training_file(reviews: Path, tmp_path: Path) -> None:
    """Nor is a label the number of a class, or another column's answer one of these."""
    other, failures = tmp_path / "other.csv", []
    for cells, columns, message in (
        ("review,stars\nGood.,3", Columns("review", "stars"), r":2: the label is '3': expected"),
        ("review,stars\nGood.,0", Columns("review", "stars"), r":2: the label is '0': expected"),
        (
            "review,answer\nGood.,1",
            Columns("review", "stars"),
            r":2: no column stars; found review$",
        ),
        ("title,answer\nGood.,1", Columns("title", answer="review"), r":2: no column review;"),
    ):
        other.write_text(f"{cells}\n")
        task = choose_task(None, str(reviews), str(other), None, None, columns)
        try:
            load_samples(task, None)
        except InputError as error:
            failures += [] if re.search(message, str(error)) else [str(error)]
        else:
            failures.append(cells)
    assert not failures


def test_text_and_label_need_no_argument(tmp_path: Path) -> None:
    """Nor a comma between them, nor are a spreadsheet's empty rows examples."""
    for content in (
        'text,label\n"Warm, funny.",good\nDull.,bad\n,\n',
        "\ufefftext;label\r\nWarm, funny.;good\r\nDull.;bad\r\n;\r\n",
        "id\ttext\tlabel\n1\tWarm, funny.\tgood\n2\tDull.\tbad\n",
    ):
        (tmp_path / "rows.csv").write_text(content, encoding="utf-8", newline="")
        task = choose_task(None, None, str(tmp_path / "rows.csv"), None)
        _, samples = load_samples(task, None)
        assert [task.prompt(sample) for sample in samples] == ["Warm, funny.", "Dull."]
        assert [sample.candidates for sample in samples] == [("bad", "good")] * 2
        assert [sample.correct for sample in samples] == [("good",), ("bad",)]
    # Beside an answer, text and label are columns as any other.
    file = write(tmp_path / "rows.jsonl", [{"text": "Two?", "label": 2, "answer": "two"}])
    task = choose_task(None, None, str(file), None)
    assert task.generation and load_samples(task, None)[1][0].correct == ("two",)


def test_a_model_reads_words_for_numbers(
    reviews: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    columns = Columns("review", "stars", words="1=terrible,2 = great")
    task = choose_task(None, None, str(reviews), None, None, columns)
    _, samples = load_samples(task, None)
    assert [sample.correct for sample in samples] == [("great",), ("terrible",), ("great",)]
    assert task.option(samples[0], "great") == " great" and not caplog.text
    argv = own(reviews, text_column="review", label_column="stars", label_words=columns.words)
    written = {"predictions_file": tmp_path / "p.jsonl", "result_file": tmp_path / "r.json"}
    finish([*argv, *(str(word) for n, v in written.items() for word in (f"--{n}", v))])
    for row in read(tmp_path / "p.jsonl"):  # in the file's own labels
        assert row["options"] == ["1", "2"] and row["prediction"] in ("1", "2")
    load_samples(
        choose_task(None, None, str(reviews), None, None, Columns("review", "stars")), None
    )
    assert "the labels are numbers, 1, 2: --label_words 1=WORD,2=WORD gives" in caplog.text
    for words in ("terrible,great", "1=terrible", "1=great,2=great", "1=great,2=", "1=a,2=b,3=c"):
        columns = Columns("review", "stars", words=words)
        with pytest.raises(InputError, match=r"give each label a word of its own, 1=…,2=…"):
            choose_task(None, None, str(reviews), None, None, columns)
    with pytest.raises(InputError, match="has no --label_column"):
        choose_task(None, None, str(reviews), None, None, Columns("review", words="1=a,2=b"))


def labels_of(file: Path, text: str = "text", label: str = "label") -> tuple[Any, list[Any]]:
    """The options, and the right one of every row."""
    _, samples = load_samples(
        choose_task(None, None, str(file), None, None, Columns(text, label)), None
    )
    assert len({sample.candidates for sample in samples}) == 1
    return samples[0].candidates, [sample.correct[0] for sample in samples]


def test_labels_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    rows = [{"text": f"Number {n}.", "label": n} for n in (10, 2, 0, -1)]
    numbers = (("-1", "0", "2", "10"), ["10", "2", "0", "-1"])
    assert labels_of(write(tmp_path / "rows.jsonl", rows)) == numbers
    csv = tmp_path / "rows.csv"
    csv.write_text("text, label\n" + "".join(f"{row['text']}, {row['label']}\n" for row in rows))
    assert labels_of(csv) == numbers
    # pandas makes fractions of whole numbers where another row has none.
    assert (
        labels_of(
            write(tmp_path / "rows.jsonl", [{**row, "label": float(row["label"])} for row in rows])
        )
        == numbers
    )
    # Scores, of which most rows have one of their own, are no classes.
    write(tmp_path / "rows.jsonl", [{"text": "a", "label": n / 8} for n in range(40)])
    with pytest.raises(InputError, match=r"40 different numbers in the 40 rows .* is a class"):
        labels_of(tmp_path / "rows.jsonl")
    csv.write_text('text, label\nA film, "great"\nOne more, bad\n')
    assert labels_of(csv) == (("bad", "great"), ["great", "bad"])


def test_a_row_without_a_label_is_named(tmp_path: Path) -> None:
    for missing in (float("nan"), float("inf"), None, " ", [1]):
        rows = [
            {"text": "a", "label": 1.0},
            {"text": "b", "label": 0.0},
            {"text": "c", "label": missing},
        ]
        file = write(tmp_path / "rows.jsonl", rows)
        with pytest.raises(
            InputError, match=r"rows\.jsonl:3: the (label|value) is .*expected a text"
        ):
            labels_of(file)
    # All of the first file are counted.
    write(file, [*rows[:2], *({"text": "c", "label": " "} for _ in range(5))])
    said = r"jsonl:3: the label is ' ': .*; fill it in, or delete the row \(5 rows: .*l:5, …\)$"
    with pytest.raises(InputError, match=said):
        labels_of(file)
    # A text of JSON stays a text.
    rows[2] = {"text": "c", "label": "nan"}
    assert labels_of(write(tmp_path / "rows.jsonl", rows))[0] == ("0", "1", "nan")
    csv = tmp_path / "rows.csv"
    csv.write_text("text,label\na,good\nb,bad\nc,nan\n")
    with pytest.raises(InputError, match=r"rows\.csv:4: the label is nan: expected a text"):
        labels_of(csv)


def test_odd_parquet_files(tmp_path: Path) -> None:
    """Other programs' metadata name no classes; texts and labels are UTF-8."""
    file = tmp_path / "rows.parquet"
    names = '{"info": {"features": {"label": {"names": ["sad", "glad"]}}}}'
    for metadata in ("[]", "{", "null", '{"info": null}', names.replace('["sad", "glad"]', "null")):
        table = pyarrow.table({"text": ["a", "b"], "label": [0, 1]})
        table = table.replace_schema_metadata({"huggingface": metadata})
        pyarrow.parquet.write_table(table, file)
        assert labels_of(file) == (("0", "1"), ["0", "1"]), metadata
    # pandas makes fractions of the numbers of classes.
    table = pyarrow.table({"text": ["a", "b"], "label": [0.0, 1.0]})
    pyarrow.parquet.write_table(table.replace_schema_metadata({"huggingface": names}), file)
    assert labels_of(file) == (("sad", "glad"), ["sad", "glad"])
    one = {"huggingface": names.replace('["sad", "glad"]', '["0"]')}
    pyarrow.parquet.write_table(table.replace_schema_metadata(one), file)
    with pytest.raises(InputError, match=r"--label_column label: all rows of .* have '0' there"):
        labels_of(file)
    no_text = pyarrow.Array.from_buffers(pyarrow.string(), 1, pyarrow.array([b"\xff"]).buffers())
    for labels, message in (
        (pyarrow.array([b"x"]), r"row 0 .*the label is b'x': expected a text"),
        (no_text, r"rows\.parquet: not a Parquet file \('utf-8' codec"),
    ):
        pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "label": labels}), file)
        with pytest.raises(InputError, match=message):
            labels_of(file)


def test_class_labels_of_parquet_have_names(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    kinds = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["sad", "glad"])}
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
    file = tmp_path / "rows.parquet"
    datasets.Dataset.from_list(rows, datasets.Features(kinds)).to_parquet(file)
    assert labels_of(file) == (("sad", "glad"), ["glad", "sad"])
    datasets.Dataset.from_list([{"text": "a", "label": -1}], datasets.Features(kinds)).to_parquet(
        file
    )
    with pytest.raises(InputError, match=r"row 0 .*the label is -1: expected one of"):
        labels_of(file)


def test_a_column_of_generated_answers(tmp_path: Path) -> None:
    rows = [{"instruction": "Name one.", "input": "A town.", "output": "Paris"}]
    alpaca = Columns(template="{instruction} {input}", answer="output")
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "rows.csv").write_text(
        "instruction,input,output\nName one.,A town.,\"['Paris']\"\n"
    )
    for name in ("rows.json", "rows.csv"):
        task = choose_task(None, None, str(tmp_path / name), None, None, alpaca)
        _, (sample,) = load_samples(task, None)
        assert (task.prompt(sample), sample.correct) == ("Name one. A town.", ("Paris",))
    (tmp_path / "new.csv").write_text("instruction,input\nName one.,A sea.\n")
    (question,) = read_samples(task, tmp_path / "new.csv", with_answers=False)
    assert task.prompt(question) == "Name one. A sea." and question.correct == ()


def test_bad_columns(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("title,review,same\nA,B,1\nC,D,1\n")
    for columns, said in (
        (Columns(text="revue"), "rows.csv: --text_column: no column 'revue'; there are title, rev"),
        (Columns(label="label"), "--label_column: no column 'label'"),
        (Columns(template="{text}"), "--prompt_template: no column 'text'"),
        (
            Columns(template="{review"),
            "--prompt_template '{review': name a column in braces, ",
        ),
        (Columns(answer="out"), "--answer_column: no column 'out'"),
        (Columns("same", "same"), "the prompt has the column 'same', which is its answer"),
        (Columns(label="same", template="{same}"), "the prompt has the column 'same'"),
        (Columns("review", "same"), "--label_column same: all rows of .* have '1'"),
    ):
        with pytest.raises(InputError, match=said):
            choose_task(None, None, str(file), None, None, columns)


def test_refusals(reviews: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        ({"text_column": "review", "prompt_template": "{review}"}, "exclude each other"),
        ({"predict_file": reviews}, "give --predictions_file, for the answers"),
        (
            {"trainer": "zo", "num_train": 2, "predict_file": reviews, "predictions_file": "b"},
            "train with --save_model first",
        ),
        ({"label_column": None}, "no column label (or answer); found title, review, stars"),
    ):
        argv = own(reviews, **({"text_column": "review", "label_column": "stars"} | arguments))
        assert said in refused_line(argv, capsys)


# -------------------------------------------------------------------------------------- messages


def conversation(*contents: str) -> dict[str, Any]:
    roles = ("user", "assistant") * 3
    return {"messages": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]}


def test_the_last_turn_of_a_conversation_is_its_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save(tmp_path / "model", TEMPLATE)
    rows = [conversation("Hi", "Hello", "Who?", "Me"), conversation("Sum?", "Four")]
    rows[1]["messages"].insert(0, {"role": "system", "content": "Count."})
    file = write(tmp_path / "rows.jsonl", rows)
    argv = own(file, model_name=model, result_file=tmp_path / "r.json", max_new_tokens=2)
    assert run.main(argv) == 2
    assert "has messages: add --apply_chat_template" in capsys.readouterr().err
    finish([*argv, "--apply_chat_template", "--system_prompt", "Be brief.", "--verbose"])
    out = capsys.readouterr().out
    first = "<system>\nBe brief.<end>\n<user>\nHi<end>\n<assistant>\nHello<end>\n<user>\nWho?<end>"
    assert first in out and "Be brief.<end>\n<system>" not in out
    assert "<system>\nCount.<end>\n<user>\nSum?<end>\n<assistant>\n" in out
    assert "correct: Me" in out and "correct: Four" in out
    file = write(
        tmp_path / "options.jsonl", [conversation("Sum?", "no") | {"options": ["no", "yes"]}]
    )
    task = choose_task(None, None, str(file), None)
    tokenizer = AutoTokenizer.from_pretrained(model)
    encoder = Encoder(task, tokenizer, 100, 0, Chat(tokenizer))
    (sample,) = read_samples(task, file)
    for content_free in (False, True):
        (first, _) = encoder.options(sample, content_free=content_free).options
        assert ("Sum?" in tokenizer.decode(first.tokens)) is not content_free


def test_conversations_of_sharegpt(tmp_path: Path) -> None:
    turns = [("system", "Count."), ("human", "Sum?"), ("gpt", "Four")]
    said = [{"from": role, "value": content} for role, content in turns]
    task = choose_task(None, None, str(write(tmp_path / "r.json", [{"conversations": said}])), None)
    _, (sample,) = load_samples(task, None)
    assert task.generation and sample.correct == ("Four",)
    assert task.messages(task.prompt(sample), sample) == [
        {"role": "system", "content": "Count."},
        {"role": "user", "content": "Sum?"},
    ]


def test_bad_messages_are_told_by_their_line(tmp_path: Path) -> None:
    for messages, said in (
        ([], "messages is []: expected a list of"),
        ([{"role": "user"}], "expected a list of"),
        ([{"role": "assistant", "content": "a"}], "the last turns have to be the user's"),
        ([{"role": "user", "content": "a"}], "the last turn is not the assistant's answer"),
        ("text", "expected a list of"),
    ):
        file = write(tmp_path / "rows.jsonl", [conversation("a", "b"), {"messages": messages}])
        task = choose_task(None, None, str(file), None)
        with pytest.raises(InputError) as refusal:
            load_samples(task, None)
        assert str(refusal.value).startswith(f"{file}:2: ") and said in str(refusal.value)


# ------------------------------------------------------------------------ rows without an answer


def test_answers_to_rows_without_any(
    reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "new.csv"
    # Labels of rows to answer may be other ones, or none.
    rows.write_text("review,stars\n" + "".join(f"Number {n}.,{'x' * n}\n" for n in range(5)))
    labels = {"text_column": "review", "label_column": "stars", "train_file": reviews}
    predicted = {"validation_file": reviews, "predict_file": rows, "num_train": 2}
    files = {"predictions_file": tmp_path / "p.jsonl"}
    argv = own(reviews, **labels, **predicted, **files)
    assert run.main(argv) == 0
    first, code, last = capsys.readouterr().out.splitlines()
    assert first.startswith("next, ") and code.startswith("  python -c 'from transformers")
    assert last == f"predictions: {tmp_path / 'p.jsonl'} (5 rows)"
    found = read(tmp_path / "p.jsonl")
    assert [row["id"] for row in found] == [0, 1, 2, 3, 4]
    for row in found:
        assert row["options"] == ["1", "2"]
        assert row["prediction"] == row["options"][row["scores"][1] > row["scores"][0]]
    before = contents(tmp_path)
    assert run.main(argv) == 2 and "it is there already" in capsys.readouterr().err
    assert contents(tmp_path) == before
    assert run.main([*argv, "--overwrite_output_dir"]) == 0


def test_answers_are_those_of_an_evaluation(tmp_path: Path) -> None:
    """The same rows with their answers, evaluated."""
    for task in ("Copa", "ReCoRD", "SQuAD", "BoolQ"):
        folder = tmp_path / task
        folder.mkdir()
        rows = read(SAMPLES / task.lower() / "validation.jsonl")[:6]
        for name in ("train", "validation"):
            write(folder / f"{name}.jsonl", rows)
        model = {"model_name": small_model().name, "data_dir": tmp_path, "num_eval": None}
        model |= {"max_new_tokens": 3} if task == "SQuAD" else {}
        answers, result = folder / "a.jsonl", folder / "r.json"
        finish(command(task, **model, predictions_file=answers, result_file=result))
        column = get_task(task).answer_column
        bare = [{name: value for name, value in row.items() if name != column} for row in rows]
        files = {"predict_file": write(folder / "bare.jsonl", bare)}
        files["predictions_file"] = folder / "b.jsonl"
        assert run.main(command(task, **model, **files)) == 0
        evaluated = {row["id"]: row for row in read(answers)}
        for row in read(folder / "b.jsonl"):
            expected = evaluated[row["id"]]
            assert row["prediction"] == expected["prediction"] and "correct" not in row
            if task != "SQuAD":
                assert row["scores"] == pytest.approx(expected["scores"], abs=1e-5)


def test_a_predict_file_alone_is_a_task(tmp_path: Path) -> None:
    rows = [
        {"prompt": "It was", "options": ["good", "bad"]},
        {"prompt": "So", "options": ["a", "b", "c"]},
    ]
    file = write(tmp_path / "rows.jsonl", rows)
    answers = {"predict_file": file, "predictions_file": tmp_path / "p.jsonl"}
    assert run.main(own(file, **answers, validation_file=None)) == 0
    assert [len(row["scores"]) for row in read(tmp_path / "p.jsonl")] == [2, 3]
    task = choose_task(None, None, str(file), None)
    with pytest.raises(InputError, match="has no rows"):
        read_samples(task, write(tmp_path / "empty.jsonl", []))


def test_columns_that_predictions_would_take(
    reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = tmp_path / "new.csv"
    new.write_text("review,prediction\nA lovely story.,mine\n")
    labels = {"text_column": "review", "label_column": "stars", "train_file": reviews}
    files = {"predict_file": new, "predictions_file": tmp_path / "p.csv", "validation_file": None}
    said = f"{new}: rename its column 'prediction'"
    assert said in refused_line(own(reviews, **labels, **files), capsys, tmp_path)
    new.unlink()
    said = f"--predict_file {new}: there is no such file"
    assert said in refused_line(own(reviews, **labels, **files), capsys, tmp_path)


# ------------------------------------------------------------------------- the walk of own-data.md


def test_films_are_what_their_script_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "data"))
    make_films = importlib.import_module("make_films")
    monkeypatch.setattr(make_films, "FOLDER", tmp_path)
    make_films.main()
    for name in ("films.csv", "new.csv"):
        kept = ROOT / "examples" / "films" / name
        assert (tmp_path / name).read_bytes() == kept.read_bytes()


def test_a_csv_file_becomes_a_model_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each command is the one that the last one printed."""
    monkeypatch.chdir(tmp_path)
    films = ROOT / "examples" / "films"
    folder = tmp_path / "my model"
    argv = ["--script", "broadcast.sh", "--train_file", str(films / "films.csv")]
    assert run.main([*argv, "--save_model", "--output_dir", str(folder)]) == 0
    *_, said, line, place = capsys.readouterr().out.splitlines()
    assert said == "next, with a file of rows without answers in place of films.csv:"
    result = json.loads(Path(place.removeprefix("result: ")).read_text())
    assert result["metric_before_training"]["accuracy"] < 0.8 and result["accuracy"] > 0.95
    python, script, *argv = shlex.split(line)
    assert Path(script) == ROOT / "run.py" and shutil.which(python)
    argv[argv.index("--predict_file") + 1] = str(films / "new.csv")
    assert run.main(argv) == 0
    _, line, place = capsys.readouterr().out.splitlines()
    with Path(place.split()[1]).open(newline="") as file:
        rows = list(csv.DictReader(file))
    with (films / "new.csv").open(newline="") as file:
        assert [{n: row[n] for n in ("id", "cinema", "text")} for row in rows] == [
            *csv.DictReader(file)
        ]
    assert {row["prediction"] for row in rows} == {"terrible", "great"}
    code = shlex.split(line)[2]
    exec(code)
    ((text,),) = [each.values() for each in ast.literal_eval(capsys.readouterr().out)]
    assert text == f"{rows[0]['text']} {rows[0]['prediction']}"


# --------------------------------------------------------------------------- a merged model in use


def test_a_merged_model_is_what_its_adapter_was(tmp_path: Path) -> None:
    lora = {"lora": True, "learning_rate": 1e-1, "zo_eps": 1e-2, "save_model": True}
    result = finish(training(tmp_path / "a", **lora, no_eval=None))
    merged = finish(training(tmp_path / "b", **lora, no_eval=None, merge_adapter=True))
    assert merged["experiment"] == result["experiment"] and merged["metric"] == result["metric"]
    assert (tmp_path / "a/out/adapter_model.safetensors").is_file()
    files = {path.name for path in (tmp_path / "b/out").iterdir() if path.is_file()}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= files
    assert "adapter_config.json" not in files
    rows = []
    for name in ("a", "b"):
        answers = {
            "predictions_file": tmp_path / f"{name}.jsonl",
            "predict_file": SAMPLES / "sst2/validation.jsonl",
        }
        assert run.main(command(model_name=tmp_path / name / "out", num_eval=None, **answers)) == 0
        rows.append([score for row in read(tmp_path / f"{name}.jsonl") for score in row["scores"]])
    assert rows[0] == pytest.approx(rows[1], abs=1e-4)
    original = AutoModelForCausalLM.from_pretrained(small_model().name)
    changed = AutoModelForCausalLM.from_pretrained(tmp_path / "b/out")
    names = {
        n for n, p in changed.named_parameters() if not torch.equal(p, original.get_parameter(n))
    }
    assert names and all(name.endswith(("q_proj.weight", "v_proj.weight")) for name in names)
    generate = pipeline("text-generation", model=str(tmp_path / "b/out"))
    assert generate("It was", max_new_tokens=2)[0]["generated_text"].startswith("It was")
    # The run that is done merges what it has, in the adapter's place.
    finish(training(tmp_path / "a", **lora, no_eval=None, merge_adapter=True))
    assert not list((tmp_path / "a/out").glob("adapter_*"))
    assert_same_tensors(weights(tmp_path / "a/out"), weights(tmp_path / "b/out"))


# ------------------------------------------------------------------------------------ the terminal


def test_the_end_of_a_run_is_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    curve = {"num_dev": 4, "eval_before_training": True, "no_eval": None}
    result = finish(training(tmp_path, **curve))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("result: ")
    place = next(number for number, line in enumerate(lines) if "  forward passes" in line)
    names, values = lines[place : place + 2]
    assert len(names) == len(values) and names.split()[:2] == ["before", "accuracy"]
    cells = [cell.strip() for cell in values.split("  ") if cell.strip()]
    metrics = [result[k]["accuracy"] for k in ("metric_before_training", "dev_metric", "metric")]
    assert cells[:5] == [*(f"{value:.4f}" for value in metrics), "6", "19"]
    assert cells[-1].endswith("MiB")
