"""The command line's part of security: where the TLS files and tokens are."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from msgspec.structs import replace

from param_server.errors import AccessError
from param_server.security import ClientSecurity

TOKEN_VARIABLE = "FRESHET_TOKEN"
SHARD_TOKEN_VARIABLE = "FRESHET_SHARD_TOKEN"
TOKEN_FILE_BYTES_MAX = 8192


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tls-ca", default="", help="PEM of the authority that the other side must show")
    parser.add_argument("--tls-cert", default="", help="PEM of this side's certificate")
    parser.add_argument("--tls-key", default="", help="PEM of its key")
    parser.add_argument("--token-file", type=Path, help=f"bearer token; without it {TOKEN_VARIABLE} counts")


def add_shard_token(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shard-token-file",
        type=Path,
        help=f"the shard's token, where it differs; without it {SHARD_TOKEN_VARIABLE} counts",
    )


def read_security(arguments: argparse.Namespace, environ: Mapping[str, str]) -> ClientSecurity:
    """Raises: AccessError naming the file or variable that is wrong."""
    try:
        return ClientSecurity(
            ca_file=arguments.tls_ca,
            cert_file=arguments.tls_cert,
            key_file=arguments.tls_key,
            token=_token(arguments.token_file, environ.get(TOKEN_VARIABLE, "")),
        )
    except ValueError as error:
        raise AccessError(f"--tls-ca, --tls-cert, --tls-key, --token-file: {error}") from error


def read_shard_security(
    arguments: argparse.Namespace, environ: Mapping[str, str], *, own: ClientSecurity
) -> ClientSecurity:
    """A replica's own files, with the shard's token where it has one: who may ask may not publish."""
    try:
        token = _token(arguments.shard_token_file, environ.get(SHARD_TOKEN_VARIABLE, ""))
        return replace(own, token=token) if token else own
    except ValueError as error:
        raise AccessError(f"--shard-token-file: {error}") from error


def _token(path: Path | None, from_environment: str) -> str:
    if path is None:
        return from_environment.strip()
    try:
        with path.open("rb") as file:
            data = file.read(TOKEN_FILE_BYTES_MAX)
    except OSError as error:
        raise AccessError(f"token file {path}: {error.strerror or error}") from error
    token = data.decode("ascii", "replace").strip()
    if not token:
        raise AccessError(f"token file {path}: it is empty")
    return token
