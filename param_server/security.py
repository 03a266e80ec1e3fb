"""Who may call: mutual TLS from PEM files and a bearer token, the same on every gRPC port.

Both are off only on loopback, with a warning. The files are read again at each new connection, so renewed
certificates need no restart of a server. A token arrives here as a value: only a __main__ reads its file
or the environment.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import grpc
import msgspec
import structlog

from param_server.errors import AccessError

log = structlog.get_logger()

TOKEN_CHARS_MIN = 16
TOKEN_CHARS_MAX = 4096
_HEADER = "authorization"


class ClientSecurity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a client (or a server, to its clients) proves who it is, and whom it believes.

    The three files belong together: mutual TLS. Whoever holds a certificate of the authority and the
    token is let in.
    """

    ca_file: str = ""
    """PEM: the authority whose certificates the other side must have; empty = no TLS."""
    cert_file: str = ""
    key_file: str = ""
    token: str = ""
    """Sent with each call, asked for by a server; empty = none."""

    def __post_init__(self) -> None:
        given = [bool(name) for name in (self.ca_file, self.cert_file, self.key_file)]
        if any(given) and not all(given):
            raise ValueError("TLS needs ca_file, cert_file and key_file together")
        if not self.token:
            return
        plain = self.token.isascii() and self.token.isprintable() and " " not in self.token
        if not plain or not TOKEN_CHARS_MIN <= len(self.token) <= TOKEN_CHARS_MAX:
            raise ValueError(
                f"a token has {TOKEN_CHARS_MIN}..{TOKEN_CHARS_MAX} visible ASCII characters without a space, "
                f"found {len(self.token)} characters"
            )

    @property
    def tls(self) -> bool:
        return bool(self.ca_file)

    def __repr__(self) -> str:
        """Without the token: this is what logs and tracebacks show."""
        token = "set" if self.token else "none"
        return f"ClientSecurity(ca_file={self.ca_file!r}, cert_file={self.cert_file!r}, token={token})"


ServerSecurity = ClientSecurity
"""A server's own certificate and key, the authority of its clients, and the token that it asks for."""

NO_SECURITY = ClientSecurity()


class Pem(NamedTuple):
    ca: bytes
    cert: bytes
    key: bytes


def read_pem(security: ClientSecurity) -> Pem:
    """Raises: AccessError naming the file that cannot be read or is not PEM."""
    contents = []
    for path in (security.ca_file, security.cert_file, security.key_file):
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise AccessError(f"TLS file {path}: {error.strerror or error}") from error
        if b"-----BEGIN " not in content:
            raise AccessError(f"TLS file {path}: it holds no PEM block")
        contents.append(content)
    return Pem(*contents)


def channel_credentials(security: ClientSecurity) -> grpc.ChannelCredentials:
    pem = read_pem(security)
    return grpc.ssl_channel_credentials(
        root_certificates=pem.ca, private_key=pem.key, certificate_chain=pem.cert
    )


def server_credentials(security: ServerSecurity) -> grpc.ServerCredentials:
    """Credentials that ask each client for a certificate and follow the files."""
    used = read_pem(security)

    def configuration(pem: Pem) -> Any:
        return grpc.ssl_server_certificate_configuration([(pem.key, pem.cert)], root_certificates=pem.ca)

    def fetch() -> Any:
        """What a new connection uses; None = what the one before used."""
        nonlocal used
        try:
            pem = read_pem(security)
        except AccessError as error:
            log.error("TLS files cannot be read, the old ones stay in use", reason=str(error))
            return None
        if pem == used:
            return None
        used = pem
        return configuration(pem)

    return grpc.dynamic_ssl_server_credentials(configuration(used), fetch, require_client_authentication=True)


class TokenCheck(grpc.ServerInterceptor):  # type: ignore[type-arg]
    """Refuses each call, of whatever service, that does not bring the token."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    def intercept_service(self, continuation: Callable[[Any], Any], handler_call_details: Any) -> Any:
        found = [value for key, value in handler_call_details.invocation_metadata if key == _HEADER]
        given = found[0] if len(found) == 1 else ""
        # In constant time: how long a wrong token takes says nothing about the right one.
        if hmac.compare_digest(given.encode() if isinstance(given, str) else given, self._expected):
            return continuation(handler_call_details)
        return grpc.stream_stream_rpc_method_handler(_refuse)


def _refuse(request_iterator: Any, context: grpc.ServicerContext) -> NoReturn:
    context.abort(grpc.StatusCode.UNAUTHENTICATED, "the bearer token is missing or wrong")
    raise AssertionError("abort returns never")


class _CallDetails(NamedTuple):
    method: str
    timeout: float | None
    metadata: Any
    credentials: Any
    wait_for_ready: bool | None
    compression: Any


class TokenSender(
    grpc.UnaryUnaryClientInterceptor,  # type: ignore[type-arg]
    grpc.UnaryStreamClientInterceptor,  # type: ignore[type-arg]
    grpc.StreamUnaryClientInterceptor,  # type: ignore[type-arg]
):
    """Adds the token to each call."""

    def __init__(self, token: str) -> None:
        self._value = f"Bearer {token}"

    def _details(self, details: Any) -> _CallDetails:
        return _CallDetails(
            method=details.method,
            timeout=details.timeout,
            metadata=[*(details.metadata or ()), (_HEADER, self._value)],
            credentials=details.credentials,
            wait_for_ready=details.wait_for_ready,
            compression=details.compression,
        )

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return continuation(self._details(client_call_details), request)

    def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return continuation(self._details(client_call_details), request)

    def intercept_stream_unary(
        self, continuation: Any, client_call_details: Any, request_iterator: Any
    ) -> Any:
        return continuation(self._details(client_call_details), request_iterator)
