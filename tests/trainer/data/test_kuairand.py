"""Published KuaiRand files and the trimmed trace come out whole, in time order, with mistakes named."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import msgspec
import numpy as np
import pytest

from trainer.config import preset
from trainer.config.schema import TaskConfig
from trainer.data import csv_columns
from trainer.data.kuairand import KuaiRandReader
from trainer.errors import ConfigError, DataError
from trainer.stream.slicing import concat_impressions

SCHEMA = preset("kuairand").schema
LOG_HEADER = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,"
    "long_view,play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab"
)
USERS = "user_id,user_active_degree,register_days\n1,full_active,100\n2,odd_word,\n"
VIDEOS = 'video_id,author_id,video_type,tag\n10,500,NORMAL,"3,4"\n11,501,AD,\n'


def _line(
    user: int, video: int, time_ms: int, *, tab: int = 1, click: int = 0, hate: int = 0, ms: int = 9_500
) -> str:
    return f"{user},{video},20220408,1200,{time_ms},{click},0,0,0,0,{hate},1,100,{ms},0,0,0,0,{tab}"


def _write(path: Path, lines: list[str], *, header: str = LOG_HEADER) -> Path:
    text = "\n".join([header, *lines]) + "\n"
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


@pytest.fixture
def published(tmp_path) -> Path:
    """Two overlapping logs, the first sorted by user as published, the second by time and gzipped."""
    _write(
        tmp_path / "log_standard_pure.csv",
        [_line(1, 10, 7_200_500), _line(1, 11, 3_000, click=1), _line(2, 10, 9_000_000)],
    )
    _write(
        tmp_path / "log_random_pure.csv.gz",
        [_line(2, 12, 1_000, tab=14), _line(9, 11, 8_000_000, hate=1, ms=0)],
    )
    (tmp_path / "user_features_pure.csv").write_text(USERS)
    (tmp_path / "video_features_basic_pure.csv").write_text(VIDEOS)
    return tmp_path


def test_logs_of_a_folder_are_merged_in_time_order_with_their_features(published):
    (impressions,) = KuaiRandReader(published, SCHEMA).batches(100)
    assert impressions.event_time_ms_N.tolist() == [1_000, 3_000, 7_200_500, 8_000_000, 9_000_000]
    assert impressions.user_ids_N.tolist() == [2, 1, 1, 9, 2]
    assert impressions.sparse["item_id"].ids_L.tolist() == [12, 11, 10, 11, 10]
    assert impressions.sparse["author_id"].ids_L.tolist() == [0, 501, 500, 501, 500]
    assert impressions.sparse["tags"].lengths_N.tolist() == [0, 0, 2, 0, 2]
    assert impressions.sparse["tags"].ids_L.tolist() == [3, 4, 3, 4]
    assert impressions.sparse["user_active_degree"].ids_L.tolist() == [0, 1, 1, 0, 0]
    assert impressions.sparse["hour"].ids_L.tolist() == [8, 8, 10, 10, 10]
    np.testing.assert_array_equal(
        impressions.dense["register_days"], np.float32([np.nan, 100, 100, np.nan, np.nan])
    )
    np.testing.assert_array_equal(impressions.dense["duration_s"], np.float32([9.5, 9.5, 9.5, np.nan, 9.5]))
    assert [SCHEMA.domains[d] for d in impressions.domain_N] == ["tab_14", "tab_1", "tab_1", "tab_1", "tab_1"]
    labels = dict(zip(SCHEMA.task_names, impressions.labels_NT.T, strict=True))
    assert labels["click"].tolist() == [0, 1, 0, 0, 0]
    assert labels["hate"].tolist() == [0, 0, 0, 1, 0]
    assert labels["long_view"].tolist() == [1] * 5
    assert impressions.known_NT.all()


@pytest.mark.parametrize("block", [1, 2, 7])
def test_merging_in_small_blocks_loses_and_reorders_nothing(block, tmp_path, monkeypatch):
    rng = np.random.default_rng(block)
    times = rng.integers(0, 50, 60)
    for part in range(3):
        mine = times[part * 20 : part * 20 + 20]
        mine = np.sort(mine) if part else mine
        _write(tmp_path / f"log_{part}.csv", [_line(part, 20 * part + n, int(t)) for n, t in enumerate(mine)])
    monkeypatch.setattr(csv_columns, "BLOCK_LINES", block)
    whole = concat_impressions(list(KuaiRandReader(tmp_path, SCHEMA).batches(7)))
    assert whole.event_time_ms_N.tolist() == sorted(times.tolist())
    assert sorted(whole.sparse["item_id"].ids_L.tolist()) == list(range(60))
    assert whole.request_ids_N.tolist() == list(range(60))


def test_the_trace_has_likes_and_hates_for_every_row(tmp_path):
    header = (
        "user_id,video_id,time_ms,is_click,is_follow,is_comment,is_forward,long_view,duration_ms,"
        "is_like_or_hate"
    )
    path = _write(
        tmp_path / "trace_a.csv", ["1,10,5,1,0,0,0,1,3000,1", "2,10,6,0,0,0,0,0,3000,0"], header=header
    )
    (tmp_path / "video_features_basic_pure.csv").write_text(VIDEOS)
    (impressions,) = KuaiRandReader(path, SCHEMA).batches(9)
    labels = dict(zip(SCHEMA.task_names, impressions.labels_NT.T, strict=True))
    assert labels["like"].tolist() == [1, 0]
    assert labels["hate"].tolist() == [0, 1]
    assert {SCHEMA.domains[d] for d in impressions.domain_N} == {"main"}
    assert impressions.sparse["author_id"].ids_L.tolist() == [0, 0], "another edition's videos were joined"


def test_every_row_of_the_real_trace_comes_out():
    folder = os.environ.get("KUAIRAND_DIR")
    if not folder:
        pytest.skip("KUAIRAND_DIR is not set: no KuaiRand files to read")
    impressions = concat_impressions(list(KuaiRandReader(Path(folder), SCHEMA).batches(1_000)))
    assert len(impressions) == 33_485
    assert (np.diff(impressions.event_time_ms_N) >= 0).all()
    labels = dict(zip(SCHEMA.task_names, impressions.labels_NT.T, strict=True))
    np.testing.assert_array_equal(labels["like"] + labels["hate"], 1.0)
    assert np.isfinite(impressions.dense["register_days"]).mean() > 0.99


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match="nothing-here"):
        KuaiRandReader(tmp_path / "nothing-here", SCHEMA)
    with pytest.raises(DataError, match=r"no log_\*\.csv"):
        KuaiRandReader(tmp_path, SCHEMA)


def test_a_missing_column_is_named(tmp_path):
    path = _write(tmp_path / "log_a.csv", [], header=LOG_HEADER.replace("is_hate,", "").replace(",tab", ""))
    with pytest.raises(DataError, match=r"log_a\.csv: column tab, is_hate is missing"):
        KuaiRandReader(path, SCHEMA)


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ("1,10", "line 4: expected 19 fields, found 2"),
        (
            _line(1, 10, 5).replace("9500", "long"),
            "line 4: column duration_ms must be a number, found 'long'",
        ),
        (_line(1, 10, 5).replace("9500", "inf"), "line 4: column duration_ms must be a number, found 'inf'"),
    ],
)
def test_a_malformed_line_is_named_by_its_number(bad, text, tmp_path):
    path = _write(tmp_path / "log_a.csv", [_line(1, 10, 1), _line(1, 10, 2), bad])
    with pytest.raises(DataError, match=text):
        list(KuaiRandReader(path, SCHEMA).batches(10))


def test_a_damaged_archive_is_an_error_of_that_file(tmp_path):
    path = _write(tmp_path / "log_a.csv.gz", [_line(1, 10, n) for n in range(2_000)])
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(DataError, match=r"log_a\.csv\.gz"):
        list(KuaiRandReader(path, SCHEMA).batches(10))


def test_an_unknown_tab_is_named(tmp_path):
    path = _write(tmp_path / "log_a.csv", [_line(1, 10, 1, tab=77)])
    with pytest.raises(DataError, match="domain 'tab_77'"):
        list(KuaiRandReader(path, SCHEMA).batches(10))


def test_a_task_that_kuairand_does_not_have_is_named():
    schema = msgspec.structs.replace(SCHEMA, tasks=(*SCHEMA.tasks, TaskConfig(name="purchase")))
    with pytest.raises(ConfigError, match="purchase"):
        KuaiRandReader(Path("anywhere"), schema)


def test_two_editions_of_a_table_are_refused(published):
    (published / "user_features_1k.csv").write_text(USERS)
    with pytest.raises(DataError, match=r"user_features_1k\.csv, user_features_pure\.csv"):
        KuaiRandReader(published, SCHEMA)


def test_a_log_without_lines_gives_no_batches(tmp_path):
    path = _write(tmp_path / "log_a.csv", [])
    assert list(KuaiRandReader(path, SCHEMA).batches(10)) == []
