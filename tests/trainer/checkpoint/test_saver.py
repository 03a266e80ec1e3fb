"""Checkpoints: the same state after a restore, on each kind of store, while training goes on."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from msgspec.structs import replace

from trainer.checkpoint import Checkpoints, Progress, SavePhase
from trainer.checkpoint.folders import list_folders, read_manifest
from trainer.checkpoint.store import LocalStore, open_store
from trainer.collectives import Ranks
from trainer.config import Config
from trainer.errors import CheckpointError, LeaseLostError
from trainer.stream.columns import Impressions, Position

POSITIONS = [Position("impressions", 0, 17, 3), Position("impressions", 1, 4, 0)]
MakeConfig = Callable[..., Config]
MakeBatches = Callable[..., list[Impressions]]
MakeRun = Callable[[Config], Any]
MakeProgress = Callable[[int], Progress]


def steps(root: str) -> list[int]:
    """Of the committed checkpoints, from old to new."""
    return [folder.step for folder in list_folders(open_store(root)).committed]


@pytest.fixture
def small(make_config: MakeConfig) -> Config:
    return make_config(bytes_limit=256 << 10)


def test_restored_run_goes_on_bit_for_bit(
    ranks: Ranks,
    small: Config,
    make_run: MakeRun,
    make_batches: MakeBatches,
    make_progress: MakeProgress,
    store_root: str,
) -> None:
    """With evictions on both sides of the checkpoint, and the random generator where it was."""
    batches = make_batches(small, 160)
    unbroken = make_run(small)
    unbroken.train(batches[:80])
    checkpoints = Checkpoints(store_root, config=small, ranks=ranks)
    torch.manual_seed(77)
    checkpoints.save(
        unbroken.recommender, parts=unbroken.parts, progress=make_progress(80), positions=POSITIONS
    )
    expected = torch.rand(3)
    restored_run = make_run(small)
    restored = checkpoints.restore(restored_run.recommender, parts=restored_run.parts)
    assert torch.equal(torch.rand(3), expected)
    assert restored is not None
    assert restored.positions == POSITIONS
    assert restored.progress == make_progress(80)
    unbroken.assert_same(restored_run)
    for run in (unbroken, restored_run):
        run.train(batches[80:])
    assert unbroken.recommender.shards["dim16"].ids.counters().evicted["score"] > 100
    unbroken.assert_same(restored_run)
    checkpoints.close()


def test_training_goes_on_while_a_checkpoint_is_written(
    ranks: Ranks,
    small: Config,
    make_run: MakeRun,
    make_batches: MakeBatches,
    make_progress: MakeProgress,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The writer is held back until later batches are trained; what is restored is the state at begin."""
    batches = make_batches(small, 60)
    run, expected = make_run(small), make_run(small)
    for one in (run, expected):
        one.train(batches[:30])
    may_write, write = threading.Event(), LocalStore.write

    def held_back(store: LocalStore, name: str, data: bytes, *, inside: str = "") -> None:
        if name.startswith("step-"):
            assert may_write.wait(timeout=60)
        write(store, name, data, inside=inside)

    monkeypatch.setattr(LocalStore, "write", held_back)
    checkpoints = Checkpoints(str(tmp_path), config=small, ranks=ranks)
    progress, positions = make_progress(30), list(POSITIONS)
    assert checkpoints.begin(run.recommender, parts=run.parts, progress=progress, positions=positions)
    progress.step, progress.dead_letters["unknown_domain"] = 31, 9
    positions.clear()
    for batch in batches[30:]:
        run.train([batch])
        assert checkpoints.phase is SavePhase.WRITING
        assert not checkpoints.job_done
        assert checkpoints.advance(all_done=False, any_failed=False) is None
    may_write.set()
    committed = checkpoints.finish(lambda: (checkpoints.job_done, checkpoints.job_failed))
    assert committed is not None
    assert (committed.step, committed.positions) == (30, POSITIONS)
    assert committed.seconds >= 0
    assert checkpoints.phase is SavePhase.IDLE
    restored_run = make_run(small)
    restored = checkpoints.restore(restored_run.recommender, parts=restored_run.parts)
    assert restored is not None
    assert restored.progress == make_progress(30)
    expected.assert_same(restored_run)
    checkpoints.close()


@pytest.mark.parametrize("bytes_limit", [2 << 20, 512 << 10])
def test_rows_move_into_another_number_of_slots(
    bytes_limit: int,
    ranks: Ranks,
    make_config: MakeConfig,
    make_run: MakeRun,
    make_batches: MakeBatches,
    make_progress: MakeProgress,
    tmp_path: Path,
) -> None:
    """All where there is room; where there is not, the best scores stay, with their own rows."""
    config, other = make_config(bytes_limit=1 << 20), make_config(bytes_limit=bytes_limit)
    old, new = make_run(config), make_run(other)
    old.train(make_batches(config, 120))
    checkpoints = Checkpoints(str(tmp_path), config=config, ranks=ranks)
    checkpoints.save(old.recommender, parts=old.parts, progress=make_progress(120), positions=[])
    checkpoints.close()
    checkpoints = Checkpoints(str(tmp_path), config=other, ranks=ranks)
    assert checkpoints.restore(new.recommender, parts=new.parts)
    checkpoints.close()
    mine, theirs = new.recommender.shards["dim16"], old.recommender.shards["dim16"]
    if bytes_limit > 1 << 20:
        assert mine.slots_per_rank > theirs.slots_per_rank
        new.assert_rows_moved_from(old)
    else:
        rows = mine.ids.rows()
        assert mine.slots_per_rank < theirs.ids.num_rows
        assert len(rows.keys_N) == mine.slots_per_rank
        from_N = theirs.ids.lookup(rows.keys_N)
        assert (from_N >= 0).all()
        assert torch.equal(mine.rows.rows_CD[rows.slots_N], theirs.rows.rows_CD[from_N])
    assert new.window.qualities() == old.window.qualities()


def test_rows_survive_a_change_of_policy(
    ranks: Ranks,
    make_config: MakeConfig,
    make_run: MakeRun,
    make_batches: MakeBatches,
    make_progress: MakeProgress,
    tmp_path: Path,
) -> None:
    """Another score on resume: the id table starts under it, with every row that was there."""
    config = make_config(bytes_limit=1 << 20)
    run = make_run(config)
    run.train(make_batches(config, 10))
    checkpoints = Checkpoints(str(tmp_path), config=config, ranks=ranks)
    checkpoints.save(run.recommender, parts=run.parts, progress=make_progress(10), positions=[])
    checkpoints.close()
    table = config.tables[0]
    other = replace(config, tables=(replace(table, score=replace(table.score, kind="lru")),))
    resumed = make_run(other)
    checkpoints = Checkpoints(str(tmp_path), config=other, ranks=ranks)
    assert checkpoints.restore(resumed.recommender, parts=resumed.parts)
    checkpoints.close()
    resumed.assert_rows_moved_from(run)


def test_another_schema_or_model_is_refused(
    ranks: Ranks, small: Config, make_run: MakeRun, make_progress: MakeProgress, tmp_path: Path
) -> None:
    run = make_run(small)
    checkpoints = Checkpoints(str(tmp_path), config=small, ranks=ranks)
    checkpoints.save(run.recommender, parts=run.parts, progress=make_progress(1), positions=[])
    checkpoints.close()
    wider = replace(small, model=replace(small.model, tower_widths=(24, 8)))
    fewer = replace(small, schema=replace(small.schema, tasks=small.schema.tasks[:-1]))
    for config, message in ((wider, "expected shape"), (fewer, "made under schema")):
        run = make_run(config)
        checkpoints = Checkpoints(str(tmp_path), config=config, ranks=ranks)
        with pytest.raises(CheckpointError, match=message):
            checkpoints.restore(run.recommender, parts=run.parts)
        checkpoints.close()
    assert steps(str(tmp_path)) == [1], "it is not damaged"


def test_no_checkpoint_is_a_fresh_start(
    ranks: Ranks, small: Config, make_run: MakeRun, store_root: str
) -> None:
    run = make_run(small)
    checkpoints = Checkpoints(store_root, config=small, ranks=ranks)
    assert checkpoints.restore(run.recommender, parts=run.parts) is None
    checkpoints.close()


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest", "no manifest"])
def test_damaged_checkpoint_is_named_set_aside_and_the_one_before_is_used(
    damage: str,
    ranks: Ranks,
    small: Config,
    make_run: MakeRun,
    make_progress: MakeProgress,
    store_root: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = make_run(small)
    checkpoints = Checkpoints(store_root, config=small, ranks=ranks)
    for step in (1, 2):
        checkpoints.save(run.recommender, parts=run.parts, progress=make_progress(step), positions=[])
    checkpoints.close()
    store = open_store(store_root)
    first, second = list_folders(store).committed
    name = "manifest.json" if "manifest" in damage else "dim16.rank0.00000.rowseg"
    data = bytearray(store.read(f"{second}/{name}"))
    if damage in ("remove", "no manifest"):
        store.remove(f"{second}/{name}")
    elif damage == "truncate":
        store.write(f"{second}/{name}", bytes(data[: len(data) // 2]))
    else:
        data[len(data) // 2] ^= 0x10
        store.write(f"{second}/{name}", bytes(data if damage == "flip" else data[:-30]))

    checkpoints = Checkpoints(store_root, config=small, ranks=ranks)
    found = checkpoints.restore(run.recommender, parts=run.parts)
    assert found is not None
    assert found.progress.step == 1
    listing = list_folders(store)
    assert listing.committed == [first]
    if damage == "no manifest":
        assert listing.unfinished == [second]
    else:
        assert [one.removeprefix("damaged-") for one in listing.set_aside] == [str(second)]
        reason = capsys.readouterr().out
        assert f"{second}/{name}: " in reason
        assert "expected" in reason
        assert "missing" in reason if damage == "remove" else "found" in reason
    store.remove(f"{first}/dense.safetensors")
    with pytest.raises(
        CheckpointError, match=r"no checkpoint is whole: .*dense\.safetensors: expected"
    ) as caught:
        checkpoints.restore(run.recommender, parts=run.parts)
    assert list_folders(store).committed == [first], "a backup may still mend it"
    assert str(caught.value).endswith(f"or move what is damaged out of {store.root} to begin anew.")
    store.remove(str(first))
    assert checkpoints.restore(run.recommender, parts=run.parts) is None
    checkpoints.close()


def test_nothing_is_written_where_nothing_moved_and_a_step_may_be_saved_again(
    ranks: Ranks, small: Config, make_run: MakeRun, make_progress: MakeProgress, store_root: str
) -> None:
    """Positions can move without a step, past bad records."""
    run = make_run(small)
    checkpoints = Checkpoints(store_root, config=small, ranks=ranks)
    assert checkpoints.save(run.recommender, parts=run.parts, progress=make_progress(2), positions=POSITIONS)
    assert not checkpoints.save(
        run.recommender, parts=run.parts, progress=make_progress(2), positions=list(POSITIONS)
    )
    assert steps(store_root) == [2]
    moved = [Position("impressions", 0, 18, 0)]
    assert checkpoints.save(run.recommender, parts=run.parts, progress=make_progress(2), positions=moved)
    assert steps(store_root) == [2, 2]
    restored = checkpoints.restore(run.recommender, parts=run.parts)
    assert restored is not None
    assert restored.positions == moved
    checkpoints.close()


def test_failed_write_is_counted_and_training_saves_again(
    ranks: Ranks,
    small: Config,
    make_run: MakeRun,
    make_progress: MakeProgress,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The disk is full at a file, then at the manifest; the last save of a run must not fail."""
    run = make_run(small)
    root = str(tmp_path)
    checkpoints = Checkpoints(root, config=small, ranks=ranks)
    checkpoints.save(run.recommender, parts=run.parts, progress=make_progress(1), positions=[])
    fsync, left = os.fsync, [0]

    def full(descriptor: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    for number, num_good in ((1, 4), (2, 12)):
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", full)
            left[0] = num_good
            assert checkpoints.begin(
                run.recommender, parts=run.parts, progress=make_progress(2), positions=[]
            )
            assert checkpoints.finish(lambda: (checkpoints.job_done, checkpoints.job_failed)) is None
            assert left[0] <= 0, "the fault was met"
        assert checkpoints.phase is SavePhase.IDLE
        assert checkpoints.totals.failed == number
        assert "No space left on device" in checkpoints.totals.last_failure
        assert steps(root) == [1]
    assert "No space left on device" in capsys.readouterr().out

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        left[0] = 4
        with pytest.raises(CheckpointError, match=r"state of step 2 could not be saved: .*No space left"):
            checkpoints.save(run.recommender, parts=run.parts, progress=make_progress(2), positions=[])
    assert checkpoints.save(run.recommender, parts=run.parts, progress=make_progress(2), positions=[])
    assert steps(root) == [1, 2]
    checkpoints.close()
    assert list_folders(open_store(root)).unfinished == []


def test_state_that_is_not_finite_is_not_saved_over_one_that_is(
    ranks: Ranks,
    small: Config,
    make_run: MakeRun,
    make_batches: MakeBatches,
    make_progress: MakeProgress,
    store_root: str,
) -> None:
    run = make_run(small)
    run.train(make_batches(small, 1))
    checkpoints = Checkpoints(store_root, config=small, ranks=ranks)
    checkpoints.save(run.recommender, parts=run.parts, progress=make_progress(1), positions=[])
    shard = run.recommender.shards["dim16"]
    shard.rows.rows_CD[int(shard.ids.rows().slots_N[0])] = float("nan")
    with pytest.raises(CheckpointError, match="'rows' is not finite at id"):
        checkpoints.save(run.recommender, parts=run.parts, progress=make_progress(2), positions=[])
    assert steps(store_root) == [1]
    checkpoints.close()


def test_a_fault_of_the_program_ends_training(
    ranks: Ranks, small: Config, make_run: MakeRun, make_progress: MakeProgress, tmp_path: Path
) -> None:
    """What is no failure of the store would come back at every save: it is raised, not counted."""

    class Wrong:
        def columns(self) -> dict[str, Any]:
            return {"a_list": [1]}

        def restore(self, columns_by_rank: object, *, rank: int, world_size: int) -> None:
            raise AssertionError

    run = make_run(small)
    checkpoints = Checkpoints(str(tmp_path), config=small, ranks=ranks)
    checkpoints.begin(run.recommender, parts={"wrong": Wrong()}, progress=make_progress(1), positions=[])
    with pytest.raises(AttributeError, match="dtype"):
        checkpoints.finish(lambda: (checkpoints.job_done, checkpoints.job_failed))
    checkpoints.close()


def test_run_whose_lease_was_taken_commits_no_more(
    ranks: Ranks, small: Config, make_run: MakeRun, make_progress: MakeProgress, store_root: str
) -> None:
    run = make_run(small)
    checkpoints = Checkpoints(store_root, config=small, ranks=ranks)
    checkpoints.save(run.recommender, parts=run.parts, progress=make_progress(1), positions=[])
    store = open_store(store_root)
    checkpoints.begin(run.recommender, parts=run.parts, progress=make_progress(2), positions=[])
    while not checkpoints.job_done:
        pass
    store.write("lease/000002.json", b"{}")
    assert checkpoints.advance(all_done=True, any_failed=False) is None
    assert checkpoints.phase is SavePhase.COMMITTING
    with pytest.raises(LeaseLostError, match="another run has taken over with lease 2"):
        checkpoints.finish(lambda: (checkpoints.job_done, checkpoints.job_failed))
    with pytest.raises(LeaseLostError, match="this run's is 1"):
        checkpoints.save(run.recommender, parts=run.parts, progress=make_progress(3), positions=[])
    checkpoints.close()
    assert steps(store_root) == [1]
    assert store.names("lease") == ["000001.json", "000002.json"]


def test_later_lease_is_preferred_to_what_a_fenced_run_slipped_in(
    ranks: Ranks, small: Config, make_run: MakeRun, make_progress: MakeProgress, store_root: str
) -> None:
    run = make_run(small)
    for step in (7, 5):
        checkpoints = Checkpoints(store_root, config=small, ranks=ranks)
        checkpoints.save(run.recommender, parts=run.parts, progress=make_progress(step), positions=[])
        checkpoints.close()
    checkpoints = Checkpoints(store_root, config=small, ranks=ranks)
    restored = checkpoints.restore(run.recommender, parts=run.parts)
    assert restored is not None
    assert restored.progress.step == 5
    checkpoints.close()


def test_second_trainer_in_one_directory_is_refused(ranks: Ranks, small: Config, store_root: str) -> None:
    checkpoints = Checkpoints(store_root, config=small, ranks=ranks)
    with pytest.raises(CheckpointError, match="another trainer uses this checkpoint directory"):
        Checkpoints(store_root, config=small, ranks=ranks)
    checkpoints.close()
    Checkpoints(store_root, config=small, ranks=ranks).close()


def test_idle_run_keeps_its_lease_by_saves_that_write_nothing(
    ranks: Ranks, small: Config, make_run: MakeRun, make_progress: MakeProgress
) -> None:
    """On a store without locks; a run that is paused for longer than the lease loses it."""
    clock_ms = [1_000_000]
    lease_ms = small.checkpoint.lease_used_s * 1000

    def open_at(root: str) -> Checkpoints:
        return Checkpoints(root, config=small, ranks=ranks, now_ms=lambda: clock_ms[0])

    root = "memory://idle-run"
    run = make_run(small)
    first = open_at(root)
    for _ in range(5):
        first.save(run.recommender, parts=run.parts, progress=make_progress(1), positions=[])
        first._writer.submit(lambda: None).result()
        clock_ms[0] += lease_ms - 1000
        with pytest.raises(CheckpointError, match=r"renewed \d+ s ago.*a start in 1 s takes it over"):
            open_at(root)
    clock_ms[0] += 1000
    second = open_at(root)
    with pytest.raises(LeaseLostError):
        first.save(run.recommender, parts=run.parts, progress=make_progress(2), positions=[])
    assert second.save(run.recommender, parts=run.parts, progress=make_progress(1), positions=[])
    first.close()
    second.close()


def test_manifest_is_plain_json(
    ranks: Ranks, small: Config, make_run: MakeRun, make_progress: MakeProgress, tmp_path: Path
) -> None:
    run = make_run(small)
    checkpoints = Checkpoints(str(tmp_path), config=small, ranks=ranks, now_ms=lambda: 1234)
    committed = checkpoints.save(
        run.recommender, parts=run.parts, progress=make_progress(2), positions=POSITIONS
    )
    checkpoints.close()
    assert committed is not None
    manifest = json.loads((tmp_path / committed.name / "manifest.json").read_text())
    assert manifest["positions"] == [list(position) for position in POSITIONS]
    assert manifest["counters"]["impressions_trained"] == 128
    assert (manifest["published"], manifest["created_ms"]) == ("3.17", 1234)
    assert (tmp_path / "LATEST").read_text() == committed.name
    names = {path.name for path in (tmp_path / committed.name).iterdir()}
    assert names == {"manifest.json", *(entry["name"] for entry in manifest["files"])}


def test_address_that_no_package_knows_is_refused(ranks: Ranks, small: Config) -> None:
    assert "nosuch" not in fsspec.available_protocols()
    with pytest.raises(CheckpointError, match=r"checkpoint directory 'nosuch://x': Protocol not known"):
        Checkpoints("nosuch://x", config=small, ranks=ranks)


def test_checkpoint_of_an_older_run_lets_a_new_part_begin_anew(
    ranks: Ranks, small: Config, make_run: MakeRun, make_progress: MakeProgress, tmp_path: Path
) -> None:
    run = make_run(small)
    checkpoints = Checkpoints(str(tmp_path), config=small, ranks=ranks)
    checkpoints.save(run.recommender, parts={}, progress=make_progress(1), positions=[])
    assert checkpoints.restore(run.recommender, parts=run.parts)
    assert run.window.qualities() == ({}, {})
    checkpoints.close()
    manifest = read_manifest(open_store(str(tmp_path)), list_folders(open_store(str(tmp_path))).committed[0])
    assert {entry.kind for entry in manifest.files} == {"rows", "ids", "state", "dense"}
