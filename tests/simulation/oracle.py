"""The oracle: what every version contains, by plain arrays, and whether everybody keeps to it.

It learns a version's content from the trainer that proposes it, not from the log, and that a version exists
from the manifest that becomes visible on the disk. Legend: U ids of the universe, D the table's dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from feature_eviction import owner_of
from param_server.errors import ManifestError
from param_server.log_recovery import MANIFESTS
from param_server.manifest import Manifest, Version, decode_manifest, without_places
from param_server.opened import GENERATION
from param_server.replica import Replica
from param_server.shard import Shard
from tests.simulation.disk import SimulatedDisk
from tests.simulation.kernel import Kernel, ViolationError
from tests.simulation.models import answer
from tests.simulation.universe import DIM, TABLE, Keys, index_of, keys_of

Rows = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Content:
    """Which ids exist, and their rows; a row that does not exist is zero. And the model's answer to zeros."""

    present_U: Bools
    rows_UD: Rows
    answer: float | None = None
    """None: there is no model."""

    @classmethod
    def empty(cls, num_ids: int) -> Content:
        return cls(np.zeros(num_ids, np.bool_), np.zeros((num_ids, DIM), np.float32))

    def differing_U(self, other: Content) -> Bools:
        """Which ids are not bit for bit the same."""
        bits = self.rows_UD.view(np.uint32) != other.rows_UD.view(np.uint32)
        differing_U: Bools = (self.present_U != other.present_U) | bits.any(axis=1)
        return differing_U


@dataclass(frozen=True, slots=True, eq=False)
class Proposal:
    """What a trainer puts into a version."""

    full: bool
    keys_N: Keys
    rows_ND: Rows
    deleted_M: Keys
    answer: float | None

    def onto(self, parent: Content) -> Content:
        base = Content.empty(len(parent.present_U)) if self.full else parent
        present_U, rows_UD = base.present_U.copy(), base.rows_UD.copy()
        gone = index_of(self.deleted_M)
        present_U[gone], rows_UD[gone] = False, 0.0
        at = index_of(self.keys_N)
        present_U[at], rows_UD[at] = True, self.rows_ND
        return Content(present_U, rows_UD, self.answer)


class Oracle:
    """Holds every version's content; each check raises ViolationError."""

    def __init__(self, kernel: Kernel, disk: SimulatedDisk, *, num_ids: int) -> None:
        self.num_ids = num_ids
        self.keys_U = keys_of(num_ids)
        self.contents: dict[Version, Content] = {}
        self.manifests: dict[Version, Manifest] = {}
        self.acked: Version | None = None
        """The newest version that a trainer was told is durable; lower after rot was found and reported."""
        self.num_acked = 0
        self.num_checks = 0
        self._kernel = kernel
        self._disk = disk
        self._proposals: dict[tuple[Any, ...], Proposal] = {}
        self._opened = 0
        self._undone: set[Version] = set()
        self._answered: set[Version] = set()
        """Versions that a replica answered from."""
        disk.on_undo = self._on_undo
        disk.on_change = self._on_change

    def _on_undo(self, name: str, data: bytes) -> None:
        """A manifest that was never durable is gone: its number may come again, if nobody saw it."""
        if name.startswith(MANIFESTS):
            self._undone.add(decode_manifest(data[9:], where=name).version)

    def propose(self, manifest: Manifest, proposal: Proposal) -> None:
        """Before anything of the version is sent."""
        self._proposals[_identity(manifest)] = proposal

    def _on_change(self, name: str, data: bytes, durable: bool) -> None:
        if name == GENERATION and durable:
            self._opened = max(self._opened, int(data.split()[1]))
        elif name.startswith(MANIFESTS):
            self._committed(decode_manifest(data[9:], where=name))

    def _committed(self, manifest: Manifest) -> None:
        version = manifest.version
        before = self.manifests.get(version)
        if before is not None:
            same = without_places(before) == without_places(manifest)
            if not same and (version in self._answered or version not in self._undone):
                raise ViolationError(f"version {version} is committed a second time with another content")
            if same:
                return
        if version.generation < self._opened:
            raise ViolationError(
                f"version {version} is committed although generation {self._opened} has been opened"
            )
        if manifest.rollback_of is not None:
            content = self.contents[manifest.rollback_of]
        else:
            proposal = self._proposals.get(_identity(manifest))
            if proposal is None:
                raise ViolationError(f"version {version} is committed and nobody proposed it")
            parent = Content.empty(self.num_ids)
            if manifest.kind == "delta":
                assert manifest.parent is not None
                parent = self.contents[manifest.parent]
            content = proposal.onto(parent)
        self.manifests[version] = manifest
        self.contents[version] = content
        self._kernel.note(f"version {version} exists: {manifest.kind}, {int(content.present_U.sum())} rows")

    def note_acked(self, version: Version) -> None:
        if version not in self.contents:
            raise ViolationError(f"version {version} was acknowledged and does not exist")
        self.num_acked += 1
        if self.acked is None or version > self.acked:
            self.acked = version

    def check_recovered(self, shard: Shard) -> None:
        """Shard 0 has just started: nothing that was acknowledged is missing, unless rot was found."""
        head = shard.log.head
        if self.acked is not None and (head is None or head < self.acked):
            if not self._disk.num_flips or not (shard.log.damage or self._disk.num_aside):
                raise ViolationError(
                    f"version {self.acked} was acknowledged; after recovery the head is {head}, "
                    f"{self._disk.num_flips} bits had rotted, reported were {shard.log.damage}"
                )
            self.acked = head
        self.check_shard(shard)

    def check_shard(self, shard: Shard) -> None:
        """A shard's rows are the content of exactly its head, as far as they are its own."""
        self.num_checks += 1
        head = shard.log.head
        if head is None:
            return
        try:
            pulled = shard.pull(TABLE, self.keys_U)
        except ManifestError:
            expected = self.contents[head]
            if expected.present_U.any() and shard.num_shards == 1 and not self._disk.num_flips:
                raise ViolationError(f"shard {shard.log.shard} has no table at version {head}") from None
            return
        found = Content.empty(self.num_ids)
        at = index_of(pulled.segment.ids_N)
        found.present_U[at], found.rows_UD[at] = True, pulled.segment.rows_ND
        version = pulled.version
        # A shard that cannot read a version for rot answers from the one before, and says so.
        if version is None or version > head or (version < head and not self._disk.num_flips):
            raise ViolationError(f"shard {shard.log.shard} answers from {version}, its head is {head}")
        own_U = self.owners_U(shard.num_shards) == shard.log.shard
        self._compare(found, self.contents[version], own_U, f"shard {shard.log.shard} at version {version}")

    def owners_U(self, num_shards: int) -> npt.NDArray[Any]:
        return owner_of(self.keys_U, num_owners=num_shards)

    def check_replica(self, replica: Replica, *, name: str) -> None:
        """It answers from exactly one committed version, has its rows and no others, each in its own slot."""
        self.num_checks += 1
        found, version = self.replica_content(replica)
        if version is None:
            return
        if version not in self.contents:
            raise ViolationError(f"{name} answers from version {version}, which does not exist")
        self._answered.add(version)
        if found.answer != self.contents[version].answer:
            raise ViolationError(
                f"{name} at version {version}: the model answers {found.answer}, "
                f"the version's answers {self.contents[version].answer}"
            )
        everyone_U = np.ones(self.num_ids, np.bool_)
        self._compare(found, self.contents[version], everyone_U, f"{name} at version {version}")
        for table in replica.store._tables.values():
            _, slots_N = table.slots.items()
            if len(np.unique(slots_N)) != len(slots_N):
                raise ViolationError(f"{name} at version {version}: two ids share a row")
            if len(slots_N) != int(found.present_U.sum()):
                raise ViolationError(f"{name} at version {version}: it holds ids that nobody knows")

    def replica_content(self, replica: Replica) -> tuple[Content, Version | None]:
        gathered = replica.store.gather({TABLE: self.keys_U})
        rows_UD, present_U = gathered.rows_ND[TABLE], gathered.present_N[TABLE]
        if not rows_UD.shape[1]:
            rows_UD = np.zeros((self.num_ids, DIM), np.float32)
        model = gathered.model
        said = answer(model) if model is not None and model.signature is not None else None
        return Content(present_U, rows_UD, said), gathered.version

    def _compare(self, found: Content, expected: Content, of_U: Bools, where: str) -> None:
        wrong_U = found.differing_U(expected) & of_U
        if wrong_U.any():
            first = int(wrong_U.argmax())
            raise ViolationError(
                f"{where}: {int(wrong_U.sum())} ids differ; id {first}: "
                f"expected {_say(expected, first)}, found {_say(found, first)}"
            )


def _say(content: Content, index: int) -> str:
    return str(content.rows_UD[index].tolist()) if content.present_U[index] else "no row"


def _identity(manifest: Manifest) -> tuple[Any, ...]:
    """What tells two proposals of one number apart."""
    return (manifest.version, manifest.parent, *(blob.crc32c for blob in manifest.blobs))
