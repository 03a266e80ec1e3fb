"""KuaiRand's published files (CIKM 2022, doi 10.1145/3511808.3557624) as a stream in time order.

Reads the dataset's own layout (log_*.csv with user_features_*.csv and video_features_basic_*.csv beside
them, each also as .csv.gz, docs/data.md) and trimmed traces, whose column is_like_or_hate says 1 = liked,
0 = hated.
A log whose lines ascend in time is streamed; another one is held in memory as numpy columns (about 100
bytes a line) and sorted; several logs are merged block by block.

Shapes: N rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trainer.config.schema import SchemaConfig
from trainer.data import kuairand_labels
from trainer.data.csv_columns import BLOCK_LINES, Columns, header, number_blocks, require
from trainer.data.kuairand_features import (
    USER_WORDS,
    VIDEO_WORDS,
    UserTable,
    VideoTable,
    no_users,
    no_videos,
    read_users,
    read_videos,
)
from trainer.data.kuairand_labels import LIKE_OR_HATE, PLAY_TIME
from trainer.errors import ConfigError, DataError
from trainer.stream.columns import Impressions, Jagged
from trainer.stream.slicing import concat_impressions, slice_impressions

FEATURES = (
    "domain",
    "user_id",
    "user_active_degree",
    "item_id",
    "author_id",
    "tags",
    "hour",
    "duration_s",
    "register_days",
    *USER_WORDS,
    *VIDEO_WORDS,
)
WHOLE = ("user_id", "video_id", "time_ms", "tab")
USER_TABLES = "user_features_*.csv"
VIDEO_TABLES = "video_features_basic_*.csv"
TIME_ZONE_H = 8
"""The platform's local time, for the hour of the day."""


class KuaiRandReader:
    """A log file, or a directory of them, in time order.

    Args: path: a log or trace file, or a folder with log_*.csv (or, without any, trace_*.csv), or the
        published folder whose `data` holds them.
    Raises: DataError naming the file and what it lacks; ConfigError if the schema asks for features or
        tasks that KuaiRand does not have.
    """

    def __init__(self, path: Path, schema: SchemaConfig) -> None:
        _check_schema(schema)
        self._schema = schema
        path = _data_folder(path)
        self.logs = _find_logs(path)
        self._is_trace = [LIKE_OR_HATE in header(log) for log in self.logs]
        self._columns = [_needed_columns(log, schema) for log in self.logs]
        folder = path if path.is_dir() else path.parent
        users = _one_file(folder, USER_TABLES)
        self._users: UserTable = read_users(users, words=self._wanted(USER_WORDS)) if users else no_users()
        # The trimmed trace counts videos as KuaiRand-27K does; another edition's table beside it would
        # join the features of other videos.
        videos = None if any(self._is_trace) else _one_file(folder, VIDEO_TABLES)
        self._videos: VideoTable = (
            read_videos(videos, words=self._wanted(VIDEO_WORDS)) if videos else no_videos()
        )
        self._median_ms: float | None = None

    def _wanted(self, names: Sequence[str]) -> list[str]:
        return [feature.name for feature in self._schema.features if feature.name in names]

    def batches(self, num: int) -> Iterator[Impressions]:
        """Batches of `num` impressions, the last may be shorter; request ids count the rows from 0."""
        if num < 1:
            raise ValueError(f"a batch has at least 1 impression, found {num}")
        waiting: list[Impressions] = []
        num_waiting = first = 0
        for rows in self._merged():
            waiting.append(self._impressions(rows, first=first))
            first += len(waiting[-1])
            num_waiting += len(waiting[-1])
            if num_waiting < num:
                continue
            joined = concat_impressions(waiting)
            whole = num_waiting - num_waiting % num
            for start in range(0, whole, num):
                yield slice_impressions(joined, start, start + num)
            num_waiting -= whole
            waiting = [slice_impressions(joined, whole, len(joined))]
        if num_waiting:
            yield concat_impressions(waiting)

    def _merged(self) -> Iterator[Columns]:
        """Blocks of all logs in time order; ties keep the order of the files."""
        streams = [
            _in_time_order(log, columns, self._schema)
            for log, columns in zip(self.logs, self._columns, strict=True)
        ]
        blocks = [next(stream, None) for stream in streams]
        while any(block is not None for block in blocks):
            # Everything up to the earliest end of a block is known to be complete in every file.
            cut_ms = min(float(block["time_ms"][-1]) for block in blocks if block is not None)
            ready = []
            for index, block in enumerate(blocks):
                if block is None:
                    continue
                num_ready = int(np.searchsorted(block["time_ms"], cut_ms, side="right"))
                ready.append({name: values_N[:num_ready] for name, values_N in block.items()})
                rest = {name: values_N[num_ready:] for name, values_N in block.items()}
                blocks[index] = rest if len(rest["time_ms"]) else next(streams[index], None)
            joined = {name: np.concatenate([part[name] for part in ready]) for name in ready[0]}
            yield _sorted_by_time(joined)

    def median_play_ms(self) -> float | None:
        """Of the first MEDIAN_IMPRESSIONS in time order, read on the first call; None without impressions."""
        if self._median_ms is None:
            plays: list[npt.NDArray[np.float64]] = []
            for rows in self._merged():
                plays.append(rows[PLAY_TIME])
                if sum(len(part) for part in plays) >= kuairand_labels.MEDIAN_IMPRESSIONS:
                    break
            if plays:
                self._median_ms = float(
                    np.median(np.concatenate(plays)[: kuairand_labels.MEDIAN_IMPRESSIONS])
                )
        return self._median_ms

    def _impressions(self, rows: Columns, *, first: int) -> Impressions:
        time_ms_N = rows["time_ms"].astype(np.int64)
        user_ids_N = rows["user_id"].astype(np.int64)
        video_ids_N = rows["video_id"].astype(np.int64)
        num = len(time_ms_N)
        domain_N = self._domains(rows["tab"])
        singles = {
            "domain": domain_N.astype(np.int64),
            "user_id": user_ids_N,
            "user_active_degree": self._users.active_degree(user_ids_N),
            "item_id": video_ids_N,
            "author_id": self._videos.author(video_ids_N),
            "hour": (time_ms_N // 3_600_000 + TIME_ZONE_H) % 24,
        }
        singles |= {name: self._users.word(name, user_ids_N) for name in self._wanted(USER_WORDS)}
        singles |= {name: self._videos.word(name, video_ids_N) for name in self._wanted(VIDEO_WORDS)}
        ones_N = np.ones(num, np.int32)
        jagged = {name: Jagged(ids_N, ones_N) for name, ids_N in singles.items()}
        jagged["tags"] = self._videos.tags(video_ids_N)
        duration_ms_N = np.where(rows["duration_ms"] > 0, rows["duration_ms"], np.nan)
        dense = {
            "duration_s": (duration_ms_N / 1_000.0).astype(np.float32),
            "register_days": self._users.register_days(user_ids_N),
        }
        names = [feature.name for feature in self._schema.features]
        median_ms = self.median_play_ms() if kuairand_labels.needs_median(self._schema) else None
        labels_NT, known_NT = kuairand_labels.labels(
            rows, self._schema, domain_N=domain_N, median_play_ms=median_ms
        )
        return Impressions(
            request_ids_N=np.arange(first, first + num, dtype=np.uint64),
            user_ids_N=user_ids_N,
            event_time_ms_N=time_ms_N,
            produced_ms_N=np.zeros(num, np.int64),
            domain_N=domain_N,
            sparse={name: jagged[name] for name in names if name in jagged},
            dense={name: dense[name] for name in names if name in dense},
            labels_NT=labels_NT,
            known_NT=known_NT,
        )

    def _domains(self, tab_N: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
        """tab_<n> of the log's tab column, "main" where the log has none (tab -1)."""
        domain_N = np.zeros(len(tab_N), np.uint8)
        for tab in np.unique(tab_N):
            name = "main" if tab < 0 else f"tab_{int(tab)}"
            if name not in self._schema.domains:
                raise DataError(
                    f"{self.logs[0].parent}: the log has domain '{name}', the schema only "
                    f"{', '.join(self._schema.domains)}"
                )
            domain_N[tab_N == tab] = self._schema.domains.index(name)
        return domain_N


def recording_files(path: Path) -> list[Path]:
    """Every file that a reader of `path` could read: the logs, the tables of users and of videos.

    Raises: DataError if there is no log.
    """
    path = _data_folder(path)
    logs = _find_logs(path)
    folder = path if path.is_dir() else path.parent
    beside = [one for pattern in (USER_TABLES, VIDEO_TABLES) for one in _plain_or_gzip(folder, pattern)]
    return [*logs, *beside]


def check_recording(path: Path, schema: SchemaConfig) -> None:
    """What can be seen of a recording at once: its names, its columns and each log's first block of lines.

    Raises: as KuaiRandReader does, and DataError where a log holds no impression.
    """
    _check_schema(schema)
    for log in _find_logs(_data_folder(path)):
        if next(_blocks(log, _needed_columns(log, schema)), None) is None:
            raise DataError(f"{log}: has column names, but no impression below them")


def _in_time_order(path: Path, columns: list[str], schema: SchemaConfig) -> Iterator[Columns]:
    """Blocks of one log, ascending in time, all logs with the same columns."""
    if _ascends(path):
        for block in _blocks(path, columns):
            yield _alike(block, schema)
        return
    blocks = list(_blocks(path, columns))
    joined = {name: np.concatenate([block[name] for block in blocks]) for name in columns}
    whole = _sorted_by_time(_alike(joined, schema))
    for start in range(0, len(whole["time_ms"]), BLOCK_LINES):
        yield {name: values_N[start : start + BLOCK_LINES] for name, values_N in whole.items()}


def _blocks(path: Path, columns: list[str]) -> Iterator[Columns]:
    return number_blocks(path, columns, binary=kuairand_labels.binary_columns(columns), whole=WHOLE)


def _ascends(path: Path) -> bool:
    last_ms = float("-inf")
    for block in number_blocks(path, ["time_ms"]):
        time_ms_N = block["time_ms"]
        if time_ms_N[0] < last_ms or (np.diff(time_ms_N) < 0).any():
            return False
        last_ms = float(time_ms_N[-1])
    return True


def _sorted_by_time(rows: Columns) -> Columns:
    order_N = np.argsort(rows["time_ms"], kind="stable")
    return {name: values_N[order_N] for name, values_N in rows.items()}


def _alike(block: Columns, schema: SchemaConfig) -> Columns:
    """The columns of a published log, whatever the file has: tab -1 without tabs, likes apart from hates."""
    rows = {name: block[name] for name in ("user_id", "video_id", "time_ms", "duration_ms")}
    rows["tab"] = block["tab"] if "tab" in block else np.full(len(rows["time_ms"]), -1.0)
    if LIKE_OR_HATE in block:
        block = {**block, "is_like": block[LIKE_OR_HATE], "is_hate": 1.0 - block[LIKE_OR_HATE]}
    return rows | {name: block[name] for name in kuairand_labels.label_columns(schema, is_trace=False)}


def _needed_columns(path: Path, schema: SchemaConfig) -> list[str]:
    """What to read from a log. Raises: DataError naming the columns that it lacks."""
    found = header(path)
    is_trace = LIKE_OR_HATE in found
    needed = ["user_id", "video_id", "time_ms", "duration_ms"]
    needed += [] if is_trace else ["tab"]
    needed += kuairand_labels.label_columns(schema, is_trace=is_trace)
    try:
        require(path, found, needed)
    except DataError as error:
        if "time_ms" in found and "video_id" in found:
            raise
        raise DataError(
            f"{error}. Only KuaiRand's files are read (docs/data.md); a stream of your own comes by Kafka "
            "(docs/your_data.md)"
        ) from error
    return needed


def _data_folder(path: Path) -> Path:
    """The published archives have their files in `data`."""
    inner = path / "data"
    if inner.is_dir() and not any(any(path.glob(pattern)) for pattern in ("*.csv", "*.csv.gz")):
        return inner
    return path


def _find_logs(path: Path) -> list[Path]:
    if not path.exists():
        raise DataError(f"{path}: there is no such file or folder")
    if path.is_file():
        return [path]
    for pattern in ("log_*.csv", "trace_*.csv"):
        logs = _plain_or_gzip(path, pattern)
        if logs:
            return logs
    raise DataError(f"{path}: the folder has no log_*.csv or trace_*.csv (or .csv.gz)")


def _plain_or_gzip(folder: Path, pattern: str) -> list[Path]:
    return sorted([*folder.glob(pattern), *folder.glob(f"{pattern}.gz")])


def _one_file(folder: Path, pattern: str) -> Path | None:
    found = _plain_or_gzip(folder, pattern)
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise DataError(f"{folder}: expected one {pattern}, found {names}; keep the one of the log's edition")
    return found[0] if found else None


def _check_schema(schema: SchemaConfig) -> None:
    unknown = [feature.name for feature in schema.features if feature.name not in FEATURES]
    if unknown:
        raise ConfigError(
            f"schema: KuaiRand has no features {', '.join(unknown)}; it has {', '.join(FEATURES)}"
        )
    kuairand_labels.label_columns(schema, is_trace=False)
