"""gRPC as every part here uses it: limits, loopback only, and errors that keep their meaning.

An exception of ours becomes a status code on the server and the same exception again in the client.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any, NoReturn

import grpc

from param_server.errors import (
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
from proto.tensor_blob import BlobError

PART_BYTES_MAX = 4 << 20
MESSAGE_BYTES_MAX = 8 << 20
"""Both ends refuse a longer message; gRPC's own default (4 MiB) has no room beside a whole part."""

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
]

# First match wins, so a subclass stands before its parent.
_CODES: list[tuple[type[ParamServerError], grpc.StatusCode]] = [
    (FencedError, grpc.StatusCode.ABORTED),
    (GapError, grpc.StatusCode.FAILED_PRECONDITION),
    (ConflictError, grpc.StatusCode.ALREADY_EXISTS),
    (MissingBlobError, grpc.StatusCode.NOT_FOUND),
    (UnknownModelError, grpc.StatusCode.NOT_FOUND),
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


def check_loopback(address: str) -> None:
    """Raises: AddressError unless the address is host:port with a host that only this machine reaches."""
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isascii() and port.isdigit() and int(port) <= 65535):
        raise AddressError(f"expected an address as host:port, found '{address}'")
    host = host.strip("[]")
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise AddressError(
            f"address '{address}': connections are not encrypted yet, so only loopback addresses "
            "(127.0.0.1, [::1], localhost) are allowed"
        )


def open_channel(address: str) -> grpc.Channel:
    """A channel that connects when first used and again whenever the connection is lost."""
    check_loopback(address)
    return grpc.insecure_channel(address, options=CHANNEL_OPTIONS)


def open_server(address: str, *, num_threads: int) -> tuple[grpc.Server, str]:
    """A server bound to the address (port 0: any free one) and the address it really has; not started.

    Raises: AddressError if the address may not be used or is taken.
    """
    check_loopback(address)
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=num_threads), options=SERVER_OPTIONS)
    try:
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
    """End the call with the error's status code and message."""
    for kind, code in _CODES:
        if isinstance(error, kind):
            context.set_trailing_metadata(((_ERROR_KEY, kind.__name__),))
            context.abort(code, str(error))
    context.abort(grpc.StatusCode.INTERNAL, str(error))
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
    if code == grpc.StatusCode.CANCELLED:
        return UnavailableError(f"{where}: {code.name.lower()}: {error.details()}")
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return LimitError(message)
    if code == grpc.StatusCode.INVALID_ARGUMENT:
        return RequestError(message)
    return ParamServerError(f"{where}: {code.name.lower()}: {error.details()}")
