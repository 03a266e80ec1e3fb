"""What may happen to a topic while it is read: it grows, it is deleted, it is made anew.

The Kafka client refreshes its own metadata in the background (METADATA_AGE_S); looking at them waits for
nothing.
"""

from __future__ import annotations

import time
from typing import Any

from kafka import KafkaConsumer

from trainer.errors import StreamError

METADATA_AGE_S = 1.0
METADATA_WAIT_S = 10.0
METADATA_LOOK_S = 0.02
GONE_AFTER_S = 30.0
"""A broker that comes back may not know its topics for a moment."""


class TopicWatch:
    """Compares the topic with what it was when this was made. Used by one thread.

    topic_id: the id that the broker gave the topic when it was made; "" where the broker has no such ids
    (Kafka before 2.8, the embedded broker): there a topic that is made anew can be told by its offsets only.
    """

    def __init__(self, consumer: KafkaConsumer, topic: str, *, num_partitions: int) -> None:
        # kafka-python shows topic ids through its admin client only, which would have to be waited for. Use
        # the public way as soon as the consumer has one.
        self._cluster: Any = consumer._cluster
        self._topic = topic
        self._num_partitions = num_partitions
        self._gone_since_s: float | None = None
        self.topic_id = self._id_now()

    def look(self, now_s: float) -> bool:
        """Whether the topic has more partitions than it had.

        Raises: StreamError if it has been made anew, or has been gone for GONE_AFTER_S.
        """
        partitions = self._cluster.partitions_for_topic(self._topic)
        if not partitions:
            self._gone_since_s = now_s if self._gone_since_s is None else self._gone_since_s
            if now_s > self._gone_since_s + GONE_AFTER_S:
                raise StreamError(
                    f"topic '{self._topic}' is gone: the broker has not known it for {GONE_AFTER_S:g} s. "
                    "Training stops; what was trained is safe. To train on another topic, start with a fresh "
                    "run directory"
                )
            return False
        self._gone_since_s = None
        check_topic_id(self._topic, expected=self.topic_id, found=self._id_now())
        if len(partitions) < self._num_partitions:
            raise StreamError(
                f"topic '{self._topic}' had {self._num_partitions} partitions and now has {len(partitions)}: "
                f"it was made anew. {ANEW_CHOICES}"
            )
        return len(partitions) > self._num_partitions

    def _id_now(self) -> str:
        found = self._cluster.topic_id(self._topic)
        return "" if found is None or found.int == 0 else str(found)


def watch_topic(consumer: KafkaConsumer, topic: str, *, num_partitions: int) -> TopicWatch:
    """Let the consumer follow the topic's metadata, whether it reads from it or not, and wait for the first.

    Raises: StreamError if they do not come.
    """
    cluster: Any = consumer._cluster
    # Else this reader itself would make a deleted topic anew. kafka-python 3.0.12 takes the setting as an
    # argument of the consumer, but does not pass it on to here.
    cluster.config["allow_auto_create_topics"] = False
    cluster.add_topic(topic)
    begun_s = asked_s = time.monotonic()
    while not cluster.partitions_for_topic(topic):
        now_s = time.monotonic()
        if now_s > begun_s + METADATA_WAIT_S:
            raise StreamError(f"topic '{topic}': no metadata within {METADATA_WAIT_S:g} s; is the broker up?")
        if now_s > asked_s + METADATA_AGE_S:
            # An answer that was on its way when the topic was added takes the wish for another one away.
            cluster.request_update()
            asked_s = now_s
        time.sleep(METADATA_LOOK_S)
    return TopicWatch(consumer, topic, num_partitions=num_partitions)


ANEW_CHOICES = (
    "Positions of the old topic mean nothing in it: going on would skip or repeat impressions silently, so "
    "training stops. Choices: train on the topic that the run began with; or start with a fresh run "
    "directory, which begins at the oldest record there is"
)


def check_topic_id(topic: str, *, expected: str, found: str) -> None:
    """Ids are compared where both sides have one.

    Raises: StreamError naming both ids and the operator's choices if they differ.
    """
    if expected and found and expected != found:
        raise StreamError(
            f"topic '{topic}' was made anew: its id is {found}, the positions belong to id {expected}. "
            f"{ANEW_CHOICES}"
        )
