"""The producer process: paces a source of impressions into the topic, within what the broker can hold.

Records go to the partitions in turn, so the partitions grow alike; nothing downstream depends on which
partition a user is in.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.errors import KafkaError, KafkaTimeoutError

from trainer.config.config import Config
from trainer.errors import StreamError
from trainer.metrics import QualityWindow
from trainer.run.status import ProducerStatus, write_status
from trainer.stream.broker import Security, connect_options, ensure_topic
from trainer.stream.columns import Impressions
from trainer.stream.embedded_broker import PARTITION_BYTES_MAX, PARTITION_RECORDS_MAX
from trainer.stream.record import encode_record
from trainer.stream.slicing import slice_impressions

Truth = npt.NDArray[np.float32]

EMBEDDED_SHARE = 0.6
"""Of an embedded partition's limits, how much may wait for a commit; the rest is slack for framing."""
RECORD_OVERHEAD_BYTES = 128
STATUS_INTERVAL_S = 0.5
QUALITY_INTERVAL_S = 5.0
COMMIT_LOOK_S = 0.2
UNCONFIRMED_MAX = 512
SEND_TIMEOUT_S = 60.0
STOPPED_TIMEOUT_S = 4.0
"""The same once it is to end. It is waited for the answers and then for the client's close
(which flushes and joins, each for as long) have to fit into the 20 s between SIGTERM and SIGKILL."""
ANSWER_LOOK_S = 0.2


def run_producer(
    config: Config,
    *,
    source: Iterator[Impressions] | Iterator[tuple[Impressions, Truth]],
    status_file: Path,
    impressions: int,
    rate: int,
    embedded: bool,
    security: Security | None = None,
) -> None:
    """Send everything that the source gives, then leave.

    Args: source: batches (one record each), with their true probabilities [N, T] where these are known.
        impressions: end after so many; 0 = all that the source has. rate: impressions per second; 0 = as
        fast as the broker takes them; a stall is not made up for by a burst. embedded: stay within the
        embedded broker's limits, beyond what the consumer group has committed.
    SIGTERM and SIGINT end it after the record in hand; must run in the main thread.
    Raises: StreamError if the broker refuses records, or an embedded partition lost records unread.
    """
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    status = _Status(config, status_file)
    status.write(0.0)
    options = connect_options(
        config.kafka.bootstrap_servers,
        security=security or Security(),
        timeout_s=config.kafka.start_timeout_s,
    )
    topic = config.kafka.topic
    partitions = ensure_topic(topic, num_partitions=config.kafka.num_partitions, options=options)
    producer = KafkaProducer(**options, acks="all", linger_ms=0, max_request_size=1 << 26)
    guard = EmbeddedGuard(config, partitions=partitions, options=options) if embedded else None
    close_timeout_s = STOPPED_TIMEOUT_S
    try:
        way = _Way(topic, producer, partitions, guard, status, stop)
        _send_all(config, _records(source, impressions), way, rate=rate)
        if not stop.is_set():
            close_timeout_s = SEND_TIMEOUT_S
    finally:
        # What was not answered has been raised above; that it cannot be flushed either is no news.
        with contextlib.suppress(KafkaTimeoutError):
            producer.close(timeout=close_timeout_s)
        if guard is not None:
            guard.close()
    status.finish(told_to_stop=stop.is_set())


class _Sent(NamedTuple):
    """A record that the broker has not confirmed yet."""

    partition: int
    num_impressions: int
    num_bytes: int
    answer: Any


@dataclass(frozen=True, slots=True)
class _Way:
    """Everything a record passes on its way out."""

    topic: str
    producer: KafkaProducer
    partitions: list[int]
    guard: EmbeddedGuard | None
    status: _Status
    stop: threading.Event
    unconfirmed: deque[_Sent] = field(default_factory=deque)

    def report(self) -> None:
        """Count the answers that are there and say so. Raises: StreamError if a record was refused."""
        _confirm(self, all_of_them=False)
        self.status.write(time.monotonic())


def _records(
    source: Iterator[Impressions] | Iterator[tuple[Impressions, Truth]], limit: int
) -> Iterator[tuple[Impressions, Truth | None]]:
    """Each batch with its truth or None, cut off after `limit` impressions (0: never)."""
    left = limit
    for item in source:
        impressions, truth_NT = item if isinstance(item, tuple) else (item, None)
        if limit and len(impressions) > left:
            impressions = slice_impressions(impressions, 0, left)
            truth_NT = None if truth_NT is None else truth_NT[:left]
        if len(impressions) == 0:
            continue
        left -= len(impressions)
        yield impressions, truth_NT
        if limit and left <= 0:
            return


def _send_all(
    config: Config, records: Iterator[tuple[Impressions, Truth | None]], way: _Way, *, rate: int
) -> None:
    due_s = time.monotonic()
    for number, (impressions, truth_NT) in enumerate(records):
        if way.stop.is_set():
            break
        value = encode_record(impressions, config.schema)
        partition = way.partitions[number % len(way.partitions)]
        if way.guard is not None and not way.guard.wait_for_room(partition, len(value), way):
            break
        if rate:
            # Due when the records before it have used up their time; a stall is not made up for.
            due_s = max(due_s, time.monotonic() - len(impressions) / rate)
            if not _pause_until(due_s, way):
                break
            due_s += len(impressions) / rate
        try:
            answer = way.producer.send(way.topic, value=value, partition=partition)
        except KafkaError as error:
            raise _refused(way.topic, partition, error) from error
        way.unconfirmed.append(_Sent(partition, len(impressions), len(value), answer))
        way.status.sent(impressions, truth_NT)
        if len(way.unconfirmed) > UNCONFIRMED_MAX:
            _confirm(way, all_of_them=True)
        way.report()
    _confirm(way, all_of_them=True)


def _confirm(way: _Way, *, all_of_them: bool) -> None:
    """Look at the answers that are there; a refused record ends the run, as it would be a silent loss."""
    while way.unconfirmed and (all_of_them or way.unconfirmed[0].answer.is_done):
        sent = way.unconfirmed.popleft()
        try:
            _answer(sent.answer, way.stop)
        except KafkaError as error:
            raise _refused(way.topic, sent.partition, error) from error
        way.status.confirmed(sent)


def _answer(sent: Any, stop: threading.Event) -> None:
    """Wait for the broker's answer to one record, less long from the moment that a stop is asked for.

    Raises: KafkaError if the record was refused, or not answered in time.
    """
    deadline_s = time.monotonic() + SEND_TIMEOUT_S
    is_stopped = False
    while not sent.is_done and time.monotonic() < deadline_s:
        if stop.is_set() and not is_stopped:
            is_stopped = True
            deadline_s = min(deadline_s, time.monotonic() + STOPPED_TIMEOUT_S)
        with contextlib.suppress(KafkaTimeoutError):
            sent.get(timeout=ANSWER_LOOK_S)
    sent.get(timeout=0.0)


def _refused(topic: str, partition: int, error: KafkaError) -> StreamError:
    return StreamError(f"topic '{topic}', partition {partition}: the broker did not take a record ({error})")


def _pause_until(due_s: float, way: _Way) -> bool:
    """Returns: False when asked to stop."""
    while (left_s := due_s - time.monotonic()) > 0:
        if way.stop.wait(min(left_s, STATUS_INTERVAL_S)):
            return False
        way.report()
    return True


class EmbeddedGuard:
    """Keeps what is not committed within a share of the embedded broker's limits, partition by partition."""

    def __init__(self, config: Config, *, partitions: list[int], options: dict[str, Any]) -> None:
        self._topic = config.kafka.topic
        self._consumer = KafkaConsumer(**options, group_id=config.kafka.group, enable_auto_commit=False)
        self._sent: dict[int, deque[int]] = {partition: deque() for partition in partitions}
        """Bytes of each record sent and not committed."""
        self._bytes = dict.fromkeys(partitions, 0)
        ends = self._consumer.end_offsets([TopicPartition(self._topic, p) for p in partitions])
        self._committed = {tp.partition: int(end) for tp, end in ends.items()}
        """What was there before this producer is not its to guard."""
        self._began = dict(self._committed)
        self._looked_at_s = float("-inf")

    def wait_for_room(self, partition: int, num_bytes: int, way: _Way) -> bool:
        """Wait for commits until the record fits.

        Returns: False when asked to stop. Raises: StreamError if records fell out of the log unread.
        """
        size = num_bytes + RECORD_OVERHEAD_BYTES
        if size > EMBEDDED_SHARE * PARTITION_BYTES_MAX:
            raise StreamError(
                f"a record of {num_bytes} bytes is too large for the embedded broker; lower "
                "produce.record_impressions"
            )
        while not self._fits(partition, size):
            if way.stop.wait(COMMIT_LOOK_S):
                return False
            self._look()
            way.report()
        if time.monotonic() > self._looked_at_s + 1.0:
            self._look()
        self._sent[partition].append(size)
        self._bytes[partition] += size
        return True

    def close(self) -> None:
        self._consumer.close(autocommit=False)

    def _fits(self, partition: int, size: int) -> bool:
        return (
            self._bytes[partition] + size <= EMBEDDED_SHARE * PARTITION_BYTES_MAX
            and len(self._sent[partition]) < EMBEDDED_SHARE * PARTITION_RECORDS_MAX
        )

    def _look(self) -> None:
        """Ask for the group's commits and for the beginnings of the logs."""
        self._looked_at_s = time.monotonic()
        assigned = [TopicPartition(self._topic, partition) for partition in self._sent]
        try:
            oldest = self._consumer.beginning_offsets(assigned)
            committed = {tp: self._consumer.committed(tp) for tp in assigned}
        except KafkaError as error:
            raise StreamError(
                f"topic '{self._topic}': the embedded broker does not answer ({error})"
            ) from error
        for tp in assigned:
            partition = tp.partition
            now = max(self._committed[partition], committed[tp] or 0)
            for _ in range(min(now - self._committed[partition], len(self._sent[partition]))):
                self._bytes[partition] -= self._sent[partition].popleft()
            self._committed[partition] = now
            if oldest[tp] > max(now, self._began[partition]):
                raise StreamError(
                    f"topic '{self._topic}', partition {partition}: the embedded broker dropped records "
                    f"{now}..{oldest[tp] - 1} before they were committed. Use a Kafka broker for this load"
                )


class _Status:
    """The status file, and the quality of the true probabilities."""

    def __init__(self, config: Config, path: Path) -> None:
        self._path = path
        self._status = ProducerStatus(state="starting")
        self._window = QualityWindow(
            domains=config.schema.domains,
            tasks=config.schema.task_names,
            window=config.train.metrics_window,
        )
        self._truth_known = False
        self._written_at_s = float("-inf")
        self._judged_at_s = float("-inf")

    def sent(self, impressions: Impressions, truth_NT: Truth | None) -> None:
        self._status.state = "producing"
        if truth_NT is not None:
            self._truth_known = True
            self._window.add(
                truth_NT,
                labels_NT=impressions.labels_NT,
                known_NT=impressions.known_NT,
                domain_N=impressions.domain_N,
                users_N=impressions.user_ids_N,
            )

    def confirmed(self, record: _Sent) -> None:
        """Only now is it in the stream, whatever becomes of this process."""
        self._status.impressions_produced += record.num_impressions
        self._status.records_produced += 1
        self._status.bytes_produced += record.num_bytes

    def write(self, now_s: float) -> None:
        """Twice a second; the qualities, which cost more, every few seconds."""
        if now_s < self._written_at_s + STATUS_INTERVAL_S:
            return
        self._written_at_s = now_s
        if now_s >= self._judged_at_s + QUALITY_INTERVAL_S:
            self._judge()
            self._judged_at_s = time.monotonic()
        write_status(self._path, self._status)

    def finish(self, *, told_to_stop: bool) -> None:
        self._status.state = "done"
        self._status.told_to_stop = told_to_stop
        self._judge()
        write_status(self._path, self._status)

    def _judge(self) -> None:
        if self._truth_known:
            self._status.best_possible_auc, self._status.best_possible_gauc = self._window.qualities()
