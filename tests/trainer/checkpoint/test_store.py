"""One contract for every store: files whole or absent, created once, listed, removed, set aside."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.checkpoint.folders import Folder, list_folders
from trainer.checkpoint.manifest import MANIFEST
from trainer.checkpoint.store import FsspecStore, LocalStore, Store, open_store
from trainer.errors import StoreError


@pytest.fixture
def store(store_root: str) -> Store:
    return open_store(store_root)


def test_what_is_written_is_read_and_replaced(store: Store) -> None:
    assert store.names() == []
    for data in (b"first", b"", b"second" * 100_000):
        store.write("folder/file", data)
        assert store.read("folder/file") == data
    store.write("top", b"x")
    assert store.names() == ["folder", "top"]
    assert store.names("folder") == ["file"]


def test_a_file_is_created_once(store: Store) -> None:
    store.create("lease/1", b"mine")
    with pytest.raises(FileExistsError):
        store.create("lease/1", b"theirs")
    assert store.read("lease/1") == b"mine"
    assert store.names("lease") == ["1"]


def test_a_file_that_is_not_there_is_said_to_be_missing(store: Store) -> None:
    with pytest.raises(FileNotFoundError):
        store.read("folder/file")
    assert store.names("folder") == []
    store.remove("folder")
    store.remove("folder/file")


def test_folders_are_removed_with_all_in_them(store: Store) -> None:
    for name in ("a/1", "a/2", "b/1"):
        store.write(name, b"x")
    store.remove("a")
    store.remove("b/1")
    assert store.names("a") == []
    assert "a" not in store.names()
    assert store.names("b") == []


def test_checkpoint_set_aside_keeps_its_files_and_counts_no_more(store: Store) -> None:
    folder = Folder(lease=1, save=2, step=3)
    store.write(f"{folder}/rows", b"rows")
    store.write(f"{folder}/{MANIFEST}", b"{}")
    assert list_folders(store).committed == [folder]
    store.set_aside(str(folder), reason="rows: torn")
    listing = list_folders(store)
    assert (listing.committed, listing.unfinished) == ([], [])
    assert len(listing.set_aside) == 1
    assert store.read(f"{listing.set_aside[0]}/rows") == b"rows"


def test_lock_is_exclusive_until_it_is_closed(store: Store) -> None:
    lock = store.lock()
    if not store.has_locks:
        assert lock is None
        return
    assert lock is not None
    with pytest.raises(BlockingIOError):
        store.lock()
    lock.close()
    again = store.lock()
    assert again is not None
    again.close()
    assert store.names() == [], "the lock is hidden"


def test_local_addresses_are_the_local_store_and_others_are_not(tmp_path: Path) -> None:
    for address in (str(tmp_path), f"file://{tmp_path}", f"local://{tmp_path}/"):
        store = open_store(address)
        assert isinstance(store, LocalStore)
        assert store.root == str(tmp_path)
    assert isinstance(open_store("memory://x/y"), FsspecStore)


@pytest.mark.parametrize("call", ["write", "create"])
def test_local_file_is_durable_before_it_has_its_name(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data, then name, then folder; a crash in between leaves the old file or none under the name."""
    store = LocalStore(tmp_path)
    store.write("folder/other", b"x")
    final = tmp_path / "folder" / "file"
    seen: list[str] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        seen.append(f"{'folder' if path.is_dir() else 'data'}, {'named' if final.exists() else 'no name'}")
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", watched)
    getattr(store, call)("folder/file", b"data")
    assert seen == ["data, no name", "folder, named"]
    assert sorted(path.name for path in final.parent.iterdir()) == ["file", "other"]


def test_failures_of_a_store_are_one_kind_of_error_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in-the-way").write_text("")
    store = open_store(str(tmp_path / "in-the-way"))
    calls: list[Callable[[], object]] = [
        lambda: store.write("a/b", b""),
        lambda: store.create("a/b", b""),
        lambda: store.names(),
    ]
    for call in calls:
        with pytest.raises(StoreError, match="in-the-way"):
            call()
    remote = open_store("memory://failing")

    def gone(*_: object, **__: object) -> None:
        raise ConnectionError("the network is gone")

    for name in ("pipe_file", "cat_file", "ls", "rm"):
        monkeypatch.setattr(f"fsspec.implementations.memory.MemoryFileSystem.{name}", gone)
    calls = [
        lambda: remote.write("a", b""),
        lambda: remote.create("a", b""),
        lambda: remote.read("a"),
        lambda: remote.names(),
        lambda: remote.remove("a"),
    ]
    for call in calls:
        with pytest.raises(StoreError, match=r"memory://failing/.*ConnectionError: the network is gone"):
            call()
