"""Letters are stored or training stops."""

from __future__ import annotations

import json

import pytest
from kafka.admin import KafkaAdminClient, NewTopic

from tests.kafka_reading import read_records
from trainer.errors import StreamError
from trainer.stream.broker import Security, connect_options
from trainer.stream.dead_letters import PENDING_MAX, DeadLetter, DeadLetterWriter


def _letter(value: bytes, number: int = 0) -> DeadLetter:
    return DeadLetter(value, "origin", 3, number, "not_decodable", "why", {})


def test_more_letters_than_may_wait_all_arrive(broker):
    topic = broker.new_topic()
    options = connect_options(broker.bootstrap_servers, security=Security(), timeout_s=10)
    writer = DeadLetterWriter(topic, options=options)
    num = PENDING_MAX + 10
    for number in range(num):
        writer.write(_letter(b"value %d" % number, number))
    writer.close()
    values = {record.value for record in read_records(topic, options=options, num=num)}
    assert values == {b"value %d" % n for n in range(num)}


def test_a_value_too_large_for_the_topic_leaves_its_origin(kafka_broker):
    topic = kafka_broker.new_topic() + "-small"
    options = connect_options(kafka_broker.bootstrap_servers, security=Security(), timeout_s=10)
    admin = KafkaAdminClient(**options)
    admin.create_topics([NewTopic(topic, 1, 1, topic_configs={"max.message.bytes": "1000"})])
    admin.close()
    writer = DeadLetterWriter(topic, options=options)
    writer.write(_letter(b"x" * 5_000, 17))
    writer.close()
    (record,) = read_records(topic, options=options, num=1)
    headers = dict(record.headers)
    assert record.value == b""
    assert headers["freshet.value_omitted"] == b"5000"
    assert headers["freshet.origin"] == b"origin/3/17"


def test_a_value_too_large_for_the_topic_leaves_the_ids_that_were_in_it(kafka_broker):
    topic = kafka_broker.new_topic() + "-small"
    options = connect_options(kafka_broker.bootstrap_servers, security=Security(), timeout_s=10)
    admin = KafkaAdminClient(**options)
    admin.create_topics([NewTopic(topic, 1, 1, topic_configs={"max.message.bytes": "1000"})])
    admin.close()
    writer = DeadLetterWriter(topic, options=options)
    found = ((7, 3), (2**63, 5))
    writer.write(DeadLetter(b"x" * 5_000, "origin", 3, 17, "non_finite_loss", "why", {}, impressions=found))
    writer.close()
    (record,) = read_records(topic, options=options, num=1)
    headers = dict(record.headers)
    assert headers["freshet.value_omitted"] == b"5000"
    assert json.loads(headers["freshet.request_ids"]) == [7, 2**63]
    assert json.loads(headers["freshet.origin_rows"]) == [3, 5]


def test_a_topic_that_cannot_be_written_is_an_error(kafka_broker):
    options = connect_options(kafka_broker.bootstrap_servers, security=Security(), timeout_s=10)
    writer = DeadLetterWriter("not/a name", options=options)
    with pytest.raises(StreamError, match="'not/a name'"):
        writer.write(_letter(b"x"))
