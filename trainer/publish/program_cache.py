"""Keeps the exported program in a file of the run: exporting takes seconds, at each start the same ones.

The file says what its program was made of and has a checksum. A file that is damaged, or of another model,
schema or library, is made anew.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import msgspec
import structlog

from param_server.client import crc32c
from trainer.config import Config
from trainer.model.registry import is_outside
from trainer.publish.program import export_program
from trainer.recommender import Recommender

log = structlog.get_logger()

PROGRAM_FILE = "program.cache"
"""Its name in the run directory."""
FORMAT = 1
HEADER_BYTES_MAX = 512


class _Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The first line of the file, as JSON; the program follows it."""

    format: int
    key: str
    num_bytes: int
    crc32c: int


def program_key(config: Config, *, embedding_width: int) -> str:
    """All that the bytes of the program depend on, digested."""
    made_of = (
        config.schema.hash(),
        # What only says how to train leaves the program as it is.
        msgspec.structs.replace(config.model, compile=False, l2=0.0),
        len(config.schema.tasks),
        embedding_width,
        [version(library) for library in ("torch", "onnx", "onnxscript")],
    )
    return hashlib.sha256(msgspec.json.encode(made_of, order="deterministic")).hexdigest()


def program_of(recommender: Recommender, *, config: Config, path: Path | None) -> bytes:
    """The dense model's program. Args: path: where it is kept; None = nowhere.

    A model from outside this package is exported at every start: its code may have changed meanwhile, and the
    key would not tell.
    Raises: OSError if the file cannot be read or written.
    """
    width = recommender.layout.width

    def export() -> bytes:
        return export_program(recommender.dense, embedding_width=width)

    if path is None or is_outside(config.model.name):
        return export()
    return cached_program(path, key=program_key(config, embedding_width=width), export=export)


def cached_program(path: Path, *, key: str, export: Callable[[], bytes]) -> bytes:
    """The program of that key: from the file, or exported and written there.

    Raises: OSError if the file cannot be read or written.
    """
    program = _read(path, key=key)
    if program is None:
        program = export()
        header = _Header(format=FORMAT, key=key, num_bytes=len(program), crc32c=crc32c(program))
        temporary = path.with_suffix(".tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(msgspec.json.encode(header) + b"\n" + program)
        os.replace(temporary, path)
    return program


def _read(path: Path, *, key: str) -> bytes | None:
    """None where there is no whole program of that key."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    line, _, program = data.partition(b"\n") if b"\n" in data[:HEADER_BYTES_MAX] else (b"", b"", b"")
    try:
        header = msgspec.json.decode(line, type=_Header)
    except msgspec.MsgspecError as error:
        log.warning("the cached program is damaged and made anew", file=str(path), found=str(error))
        return None
    if (header.format, header.key) != (FORMAT, key):
        log.info("the cached program is of another model and made anew", file=str(path))
        return None
    if (header.num_bytes, header.crc32c) != (len(program), crc32c(program)):
        log.warning("the cached program is damaged and made anew", file=str(path), found="wrong checksum")
        return None
    return program
