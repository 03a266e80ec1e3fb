"""The version log: a store in which a version either exists whole or not at all.

    shards                   how many share the log
    generation               who may write: writers below this generation are fenced (opened.py)
    promoted                 the version of the stable channel, if there is one
    manifests/<ordinal>      CRC32C and the manifest; its creation is the commit
    segments/shard-<k>/<n>   records: the rows and dense blobs of versions (log_records.py)
    snapshots/<ordinal>      a manifest of the whole content of the version that was committed there
    content/<name>           programs and signatures, named by their SHA-256, shared by versions
    damaged/                 what recovery found broken, kept for a human

All shards share one store. Each appends to its own segments; shard 0 coordinates: it alone opens
generations, creates manifests and snapshots and drops what is old. Everything a manifest names is
durable before it is created, and commits leave no hole in the ordinals: of two writers that both follow the
same head one loses.
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import replace

import structlog

from param_server.errors import (
    BadBlobError,
    GapError,
    LimitError,
    LogError,
    ManifestError,
    StoreMissingError,
)
from param_server.failpoints import reach
from param_server.history import read_promoted, write_promoted
from param_server.log_glimpse import look, mirror
from param_server.log_order import (
    check_follows,
    check_generation,
    check_same_blob,
    num_dropped,
    raise_taken,
)
from param_server.log_recovery import (
    CONTENT,
    MANIFESTS,
    SNAPSHOTS,
    Entry,
    check_num_shards,
    create_manifest,
    named_content,
    named_segments,
    ordinal_name,
    ordinals_in,
    read_manifest,
    read_named_blob,
    recover,
    seal_manifest,
)
from param_server.log_view import LogView
from param_server.manifest import (
    SHARED_KINDS,
    Manifest,
    Version,
    without_places,
)
from param_server.opened import Opened, read_opened, write_opened
from param_server.segment_log import SEGMENT_BYTES_MAX, SegmentLog
from param_server.staging import Staging
from param_server.stores import Store
from proto.tensor_blob import crc32c

log = structlog.get_logger()


DAMAGE_LINES_MAX = 1000


class VersionLog:
    """One process a shard; safe for many threads. Readers touch only what never changes."""

    def __init__(
        self,
        store: Store,
        *,
        shard: int = 0,
        num_shards: int = 1,
        keep_full: int = 2,
        segment_bytes_max: int = SEGMENT_BYTES_MAX,
    ) -> None:
        """Open the log and recover it.

        Args: keep_full: full versions and snapshots kept, with the deltas that follow the oldest of them.
        Raises: LimitError if there is no such shard, LogError if the store cannot be used.
        """
        if keep_full < 1:
            raise LogError(f"keep_full must be at least 1, found {keep_full}")
        if not 0 <= shard < num_shards:
            raise LimitError(f"shard {shard} is not one of {num_shards} shards")
        self.store = store
        self.shard = shard
        self._keep_full = keep_full
        self._mutex = threading.RLock()
        check_num_shards(store, num_shards)
        recovered = recover(store, repair=True) if self.coordinates else mirror(store)
        self._opened = recovered.opened
        self._promoted = read_promoted(store)
        self._view = LogView(recovered.entries)
        self._sees_all = True
        """Another shard: every version at the last look. Else it does not know what is needed still."""
        self.has_fenced = False
        """A generation was opened since segments were dropped: what the fenced one left is needed no more."""
        self._snapshot_segments: set[str] = set()
        """Of a snapshot that is being written: retention must not drop what nothing names yet."""
        self._segments = SegmentLog(store, shard=shard, segment_bytes_max=segment_bytes_max)
        self._staging = Staging(store, segments=self._segments)
        self.damage: list[str] = list(recovered.damage)
        self._num_scrubbed = 0
        for line in self.damage:
            log.error("version log damage", found=line)

    def close(self) -> None:
        self._segments.close()
        self.store.close()

    @property
    def coordinates(self) -> bool:
        return self.shard == 0

    @property
    def head(self) -> Version | None:
        """The newest version; None: the log is empty."""
        return self._view.head

    @property
    def fenced_generation(self) -> int:
        """Writers below it are over."""
        return self._opened.generation

    @property
    def fenced_by(self) -> str:
        """The name of the writer that opened it; empty: none did, or it gave none."""
        return self._opened.writer

    @property
    def entries(self) -> list[Entry]:
        """Every version there is, oldest first; the first one has a base. Do not change the list."""
        return self._view.entries

    def manifests(self) -> list[Manifest]:
        return [entry.manifest for entry in self.entries]

    def read(self, version: Version) -> Manifest:
        """Raises: MissingBlobError if there is no such version (any more)."""
        return self._view.entry(version).manifest

    def open_generation(self, at_least: int, *, writer: str = "") -> tuple[int, Version | None]:
        """A generation above `at_least` and above all that the log has seen; older writers are fenced.

        A shard that does not coordinate takes over the generation that the coordinator has opened.
        Returns: the generation and the head.
        """
        with self._mutex:
            if self.coordinates:
                opened = Opened(max(at_least, self.fenced_generation) + 1, writer)
                write_opened(self.store, opened)
                reach("generation_written")
            else:
                opened = max(self._opened, read_opened(self.store, self.damage))
            self._opened = opened
            self.has_fenced = True
            self._staging.forget(lambda version: version.generation < opened.generation)
            return opened.generation, self.head

    def stage(
        self, version: Version, *, kind: str, name: str, data: bytes, data_crc32c: int | None = None
    ) -> None:
        """Append one blob of a version to come; a repeat replaces it. Durable after `sync`.

        Args: data_crc32c: if it was just computed; None: it is computed here.

        Raises: FencedError, ConflictError (the version is committed with other content), GapError (it
            is not above the head), LimitError, BadBlobError (a program is not named by its content),
            LogError.
        """
        if kind in SHARED_KINDS and name != f"{kind}-{hashlib.sha256(data).hexdigest()}":
            raise BadBlobError(
                f"version {version}: blob '{name}': expected '{kind}-' and its SHA-256 as name"
            )
        found_crc32c = crc32c(data) if data_crc32c is None else data_crc32c
        with self._mutex:
            check_generation(version, fenced_generation=self.fenced_generation)
            committed = self._view.get(version)
            if committed is not None:
                check_same_blob(committed.manifest, name, num_bytes=len(data), crc32c=found_crc32c)
                return
            if self.head is not None and version < self.head:
                raise GapError(f"version {version} is not above the head {self.head}")
            self._staging.add(version, kind=kind, name=name, data=data, data_crc32c=found_crc32c)

    def sync(self) -> None:
        """All that was staged is durable when it returns; publishers that wait together share one sync.

        Raises: LogError; then what was not durable before must be staged again.
        """
        self._staging.sync()

    def located(self, manifest: Manifest, *, shard: int | None = None) -> Manifest:
        """The manifest with the place of every blob that is staged and durable here (staging.py)."""
        return self._staging.located(manifest, shard=shard)

    def commit(self, manifest: Manifest) -> bool:
        """Make a version visible. The order of the steps is the guarantee:

          1. the writer is not fenced, and the version follows the head
          2. what was staged here is durable; every blob is there with the length and checksum that the
             manifest says, those of other shards too, which name only durable places
          3. the manifest is created, exclusively and durably: from here on the version exists

        Returns: True if this very commit had been made before.
        Raises: FencedError, ConflictError, GapError, MissingBlobError, BadBlobError; the log is unchanged.
        """
        if not self.coordinates:
            raise LogError(f"version {manifest.version}: shard {self.shard} does not commit, shard 0 does")
        self.sync()
        with self._mutex:
            if self.check(manifest):
                return True
            placed = self.located(manifest)
            reach("commit_durable")
            ordinal = self.entries[-1].ordinal + 1 if self.entries else 1
            create_manifest(self.store, ordinal, placed)
            reach("commit_created")
            self._view.add(Entry(ordinal, placed))
            self._staging.forget(lambda version: version <= placed.version)
        return False

    def check(self, manifest: Manifest) -> bool:
        """Whether this very manifest is committed already; else it may be, as far as writer and order go.

        Raises: FencedError, ConflictError, GapError.
        """
        version = manifest.version
        with self._mutex:
            check_generation(version, fenced_generation=self.fenced_generation)
            committed = self._view.get(version)
            if committed is None:
                check_follows(manifest, head=self.head)
                return False
        if without_places(committed.manifest) != without_places(manifest):
            raise_taken(committed.manifest, what="with another manifest")
        return True

    def read_blob(self, manifest: Manifest, name: str) -> bytes | memoryview:
        """The bytes of one blob of a version, staged or committed, or of a snapshot, checked.

        Raises: LogDamageError if it is not what was committed, MissingBlobError if the version was
            dropped by retention meanwhile.
        """
        return read_named_blob(self.store, manifest, name, still_there=self._still_has)

    def _still_has(self, version: Version) -> bool:
        if not self.coordinates:
            self.refresh()
        return self._view.get(version) is not None

    def plan_after(self, held: Version | None) -> list[Manifest]:
        """What a reader that holds `held` loads, in order; empty: it has nothing to do (log_order.py)."""
        return self._view.plan_after(held)

    def num_after(self, held: Version | None) -> int:
        """How many versions follow `held`; all of them if the log does not know it."""
        return self._view.num_after(held)

    def chain_to(self, version: Version) -> list[Manifest]:
        """The manifests whose rows, one over the other, are the version's. Raises: MissingBlobError."""
        return self._view.chain_to(version)

    def promoted(self) -> Version | None:
        """The version of the stable channel; None: none was promoted. Raises: LogDamageError."""
        return self._promoted if self.coordinates else read_promoted(self.store)

    def promote(self, version: Version) -> None:
        """Name the version of the stable channel, durably; retention keeps its chain from here on.

        Raises: MissingBlobError if the log does not have the version, LogError.
        """
        if not self.coordinates:
            raise LogError(f"shard {self.shard} does not promote: ask shard 0")
        with self._mutex:
            self.chain_to(version)
            write_promoted(self.store, version)
            self._promoted = version

    def catch_up(self) -> list[Manifest]:
        """Versions that are in the store and not known here yet: the other shards poll one name with it.

        The coordinator asks after a commit that failed, which may have created its manifest all the same.
        If rot has met that manifest, it is set aside as recovery would.
        Raises: GapError if the log was repaired meanwhile, or what follows was dropped: open it anew.
            ManifestError for another shard, which waits for the coordinator.
        """
        news: list[Manifest] = []
        while True:
            ordinal = self.entries[-1].ordinal + 1 if self.entries else 1
            try:
                manifest = read_manifest(self.store, ordinal_name(MANIFESTS, ordinal))
            except StoreMissingError:
                if not self.coordinates and not news:
                    self._check_still_there()
                return news
            except ManifestError as error:
                if not self.coordinates:
                    raise
                # Nobody was told that this version exists, and its writer goes on in a new generation.
                self.store.set_aside(ordinal_name(MANIFESTS, ordinal))
                self._note_damage(f"{error}; it was set aside")
                return news
            if self.coordinates:
                self.store.replace(ordinal_name(MANIFESTS, ordinal), seal_manifest(manifest))
            with self._mutex:
                if manifest.parent != self.head:
                    raise GapError(
                        f"version {manifest.version} follows {manifest.parent}, this shard holds "
                        f"{self.head}: the log has changed; start this shard again"
                    )
                self._view.add(Entry(ordinal, manifest))
                self._opened = max(self._opened, Opened(manifest.version.generation))
                self._staging.forget(manifest.version.__ge__)
            news.append(manifest)

    def _check_still_there(self) -> None:
        """Nothing follows the head that this shard knows: it is the head, or the log went on without it.

        Without this a shard would wait for ever for a position that will not come: the coordinator's head
        fell back in a repair, or retention has dropped the versions that this shard missed.
        """
        if not self.entries:
            if ordinals_in(self.store, MANIFESTS):
                raise GapError("the log has versions whose beginning is gone; start this shard again")
            return
        newest = self.entries[-1]
        try:
            found = read_manifest(self.store, ordinal_name(MANIFESTS, newest.ordinal)).version
        except StoreMissingError:
            found = None
        except ManifestError:
            return  # rot: the coordinator repairs it when it starts
        if found != newest.manifest.version:
            raise GapError(
                f"version {newest.manifest.version}, this shard's head, is not in the log any more "
                f"(found {found}): the log has changed; start this shard again"
            )

    def scrub(self) -> str:
        """Look at one manifest at rest, in turn, and write it anew if it has rotted.

        The coordinator knows what it said. Without this another shard that starts meanwhile could not pass
        it, and no version could be prepared there until the coordinator starts again.
        Returns: the object's name if it was written anew, else "". Raises: LogError.
        """
        with self._mutex:
            if not self.entries or not self.coordinates:
                return ""
            self._num_scrubbed += 1
            entry = self.entries[self._num_scrubbed // 2 % len(self.entries)]
            folder, manifest = MANIFESTS, entry.manifest
            if self._num_scrubbed % 2 and entry.snapshot is not None:
                folder, manifest = SNAPSHOTS, entry.snapshot
            name = ordinal_name(folder, entry.ordinal)
            try:
                read_manifest(self.store, name)
                return ""
            except ManifestError as error:
                self.store.replace(name, seal_manifest(manifest))
                found = f"{error}; it was written anew"
            self._note_damage(found)
            return name

    def _note_damage(self, found: str) -> None:
        log.error("version log damage", found=found)
        if len(self.damage) < DAMAGE_LINES_MAX:
            self.damage.append(found)

    def refresh(self) -> None:
        """For the other shards: see what the coordinator dropped, mended or set aside, and its snapshots.

        Raises: LogError.
        """
        present = ordinals_in(self.store, MANIFESTS)
        with self._mutex:
            newest = self.entries[-1].ordinal if self.entries else 0
            # Where newer ones are missing the coordinator's head fell back: catch_up says what to do then.
            known = {
                entry.ordinal: entry for entry in self.entries if entry.ordinal >= min(present, default=0)
            }
            ordinals = sorted({*known, *(ordinal for ordinal in present if ordinal <= newest)})
            glimpse = look(self.store, ordinals, known=known)
            for line in glimpse.unreadable:
                log.error("version log damage, what needs it is left out", found=line)
            self._sees_all = not (glimpse.unreadable or glimpse.gap)
            self._view = LogView(glimpse.entries)

    def append_snapshot(self, version: Version, *, name: str, data: bytes) -> tuple[str, int]:
        """Add one blob of a snapshot to come; returns its segment and offset. Durable after `sync`."""
        with self._mutex:  # retention must not look between the append and the note of it
            place = self._segments.append(version, name, data, data_crc32c=crc32c(data))
            self._snapshot_segments.add(place.segment)
        return place.segment, place.segment_offset

    def end_snapshot(self) -> None:
        """The snapshot is made or given up: what was appended for it goes, unless a manifest names it.

        Raises: LogError; the next retention drops it then.
        """
        with self._mutex:
            left = self._snapshot_segments - named_segments(self.entries)
            self._snapshot_segments.clear()
            if not left:
                return
            try:
                self._segments.roll()
            finally:
                self._drop_segments()

    def roll_segment(self) -> None:
        """What comes next begins a segment, so that a snapshot can be dropped by itself."""
        self._segments.roll()

    def add_snapshot(self, snapshot: Manifest) -> bool:
        """Let readers begin with a version's whole content; every blob must be durable.

        Returns: False if retention dropped the version meanwhile. Raises: LogError if a publisher's sync of a
            segment that the snapshot shares with it failed: only the publisher heard of that, and retention
            would drop the versions that the snapshot stands for.
        """
        with self._mutex:
            lost = [name for name in self._snapshot_segments if self._segments.is_lost(name)]
            if lost:
                raise LogError(f"object {min(lost)}: it could not be made durable, and so no snapshot")
            entry = self._view.get(snapshot.version)
            if entry is None:
                return False
            self.store.create(ordinal_name(SNAPSHOTS, entry.ordinal), seal_manifest(snapshot))
            entries = [
                replace(one, snapshot=snapshot) if one.ordinal == entry.ordinal else one
                for one in self.entries
            ]
            self._view = LogView(entries)
            return True

    def retain(self) -> int:
        """Drop what lies before the oldest base that is kept, then what nothing names; how many versions.

        Each shard drops its own segments; manifests, snapshots and content are the coordinator's.
        Raises: LogError; repeating it is safe.
        """
        with self._mutex:
            dropped: list[Entry] = []
            if self.coordinates:
                first = num_dropped(self.entries, keep_full=self._keep_full, promoted=self._promoted)
                dropped = self.entries[:first]
                # Oldest first: a crash in between leaves a log whose start is merely further on.
                for entry in dropped:
                    self.store.delete(ordinal_name(MANIFESTS, entry.ordinal))
                    if entry.snapshot is not None:
                        self.store.delete(ordinal_name(SNAPSHOTS, entry.ordinal))
                self._view = LogView(self.entries[first:])
                reach("retain_manifests")
                if dropped:
                    self._drop_content()
            else:
                self.refresh()
            if dropped or self.has_fenced or not self.coordinates:
                self._drop_segments()
            reach("retain_segments")
            return len(dropped)

    def collect(self) -> list[str]:
        """Retention, and every segment and program that nothing names; the names of those segments."""
        with self._mutex:
            before = self._segments.names()
            self.retain()
            if self.coordinates:
                self._drop_content()
            self._drop_segments()
            left = set(self._segments.names())
            return [name for name in before if name not in left]

    def _drop_segments(self) -> None:
        if not self._sees_all:
            return
        named = named_segments(self.entries) | self._snapshot_segments
        self._segments.drop(named=named, head=self.head, fenced_generation=self.fenced_generation)
        self.has_fenced = False

    def _drop_content(self) -> None:
        named = named_content(self.entries) | self._staging.names()
        for name in self.store.list(CONTENT):
            if name[len(CONTENT) :] not in named:
                self.store.delete(name)
