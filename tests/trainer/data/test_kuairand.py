"""Published KuaiRand files and the trimmed trace come out whole, in time order, with mistakes named."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import msgspec
import numpy as np
import pytest

from trainer.config import preset
from trainer.config.schema import FeatureConfig, SchemaConfig, TaskConfig
from trainer.data import csv_columns, kuairand_labels
from trainer.data.kuairand import KuaiRandReader, check_recording
from trainer.data.kuairand_features import word_id
from trainer.errors import ConfigError, DataError
from trainer.stream.slicing import concat_impressions

SCHEMA = preset("kuairand").schema
LOG_HEADER = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,"
    "long_view,play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab"
)
USERS_HEADER = (
    "user_id,user_active_degree,is_lowactive_period,is_live_streamer,is_video_author,follow_user_num,"
    "follow_user_num_range,fans_user_num,fans_user_num_range,friend_user_num,friend_user_num_range,"
    "register_days,register_days_range," + ",".join(f"onehot_feat{index}" for index in range(18))
)
VIDEOS_HEADER = (
    "video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,server_width,"
    "server_height,music_id,music_type,tag"
)
USERS = "user_id,user_active_degree,register_days\n1,full_active,100\n2,odd_word,\n"
VIDEOS = 'video_id,author_id,video_type,tag\n10,500,NORMAL,"3,4"\n11,501,AD,\n'


def _line(
    user: int,
    video: int,
    time_ms: int,
    *,
    tab: int = 1,
    click: int = 0,
    hate: int = 0,
    ms: int = 9_500,
    play_ms: int = 100,
) -> str:
    return f"{user},{video},20220408,1200,{time_ms},{click},0,0,0,0,{hate},1,{play_ms},{ms},0,0,0,0,{tab}"


def _schema(*tasks: TaskConfig) -> SchemaConfig:
    return msgspec.structs.replace(SCHEMA, tasks=tasks, positive_task=tasks[0].name)


def _labels(path: Path, *tasks: TaskConfig) -> tuple[list[list[float]], list[list[bool]]]:
    """Labels and whether they are known, a list for each task."""
    whole = concat_impressions(list(KuaiRandReader(path, _schema(*tasks)).batches(100)))
    return whole.labels_NT.T.tolist(), whole.known_NT.T.tolist()


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


def test_labels_of_watch_time_are_made_of_the_real_trace():
    folder = os.environ.get("KUAIRAND_DIR")
    if not folder:
        pytest.skip("KUAIRAND_DIR is not set: no KuaiRand files to read")
    median = TaskConfig(name="median", label="effective_view")
    half = TaskConfig(name="half", label="effective_view", effective_view_line="half_of_duration")
    click = TaskConfig(name="click", label="click", single_column=("main",))
    labels, known = _labels(Path(folder), median, half, click)
    assert np.mean(labels[0]) == pytest.approx(0.5, abs=0.001)
    assert np.mean(known[1]) == pytest.approx(0.8156, abs=1e-4)
    assert 0.3 < np.mean(labels[1]) < np.mean(labels[2]) < 1


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
        (
            _line(1, 10, 5).replace(",5,", ",1e30,"),
            r"line 4: column time_ms must be a whole number of at most 2\^53, found '1e30'",
        ),
        ("1." + _line(1, 10, 5), r"line 4: column user_id must be a whole number .*, found '1\.1'"),
        (_line(1, 10, 5) + ".5", r"line 4: column tab must be a whole number .*, found '1\.5'"),
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


def test_a_click_in_a_single_column_domain_is_more_than_three_seconds_of_watching(tmp_path):
    lines = [
        _line(1, 10, 1, tab=1, click=0, play_ms=3_001),
        _line(1, 10, 2, tab=1, click=1, play_ms=3_000),
        _line(1, 10, 3, tab=2, click=0, play_ms=60_000),
        _line(1, 10, 4, tab=2, click=1, play_ms=0),
    ]
    path = _write(tmp_path / "log_a.csv", lines)
    task = TaskConfig(name="click", label="click", single_column=("tab_1", "tab_4"))
    assert _labels(path, task) == ([[1, 0, 0, 1]], [[True] * 4])
    assert _labels(path, TaskConfig(name="click"))[0] == [[0, 1, 0, 1]]


def test_an_effective_view_is_watched_for_longer_than_the_median_or_for_half_of_the_video(tmp_path):
    watched = [(1_000, 1_500), (2_000, 9_000), (4_500, 9_000), (6_000, 90_000), (90_000, 0)]
    lines = [_line(1, 10, n, play_ms=play, ms=ms) for n, (play, ms) in enumerate(watched)]
    path = _write(tmp_path / "log_a.csv", lines)
    median = TaskConfig(name="effective_view", label="effective_view")
    half = TaskConfig(name="half", label="effective_view", effective_view_line="half_of_duration")
    labels, known = _labels(path, median, half)
    assert labels == [[0, 0, 0, 1, 1], [1, 0, 1, 0, 0]]
    assert known == [[True] * 5, [True, True, True, True, False]], "half of an unknown duration was known"
    assert KuaiRandReader(path, _schema(median)).median_play_ms() == 4_500


def test_a_table_with_an_id_that_is_not_whole_is_named_with_its_line(published):
    (published / "user_features_pure.csv").write_text(USERS.replace("\n2,", "\n2.5,"))
    with pytest.raises(DataError, match=r"user_features_pure\.csv, line 3: column user_id must be a whole"):
        KuaiRandReader(published, SCHEMA)


def test_a_file_of_another_layout_is_told_what_is_read_and_where_else_to_go(tmp_path):
    path = tmp_path / "shop.csv"
    path.write_text("user,item,ts,clicked\n1,2,3,0\n")
    with pytest.raises(DataError, match=r"KuaiRand's files .*docs/your_data\.md"):
        KuaiRandReader(path, SCHEMA)


def test_the_median_is_that_of_the_first_impressions_in_time_order(tmp_path, monkeypatch):
    """Later watching must not change the labels of earlier impressions."""
    monkeypatch.setattr(kuairand_labels, "MEDIAN_IMPRESSIONS", 3)
    times_and_plays = [(9, 90_000), (1, 1_000), (3, 3_000), (2, 2_000), (8, 80_000)]
    _write(tmp_path / "log_a.csv", [_line(1, 10, t, play_ms=play) for t, play in times_and_plays[:3]])
    _write(tmp_path / "log_b.csv", [_line(1, 10, t, play_ms=play) for t, play in times_and_plays[3:]])
    task = TaskConfig(name="effective_view", label="effective_view")
    reader = KuaiRandReader(tmp_path, _schema(task))
    assert reader.median_play_ms() == 2_000
    assert _labels(tmp_path, task)[0] == [[0, 0, 1, 1, 1]]


@pytest.mark.parametrize("kind", ["log", "trace"])
def test_a_label_other_than_0_and_1_is_refused_with_file_and_line(kind, tmp_path):
    if kind == "log":
        path = _write(tmp_path / "log_a.csv.gz", [_line(1, 10, 1), _line(1, 10, 2, hate=2)])
        named = r"log_a\.csv\.gz, line 3: column is_hate is a label and must be 0 or 1, found 2"
        schema = SCHEMA
    else:
        path = _write(tmp_path / "trace_a.csv", ["1,10,5,900,-1"], header=TRACE_HEADER)
        named = r"trace_a\.csv, line 2: column is_like_or_hate is a label and must be 0 or 1, found -1"
        schema = _schema(TaskConfig(name="like"))
    with pytest.raises(DataError, match=named):
        list(KuaiRandReader(path, schema).batches(10))
    with pytest.raises(DataError, match=named):
        check_recording(path, schema)


TRACE_HEADER = "user_id,video_id,time_ms,duration_ms,is_like_or_hate"


def test_columns_that_only_a_label_option_needs_are_named_with_the_file(tmp_path):
    path = _write(tmp_path / "log_a.csv", [], header=LOG_HEADER.replace("play_time_ms,", ""))
    task = TaskConfig(name="effective_view", label="effective_view")
    with pytest.raises(DataError, match=r"log_a\.csv: column play_time_ms is missing"):
        KuaiRandReader(path, _schema(task))
    KuaiRandReader(path, SCHEMA)


def test_an_effective_view_has_no_column_of_its_own():
    with pytest.raises(ConfigError, match=r"records no task effective_view.*label = 'effective_view'"):
        KuaiRandReader(Path("anywhere"), _schema(TaskConfig(name="effective_view")))


@pytest.mark.parametrize(
    ("task", "text"),
    [
        ({"label": "click"}, "single_column belongs to label 'click'"),
        ({"single_column": ("tab_1",)}, "single_column belongs to label 'click'"),
        ({"label": "click", "single_column": ("tab_1", "tab_99")}, "single_column names tab_99"),
        ({"effective_view_line": "half_of_duration"}, "is an option of label 'effective_view'"),
    ],
)
def test_label_options_that_contradict_each_other_are_refused(task, text):
    with pytest.raises(ValueError, match=text):
        _schema(TaskConfig(name="click", **task))


def test_labels_of_another_meaning_make_another_schema():
    """A trained model must not be taken for one of the other labels; recorded labels keep their old hash."""
    tasks = [
        TaskConfig(name="view"),
        TaskConfig(name="view", label="effective_view"),
        TaskConfig(name="view", label="effective_view", effective_view_line="half_of_duration"),
        TaskConfig(name="view", label="click", single_column=("tab_1",)),
    ]
    assert len({_schema(task).hash() for task in tasks}) == 4
    assert SCHEMA.hash() == "98f23e16c13f3ee4"


@pytest.mark.parametrize("edition", ["pure", "1k"])
def test_the_published_folder_is_read_as_it_is_unpacked(edition, tmp_path):
    """File names and columns as KuaiRand's own page lists them, with the files in `data`."""
    folder = tmp_path / f"KuaiRand-{edition}" / "data"
    folder.mkdir(parents=True)
    _write(folder / f"log_standard_4_08_to_4_21_{edition}.csv", [_line(1, 10, 1_000)])
    _write(folder / f"log_standard_4_22_to_5_08_{edition}.csv", [_line(2, 11, 3_000, tab=0)])
    _write(folder / f"log_random_4_22_to_5_08_{edition}.csv", [_line(2, 10, 2_000)])
    users = [
        '1,full_active,0,-124,1,8,"(0,10]",26,"[10,100)",3,"[1,5)",231,181-365,' + ",".join("1" * 18),
        '2,high_active,0,1,1,514,500+,150,"[100,1k)",34,"[30,60)",799,730+,' + ",".join("0" * 18),
    ]
    _write(folder / f"user_features_{edition}.csv", users, header=USERS_HEADER)
    videos = [
        '10,7349781,NORMAL,2022-04-10,LongImport,0.0,87433.0,720.0,1280.0,9155697141,9.0,"39,2"',
        "11,2103883,AD,2022-04-10,Kmovie,,,720.0,1280.0,6355810746,9.0,",
    ]
    _write(folder / f"video_features_basic_{edition}.csv", videos, header=VIDEOS_HEADER)
    statistic = "video_id,counts,show_cnt\n10,66,75.2\n"
    (folder / f"video_features_statistic_{edition}.csv").write_text(statistic)
    (folder.parent / f"load_data_{edition}.py").write_text("")
    check_recording(folder.parent, SCHEMA)
    (impressions,) = KuaiRandReader(folder.parent, SCHEMA).batches(100)
    assert impressions.user_ids_N.tolist() == [1, 2, 2]
    assert [SCHEMA.domains[d] for d in impressions.domain_N] == ["tab_1", "tab_1", "tab_0"]
    assert impressions.sparse["author_id"].ids_L.tolist() == [7349781, 7349781, 2103883]
    assert impressions.sparse["tags"].lengths_N.tolist() == [2, 2, 0]
    assert impressions.dense["register_days"].tolist() == [231, 799, 799]


def _with_features(*names: str) -> SchemaConfig:
    features = [FeatureConfig(name=name, class_id=100 + n, dim=16) for n, name in enumerate(names)]
    return msgspec.structs.replace(SCHEMA, features=(*SCHEMA.features, *features))


def test_published_ranges_types_and_one_hot_columns_are_features_where_the_schema_asks(published):
    users = ['1,full_active,0,-124,1,8,"(0,10]",26,"[10,100)",3,"[1,5)",231,181-365,' + ",".join("1" * 18)]
    users += ['2,full_active,0,1,1,514,500+,150,"[10,100)",34,"[1,5)",799,730+,' + ",".join(["1.0"] * 18)]
    _write(published / "user_features_pure.csv", users, header=USERS_HEADER)
    videos = ["10,5,NORMAL,2022-04-10,LongImport,0.0,87433.0,720.0,1280.0,9155697141,9.0,39"]
    videos += ["11,6,AD,2022-04-10,Kmovie,,,720.0,1280.0,,,"]
    _write(published / "video_features_basic_pure.csv", videos, header=VIDEOS_HEADER)
    schema = _with_features("follow_user_num_range", "onehot_feat3", "fans_user_num_range", "music_id")
    (impressions,) = KuaiRandReader(published, schema).batches(100)
    assert impressions.user_ids_N.tolist() == [2, 1, 1, 9, 2]
    assert impressions.sparse["item_id"].ids_L.tolist() == [12, 11, 10, 11, 10]
    found = {name: impressions.sparse[name].ids_L.tolist() for name in schema_names(schema)[-4:]}
    many, few, music = word_id("500+"), word_id("(0,10]"), word_id("9155697141")
    assert len({many, few, music, 0}) == 4
    assert found["follow_user_num_range"] == [many, few, few, 0, many]
    assert found["onehot_feat3"] == [word_id("1")] * 3 + [0] + [word_id("1")], "1 and 1.0 were told apart"
    assert found["music_id"] == [0, 0, music, 0, music]
    assert all(0 <= one < 1 << 52 for ids in found.values() for one in ids)


def schema_names(schema: SchemaConfig) -> list[str]:
    return [feature.name for feature in schema.features]


def test_a_column_that_a_feature_needs_is_named_with_its_file(published):
    """USERS and VIDEOS, as the fixture writes them, lack every column but those always read."""
    with pytest.raises(DataError, match=r"user_features_pure\.csv: column onehot_feat7 is missing"):
        KuaiRandReader(published, _with_features("onehot_feat7"))
    with pytest.raises(DataError, match=r"video_features_basic_pure\.csv: column music_type is missing"):
        KuaiRandReader(published, _with_features("music_type"))
