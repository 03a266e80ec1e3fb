"""The stores of the version log pass one contract; what only one of them does stands below it."""

from __future__ import annotations

import errno
import itertools
import os
import threading

import fsspec
import pytest

from param_server import local_store
from param_server.errors import LogError
from param_server.fsspec_store import FsspecStore, open_fsspec_store
from param_server.local_store import LocalStore
from param_server.store_opening import open_store
from tests.param_server.store_contract import StoreContract

_number = itertools.count()


class TestLocalStore(StoreContract):
    @pytest.fixture
    def reopen(self, tmp_path):
        stores = []

        def make():
            for store in stores:
                store.close()
            stores.append(LocalStore(tmp_path / "log", owner="shard-0"))
            return stores[-1]

        yield make
        for store in stores:
            store.close()


class TestFsspecInMemory(StoreContract):
    @pytest.fixture
    def reopen(self):
        root = f"/contract-{next(_number)}"
        return lambda: FsspecStore(fsspec.filesystem("memory"), root)


class TestFsspecInAFolder(StoreContract):
    @pytest.fixture
    def reopen(self, tmp_path):
        return lambda: open_fsspec_store(f"file://{tmp_path}/log")


def test_one_process_an_owner_and_several_owners_a_folder(tmp_path):
    first = LocalStore(tmp_path, owner="shard-0")
    with pytest.raises(LogError, match="another process has it open as shard-0"):
        LocalStore(tmp_path, owner="shard-0")
    LocalStore(tmp_path, owner="shard-1").close()
    first.close()
    LocalStore(tmp_path, owner="shard-0").close()


def test_unfinished_files_of_the_same_owner_are_removed_and_those_of_others_stay(tmp_path):
    (tmp_path / "manifests").mkdir()
    for owner in ("shard-0", "shard-1"):
        (tmp_path / "manifests" / f".{owner}-1-2").write_bytes(b"torn")
    store = LocalStore(tmp_path, owner="shard-0")
    assert [path.name for path in (tmp_path / "manifests").iterdir()] == [".shard-1-1-2"]
    assert store.list("") == []
    store.close()


def test_a_reader_changes_nothing_and_a_wrong_place_is_named(tmp_path):
    LocalStore(tmp_path / "log", owner="shard-0").close()
    reader = open_store(str(tmp_path / "log"))
    with pytest.raises(LogError, match="reading only"):
        reader.create("a", b"x")
    with pytest.raises(LogError, match="no such folder"):
        open_store(str(tmp_path / "other"))
    with pytest.raises(LogError, match="nowhere"):
        open_store("nowhere://x")


def test_threads_that_wait_together_share_a_sync(tmp_path, monkeypatch):
    """While one sync is under way four threads append; one more sync makes all four durable."""
    store = LocalStore(tmp_path, owner="shard-0")
    segment = store.open_segment("segments/a")
    entered, proceed, calls = threading.Event(), threading.Event(), []
    real = os.fdatasync

    def slow(descriptor: int) -> None:
        calls.append(descriptor)
        entered.set()
        assert proceed.wait(30)
        real(descriptor)

    monkeypatch.setattr(os, "fdatasync", slow)
    segment.append(b"0")
    first = threading.Thread(target=segment.sync)
    first.start()
    assert entered.wait(30)
    appended = threading.Barrier(5)

    def write() -> None:
        segment.append(b"x")
        appended.wait(30)
        segment.sync()

    others = [threading.Thread(target=write) for _ in range(4)]
    for other in others:
        other.start()
    appended.wait(30)
    proceed.set()
    for thread in (first, *others):
        thread.join()
    assert len(calls) == 2
    store.close()


def test_a_segment_whose_sync_failed_says_so_to_everyone_after(tmp_path, monkeypatch):
    store = LocalStore(tmp_path, owner="shard-0")
    segment = store.open_segment("segments/a")
    segment.append(b"x")

    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(LogError, match=r"segments/a.*Input/output error"):
            segment.sync()
    # The next fdatasync would answer "fine" for pages that the system threw away.
    for call in (segment.sync, lambda: segment.append(b"y")):
        with pytest.raises(LogError, match="takes nothing more"):
            call()
    store.close()


def test_what_a_full_disk_took_of_a_record_is_given_back(tmp_path, monkeypatch):
    """A part was written; the shard needs room to go on with a new generation."""
    store = LocalStore(tmp_path, owner="a")
    segment = store.open_segment("s/1")
    segment.append(b"whole")

    def full(descriptor, data, offset):
        raise OSError(errno.ENOSPC, "No space left on device")

    real = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda descriptor, pieces, start: real(descriptor, pieces[:1], start))
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(LogError, match="s/1: No space left on device"):
        segment.append(b"header", b"data")
    assert (tmp_path / "s" / "1").read_bytes() == b"whole"
    monkeypatch.undo()
    assert segment.append(b"next") == 5
    segment.close()
    assert store.read("s/1") == b"wholenext"
    store.close()


def test_a_segment_whose_name_is_not_durable_leaves_nothing(tmp_path, monkeypatch):
    store = LocalStore(tmp_path, owner="a")
    store.create("s/0", b"")
    before = len(os.listdir("/proc/self/fd"))

    def fails(directory):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(local_store, "fsync_directory", fails)
    for _ in range(3):
        with pytest.raises(LogError, match="s/1: Input/output error"):
            store.open_segment("s/1")
    assert len(os.listdir("/proc/self/fd")) == before
    assert store.list("s/") == ["s/0"]
    store.close()
