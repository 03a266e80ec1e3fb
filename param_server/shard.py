"""The shard: one version log and the row store that follows it. No sockets: shard_service.py has them.

Shard 0 coordinates: it commits, rolls back and makes snapshots. Every other shard makes its part of a version
durable, answers where it lies, and takes over what shard 0 has committed to the store that all share.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt
import structlog

from feature_eviction import owner_of
from param_server.errors import (
    BadBlobError,
    LimitError,
    LogDamageError,
    LogError,
    ManifestError,
    MissingBlobError,
    ParamServerError,
)
from param_server.failpoints import reach
from param_server.manifest import BlobRef, Manifest, Version
from param_server.opened import WRITER
from param_server.rollback import plan_rollback
from param_server.row_store import RowStore
from param_server.shard_state import ShardState, VersionInfo, version_info
from param_server.signature import decode_signature
from param_server.snapshots import make_snapshot, num_since_base
from param_server.staged_blobs import ArrivedBlob
from param_server.subscriptions import BACKLOG_VERSIONS_MAX, Subscriptions
from param_server.version_content import segments_of
from param_server.version_log import VersionLog
from proto.row_segment import NotFiniteError, RowSegment
from proto.tensor_blob import BlobError, decode_tensors

log = structlog.get_logger()

PULL_IDS_MAX = 1 << 17
SNAPSHOT_WAIT_S = 10.0
SNAPSHOT_WAIT_S_MAX = 600.0
"""Before a snapshot that failed is tried again, doubled from try to try: each may write a whole table."""


@dataclass(frozen=True, slots=True)
class Published:
    num_blobs: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Pulled:
    """complete: no row has left memory, so an id that is missing does not exist."""

    version: Version | None
    segment: RowSegment
    complete: bool


class Shard:
    """Safe for many threads. The store is rebuilt from the log when the shard is made."""

    def __init__(
        self,
        log: VersionLog,
        *,
        num_shards: int = 1,
        memory_bytes_max: int | None = None,
        snapshot_every: int = 0,
        backlog_versions_max: int = BACKLOG_VERSIONS_MAX,
    ) -> None:
        """Args: memory_bytes_max: for the rows in memory, None = all; snapshot_every: deltas after which
        `maintain` makes a snapshot, 0 = never.
        Raises: LogDamageError if a blob changed in the store since the log was opened, LimitError.
        """
        self.log = log
        self.num_shards = num_shards
        self._snapshot_every = snapshot_every
        self._store = RowStore(memory_bytes_max=memory_bytes_max, keep_columns=True)
        self._commit_mutex = threading.Lock()
        self._counters = threading.Lock()
        self._bytes_published = 0
        self._refused: dict[str, int] = {}
        self._num_rows_refused = 0
        self._uncertain = False
        self._snapshot_wait_s = 0.0
        self._snapshot_after_s = float("-inf")
        self.subscriptions = Subscriptions(log, backlog_versions_max=backlog_versions_max)
        if log.coordinates:
            for manifest in log.plan_after(None):
                self._apply(manifest)
        else:
            self._take_rows()

    def open_generation(self, at_least: int, *, writer: str = "") -> tuple[int, Version | None]:
        """Fence every other writer; returns the generation to write with and the newest version."""
        if not 0 <= at_least < 2**62:
            raise LimitError(f"at_least must be below 2^62, found {at_least}")
        if not WRITER.fullmatch(writer):
            raise LimitError(
                f"writer must be at most 64 characters of A-Z a-z 0-9 . _ -, found '{writer[:80]}'"
            )
        with self._commit_mutex:
            self._settle()
            opened = self.log.open_generation(at_least, writer=writer)
            if self.log.coordinates:
                self._retain()
            return opened

    def publish(self, blobs: Iterable[ArrivedBlob]) -> Published:
        """Make blobs of a version to come durable, in three steps:

          1. a blob has arrived whole and undamaged (who calls sees to that)
          2. it is appended to the log; a repeat replaces what came before
          3. after the last one, everything is made durable, with one sync for all who wait

        Raises: FencedError, ConflictError, GapError, LimitError, BadBlobError, LogError; after an error the
            writer sends the whole version again.
        """
        num_blobs = num_bytes = 0
        with self._counting_refusals():
            for version, kind, name, data, data_crc32c in blobs:
                reach("publish_joined")
                self.log.stage(version, kind=kind, name=name, data=data, data_crc32c=data_crc32c)
                reach("publish_appended")
                num_blobs += 1
                num_bytes += len(data)
            self.log.sync()
            reach("publish_synced")
        with self._counters:
            self._bytes_published += num_bytes
        return Published(num_blobs, num_bytes)

    def prepare_part(self, manifest: Manifest) -> list[BlobRef]:
        """Check this shard's part of a version to come; its blobs, each with its durable place.

        Raises: what `commit` raises; the manifest of every other shard's part is not looked at.
        """
        with self._counting_refusals(), self._commit_mutex:
            self._take_over()
            if self.log.check(manifest):
                committed = self.log.read(manifest.version)
                return [blob for blob in committed.rows_blobs if blob.shard == self.log.shard]
            placed = self.log.located(manifest, shard=self.log.shard)
            self._store.prepare(placed, self._own_segments(placed, check=True))
            return [blob for blob in placed.rows_blobs if blob.shard == self.log.shard]

    def commit(self, manifest: Manifest) -> tuple[Version | None, bool]:
        """Make a version visible. The order of the steps is the guarantee:

          1. the writer is not fenced, the version follows the head, its blobs are durable
          2. its rows are decoded, checked and written beside the live ones
          3. its weights and signature can be read, and every weight is finite
          4. the log creates the manifest: from here on the version exists, and nothing can be refused
          5. the rows become the live ones, and subscribers are told
          6. retention removes what the version made superfluous

        At a shard that does not coordinate: take over what shard 0 has committed.
        Returns: the head, and whether this very commit had been made before.
        Raises: FencedError, GapError, ConflictError, MissingBlobError, BadBlobError, ManifestError, LogError.
        """
        with self._counting_refusals(), self._commit_mutex:
            if not self.log.coordinates:
                self._take_over()
                self._check_committed(manifest)
                return self.log.head, True
            return self.log.head if (repeated := self._commit(manifest)) else manifest.version, repeated

    def _commit(self, manifest: Manifest) -> bool:
        self._settle()
        if self.log.check(manifest):
            return True
        placed = self.log.located(manifest)
        reach("commit_checked")
        prepared = self._store.prepare(placed, self._own_segments(placed, check=True))
        self._check_model(placed)
        reach("commit_prepared")
        try:
            self.log.commit(placed)
        except LogError:
            self._uncertain = True
            raise
        self._store.switch(prepared)
        self.subscriptions.announce()
        reach("commit_switched")
        self._retain()
        return False

    def rollback(self, version: Version, *, now_ms: int) -> Version:
        """Commit a new version with an older one's content; returns it.

        Raises: MissingBlobError if the log does not have the older one, GapError if it is the head, LogError.
        """
        self._must_coordinate("roll back")
        with self._counting_refusals(), self._commit_mutex:
            self._settle()
            plan = plan_rollback(self.log, version, num_shards=self.num_shards, now_ms=now_ms)
            for reference, data in plan.blobs:
                self.log.stage(plan.manifest.version, kind=reference.kind, name=reference.name, data=data)
            self.log.sync()
            self._commit(plan.manifest)
            return plan.manifest.version

    def take_over(self) -> int:
        """At a shard that does not coordinate: apply what shard 0 has committed; how many versions."""
        if self.log.coordinates:
            return 0
        with self._commit_mutex:
            return self._take_over()

    def maintain(self, *, now_s: float) -> None:
        """The work beside: follow the coordinator, or look for rot and make a snapshot that is due; cut off
        who is stuck.

        Raises: LogError; calling it again is safe.
        """
        self.subscriptions.cancel_stuck(now_s=now_s)
        if not self.log.coordinates:
            self.take_over()
            return
        self.log.scrub()
        if self._snapshot_every and now_s >= self._snapshot_after_s:
            self._make_due_snapshot(now_s=now_s)

    def snapshot(self) -> Manifest | None:
        """Make a snapshot of the head and drop what it made superfluous; None: there is nothing new."""
        self._must_coordinate("make a snapshot")
        head = self.log.head
        if head is None or num_since_base(self.log) == 0:
            return None
        try:
            made = make_snapshot(self.log, head, num_shards=self.num_shards)
        except MissingBlobError as error:
            # Retention was quicker, so there is a newer full version; the next snapshot begins there.
            log.info("snapshot given up", version=str(head), reason=str(error))
            return None
        finally:
            self.log.end_snapshot()
        with self._commit_mutex:
            self._retain()
        return made

    def _make_due_snapshot(self, *, now_s: float) -> None:
        if num_since_base(self.log) < self._snapshot_every:
            return
        try:
            self.snapshot()
        except ParamServerError as error:
            self._snapshot_wait_s = min(2 * self._snapshot_wait_s or SNAPSHOT_WAIT_S, SNAPSHOT_WAIT_S_MAX)
            self._snapshot_after_s = now_s + self._snapshot_wait_s
            log.error("no snapshot made", reason=str(error), next_try_in_s=self._snapshot_wait_s)
        else:
            self._snapshot_wait_s = 0.0

    def pull(self, table: str, ids_N: npt.NDArray[np.int64]) -> Pulled:
        """The newest rows of the ids that exist, in the order asked, doubled ids once, with their columns.

        Raises: LimitError, ManifestError if there is no such table.
        """
        if len(ids_N) > PULL_IDS_MAX:
            raise LimitError(f"ids: at most {PULL_IDS_MAX} are pulled at once, found {len(ids_N)}")
        _, first_U = np.unique(ids_N, return_index=True)
        keys_N = ids_N[np.sort(first_U)]
        gathered = self._store.gather({table: keys_N})
        present_N = gathered.present_N[table]
        rows_ND = gathered.rows_ND[table][present_N]
        if not rows_ND.shape[1]:
            raise ManifestError(f"table '{table}' does not exist at version {gathered.version}")
        columns = {name: column[present_N] for name, column in gathered.columns_N.get(table, {}).items()}
        segment = RowSegment(table, keys_N[present_N], rows_ND, np.zeros(0, np.int64), **columns)
        return Pulled(gathered.version, segment, gathered.complete)

    def versions(self) -> list[VersionInfo]:
        """Everything that is in the log, oldest first."""
        return [
            version_info(entry.manifest, has_snapshot=entry.snapshot is not None)
            for entry in self.log.entries
        ]

    def status(self) -> ShardState:
        entries = self.log.entries
        num_full = sum(entry.manifest.kind == "full" for entry in entries)
        subscribers = self.subscriptions.names()
        with self._counters:
            return ShardState(
                head=self.log.head,
                fenced_generation=self.log.fenced_generation,
                fenced_by=self.log.fenced_by,
                num_versions=len(entries),
                num_full=num_full,
                num_delta=len(entries) - num_full,
                num_rows=self._store.num_rows,
                bytes_published=self._bytes_published,
                num_subscribers=len(subscribers),
                subscribers=tuple(subscribers),
                damage=tuple(self.log.damage),
                shard=self.log.shard,
                num_shards=self.num_shards,
                num_snapshots=sum(entry.snapshot is not None for entry in entries),
                memory_bytes=self._store.memory_bytes,
                num_left_out=self._store.num_left_out,
                num_cut_off=self.subscriptions.num_cut_off,
                refused=dict(self._refused),
                num_rows_refused=self._num_rows_refused,
            )

    def _apply(self, manifest: Manifest) -> None:
        self._store.switch(self._store.prepare(manifest, self._own_segments(manifest, check=False)))

    def _own_segments(self, manifest: Manifest, *, check: bool) -> Iterator[RowSegment]:
        """This shard's rows of a version, decoded; `check`: they come from a writer."""
        for _, blob, segment in segments_of([manifest], self.log.read_blob, shard=self.log.shard):
            if check and self.num_shards > 1:
                ids = np.concatenate([segment.ids_N, segment.deleted_ids_M])
                wrong = ids[owner_of(ids, num_owners=self.num_shards) != self.log.shard]
                if len(wrong):
                    raise BadBlobError(
                        f"version {manifest.version}: blob '{blob.name}': id {int(wrong[0])} belongs to "
                        f"another of the {self.num_shards} shards than {self.log.shard}"
                    )
            yield segment

    def _check_model(self, manifest: Manifest) -> None:
        """A version whose weights or signature no replica could read must not become the head.

        Whether the program takes the weights is seen where it runs: a replica refuses such a version and
        answers from the one before.
        """
        dense, signature = manifest.blob("dense"), manifest.blob("signature")
        if dense is None or signature is None:
            return
        where = f"version {manifest.version}: blob"
        weights, _ = decode_tensors(self.log.read_blob(manifest, dense.name), where=f"{where} '{dense.name}'")
        for name, values in weights.items():
            if np.issubdtype(values.dtype, np.floating) and not np.isfinite(values).all():
                raise BadBlobError(f"{where} '{dense.name}': weight '{name}' is not finite")
        serving = decode_signature(
            bytes(self.log.read_blob(manifest, signature.name)), where=f"{where} '{signature.name}'"
        )
        if serving.schema_hash != manifest.schema_hash:
            raise ManifestError(
                f"version {manifest.version}: schema hash '{manifest.schema_hash}', "
                f"but its signature's is '{serving.schema_hash}'"
            )

    def _take_over(self) -> int:
        num_new = self._follow_log() if not self.log.coordinates else 0
        if num_new:
            self.subscriptions.announce()
        if num_new or self.log.has_fenced:
            self._retain()
        return num_new

    def _settle(self) -> None:
        """After a commit of which nobody knows whether its manifest was created: look, and go on there."""
        if self._uncertain and self.log.coordinates:
            if self._follow_log():
                self.subscriptions.announce()
            self._uncertain = False

    def _follow_log(self) -> int:
        """Take over what the log's store has and this shard does not know yet; how many versions.

        Rows that cannot be read stop nothing: a full version needs none of those before. Until one comes this
        shard answers from the version that it has, and no delta can be prepared here.
        """
        num_new = len(self.log.catch_up())
        self._take_rows()
        return num_new

    def _take_rows(self) -> None:
        for held in (self._store.version, None):
            try:
                for manifest in self.log.plan_after(held):
                    if self._store.version is None or manifest.version > self._store.version:
                        self._apply(manifest)
                break
            except (LogDamageError, MissingBlobError) as error:
                log.error("rows cannot be taken over, a full version is waited for", reason=str(error))

    def _retain(self) -> None:
        try:
            self.log.retain()
        except LogError as error:
            # The version is committed; what could not be removed is removed with the next one.
            log.warning("retention failed, it is repeated with the next version", reason=str(error))

    def _check_committed(self, manifest: Manifest) -> None:
        if not any(one.manifest.version == manifest.version for one in self.log.entries):
            raise MissingBlobError(
                f"version {manifest.version}: shard 0 has not committed it; commit it there first"
            )

    def _must_coordinate(self, what: str) -> None:
        if not self.log.coordinates:
            raise LogError(f"shard {self.log.shard} does not {what}: ask shard 0")

    @contextmanager
    def _counting_refusals(self) -> Iterator[None]:
        try:
            yield
        except (ParamServerError, BlobError) as error:
            name = type(error).__name__ if isinstance(error, ParamServerError) else BadBlobError.__name__
            with self._counters:
                self._refused[name] = self._refused.get(name, 0) + 1
                if isinstance(error.__cause__, NotFiniteError):
                    self._num_rows_refused += error.__cause__.num_rows
            raise


def with_rows_of(manifest: Manifest, shards: frozenset[int]) -> Manifest:
    """The manifest with the rows of these shards alone; empty: of all."""
    if not shards:
        return manifest
    blobs = tuple(blob for blob in manifest.blobs if blob.kind != "rows" or blob.shard in shards)
    return msgspec.structs.replace(manifest, blobs=blobs)
