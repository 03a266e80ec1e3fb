"""Folders of a checkpoint directory: order, damage in each file, and what may be deleted when."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from trainer.checkpoint.folders import (
    DAMAGED_KEPT,
    Folder,
    list_folders,
    parse_folder,
    retain,
    verify,
)
from trainer.checkpoint.manifest import (
    MANIFEST,
    CheckpointManifest,
    decode_manifest,
    encode_manifest,
    entry_of,
)
from trainer.checkpoint.store import Store, open_store
from trainer.errors import CheckpointError, DamagedError


@pytest.fixture
def store(store_root: str) -> Store:
    return open_store(store_root)


def put(store: Store, folder: Folder, *, created_ms: int = 0) -> None:
    """A checkpoint of two small files."""
    contents = {"dense.safetensors": b"dense" * 50, "t.rank0.00000.rowseg": b"rows" * 70}
    for name, data in contents.items():
        store.write(f"{folder}/{name}", data)
    manifest = CheckpointManifest(
        step=folder.step,
        created_ms=created_ms,
        generation=1,
        published="",
        topic_id="",
        world_size=1,
        schema_hash="s",
        config_hash="c",
        positions=[],
        slots_per_rank={},
        counters={},
        dead_letters={},
        files=[entry_of(name, data, kind="dense") for name, data in contents.items()],
    )
    store.create(f"{folder}/{MANIFEST}", encode_manifest(manifest))


def kept(store: Store) -> list[int]:
    return [folder.step for folder in list_folders(store).committed]


def test_names_say_lease_save_and_step_and_sort_by_age() -> None:
    folders = [Folder(1, 1, 500), Folder(1, 2, 400), Folder(2, 1, 100), Folder(2, 10, 10**13)]
    assert sorted(folders, key=lambda folder: (folder.step, folder)) != folders
    assert sorted(folders) == folders
    assert [parse_folder(str(folder)) for folder in folders] == folders
    assert str(folders[0]) == "step-000000000500.000001.000001"
    for name in ("step-000000000500", "damaged-step-000000000500.000001.000001", "LATEST", "lease"):
        assert parse_folder(name) is None


def test_every_byte_of_a_checkpoint_is_covered(store: Store) -> None:
    """Flip one bit, cut or lengthen each file: each is noticed, and the file named."""
    folder = Folder(1, 1, 1)
    put(store, folder)
    assert verify(store, folder).step == 1
    rng = np.random.default_rng(0)
    for name in store.names(str(folder)):
        original = store.read(f"{folder}/{name}")
        places = range(len(original)) if name == MANIFEST else rng.integers(len(original), size=5)
        damages = [bytes((*original[:at], original[at] ^ 1, *original[at + 1 :])) for at in places]
        for data in (*damages, original[:-1], original[: len(original) // 2], b"", original + b"\0"):
            store.write(f"{folder}/{name}", data)
            with pytest.raises(DamagedError, match=rf"{name}: .*expected.*found"):
                verify(store, folder)
        store.remove(f"{folder}/{name}")
        with pytest.raises(DamagedError, match=rf"{name}: .*missing"):
            verify(store, folder)
        store.write(f"{folder}/{name}", original)
    assert verify(store, folder).step == 1


def test_manifest_of_another_format_is_no_damage() -> None:
    import crc32c

    for body in (b'{"format":"freshet.checkpoint.9"}', b"[]", b'{"format":"x","step":"many"}'):
        data = b'{"crc32c":"%08x",' % crc32c.crc32c(b"{" + body[1:]) + body[1:]
        with pytest.raises(CheckpointError, match=r"this build reads 'freshet\.checkpoint\.2'") as caught:
            decode_manifest(data, where="x")
        assert not isinstance(caught.value, DamagedError)


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "", "a\n"])
def test_manifest_cannot_name_a_file_elsewhere(name: str) -> None:
    with pytest.raises((ValueError, msgspec.ValidationError), match="not a file name of a checkpoint"):
        entry_of(name, b"", kind="rows")


def test_the_newest_are_kept_by_count(store: Store) -> None:
    folders = [Folder(1, save, save * 10) for save in range(1, 7)]
    for folder in folders:
        put(store, folder)
    deleted = retain(store, folders[-1], keep=2, keep_s=0, keep_max=100, now_ms=10**6)
    assert sorted(deleted) == folders[:4]
    assert kept(store) == [50, 60]


def test_young_ones_are_kept_beyond_the_count_up_to_a_bound(store: Store) -> None:
    """Saved at 0 s, 10 s, ... 90 s; it is 95 s."""
    folders = [Folder(1, save + 1, save) for save in range(10)]
    for folder in folders:
        put(store, folder, created_ms=folder.step * 10_000)
    retain(store, folders[-1], keep=2, keep_s=60, keep_max=100, now_ms=95_000)
    assert kept(store) == [4, 5, 6, 7, 8, 9], "35 s and later: none younger than 60 s is deleted"
    retain(store, folders[-1], keep=2, keep_s=60, keep_max=4, now_ms=95_000)
    assert kept(store) == [6, 7, 8, 9]
    retain(store, folders[-1], keep=3, keep_s=10, keep_max=4, now_ms=95_000)
    assert kept(store) == [7, 8, 9], "old ones stay while they are among the newest"


def test_leftovers_go_and_damaged_ones_are_bounded(store: Store) -> None:
    for save in range(1, 7):
        put(store, Folder(1, save, save))
        store.set_aside(str(Folder(1, save, save)), reason="torn")
    for folder in (Folder(1, 7, 7), Folder(2, 1, 8), Folder(3, 9, 9)):
        store.write(f"{folder}/dense.safetensors", b"half")
    newest = Folder(2, 2, 9)
    put(store, newest)
    retain(store, newest, keep=1, keep_s=0, keep_max=1, now_ms=0)
    listing = list_folders(store)
    assert listing.committed == [newest]
    assert listing.unfinished == [Folder(3, 9, 9)], "a later lease's save may be on its way"
    assert len(listing.set_aside) == DAMAGED_KEPT
    assert [name[-6:] for name in listing.set_aside] == ["000004", "000005", "000006"]


def test_checkpoint_of_another_build_is_not_overlooked(store: Store) -> None:
    store.write("step-000000000007/manifest.json", b"{}")
    with pytest.raises(CheckpointError, match="step-000000000007: is not a name that this build gives"):
        list_folders(store)


def test_half_deleted_checkpoint_is_unfinished_not_damaged(store: Store) -> None:
    """Deletion takes the manifest first."""
    removed: list[str] = []
    remove = store.remove

    class Recording:
        def __getattr__(self, name: str) -> object:
            return getattr(store, name)

        def remove(self, name: str) -> None:
            removed.append(name)
            remove(name)

    old, newest = Folder(1, 1, 1), Folder(1, 2, 2)
    put(store, old)
    put(store, newest)
    retain(Recording(), newest, keep=1, keep_s=0, keep_max=1, now_ms=0)  # type: ignore[arg-type]
    assert removed == [f"{old}/{MANIFEST}", str(old)]
