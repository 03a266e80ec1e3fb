"""Ports of loopback for processes that a test starts, kills and starts again at the same address."""

from __future__ import annotations

import itertools
import os
import socket

FIRST_PORT, LAST_PORT = 10_000, 30_000
"""Below the system's range for outgoing connections: while a server is away, a client that tries again and
again could otherwise be given the server's own port, connect to itself and keep the server out."""

_offsets = itertools.count(os.getpid() * 37)


def free_port() -> int:
    """A port that nothing listens on at the moment."""
    while True:
        port = FIRST_PORT + next(_offsets) % (LAST_PORT - FIRST_PORT)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
