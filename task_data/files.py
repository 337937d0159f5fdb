"""Rows of JSON Lines, CSV and Parquet files, and what the rows of the user's own files mean.

Every row comes with the place that an error names.
"""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from utils import InputError, first_line

if TYPE_CHECKING:
    import pyarrow.parquet

Row = Mapping[str, Any]

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


class PlacedRow(NamedTuple):
    """A row and where it stands: ``path:line``, or ``path, row N`` where there are no lines."""

    place: str
    row: Row


class Table(NamedTuple):
    """A file's columns, where they are named (in the first row of JSON Lines), and its rows."""

    place: str
    columns: tuple[str, ...]
    rows: Iterator[PlacedRow]


# Files are read with json, csv and pyarrow, the reader inside datasets, and not with load_dataset:
# that takes a second more for 700 rows (its import and its conversion) and writes a copy into a
# cache.


def read_table(path: Path, wanted: Collection[str] | None) -> Table:
    """Open a file of one of ``SUFFIXES``; the rows are read as they are asked for.

    Rows of JSON Lines may lack columns of the first row. A CSV file's cells are texts. Of Parquet
    only the ``wanted`` columns are read, all of them if it is None.

    Raises:
        InputError: the file is empty or malformed; also while the rows are read.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet_table(path, wanted)
    return _csv_table(path) if suffix == ".csv" else _json_table(path)


def no_rows(source: object) -> InputError:
    """Return the error of a file or split without examples."""
    return InputError(f"{source} has no rows: give at least one example")


def _json_table(path: Path) -> Table:
    rows = _json_rows(path)
    first = next(rows, None)
    if first is None:
        raise no_rows(path)
    return Table(first.place, tuple(first.row), itertools.chain([first], rows))


def _json_rows(path: Path) -> Iterator[PlacedRow]:
    for number, line in enumerate(_lines(path, newline=None), start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{place}: not JSON ({first_line(error)}); give one JSON object on each line"
            ) from error
        if not isinstance(row, dict):
            raise InputError(f"{place}: expected a JSON object, one on each line")
        yield PlacedRow(place, row)


def _csv_table(path: Path) -> Table:
    records = _csv_records(path)
    place, header = next(records, (None, ()))
    if place is None:
        raise no_rows(path)
    columns = tuple(name.strip() for name in header)
    twice = next((name for name in columns if columns.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{place}: two columns are called {twice!r}; rename one")
    return Table(place, columns, _csv_rows(columns, records))


def _csv_rows(
    columns: tuple[str, ...], records: Iterator[tuple[str, list[str]]]
) -> Iterator[PlacedRow]:
    for place, cells in records:
        if len(cells) != len(columns):
            raise InputError(
                f"{place}: {len(cells)} cells for the {len(columns)} columns "
                f"{', '.join(columns)}; put quotes around a text with commas, quotes or lines"
            )
        yield PlacedRow(place, dict(zip(columns, cells, strict=True)))


def _csv_records(path: Path) -> Iterator[tuple[str, list[str]]]:
    # The limit of the module, 128 KiB, is shorter than some prompts.
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(_lines(path, newline=""), strict=True)
    while True:
        # A quoted text may go over several lines: the record's first one is named.
        place = f"{path}:{reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise InputError(f"{place}: not CSV ({first_line(error)}); check its quotes") from error
        if cells:
            yield place, cells


def _lines(path: Path, newline: str | None) -> Iterator[str]:
    """Yield the lines of a text file, without the mark that some editors put before the first."""
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as lines:
            yield from lines
    except UnicodeDecodeError as error:
        place = f"{path}:{_first_line_that_is_not_utf8(path)}"
        raise InputError(f"{place}: not UTF-8 text ({error.reason}); save it as UTF-8") from error


def _first_line_that_is_not_utf8(path: Path) -> int:
    # The error's own position counts from the start of a block, not of the file.
    data = path.read_bytes()
    try:
        data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        data = data[: error.start]
    return data.count(b"\n") + 1


def _parquet_table(path: Path, wanted: Collection[str] | None) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        columns = tuple(file.schema_arrow.names)
    except (pyarrow.ArrowException, OSError) as error:
        raise _not_parquet(path, error) from error
    read = [name for name in columns if wanted is None or name in wanted]
    return Table(str(path), columns, _parquet_rows(path, file, read))


def _parquet_rows(
    path: Path, file: pyarrow.parquet.ParquetFile, columns: list[str]
) -> Iterator[PlacedRow]:
    import pyarrow

    numbers = itertools.count()
    try:
        with file:
            for batch in file.iter_batches(columns=columns):
                for row in batch.to_pylist():
                    yield PlacedRow(row_place(path, next(numbers)), row)
    except (pyarrow.ArrowException, OSError) as error:
        raise _not_parquet(path, error) from error


def row_place(source: object, index: int) -> str:
    """Return the place of a row in a table without lines."""
    return f"{source}, row {index} (the first is row 0)"


def _not_parquet(path: Path, error: Exception) -> InputError:
    return InputError(f"{path}: not a Parquet file ({first_line(error)})")


# ------------------------------------------------------------- prompt, options and answer of a row


def typed_choice(row: Row) -> Row:
    """Return a row of CSV, whose cells are all text, with a list of options and maybe an index.

    Raises:
        InputError: the options are no JSON list.
    """
    options = _json_list(row["options"])
    if options is None:
        raise InputError(
            f"options is {shown(row['options'])}: expected a JSON list of texts, as in "
            '["yes", "no"]'
        )
    answer = row["answer"]
    # An option that looks like a number is meant by its text.
    if answer not in options:
        answer = {str(index): index for index in range(len(options))}.get(answer, answer)
    return {**row, "options": options, "answer": answer}


def typed_answer(row: Row) -> Row:
    """Return a row of CSV, whose cells are all text, with a list of answers if it is JSON."""
    answers = _json_list(row["answer"])
    return row if answers is None else {**row, "answer": answers}


def check_prompt(row: Row) -> None:
    """Refuse a prompt that is no text, or empty.

    Raises:
        InputError: it is.
    """
    _check_text(row["prompt"], "prompt")


def check_choice(row: Row) -> tuple[tuple[str, ...], str]:
    """Return the options and the right one, which the row names by its text or its index.

    Raises:
        InputError: the prompt or an option is no text or empty, there are fewer than two different
            options, or the answer is none of them.
    """
    check_prompt(row)
    options, answer = row["options"], row["answer"]
    if not isinstance(options, list) or len(options) < 2:
        raise InputError(
            f"options is {shown(options)}: expected a list of at least 2 texts; without options in "
            "any row the answers are generated"
        )
    for option in options:
        _check_text(option, "one of the options")
    # Spaces around an option are not always part of what is scored.
    if len({option.strip() for option in options}) < len(options):
        raise InputError(f"options is {shown(options)}: the same text twice; leave one out")
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(options):
        answer = options[answer]
    if answer not in options:
        raise InputError(
            f"answer is {shown(answer)}: expected one of the options {shown(options)}, or its "
            f"number from 0 to {len(options) - 1}"
        )
    return tuple(options), answer


def check_answers(row: Row) -> tuple[str, ...]:
    """Return the acceptable answers, each once.

    Raises:
        InputError: the prompt or an answer is no text or empty, or there is no answer.
    """
    check_prompt(row)
    answers = row["answer"]
    if isinstance(answers, str):
        answers = [answers]
    if not isinstance(answers, list) or not answers:
        raise InputError(
            f"answer is {shown(answers)}: expected a text or a list of texts (the number of an "
            "option needs the column options)"
        )
    for answer in answers:
        _check_text(answer, "answer")
    return tuple(dict.fromkeys(answers))


def shown(value: Any) -> str:
    """Return a value as an error's one line shows it."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _check_text(value: Any, column: str) -> None:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{column} is {shown(value)}: expected a text that is not empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        # JSON may have half of a character, as in "\ud83d"; a tokenizer takes whole ones.
        raise InputError(
            f"{column} is {shown(value)}: half a character; repair the text"
        ) from error


def _json_list(cell: str) -> list[Any] | None:
    """Return the JSON list that a cell of CSV holds, None if it is another text."""
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, list) else None
