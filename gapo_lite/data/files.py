"""Files: .jsonl, .json, .csv, .tsv and .parquet, each also as .gz → numbered rows.

What is wrong with one row becomes a `Problem` with its line; what is wrong with the file as a
whole is a `DataError`. Not read by `datasets.load_dataset`, which gives no line numbers, turns
"NA" into None and an empty file into StopIteration. `pyarrow` is imported by the first .parquet.
The page's server reads here too, so a file of a few MB that unpacks to many GB is refused early.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from gapo_lite.data.formats import COLUMNS
from gapo_lite.data.messages import MESSAGE_KEYS, Row, called
from gapo_lite.errors import DataError
from gapo_lite.types import Problem

NumberedRow = tuple[int, Row] | Problem
"""1-based line and row, or what was wrong with the row."""


class Table(NamedTuple):
    """An opened source; `columns` are those it names apart from its rows (none for text files)."""

    columns: list[str]
    rows: Iterator[NumberedRow]


PROMPT_COLUMNS = ("instruction", "input", "turns", "question_id", "uid", "category", "dataset")
"""Columns that prompts are read from, and no pairs; see prompts.py."""
BATCH_ROWS = 1000
MAX_UNPACKED = 8 * 1024**3
"""Bytes that a .gz file, or what is read of a .parquet file, may unpack to."""
MAX_RECORD = 256 * 1024**2
"""Bytes of one line or record, and of a file that is read whole (.json, .parquet.gz)."""
PIECE = 128 * 1024
"""Bytes that are unpacked at once."""
UTF16_MARKS = [b"\xff\xfe", b"\xfe\xff"]
BLANK = b" \t\r\n\xef\xbb\xbf"
PYTHON_MESSAGES = re.compile(r"\s*\[?\s*\{\s*'(role|content|from|value)'")


def exists(path: Path) -> bool:
    """Whether something is there that we may see."""
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long, a folder closed to us, a NUL in the name
        return False


@contextmanager
def open_table(path: Path) -> Iterator[Table]:
    """Open a file by its ending.

    Raises:
        DataError: it is no ordinary file of a known kind, or empty, unreadable or damaged.
    """
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if not exists(path):
        raise DataError(f"there is no file {path}.")
    if suffix not in READERS or not path.is_file():
        raise DataError(
            f"{str(path)!r} is no file of a kind that can be read. "
            f"Its name should end with {', '.join(READERS)}, or one of these and .gz."
        )
    with _open_bytes(path) as stream:
        yield READERS[suffix](stream, str(path))


@contextmanager
def _open_bytes(path: Path) -> Iterator[Any]:
    """The bytes of a file, unzipped; what goes wrong while they are read is the file's fault."""
    zipped = path.suffix.lower() == ".gz"
    try:
        with (
            gzip.open(path) if zipped else path.open("rb") as source,
            io.BufferedReader(_Bounded(source, str(path), zipped), PIECE) as stream,
        ):
            start = stream.peek(2)[:2]
            if not start:
                raise DataError(f"{str(path)!r} is empty, so there is nothing to load.")
            if start in UTF16_MARKS:
                raise DataError(f"{str(path)!r} is in UTF-16, which is not read: save it as UTF-8.")
            yield stream
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{str(path)!r} is damaged or incomplete as a gzip file ({error}), so its rows are not "
            "to be trusted. Copy or compress it again."
        ) from error
    except OSError as error:
        raise DataError(
            f"{str(path)!r} can't be read ({error.strerror or error}). "
            "Check the file and its permissions."
        ) from error


class _Bounded(io.RawIOBase):
    """The bytes of a file, which end in a `DataError` before one record or all are too many.

    A raw stream below Python's own buffer, so that lines are still split at the speed of C.
    """

    def __init__(self, source: Any, name: str, zipped: bool):
        self.source = source
        self.zipped = zipped
        self._name = name
        self._unpacked = 0
        self._of_record = 0
        self._line = 0  # none yet, as long as the file is read whole

    def begin(self, line: int) -> None:
        """The record before this line has been read; what the buffer holds counts for neither."""
        self._line, self._of_record = line, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count: int = self.source.readinto(buffer)
        self._unpacked += count
        self._of_record += count
        if self.zipped and self._unpacked > MAX_UNPACKED:
            raise _unpacks_to_too_much(self._name)
        if self._of_record > MAX_RECORD:
            raise DataError(self._too_long())
        return count

    def readall(self) -> bytes:
        return b"".join(iter(lambda: self.read(PIECE) or b"", b""))  # else in pieces of 8 KiB

    def _too_long(self) -> str:
        if self._line:
            return (
                f"{self._name!r} has a record of more than {MAX_RECORD:,} bytes at line "
                f"{self._line}, the most that is read as one. Check its line ends and quotes."
            )
        return (
            f"{self._name!r} holds more than {MAX_RECORD:,} bytes, the most that is read of a file "
            "without lines. Save its rows as .jsonl, or unpack it if it is a zipped .parquet."
        )


def _unpacks_to_too_much(name: str) -> DataError:
    return DataError(
        f"{name!r} unpacks to more than {MAX_UNPACKED:,} bytes, the most that is read from one "
        "file. Check what is in it, and split it into smaller files."
    )


# --- JSON -------------------------------------------------------------------------------------


def _parse_json(raw: bytes) -> Any:
    """JSON in UTF-8, with or without its mark; NaN and Infinity pass, of equal keys the last wins.

    Raises:
        ValueError: what it is instead, to be read after "is".
    """
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        at = f"byte {error.start + 1}" if line == 1 else f"line {line}"
        raise ValueError(f"not valid UTF-8 (0x{error.object[error.start]:02x} at {at})") from None
    except json.JSONDecodeError as error:
        at = f"character {error.colno}" if error.lineno == 1 else f"line {error.lineno}"
        raise ValueError(f"not valid JSON ({error.msg} at {at})") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError:
        raise ValueError("not usable (a number in it has thousands of digits)") from None


def _read_jsonl(stream: Any, name: str) -> Table:
    """One object a line; blank lines are skipped but counted."""
    return Table([], _jsonl_rows(stream))


def _jsonl_rows(stream: Any) -> Iterator[NumberedRow]:
    stream.raw.begin(1)
    for line, raw in enumerate(stream, start=1):
        stream.raw.begin(line + 1)
        if raw.strip(BLANK):
            yield _jsonl_row(line, raw)


def _jsonl_row(line: int, raw: bytes) -> NumberedRow:
    try:
        return _object(line, _parse_json(raw.rstrip(b"\r\n")))
    except ValueError as error:
        return Problem(line, "", f"the line is {error}")


def _object(line: int, value: Any) -> NumberedRow:
    if isinstance(value, dict):
        return line, value
    return Problem(line, "", f"the row is {called(value)}, not an object with columns")


def _read_json(stream: io.BufferedIOBase, name: str) -> Table:
    """A list of objects, an object with one such list in it, or an object of column lists."""
    try:
        records = _json_records(_parse_json(stream.read()))
    except ValueError as error:
        raise DataError(
            f"{name!r} is {error}, so none of its rows can be read. A .json file holds a list of "
            "objects; a file with one object a line is to be named .jsonl."
        ) from None
    return Table([], (_object(number, record) for number, record in enumerate(records, start=1)))


def _json_records(value: Any) -> Iterable[Any]:
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"{called(value)}, not a list of objects")
    if "chosen" in value and "rejected" in value:
        return _column_records(value)
    lists = [item for item in value.values() if isinstance(item, list)]
    lists = [item for item in lists if any(isinstance(record, dict) for record in item)]
    if len(lists) != 1:
        raise ValueError(f"an object with {len(lists)} lists of objects in it, not one")
    return lists[0]


def _column_records(columns: dict[str, Any]) -> Iterable[Row]:
    for column, values in columns.items():
        if not isinstance(values, list):
            raise ValueError(f"one object, whose {column!r} is {called(values)}, not a list")
    lengths = {column: len(values) for column, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"an object of column lists that differ in length ({str(lengths)[:200]})")
    return (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))


# --- CSV --------------------------------------------------------------------------------------


def _read_csv(stream: io.BufferedIOBase, name: str) -> Table:
    return Table([], _csv_rows(stream, name, ","))


def _read_tsv(stream: io.BufferedIOBase, name: str) -> Table:
    return Table([], _csv_rows(stream, name, "\t"))


def _csv_rows(stream: Any, name: str, delimiter: str) -> Iterator[NumberedRow]:
    """Records under a header; bytes that aren't UTF-8 become surrogates, which no pair may hold."""
    limit = csv.field_size_limit(sys.maxsize)  # the process's setting; 128 KiB would be too little
    try:
        with io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="") as text:
            reader = csv.reader(text, delimiter=delimiter, strict=True)
            records = _csv_records(reader, stream.raw.begin)
            header = next(records, None)
            columns = _header_columns(header, name) if header else []
            for record in records:
                yield record if isinstance(record, Problem) else _csv_row(columns, *record)
    finally:
        csv.field_size_limit(limit)


def _csv_records(
    reader: Any, begin: Callable[[int], None]
) -> Iterator[tuple[int, list[str]] | Problem]:
    """Records that are not blank, each with its first line."""
    while True:
        line = reader.line_num + 1
        begin(line)
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            extent = (
                "" if reader.line_num == line else f", which reaches to line {reader.line_num},"
            )
            reason = f"the record{extent} is not valid CSV ({error}): check its quotes"
            yield Problem(line, "", reason)
            continue
        if cells:
            yield line, cells


def _header_columns(header: tuple[int, list[str]] | Problem, name: str) -> list[str]:
    if isinstance(header, Problem):
        raise DataError(f"{name!r} has no usable header row: line {header.line}: {header.reason}.")
    line, columns = header
    twice = [column for column in COLUMNS if columns.count(column) > 1]
    if twice:
        raise DataError(
            f"{name!r} has more than one column {twice[0]!r} (line {line}), so it is not clear "
            "which one is meant. Rename or remove the others."
        )
    return columns


def _csv_row(columns: list[str], line: int, cells: list[str]) -> NumberedRow:
    if any(cells[len(columns) :]):
        reason = f"the record has {len(cells)} cells under {len(columns)} columns: check its quotes"
        return Problem(line, "", reason)
    row: Row = {}
    for column, cell in zip(columns, cells, strict=False):
        if column in COLUMNS and PYTHON_MESSAGES.match(cell):
            reason = "holds messages as Python prints them, not as JSON: save the data as .jsonl"
            return Problem(line, column, reason)
        row[column] = _cell(column, cell)
    return line, row


def _cell(column: str, cell: str) -> Any:
    """Messages and score lists in a cell are JSON; every other text is what it is."""
    if column not in COLUMNS or not cell.lstrip().startswith(("[", "{")):
        return cell
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        return cell
    if column.startswith("all_"):
        return value
    messages = value if isinstance(value, list) else [value]
    return value if messages and all(map(_is_message, messages)) else cell


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and any(set(keys) <= set(value) for keys in MESSAGE_KEYS)


# --- Parquet ----------------------------------------------------------------------------------


def _read_parquet(stream: Any, name: str) -> Table:
    import pyarrow
    import pyarrow.parquet

    # Unzipped it is read from the file itself, zipped it could not seek without unzipping again.
    data = io.BytesIO(stream.read()) if stream.raw.zipped else stream.raw.source
    try:
        file = pyarrow.parquet.ParquetFile(data)
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged_parquet(name, error) from error
    if _declared_bytes(file) > MAX_UNPACKED:
        raise _unpacks_to_too_much(name)
    return Table(file.schema_arrow.names, _parquet_rows(file, name))


def _declared_bytes(file: Any) -> int:
    """What the columns that are read say they unpack to."""
    wanted = _wanted_of(file.schema_arrow)
    groups = map(file.metadata.row_group, range(file.num_row_groups))
    chunks = (group.column(n) for group in groups for n in range(group.num_columns))
    return sum(
        chunk.total_uncompressed_size
        for chunk in chunks
        if chunk.path_in_schema.split(".")[0] in wanted
    )


def _parquet_rows(file: Any, name: str) -> Iterator[NumberedRow]:
    import pyarrow

    batches = file.iter_batches(BATCH_ROWS, columns=_wanted_of(file.schema_arrow))
    rows = (row for batch in batches for row in _batch_rows(batch))
    try:
        for line, row in enumerate(rows, start=1):
            if row is None:
                yield Problem(line, "", "the row is not valid UTF-8")
            else:
                yield line, row
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged_parquet(name, error) from error


def _batch_rows(batch: Any) -> Iterable[Row | None]:
    """The rows of a batch, None for one whose text is no UTF-8, which Arrow does not check."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return [None]
        return (row for n in range(batch.num_rows) for row in _batch_rows(batch.slice(n, 1)))


def _damaged_parquet(name: str, error: Exception) -> DataError:
    return DataError(f"{name!r} can't be read as Parquet ({error}). Copy or write it again.")


def _wanted_of(schema: Any) -> list[str]:
    from pyarrow import types

    are_numbers = {f.name: types.is_integer(f.type) or types.is_floating(f.type) for f in schema}
    return wanted_columns(are_numbers)


def wanted_columns(columns: Mapping[str, bool]) -> list[str]:
    """Only what is read need be decoded, and numbers, which may be ratings; without any column that
    is read all, so that rows still count.

    Args:
        columns: name → whether it holds numbers.
    """
    read = {*COLUMNS, *PROMPT_COLUMNS}
    if not any(column in read for column in columns):
        return list(columns)
    return [column for column, is_number in columns.items() if is_number or column in read]


READERS: dict[str, Callable[[Any, str], Table]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}
