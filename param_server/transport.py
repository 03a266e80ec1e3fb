"""gRPC as every part here uses it: limits, security, and errors that keep their meaning.

An exception of ours becomes a status code on the server and the same exception again in the client.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any, NoReturn

import grpc
import structlog

from param_server.errors import (
    AccessError,
    AddressError,
    BadBlobError,
    ConflictError,
    FencedError,
    GapError,
    LimitError,
    LogDamageError,
    LogError,
    ManifestError,
    MissingBlobError,
    ParamServerError,
    RequestError,
    UnavailableError,
    UnknownModelError,
)
from param_server.security import (
    NO_SECURITY,
    ClientSecurity,
    ServerSecurity,
    TokenCheck,
    TokenSender,
    channel_credentials,
    server_credentials,
)
from proto.tensor_blob import BlobError

log = structlog.get_logger()

PART_BYTES_MAX = 4 << 20
MESSAGE_BYTES_MAX = 8 << 20
"""Both ends refuse a longer message; gRPC's own default (4 MiB) has no room beside a whole part."""
ERROR_BYTES_MAX = 2_000
"""Of an error's text: a trailer has 8 KiB, and each byte beyond ASCII takes three there."""

CONNECTIONS_MAX = 1024
"""A server refuses further connections."""
CALLS_WAITING_MAX = 256
"""Calls that may wait for one of a server's threads; a further one is refused at once."""

_MESSAGE_LIMITS = [
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
]
CHANNEL_OPTIONS = [
    *_MESSAGE_LIMITS,
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # A peer that vanished without closing its connection is noticed within these two together.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
]
SERVER_OPTIONS = [
    *_MESSAGE_LIMITS,
    # With port sharing, which is gRPC's default, a second server would steal half of the requests.
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.max_allowed_incoming_connections", CONNECTIONS_MAX),
    ("grpc.max_metadata_size", 16 << 10),
]

# First match wins, so a subclass stands before its parent.
_CODES: list[tuple[type[ParamServerError], grpc.StatusCode]] = [
    (FencedError, grpc.StatusCode.ABORTED),
    (GapError, grpc.StatusCode.FAILED_PRECONDITION),
    (ConflictError, grpc.StatusCode.ALREADY_EXISTS),
    (MissingBlobError, grpc.StatusCode.NOT_FOUND),
    (UnknownModelError, grpc.StatusCode.NOT_FOUND),
    (AccessError, grpc.StatusCode.UNAUTHENTICATED),
    (BadBlobError, grpc.StatusCode.DATA_LOSS),
    (ManifestError, grpc.StatusCode.INVALID_ARGUMENT),
    (RequestError, grpc.StatusCode.INVALID_ARGUMENT),
    (LimitError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (LogDamageError, grpc.StatusCode.DATA_LOSS),
    (LogError, grpc.StatusCode.INTERNAL),
    (UnavailableError, grpc.StatusCode.UNAVAILABLE),
]
_ERROR_KEY = "freshet-error"
_ERRORS = {kind.__name__: kind for kind, _ in _CODES}
_NO_ANSWER = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED})


def check_address(address: str, *, security: ClientSecurity, token_needed: bool = False) -> bool:
    """Whether only this machine reaches the address.

    Raises: AddressError unless it is host:port; or if others reach it and TLS, or the token, is missing.
    """
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isascii() and port.isdigit() and int(port) <= 65535):
        raise AddressError(f"expected an address as host:port, found '{address}'")
    host = host.strip("[]")
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback and not (security.tls and (security.token or not token_needed)):
        missing = "a bearer token" if security.tls else "TLS"
        raise AddressError(
            f"address '{address}': without {missing} only loopback addresses (127.0.0.1, [::1], localhost) "
            "are allowed; give the TLS files and the token"
        )
    return loopback


def open_channel(address: str, security: ClientSecurity = NO_SECURITY) -> grpc.Channel:
    """A channel that connects when first used and again whenever the connection is lost.

    Raises: AddressError for an address that needs TLS, AccessError if a TLS file cannot be read.
    """
    check_address(address, security=security)
    if security.tls:
        channel = grpc.secure_channel(address, channel_credentials(security), options=CHANNEL_OPTIONS)
    else:
        channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
    return grpc.intercept_channel(channel, TokenSender(security.token)) if security.token else channel


def open_server(
    address: str, *, num_threads: int, security: ServerSecurity = NO_SECURITY
) -> tuple[grpc.Server, str]:
    """A server bound to the address (port 0: any free one) and the address it really has; not started.

    Raises: AddressError if the address may not be used or is taken, AccessError for the TLS files.
    """
    check_address(address, security=security, token_needed=True)
    if not (security.tls and security.token):
        missing = [name for name, there in (("TLS", security.tls), ("token", security.token)) if not there]
        log.warning("anyone on this machine can call this port", address=address, missing=missing)
    server = grpc.server(
        futures.ThreadPoolExecutor(max_workers=num_threads),
        options=SERVER_OPTIONS,
        interceptors=[TokenCheck(security.token)] if security.token else [],
        maximum_concurrent_rpcs=num_threads + CALLS_WAITING_MAX,
    )
    credentials = server_credentials(security) if security.tls else None
    try:
        if credentials is not None:
            port = server.add_secure_port(address, credentials)
        else:
            port = server.add_insecure_port(address)
    except RuntimeError as error:
        port = 0
        reason: Exception | None = error
    else:
        reason = None
    if not port:
        raise AddressError(
            f"address '{address}' cannot be bound; is another process listening there?"
        ) from reason
    return server, f"{address.rpartition(':')[0]}:{port}"


def abort(context: grpc.ServicerContext, error: ParamServerError) -> NoReturn:
    """End the call with the error's status code and message, cut to what a trailer can carry."""
    message, data = str(error), str(error).encode()
    if len(data) > ERROR_BYTES_MAX:
        start = data[:ERROR_BYTES_MAX].decode(errors="ignore")
        message = f"{start}... ({len(message) - len(start)} characters more)"
    for kind, code in _CODES:
        if isinstance(error, kind):
            context.set_trailing_metadata(((_ERROR_KEY, kind.__name__),))
            context.abort(code, message)
    context.abort(grpc.StatusCode.INTERNAL, message)
    raise AssertionError("abort returns never")


@contextmanager
def errors_as_status(context: grpc.ServicerContext) -> Iterator[None]:
    """Answer a call with the status of the ParamServerError, BlobError or OSError that it raises."""
    try:
        yield
    except ParamServerError as error:
        abort(context, error)
    except BlobError as error:
        abort(context, BadBlobError(str(error)))
    except OSError as error:
        abort(context, LogError(str(error)))


def translate(error: grpc.RpcError, *, where: str, timeout_s: float | None = None) -> ParamServerError:
    """The exception of ours that a failed call means; `where` names the other side.

    Args: timeout_s: how long the call was allowed to wait, for the message; None = not limited.
    """
    code = error.code()
    message = f"{where}: {error.details()}"
    trailing: Any = error.trailing_metadata()
    for key, value in trailing or ():
        if key == _ERROR_KEY and value in _ERRORS:
            return _ERRORS[value](message)
    if code in _NO_ANSWER:
        within = "" if timeout_s is None else f" within {timeout_s:g} s"
        return UnavailableError(
            f"{where} does not answer{within}; is it running, is the address right? ({error.details()})"
        )
    if code == grpc.StatusCode.UNIMPLEMENTED:
        return RequestError(
            f"{where}: another kind of server listens at this address: is it a replica's where a shard's is "
            f"needed, or a shard's where a replica's is? ({error.details()})"
        )
    if code == grpc.StatusCode.CANCELLED:
        return UnavailableError(f"{where}: {code.name.lower()}: {error.details()}")
    if code == grpc.StatusCode.UNAUTHENTICATED:
        return AccessError(message)
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return LimitError(message)
    if code == grpc.StatusCode.INVALID_ARGUMENT:
        return RequestError(message)
    return ParamServerError(f"{where}: {code.name.lower()}: {error.details()}")
