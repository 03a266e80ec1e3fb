"""A topic that is gone for long stops the reader; a broker that just came back does not."""

from __future__ import annotations

import time

import pytest
from kafka import KafkaAdminClient, KafkaConsumer

from trainer.errors import StreamError
from trainer.stream.broker import Security, connect_options
from trainer.stream.topic_watch import GONE_AFTER_S, check_topic_id, watch_topic


def test_a_topic_is_gone_once_the_broker_has_not_known_it_for_long(kafka_broker):
    topic = kafka_broker.new_topic()
    consumer = KafkaConsumer(**kafka_broker.options(), metadata_max_age_ms=200)
    watch = watch_topic(consumer, topic, num_partitions=3)
    assert watch.look(0.0) is False
    admin = KafkaAdminClient(**kafka_broker.options())
    admin.delete_topics([topic])
    admin.close()
    deadline_s = time.monotonic() + 30
    while consumer._cluster.partitions_for_topic(topic):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    assert watch.look(100.0) is False
    assert watch.look(100.0 + GONE_AFTER_S) is False
    with pytest.raises(StreamError, match=r"is gone: .* fresh run directory"):
        watch.look(100.1 + GONE_AFTER_S)
    consumer.close()


def test_a_broker_without_topic_ids_gives_an_empty_one(embedded_broker):
    options = connect_options(embedded_broker.bootstrap_servers, security=Security(), timeout_s=30)
    consumer = KafkaConsumer(**options)
    watch = watch_topic(consumer, embedded_broker.new_topic(), num_partitions=3)
    assert (watch.topic_id, watch.look(0.0)) == ("", False)
    consumer.close()


def test_ids_are_compared_where_both_sides_have_one():
    check_topic_id("t", expected="", found="a")
    check_topic_id("t", expected="a", found="")
    check_topic_id("t", expected="a", found="a")
    with pytest.raises(StreamError, match="its id is b, the positions belong to id a"):
        check_topic_id("t", expected="a", found="b")
