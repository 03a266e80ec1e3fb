"""Checkpoints: the same state after a restore, damage found and named, older ones as a way back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from trainer.checkpoint import Checkpoints, Progress
from trainer.checkpoint_files import newest, verify
from trainer.collectives import Ranks
from trainer.config import Config
from trainer.errors import CheckpointError
from trainer.metrics import QualityWindow
from trainer.recommender import Recommender
from trainer.stream.columns import Impressions, Position

POSITIONS = [Position("impressions", 0, 17, 3), Position("impressions", 1, 4, 0)]
MakeConfig = Callable[..., Config]
MakeBatches = Callable[..., list[Impressions]]


class Run:
    """A recommender and its metric window."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.recommender = Recommender(config, ranks=ranks)
        self.window = QualityWindow(
            domains=config.schema.domains,
            tasks=config.schema.task_names,
            window=config.train.metrics_window,
        )

    def train(self, batches: list[Impressions]) -> None:
        for batch in batches:
            scores = self.recommender.train(batch, now_s=int(batch.event_time_ms_N.max()) // 1000)
            self.window.add(
                scores,
                labels_NT=batch.labels_NT,
                known_NT=batch.known_NT,
                domain_N=batch.domain_N,
                users_N=batch.user_ids_N,
            )

    def assert_same(self, other: Run) -> None:
        for (name, mine), (_, theirs) in zip(
            self.recommender.dense.named_parameters(),
            other.recommender.dense.named_parameters(),
            strict=True,
        ):
            assert torch.equal(mine, theirs), name
        mine, theirs = self.recommender.shards["dim16"], other.recommender.shards["dim16"]
        rows, rows2 = mine.ids.rows(), theirs.ids.rows()
        for column, column2 in zip(rows, rows2, strict=True):
            np.testing.assert_array_equal(column, column2)
        assert torch.equal(mine.rows.rows_CD[rows.slots_N], theirs.rows.rows_CD[rows.slots_N])
        assert torch.equal(mine.rows.state_C[rows.slots_N], theirs.rows.state_C[rows.slots_N])
        assert self.window.qualities() == other.window.qualities()


def progress(step: int) -> Progress:
    return Progress(
        step=step,
        generation=3,
        impressions_trained=step * 64,
        event_time_s=9,
        dead_letters={"unknown_domain": 2},
    )


def test_restored_run_goes_on_bit_for_bit(
    ranks: Ranks, make_config: MakeConfig, make_batches: MakeBatches, tmp_path: Path
) -> None:
    """With evictions on both sides of the checkpoint."""
    config = make_config(bytes_limit=256 << 10)
    batches = make_batches(config, 160)
    unbroken = Run(config, ranks)
    unbroken.train(batches[:80])
    checkpoints = Checkpoints(tmp_path, config=config, ranks=ranks)
    checkpoints.save(unbroken.recommender, window=unbroken.window, progress=progress(80), positions=POSITIONS)
    restored_run = Run(config, ranks)
    restored = checkpoints.restore(restored_run.recommender, window=restored_run.window)
    assert restored is not None
    assert restored.positions == POSITIONS
    assert restored.progress == progress(80)
    unbroken.assert_same(restored_run)
    for run in (unbroken, restored_run):
        run.train(batches[80:])
    assert unbroken.recommender.shards["dim16"].ids.counters().evicted["score"] > 100
    unbroken.assert_same(restored_run)


def test_rows_move_into_another_number_of_slots(
    ranks: Ranks, make_config: MakeConfig, make_batches: MakeBatches, tmp_path: Path
) -> None:
    config = make_config(bytes_limit=1 << 20)
    run = Run(config, ranks)
    run.train(make_batches(config, 30))
    checkpoints = Checkpoints(tmp_path, config=config, ranks=ranks)
    checkpoints.save(run.recommender, window=run.window, progress=progress(30), positions=[])
    checkpoints.close()
    larger = make_config(bytes_limit=2 << 20)
    other = Run(larger, ranks)
    assert Checkpoints(tmp_path, config=larger, ranks=ranks).restore(other.recommender, window=other.window)
    old, new = run.recommender.shards["dim16"], other.recommender.shards["dim16"]
    assert new.slots_per_rank > old.slots_per_rank
    rows = old.ids.rows()
    slots_N = new.ids.lookup(rows.keys_N)
    assert (slots_N >= 0).all()
    assert torch.equal(new.rows.rows_CD[slots_N], old.rows.rows_CD[rows.slots_N])
    assert torch.equal(new.rows.state_C[slots_N], old.rows.state_C[rows.slots_N])


@pytest.fixture
def saved(
    ranks: Ranks, make_config: MakeConfig, make_batches: MakeBatches, tmp_path: Path
) -> tuple[Checkpoints, Run, Path]:
    """Two checkpoints, of steps 1 and 2."""
    config = make_config(bytes_limit=256 << 10)
    run = Run(config, ranks)
    checkpoints = Checkpoints(tmp_path, config=config, ranks=ranks)
    for step, batch in enumerate(make_batches(config, 2), start=1):
        run.train([batch])
        checkpoints.save(run.recommender, window=run.window, progress=progress(step), positions=POSITIONS)
    return checkpoints, run, tmp_path


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_damaged_checkpoint_is_named_and_the_one_before_is_used(
    saved: tuple[Checkpoints, Run, Path], damage: str, ranks: Ranks
) -> None:
    checkpoints, run, root = saved
    newest_directory = root / "step-000000000002"
    name = "manifest.json" if damage == "manifest" else "dim16.rank0.00000.rowseg"
    victim = newest_directory / name
    data = bytearray(victim.read_bytes())
    if damage == "remove":
        victim.unlink()
    elif damage == "truncate":
        victim.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 0x10
        victim.write_bytes(data if damage == "flip" else data[:-30])
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        verify(newest_directory)
    found = checkpoints.restore(run.recommender, window=run.window)
    assert found is not None
    assert found.progress.step == 1
    (root / "step-000000000001" / "dense.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint is whole"):
        newest(root)


def test_every_byte_of_a_checkpoint_is_covered(saved: tuple[Checkpoints, Run, Path]) -> None:
    """Flip one bit in each file: each is noticed."""
    _, _, root = saved
    directory = root / "step-000000000002"
    rng = np.random.default_rng(0)
    for path in sorted(directory.iterdir()):
        data = bytearray(path.read_bytes())
        place = int(rng.integers(len(data)))
        original = data[place]
        data[place] = original ^ 1
        path.write_bytes(data)
        with pytest.raises(CheckpointError):
            verify(directory)
        data[place] = original
        path.write_bytes(data)
    assert verify(directory).step == 2


def test_unfinished_checkpoint_is_not_one(saved: tuple[Checkpoints, Run, Path]) -> None:
    checkpoints, run, root = saved
    unfinished = root / ".writing-000000000003"
    unfinished.mkdir()
    (unfinished / "manifest.json").write_text("{}")
    (root / "LATEST").unlink()
    found = checkpoints.restore(run.recommender, window=run.window)
    assert found is not None
    assert found.progress.step == 2
    checkpoints.save(run.recommender, window=run.window, progress=progress(4), positions=[])
    assert not unfinished.exists()


def test_old_checkpoints_are_dropped(ranks: Ranks, make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(bytes_limit=256 << 10)
    config = replace(config, checkpoint=replace(config.checkpoint, keep=2))
    run = Run(config, ranks)
    checkpoints = Checkpoints(tmp_path, config=config, ranks=ranks)
    for step in (1, 2, 3, 11):
        checkpoints.save(run.recommender, window=run.window, progress=progress(step), positions=[])
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-000000000003", "step-000000000011"]
    assert (tmp_path / "LATEST").read_text() == "step-000000000011"


def test_another_schema_or_model_is_refused(
    saved: tuple[Checkpoints, Run, Path], ranks: Ranks, make_config: MakeConfig
) -> None:
    checkpoints, _, root = saved
    checkpoints.close()
    config = make_config(bytes_limit=256 << 10)
    wider = replace(config, model=replace(config.model, tower_widths=(24, 8)))
    run = Run(wider, ranks)
    checkpoints = Checkpoints(root, config=wider, ranks=ranks)
    with pytest.raises(CheckpointError, match="expected shape"):
        checkpoints.restore(run.recommender, window=run.window)
    checkpoints.close()
    schema = replace(config.schema, tasks=config.schema.tasks[:-1])
    fewer = replace(config, schema=schema)
    run = Run(fewer, ranks)
    with pytest.raises(CheckpointError, match="made under schema"):
        Checkpoints(root, config=fewer, ranks=ranks).restore(run.recommender, window=run.window)


def test_no_checkpoint_is_a_fresh_start(ranks: Ranks, make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(bytes_limit=256 << 10)
    run = Run(config, ranks)
    checkpoints = Checkpoints(tmp_path / "none", config=config, ranks=ranks)
    assert checkpoints.restore(run.recommender, window=run.window) is None


def test_saving_a_step_again_never_removes_the_newest_checkpoint(
    saved: tuple[Checkpoints, Run, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positions can move without a step, past bad records. A crash at any rename leaves a checkpoint."""
    checkpoints, run, root = saved
    before = {path.name for path in root.glob("step-*")}
    checkpoints.save(run.recommender, window=run.window, progress=progress(2), positions=POSITIONS)
    assert {path.name for path in root.glob("step-*")} == before, "nothing moved: nothing is written"

    moved = [Position("impressions", 0, 18, 0)]
    with monkeypatch.context() as patch:
        patch.setattr("os.rename", _crash)
        with pytest.raises(_Crash):
            checkpoints.save(run.recommender, window=run.window, progress=progress(2), positions=moved)
    found = newest(root)
    assert found is not None
    assert found[1].positions == POSITIONS
    checkpoints.save(run.recommender, window=run.window, progress=progress(2), positions=moved[:0])
    checkpoints.save(run.recommender, window=run.window, progress=progress(2), positions=moved)
    found = newest(root)
    assert found is not None
    assert found[1].positions == moved


class _Crash(Exception):
    pass


def _crash(*_: object) -> None:
    raise _Crash


def test_damaged_checkpoint_does_not_push_a_whole_one_out(
    ranks: Ranks, make_config: MakeConfig, tmp_path: Path
) -> None:
    """Retention counts what can be restored."""
    config = make_config(bytes_limit=256 << 10)
    config = replace(config, checkpoint=replace(config.checkpoint, keep=1))
    run = Run(config, ranks)
    first = Checkpoints(tmp_path, config=config, ranks=ranks)
    first.save(run.recommender, window=run.window, progress=progress(5), positions=[])
    (tmp_path / "step-000000000009").mkdir()
    restored = first.restore(run.recommender, window=run.window)
    assert restored is not None
    assert restored.progress.step == 5
    first.save(run.recommender, window=run.window, progress=progress(7), positions=[])
    found = newest(tmp_path)
    assert found is not None
    assert found[1].step == 7
    assert (tmp_path / "damaged-step-000000000009").exists()


def test_second_trainer_in_one_directory_is_refused(
    saved: tuple[Checkpoints, Run, Path], ranks: Ranks, make_config: MakeConfig
) -> None:
    _, _, root = saved
    with pytest.raises(CheckpointError, match="another trainer uses this checkpoint directory"):
        Checkpoints(root, config=make_config(), ranks=ranks)


def test_rows_survive_a_change_of_policy(
    ranks: Ranks, make_config: MakeConfig, make_batches: MakeBatches, tmp_path: Path
) -> None:
    """Another score on resume: the id table starts under it, with every row that was there."""
    config = make_config(bytes_limit=1 << 20)
    run = Run(config, ranks)
    run.train(make_batches(config, 10))
    checkpoints = Checkpoints(tmp_path, config=config, ranks=ranks)
    checkpoints.save(run.recommender, window=run.window, progress=progress(10), positions=[])
    checkpoints.close()
    table = config.tables[0]
    other = replace(config, tables=(replace(table, score=replace(table.score, kind="lru")),))
    resumed = Run(other, ranks)
    assert Checkpoints(tmp_path, config=other, ranks=ranks).restore(
        resumed.recommender, window=resumed.window
    )
    old, new = run.recommender.shards["dim16"], resumed.recommender.shards["dim16"]
    rows = old.ids.rows()
    slots_N = new.ids.lookup(rows.keys_N)
    assert (slots_N >= 0).all()
    assert torch.equal(new.rows.rows_CD[slots_N], old.rows.rows_CD[rows.slots_N])


def test_manifest_is_plain_json(saved: tuple[Checkpoints, Run, Path]) -> None:
    _, _, root = saved
    manifest = json.loads((root / "step-000000000002" / "manifest.json").read_text())
    assert manifest["positions"] == [list(position) for position in POSITIONS]
    assert manifest["counters"]["impressions_trained"] == 128
