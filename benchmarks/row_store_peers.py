"""The contestants of benchmarks.row_store behind one small interface; all keep float32 rows by int64 key.

None of them writes a log or syncs: what is compared is reading and replacing rows in batches. Redis is a
process of its own behind a unix socket, RocksDB and LMDB are files; the others live in this process.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from param_server.manifest import Manifest, Version
from param_server.row_store import RowStore
from proto.row_segment import RowSegment

FILL_BLOCK = 1 << 14
REDIS_START_S = 10.0
LMDB_BYTES_MAX = 16 << 30

Keys = npt.NDArray[np.int64]
Rows = npt.NDArray[np.float32]


class Peer(Protocol):
    """Made empty, in a folder of its own; `fill` is called once, with distinct keys."""

    def fill(self, keys_N: Keys, rows_ND: Rows) -> None: ...
    def get(self, keys_N: Keys) -> Rows: ...
    def upsert(self, keys_N: Keys, rows_ND: Rows) -> None: ...
    def close(self) -> None: ...


class Ours:
    """param_server.RowStore, touched in this place alone. An upsert is a whole delta version."""

    def __init__(self, folder: Path) -> None:
        self._store = RowStore()

    def fill(self, keys_N: Keys, rows_ND: Rows) -> None:
        self._apply("full", keys_N, rows_ND)

    def get(self, keys_N: Keys) -> Rows:
        return self._store.gather({"rows": keys_N}).rows_ND["rows"]

    def upsert(self, keys_N: Keys, rows_ND: Rows) -> None:
        self._apply("delta", keys_N, rows_ND)

    def _apply(self, kind: str, keys_N: Keys, rows_ND: Rows) -> None:
        parent = self._store.version
        manifest = Manifest(
            version=Version(1, parent.sequence + 1 if parent else 1),
            parent=parent,
            kind="full" if kind == "full" else "delta",
            blobs=(),
            schema_hash="",
            watermark_ms=0,
            produced_ms_newest=0,
            created_ms=0,
        )
        segment = RowSegment("rows", keys_N, rows_ND, np.zeros(0, np.int64))
        self._store.switch(self._store.prepare(manifest, [segment]))

    def close(self) -> None:
        pass


class Take:
    """The bound: slots known beforehand, so that only the rows are moved."""

    def __init__(self, folder: Path) -> None:
        self._rows_CD: Rows = np.zeros((0, 0), np.float32)
        self._first_key = 0

    def fill(self, keys_N: Keys, rows_ND: Rows) -> None:
        self._slot_of_key = np.empty(int(keys_N.max()) + 1, np.int64)
        self._slot_of_key[keys_N] = np.arange(len(keys_N))
        self._rows_CD = rows_ND.copy()

    def get(self, keys_N: Keys) -> Rows:
        return np.take(self._rows_CD, self._slot_of_key[keys_N], axis=0)

    def upsert(self, keys_N: Keys, rows_ND: Rows) -> None:
        self._rows_CD[self._slot_of_key[keys_N]] = rows_ND

    def close(self) -> None:
        pass


class Faiss:
    """faiss.MapInt64ToInt64 for the slots, a numpy array for the rows."""

    def __init__(self, folder: Path) -> None:
        import faiss

        faiss.omp_set_num_threads(1)
        self._make = faiss.MapInt64ToInt64

    def fill(self, keys_N: Keys, rows_ND: Rows) -> None:
        self._map = self._make(1 << int(len(keys_N) * 5 // 4).bit_length())
        self._map.add(keys_N, np.arange(len(keys_N)))
        self._rows_CD = rows_ND.copy()

    def get(self, keys_N: Keys) -> Rows:
        rows_ND: Rows = np.take(self._rows_CD, self._map.lookup(keys_N), axis=0)
        return rows_ND

    def upsert(self, keys_N: Keys, rows_ND: Rows) -> None:
        self._rows_CD[self._map.lookup(keys_N)] = rows_ND

    def close(self) -> None:
        pass


class _ByBytes:
    """What the byte stores share: 8 bytes of key, the row's own bytes as the value."""

    _dim = 0

    def fill(self, keys_N: Keys, rows_ND: Rows) -> None:
        self._dim = rows_ND.shape[1]
        for start in range(0, len(keys_N), FILL_BLOCK):
            self.upsert(keys_N[start : start + FILL_BLOCK], rows_ND[start : start + FILL_BLOCK])

    def upsert(self, keys_N: Keys, rows_ND: Rows) -> None:
        raise NotImplementedError

    def _joined(self, values: list[bytes]) -> Rows:
        return np.frombuffer(b"".join(values), np.float32).reshape(-1, self._dim)


class Redis(_ByBytes):
    """A redis-server without persistence behind a unix socket; MGET and MSET."""

    def __init__(self, folder: Path) -> None:
        import redis

        socket = folder / "redis.sock"
        settings = ["--port", "0", "--unixsocket", str(socket), "--save", "", "--appendonly", "no"]
        self._server = subprocess.Popen(["redis-server", *settings], stdout=subprocess.DEVNULL, cwd=folder)
        self._client: Any = redis.Redis(unix_socket_path=str(socket))
        deadline = time.monotonic() + REDIS_START_S
        while not socket.exists() and self._server.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)

    def get(self, keys_N: Keys) -> Rows:
        return self._joined(self._client.mget(_key_bytes(keys_N)))

    def upsert(self, keys_N: Keys, rows_ND: Rows) -> None:
        self._client.mset(dict(zip(_key_bytes(keys_N), _row_bytes(rows_ND), strict=True)))

    def close(self) -> None:
        self._client.close()
        self._server.terminate()
        self._server.wait()


class RocksDb(_ByBytes):
    """rocksdict in raw mode, without the write-ahead log."""

    def __init__(self, folder: Path) -> None:
        # By name, since its stubs take the setting below for a method.
        rocksdict: Any = import_module("rocksdict")
        self._rocksdict = rocksdict
        self._store = rocksdict.Rdict(str(folder / "rocks"), rocksdict.Options(raw_mode=True))
        self._no_log = rocksdict.WriteOptions()
        self._no_log.disable_wal = True

    def get(self, keys_N: Keys) -> Rows:
        return self._joined(self._store[_key_bytes(keys_N)])

    def upsert(self, keys_N: Keys, rows_ND: Rows) -> None:
        batch = self._rocksdict.WriteBatch(raw_mode=True)
        for key, row in zip(_key_bytes(keys_N), _row_bytes(rows_ND), strict=True):
            batch.put(key, row)
        self._store.write(batch, self._no_log)

    def close(self) -> None:
        self._store.close()


class Lmdb(_ByBytes):
    """LMDB without syncing."""

    def __init__(self, folder: Path) -> None:
        import lmdb

        self._store: Any = lmdb.open(str(folder / "lmdb"), map_size=LMDB_BYTES_MAX, sync=False, writemap=True)

    def get(self, keys_N: Keys) -> Rows:
        with self._store.begin() as reading:
            return self._joined([reading.get(key) for key in _key_bytes(keys_N)])

    def upsert(self, keys_N: Keys, rows_ND: Rows) -> None:
        with self._store.begin(write=True) as writing, writing.cursor() as cursor:
            cursor.putmulti(list(zip(_key_bytes(keys_N), _row_bytes(rows_ND), strict=True)))

    def close(self) -> None:
        self._store.close()


def _key_bytes(keys_N: Keys) -> list[bytes]:
    joined = keys_N.tobytes()
    return [joined[start : start + 8] for start in range(0, len(joined), 8)]


def _row_bytes(rows_ND: Rows) -> list[bytes]:
    joined, width = np.ascontiguousarray(rows_ND).tobytes(), rows_ND.shape[1] * 4
    return [joined[start : start + width] for start in range(0, len(joined), width)]


PEERS: dict[str, Callable[[Path], Peer]] = {
    "take": Take,
    "faiss": Faiss,
    "lmdb": Lmdb,
    "rocksdict": RocksDb,
    "redis": Redis,
}


def why_absent(name: str) -> str | None:
    """None: the contestant can start."""
    if name != "take" and find_spec(name) is None:
        return f"package {name} is not installed (pip install .[bench])"
    if name == "redis" and shutil.which("redis-server") is None:
        return "no redis-server on this machine (Debian: apt-get install redis-server)"
    return None
