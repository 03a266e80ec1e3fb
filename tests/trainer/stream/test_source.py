"""What the source promises, against both kinds of broker."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from kafka import KafkaAdminClient, KafkaConsumer, TopicPartition

from trainer.config.config import KafkaConfig
from trainer.config.schema import SchemaConfig
from trainer.errors import StreamError
from trainer.stream import source as source_module
from trainer.stream.broker import Security, connect_options
from trainer.stream.columns import Position
from trainer.stream.record import encode_record
from trainer.stream.source import KafkaSource

START_MS = 1_700_000_000_000
RECORDS, ROWS = 60, 10


@pytest.fixture
def open_source(schema: SchemaConfig) -> Iterator[Callable[..., KafkaSource]]:
    opened: list[KafkaSource] = []

    def start(config: KafkaConfig, **arguments: object) -> KafkaSource:
        opened.append(KafkaSource(config, schema=schema, **arguments))  # type: ignore[arg-type]
        return opened[-1]

    yield start
    for source in opened:
        source.close()


@pytest.fixture
def filled(broker, kafka_config, send_values, make_impressions, schema) -> KafkaConfig:
    """A topic with RECORDS records of ROWS impressions over three partitions, request ids in stream order."""
    config = kafka_config(broker, broker.new_topic(), prefetch_impressions_max=120)
    send_values(config, _records(schema, make_impressions))
    return config


def _records(schema, make_impressions, *, first: int = 0, num: int = RECORDS):
    return [
        (
            number % 3,
            encode_record(make_impressions(ROWS, first=number * ROWS), schema),
            START_MS + number,
        )
        for number in range(first, first + num)
    ]


def _drain(source: KafkaSource, sizes: Iterator[int], *, stop_after: int | None = None) -> list[int]:
    """Request ids in the order in which they were handed out."""
    ends = source.end_offsets()
    seen: list[int] = []
    while not source.drained(ends) and (stop_after is None or len(seen) < stop_after):
        batch = source.poll_batch(next(sizes), timeout_s=0.3)
        assert sum(span.num for span in batch.spans) == len(batch.impressions)
        seen += batch.impressions.request_ids_N.tolist()
    return seen


def _sizes(seed: int) -> Iterator[int]:
    rng = np.random.default_rng(seed)
    while True:
        yield int(rng.integers(1, 37))


@pytest.mark.parametrize("seed", [1, 2])
def test_each_impression_is_handed_out_once_in_stream_order(filled, open_source, seed):
    source = open_source(filled)
    assert _drain(source, _sizes(seed)) == list(range(RECORDS * ROWS))


def test_positions_resume_at_the_next_impression_even_inside_a_record(filled, open_source):
    rng = np.random.default_rng(7)
    positions: tuple[Position, ...] = ()
    seen: list[int] = []
    rows_met = set()
    while len(seen) < RECORDS * ROWS:
        source = open_source(filled, positions=positions)
        seen += _drain(source, _sizes(int(rng.integers(1000))), stop_after=int(rng.integers(1, 150)))
        positions = source.positions()
        rows_met |= {position.row for position in positions}
        source.close()
    assert seen == list(range(RECORDS * ROWS))
    assert rows_met - {0}, "no resume fell inside a record: the test does not test what it says"


def test_a_batch_holds_what_was_asked_unless_time_runs_out(filled, open_source):
    source = open_source(filled)
    assert len(source.poll_batch(37, timeout_s=20).impressions) == 37
    assert len(source.poll_batch(RECORDS * ROWS, timeout_s=1).impressions) == RECORDS * ROWS - 37
    empty = source.poll_batch(5, timeout_s=0)
    assert len(empty.impressions) == 0
    assert set(empty.impressions.sparse) == {"domain", "user_id", "item_id", "tags"}


def test_prefetching_stops_at_its_bound(filled, open_source):
    source = open_source(filled)
    ends = source.end_offsets()
    most = 0
    for _ in range(30):
        most = max(most, source.num_buffered)
        time.sleep(0.01)
    while not source.drained(ends):
        source.poll_batch(7, timeout_s=0.3)
        most = max(most, source.num_buffered)
    # Each of the three partitions may pass its third of 120 by less than one record.
    assert 40 <= most < 120 + 3 * ROWS


@pytest.mark.timeout(90)
def test_a_backlog_far_beyond_the_prefetch_never_stands_still(
    broker, kafka_config, send_values, make_impressions, schema, open_source, monkeypatch
):
    """Partitions are paused and resumed many times; without the escape a lost one would stop everything."""
    monkeypatch.setattr(source_module, "ORDER_WAIT_S", float("inf"))
    config = kafka_config(broker, broker.new_topic(), prefetch_impressions_max=300)
    send_values(config, _records(schema, make_impressions, num=1_500))
    source = open_source(config)
    assert _drain(source, itertools.repeat(64)) == list(range(1_500 * ROWS))


def test_ranks_share_the_partitions_without_overlap(filled, open_source):
    parts = [_drain(open_source(filled, rank=rank, world_size=2), _sizes(rank)) for rank in range(2)]
    assert sorted(parts[0] + parts[1]) == list(range(RECORDS * ROWS))
    assert {number // ROWS % 3 for number in parts[0]} == {0, 2}
    assert {number // ROWS % 3 for number in parts[1]} == {1}


def test_a_rank_without_partitions_gets_empty_batches(filled, open_source):
    source = open_source(filled, rank=5, world_size=6)
    assert len(source.poll_batch(5, timeout_s=0.1).impressions) == 0
    assert source.positions() == ()
    assert source.drained(source.end_offsets())


def test_lag_counts_what_was_not_handed_out(filled, open_source):
    source = open_source(filled)
    source.poll_batch(100, timeout_s=20)
    assert source.lag_impressions() == RECORDS * ROWS - 100
    _drain(source, _sizes(1))
    assert source.lag_impressions() == 0


def test_committed_offsets_are_those_given_and_never_read(broker, filled, open_source):
    source = open_source(filled)
    source.poll_batch(300, timeout_s=20)
    source.commit([Position(filled.topic, 0, 3, 0)])
    source.commit(source.positions())
    wanted = {p.partition: p.kafka_offset for p in source.positions()}
    source.close()
    options = connect_options(broker.bootstrap_servers, security=Security(), timeout_s=10)
    consumer = KafkaConsumer(**options, group_id=filled.group, enable_auto_commit=False)
    assert {p: consumer.committed(TopicPartition(filled.topic, p)) for p in range(3)} == wanted
    consumer.close()
    assert {p.kafka_offset for p in open_source(filled).positions()} == {0}


def test_bad_rows_and_records_become_dead_letters_and_the_rest_is_trained(
    broker, kafka_config, send_values, make_impressions, schema, open_source
):
    config = kafka_config(broker, broker.new_topic())
    impressions = make_impressions(ROWS)
    impressions.event_time_ms_N[[2, 9]] = -1
    half_bad = encode_record(impressions, schema)
    good = encode_record(make_impressions(ROWS, first=ROWS), schema)
    send_values(
        config, [(0, b"\xff not protobuf", START_MS), (0, half_bad, START_MS + 1), (0, good, START_MS + 2)]
    )
    source = open_source(config)
    first = source.poll_batch(5, timeout_s=20)
    assert first.impressions.request_ids_N.tolist() == [0, 1, 3, 4, 5]
    assert first.dead_letters == {"not_decodable": 1, "event_time_not_positive": 1}
    assert Position(config.topic, 0, 1, 6) in source.positions()
    second = source.poll_batch(13, timeout_s=20)
    assert second.impressions.request_ids_N.tolist() == [6, 7, 8, *range(10, 20)]
    assert second.dead_letters == {"event_time_not_positive": 1}
    source.close()

    options = connect_options(broker.bootstrap_servers, security=Security(), timeout_s=10)
    consumer = KafkaConsumer(config.dead_letter_topic, **options, auto_offset_reset="earliest", group_id=None)
    letters = []
    while len(letters) < 2:
        letters += [record for records in consumer.poll(5_000).values() for record in records]
    consumer.close()
    # The letters may be in different partitions, so they come in any order.
    letters.sort(key=lambda letter: dict(letter.headers)["freshet.origin"])
    assert [letter.value for letter in letters] == [b"\xff not protobuf", half_bad]
    headers = [dict(letter.headers) for letter in letters]
    assert [h["freshet.reason"] for h in headers] == [b"not_decodable", b"bad_rows"]
    assert [h["freshet.origin"].decode() for h in headers] == [f"{config.topic}/0/{n}" for n in (0, 1)]
    assert json.loads(headers[1]["freshet.bad_rows"]) == {"event_time_not_positive": [2, 9]}


def test_resuming_inside_a_record_does_not_count_passed_bad_rows_again(
    broker, kafka_config, send_values, make_impressions, schema, open_source
):
    config = kafka_config(broker, broker.new_topic())
    impressions = make_impressions(ROWS)
    impressions.event_time_ms_N[[1, 7]] = 0
    send_values(config, [(0, encode_record(impressions, schema), START_MS)])
    source = open_source(config)
    counted = dict(source.poll_batch(3, timeout_s=20).dead_letters)
    positions = source.positions()
    source.close()
    rest = open_source(config, positions=positions).poll_batch(5, timeout_s=20)
    assert rest.impressions.request_ids_N.tolist() == [4, 5, 6, 8, 9]
    assert (counted, rest.dead_letters) == ({"event_time_not_positive": 1},) * 2


def test_a_position_beyond_the_end_is_refused(filled, open_source):
    with pytest.raises(StreamError, match=r"partition 1 at Kafka offset 999 .*Choices"):
        open_source(filled, positions=[Position(filled.topic, 1, 999, 0)])


def test_a_position_of_a_partition_that_is_gone_is_refused(filled, open_source):
    with pytest.raises(StreamError, match="no partition 9"):
        open_source(filled, positions=[Position(filled.topic, 9, 0, 0)])


def test_retention_that_overtakes_a_position_stops_training(
    kafka_broker, kafka_config, send_values, make_impressions, schema, open_source
):
    config = kafka_config(kafka_broker, kafka_broker.new_topic())
    send_values(config, _records(schema, make_impressions))
    source = open_source(config)
    source.poll_batch(15, timeout_s=20)
    positions = source.positions()
    source.close()
    admin = KafkaAdminClient(bootstrap_servers=config.bootstrap_servers)
    admin.delete_records({TopicPartition(config.topic, 0): 12})
    admin.close()
    with pytest.raises(StreamError, match=r"partition 0 at Kafka offset .*retention has removed"):
        open_source(config, positions=positions)


def test_retention_that_overtakes_a_running_source_stops_training(
    embedded_broker, kafka_config, send_values, make_impressions, schema, open_source
):
    topic = embedded_broker.new_topic()
    config = kafka_config(embedded_broker, topic, prefetch_impressions_max=20, fetch_bytes_max=1 << 20)
    big = encode_record(make_impressions(6_000), schema)
    send_values(config, [(0, big, START_MS + n) for n in range(3)])
    source = open_source(config)
    source.poll_batch(1, timeout_s=20)
    # Far more than the 5 MB that the embedded broker keeps of a partition.
    send_values(config, [(0, big, START_MS + n) for n in range(60)])

    def read_on() -> None:
        while True:
            source.poll_batch(6_000, timeout_s=20)

    with pytest.raises(StreamError, match="retention has removed"):
        read_on()


def test_an_unreachable_broker_is_named(free_port, open_source):
    port = free_port()
    config = KafkaConfig(bootstrap_servers=f"127.0.0.1:{port}", start_timeout_s=1)
    with pytest.raises(StreamError, match=f"127.0.0.1:{port}"):
        open_source(config)


def test_a_missing_topic_is_created_on_kafka(kafka_broker, kafka_config, open_source):
    config = kafka_config(kafka_broker, "made-by-the-source", num_partitions=5)
    source = open_source(config)
    assert [position.partition for position in source.positions()] == [0, 1, 2, 3, 4]


def test_a_missing_topic_appears_on_the_embedded_broker(embedded_broker, kafka_config, open_source):
    source = open_source(kafka_config(embedded_broker, "made-by-the-source"))
    assert len(source.positions()) > 0


def test_a_missing_topic_is_an_error_where_it_cannot_be_created(kafka_broker, kafka_config, open_source):
    with pytest.raises(StreamError, match=r"'\.' does not exist and could not be created"):
        open_source(kafka_config(kafka_broker, "."))


def test_a_broker_that_is_killed_and_returns_costs_nothing(
    kafka_broker, kafka_config, send_values, make_impressions, schema, open_source
):
    config = kafka_config(kafka_broker, kafka_broker.new_topic())
    send_values(config, _records(schema, make_impressions))
    source = open_source(config)
    seen = _drain(source, _sizes(3), stop_after=200)
    kafka_broker.kill()
    seen += source.poll_batch(10, timeout_s=0.5).impressions.request_ids_N.tolist()
    kafka_broker.start()
    send_values(config, _records(schema, make_impressions, first=RECORDS))
    while len(seen) < 2 * RECORDS * ROWS:
        seen += source.poll_batch(50, timeout_s=0.3).impressions.request_ids_N.tolist()
    # Each exactly once; what is sent while the broker comes back may arrive in any order of partitions.
    assert sorted(seen) == list(range(2 * RECORDS * ROWS))
