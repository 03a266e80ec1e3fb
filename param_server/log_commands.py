"""python -m param_server log: look into a version log, compare versions, check it, tidy it.

ls LOG_DIR             every version: kind, rows, deletes, bytes, when
show LOG_DIR V         one version: parent, blobs and where they lie
diff LOG_DIR V1 V2     by table: rows only in one, rows that differ, and the first ids of each
verify LOG_DIR         read every record; exit 1 and one line a damage if something is wrong
gc LOG_DIR             retention now, and what nothing names is removed; the shards must be stopped

All but gc only read, also while a shard runs. LOG_DIR is a folder or scheme://... (fsspec).
"""

from __future__ import annotations

import argparse
import datetime
import sys

import numpy as np

from param_server.errors import LogError, MissingBlobError, StoreMissingError
from param_server.log_order import chain_to
from param_server.log_recovery import Entry, made_for, read_blob_of, recover
from param_server.manifest import Manifest, Version
from param_server.store_opening import open_store
from param_server.stores import Store
from param_server.version_content import rows_of_chain
from param_server.version_log import VersionLog
from proto.row_segment import RowSegment

IDS_SHOWN = 5


def add_commands(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="log_command", required=True)
    for name, help_text in (
        ("ls", "every version in the log"),
        ("show", "one version"),
        ("diff", "what differs between two versions"),
        ("verify", "read every record and say what is damaged"),
        ("gc", "remove what retention and the manifests no longer need"),
    ):
        command = commands.add_parser(name, help=help_text)
        command.add_argument("log_dir", help="a folder, or scheme://... (fsspec)")
        if name == "show":
            command.add_argument("version", help="generation.sequence")
        if name == "diff":
            command.add_argument("old", help="generation.sequence")
            command.add_argument("new", help="generation.sequence")
        if name == "gc":
            command.add_argument(
                "--keep-full",
                type=int,
                default=2,
                help="full versions and snapshots kept (default: %(default)s)",
            )


def run(arguments: argparse.Namespace) -> int:
    """Returns: the exit code. Raises: ParamServerError."""
    store = open_store(arguments.log_dir)
    if arguments.log_command == "gc":
        return collect(
            arguments.log_dir, num_shards=_num_shards(store, arguments.log_dir), keep_full=arguments.keep_full
        )
    recovered = recover(store, repair=False)
    entries = recovered.entries
    if not entries and not recovered.damage:
        # Empty, or no log at all: a check that was aimed at the wrong folder must not stay green.
        _num_shards(store, arguments.log_dir)
    if arguments.log_command == "verify":
        return verify(entries, recovered.damage)
    for line in recovered.damage:
        sys.stderr.write(f"damage: {line}\n")
    if arguments.log_command == "ls":
        list_versions(entries)
    elif arguments.log_command == "show":
        show(find(entries, arguments.version))
    else:
        old, new = find(entries, arguments.old), find(entries, arguments.new)
        return 1 if diff(store, entries, old.manifest.version, new.manifest.version) else 0
    return 0


def list_versions(entries: list[Entry]) -> None:
    sys.stdout.write(f"{'version':<14}{'kind':<8}{'rows':>12}{'deletes':>10}{'bytes':>14}  made (UTC)\n")
    for entry in entries:
        manifest = entry.manifest
        notes = " snapshot" if entry.snapshot is not None and manifest.kind == "delta" else ""
        if manifest.rollback_of is not None:
            notes += f" rollback of {manifest.rollback_of}"
        sys.stdout.write(
            f"{manifest.version!s:<14}{manifest.kind:<8}{_num_rows(manifest):>12,}{_num_deletes(manifest):>10,}"
            f"{manifest.num_bytes:>14,}  {_time(manifest.created_ms)}{notes}\n"
        )


def show(entry: Entry) -> None:
    manifest = entry.manifest
    sys.stdout.write(
        f"version {manifest.version}, {manifest.kind}, ordinal {entry.ordinal}, "
        f"parent {manifest.parent}\n"
        f"made {_time(manifest.created_ms)}, watermark {_time(manifest.watermark_ms)}, "
        f"newest impression {_time(manifest.produced_ms_newest)}\n"
        f"schema {manifest.schema_hash or '-'}, rollback of {manifest.rollback_of or '-'}\n"
    )
    for title, described in (("", manifest), ("snapshot ", entry.snapshot)):
        for blob in described.blobs if described is not None else ():
            place = f"{blob.segment} at {blob.segment_offset}" if blob.segment else "content/"
            counts = f", {blob.num_rows} rows, {blob.num_deletes} deletes" if blob.kind == "rows" else ""
            table = f" table {blob.table} shard {blob.shard}" if blob.kind == "rows" else ""
            sys.stdout.write(
                f"  {title}{blob.kind} {blob.name}{table}: {blob.num_bytes} bytes{counts}, "
                f"CRC32C {blob.crc32c:08x}, {place}\n"
            )
    for one in manifest.positions:
        sys.stdout.write(f"  position {one.topic}/{one.partition} at {one.kafka_offset} row {one.row}\n")


def diff(store: Store, entries: list[Entry], old: Version, new: Version) -> bool:
    """Whether two versions differ, said table by table. Both are held in memory."""
    before, after = _content(store, entries, old), _content(store, entries, new)
    differs = False
    for name in sorted({*before, *after}):
        one, two = before.get(name, {}), after.get(name, {})
        gone = sorted(set(one) - set(two))
        added = sorted(set(two) - set(one))
        changed = sorted(key for key in set(one) & set(two) if one[key] != two[key])
        differs = differs or bool(gone or added or changed)
        sys.stdout.write(
            f"table {name}: {len(one)} rows in {old}, {len(two)} in {new}: {len(added)} added, "
            f"{len(changed)} changed, {len(gone)} gone\n"
        )
        for what, ids in (("added", added), ("changed", changed), ("gone", gone)):
            if ids:
                more = f" and {len(ids) - IDS_SHOWN} more" if len(ids) > IDS_SHOWN else ""
                sys.stdout.write(f"  {what}: {', '.join(map(str, ids[:IDS_SHOWN]))}{more}\n")
    models = [find(entries, str(version)).manifest for version in (old, new)]
    for kind in ("dense", "program", "signature"):
        first, second = (manifest.blob(kind) for manifest in models)
        same = (first and first.crc32c) == (second and second.crc32c)
        differs = differs or not same
        sys.stdout.write(f"{kind}: {'the same' if same else 'differs'}\n")
    return differs


def verify(entries: list[Entry], damage: list[str]) -> int:
    """Recovery has read every record already; this says what it found."""
    for line in damage:
        sys.stdout.write(f"damage: {line}\n")
    num_bytes = sum(entry.manifest.num_bytes for entry in entries)
    head = entries[-1].manifest.version if entries else None
    sys.stdout.write(f"{len(entries)} versions with {num_bytes:,} bytes are whole; the head is {head}\n")
    return 1 if damage else 0


def _num_shards(store: Store, log_dir: str) -> int:
    """Raises: LogError if there is no log."""
    try:
        return made_for(store)
    except StoreMissingError as error:
        raise LogError(
            f"{log_dir}: holds no version log; name the folder that the shards have as --log-dir"
        ) from error


def collect(log_dir: str, *, num_shards: int, keep_full: int) -> int:
    """Each shard's segments are its own, so the log is opened as every shard in turn."""
    dropped: list[str] = []
    for shard in range(num_shards):
        store = open_store(log_dir, owner=f"shard-{shard}")
        version_log = VersionLog(store, shard=shard, num_shards=num_shards, keep_full=keep_full)
        try:
            dropped += version_log.collect()
            num_versions = len(version_log.entries)
        finally:
            version_log.close()
    sys.stdout.write(f"{len(dropped)} segments removed; {num_versions} versions are left\n")
    return 0


def find(entries: list[Entry], text: str) -> Entry:
    """Raises: ManifestError for what is no version, MissingBlobError if the log does not have it."""
    version = Version.parse(text)
    for entry in entries:
        if entry.manifest.version == version:
            return entry
    span = f"{entries[0].manifest.version} to {entries[-1].manifest.version}" if entries else "nothing"
    raise MissingBlobError(f"version {version} is not in the log; it has {span}")


def _content(store: Store, entries: list[Entry], version: Version) -> dict[str, dict[int, bytes]]:
    def read(manifest: Manifest, name: str) -> bytes | memoryview:
        blob = next(one for one in manifest.blobs if one.name == name)
        data, problem = read_blob_of(store, manifest.version, blob)
        if data is None:
            raise MissingBlobError(f"version {manifest.version}: {problem}")
        return data

    tables: dict[str, dict[int, bytes]] = {}
    for segment in rows_of_chain(chain_to(entries, version), read):
        tables.setdefault(segment.table, {}).update(_rows_by_id(segment))
    return tables


def _rows_by_id(segment: RowSegment) -> dict[int, bytes]:
    rows_ND = np.ascontiguousarray(segment.rows_ND)
    return {key: row.tobytes() for key, row in zip(segment.ids_N.tolist(), rows_ND, strict=True)}


def _num_rows(manifest: Manifest) -> int:
    return sum(blob.num_rows for blob in manifest.rows_blobs)


def _num_deletes(manifest: Manifest) -> int:
    return sum(blob.num_deletes for blob in manifest.rows_blobs)


def _time(unix_ms: int) -> str:
    if not unix_ms:
        return "-"
    moment = datetime.datetime.fromtimestamp(unix_ms / 1000, datetime.UTC)
    return moment.strftime("%Y-%m-%d %H:%M:%S")
