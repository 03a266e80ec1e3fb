"""What Kafka does to a topic while it is read: kills, retention, growth, deletion. On the real broker."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator

import pytest
from kafka import KafkaAdminClient, TopicPartition
from kafka.admin import NewTopic
from msgspec.structs import replace

from tests.kafka_reading import read_records
from trainer.config.config import KafkaConfig
from trainer.config.schema import SchemaConfig
from trainer.errors import StreamError
from trainer.stream.broker import Security, connect_options, ensure_topic
from trainer.stream.record import encode_record
from trainer.stream.source import KafkaSource

START_MS = 1_700_000_000_000
ROWS = 10
BATCH = 30
LITTLE_AT_ONCE = {"prefetch_impressions_max": BATCH, "fetch_bytes_max": 1_000, "record_bytes_max": 2_000}
"""So that most of a backlog is still in the log when something happens to it."""


@pytest.fixture
def open_source(schema: SchemaConfig) -> Iterator[Callable[..., KafkaSource]]:
    opened: list[KafkaSource] = []

    def start(config: KafkaConfig, **arguments: object) -> KafkaSource:
        source = KafkaSource(config, schema=schema, batch_size=BATCH, **arguments)  # type: ignore[arg-type]
        opened.append(source)
        return source

    yield start
    for source in opened:
        source.close()


@pytest.fixture
def admin(kafka_broker) -> Iterator[KafkaAdminClient]:
    client = KafkaAdminClient(**kafka_broker.options())
    yield client
    client.close()


@pytest.fixture
def send(send_values, make_impressions, schema) -> Callable[..., None]:
    """`send(config, first, num)`: record n goes to partition n % 3, request ids count up."""

    def send_records(config: KafkaConfig, first: int, num: int) -> None:
        numbers = range(first, first + num)
        values = [encode_record(make_impressions(ROWS, first=n * ROWS), schema) for n in numbers]
        send_values(config, [(n % 3, value, START_MS + n) for n, value in zip(numbers, values, strict=True)])

    return send_records


def _poll(source: KafkaSource, num: int) -> list[list[int]]:
    """So many whole batches."""
    batches = []
    for _ in range(num):
        batch = source.poll_batch(30)
        assert len(batch.impressions) == source.batch_rows
        batches.append(batch.impressions.request_ids_N.tolist())
    return batches


def _batch(number: int) -> list[int]:
    """Batch t of records in turn over three partitions, at 10 impressions a share: records 3t, 3t + 1, 3t +
    2."""
    return list(range(number * BATCH, (number + 1) * BATCH))


def _until_error(source: KafkaSource) -> None:
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        source.poll_batch(0.5)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["strict", "loose"])
def test_a_broker_that_is_killed_and_returns_costs_nothing(
    kafka_broker, kafka_config, send, open_source, order
):
    kafka_broker.skip_unless_ours()
    config = kafka_config(kafka_broker, kafka_broker.new_topic(), order=order, **LITTLE_AT_ONCE)
    send(config, 0, 300)
    source = open_source(config)
    seen = _poll(source, 5)
    kafka_broker.kill()
    try:
        while len(found := source.poll_batch(0.5).impressions):
            seen.append(found.request_ids_N.tolist())
    finally:
        kafka_broker.start()
    assert len(seen) < 100, "everything was prefetched before the kill: the test does not test what it says"
    send(config, 300, 60)
    deadline_s = time.monotonic() + 60
    while sum(map(len, seen)) < 360 * ROWS:
        assert time.monotonic() < deadline_s
        seen.append(source.poll_batch(0.5).impressions.request_ids_N.tolist())
    if order == "strict":
        assert [batch for batch in seen if batch] == [_batch(t) for t in range(120)]
    assert sorted(i for batch in seen for i in batch) == list(range(360 * ROWS))


def test_retention_that_overtakes_a_position_stops_the_start(
    kafka_broker, kafka_config, send, open_source, admin
):
    config = kafka_config(kafka_broker, kafka_broker.new_topic(), order="strict")
    send(config, 0, 60)
    source = open_source(config)
    _poll(source, 2)
    positions = source.positions()
    source.close()
    admin.delete_records({TopicPartition(config.topic, 0): 12})
    with pytest.raises(StreamError, match=r"partition 0 at Kafka offset 2 .*retention has removed .*Choices"):
        open_source(config, positions=positions)


@pytest.mark.parametrize("order", ["strict", "loose"])
def test_retention_that_overtakes_a_paused_trainer_stops_it(
    kafka_broker, kafka_config, send, open_source, admin, order
):
    """The prefetch is full and the trainer asks for nothing while the log loses what comes next."""
    config = kafka_config(kafka_broker, kafka_broker.new_topic(), order=order, **LITTLE_AT_ONCE)
    send(config, 0, 900)
    source = open_source(config)
    _poll(source, 2)
    time.sleep(1)
    admin.delete_records({TopicPartition(config.topic, partition): 299 for partition in range(3)})
    send(config, 900, 300)
    with pytest.raises(StreamError, match=r"at Kafka offset \d+ is not in the log: retention .*Choices"):
        _until_error(source)


def test_added_partitions_are_noticed_and_read_from_their_oldest_record(
    kafka_broker, kafka_config, send, send_values, make_impressions, schema, open_source, admin
):
    config = kafka_config(kafka_broker, kafka_broker.new_topic(), order="strict")
    send(config, 0, 60)
    source = open_source(config)
    idle = open_source(config, rank=7, world_size=8)
    assert _poll(source, 4) == [_batch(t) for t in range(4)]
    assert not source.partitions_grew
    admin.create_partitions({config.topic: 5})
    values = {p: encode_record(make_impressions(ROWS, first=10_000 + 10 * p), schema) for p in (3, 4)}
    send_values(config, [(p, value, START_MS) for p, value in values.items()])
    deadline_s = time.monotonic() + 20
    while not (source.partitions_grew and idle.partitions_grew):
        assert time.monotonic() < deadline_s, "nobody noticed the new partitions"
        time.sleep(0.1)
    assert _poll(source, 1) == [_batch(4)], "the fetch was disturbed"
    positions, topic_id = source.positions(), source.topic_id
    source.close()
    grown = open_source(config, positions=positions, expected_topic_id=topic_id)
    assert (grown.num_partitions, grown.topic_id) == (5, topic_id)
    found = grown.poll_batch(30).impressions.request_ids_N.tolist()
    assert found == [i + row for i in (150, 160, 170, 10_030, 10_040) for row in range(BATCH // 5)]
    assert not grown.partitions_grew


def _make_anew(kafka_broker, admin, topic: str, num_partitions: int = 3) -> None:
    admin.delete_topics([topic])
    deadline_s = time.monotonic() + 30
    while topic in admin.list_topics():
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    admin.create_topics([NewTopic(topic, num_partitions, -1)])
    ensure_topic(topic, num_partitions=num_partitions, options=kafka_broker.options())


def test_a_topic_made_anew_is_refused_at_a_resume(kafka_broker, kafka_config, send, open_source, admin):
    """Though the new topic is longer than the old one, so that every position exists in it."""
    config = kafka_config(kafka_broker, kafka_broker.new_topic(), order="strict")
    send(config, 0, 30)
    source = open_source(config)
    _poll(source, 2)
    positions, topic_id = source.positions(), source.topic_id
    source.close()
    assert len(topic_id) == 36
    open_source(config, positions=positions, expected_topic_id=topic_id).close()
    _make_anew(kafka_broker, admin, config.topic)
    send(config, 0, 60)
    with pytest.raises(StreamError, match=rf"was made anew: its id is .* belong to id {topic_id}.*Choices"):
        open_source(config, positions=positions, expected_topic_id=topic_id)


@pytest.mark.parametrize("num_partitions", [3, 2])
def test_a_topic_made_anew_stops_a_running_source(
    kafka_broker, kafka_config, send, open_source, admin, num_partitions
):
    config = kafka_config(kafka_broker, kafka_broker.new_topic(), order="strict")
    send(config, 0, 30)
    source = open_source(config)
    _poll(source, 10)
    _make_anew(kafka_broker, admin, config.topic, num_partitions)
    with pytest.raises(StreamError, match=r"made anew.*Choices"):
        _until_error(source)


def test_a_topic_that_is_deleted_is_not_made_again(kafka_broker, kafka_config, send, open_source, admin):
    """Neither by a source that reads it nor by one that is to go on in it."""
    config = kafka_config(kafka_broker, kafka_broker.new_topic(), order="strict")
    send(config, 0, 30)
    source = open_source(config)
    _poll(source, 2)
    positions = source.positions()
    admin.delete_topics([config.topic])
    source.poll_batch(3)
    source.close()
    with pytest.raises(StreamError, match="does not exist, but there are positions in it"):
        open_source(config, positions=positions)
    assert config.topic not in admin.list_topics()


def test_too_many_bad_records_stop_the_run_and_their_letters_are_kept(
    broker, kafka_config, send_values, make_impressions, schema, open_source
):
    config = kafka_config(broker, broker.new_topic(), bad_share_max=0.2, bad_window=100)
    good = encode_record(make_impressions(ROWS), schema)
    send_values(config, [(0, good, START_MS), (0, b"\xff", START_MS), (0, good, START_MS)])
    source = open_source(config)
    trained = 0
    while trained < 2 * ROWS:
        trained += len(source.poll_batch(1).impressions)
    send_values(config, [(0, b"\xff", START_MS + n) for n in range(3)])
    with pytest.raises(StreamError, match=rf"not_decodable 30 \(the last at {config.topic}/0/\d\)"):
        _until_error(source)
    source.close()
    options = connect_options(config.bootstrap_servers, security=Security(), timeout_s=30)
    letters = read_records(config.dead_letter_topic, options=options, num=3)
    origins = {dict(letter.headers)["freshet.origin"].decode() for letter in letters}
    assert {f"{config.topic}/0/{n}" for n in (1, 3, 4)} <= origins
    patient = open_source(replace(config, bad_share_max=1.0))
    ends = patient.end_offsets()
    dead = 0
    while not patient.drained(ends):
        dead += patient.poll_batch(1, end_offsets=ends).dead_letters.get("not_decodable", 0)
    assert dead == 4


def test_one_event_from_the_far_future_does_not_move_the_clock(
    kafka_broker, kafka_config, send_values, make_impressions, schema, open_source
):
    config = kafka_config(kafka_broker, kafka_broker.new_topic(), event_time_past_s_max=86_400)
    now_ms = time.time_ns() // 1_000_000
    impressions = make_impressions(ROWS)
    impressions.event_time_ms_N[:] = now_ms
    impressions.event_time_ms_N[3] = now_ms + 10 * 365 * 86_400_000
    impressions.event_time_ms_N[4] = now_ms - 2 * 86_400_000
    send_values(config, [(0, encode_record(impressions, schema), now_ms)])
    batch = open_source(config).poll_batch(2)
    assert batch.impressions.request_ids_N.tolist() == [0, 1, 2, 5, 6, 7, 8, 9]
    assert int(batch.impressions.event_time_ms_N.max()) == now_ms
    assert json.dumps(batch.dead_letters) == '{"event_time_future": 1, "event_time_past": 1}'
