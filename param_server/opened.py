"""Who may write: the generation that was opened last, and the writer that opened it.

It is one small sealed object beside the manifests. The writer's name makes a lost answer harmless: who opens
a generation and does not hear of it finds its own name at the next look, and knows that nobody took over.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from param_server.errors import StoreMissingError
from param_server.sealed import seal, unseal
from param_server.stores import Store

GENERATION = "generation"
_BYTES_MAX = 128
_LINE = re.compile(rb"([0-9]{1,19}) ([A-Za-z0-9._-]{0,64})\n")
WRITER = re.compile(r"[A-Za-z0-9._-]{0,64}")


class Opened(NamedTuple):
    """Writers below the generation are fenced; so is every other writer of it."""

    generation: int
    writer: str = ""
    """Who opened it, or the one before it where recovery raised it; empty: no name is known."""


def read_opened(store: Store, damage: list[str]) -> Opened:
    """What was opened last; generation 0: nothing was, or `damage` says why it is not known."""
    try:
        data = store.read(GENERATION, num_bytes=_BYTES_MAX)
    except StoreMissingError:
        return Opened(0)
    found = _LINE.fullmatch(unseal(data) or b"")
    if found is None:
        damage.append(f"object {GENERATION}: torn or rotten, found {data[:40]!r}; the manifests decide")
        return Opened(0)
    return Opened(int(found[1]), found[2].decode())


def write_opened(store: Store, opened: Opened) -> None:
    """Durable when this returns. Only shard 0 writes it."""
    store.replace(GENERATION, seal(f"{opened.generation} {opened.writer}\n".encode()))
