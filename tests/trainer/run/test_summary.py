"""The contract of summary.json, and that each of its checks can fail."""

from __future__ import annotations

import json
from collections.abc import Callable

import msgspec
import pytest

from trainer.config import Config
from trainer.run.freshness import Histogram
from trainer.run.observe import Observation
from trainer.run.summary import Ending, ReplicaSummary, Summary, summarize, to_json

CONTRACT = [
    *("impressions_produced", "impressions_trained", "dead_letters", "samples_per_s"),
    *("auc", "gauc", "best_possible_auc", "table", "versions"),
    *("rows_changed", "rows_pushed", "rows_held_back", "bytes_pushed"),
    *("replicas", "freshness_ms", "seed", "config_hash"),
]


def make(config: Config, observation: Observation, ending: Ending) -> Summary:
    overall, steady = Histogram(), Histogram()
    for value in (100, 200, 900):
        overall.add(value, 1)
    return summarize(config, observation, ending, overall=overall, steady=steady)


def failed(summary: Summary) -> list[str]:
    return [check.name for check in summary.checks if not check.passed]


def test_summary_keeps_its_contract(small_config: Config, observation: Observation, ending: Ending) -> None:
    found = json.loads(to_json(make(small_config, observation, ending)))
    assert list(found)[: len(CONTRACT)] == CONTRACT
    assert found["dead_letters"] == 10
    assert found["samples_per_s"] == 250.0  # 500 of the 990 in this process's 2 s of training
    assert found["table"] == {
        "rows": 100,
        "capacity": 120,
        "bytes": 1000,
        "bytes_limit": 1200,
        "evicted": {"score": 50, "expired": 11},
        "admitted": 161,
        "refused": {"probability": 5},
    }
    assert found["versions"] == {"published": 8, "full": 2, "delta": 6}
    assert found["auc"]["slide"] == {"click": 0.71, "like": None}
    assert found["replicas"][1] == {
        "name": "replica-1",
        "version": "1.7",
        "predictions_checked": 384,
        "max_abs_diff": 2e-7,
    }
    assert found["freshness_ms"] == {"p50": 200, "p99": 900, "impressions": 3}
    assert found["freshness_steady_ms"] == {"p50": None, "p99": None, "impressions": 0}
    assert (found["seed"], found["config_hash"]) == (small_config.seed, small_config.hash())


def test_good_run_passes_every_check(small_config: Config, observation: Observation, ending: Ending) -> None:
    assert failed(make(small_config, observation, ending)) == []


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda e: msgspec.structs.replace(e, ended="interrupted by SIGINT"), "ran to its end"),
        (lambda e: msgspec.structs.replace(e, unclean=["shard: exit code 1"]), "processes ended cleanly"),
        (
            lambda e: msgspec.structs.replace(e, impressions_wanted=1001),
            "producer produced what was asked",
        ),
        (lambda e: msgspec.structs.replace(e, produced_before=1), "every impression trained once"),
        (lambda e: with_replica(e, version="1.6"), "replicas hold the last version"),
        (lambda e: with_replica(e, version=""), "replicas hold the last version"),
        (lambda e: with_replica(e, max_abs_diff=1.1e-6), "replicas predict what the trainer predicts"),
        (lambda e: with_replica(e, max_abs_diff=None), "replicas predict what the trainer predicts"),
        (lambda e: with_replica(e, predictions_checked=0), "replicas predict what the trainer predicts"),
    ],
)
def test_check_fails_on_its_own_fault_alone(
    small_config: Config,
    observation: Observation,
    ending: Ending,
    change: Callable[[Ending], Ending],
    name: str,
) -> None:
    assert failed(make(small_config, observation, change(ending))) == [name]


def with_replica(ending: Ending, **changes: object) -> Ending:
    first, second = ending.replicas
    return msgspec.structs.replace(ending, replicas=[first, msgspec.structs.replace(second, **changes)])


def test_replica_that_was_never_asked_fails(
    small_config: Config, observation: Observation, ending: Ending
) -> None:
    ending = msgspec.structs.replace(ending, replicas=ending.replicas[:1])
    assert failed(make(small_config, observation, ending)) == [
        "replicas hold the last version",
        "replicas predict what the trainer predicts",
    ]


def test_table_that_was_above_its_budget_for_a_while_fails(
    small_config: Config, observation: Observation, ending: Ending
) -> None:
    ending = msgspec.structs.replace(ending, table_bytes_peak={"dim16": 1001, "dim32": 200})
    summary = make(small_config, observation, ending)
    assert failed(summary) == ["tables within their budget"]
    assert summary.checks[-1].detail == "dim16: 1001 of 1000 bytes"


def test_table_above_its_budget_fails(small_config: Config, observation: Observation, ending: Ending) -> None:
    assert observation.trainer is not None
    observation.trainer.tables[1].bytes = 201
    summary = make(small_config, observation, ending)
    assert failed(summary) == ["tables within their budget"]
    assert summary.checks[-1].detail == "dim32: 201 of 200 bytes"


@pytest.mark.parametrize(("trained", "passes"), [(989, False), (990, True), (991, False)])
def test_own_stream_is_counted_exactly(
    small_config: Config, observation: Observation, ending: Ending, trained: int, passes: bool
) -> None:
    assert observation.trainer is not None
    observation.trainer.impressions_trained = trained
    assert (not failed(make(small_config, observation, ending))) == passes


@pytest.mark.parametrize(("trained", "passes"), [(989, False), (990, True), (5000, True)])
def test_shared_topic_may_hold_more_but_never_less(
    small_config: Config, observation: Observation, ending: Ending, trained: int, passes: bool
) -> None:
    assert observation.trainer is not None
    observation.trainer.impressions_trained = trained
    ending = msgspec.structs.replace(ending, owns_stream=False)
    summary = make(small_config, observation, ending)
    assert (not failed(summary)) == passes
    (detail,) = [check.detail for check in summary.checks if check.name == "every impression trained once"]
    assert ("4010 more were others' in the topic" in detail) == (trained == 5000)


def test_coarser_rows_are_allowed_a_larger_difference(
    small_config: Config, observation: Observation, ending: Ending
) -> None:
    serving = msgspec.structs.replace(small_config.serving, row_format="int8")
    config = msgspec.structs.replace(small_config, serving=serving)
    ending = with_replica(ending, max_abs_diff=0.01)
    assert failed(make(config, observation, ending)) == []
    assert failed(make(small_config, observation, ending)) == ["replicas predict what the trainer predicts"]


def test_run_that_ended_before_any_status_still_has_a_summary(small_config: Config, ending: Ending) -> None:
    ending = msgspec.structs.replace(
        ending, ended="broker: exit code 1", replicas=list[ReplicaSummary](), unclean=["broker: exit code 1"]
    )
    summary = make(small_config, Observation(t_s=0.0), ending)
    assert summary.checks[0].detail == "broker: exit code 1"
    assert "ran to its end" in failed(summary)
    assert json.loads(to_json(summary))["impressions_trained"] == 0


@pytest.mark.parametrize(
    ("wanted", "recorded", "time_was_up", "told_to_stop", "passes", "detail"),
    [
        (1000, False, False, True, True, "1000 of 1000"),  # the signal came after the last record
        (1001, False, False, True, False, "1000 of 1001: the producer ended early, by a signal"),
        (1001, False, True, True, True, "1000 until the time was up"),
        (1000, True, False, False, True, "1000 of 1000"),
        (1001, True, False, False, True, "1000 of 1001, all that the data holds"),
        (1001, True, False, True, False, "1000 of 1001: the producer ended early, by a signal"),
        (1001, True, True, True, True, "1000 until the time was up"),
    ],
)
def test_producers_early_end_counts_unless_the_run_or_the_data_ended_it(
    small_config: Config,
    observation: Observation,
    ending: Ending,
    wanted: int,
    recorded: bool,
    time_was_up: bool,
    told_to_stop: bool,
    passes: bool,
    detail: str,
) -> None:
    ending = msgspec.structs.replace(
        ending, impressions_wanted=wanted, source_may_end=recorded, time_was_up=time_was_up
    )
    assert observation.producer is not None
    observation.producer.told_to_stop = told_to_stop
    summary = make(small_config, observation, ending)
    assert failed(summary) == ([] if passes else ["producer produced what was asked"])
    assert {check.name: check.detail for check in summary.checks}[
        "producer produced what was asked"
    ] == detail
