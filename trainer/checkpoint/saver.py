"""Checkpoints of a run: copied at a step boundary, written while training goes on, committed by one file.

A save goes through phases that all ranks pass at the same steps of training, as a version does:

  1. copy       every rank copies its state at one step boundary; training goes on
  2. write      every rank's writer thread encodes its files and makes them durable
  3. gather     when all files are there, rank 0 learns their sizes and CRCs
  4. manifest   rank 0's writer thread creates the manifest: now the checkpoint exists
  5. pointer    LATEST names it
  6. retention  older checkpoints go, and what dead writers left
  7. settle     every rank learns that it is durable

A crash before 4 leaves files that no manifest names, after it a whole checkpoint. A failure before 4 (the
disk is full, the store is gone) is counted, logged and forgotten: older checkpoints stay, the next interval
tries again. One checkpoint is on its way at a time; capture.py says what that takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from typing import Any

import msgspec
import numpy as np
import structlog

from param_server.client import BlobError
from trainer.checkpoint.agreement import Fault, agree_on, gather_faults
from trainer.checkpoint.capture import StateCopier, StateCopy, StatePart, files_of
from trainer.checkpoint.folders import LATEST, Folder, remove_checkpoint, retain
from trainer.checkpoint.lease import Lease, acquire_lease
from trainer.checkpoint.manifest import (
    MANIFEST,
    CheckpointManifest,
    FileEntry,
    encode_manifest,
    entry_of,
)
from trainer.checkpoint.opening import newest_whole
from trainer.checkpoint.progress import (
    Committed,
    Progress,
    RankPart,
    Restored,
    manifest_of,
    progress_of,
)
from trainer.checkpoint.restore import load
from trainer.checkpoint.store import Store, open_store
from trainer.collectives import Ranks
from trainer.config import Config
from trainer.errors import CheckpointError, LeaseLostError
from trainer.failpoints import reach
from trainer.recommender import Recommender
from trainer.stream.columns import Position

log = structlog.get_logger()


class SavePhase(Enum):
    IDLE = "idle"
    WRITING = "writing"
    COMMITTING = "committing"


@dataclass(slots=True)
class SaveTotals:
    """Over this process's life; the same on every rank."""

    committed: int = 0
    failed: int = 0
    last_failure: str = ""


@dataclass(frozen=True, slots=True)
class _OnItsWay:
    """The save between copy and settle."""

    folder: Folder
    progress: Progress
    positions: list[Position]
    slots_per_rank: dict[str, int]
    started_ms: int


def wall_clock_ms() -> int:
    return time.time_ns() // 1_000_000


class Checkpoints:
    """The checkpoint directory of a run. One a rank; its calls are collective."""

    def __init__(
        self, root: str, *, config: Config, ranks: Ranks, now_ms: Callable[[], int] = wall_clock_ms
    ) -> None:
        """Args: root: a local path or any fsspec address.

        Raises: CheckpointError, on every rank, if another trainer uses the directory or it cannot be used.
        """
        self._store: Store = open_store(root)
        self._config = config
        self._ranks = ranks
        self._now_ms = now_ms
        self._lease: Lease | None = None
        fault = Fault()
        if ranks.rank == 0:
            try:
                lease_s = config.checkpoint.lease_used_s
                self._lease = acquire_lease(self._store, lease_s=lease_s, now_ms=now_ms())
            except CheckpointError as error:
                fault = Fault(str(error), ends_run=True)
        agree_on(self._ranks, fault)
        mine = np.array([self._lease.generation if self._lease is not None else 0], np.int64)
        self._lease_generation = int(ranks.sum(mine)[0])
        self._num_saves = 0
        self._copier = StateCopier()
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._job: Future[Any] | None = None
        self._on_its_way: _OnItsWay | None = None
        self._saved: tuple[int, list[Position]] | None = None
        self.phase = SavePhase.IDLE
        self.totals = SaveTotals()

    @property
    def job_done(self) -> bool:
        """This rank has nothing left to do in the current phase."""
        return self._job is None or self._job.done()

    @property
    def job_failed(self) -> bool:
        return self._job is not None and self._job.done() and self._job.exception() is not None

    def begin(
        self,
        recommender: Recommender,
        *,
        parts: Mapping[str, StatePart],
        progress: Progress,
        positions: list[Position],
    ) -> bool:
        """Step 1, and the start of step 2; False, and nothing done, where nothing moved since the last save.

        Args: positions: of this rank's partitions.
        """
        assert self.phase is SavePhase.IDLE
        unmoved = self._saved == (progress.step, positions)
        if self._ranks.sum(np.array([not unmoved], np.int64))[0] == 0:
            if self._lease is not None:
                self._writer.submit(self._renew, self._lease)
            return False
        started_ms = self._now_ms()
        reach("checkpoint.before_copy")
        # 1. Copy.
        copy = self._copier.copy(recommender, parts=parts, with_dense=self._ranks.rank == 0)
        self._num_saves += 1
        self._on_its_way = _OnItsWay(
            folder=Folder(lease=self._lease_generation, save=self._num_saves, step=progress.step),
            progress=msgspec.structs.replace(progress, dead_letters=dict(progress.dead_letters)),
            positions=list(positions),
            slots_per_rank={name: shard.slots_per_rank for name, shard in recommender.shards.items()},
            started_ms=started_ms,
        )
        reach("checkpoint.after_copy")
        self._job = self._writer.submit(self._write, self._on_its_way.folder, copy)
        self.phase = SavePhase.WRITING
        return True

    def _renew(self, lease: Lease) -> None:
        """A stream without impressions is no reason to lose the directory."""
        try:
            lease.renew(now_ms=self._now_ms())
        except CheckpointError as error:
            # The next save meets the same trouble and deals with it.
            log.warning("checkpoint lease not renewed", reason=str(error))

    def _write(self, folder: Folder, copy: StateCopy) -> list[FileEntry]:
        """Step 2, in the writer thread."""
        if self._lease is not None:
            self._lease.renew(now_ms=self._now_ms())
        reach("checkpoint.before_write")
        # 2. Write.
        rank = self._ranks.rank
        entries = []
        try:
            for name, kind, table, data in files_of(
                copy, rank=rank, bytes_max=self._config.publish.segment_bytes_max
            ):
                self._store.write(f"{folder}/{name}", data, inside=f"checkpoint.inside_{kind}_file")
                entries.append(entry_of(name, data, kind=kind, table=table, rank=rank))
        except BlobError as error:
            raise CheckpointError(f"the state cannot be written: {error}") from error
        reach("checkpoint.after_write")
        return entries

    def advance(self, *, all_done: bool, any_failed: bool) -> Committed | None:
        """Move to the next phase if every rank can. Collective: all ranks pass the same flags.

        Returns: the checkpoint, once it is durable.
        Raises: LeaseLostError if another run has taken the directory over; CheckpointError on other ranks.
        """
        if self.phase is SavePhase.IDLE or not all_done:
            return None
        if any_failed:
            self._abandon()
            return None
        if self.phase is SavePhase.WRITING:
            self._begin_commit()
            return None
        return self._settle()

    def _begin_commit(self) -> None:
        """Step 3, and the start of step 4."""
        way = self._on_its_way
        assert way is not None
        assert self._job is not None
        part = RankPart(
            files=self._job.result(), positions=way.positions, dead_letters=way.progress.dead_letters
        )
        self._job = None
        reach("checkpoint.before_gather")
        # 3. Gather.
        gathered = self._ranks.gather_bytes(msgspec.json.encode(part))
        reach("checkpoint.after_gather")
        if self._lease is not None:
            manifest = manifest_of(
                way.progress,
                [msgspec.json.decode(data, type=RankPart) for data in gathered],
                config=self._config,
                slots_per_rank=way.slots_per_rank,
                created_ms=way.started_ms,
            )
            self._job = self._writer.submit(self._commit, way.folder, manifest, self._lease)
        self.phase = SavePhase.COMMITTING

    def _commit(self, folder: Folder, manifest: CheckpointManifest, lease: Lease) -> None:
        """Steps 4 to 6, in rank 0's writer thread."""
        reach("checkpoint.before_manifest")
        lease.check()
        # 4. Manifest: the commit.
        try:
            self._store.create(
                f"{folder}/{MANIFEST}", encode_manifest(manifest), inside="checkpoint.inside_manifest"
            )
        except FileExistsError as error:
            raise CheckpointError(f"{self._store.root}/{folder}: has a manifest already") from error
        reach("checkpoint.after_manifest")
        try:
            # 5. Pointer.
            self._store.write(LATEST, str(folder).encode(), inside="checkpoint.inside_pointer")
            reach("checkpoint.after_pointer")
            # 6. Retention.
            settings = self._config.checkpoint
            retain(
                self._store,
                folder,
                keep=settings.keep,
                keep_s=settings.keep_s,
                keep_max=settings.keep_max,
                now_ms=self._now_ms(),
            )
            reach("checkpoint.after_retention")
        except CheckpointError as error:
            # The checkpoint stands; the next one tidies up.
            log.warning("old checkpoints not removed", reason=str(error))

    def _settle(self) -> Committed:
        """Step 7."""
        way = self._on_its_way
        assert way is not None
        self._saved = (way.progress.step, way.positions)
        self.totals.committed += 1
        self._job = self._on_its_way = None
        self.phase = SavePhase.IDLE
        return Committed(
            name=str(way.folder),
            step=way.progress.step,
            positions=way.positions,
            seconds=(self._now_ms() - way.started_ms) / 1000,
        )

    def _abandon(self) -> None:
        """A rank could not do its part: the save is given up and what it wrote removed, where possible."""
        way, error = self._on_its_way, self._job.exception() if self._job is not None else None
        assert way is not None
        self._job = self._on_its_way = None
        self.phase = SavePhase.IDLE
        self.totals.failed += 1
        fault = Fault(str(error) or type(error).__name__ if error is not None else "")
        if isinstance(error, LeaseLostError) or not isinstance(error, CheckpointError | None):
            # Another run has taken over, or it is a fault of this program: no reason to go on.
            fault.ends_run = True
            gather_faults(self._ranks, fault)
            raise error
        self.totals.last_failure = "; ".join(agree_on(self._ranks, fault))
        if self._ranks.rank == 0:
            log.warning(
                "checkpoint not saved; older ones stay, the next interval tries again",
                step=way.progress.step,
                reason=self.totals.last_failure,
            )
            self._writer.submit(self._remove_leftovers, way.folder)

    def _remove_leftovers(self, folder: Folder) -> None:
        try:
            remove_checkpoint(self._store, str(folder))
        except CheckpointError as error:
            # Retention removes them once a save succeeds.
            log.warning("unfinished checkpoint not removed", reason=str(error))

    def finish(self, flags: Callable[[], tuple[bool, bool]]) -> Committed | None:
        """Bring the save on its way to its end; None where there was none or it failed. Collective.

        Args: flags: (all ranks done, any rank failed), agreed between ranks.
        """
        committed = None
        while self.phase is not SavePhase.IDLE:
            if self._job is not None:
                self._job.exception()  # waits
            all_done, any_failed = flags()
            committed = self.advance(all_done=all_done, any_failed=any_failed)
        return committed

    def save(
        self,
        recommender: Recommender,
        *,
        parts: Mapping[str, StatePart],
        progress: Progress,
        positions: list[Position],
    ) -> Committed | None:
        """A save that must succeed, to its end: the last one of a run. Collective.

        Returns: the checkpoint; None if the one before holds all this.
        Raises: CheckpointError, on every rank, if it could not be saved.
        """
        earlier = self.finish(self._flags)
        if not self.begin(recommender, parts=parts, progress=progress, positions=positions):
            return earlier
        committed = self.finish(self._flags)
        if committed is None:
            raise CheckpointError(
                f"{self._store.root}: the state of step {progress.step} could not be saved: "
                f"{self.totals.last_failure}. Older checkpoints are untouched; mend this and start again"
            )
        return committed

    def _flags(self) -> tuple[bool, bool]:
        sums = self._ranks.sum(np.array([not self.job_done, self.job_failed], np.int64))
        return sums[0] == 0, sums[1] > 0

    def restore(self, recommender: Recommender, *, parts: Mapping[str, StatePart]) -> Restored | None:
        """Load the newest whole checkpoint into a fresh recommender; None where there is none.

        Raises: CheckpointError, on every rank, if none is whole or it was made under another schema.
        """
        saved = newest_whole(self._store, ranks=self._ranks)
        if saved is None:
            return None
        fault = Fault()
        try:
            load(saved, recommender, parts=parts, config=self._config, ranks=self._ranks)
        except CheckpointError as error:
            fault = Fault(str(error), ends_run=True)
        agree_on(self._ranks, fault)
        return Restored(
            name=str(saved.folder),
            progress=progress_of(saved.manifest, rank=self._ranks.rank),
            positions=saved.manifest.positions,
        )

    def close(self) -> None:
        """Wait for the writer and give the lease back."""
        self._writer.shutdown(wait=True)
        if self._lease is None:
            return
        try:
            self._lease.release(now_ms=self._now_ms())
        except CheckpointError as error:
            log.warning("checkpoint lease not given back", reason=str(error))
