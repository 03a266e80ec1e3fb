"""The commands for checkpoints: what they print, exports that come back equal, faults in one line."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import safetensors.numpy
import structlog
import torch
from msgspec.structs import replace

from feature_eviction import make_keys
from trainer.__main__ import main
from trainer.checkpoint import Checkpoints, Progress
from trainer.checkpoint.compare import diff_tables
from trainer.checkpoint.export import export_checkpoint
from trainer.checkpoint.folders import list_folders, read_manifest
from trainer.checkpoint.restore import SavedState
from trainer.checkpoint.store import open_store
from trainer.collectives import Ranks
from trainer.config import Config, to_toml
from trainer.stream.columns import Impressions, Position


@dataclass
class Saved:
    """Two checkpoints of one run, of steps 20 and 40, with evictions between them."""

    root: Path
    config: Config
    config_file: Path
    run: Any

    def state(self, index: int) -> SavedState:
        store = open_store(str(self.root))
        folder = list_folders(store).committed[index]
        return SavedState(store, folder, read_manifest(store, folder))


@pytest.fixture(scope="module")
def trained(
    make_config: Callable[..., Config],
    make_batches: Callable[..., list[Impressions]],
    make_run: Callable[[Config], Any],
    ranks: Ranks,
    tmp_path_factory: pytest.TempPathFactory,
) -> Saved:
    config = make_config(bytes_limit=200 << 10)
    # Small segments, so that a table has several files.
    config = replace(config, publish=replace(config.publish, segment_bytes_max=1 << 16))
    run, batches = make_run(config), make_batches(config, 40)
    folder = tmp_path_factory.mktemp("trained")
    root = folder / "checkpoints"
    checkpoints = Checkpoints(str(root), config=config, ranks=ranks, now_ms=lambda: 1_700_000_000_000)
    for step in (20, 40):
        run.train(batches[step - 20 : step])
        checkpoints.save(
            run.recommender,
            parts=run.parts,
            progress=Progress(
                step=step, published=f"1.{step}", event_time_s=step, impressions_trained=step * 64
            ),
            positions=[Position("impressions", 0, step, 0)],
        )
    checkpoints.close()
    config_file = folder / "config.toml"
    config_file.write_text(to_toml(config))
    return Saved(root, config, config_file, run)


@pytest.fixture
def saved(trained: Saved, tmp_path: Path) -> Saved:
    """A copy of the files, to damage."""
    root, config_file = tmp_path / "checkpoints", tmp_path / "config.toml"
    shutil.copytree(trained.root, root)
    shutil.copy(trained.config_file, config_file)
    return Saved(root, trained.config, config_file, trained.run)


@pytest.fixture(autouse=True)
def _unconfigured_log() -> Iterator[None]:
    """main() sends log lines to this test's stderr, which no later test has."""
    yield
    structlog.reset_defaults()


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """What a command prints that succeeds."""

    def run(*arguments: object) -> list[str]:
        code = main(["checkpoints", *map(str, arguments)])
        captured = capsys.readouterr()
        assert (code, captured.err) == (0, "")
        return captured.out.splitlines()

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one line of a command that fails."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        code = main(["checkpoints", *map(str, arguments)])
        errors = capsys.readouterr().err
        assert code == 1
        assert errors.count("\n") == 1, errors
        assert errors.startswith("error: ")
        return errors.strip()

    return run


def test_list_shows_each_checkpoint_and_what_is_none(saved: Saved, command: Callable[..., list[str]]) -> None:
    store = open_store(str(saved.root))
    first, second = list_folders(store).committed
    store.write("step-000000000050.000001.000003/dense.safetensors", b"half")
    header, line20, line40, unfinished = command("list", saved.root)
    assert header.split() == ["step", "saved", "(UTC)", "MB", "ranks", "version", "folder"]
    megabytes = f"{read_manifest(store, first).num_bytes / 1e6:.1f}"
    assert line20.split() == ["20", "2023-11-14", "22:13:20", megabytes, "1", "1.20", str(first)]
    assert line40.split()[-2:] == ["1.40", str(second)]
    assert unfinished.strip().startswith("50  unfinished")


def test_verify_names_the_damaged_file_and_fails(
    saved: Saved, command: Callable[..., list[str]], refused: Callable[..., str]
) -> None:
    assert [line.split(": ")[1].split(",")[0] for line in command("verify", saved.root)] == ["whole"] * 2
    folder = list_folders(open_store(str(saved.root))).committed[1]
    victim = saved.root / str(folder) / "rank0.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1])
    line = refused("verify", saved.root)
    assert line.startswith(f"error: 1 of 2 checkpoints are damaged: {victim}: expected ")
    assert len(command("verify", saved.root, 20)) == 1
    refused("verify", saved.root, 40)


def test_diff_counts_rows_parameters_and_numbers(saved: Saved, command: Callable[..., list[str]]) -> None:
    """Against a loop over dictionaries."""
    rows: list[dict[int, tuple[bytes, float]]] = [{}, {}]
    for index, found in enumerate(rows):
        for segment in saved.state(index).segments("dim16"):
            assert segment.state_N is not None
            for key, row, state in zip(segment.ids_N.tolist(), segment.rows_ND, segment.state_N, strict=True):
                found[key] = (row.tobytes(), float(state))
    before, after = rows
    both = before.keys() & after.keys()
    changed = sum(before[key] != after[key] for key in both)
    added, removed = len(after.keys() - before.keys()), len(before.keys() - after.keys())
    assert min(added, removed, changed, len(both) - changed) > 0
    lines = command("diff", saved.root, 20, 40)
    num_same = len(both) - changed
    expected = f"table dim16: {added} rows added, {removed} removed, {changed} changed, {num_same} the same"
    assert lines[0].startswith(expected)
    num = len(list(saved.run.recommender.dense.named_parameters()))
    assert re.fullmatch(rf"dense: [1-9]\d* of {num} parameters changed", lines[1])
    gaps = [float(line.split(": ")[1]) for line in lines if line.startswith("  ")]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] > 0
    assert "position impressions/0: 20:0 -> 40:0" in lines
    assert "counter impressions_trained: 1280 -> 2560" in lines
    assert "published: 1.20 -> 1.40" in lines
    [whole] = diff_tables(saved.state(0), saved.state(1))
    [in_shares] = diff_tables(saved.state(0), saved.state(1), share_bytes=20_000)
    assert in_shares == whole
    assert whole.largest_difference > 0

    assert command("diff", saved.root, 40, 40) == [
        f"table dim16: 0 rows added, 0 removed, 0 changed, {len(after)} the same; largest difference 0",
        f"dense: 0 of {num} parameters changed",
    ]


def test_export_is_plain_safetensors_with_every_row(saved: Saved, tmp_path: Path) -> None:
    """Read by the safetensors package, not by our reader; several files a table."""
    out = tmp_path / "out"
    export_checkpoint(saved.state(1), open_store(str(out)), schema=saved.config.schema, file_bytes=40_000)
    description = json.loads((out / "export.json").read_text())
    assert (description["format"], description["step"]) == ("freshet.export.1", 40)
    assert {one["name"] for one in description["features"]} == {f.name for f in saved.config.schema.features}
    table = description["tables"]["dim16"]
    assert len(table["files"]) > 1
    parts = [safetensors.numpy.load_file(out / name) for name in table["files"]]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    assert len(columns["ids"]) == table["num_rows"]
    shard = saved.run.recommender.shards["dim16"]
    slots_N = shard.ids.lookup(columns["ids"])
    rows = shard.ids.rows(slots_N)
    assert table["num_rows"] == shard.ids.num_rows
    np.testing.assert_array_equal(columns["rows"], shard.rows.rows_CD[slots_N].numpy())
    np.testing.assert_array_equal(columns["state"], shard.rows.state_C[slots_N].numpy())
    np.testing.assert_array_equal(columns["scores"], rows.scores_N)
    np.testing.assert_array_equal(columns["last_seen_s"], rows.last_seen_s_N)
    np.testing.assert_array_equal(columns["updates"], rows.updates_N)
    dense = safetensors.numpy.load_file(out / "dense.safetensors")
    for name, parameter in saved.run.recommender.dense.named_parameters():
        np.testing.assert_array_equal(dense[f"param/{name}"], parameter.detach().numpy())
        assert dense[f"exp_avg/{name}"].shape == tuple(parameter.shape)


def test_exported_checkpoint_comes_back_as_a_first_one(
    saved: Saved,
    tmp_path: Path,
    command: Callable[..., list[str]],
    ranks: Ranks,
    make_run: Callable[[Config], Any],
) -> None:
    """Rows and dense equal bit for bit; no positions, step 0."""
    command("export", saved.root, tmp_path / "out", "--config", saved.config_file)
    imported = tmp_path / "imported"
    command("import", tmp_path / "out", imported, "--config", saved.config_file)
    assert len(command("verify", imported)) == 1
    run = make_run(saved.config)
    checkpoints = Checkpoints(str(imported), config=saved.config, ranks=ranks)
    restored = checkpoints.restore(run.recommender, parts=run.parts)
    assert restored is not None
    assert restored.positions == []
    assert restored.progress == Progress(event_time_s=40)
    run.assert_rows_moved_from(saved.run)
    for mine, theirs in zip(
        run.recommender.dense.parameters(), saved.run.recommender.dense.parameters(), strict=True
    ):
        assert torch.equal(mine, theirs)
        state, state2 = (
            one.recommender.dense_optimizer.state[parameter]
            for one, parameter in ((run, mine), (saved.run, theirs))
        )
        assert torch.equal(state["exp_avg_sq"], state2["exp_avg_sq"])
    assert checkpoints.save(run.recommender, parts=run.parts, progress=Progress(step=1), positions=[])
    restored = checkpoints.restore(make_run(saved.config).recommender, parts={})
    assert restored is not None
    assert restored.progress.step == 1
    checkpoints.close()


@pytest.fixture
def batch_trained(saved: Saved, tmp_path: Path) -> Iterator[Path]:
    """As another trainer would write it: ids and rows, without dense parameters or anything else."""
    folder = tmp_path / "batch"
    folder.mkdir()
    feature = saved.config.schema.features[0]
    keys_N, _ = make_keys(np.arange(100), class_id=feature.class_id)
    rows_ND = np.arange(1600, dtype=np.float32).reshape(100, 16)
    safetensors.numpy.save_file({"ids": keys_N, "rows": rows_ND}, folder / "t.safetensors")
    description = {
        "format": "freshet.export.1",
        "event_time_s": 500,
        "tables": {"dim16": {"dim": 16, "files": ["t.safetensors"]}},
    }
    (folder / "export.json").write_text(json.dumps(description))
    return folder


def test_files_of_another_trainer_warm_start_a_run(
    saved: Saved,
    batch_trained: Path,
    tmp_path: Path,
    command: Callable[..., list[str]],
    ranks: Ranks,
    make_run: Callable[[Config], Any],
) -> None:
    """The dense model is a fresh run's; a row without columns is as good as one just seen."""
    imported = tmp_path / "imported"
    command("import", batch_trained, imported, "--config", saved.config_file)
    fresh, run = make_run(saved.config), make_run(saved.config)
    torch.manual_seed(999)
    checkpoints = Checkpoints(str(imported), config=saved.config, ranks=ranks)
    assert checkpoints.restore(run.recommender, parts=run.parts)
    checkpoints.close()
    for mine, theirs in zip(
        run.recommender.dense.parameters(), fresh.recommender.dense.parameters(), strict=True
    ):
        assert torch.equal(mine, theirs)
    shard = run.recommender.shards["dim16"]
    rows = shard.ids.rows()
    order_N = rows.keys_N.argsort()
    found_ND = shard.rows.rows_CD[rows.slots_N[order_N]].numpy()
    np.testing.assert_array_equal(found_ND.ravel(), np.arange(1600, dtype=np.float32))
    assert set(rows.last_seen_s_N) == {500}
    assert set(rows.updates_N) == {1}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"rows": np.zeros((100, 8), np.float32)},
            "expected float32 [100, 16], found float32 [100, 8]",
        ),
        ({"rows": np.zeros((100, 16), np.float64)}, "'rows': expected float32 [100, 16], found float64"),
        ({"rows": np.full((100, 16), np.nan, np.float32)}, "column 'rows' is not finite at id"),
        ({"ids": np.zeros(100, np.int64)}, "keys_N must be distinct"),
        ({"ids": np.arange(100) + (99 << 52)}, "ids of class 99 (id >> 52)"),
        ({"last_seen_s": np.full(100, -5)}, "last_seen_s_N must be in 0..4294967295"),
        ({"state": np.full(100, -1, np.float32)}, "'state': sums of squares are not negative"),
        ({"bias": np.zeros(100, np.float32)}, "expected columns ids and rows, found"),
    ],
)
def test_import_names_the_column_that_is_wrong(
    columns: dict[str, np.ndarray],
    message: str,
    saved: Saved,
    batch_trained: Path,
    tmp_path: Path,
    refused: Callable[..., str],
) -> None:
    path = batch_trained / "t.safetensors"
    safetensors.numpy.save_file(safetensors.numpy.load_file(path) | columns, path)
    line = refused("import", batch_trained, tmp_path / "imported", "--config", saved.config_file)
    assert line.startswith(f"error: {path}: ")
    assert message in line
    assert not list((tmp_path / "imported").glob("step-*")), "nothing half made is left"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "x"}, "expected format 'freshet.export.1', found 'x'"),
        ({"tables": 5}, "Expected `object`"),
        ({"schema_hash": "other"}, "made under schema other"),
        (
            {"event_time_s": 1_700_000_000_000},
            "export.json: 'event_time_s': expected seconds in 0..4294967295, found 1700000000000",
        ),
        ({"event_time_s": -1}, "'event_time_s': expected seconds in 0..4294967295, found -1"),
        (
            {"tables": {"dim8": {"dim": 8, "files": []}}},
            "'dim8' of dim 8: the configuration has tables dim16",
        ),
        ({"tables": {"dim16": {"dim": 16, "files": ["../x"]}}}, "'../x' is not the name of a file beside it"),
        ({"tables": {"dim16": {"dim": 16, "files": ["gone"]}}}, "gone: is missing; export.json names it"),
        ({"tables": {"dim16": {"dim": 16, "files": ["t.safetensors"] * 2}}}, "is in two files"),
        (
            {"tables": {"dim16": {"dim": 16, "files": ["t.safetensors"], "num_rows": 9}}},
            "expected 9 rows, found 100",
        ),
        ({"dense": "t.safetensors"}, "t.safetensors: the model has no 'ids'"),
        ({"sums": {"t.safetensors": {"num_bytes": 1, "crc32c": 2}}}, "expected 1 bytes with CRC32C 00000002"),
    ],
)
def test_import_names_what_the_description_has_wrong(
    changes: dict[str, Any],
    message: str,
    saved: Saved,
    batch_trained: Path,
    tmp_path: Path,
    refused: Callable[..., str],
) -> None:
    path = batch_trained / "export.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    line = refused("import", batch_trained, tmp_path / "imported", "--config", saved.config_file)
    assert message in line


@pytest.mark.parametrize(
    ("left_out", "values", "message"),
    [
        (("step",), {}, "dense 'step/{name}': expected shape [], found nothing; Adam's step, exp_avg and"),
        (("exp_avg",), {}, "dense 'exp_avg/{name}': expected shape {shape}, found nothing; Adam's"),
        (("step", "exp_avg"), {}, "dense 'step/{name}': expected shape [], found nothing; Adam's"),
        ((), {"exp_avg_sq": -1e-4}, "'exp_avg_sq/{name}': expected at least 0, found -0.0001"),
        ((), {"step": -1.0}, "'step/{name}': expected at least 0, found -1"),
    ],
)
def test_import_names_the_optimizer_state_that_cannot_be_gone_on_with(
    left_out: tuple[str, ...],
    values: dict[str, float],
    message: str,
    saved: Saved,
    tmp_path: Path,
    command: Callable[..., list[str]],
    refused: Callable[..., str],
) -> None:
    """Else the first step ends with rows updated and the dense model not, or with weights that are NaN."""
    command("export", saved.root, tmp_path / "out")
    path = tmp_path / "out" / "dense.safetensors"
    arrays = safetensors.numpy.load_file(path)
    name, parameter = next(iter(saved.run.recommender.dense.named_parameters()))
    for key in left_out:
        del arrays[f"{key}/{name}"]
    for key, value in values.items():
        arrays[f"{key}/{name}"] = np.full_like(arrays[f"{key}/{name}"], value)
    safetensors.numpy.save_file(arrays, path)
    description = json.loads((tmp_path / "out" / "export.json").read_text())
    (tmp_path / "out" / "export.json").write_text(json.dumps(description | {"sums": {}}))
    line = refused("import", tmp_path / "out", tmp_path / "imported", "--config", saved.config_file)
    assert line.startswith(f"error: {path}: ")
    assert message.format(name=name, shape=list(parameter.shape)) in line
    assert not list((tmp_path / "imported").glob("step-*")), "nothing half made is left"


def test_what_a_command_cannot_do_is_one_line(
    saved: Saved, tmp_path: Path, refused: Callable[..., str], ranks: Ranks, batch_trained: Path
) -> None:
    empty, config = tmp_path / "empty", saved.config_file
    for arguments in (("list", empty), ("verify", empty), ("diff", empty, 1, 2), ("export", empty, "out")):
        assert refused(*arguments).startswith(f"error: {empty}: holds no checkpoint")
    assert not empty.exists(), "reading creates nothing"
    assert "holds no checkpoint 30; the newest steps are 20, 40" in refused("diff", saved.root, 20, 30)
    assert "holds no checkpoint x" in refused("verify", saved.root, "x")
    assert "nosuch://x" in refused("list", "nosuch://x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    assert "is not empty; export into a new folder" in refused("export", saved.root, tmp_path / "full")
    assert "export.json: is missing" in refused("import", empty, tmp_path / "i", "--config", config)
    assert "cannot be read" in refused("import", empty, tmp_path / "i", "--config", tmp_path / "none.toml")
    assert "holds checkpoints already" in refused("import", batch_trained, saved.root, "--config", config)
    checkpoints = Checkpoints(str(saved.root), config=saved.config, ranks=ranks)
    assert "another trainer uses" in refused("import", batch_trained, saved.root, "--config", config)
    checkpoints.close()
    schema = replace(saved.config.schema, tasks=saved.config.schema.tasks[:-1])
    config.write_text(to_toml(msgspec.structs.replace(saved.config, schema=schema)))
    assert "made under schema" in refused("export", saved.root, tmp_path / "o", "--config", config)
