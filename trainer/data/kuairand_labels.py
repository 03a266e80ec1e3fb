"""KuaiRand's labels: what was recorded, or what watch time says, as a task's options ask.

    click            recorded; in a single-column domain, where nothing is clicked, watched for more than 3 s
    effective_view   watched for longer than the median impression, or for at least half of the video

(PEPNet, arXiv 2302.01115, says "the 50 % line" of watch time over samples; a retelling of it says half of the
duration.) The median is that of the recording's first MEDIAN_IMPRESSIONS in time order: of all of them it
would carry the future into the first labels, and a moving one would give one watch time two labels.

Shapes: N rows.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from trainer.config.schema import SchemaConfig, TaskConfig
from trainer.data.csv_columns import Columns
from trainer.errors import ConfigError

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]

TASK_COLUMNS = {
    "click": "is_click",
    "like": "is_like",
    "follow": "is_follow",
    "forward": "is_forward",
    "comment": "is_comment",
    "hate": "is_hate",
    "long_view": "long_view",
    "profile_enter": "is_profile_enter",
}
LIKE_OR_HATE = "is_like_or_hate"
"""The trimmed trace's column: 1 = liked, 0 = hated."""
PLAY_TIME = "play_time_ms"
CLICK_PLAY_MS = 3_000
MEDIAN_IMPRESSIONS = 100_000


def label_columns(schema: SchemaConfig, *, is_trace: bool) -> list[str]:
    """The columns that a log must have for these labels. Raises: ConfigError for a task KuaiRand lacks."""
    columns: list[str] = [LIKE_OR_HATE] if is_trace else []
    for task in schema.tasks:
        if task.label != "effective_view":
            columns += [] if is_trace and task.name in ("like", "hate") else [_recorded(task)]
        if task.label != "recorded":
            columns.append(PLAY_TIME)
    return list(dict.fromkeys(columns))


def binary_columns(columns: list[str]) -> list[str]:
    """Those of a log's columns that hold 0 or 1 and nothing else."""
    return [name for name in columns if name == LIKE_OR_HATE or name in TASK_COLUMNS.values()]


def needs_median(schema: SchemaConfig) -> bool:
    return any(
        task.label == "effective_view" and task.effective_view_line == "median" for task in schema.tasks
    )


def labels(
    rows: Columns, schema: SchemaConfig, *, domain_N: npt.NDArray[np.uint8], median_play_ms: float | None
) -> tuple[Floats, Bools]:
    """(labels, whether they are known), float32 and bool [N, T].

    Args: rows: the log's columns; is_like and is_hate also where the file has them in one.
    """
    found = [_label(rows, task, schema, domain_N, median_play_ms) for task in schema.tasks]
    return (
        np.stack([label_N.astype(np.float32) for label_N, _ in found], axis=1),
        np.stack([known_N for _, known_N in found], axis=1),
    )


def _label(
    rows: Columns,
    task: TaskConfig,
    schema: SchemaConfig,
    domain_N: npt.NDArray[np.uint8],
    median_play_ms: float | None,
) -> tuple[Bools, Bools]:
    known_N = np.ones(len(domain_N), np.bool_)
    if task.label == "recorded":
        return rows[_recorded(task)] > 0.5, known_N
    play_ms_N = rows[PLAY_TIME]
    if task.label == "click":
        single_N = np.isin(domain_N, [schema.domains.index(name) for name in task.single_column])
        return np.where(single_N, play_ms_N > CLICK_PLAY_MS, rows[_recorded(task)] > 0.5), known_N
    if task.effective_view_line == "median":
        if median_play_ms is None:
            raise ValueError(f"task '{task.name}' needs the median play time")
        return play_ms_N > median_play_ms, known_N
    # Some lines have a duration of 0: it is not known, and neither is half of it.
    known_N = rows["duration_ms"] > 0
    return known_N & (2 * play_ms_N >= rows["duration_ms"]), known_N


def _recorded(task: TaskConfig) -> str:
    """Its column. A task that is made of watch time may have any name."""
    name = "click" if task.label == "click" else task.name
    if name not in TASK_COLUMNS:
        raise ConfigError(
            f"schema: KuaiRand records no task {name}; it has {', '.join(TASK_COLUMNS)}, and with label = "
            f"'effective_view' a task is made of watch time"
        )
    return TASK_COLUMNS[name]
