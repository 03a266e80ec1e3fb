"""What the source promises, against both kinds of broker."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from msgspec.structs import replace

from tests.kafka_reading import read_records
from trainer.config.config import KafkaConfig
from trainer.config.schema import SchemaConfig
from trainer.errors import StreamError
from trainer.stream.broker import Security, connect_options
from trainer.stream.columns import Position
from trainer.stream.record import encode_record
from trainer.stream.source import KafkaSource

START_MS = 1_700_000_000_000
RECORDS, ROWS = 60, 10


@pytest.fixture
def open_source(schema: SchemaConfig) -> Iterator[Callable[..., KafkaSource]]:
    opened: list[KafkaSource] = []

    def start(config: KafkaConfig, *, batch_size: int = 37, **arguments: object) -> KafkaSource:
        source = KafkaSource(config, schema=schema, batch_size=batch_size, **arguments)  # type: ignore[arg-type]
        opened.append(source)
        return source

    yield start
    for source in opened:
        source.close()


@pytest.fixture
def filled(broker, kafka_config, send_values, make_impressions, schema) -> KafkaConfig:
    """A topic with RECORDS records of ROWS impressions over three partitions in turn, request ids counting
    up."""
    config = kafka_config(broker, broker.new_topic(), prefetch_impressions_max=120, order="strict")
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


def _drain(source: KafkaSource, *, stop_after: int | None = None) -> list[list[int]]:
    """Request ids of each batch, in the order in which they were handed out."""
    ends = source.end_offsets()
    batches: list[list[int]] = []
    while not source.drained(ends) and (stop_after is None or len(batches) < stop_after):
        batch = source.poll_batch(0.3, end_offsets=ends)
        assert sum(span.num for span in batch.spans) == len(batch.impressions)
        assert batch.positions == source.positions()
        if len(batch.impressions):
            batches.append(batch.impressions.request_ids_N.tolist())
    return batches


def _flat(batches: list[list[int]]) -> list[int]:
    return [number for batch in batches for number in batch]


def _ids_of(partition: int, num: int = RECORDS) -> list[int]:
    return [n * ROWS + row for n in range(partition, num, 3) for row in range(ROWS)]


def _strict_batches(batch_size: int, partitions: tuple[int, ...] = (0, 1, 2)) -> list[list[int]]:
    """What the strict order promises of `filled`: each partition's share, partition after partition."""
    shares = [batch_size // 3 + (partition < batch_size % 3) for partition in range(3)]
    num = -(-max(len(_ids_of(p)) for p in range(3)) // min(shares))
    batches = [
        [i for p in partitions for i in _ids_of(p)[t * shares[p] : (t + 1) * shares[p]]] for t in range(num)
    ]
    return [batch for batch in batches if batch]


@pytest.mark.parametrize("batch_size", [3, 37, 128])
def test_strict_batches_follow_from_the_stream_alone(filled, open_source, batch_size):
    source = open_source(filled, batch_size=batch_size)
    assert source.batch_rows == batch_size
    assert _drain(source) == _strict_batches(batch_size)


def test_positions_resume_at_the_next_impression_even_inside_a_record(filled, open_source):
    rng = np.random.default_rng(7)
    positions: tuple[Position, ...] = ()
    batches: list[list[int]] = []
    rows_met = set()
    while len(_flat(batches)) < RECORDS * ROWS:
        source = open_source(filled, positions=positions)
        batches += _drain(source, stop_after=int(rng.integers(1, 5)))
        positions = source.positions()
        rows_met |= {position.row for position in positions}
        source.close()
    assert batches == _strict_batches(37)
    assert rows_met - {0}, "no resume fell inside a record: the test does not test what it says"


def test_loose_batches_hand_out_each_impression_once_in_its_partitions_order(filled, open_source):
    source = open_source(replace(filled, order="loose"))
    seen = _flat(_drain(source))
    for partition in range(3):
        mine = set(_ids_of(partition))
        assert [number for number in seen if number in mine] == _ids_of(partition)
    assert sorted(seen) == list(range(RECORDS * ROWS))


def test_an_idle_partition_holds_up_the_strict_order_until_a_drain_and_the_loose_one_never(
    broker, kafka_config, send_values, make_impressions, schema, open_source
):
    config = kafka_config(broker, broker.new_topic(), order="strict")
    records = [record for record in _records(schema, make_impressions) if record[0] != 1]
    send_values(config, records)
    strict = open_source(config, batch_size=30)
    assert len(strict.poll_batch(1.0).impressions) == 0
    assert not strict.ready()
    ends = strict.end_offsets()
    assert strict.ready(timeout_s=20, end_offsets=ends)
    first = strict.poll_batch(0, end_offsets=ends).impressions.request_ids_N.tolist()
    assert first == _ids_of(0)[:10] + _ids_of(2)[:10], "the idle partition's share went to others"
    loose = open_source(replace(config, order="loose"), batch_size=30)
    assert loose.ready(timeout_s=20)
    assert len(loose.poll_batch(20).impressions) == 30


def test_a_loose_batch_is_full_unless_time_runs_out(filled, open_source):
    source = open_source(replace(filled, order="loose"), batch_size=RECORDS * ROWS - 1)
    assert len(source.poll_batch(20).impressions) == RECORDS * ROWS - 1
    assert len(source.poll_batch(1).impressions) == 1
    empty = source.poll_batch(0)
    assert len(empty.impressions) == 0
    assert set(empty.impressions.sparse) == {"domain", "user_id", "item_id", "tags"}


@pytest.mark.parametrize("order", ["strict", "loose"])
def test_prefetching_stops_at_its_bound(filled, open_source, order):
    source = open_source(replace(filled, order=order), batch_size=7)
    ends = source.end_offsets()
    most = 0
    for _ in range(30):
        most = max(most, source.num_buffered)
        time.sleep(0.01)
    while not source.drained(ends):
        source.poll_batch(0.3, end_offsets=ends)
        most = max(most, source.num_buffered)
    # Each of the three partitions may pass its third of 120 by less than one record.
    assert 40 <= most < 120 + 3 * ROWS


def test_a_strict_batch_far_beyond_the_prefetch_still_comes(filled, open_source):
    source = open_source(replace(filled, prefetch_impressions_max=3), batch_size=300)
    assert len(source.poll_batch(20).impressions) == 300
    assert source.num_buffered <= 300 + 3 * ROWS


def test_idle_partitions_cost_the_others_nothing(
    broker, kafka_config, send_values, make_impressions, schema, open_source, monkeypatch
):
    """What a client says of one partition's position takes it longer the more partitions there are."""
    asked = []
    position = KafkaConsumer.position

    def counting(self, tp, **arguments):
        asked.append(tp.partition)
        return position(self, tp, **arguments)

    monkeypatch.setattr(KafkaConsumer, "position", counting)
    config = kafka_config(broker, broker.new_topic())
    values = [(0, value, stamp) for _, value, stamp in _records(schema, make_impressions)]
    send_values(config, values)
    source = open_source(config)
    assert _flat(_drain(source)) == list(range(RECORDS * ROWS))
    assert not {1, 2} & set(asked)


def test_a_drain_passes_the_marks_of_transactions(
    kafka_broker, kafka_config, make_impressions, schema, open_source
):
    """They take Kafka offsets, and no record with them comes; those of an abort take its records along."""
    config = kafka_config(kafka_broker, kafka_broker.new_topic())
    producer = KafkaProducer(**kafka_broker.options(), transactional_id=config.topic)
    producer.init_transactions()
    source = open_source(config, batch_size=5)
    for number, ends in enumerate((producer.commit_transaction, producer.abort_transaction)):
        producer.begin_transaction()
        value = encode_record(make_impressions(ROWS, first=number * ROWS), schema)
        producer.send(config.topic, value=value, partition=0).get(timeout=20)
        ends()
        begun_s = time.monotonic()
        assert _flat(_drain(source)) == (list(range(ROWS)) if number == 0 else [])
        assert time.monotonic() - begun_s < 10
        assert source.positions()[0] == Position(config.topic, 0, 2 * number + 2, 0)
    producer.close()


@pytest.mark.timeout(90)
def test_a_backlog_far_beyond_the_prefetch_never_stands_still(
    broker, kafka_config, send_values, make_impressions, schema, open_source
):
    """Partitions are paused and resumed many times, and a batch without one's share would not come."""
    config = kafka_config(broker, broker.new_topic(), prefetch_impressions_max=300, order="strict")
    send_values(config, _records(schema, make_impressions, num=1_500))
    source = open_source(config, batch_size=60)
    for number in range(1_500 * ROWS // 60):
        assert len(source.poll_batch(20).impressions) == 60, f"batch {number} did not come"


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_hand_out_the_batches_of_one_rank(filled, open_source, world_size):
    sources = [open_source(filled, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert sum(source.batch_rows for source in sources) == 37
    parts = [_drain(source) for source in sources]
    for rank, part in enumerate(parts):
        assert part == _strict_batches(37, partitions=tuple(range(rank, 3, world_size)))


def test_a_rank_without_partitions_gets_empty_batches(filled, open_source):
    source = open_source(filled, rank=5, world_size=6)
    assert source.ready()
    assert source.batch_rows == 0
    assert len(source.poll_batch(0.1).impressions) == 0
    assert source.positions() == ()
    assert source.drained(source.end_offsets())


@pytest.mark.parametrize("codec", ["gzip", "lz4", "snappy", "zstd"])
def test_compressed_records_are_read(broker, kafka_config, open_source, make_impressions, schema, codec):
    config = kafka_config(broker, broker.new_topic(), order="strict")
    options = connect_options(config.bootstrap_servers, security=Security(), timeout_s=30)
    producer = KafkaProducer(**options, compression_type=codec)
    for partition, value, timestamp_ms in _records(schema, make_impressions, num=6):
        producer.send(config.topic, value, partition=partition, timestamp_ms=timestamp_ms).get(timeout=30)
    producer.close()
    assert sorted(_flat(_drain(open_source(config)))) == list(range(6 * ROWS))


def test_lag_counts_what_was_not_handed_out(filled, open_source):
    source = open_source(filled, batch_size=90)
    source.poll_batch(20)
    assert source.lag_impressions() == RECORDS * ROWS - 90
    _drain(source)
    assert source.lag_impressions() == 0


def test_committed_offsets_are_those_given_and_never_read(broker, filled, open_source):
    source = open_source(filled, batch_size=300)
    source.poll_batch(20)
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
    source = open_source(config, batch_size=5)
    first = source.poll_batch(20)
    assert first.impressions.request_ids_N.tolist() == [0, 1, 3, 4, 5]
    assert first.dead_letters == {"not_decodable": 1, "event_time_not_positive": 1}
    assert Position(config.topic, 0, 1, 6) in source.positions()
    second = source.poll_batch(20)
    assert second.impressions.request_ids_N.tolist() == [6, 7, 8, 10, 11]
    assert second.dead_letters == {"event_time_not_positive": 1}
    source.close()

    options = connect_options(broker.bootstrap_servers, security=Security(), timeout_s=10)
    letters = read_records(config.dead_letter_topic, options=options, num=2)
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
    source = open_source(config, batch_size=3)
    counted = dict(source.poll_batch(20).dead_letters)
    positions = source.positions()
    source.close()
    rest = open_source(config, positions=positions, batch_size=5).poll_batch(20)
    assert rest.impressions.request_ids_N.tolist() == [4, 5, 6, 8, 9]
    assert (counted, rest.dead_letters) == ({"event_time_not_positive": 1},) * 2


def test_a_new_run_may_begin_behind_the_newest_record(
    filled, open_source, send_values, schema, make_impressions
):
    newest = replace(filled, begin="newest")
    source = open_source(newest)
    assert [position.kafka_offset for position in source.positions()] == [RECORDS // 3] * 3
    send_values(newest, _records(schema, make_impressions, first=RECORDS, num=3))
    later = [number * ROWS + row for number in range(RECORDS, RECORDS + 3) for row in range(ROWS)]
    assert sorted(_flat(_drain(source))) == later


def test_only_a_new_run_begins_behind_the_newest_record(filled, open_source):
    """Not a partition without a position, and not a rank without any, of a run that has begun."""
    newest = replace(filled, begin="newest")
    known = [Position(filled.topic, 0, 2, 0)]
    positions = open_source(newest, positions=known).positions()
    assert [position.kafka_offset for position in positions] == [2, 0, 0]
    topic_id = open_source(newest).topic_id
    if topic_id:
        positions = open_source(newest, expected_topic_id=topic_id).positions()
        assert [position.kafka_offset for position in positions] == [0, 0, 0]


def test_a_position_beyond_the_end_is_refused(filled, open_source):
    with pytest.raises(StreamError, match=r"partition 1 at Kafka offset 999 .*Choices"):
        open_source(filled, positions=[Position(filled.topic, 1, 999, 0)])


def test_a_position_of_a_partition_that_is_gone_is_refused(filled, open_source):
    with pytest.raises(StreamError, match="no partition 9"):
        open_source(filled, positions=[Position(filled.topic, 9, 0, 0)])


def test_retention_that_overtakes_a_running_source_stops_training(
    embedded_broker, kafka_config, send_values, make_impressions, schema, open_source
):
    topic = embedded_broker.new_topic()
    config = kafka_config(embedded_broker, topic, prefetch_impressions_max=20, fetch_bytes_max=1 << 20)
    big = encode_record(make_impressions(6_000), schema)
    send_values(config, [(0, big, START_MS + n) for n in range(3)])
    source = open_source(config, batch_size=1)
    source.poll_batch(20)
    # Far more than the 5 MB that the embedded broker keeps of a partition.
    send_values(config, [(0, big, START_MS + n) for n in range(60)])

    def read_on() -> None:
        while True:
            source.poll_batch(20)

    with pytest.raises(StreamError, match="retention has removed"):
        read_on()


def test_an_unreachable_broker_is_named(free_port, open_source):
    port = free_port()
    config = KafkaConfig(bootstrap_servers=f"127.0.0.1:{port}", start_timeout_s=1)
    with pytest.raises(StreamError, match=f"127.0.0.1:{port}"):
        open_source(config)


def test_a_missing_topic_is_created_on_kafka(kafka_broker, kafka_config, open_source):
    config = kafka_config(kafka_broker, kafka_broker.new_name(), num_partitions=5)
    source = open_source(config)
    assert [position.partition for position in source.positions()] == [0, 1, 2, 3, 4]


def test_a_missing_topic_appears_on_the_embedded_broker(embedded_broker, kafka_config, open_source):
    source = open_source(kafka_config(embedded_broker, "made-by-the-source"))
    assert len(source.positions()) > 0


def test_a_missing_topic_is_an_error_where_it_cannot_be_created(kafka_broker, kafka_config, open_source):
    with pytest.raises(StreamError, match=r"'\.' does not exist and could not be created"):
        open_source(kafka_config(kafka_broker, "."))
