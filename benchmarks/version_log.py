"""Durable appends and recovery of the version log, beside a bare file and RocksDB.

python -m benchmarks.version_log [--quick] [--rounds N] [--folder DIR]

append: a version's rows as RowSegment blobs, already encoded, become durable: the log (`stage` and one
`sync`), a bare file (write, fdatasync) and RocksDB (one write batch of id -> row, synced write-ahead log, no
compression) get the same rows in turns. The bare file gets the very bytes that the log writes, headers
included. `ratio` is the median over the turns of their time over ours.
recovery: the log is opened, every record checked, and all rows of the head are loaded into a row store.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.report import in_turns, median_rate, rounded, say, say_json, say_skipped, say_table
from param_server.local_store import LocalStore
from param_server.log_records import record_header
from param_server.manifest import Manifest, Version, blob_ref
from param_server.shard import Shard
from param_server.staged_blobs import ArrivedBlob
from param_server.version_log import VersionLog
from proto.row_segment import RowSegment, encode, split
from proto.tensor_blob import crc32c

try:
    import rocksdict
except ImportError:
    rocksdict = None

DIM = 40
ROWS_PER_VERSION = 20_000
RECOVERY_ROWS, QUICK_RECOVERY_ROWS = 2_000_000, 200_000
GOALS = {"append_over_raw": 0.95, "append_over_rocksdb": 3.0, "recovery_m_rows_s": 1.5}

Ids = npt.NDArray[np.int64]
Rows = npt.NDArray[np.float32]


class Batch:
    """One version: its rows, and the blobs that carry them."""

    def __init__(
        self, generator: np.random.Generator, number: int, *, num_rows: int = ROWS_PER_VERSION
    ) -> None:
        self.version = Version(1, number)
        self.ids_N: Ids = generator.choice(1 << 40, num_rows, replace=False, shuffle=False)
        self.rows_ND: Rows = generator.standard_normal((num_rows, DIM), np.float32)
        whole = RowSegment("t", self.ids_N, self.rows_ND, np.zeros(0, np.int64))
        self.blobs = [
            (f"t-{part:05d}", encode(piece, row_format="float32"), len(piece))
            for part, piece in enumerate(split(whole, bytes_max=4 << 20))
        ]

        self.crc32c = {name: crc32c(data) for name, data, _ in self.blobs}

    def records(self) -> list[bytes]:
        """The bytes that the log writes for it."""
        return [
            record_header(self.version, name, data, data_crc32c=self.crc32c[name]) + data
            for name, data, _ in self.blobs
        ]


class OurLog:
    """What a publish costs."""

    def __init__(self, folder: Path) -> None:
        self.log = VersionLog(LocalStore(folder, owner="shard-0"))

    def append(self, batch: Batch) -> None:
        for name, data, _ in batch.blobs:
            # A blob comes from the network with its checksum, which has just been held against the data.
            self.log.stage(batch.version, kind="rows", name=name, data=data, data_crc32c=batch.crc32c[name])
        self.log.sync()

    def forget(self) -> None:
        """Outside of the clock: staged versions are bounded in number."""
        self.log._staging.forget(lambda version: True)

    def close(self) -> None:
        self.log.close()


class BareFile:
    """The disk itself; a new file begins as often as the log begins a segment."""

    def __init__(self, folder: Path, *, file_bytes_max: int = 64 << 20) -> None:
        self._folder = folder
        self._file_bytes_max = file_bytes_max
        self._number = 0
        self._num_bytes = file_bytes_max
        self._descriptor = -1

    def append(self, records: Sequence[bytes]) -> None:
        for record in records:
            if self._num_bytes >= self._file_bytes_max:
                self._begin()
            self._num_bytes += os.write(self._descriptor, record)
        os.fdatasync(self._descriptor)

    def _begin(self) -> None:
        self.close()
        self._number += 1
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        self._descriptor = os.open(self._folder / f"bare-{self._number}", flags, 0o600)
        self._num_bytes = 0

    def close(self) -> None:
        if self._descriptor >= 0:
            os.fdatasync(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1


class RocksDb:
    """One synced batch a version; keys as 8 bytes, rows as they are."""

    def __init__(self, folder: Path) -> None:
        options = rocksdict.Options(raw_mode=True)
        options.create_if_missing(True)
        options.set_compression_type(rocksdict.DBCompressionType.none())
        self._store = rocksdict.Rdict(str(folder / "rocksdb"), options)
        self._durable = rocksdict.WriteOptions()
        self._durable.sync = True

    def append(self, batch: Batch) -> None:
        writes = rocksdict.WriteBatch(raw_mode=True)
        keys = batch.ids_N.astype(">i8").tobytes()
        rows, width = batch.rows_ND.tobytes(), 4 * DIM
        for index in range(len(batch.ids_N)):
            writes.put(keys[8 * index : 8 * index + 8], rows[width * index : width * index + width])
        self._store.write(writes, self._durable)

    def close(self) -> None:
        self._store.close()


def measure_append(folder: Path, *, rounds: int, limit_s: float) -> list[dict[str, Any]]:
    """The log beside the bare file, then beside RocksDB, each pair in turns."""
    rows = []
    contestants: dict[str, Any] = {"bare file": BareFile(folder)}
    if rocksdict is None:
        say_skipped("rocksdb", "pip install rocksdict")
    else:
        contestants["rocksdb"] = RocksDb(folder)
    for name, theirs in contestants.items():
        ours = OurLog(folder / f"log-beside-{name.replace(' ', '-')}")
        generator = np.random.default_rng(1)
        numbers = iter(range(1, 1 << 30))

        def next_round(generator: Any = generator, numbers: Any = numbers, ours: OurLog = ours) -> list[Any]:
            ours.forget()
            batch = Batch(generator, next(numbers))
            return [(batch, batch.records())]

        def append_ours(call: Any, ours: OurLog = ours) -> None:
            ours.append(call[0])

        def append_theirs(call: Any, theirs: Any = theirs) -> None:
            theirs.append(call[1] if isinstance(theirs, BareFile) else call[0])

        seconds = in_turns(
            {"ours": append_ours, "theirs": append_theirs}, next_round, rounds=rounds, limit_s=limit_s
        )
        rates = {who: median_rate(taken, per_call=ROWS_PER_VERSION) for who, taken in seconds.items()}
        # A pair of one round met the same moment of the disk; the median of their ratios is what is promised.
        ratio = float(np.median(seconds["theirs"].sum(axis=1) / seconds["ours"].sum(axis=1)))
        rows.append(
            {
                "case": "append",
                "peer": name,
                "ours": rounded(rates["ours"]),
                "theirs": rounded(rates["theirs"]),
                "ratio": rounded(ratio),
                "rounds": len(seconds["ours"]),
            }
        )
        ours.close()
        theirs.close()
    return rows


def measure_recovery(folder: Path, *, num_rows: int, rounds: int) -> dict[str, Any]:
    """Open a log of one full version and deltas that change a tenth, and load the head's rows."""
    store = LocalStore(folder, owner="shard-0")
    shard = Shard(VersionLog(store))
    shard.open_generation(0)
    generator = np.random.default_rng(2)
    full = Batch(generator, 1, num_rows=num_rows)
    _commit(shard, full, kind="full")
    for number in range(2, 6):
        _commit(shard, Batch(generator, number, num_rows=num_rows // 40), kind="delta")
    num_held = shard.status().num_rows
    shard.log.close()
    num_read = num_rows + 4 * (num_rows // 40)
    rates = []
    for _ in range(rounds):
        start = time.perf_counter()
        opened = Shard(VersionLog(LocalStore(folder, owner="shard-0")))
        taken_s = time.perf_counter() - start
        if opened.status().num_rows != num_held:
            raise RuntimeError("recovery: the rows held are not the rows written; nothing is measured")
        opened.log.close()
        rates.append(num_read / taken_s / 1e6)
    return {"case": "recovery", "ours": rounded(float(np.median(rates))), "rounds": rounds, "rows": num_read}


def _commit(shard: Shard, batch: Batch, *, kind: Any) -> None:
    blobs = tuple(
        blob_ref("rows", name, data, table="t", num_rows=num_rows) for name, data, num_rows in batch.blobs
    )
    shard.publish([ArrivedBlob(batch.version, "rows", name, data) for name, data, _ in batch.blobs])
    shard.commit(
        Manifest(
            version=batch.version,
            parent=shard.log.head,
            kind=kind,
            blobs=blobs,
            schema_hash="",
            watermark_ms=0,
            produced_ms_newest=0,
            created_ms=0,
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few rounds, a small log to recover")
    parser.add_argument("--rounds", type=int, help="at most so many of each case")
    parser.add_argument("--folder", type=Path, help="on the disk that is measured (default: temporary)")
    options = parser.parse_args()
    rounds, limit_s = (20, 2.0) if options.quick else (400, 25.0)
    rounds = options.rounds or rounds
    say(f"M rows a second, dim {DIM}; append: {ROWS_PER_VERSION:,} rows a version, durable")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        rows = measure_append(folder, rounds=rounds, limit_s=limit_s)
        num_rows = QUICK_RECOVERY_ROWS if options.quick else RECOVERY_ROWS
        rows.append(measure_recovery(folder / "recovery", num_rows=num_rows, rounds=min(rounds, 5)))
    say_table(rows, ("case", "peer", "ours", "theirs", "ratio", "rounds", "rows"))
    say_json(
        "version_log", rows=rows, facts={"dim": DIM, "rows_per_version": ROWS_PER_VERSION, "goals": GOALS}
    )


if __name__ == "__main__":
    main()
