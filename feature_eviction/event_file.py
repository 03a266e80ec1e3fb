"""A stream of sightings from a CSV file (.csv or .csv.gz), in bounded pieces: keys, times, labels.

Ids may be integers or any text (hashed to 52 bits, counted by the table as any other id); times are unix
seconds or milliseconds.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import zlib
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from feature_eviction.errors import FeatureEvictionError
from feature_eviction.keys import Int64Array, make_keys

PIECE_ROWS = 2_000


class Columns(NamedTuple):
    """What the columns of the file are called."""

    keys: tuple[str, ...]
    """One feature class each, in this order from class 0 on."""
    time: str
    label: str | None = None
    time_is_ms: bool = False


class Events(NamedTuple):
    """A piece of the file: N sightings of all key columns, row by row."""

    keys_N: Int64Array
    times_s_N: Int64Array
    positives_N: Int64Array


class EventFileError(FeatureEvictionError):
    pass


def events_of(path: Path, columns: Columns) -> Iterator[Events]:
    """Pieces of at most PIECE_ROWS lines.

    Raises: EventFileError naming file, line and column of what cannot be read; OSError for a file that cannot
    be opened.
    """
    with _opened(path) as file:
        reader = csv.DictReader(file)
        try:
            yield from _pieces(reader, columns, path=path)
        except (UnicodeDecodeError, csv.Error, EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise EventFileError(f"{path}: not readable after line {reader.line_num} ({error})") from error


def _opened(path: Path) -> TextIOWrapper:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", newline="", encoding="utf-8")
    return path.open(newline="", encoding="utf-8")


def _pieces(reader: csv.DictReader[str], columns: Columns, *, path: Path) -> Iterator[Events]:
    wanted = [*columns.keys, columns.time, *([columns.label] if columns.label else [])]
    missing = sorted(set(wanted) - set(reader.fieldnames or ()))
    if missing:
        raise EventFileError(f"{path}: columns {missing} are missing, found {reader.fieldnames}")
    lines: list[dict[str, str]] = []
    for line in reader:
        lines.append(line)
        if len(lines) == PIECE_ROWS:
            yield _piece(lines, columns, path=path, last_line=reader.line_num)
            lines = []
    if lines:
        yield _piece(lines, columns, path=path, last_line=reader.line_num)


def _piece(lines: list[dict[str, str]], columns: Columns, *, path: Path, last_line: int) -> Events:
    def place(name: str) -> str:
        return f"{path}: lines {last_line - len(lines) + 1}..{last_line}, column '{name}'"

    def texts(name: str) -> list[str]:
        # csv gives None for a column that its line does not reach.
        if any(line[name] is None for line in lines):
            raise EventFileError(f"{place(name)}: a line ends before it")
        return [line[name] for line in lines]

    def numbers(name: str) -> npt.NDArray[np.float64]:
        try:
            return np.array([float(text) for text in texts(name)])
        except ValueError as error:
            raise EventFileError(f"{place(name)}: {error}") from error

    times_s = numbers(columns.time).astype(np.int64) // (1000 if columns.time_is_ms else 1)
    if len(times_s) and not (times_s.min() >= 0 and times_s.max() < 2**32):
        raise EventFileError(
            f"{path}: column '{columns.time}' must be unix seconds, found {times_s.min()}..{times_s.max()}; "
            f"for milliseconds give --time-ms"
        )
    positives = np.zeros(len(lines), np.int64) if columns.label is None else numbers(columns.label) > 0
    by_class = [
        make_keys(np.array([_raw_id(text) for text in texts(name)], np.int64), class_id=class_id)[0]
        for class_id, name in enumerate(columns.keys)
    ]
    return Events(
        keys_N=np.stack(by_class, axis=1).ravel(),
        times_s_N=np.repeat(times_s, len(by_class)),
        positives_N=np.repeat(positives.astype(np.int64), len(by_class)),
    )


def _raw_id(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return int.from_bytes(digest) >> 12
    return number if -(2**63) <= number < 2**63 else number & (2**52 - 1)
