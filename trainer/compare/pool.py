"""Worker processes that share a list of runs, and what becomes of a worker that dies."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO

import msgspec

from trainer.compare.plan import RunSpec
from trainer.compare.worker import Message

STDERR_SHOWN = 2_000
"""Characters of a dead worker's last words."""

WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    # glibc keeps what is freed: a step frees and takes the same megabytes again (docs/experiments.md).
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "2147483648",
    "MALLOC_TOP_PAD_": "67108864",
}


@dataclass(frozen=True, slots=True)
class Event:
    """What a worker said about one run."""

    spec: RunSpec
    message: Message


@dataclass(frozen=True, slots=True)
class _Ended:
    """A thread has no more to do, or could not go on."""

    error: BaseException | None


def run_all(specs: Sequence[RunSpec], *, num_workers: int, hear: Callable[[Event], None]) -> None:
    """Do all runs; a run whose worker dies is reported as failed, and the others go on in a new one.

    Args: hear: called in this thread with every message, in the order in which they come.
    Interrupted, it ends its workers: what is half done is lost, what was heard of is not.
    """
    waiting: queue.SimpleQueue[RunSpec] = queue.SimpleQueue()
    for spec in specs:
        waiting.put(spec)
    events: queue.SimpleQueue[Event | _Ended] = queue.SimpleQueue()
    feeders = [_Feeder(waiting, events) for _ in range(min(num_workers, len(specs)))]
    for feeder in feeders:
        feeder.start()
    try:
        num_ended = 0
        while num_ended < len(feeders):
            event = events.get()
            if isinstance(event, Event):
                hear(event)
                continue
            num_ended += 1
            if event.error is not None:
                raise event.error
    finally:
        for feeder in feeders:
            feeder.stop()
        for feeder in feeders:
            feeder.join()


class _Feeder(threading.Thread):
    """Gives one worker process its runs, one after the other."""

    def __init__(
        self, waiting: queue.SimpleQueue[RunSpec], events: queue.SimpleQueue[Event | _Ended]
    ) -> None:
        super().__init__(daemon=True)
        self._waiting, self._events = waiting, events
        self._lock = threading.Lock()
        self._stopped = False
        self._process: subprocess.Popen[bytes] | None = None

    def stop(self) -> None:
        """End the worker, whatever it does."""
        with self._lock:
            self._stopped = True
            if self._process is not None:
                self._process.kill()

    def run(self) -> None:
        error: BaseException | None = None
        with tempfile.TemporaryFile() as words:
            try:
                self._feed(words)
            except BaseException as found:  # noqa: BLE001 - raised again in the thread that waits
                error = found
            finally:
                self._end()
                self._events.put(_Ended(error))

    def _feed(self, words: IO[bytes]) -> None:
        while not self._stopped:
            try:
                spec = self._waiting.get_nowait()
            except queue.Empty:
                return
            process = self._worker(words)
            if process is None:
                return
            if not self._do(spec, process):
                code = process.wait()
                if self._stopped:
                    return
                why = f"{spec.name}: the worker ended with code {code}\n{_last(words)}"
                self._end()
                self._events.put(Event(spec, Message(error=why)))

    def _worker(self, words: IO[bytes]) -> subprocess.Popen[bytes] | None:
        """The living worker, or a new one; None when all is to stop."""
        with self._lock:
            if self._stopped:
                return None
            if self._process is None:
                words.seek(0)
                words.truncate()
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "trainer.compare.worker"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=words,
                    env={**os.environ, **WORKER_ENVIRONMENT},
                )
            return self._process

    def _do(self, spec: RunSpec, process: subprocess.Popen[bytes]) -> bool:
        """Whether the worker lived to answer."""
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(msgspec.json.encode(spec) + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            return False
        for line in process.stdout:
            try:
                message = msgspec.json.decode(line, type=Message)
            except msgspec.MsgspecError as error:
                process.kill()
                self._events.put(Event(spec, Message(error=f"{spec.name}: unreadable answer: {error}")))
                self._end()
                return True
            self._events.put(Event(spec, message))
            if message.trained is None:
                return True
        return False

    def _end(self) -> None:
        with self._lock:
            process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.close()
        except BrokenPipeError:
            # Killed with a line on its way: there is nobody left to tell.
            process.kill()
        process.wait()
        process.stdout.close()


def _last(words: IO[bytes]) -> str:
    words.seek(0)
    return words.read().decode("utf-8", "replace")[-STDERR_SHOWN:].strip()
