"""CSV files, plain or gzip, as numpy columns in blocks; a wrong line is named by its number.

Shapes: N lines of a block.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np
import numpy.typing as npt

from trainer.errors import DataError

BLOCK_LINES = 65_536
WHOLE_MAX = 2.0**53
"""Up to here float64 holds every whole number."""

Columns = dict[str, npt.NDArray[np.float64]]


def header(path: Path) -> list[str]:
    """The names in the first line.

    Raises: DataError if the file is missing, not readable or empty.
    """
    with _open(path) as text:
        try:
            return next(csv.reader(text))
        except StopIteration:
            raise DataError(f"{path}: the file is empty; expected a line with column names") from None
        except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{path}: not readable as CSV ({error})") from error


def require(path: Path, found: Sequence[str], wanted: Sequence[str]) -> None:
    """Raises: DataError naming the columns that are missing."""
    missing = [name for name in wanted if name not in found]
    if missing:
        raise DataError(f"{path}: column {', '.join(missing)} is missing; the file has {', '.join(found)}")


def text_blocks(path: Path, names: Sequence[str]) -> Iterator[tuple[int, list[tuple[str, ...]]]]:
    """(number of the first line, the named columns as text), BLOCK_LINES lines at a time.

    Raises: DataError for a missing column, or a line with too few or too many fields.
    """
    found = header(path)
    require(path, found, names)
    indices = [found.index(name) for name in names]
    with _open(path) as text:
        reader = csv.reader(text)
        next(reader)
        line = 2
        while True:
            try:
                rows = list(itertools.islice(reader, BLOCK_LINES))
            except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
                raise DataError(f"{path}: not readable after line {line} ({error})") from error
            if not rows:
                return
            for index, row in enumerate(rows):
                if len(row) != len(found):
                    raise DataError(
                        f"{path}, line {line + index}: expected {len(found)} fields, found {len(row)}"
                    )
            yield line, [tuple(row[index] for row in rows) for index in indices]
            line += len(rows)


def number_blocks(
    path: Path, names: Sequence[str], *, binary: Sequence[str] = (), whole: Sequence[str] = ()
) -> Iterator[Columns]:
    """The named columns as float64 [N].

    Args: binary: those of them that hold labels. whole: those that hold whole numbers.
    Raises: DataError naming the line and the value that is not a finite number, no label, or not whole.
    """
    for line, columns in text_blocks(path, names):
        block = {
            name: numbers(path, name, column, first_line=line, whole=name in whole)
            for name, column in zip(names, columns, strict=True)
        }
        for name in binary:
            _check_binary(path, name, block[name], first_line=line)
        yield block


def _check_binary(path: Path, name: str, values_N: npt.NDArray[np.float64], *, first_line: int) -> None:
    wrong_N = np.flatnonzero((values_N != 0) & (values_N != 1))
    if len(wrong_N):
        first = int(wrong_N[0])
        raise DataError(
            f"{path}, line {first_line + first}: column {name} is a label and must be 0 or 1, "
            f"found {values_N[first]:g}"
        )


def numbers(
    path: Path, name: str, column: Sequence[str], *, first_line: int, whole: bool = False
) -> npt.NDArray[np.float64]:
    """Text to float64 [N].

    Args: whole: ids and times, which must be exact: whole numbers up to WHOLE_MAX in size.
    Raises: DataError naming the line that is not such a number.
    """
    try:
        values_N = np.array(column).astype(np.float64)
    except ValueError:
        values_N = np.array([_number_or_nan(value) for value in column])
    right_N = np.isfinite(values_N)
    if whole:
        right_N &= (np.abs(values_N) <= WHOLE_MAX) & (values_N == np.rint(values_N))
    wrong_N = np.flatnonzero(~right_N)
    if len(wrong_N):
        first = int(wrong_N[0])
        expected = "a whole number of at most 2^53" if whole else "a number"
        raise DataError(
            f"{path}, line {first_line + first}: column {name} must be {expected}, found '{column[first]}'"
        )
    return values_N


def _number_or_nan(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        return float("nan")


def _open(path: Path) -> TextIO:
    try:
        if path.suffix == ".gz":
            return io.TextIOWrapper(gzip.open(path, "rb"), encoding="utf-8", newline="")
        return path.open(encoding="utf-8", newline="")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
