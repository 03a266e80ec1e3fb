"""The replica: what it wants next, and how it takes in what comes; no sockets, no clock of its own.

Following the head, a version is applied to the live store if it follows what is live. A reload (after a gap
or a bad blob) begins at the newest full version, which may be older than what is live; such a chain is built
in a second store that takes over once it has passed the live version: versions never go back by themselves.

A target (a pin, or what was promoted on the stable channel) is an operator's act and may lie before what is
live. The chain up to it is built in a second store, too, and takes over at the target and not before: nobody
is ever answered from a version between. Every answer names its version.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from param_server.errors import BadBlobError, GapError
from param_server.manifest import Manifest, Version
from param_server.receive import ReceivedVersion, receive_versions
from param_server.row_blobs import read_packed
from param_server.serving_config import ServingConfig
from param_server.serving_model import ServingModel
from param_server.serving_store import NotHeld, Prepared, ServingStore
from proto import param_server_pb2
from proto.row_segment import NotFiniteError

APPLIED_MAX = 4096

Channel = Literal["canary", "stable"]
"""canary: every version as it comes; stable: the last one that was promoted."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What the replica wants: nothing, what follows `held`, or the chain that ends at `until`."""

    kind: Literal["hold", "follow", "replay"]
    epoch: int
    """Of the target that it was made for."""
    held: Version | None = None
    until: Version | None = None


class Replica:
    """One thread plans and applies; any others read, pin and promote."""

    def __init__(
        self,
        *,
        clock_ms: Callable[[], int],
        config: ServingConfig | None = None,
        channel: Channel = "canary",
    ) -> None:
        self.config = config if config is not None else ServingConfig()
        self.channel: Channel = channel
        self._clock_ms = clock_ms
        self._live = ServingStore(self.config)
        self._beside: ServingStore | None = None
        self._reload = False
        self._mutex = threading.Lock()
        """Held while the target or the live store changes: a pin that was answered holds from then on."""
        self._epoch = 0
        self._pinned: Version | None = None
        self._promoted: Version | None = None
        self._gone = NotHeld()
        self.applied: deque[tuple[Version, int]] = deque(maxlen=APPLIED_MAX)
        self.num_reloads = 0
        self.num_moves_back = 0
        self.num_rows_refused = 0
        """Rows that were not finite; the version that brought them was refused with them."""
        self.last_refusal = ""

    @property
    def store(self) -> ServingStore:
        """What Predict answers from; take it once a request."""
        return self._live

    @property
    def ready(self) -> bool:
        """A version is live and its model has answered once."""
        model = self._live.model
        return model is not None and model.signature is not None

    @property
    def pinned(self) -> Version | None:
        return self._pinned

    @property
    def promoted(self) -> Version | None:
        return self._promoted

    @property
    def held_by_operator(self) -> bool:
        """The live version is the one that an operator chose or rolled back to, however old it is."""
        target, model = self._target(), self._live.model
        if model is not None and model.manifest.rollback_of is not None:
            return True
        return target is not None and self._live.version == target

    @property
    def not_held(self) -> NotHeld:
        """Rows that are not held, over the replica's life."""
        total = NotHeld()
        total.add(self._gone)
        total.add(self._live.not_held)
        return total

    def pin(self, version: Version | None) -> None:
        """Stay at this version, or go to it; None: follow the channel again."""
        with self._mutex:
            if version != self._pinned:
                self._pinned = version
                self._epoch += 1

    def promote(self, version: Version | None) -> None:
        """What the stable channel answers from; it means nothing on the other."""
        with self._mutex:
            if version != self._promoted:
                self._promoted = version
                self._epoch += self.channel == "stable"

    def _target(self) -> Version | None:
        if self._pinned is not None:
            return self._pinned
        return self._promoted if self.channel == "stable" else None

    def plan(self) -> Plan:
        """What to ask the source for now."""
        with self._mutex:
            target, live, epoch = self._target(), self._live.version, self._epoch
            if target is None and self.channel == "canary":
                return Plan("follow", epoch, held=None if self._reload else live)
            if target is None or target == live:
                return Plan("hold", epoch)
            return Plan("replay", epoch, until=target)

    def begin(self, plan: Plan) -> dict[str, bytes]:
        """Before the first version of a stream; returns the programs and signatures that are there."""
        self._beside = ServingStore(self.config) if plan.kind == "replay" else None
        model = self._live.model
        return model.shared if model is not None and plan.held is not None else {}

    def is_current(self, plan: Plan) -> bool:
        return plan.epoch == self._epoch

    def refuse(self, error: Exception, plan: Plan) -> None:
        """A version could not be applied. Who follows asks for the newest full version next."""
        self.last_refusal = str(error)
        self._beside = None
        if isinstance(error.__cause__, NotFiniteError):
            self.num_rows_refused += error.__cause__.num_rows
        if plan.kind == "follow":
            self.num_reloads += 1
            self._reload = True

    def settle(self) -> None:
        """A stream ended without a refusal."""
        self._reload = False

    def apply_all(
        self,
        parts: Iterable[param_server_pb2.VersionPart],
        *,
        shared: dict[str, bytes],
        plan: Plan | None = None,
    ) -> None:
        """Apply the versions of one stream of parts.

        Raises: GapError, BadBlobError, ManifestError; what was live stays live.
        """
        for received in receive_versions(parts, shared=shared):
            if not self.apply(received, plan):
                return

    def apply(self, received: ReceivedVersion, plan: Plan | None = None) -> bool:
        """Take in the next version of a stream; False: the rest of the stream is not wanted.

        Args: plan: what the stream was asked for; None: whatever there is to follow.
        Raises: GapError, BadBlobError, ManifestError; what was live stays live.
        """
        plan = plan if plan is not None else Plan("follow", self._epoch)
        manifest = received.manifest
        if not self.is_current(plan):
            return False
        store = self._store_for(manifest, plan)
        segments = [
            read_packed(manifest.version, blob, received.blobs[blob.name]) for blob in manifest.rows_blobs
        ]
        prepared = store.prepare(manifest, segments)
        model = ServingModel(received, before=store.model)
        _check_dims(manifest, model, prepared)
        with self._mutex:
            if not self.is_current(plan):
                return False
            store.switch(prepared, model)
            if store is self._live or self._takes_over(store, manifest, plan):
                self._show(store, manifest.version)
        return plan.kind == "follow" or manifest.version != plan.until

    def _takes_over(self, store: ServingStore, manifest: Manifest, plan: Plan) -> bool:
        live = self._live.version
        if plan.kind == "replay":
            return manifest.version == plan.until
        if live is not None and manifest.version == live:
            self._beside = None  # the same version twice: what follows goes to the live store
        return live is None or manifest.version > live

    def _show(self, store: ServingStore, version: Version) -> None:
        if store is not self._live:
            before = self._live.version
            self.num_moves_back += before is not None and version < before
            self._gone.add(self._live.not_held)
            self._live, self._beside = store, None
        self.last_refusal = ""
        self._reload = False
        self.applied.append((version, self._clock_ms()))

    def _store_for(self, manifest: Manifest, plan: Plan) -> ServingStore:
        if plan.kind == "replay":
            assert plan.until is not None
            if manifest.version > plan.until or self._beside is None:
                raise GapError(
                    f"version {manifest.version} came where the chain should end at {plan.until}; "
                    f"version {plan.until} is not in the log"
                )
            return self._beside
        live = self._live.version
        newer = live is None or manifest.version > live
        if newer and (manifest.kind == "full" or manifest.parent == live):
            return self._live
        if manifest.kind == "full":
            self._beside = ServingStore(self.config)
            return self._beside
        if self._beside is not None and manifest.parent == self._beside.version:
            return self._beside
        raise GapError(
            f"version {manifest.version} follows {manifest.parent}, held is {live}; a version is missing. "
            "The replica reloads from the newest full version."
        )


def _check_dims(manifest: Manifest, model: ServingModel, prepared: Prepared) -> None:
    for feature in model.signature.features if model.signature is not None else ():
        dim = prepared.dim(feature.table)
        if dim not in (None, feature.dim):
            raise BadBlobError(
                f"version {manifest.version}: feature '{feature.name}' wants dim {feature.dim}, "
                f"table '{feature.table}' has {dim}"
            )
