"""What every store of the version log must do. A test module inherits StoreContract and gives `reopen`:

class TestMine(StoreContract):
    @pytest.fixture
    def reopen(self): return lambda: MyStore(...)   # the same objects each time it is called
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from param_server.errors import LogError, StoreExistsError, StoreMissingError
from param_server.stores import SegmentWriter, Store


class StoreContract:
    @pytest.fixture
    def reopen(self) -> Callable[[], Store]:
        raise NotImplementedError("a store's own tests give this fixture")

    def test_it_has_the_shape_of_a_store(self, reopen):
        store = reopen()
        assert isinstance(store, Store)
        assert isinstance(store.open_segment("segments/a"), SegmentWriter)

    def test_a_created_object_is_there_whole_and_is_never_created_again(self, reopen):
        store = reopen()
        store.create("manifests/1", b"first")
        with pytest.raises(StoreExistsError, match="manifests/1"):
            store.create("manifests/1", b"second")
        store.close()
        assert reopen().read("manifests/1") == b"first"

    def test_of_many_creators_one_succeeds(self, reopen):
        store, outcomes = reopen(), []
        barrier = threading.Barrier(8)

        def create(number: int) -> None:
            barrier.wait()
            try:
                store.create("one", bytes([number]))
                outcomes.append(number)
            except StoreExistsError:
                outcomes.append(-1)

        threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        winners = [number for number in outcomes if number >= 0]
        assert len(outcomes) == 8
        assert len(winners) == 1
        assert store.read("one") == bytes(winners)

    def test_a_replaced_object_has_the_new_content_alone(self, reopen):
        store = reopen()
        for content in (b"a longer content", b"short"):
            store.replace("generation", content)
            assert store.read("generation") == content
        store.close()
        assert reopen().read("generation") == b"short"

    def test_synced_bytes_of_a_segment_are_there_after_a_restart(self, reopen):
        store = reopen()
        segment = store.open_segment("segments/shard-0/00000001")
        assert segment.append(b"head", b"-body") == 0
        assert segment.append(b"more") == 9
        segment.sync()
        assert segment.append(b"last") == 13
        segment.sync()
        segment.sync()
        segment.close()
        store.close()
        store = reopen()
        assert store.read("segments/shard-0/00000001") == b"head-bodymorelast"
        assert store.read("segments/shard-0/00000001", start=7, num_bytes=8) == b"dymorela"
        assert store.read("segments/shard-0/00000001", start=15, num_bytes=99) == b"st"
        assert store.read("segments/shard-0/00000001", start=99, num_bytes=9) == b""
        assert store.size("segments/shard-0/00000001") == 17
        with pytest.raises(StoreExistsError):
            store.open_segment("segments/shard-0/00000001")

    def test_a_closed_segment_takes_nothing_more(self, reopen):
        segment = reopen().open_segment("segments/a")
        segment.close()
        with pytest.raises(LogError, match="segments/a"):
            segment.append(b"x")

    def test_many_writers_of_one_segment_lose_nothing(self, reopen):
        store = reopen()
        segment = store.open_segment("segments/a")
        places: dict[int, bytes] = {}

        def write(number: int) -> None:
            for step in range(20):
                content = b"%d:%d;" % (number, step)
                places[segment.append(content)] = content
                segment.sync()

        threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(places) == 80
        for start, content in places.items():
            assert store.read("segments/a", start=start, num_bytes=len(content)) == content

    def test_a_listing_has_every_object_once_and_nothing_set_aside(self, reopen):
        store = reopen()
        for name in ("b/2", "b/1", "c", "bb"):
            store.create(name, b"x")
        segment = store.open_segment("b/3")
        for _ in range(3):
            segment.append(b"x")
            segment.sync()
        assert store.list("") == ["b/1", "b/2", "b/3", "bb", "c"]
        assert store.list("b/") == ["b/1", "b/2", "b/3"]
        assert store.list("b") == ["b/1", "b/2", "b/3", "bb"]
        assert store.list("nothing/") == []
        for name in ("b/1", "b/3"):
            store.set_aside(name)
            with pytest.raises(StoreMissingError, match=name):
                store.read(name)
        assert store.list("") == ["b/2", "bb", "c"]
        store.create("b/1", b"again")
        store.set_aside("b/1")
        assert store.list("b/") == ["b/2"]

    def test_a_deleted_object_is_gone_and_can_be_made_anew(self, reopen):
        store = reopen()
        store.create("a/1", b"old")
        segment = store.open_segment("a/2")
        segment.append(b"x")
        segment.sync()
        segment.close()
        for name in ("a/1", "a/2", "a/3"):
            store.delete(name)
        assert store.list("") == []
        store.create("a/1", b"new")
        store.open_segment("a/2")
        assert store.read("a/1") == b"new"

    def test_a_missing_object_is_named(self, reopen):
        store = reopen()
        for call in (store.read, store.size, store.set_aside):
            with pytest.raises(StoreMissingError, match="a/none"):
                call("a/none")

    def test_no_name_leads_out_of_the_store(self, reopen):
        store = reopen()
        for name in ("", "../x", "/x", "a//b", "a/../b", ".hidden", "a/.b", "a b", "x" * 600, "a@1"):
            for call in (lambda name=name: store.read(name), lambda name=name: store.create(name, b"")):
                with pytest.raises(LogError, match="store"):
                    call()
