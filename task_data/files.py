"""Rows of JSON Lines, CSV and Parquet files, each with the place that an error names.

What is wrong in a file is an InputError, here and in all of task_data.

Read with json, csv and pyarrow. ``datasets``, which wraps pandas and pyarrow, turns JSON texts that
look like dates into dates, shifts the cells of a CSV row with a comma too many, fills up a row that
is too short, and takes two seconds to start.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks import listed
from templates import Row
from utils import InputError, first_line

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
# Cells of CSV in which Python and pandas write that there is no value.
MISSING = dict.fromkeys(("nan", "NaN"), math.nan)

PlacedRow = tuple[str, Row]


def read_rows(path: Path) -> Iterator[PlacedRow]:
    """Yield a file's rows, each with its place: ``path:line``, or ``path, row N``.

    The cells of a CSV file are texts, or NaN.
    """
    readers = {".parquet": _parquet_rows, ".csv": _csv_rows}
    row = None
    for row in readers.get(path.suffix.lower(), _json_rows)(path):
        yield row
    if row is None:
        raise InputError(f"{path} has no rows: give at least one example")


def row_place(source: object, index: int) -> str:
    """Return the place of a row in a table without lines."""
    return f"{source}, row {index} (the first is row 0)"


@contextlib.contextmanager
def errors_name(place: object) -> Iterator[None]:
    """Put the place of a row before what is wrong with it."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{place}: {error}") from error


def own_file(option: str, name: str | None) -> Path | None:
    """Return a file of the user's own that can be read; None if none is given."""
    if not name:
        return None
    if Path(name).suffix.lower() not in SUFFIXES:
        raise InputError(f"{option} {name}: give a file that ends in {', '.join(SUFFIXES)}")
    if not os.path.isfile(name) or not os.access(name, os.R_OK):
        raise InputError(f"{option} {name}: there is no such file, or it cannot be read")
    return Path(name)


def _text(path: Path) -> str:
    """Return the text of a file without the byte order mark that some editors write."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: not UTF-8 ({error.reason}); save it as UTF-8") from error


def _json_rows(path: Path) -> Iterator[PlacedRow]:
    text = _text(path)
    if text.lstrip().startswith("["):  # One array in place of an object on each line.
        placed = ((row_place(path, i), row) for i, row in enumerate(_json(text, path)))
    else:
        lines = ((f"{path}:{i}", line) for i, line in enumerate(text.split("\n"), start=1))
        placed = ((place, _json(line, place)) for place, line in lines if line.strip())
    for place, row in placed:
        if not isinstance(row, dict):
            raise InputError(f"{place}: expected a JSON object, one on each line")
        yield place, row


def _json(text: str, place: object) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        said = f"not JSON ({first_line(error)}); give one JSON object on each line"
        raise InputError(f"{place}: {said}") from error


def _csv_rows(path: Path) -> Iterator[PlacedRow]:
    csv.field_size_limit(2**31 - 1)  # The module's limit, 128 KiB, is shorter than some prompts.
    # Without skipinitialspace the quotes of `text, "label"` would be part of the label.
    text = _text(path)
    header = text.partition("\n")[0]
    # Spreadsheets of many languages, whose numbers have commas, write semicolons.
    delimiter = "," if "," in header else next((each for each in ";\t" if each in header), ",")
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, strict=True, skipinitialspace=True, delimiter=delimiter)
    columns: list[str] = []
    try:
        for cells in filter(any, reader):  # a spreadsheet's empty rows are commas
            place = f"{path}:{reader.line_num}"
            if not columns:
                columns = [name.strip() for name in cells]
                name, count = Counter(columns).most_common(1)[0]
                if count > 1:
                    raise InputError(f"{place}: two columns are called {name!r}; rename one")
            elif len(cells) != len(columns):
                raise InputError(
                    f"{place}: {len(cells)} cells for the {len(columns)} columns "
                    f"{listed(columns)}; put quotes around a text with commas, quotes or lines"
                )
            else:
                yield place, dict(zip(columns, (MISSING.get(c, c) for c in cells), strict=True))
    except csv.Error as error:
        said = f"not CSV ({first_line(error)}); check its quotes"
        raise InputError(f"{path}:{reader.line_num}: {said}") from error


def _parquet_rows(path: Path) -> Iterator[PlacedRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            batches = (batch.to_pylist() for batch in file.iter_batches())
            for index, row in enumerate(itertools.chain.from_iterable(batches)):
                yield row_place(path, index), row
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        # ValueError: of texts that are no UTF-8, or days that Python does not have.
        raise InputError(f"{path}: not a Parquet file ({first_line(error)})") from error
