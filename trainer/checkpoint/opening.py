"""The checkpoint to go on from: the newest of which every byte is what its manifest says.

The ranks share the work, each reading every so many-th file, and agree on what they found.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import structlog

from trainer.checkpoint.agreement import Fault, agree_on
from trainer.checkpoint.folders import Folder, check_files, list_folders, parse_folder, read_manifest
from trainer.checkpoint.manifest import CheckpointManifest
from trainer.checkpoint.restore import SavedState
from trainer.checkpoint.store import Store
from trainer.collectives import Ranks
from trainer.errors import CheckpointError, DamagedError

log = structlog.get_logger()


def newest_whole(store: Store, *, ranks: Ranks) -> SavedState | None:
    """The checkpoint to go on from; None where there is none. Damaged newer ones are set aside. Collective.

    Raises: CheckpointError, on every rank, if there are checkpoints and not one of them is whole: then all
        stay where they are.
    """
    damaged: dict[str, str] = {}
    for name in reversed(_committed_folders(store, ranks)):
        folder = parse_folder(name)
        assert folder is not None
        manifest, fault = _check_share(store, folder, ranks=ranks)
        reasons = agree_on(ranks, fault)
        if reasons:
            damaged[name] = reasons[0]
            continue
        assert manifest is not None
        if ranks.rank == 0:
            _set_aside(store, damaged)
        return SavedState(store, folder, manifest)
    if damaged:
        raise CheckpointError(
            f"{store.root}: no checkpoint is whole: {'; '.join(damaged.values())}. "
            f"Restore one from a backup, or move what is damaged out of {store.root} to begin anew."
        )
    return None


def _committed_folders(store: Store, ranks: Ranks) -> list[str]:
    """As rank 0 sees them, from old to new. Collective."""
    names: list[str] = []
    fault = Fault()
    if ranks.rank == 0:
        try:
            listing = list_folders(store)
            names = [str(folder) for folder in listing.committed]
            if listing.unfinished:
                log.warning("passed over: without a manifest", folders=list(map(str, listing.unfinished)))
        except CheckpointError as error:
            fault = Fault(str(error), ends_run=True)
    agree_on(ranks, fault)
    return msgspec.json.decode(ranks.gather_bytes(msgspec.json.encode(names))[0], type=list[str])


def _check_share(store: Store, folder: Folder, *, ranks: Ranks) -> tuple[CheckpointManifest | None, Fault]:
    """The manifest and this rank's files. A store that fails ends the run: what it has may be whole."""
    try:
        manifest = read_manifest(store, folder)
        check_files(store, folder, manifest.files[ranks.rank :: ranks.world_size])
    except CheckpointError as error:
        return None, Fault(str(error), ends_run=not isinstance(error, DamagedError))
    return manifest, Fault()


def _set_aside(store: Store, damaged: Mapping[str, str]) -> None:
    for name, reason in damaged.items():
        log.warning("damaged checkpoint set aside", folder=name, reason=reason)
        try:
            store.set_aside(name, reason=reason)
        except CheckpointError as error:
            # The next start meets it again; this run's own checkpoints are newer.
            log.warning("damaged checkpoint stays in the way", folder=name, reason=str(error))
