"""The order of versions, as pure functions: who may write, what may follow, what a reader must load."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import NoReturn

from param_server.errors import ConflictError, FencedError, GapError
from param_server.log_recovery import Entry
from param_server.manifest import Manifest, Version


def check_generation(version: Version, *, fenced_generation: int) -> None:
    """Raises: FencedError if a newer writer has taken over."""
    if version.generation < fenced_generation:
        raise FencedError(
            f"version {version}: generation {fenced_generation} has been opened, so generation "
            f"{version.generation} is fenced. Another trainer has taken over: stop this one."
        )


def check_follows(manifest: Manifest, *, head: Version | None) -> None:
    """Raises: GapError unless the version comes right after the head."""
    version = manifest.version
    if manifest.parent != head:
        raise GapError(
            f"version {version} follows {manifest.parent}, but the head is {head}. "
            "Publish a full version with the head as its parent."
        )
    if head is None:
        if manifest.kind != "full":
            raise GapError(f"version {version}: the first version of a log must be full")
    elif version.generation == head.generation and version.sequence != head.sequence + 1:
        raise GapError(f"version {version}: expected sequence {head.sequence + 1} after {head}")


def check_same_blob(committed: Manifest, name: str, *, num_bytes: int, crc32c: int) -> None:
    """Raises: ConflictError or GapError if a blob that comes again is not the one that was committed."""
    found = (num_bytes, crc32c)
    if not any((one.num_bytes, one.crc32c) == found for one in committed.blobs if one.name == name):
        raise_taken(committed, what=f"without such a blob '{name}'")


def raise_taken(committed: Manifest, *, what: str) -> NoReturn:
    """The number of a version that is to come is taken by other content."""
    if committed.rollback_of is not None:
        raise GapError(
            f"version {committed.version} is there already, made by a rollback to {committed.rollback_of}, "
            "so the head is not this version's parent. Open a new generation and publish a full version."
        )
    raise ConflictError(f"version {committed.version} is committed already, {what}")


def plan_after(
    entries: Sequence[Entry], by_version: Mapping[Version, Entry], held: Version | None
) -> list[Manifest]:
    """What a reader that holds `held` loads, in order; empty: it has nothing to do.

    The versions that follow `held`, or the newest full version or snapshot and what follows that, whichever
    is fewer bytes. A reader that is ahead of the head (the log lost its newest versions) waits.
    """
    if not entries or (held is not None and held >= entries[-1].manifest.version):
        return []
    known = None if held is None else by_version.get(held)
    start = 0 if known is None else index_after(entries, known)
    onward = [entry.manifest for entry in entries[start:]]
    # Not further back than `start`: what a reader holds already is never fewer bytes to load again.
    bases = (index for index in range(len(entries) - 1, start - 1, -1) if entries[index].base is not None)
    base = next(bases, None)
    if base is None:
        return onward
    first = entries[base].base
    assert first is not None
    anew = [first, *(entry.manifest for entry in entries[base + 1 :])]
    return anew if known is None or _num_bytes(anew) < _num_bytes(onward) else onward


def index_after(entries: Sequence[Entry], known: Entry) -> int:
    """Where the entry stands that follows `known`; ordinals may have holes."""
    return bisect_right(entries, known.ordinal, key=lambda entry: entry.ordinal)


def chain_to(entries: Sequence[Entry], version: Version) -> list[Manifest]:
    """The newest base at or before a version and every delta from there to it; its rows are their sum."""
    chain: list[Manifest] = []
    for entry in reversed([entry for entry in entries if entry.manifest.version <= version]):
        if entry.base is not None:
            return [entry.base, *reversed(chain)]
        chain.append(entry.manifest)
    raise AssertionError("the first version of a log has a base")


def num_dropped(entries: Sequence[Entry], *, keep_full: int, promoted: Version | None = None) -> int:
    """How many of the oldest versions retention drops: those before the keep_full-th newest base.

    The promoted version and the base that its chain begins with stay, and so does all after them.
    """
    bases = [index for index, entry in enumerate(entries) if entry.base is not None]
    if not bases:
        return 0
    first = bases[max(0, len(bases) - keep_full)]
    held = next((i for i, entry in enumerate(entries) if entry.manifest.version == promoted), None)
    if held is not None:
        first = min(first, max(index for index in bases if index <= held))
    return first


def _num_bytes(manifests: Sequence[Manifest]) -> int:
    return sum(manifest.num_bytes for manifest in manifests)
