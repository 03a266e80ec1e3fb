"""The data of a seed is drawn once, is the stream's, and is drawn anew when it is not whole."""

from __future__ import annotations

import gzip
import os

import numpy as np
import pytest
from msgspec.structs import replace

from trainer.compare.dataset import load, prepare
from trainer.compare.protocol import Protocol, kept
from trainer.compare.settings import Settings, base_config
from trainer.data.synthetic import SyntheticStream
from trainer.errors import DataError
from trainer.features import KeyMaker
from trainer.stream.slicing import concat_impressions, select_impressions


@pytest.fixture(scope="module")
def data(prepared):
    return load(prepared[0])


@pytest.fixture(scope="module")
def stream(settings):
    parts = list(SyntheticStream(base_config(settings, seed=1)).batches(1_000))
    return concat_impressions([part for part, _ in parts]), np.concatenate([truth for _, truth in parts])


def test_columns_are_the_stream_without_those_filtered_out(data, stream):
    impressions, truth = stream
    kept_N = kept(impressions.user_ids_N, impressions.sparse["item_id"].ids_L, least=2)
    expected = select_impressions(impressions, kept_N)
    assert 0 < data.facts.kept == kept_N.sum() < data.facts.drawn == 6_000
    np.testing.assert_array_equal(data.truth_NT, truth[kept_N])
    for name in ("request_ids_N", "user_ids_N", "event_time_ms_N", "domain_N", "labels_NT", "known_NT"):
        np.testing.assert_array_equal(getattr(data.impressions, name), getattr(expected, name))
    for name, jagged in expected.sparse.items():
        np.testing.assert_array_equal(data.impressions.sparse[name].ids_L, jagged.ids_L)
        np.testing.assert_array_equal(data.impressions.sparse[name].lengths_N, jagged.lengths_N)
    for name, values in expected.dense.items():
        np.testing.assert_array_equal(data.impressions.dense[name], values)


def test_impressions_are_taken_in_any_order_with_their_own_ids(data, settings):
    """Judged by the keys that the tables would see."""
    rows = np.random.default_rng(0).permutation(data.facts.kept)[:50]
    taken = data.take(rows, task=4)
    schema = base_config(settings, seed=1).schema
    one_task = replace(schema, tasks=schema.tasks[4:5], positive_task=schema.tasks[4].name)
    (keys,) = KeyMaker(one_task).table_keys(taken, num_rows=50)
    found, at = {}, 0
    for feature, lengths in enumerate(keys.lengths_FB):
        for place, length in enumerate(lengths):
            found[feature, place] = keys.keys_L[at : at + length].tolist()
            at += length
    for place, row in enumerate(rows):
        (alone,) = KeyMaker(schema).table_keys(data.take(np.array([row])), num_rows=1)
        ends = np.cumsum(alone.lengths_FB[:, 0])
        for feature, (end, length) in enumerate(zip(ends, alone.lengths_FB[:, 0], strict=True)):
            assert found[feature, place] == alone.keys_L[end - length : end].tolist()
    np.testing.assert_array_equal(taken.labels_NT, data.impressions.labels_NT[rows, 4:5])


def test_slices_follow_each_other_in_time_and_domains_are_their_parts(data):
    rows = [data.rows(name) for name in ("train", "validation", "test")]
    times = [data.impressions.event_time_ms_N[part] for part in rows]
    assert times[0].max() < times[1].min() <= times[1].max() < times[2].min()
    assert [len(part) for part in rows] == list(data.facts.by_slice.values())
    parts = [data.rows("test", domain=domain) for domain in range(3)]
    assert sorted(np.concatenate(parts)) == rows[2].tolist()


def test_it_is_drawn_once(settings, prepared, monkeypatch):
    def drawn_again(*_: object, **__: object) -> None:
        raise AssertionError("drawn again")

    monkeypatch.setattr("trainer.compare.dataset._columns", drawn_again)
    path, facts = prepared
    assert prepare(settings, seed=1, folder=path.parent) == (path, facts)
    with pytest.raises(AssertionError, match="drawn again"):
        prepare(settings, seed=2, folder=path.parent)
    with pytest.raises(AssertionError, match="drawn again"):
        prepare(replace(settings, impressions=7_000), seed=1, folder=path.parent)


def test_torn_columns_are_drawn_anew_and_are_the_same(settings, prepared, tmp_path):
    path, facts = prepare(settings, seed=1, folder=tmp_path)
    assert facts == prepared[1]
    whole = path.read_bytes()
    for torn in (whole[:1000], whole[:-1] + bytes([whole[-1] ^ 1])):
        path.write_bytes(torn)
        assert prepare(settings, seed=1, folder=tmp_path) == (path, facts)
        assert path.read_bytes() == whole
    path.with_suffix(".json").write_text("{")
    assert prepare(settings, seed=1, folder=tmp_path) == (path, facts)
    assert sorted(one.suffix for one in tmp_path.iterdir()) == [".json", ".safetensors"]


def test_columns_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"no columns")
    with pytest.raises(DataError, match=r"x\.safetensors: the columns cannot be read"):
        load(tmp_path / "x.safetensors")


HEADER = "user_id,video_id,date,hourmin,time_ms,duration_ms,tab,is_click,is_like,is_follow,is_forward,"
HEADER += "is_comment,is_hate,long_view"


def _recording(folder, *, header=HEADER, bad=""):
    """Three days, two users and two videos that meet in tabs 1 and 4."""
    day_ms = 86_400_000
    lines = [header]
    for number in range(90):
        time_ms = 1_650_000_000_000 + number * day_ms // 30
        one, tab = number % 2, 4 if number % 3 == 0 else 1
        lines.append(f"{one},{one + 10},0,0,{time_ms},9000,{tab},{one},0,0,0,0,0,1")
    if bad:
        lines[5] = bad
    with gzip.open(folder / "log_standard.csv.gz", "wt") as file:
        file.write("\n".join(lines) + "\n")
    return Settings(preset="kuairand", data=str(folder), protocol=Protocol(time_zone_h=8))


def test_a_recording_keeps_the_domains_that_it_has(tmp_path):
    path, facts = prepare(_recording(tmp_path), seed=1, folder=tmp_path / "data")
    assert facts.domains == ("tab_1", "tab_4")
    assert (facts.kept, facts.users, facts.items, facts.has_truth) == (90, 2, 2, False)
    assert load(path).truth_NT is None
    assert np.bincount(load(path).impressions.domain_N).tolist() == [60, 30]


def test_a_recording_is_the_same_for_every_seed_and_another_when_a_file_changes(tmp_path):
    settings = _recording(tmp_path)
    first = prepare(settings, seed=1, folder=tmp_path / "data")
    assert prepare(settings, seed=2, folder=tmp_path / "data") == first
    _recording(tmp_path, bad="1,11,0,0,1650000000001,9000,1,0,0,0,0,0,0,0")
    assert prepare(settings, seed=1, folder=tmp_path / "data")[1].digest != first[1].digest


def test_a_file_of_the_published_layout_that_changes_is_another_recording(tmp_path):
    """The folder that is named holds `data`, which holds the files."""
    inner = tmp_path / "KuaiRand-Pure" / "data"
    inner.mkdir(parents=True)
    settings = replace(_recording(inner), data=str(inner.parent))
    first = prepare(settings, seed=1, folder=tmp_path / "columns")
    assert prepare(settings, seed=1, folder=tmp_path / "columns") == first
    (inner / "user_features_pure.csv").write_text(
        "user_id,user_active_degree,register_days\n1,full_active,9\n"
    )
    with_users = prepare(settings, seed=1, folder=tmp_path / "columns")
    assert with_users[0] != first[0]
    _recording(inner, bad="1,11,0,0,1650000000001,9000,1,0,0,0,0,0,0,0")
    assert prepare(settings, seed=1, folder=tmp_path / "columns")[1].digest != with_users[1].digest


def test_a_log_of_any_name_that_changes_is_another_recording(tmp_path):
    settings = _recording(tmp_path)
    log = tmp_path / "impressions.gz"
    (tmp_path / "log_standard.csv.gz").rename(log)
    settings = replace(settings, data=str(log))
    first = prepare(settings, seed=1, folder=tmp_path / "columns")
    os.utime(log, ns=(1, 1))
    assert prepare(settings, seed=1, folder=tmp_path / "columns")[0] != first[0]


def test_a_recording_without_a_column_is_refused_by_the_columns_name(tmp_path):
    settings = _recording(tmp_path, header=HEADER.replace("is_follow", "is_folow"))
    with pytest.raises(DataError, match="is_follow"):
        prepare(settings, seed=1, folder=tmp_path / "data")


def test_a_filter_that_leaves_nobody_is_refused(settings, tmp_path):
    strict = replace(settings, protocol=Protocol(interactions_min=5_000))
    with pytest.raises(DataError, match=r"no user and item of 6000 impressions has 5000 interactions"):
        prepare(strict, seed=1, folder=tmp_path)
