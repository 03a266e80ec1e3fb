"""Every check of the campaign can fail: what it is there to catch is planted, and is caught."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from msgspec.structs import replace as replace_struct

from tests.chaos import checks, scenarios, state
from tests.chaos.runner import timeline
from tests.chaos.scenarios import CYCLE, FAMILIES, Event, draw, parse_name, replay
from trainer.checkpoint.folders import Folder
from trainer.checkpoint.manifest import MANIFEST, CheckpointManifest, encode_manifest, entry_of
from trainer.checkpoint.store import open_store
from trainer.errors import CheckpointError
from trainer.failpoints import FAILPOINTS

PRODUCED_N = np.arange(10, 20, dtype=np.uint64)
NUM_ROWS, DIM = 6, 4


def make_state(
    ids_K: npt.NDArray[np.uint64] = PRODUCED_N, counts_K: npt.NDArray[np.uint32] | None = None
) -> state.State:
    """A state that passes every check."""
    rng = np.random.default_rng(5)
    columns: state.Arrays = {
        "rows_ND": rng.normal(size=(NUM_ROWS, DIM)).astype(np.float32),
        "state_N": rng.random(NUM_ROWS, np.float32),
        "scores_N": rng.random(NUM_ROWS, np.float32),
        "last_seen_s_N": np.arange(NUM_ROWS, dtype=np.int64),
        "updates_N": np.arange(NUM_ROWS, dtype=np.int64),
    }
    manifest = CheckpointManifest(
        step=7,
        created_ms=0,
        generation=1,
        published="",
        topic_id="",
        world_size=1,
        schema_hash="",
        config_hash="",
        positions=[],
        slots_per_rank={"dim4": 8},
        counters={"impressions_trained": len(PRODUCED_N)},
        dead_letters={},
        files=[],
    )
    return state.State(
        directory=Path("step-7"),
        manifest=manifest,
        tables={"dim4": state.Table(np.arange(NUM_ROWS, dtype=np.int64), columns)},
        dense={
            "param/weight": rng.normal(size=(3, 2)).astype(np.float32),
            "exp_avg/weight": rng.normal(size=(3, 2)).astype(np.float32),
        },
        parts={"rank0/ids/dim4/slot": np.arange(NUM_ROWS)},
        ledger_ids_K=ids_K,
        ledger_counts_K=np.ones(len(ids_K), np.uint32) if counts_K is None else counts_K,
    )


def flip_last_bit(array: state.Array) -> None:
    array.reshape(-1).view(np.uint8)[0] ^= 1


def test_a_run_in_which_nothing_is_wrong_passes() -> None:
    assert checks.check_ledger(make_state(), PRODUCED_N) == []
    assert checks.check_identical(make_state(), make_state()) == []
    assert checks.check_close(make_state(), make_state(), relative_max=0.0) == []


def test_a_planted_double_application_is_caught() -> None:
    counts_K = np.ones(len(PRODUCED_N), np.uint32)
    counts_K[3] = 2
    findings = checks.check_ledger(make_state(counts_K=counts_K), PRODUCED_N)
    assert findings == ["ledger: 1 of 10 impressions were not applied exactly once, first 13"]


def test_a_planted_lost_impression_is_caught() -> None:
    findings = checks.check_ledger(make_state(ids_K=np.delete(PRODUCED_N, 4)), PRODUCED_N)
    assert findings == ["ledger: 1 of 10 impressions were never applied, first 14"]


def test_an_impression_from_nowhere_and_a_wrong_counter_are_caught() -> None:
    findings = checks.check_ledger(make_state(), PRODUCED_N[:-1])
    assert len(findings) == 2
    assert "1 of 9 impressions were applied but not produced, first 19" in findings[0]
    assert "impressions_trained is 10, produced were 9" in findings[1]


@pytest.mark.parametrize("column", state.ROW_COLUMNS)
def test_a_planted_bit_in_a_table_is_caught(column: str) -> None:
    found = make_state()
    flip_last_bit(found.tables["dim4"].columns[column])
    findings = checks.check_identical(found, make_state())
    assert len(findings) == 1
    assert findings[0].startswith(f"table 'dim4' {column}: 1 of ")


@pytest.mark.parametrize(
    ("arrays_of", "name"),
    [
        (lambda found: found.dense, "param/weight"),
        (lambda found: found.dense, "exp_avg/weight"),
        (lambda found: found.parts, "rank0/ids/dim4/slot"),
    ],
)
def test_a_planted_bit_in_the_rest_of_the_state_is_caught(
    arrays_of: Callable[[state.State], state.Arrays], name: str
) -> None:
    found = make_state()
    flip_last_bit(arrays_of(found)[name])
    (finding,) = checks.check_identical(found, make_state())
    assert f"{name}: 1 of 6 values differ in their bits" in finding
    arrays_of(found).pop(name)
    (finding,) = checks.check_identical(found, make_state())
    assert f"only on one side: {name}" in finding


def test_minus_zero_is_not_zero() -> None:
    """Equal numbers, other bits."""
    found, expected = make_state(), make_state()
    found.dense["param/weight"][0, 0], expected.dense["param/weight"][0, 0] = 0.0, -0.0
    assert checks.check_identical(found, expected) != []


def test_a_row_too_many_a_dtype_and_a_position_are_caught() -> None:
    expected, found = make_state(), make_state()
    table = found.tables["dim4"]
    fewer = state.Table(table.keys_N[1:], {name: column[1:] for name, column in table.columns.items()})
    assert len(checks.check_identical(replace(found, tables={"dim4": fewer}), expected)) == 6
    wider = {**found.dense, "param/weight": found.dense["param/weight"].astype(np.float64)}
    (finding,) = checks.check_identical(replace(found, dense=wider), expected)
    assert "float64 [3, 2], expected float32 [3, 2]" in finding
    moved = replace_struct(found.manifest, step=8)
    assert checks.check_identical(replace(found, manifest=moved), expected) == ["step: 8, expected 7"]


def test_another_sum_order_is_close_and_another_model_is_not() -> None:
    found, expected = make_state(), make_state()
    found.tables["dim4"].columns["rows_ND"] *= np.float32(1 + 1e-6)
    assert checks.check_identical(found, expected) != []
    assert checks.check_close(found, expected, relative_max=1e-5) == []
    found.dense["param/weight"] *= np.float32(1.001)
    (finding,) = checks.check_close(found, expected, relative_max=1e-5)
    assert finding.startswith("dense 'param/weight': differs by 1.00e-03")
    table = found.tables["dim4"]
    strange = {"dim4": state.Table(table.keys_N + 1, table.columns)}
    assert (
        "2 keys live on one side only"
        in checks.check_close(replace(found, tables=strange), found, relative_max=1e-5)[0]
    )


def test_replicas_with_another_row_are_caught() -> None:
    answers = {name: {"click": np.arange(4, dtype=np.float32)} for name in ("replica", "fresh")}
    assert checks.check_replicas_agree(answers) == []
    flip_last_bit(answers["fresh"]["click"])
    (finding,) = checks.check_replicas_agree(answers)
    assert finding.startswith("fresh against replica: prediction click: 1 of 4")


def test_a_damaged_checkpoint_is_really_damaged(tmp_path: Path) -> None:
    """Each kind of damage, over many places: never does the damaged checkpoint pass for whole."""
    kinds = set()
    for seed in range(30):
        store = open_store(str(tmp_path / str(seed)))
        for step in (1, 2):
            folder, data = Folder(lease=1, save=step, step=step), bytes(range(200))
            entry = entry_of("rank0.safetensors", data, kind="state")
            store.write(f"{folder}/{entry.name}", data)
            manifest = replace_struct(make_state().manifest, step=step, files=[entry])
            store.create(f"{folder}/{MANIFEST}", encode_manifest(manifest))
        root = tmp_path / str(seed)
        older, newer = state.names_of_checkpoints(root)
        assert state.newest_whole(root) == newer
        name, how = state.damage_newest(root, np.random.default_rng(seed))
        kinds.add(how.split(" at byte ")[0].split(" ", 1)[1])
        assert name == newer
        assert state.newest_whole(root) == older
    assert kinds == {"torn", "bit flipped", "missing"}


def test_all_checkpoints_damaged_is_an_error_and_none_is_none(tmp_path: Path) -> None:
    assert state.newest_whole(tmp_path) == ""
    folder = tmp_path / str(Folder(lease=1, save=1, step=1))
    folder.mkdir()
    assert state.newest_whole(tmp_path) == "", "without a manifest there is no checkpoint"
    (folder / MANIFEST).write_bytes(b"{}")
    with pytest.raises(CheckpointError, match="no checkpoint is whole"):
        state.newest_whole(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        state.read_newest(tmp_path / "nowhere")


def test_a_scenario_depends_on_its_seed_and_number_alone() -> None:
    plans = [draw(3, number) for number in range(40)]
    assert plans == [replay(plan.name, seed=3) for plan in plans]
    assert plans[0] != draw(4, 0)


def test_a_round_of_scenarios_meets_every_family_and_failpoint() -> None:
    """The torchrun and the real broker's ones a campaign adds by itself."""
    plans = [draw(1, number) for number in range(2 * len(CYCLE))]
    assert {plan.name.partition("#")[0] for plan in plans} | {"kafka", "torchrun"} == set(FAMILIES)
    assert {life.failpoint for plan in plans for life in plan.lives} >= set(FAILPOINTS)
    for plan in plans:
        assert plan.lives, plan.name
        assert all(life.failpoint or life.events or life.damage for life in plan.lives), plan.name
        names = [life.failpoint for life in plan.lives]
        assert plan.serving or not any(map(scenarios.needs_shard, names)), plan.name


def test_failpoints_that_did_not_fire_get_a_plan_that_can_be_replayed() -> None:
    plan = scenarios.cover(list(FAILPOINTS))
    assert plan.serving == any(map(scenarios.needs_shard, FAILPOINTS))
    assert [life.hit for life in plan.lives] == [1] * scenarios.LIVES
    assert replay(plan.name, seed=9) == plan
    with pytest.raises(ValueError, match="no failpoint 'lunch'; there are: after_fetch"):
        replay("cover:after_fetch,lunch", seed=9)


def test_names_of_scenarios_are_read_or_refused() -> None:
    assert parse_name("kills#14") == ("kills", 14)
    assert parse_name("torchrun") == ("torchrun", 0)
    for wrong in ("nothing", "kills#", "kills#x", "kills#-1"):
        with pytest.raises(ValueError, match="families: failpoints"):
            parse_name(wrong)


def test_what_was_stopped_goes_on_and_what_was_killed_comes_back() -> None:
    stop = Event(after_s=1.0, target="broker", action="stop", pause_s=2.0)
    kill = Event(after_s=1.5, target="shard", action="kill", pause_s=0.0)
    dead = Event(after_s=0.5, target="rank", action="kill")
    assert timeline((stop, kill, dead)) == [
        (0.5, True, dead),
        (1.0, True, stop),
        (1.5, True, kill),
        (1.5, False, kill),
        (3.0, False, stop),
    ]
