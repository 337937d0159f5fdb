"""The eleven tasks: samples, loading, and the one-line errors of bad input."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from task_data.loading import load_samples
from tasks import TASKS, Sample, get_task
from utils import InputError

SAMPLES_DIR = Path(__file__).parent.parent / "data" / "samples"

# One row of each task in the Hub's schema, with its candidates and correct answers.
EXAMPLES = {
    "SST2": ({"sentence": "fine ", "label": 1, "idx": 0}, (0, 1), (1,)),
    "RTE": ({"premise": "P.", "hypothesis": "H.", "idx": 0, "label": 0}, (0, 1), (0,)),
    "CB": ({"premise": "P.", "hypothesis": "h", "idx": 0, "label": 2}, (0, 1, 2), (2,)),
    "BoolQ": ({"question": "is it", "answer": False, "passage": "P."}, (True, False), (False,)),
    "WSC": (
        {"text": "She left.", "span1_text": "Ann", "span2_text": "She", "label": 1},
        (0, 1),
        (1,),
    ),
    "WIC": ({"word": "bank", "sentence1": "A.", "sentence2": "B.", "label": 0}, (0, 1), (0,)),
    "MultiRC": (
        {"paragraph": "P.", "question": "Q?", "answer": "A", "idx": {"answer": 0}, "label": 1},
        *((0, 1), (1,)),
    ),
    "Copa": (
        {"premise": "P.", "choice1": "One.", "choice2": "Two.", "question": "cause", "label": 1},
        *(("One.", "Two."), ("Two.",)),
    ),
    "ReCoRD": (
        {
            "passage": "Kim met Lee.",
            "query": "@placeholder won.",
            "entities": ["Lee", "Kim", "Lee"],
            "entity_spans": {"text": ["Kim", "Lee"], "start": [0, 8], "end": [3, 11]},
            "answers": ["Kim", "Lee", "Kim"],
        },
        *(("Lee", "Kim"), ("Kim", "Lee")),
    ),
    "SQuAD": (
        {
            **{"id": "x", "title": "T", "context": "C.", "question": "Q?"},
            "answers": {"text": ["9 m", "9", "9 m"], "answer_start": [1, 1, 1]},
        },
        *((), ("9 m", "9")),
    ),
    "DROP": (
        {
            **{"query_id": "q", "passage": "P.", "question": "Q?"},
            "answers_spans": {"spans": ["b", "a", "b"], "types": ["span", "span", "span"]},
        },
        *((), ("b", "a")),
    ),
}


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_parquet(path, rows):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    return message


# ------------------------------------------------------------------------------------------ tasks


def test_the_eleven_tasks():
    assert {name: (task.name, task.hub_path, task.hub_config) for name, task in TASKS.items()} == {
        "SST2": ("SST2", "nyu-mll/glue", "sst2"),
        "RTE": ("RTE", "aps/super_glue", "rte"),
        "CB": ("CB", "aps/super_glue", "cb"),
        "BoolQ": ("BoolQ", "google/boolq", None),
        "WSC": ("WSC", "aps/super_glue", "wsc.fixed"),
        "WIC": ("WIC", "aps/super_glue", "wic"),
        "MultiRC": ("MultiRC", "aps/super_glue", "multirc"),
        "Copa": ("Copa", "aps/super_glue", "copa"),
        "ReCoRD": ("ReCoRD", "aps/super_glue", "record"),
        "SQuAD": ("SQuAD", "rajpurkar/squad", None),
        "DROP": ("DROP", "ucinlp/drop", None),
    }


def test_kinds_of_task():
    generation = {name for name, task in TASKS.items() if task.generation}
    f1 = {name for name, task in TASKS.items() if task.metric_name == "f1"}
    accuracy = {name for name, task in TASKS.items() if task.metric_names == ("accuracy",)}
    assert generation == f1 == {"SQuAD", "DROP"}
    assert accuracy == set(TASKS) - f1


def test_get_task_in_any_case():
    assert get_task("sst2") is get_task("Sst2") is TASKS["SST2"]
    with pytest.raises(InputError) as error:
        get_task("sst-2")
    message = one_line(error)
    assert "'sst-2'" in message
    assert all(name in message for name in TASKS)


def test_sample():
    for name, (row, candidates, correct) in EXAMPLES.items():
        task = TASKS[name]
        sample = task.sample(row, 7)
        assert (sample.id, sample.candidates, sample.correct) == (7, candidates, correct), name
        assert sample.row == row, name
        # BoolQ's labels stay booleans: 1 == True would hide an integer.
        assert [type(value) for value in sample.correct] == [type(value) for value in correct], name
        assert task.prompt(sample) == task.template.prompt(row), name
        assert task.option(sample, correct[0]) == task.template.option(row, correct[0]), name
        without = {column: value for column, value in row.items() if column != task.answer_column}
        question = task.sample(without, 7, with_answer=False)
        assert (question.candidates, question.correct) == (candidates, ()), name
        assert task.prompt(question) == task.prompt(sample), name
        # A checkpoint keeps its task.
        assert pickle.loads(pickle.dumps(task)).sample(row, 7) == sample, name


def test_unusable_rows():
    for name, change, named in (
        ("SST2", {"label": -1}, "label is -1: expected 0 or 1"),
        ("SST2", {"label": None}, "label is None"),
        ("SST2", {"label": "1"}, "label is '1'"),
        ("CB", {"label": 3}, "label is 3: expected 0 or 1 or 2"),
        ("BoolQ", {"answer": None}, "answer is None: expected True or False"),
        ("Copa", {"label": -1}, "label is -1: expected 0 or 1"),
        ("Copa", {"question": "why"}, "question is 'why': expected 'effect' or 'cause'"),
        ("ReCoRD", {"answers": []}, "answers is []"),
        ("ReCoRD", {"entities": "Kim"}, "entities is 'Kim'"),
        ("SQuAD", {"answers": {"text": [], "answer_start": []}}, "answers.text is []"),
        ("SQuAD", {"answers": None}, "answers.text is None"),
        ("DROP", {"answers_spans": {"types": []}}, "answers_spans.spans is None"),
        ("DROP", {"answers_spans": {"spans": [7]}}, "answers_spans.spans is [7]"),
        ("MultiRC", {"paragraph": None}, "paragraph is None: expected a text"),
        ("SST2", {"sentence": 5}, "sentence is 5: expected a text"),
    ):
        with pytest.raises(InputError) as error:
            TASKS[name].sample(EXAMPLES[name][0] | change, 4)
        assert named in one_line(error)


def test_labels_of_another_number_type():
    sample = TASKS["BoolQ"].sample({"question": "q", "answer": 1, "passage": "P."}, 0)
    assert sample.correct[0] is True
    sample = TASKS["Copa"].sample(EXAMPLES["Copa"][0] | {"label": 0.0}, 0)
    assert sample.correct == ("One.",)


def test_scores():
    samples = [TASKS["SST2"].sample({"sentence": "s", "label": label}, 0) for label in (0, 1, 1)]
    assert TASKS["SST2"].score([0, 0, 1], samples) == {"accuracy": pytest.approx(2 / 3)}
    sample = Sample(0, {}, ("Kim", "Lee", "Ann"), ("Kim", "Lee"))
    assert TASKS["ReCoRD"].score(["Lee", "Ann"], [sample, sample]) == {"accuracy": 0.5}
    samples = [Sample(0, {}, (), ("Denver Broncos",)), Sample(1, {}, (), ("8", "seven"))]
    scores = TASKS["DROP"].score([" broncos\n", "Seven."], samples)
    assert scores == {"f1": pytest.approx(5 / 6), "em": 0.5}


# ---------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_load_local_files(suffix, tmp_path):
    write = write_jsonl if suffix == "jsonl" else write_parquet
    for name in ("BoolQ", "ReCoRD", "SQuAD"):
        row, candidates, correct = EXAMPLES[name]
        folder = tmp_path / name.upper()
        write(folder / f"train.{suffix}", [row, row])
        write(folder / f"validation.{suffix}", [row])
        train, validation = load_samples(TASKS[name], str(tmp_path))
        assert [sample.id for sample in train] == [0, 1]
        assert [sample.id for sample in validation] == [0]
        for sample in train + validation:
            assert sample.row == row
            assert (sample.candidates, sample.correct) == (candidates, correct)


def test_loading_leaves_nothing_behind(tmp_path, monkeypatch):
    working = tmp_path / "cwd"
    working.mkdir()
    monkeypatch.chdir(working)
    monkeypatch.setenv("HOME", str(working))
    folder = tmp_path / "data" / "sst2"
    write_jsonl(folder / "train.jsonl", [EXAMPLES["SST2"][0]])
    write_parquet(folder / "validation.parquet", [EXAMPLES["SST2"][0]])
    load_samples(TASKS["SST2"], str(tmp_path / "data"))
    assert list(working.iterdir()) == []
    assert len(list(folder.iterdir())) == 2


def test_reading_data_loads_no_heavy_library():
    code = (
        "import sys, task_data.own_tasks, task_data.sampling, tasks\n"
        "from task_data.loading import load_samples\n"
        "load_samples(tasks.get_task('SST2'), 'data/samples')\n"
        "print({'torch', 'transformers', 'datasets', 'pyarrow', 'pandas'} & {*sys.modules})"
    )
    root = SAMPLES_DIR.parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


@pytest.fixture
def sst2(tmp_path):
    """A folder with good files, for a test to spoil."""
    folder = tmp_path / "sst2"
    for split in ("train", "validation"):
        write_jsonl(folder / f"{split}.jsonl", [{"sentence": "s", "label": 1}])
    return folder


def load_error(folder):
    with pytest.raises(InputError) as error:
        load_samples(TASKS["SST2"], str(folder.parent))
    return one_line(error)


def test_blank_lines_and_unicode(sst2):
    text = '{"sentence": "caf\\u00e9 \N{LINE SEPARATOR} x", "label": 1}\n\n  \n'
    (sst2 / "train.jsonl").write_text(text, encoding="utf-8")
    train, _ = load_samples(TASKS["SST2"], str(sst2.parent))
    assert [sample.row["sentence"] for sample in train] == ["café \N{LINE SEPARATOR} x"]


def test_jsonl_wins_over_parquet(sst2):
    write_parquet(sst2 / "train.parquet", [{"sentence": "other", "label": 0}])
    train, _ = load_samples(TASKS["SST2"], str(sst2.parent))
    assert train[0].row["sentence"] == "s"


def test_missing_folders_and_files(sst2):
    message = load_error(sst2 / "nowhere" / "sst2")
    assert "--data_dir" in message and "nowhere" in message
    (sst2 / "validation.jsonl").unlink()
    message = load_error(sst2)
    assert "validation.jsonl" in message and "validation.parquet" in message
    sst2.rename(sst2.parent / "rte")
    message = load_error(sst2)
    assert "SST2" in message and "found: rte" in message


def test_missing_column(sst2):
    (sst2 / "train.jsonl").unlink()
    # JSON Lines win over Parquet.
    for name, write in (("train.parquet", write_parquet), ("train.jsonl", write_jsonl)):
        write(sst2 / name, [{"text": "s", "label": 1}])
        message = load_error(sst2)
        assert f"{name}" in message and "column 'sentence' is missing" in message
        assert "found text, label" in message


def test_bad_line(sst2):
    for content, named in (
        (b'{"sentence": "s"}\n', "train.jsonl:2: column 'label' is missing"),
        (b'{"sentence": "s", "label": -1}\n', "train.jsonl:2: label is -1"),
        (b'{"sentence": "s", "lab', "train.jsonl:2: not JSON"),
        (b"[1, 2]", "train.jsonl:2: expected a JSON object"),
        (b'{"sentence": "caf\xe9", "label": 1}\n', "train.jsonl:2: not UTF-8"),
    ):
        (sst2 / "train.jsonl").write_bytes(b'{"sentence": "s", "label": 1}\n' + content)
        assert named in load_error(sst2)


def test_row_of_parquet(sst2):
    (sst2 / "validation.jsonl").unlink()
    rows = [{"sentence": "s", "label": 1}, {"sentence": "s", "label": -1}]
    write_parquet(sst2 / "validation.parquet", rows)
    assert "validation.parquet, row 1 (the first is row 0): label is -1" in load_error(sst2)


def test_empty_files(sst2):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (sst2 / "train.jsonl").write_text("\n\n")
    assert "train.jsonl has no rows" in load_error(sst2)
    (sst2 / "train.jsonl").unlink()
    schema = pyarrow.schema([("sentence", pyarrow.string()), ("label", pyarrow.int64())])
    parquet.write_table(schema.empty_table(), sst2 / "train.parquet")
    assert "train.parquet has no rows" in load_error(sst2)
    for content in (b"", b"this is no parquet file at all"):
        (sst2 / "train.parquet").write_bytes(content)
        message = load_error(sst2)
        assert "train.parquet: not a Parquet file" in message


def test_load_from_hub(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*arguments, split):
        asked.append((*arguments, split))
        return [datasets.Dataset.from_list([row, row]), datasets.Dataset.from_list([row])]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("SST2", "BoolQ", "DROP"):
        task = TASKS[name]
        row, candidates, correct = EXAMPLES[name]
        train, validation = load_samples(task, None)
        # The test split, whose labels are hidden, is not asked for.
        assert asked.pop() == (task.hub_path, task.hub_config, ["train", "validation"])
        assert ([s.id for s in train], [s.id for s in validation]) == ([0, 1], [0])
        assert (train[1].candidates, train[1].correct) == (candidates, correct)
        assert train[1].row == row


def test_hub_unreachable(monkeypatch):
    datasets = pytest.importorskip("datasets")
    for kind in (ConnectionError, ValueError, datasets.exceptions.DatasetGenerationError):

        def load_dataset(*arguments, kind=kind, **options):
            raise kind("offline\nand more lines")

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        with pytest.raises(InputError) as error:
            load_samples(TASKS["WSC"], None)
        message = one_line(error)
        for part in ("aps/super_glue (wsc.fixed)", "--data_dir", "offline"):
            assert part in message


def test_bad_rows_of_the_hub(monkeypatch):
    datasets = pytest.importorskip("datasets")
    good = {"sentence": "s", "label": 1}
    for bad, named in (({"label": -1}, "label is -1"), ({"sentence": None}, "sentence is None")):
        splits = [datasets.Dataset.from_list(rows) for rows in ([good], [good, good | bad])]
        monkeypatch.setattr(datasets, "load_dataset", lambda *a, _splits=splits, **k: _splits)
        place = r"nyu-mll/glue \(sst2\) validation, row 1 "
        with pytest.raises(InputError, match=f"{place}.*{named}"):
            load_samples(TASKS["SST2"], None)


@pytest.mark.skipif(not SAMPLES_DIR.is_dir(), reason="data/samples is not there")
def test_bundled_samples():
    for task in TASKS.values():
        train, validation = load_samples(task, str(SAMPLES_DIR))
        for sample in train + validation:
            text = task.prompt(sample) + task.option(sample, sample.correct[0])
            assert text.strip()
            assert len(sample.candidates) != 1
            if not task.generation:
                assert set(sample.correct) & set(sample.candidates)
