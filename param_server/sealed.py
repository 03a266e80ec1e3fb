"""Small objects of the log under their checksum: the CRC32C in eight hex digits, a newline, the content."""

from __future__ import annotations

from proto.tensor_blob import crc32c

SEAL_BYTES = 9


def seal(content: bytes) -> bytes:
    """The content as `unseal` takes it back."""
    return b"%08x\n" % crc32c(content) + content


def unseal(sealed: bytes) -> bytes | None:
    """The content; None if it is torn or rotten."""
    content = sealed[SEAL_BYTES:]
    return content if sealed[:SEAL_BYTES] == b"%08x\n" % crc32c(content) else None
