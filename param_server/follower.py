"""The replica's loop: asks a source for what the replica wants, for ever; after a failure it waits longer."""

from __future__ import annotations

import threading

import structlog

from param_server.errors import (
    AccessError,
    BadBlobError,
    GapError,
    LogDamageError,
    ManifestError,
    MissingBlobError,
    ParamServerError,
)
from param_server.manifest import Version
from param_server.replica import Plan, Replica
from param_server.sources import VersionSource

log = structlog.get_logger()

BACKOFF_MIN_S = 0.05
BACKOFF_MAX_S = 2.0
REFUSED_AGAIN_MAX_S = 15.0
"""Where the same version is refused again: each attempt loads everything from the newest full version on."""
HOLD_S = 1.0
"""How often a replica that follows nothing asks what is promoted; how late it may learn of it."""

REFUSALS = (GapError, BadBlobError, ManifestError, LogDamageError, MissingBlobError)
"""After these the replica asks for the newest full version instead of for what follows."""


class Follower:
    """One thread runs `follow`; pin, unpin and stop come from any other."""

    def __init__(self, replica: Replica, source: VersionSource, *, name: str) -> None:
        self._replica = replica
        self._source = source
        self._name = name
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._is_away = False
        """The source was lost, and has sent no version since."""

    def follow(self) -> None:
        """Until `stop`: ask, apply; after a failure wait a little longer each time and go on."""
        backoff_s, last_refusal = BACKOFF_MIN_S, ""
        while not self._stop.is_set():
            self._wake.clear()
            before = self._replica.store.version
            plan = self._plan()
            if plan is None or plan.kind == "hold":
                self._wake.wait(HOLD_S)
                continue
            refusal = self._run(plan)
            again = bool(refusal) and refusal == last_refusal
            last_refusal = refusal
            if self._replica.store.version != before and not again:
                backoff_s = BACKOFF_MIN_S
            if self._replica.is_current(plan):
                self._wake.wait(backoff_s)
            backoff_s = min(2 * backoff_s, REFUSED_AGAIN_MAX_S if again else BACKOFF_MAX_S)

    def pin(self, version: Version | None) -> None:
        """See Replica.pin; what the loop was doing ends."""
        self._replica.pin(version)
        self._source.cancel()
        self._wake.set()

    def stop(self) -> None:
        """End `follow` soon, from any thread."""
        self._stop.set()
        self._source.cancel()
        self._wake.set()

    def _plan(self) -> Plan | None:
        """None: the source does not say what is promoted."""
        replica = self._replica
        if replica.channel == "stable":
            try:
                replica.promote(self._source.promoted())
            except ParamServerError as error:
                log.info("what is promoted is not known", replica=self._name, reason=str(error))
                return None
        return replica.plan()

    def _run(self, plan: Plan) -> str:
        """One attempt. Returns: why a version was refused; empty: none was."""
        replica, source = self._replica, self._source
        shared = replica.begin(plan)
        try:
            if plan.kind == "replay":
                assert plan.until is not None
                versions = source.replay(plan.until)
            else:
                versions = source.follow(plan.held, shared=shared)
            if self._stop.is_set() or not replica.is_current(plan):
                source.cancel()
            for received in versions:
                if self._is_away:
                    self._is_away = False
                    log.info("versions come again", replica=self._name)
                if not replica.apply(received, plan):
                    break
            replica.settle()
        except REFUSALS as error:
            replica.refuse(error, plan)
            log.warning("version refused", replica=self._name, plan=plan.kind, reason=str(error))
            return str(error)
        except AccessError as error:
            replica.last_refusal = str(error)
            log.error("not let in", replica=self._name, reason=str(error))
        except ParamServerError as error:
            # Once for each time that it is lost, and not for each attempt to reach it.
            if not self._is_away:
                self._is_away = True
                log.info("subscription ended, trying on", replica=self._name, reason=str(error))
        return ""
