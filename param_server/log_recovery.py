"""Recovery of the version log: keep what is whole, put aside what is broken, name every difference.

What an interrupted process leaves behind (a record without a manifest, deltas whose full version
retention has dropped) is no damage. What was committed and is now torn, rotten or missing is: its
manifest is set aside and reported, and the head falls back to the newest version that can still be loaded
whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from param_server.errors import (
    ConflictError,
    LimitError,
    LogDamageError,
    LogError,
    ManifestError,
    MissingBlobError,
    StoreExistsError,
    StoreMissingError,
)
from param_server.log_records import read_record
from param_server.manifest import (
    MANIFEST_BYTES_MAX,
    SHARED_KINDS,
    BlobRef,
    Manifest,
    Version,
    decode_manifest,
    encode_manifest,
    without_places,
)
from param_server.opened import Opened, read_opened, write_opened
from param_server.sealed import SEAL_BYTES, seal, unseal
from param_server.stores import Store
from proto.tensor_blob import crc32c

ORDINAL_DIGITS = 12
MANIFESTS, SNAPSHOTS, CONTENT = "manifests/", "snapshots/", "content/"
SHARDS = "shards"


@dataclass(frozen=True, slots=True)
class Entry:
    """One version in the log. Ordinals count commits; what recovery sets aside leaves a hole."""

    ordinal: int
    manifest: Manifest
    snapshot: Manifest | None = None
    """The whole content of the same version, where a snapshot of it was made."""

    @property
    def base(self) -> Manifest | None:
        """What a reader that holds nothing can begin with; None: it must begin earlier."""
        return self.manifest if self.manifest.kind == "full" else self.snapshot


@dataclass
class Recovered:
    """entries: oldest first, each loadable from the newest base at or before it."""

    entries: list[Entry]
    opened: Opened
    damage: list[str] = field(default_factory=list)


def ordinal_name(folder: str, ordinal: int) -> str:
    return f"{folder}{ordinal:0{ORDINAL_DIGITS}d}"


def ordinals_in(store: Store, folder: str) -> list[int]:
    """In order; what has no ordinal's name is not looked at."""
    texts = (name[len(folder) :] for name in store.list(folder))
    return [int(text) for text in texts if _is_ordinal(text)]


def _is_ordinal(text: str) -> bool:
    return text.isdigit() and len(text) == ORDINAL_DIGITS


def seal_manifest(manifest: Manifest) -> bytes:
    """Raises: LimitError if no reader would take it: the places of the blobs have made it longer."""
    data = encode_manifest(manifest)
    if len(data) > MANIFEST_BYTES_MAX:
        raise LimitError(
            f"version {manifest.version}: with the places of its {len(manifest.blobs)} blobs the manifest "
            f"has {len(data)} bytes, at most {MANIFEST_BYTES_MAX} can be read: send fewer and larger blobs "
            "(publish.segment_bytes_max)"
        )
    return seal(data)


def read_manifest(store: Store, name: str) -> Manifest:
    """Raises: ManifestError if the object is torn or rotten, StoreMissingError."""
    where = f"object {name}"
    data = unseal(store.read(name, num_bytes=MANIFEST_BYTES_MAX + SEAL_BYTES + 1))
    if data is None or len(data) > MANIFEST_BYTES_MAX:
        raise ManifestError(f"{where}: its checksum differs; it is torn or rotten")
    return decode_manifest(data, where=where)


def create_manifest(store: Store, ordinal: int, manifest: Manifest) -> None:
    """Durable when this returns. Raises: ConflictError if another version has the ordinal, LimitError."""
    name, sealed = ordinal_name(MANIFESTS, ordinal), seal_manifest(manifest)
    try:
        store.create(name, sealed)
    except StoreExistsError as error:
        # An earlier try created it and failed right after, so nothing here knows of it yet.
        if without_places(read_manifest(store, name)) != without_places(manifest):
            raise ConflictError(
                f"version {manifest.version}: ordinal {ordinal} holds another version: "
                "another process coordinates this log too. Stop one of them."
            ) from error
        store.replace(name, sealed)


def made_for(store: Store) -> int:
    """How many shards share the log. Raises: StoreMissingError if there is no log, LogError."""
    found = store.read(SHARDS, num_bytes=64).rstrip(b"\n")
    if not found.isdigit():
        raise LogError(f"object {SHARDS}: expected a number, found {found[:40]!r}")
    return int(found)


def check_num_shards(store: Store, num_shards: int) -> None:
    """Rows lie with the shard that owns them, so a log keeps the number of shards it was made with.

    Raises: LogError if it was made for another number.
    """
    try:
        # Read first: a shard must be able to start on a full disk, and creating takes room.
        found = made_for(store)
    except StoreMissingError:
        try:
            store.create(SHARDS, f"{num_shards}\n".encode())
            return
        except StoreExistsError:
            found = made_for(store)
    if found != num_shards:
        raise LogError(
            f"this log was made for {found} shards, not for {num_shards}: begin a new log and "
            "publish a full version there"
        )


def read_blob_of(store: Store, version: Version, blob: BlobRef) -> tuple[bytes | memoryview | None, str]:
    """The bytes of a blob that a manifest names, checked, and "" or what is wrong with them."""
    if blob.kind not in SHARED_KINDS:
        return read_record(store, version, blob)
    try:
        data = store.read(CONTENT + blob.name, num_bytes=blob.num_bytes + 1)
    except StoreMissingError:
        return None, f"blob '{blob.name}': the object is missing"
    if len(data) != blob.num_bytes or crc32c(data) != blob.crc32c:
        return None, (
            f"blob '{blob.name}': expected {blob.num_bytes} bytes with CRC32C {blob.crc32c:08x}, "
            f"found {len(data)} with {crc32c(data):08x}"
        )
    return data, ""


def read_named_blob(
    store: Store, manifest: Manifest, name: str, *, still_there: Callable[[Version], bool]
) -> bytes | memoryview:
    """The bytes of one blob of a version, checked.

    Args: still_there: whether the log has the version, asked anew when its blob cannot be read.
    Raises: LogDamageError if it is not what was committed, MissingBlobError if the version has no such blob
        or was dropped by retention meanwhile.
    """
    blob = next((one for one in manifest.blobs if one.name == name), None)
    if blob is None:
        raise MissingBlobError(f"version {manifest.version}: it has no blob '{name}'")
    data, problem = read_blob_of(store, manifest.version, blob)
    if data is not None:
        return data
    if not still_there(manifest.version):
        raise MissingBlobError(f"version {manifest.version}: {problem}; it is not in the log (any more)")
    raise LogDamageError(
        f"version {manifest.version}: {problem}. Publish a full version: it needs none of those before."
    )


def recover(store: Store, *, repair: bool) -> Recovered:
    """Read a log and, with `repair`, leave in it exactly the versions that are returned.

    Args: repair: only for the coordinating shard; without it nothing in the store changes, and what
        retention removes meanwhile is no damage.
    Raises: LogError if the store cannot be read or written.
    """
    damage: list[str] = []
    opened = read_opened(store, damage)
    found, unreadable = _read_all(store, MANIFESTS, damage)
    snapshots, bad_snapshots = _read_all(store, SNAPSHOTS, damage)
    checker = _Checker(store)
    kept: list[Entry] = []
    lost: list[int] = list(unreadable)
    dropped: list[int] = []
    for ordinal, manifest in found.items():
        notes: list[str] = []
        snapshot = _snapshot_of(manifest, snapshots.get(ordinal), checker, notes)
        problem = checker.problem(manifest)
        if (problem or notes) and not is_there(store, ordinal):
            # Beside a live coordinator: retention took it while it was read, and all before it.
            kept.clear()
            continue
        damage += notes
        if problem and snapshot is not None:
            damage.append(f"version {manifest.version}: {problem}; its snapshot stands in for it")
            manifest, problem = snapshot, ""
        entry = Entry(ordinal, manifest, snapshot)
        follows = bool(kept) and kept[-1].manifest.version == manifest.parent
        if not problem and (entry.base is not None or follows):
            kept.append(entry)
        elif problem:
            damage.append(f"version {manifest.version}: {problem}")
            lost.append(ordinal)
        elif not kept and not lost:
            dropped.append(ordinal)  # retention was interrupted: its full version is gone already
        else:
            damage.append(f"version {manifest.version}: its parent {manifest.parent} cannot be loaded")
            lost.append(ordinal)
    seen = [found[ordinal].version for ordinal in [*lost, *dropped] if ordinal in found]
    seen += [entry.manifest.version for entry in kept]
    opened = max([opened, *(Opened(version.generation) for version in seen)])
    if any(not kept or ordinal > kept[-1].ordinal for ordinal in lost):
        # A writer that went on with the old generation would use lost version numbers a second time.
        # Its name stays: it finds that nobody took over, and opens a generation anew.
        opened = Opened(opened.generation + 1, opened.writer)
        head = kept[-1].manifest.version if kept else None
        damage.append(f"the head fell back to {head}; writers need a generation from {opened.generation} on")
        if repair:
            write_opened(store, opened)
    if repair:
        stray = set(snapshots) - {entry.ordinal for entry in kept if entry.snapshot is not None}
        _repair(store, kept, lost=lost, dropped=dropped, snapshots=sorted({*stray, *bad_snapshots}))
        _put_segments_aside(store, checker.bad_segments, kept)
    return Recovered(entries=kept, opened=opened, damage=damage)


def is_there(store: Store, ordinal: int) -> bool:
    try:
        store.size(ordinal_name(MANIFESTS, ordinal))
    except StoreMissingError:
        return False
    return True


class _Checker:
    """Reads every record that a manifest names; a program that many versions name is read once."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._shared: dict[str, str] = {}
        self.bad_segments: set[str] = set()

    def problem(self, manifest: Manifest) -> str:
        """What is wrong with a version's blobs; "": nothing."""
        for blob in manifest.blobs:
            if blob.kind in SHARED_KINDS:
                if blob.name not in self._shared:
                    _, self._shared[blob.name] = read_blob_of(self._store, manifest.version, blob)
                problem = self._shared[blob.name]
            else:
                _, problem = read_blob_of(self._store, manifest.version, blob)
                if problem:
                    self.bad_segments.add(blob.segment)
            if problem:
                return problem
        return ""


def _read_all(store: Store, folder: str, damage: list[str]) -> tuple[dict[int, Manifest], list[int]]:
    """Manifests by ordinal, in order, and the ordinals of those that cannot be read."""
    found: dict[int, Manifest] = {}
    unreadable: list[int] = []
    for name in store.list(folder):
        text = name[len(folder) :]
        if not _is_ordinal(text):
            damage.append(f"object {name}: not the name of an ordinal; it is left alone")
            continue
        try:
            found[int(text)] = read_manifest(store, name)
        except StoreMissingError:
            continue  # retention took it since it was listed
        except ManifestError as error:
            damage.append(str(error))
            unreadable.append(int(text))
    return found, unreadable


def _snapshot_of(
    manifest: Manifest, snapshot: Manifest | None, checker: _Checker, damage: list[str]
) -> Manifest | None:
    """The snapshot at a version's ordinal, if it is that version's and whole."""
    if snapshot is None:
        return None
    problem = checker.problem(snapshot)
    if snapshot.version != manifest.version or snapshot.kind != "full":
        problem = f"it is {snapshot.kind} and of version {snapshot.version}"
    if problem:
        damage.append(f"snapshot of version {manifest.version}: {problem}")
        return None
    return snapshot


def _repair(
    store: Store, kept: list[Entry], *, lost: list[int], dropped: list[int], snapshots: list[int]
) -> None:
    for ordinal in lost:
        store.set_aside(ordinal_name(MANIFESTS, ordinal))
    for ordinal in dropped:
        store.delete(ordinal_name(MANIFESTS, ordinal))
    first = kept[0].ordinal if kept else 0
    for ordinal in snapshots:
        name = ordinal_name(SNAPSHOTS, ordinal)
        if ordinal < first:
            store.delete(name)  # retention was interrupted
        else:
            store.set_aside(name)


def _put_segments_aside(store: Store, bad: set[str], kept: list[Entry]) -> None:
    """Damaged segments that no whole version needs; the others stay until nothing names them."""
    named = named_segments(kept)
    for name in sorted(bad - named):
        try:
            store.set_aside(name)
        except StoreMissingError:
            continue  # that it is missing is the damage


def named_segments(entries: list[Entry]) -> set[str]:
    """Every segment that a version or snapshot needs."""
    manifests = [entry.manifest for entry in entries]
    manifests += [entry.snapshot for entry in entries if entry.snapshot is not None]
    return {blob.segment for manifest in manifests for blob in manifest.blobs if blob.segment}


def named_content(entries: list[Entry]) -> set[str]:
    """Every program and signature that a version needs."""
    return {blob.name for entry in entries for blob in entry.manifest.blobs if blob.kind in SHARED_KINDS}
