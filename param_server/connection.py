"""One channel to one process of the parameter server, its errors in our words."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import grpc

from param_server.blob_parts import from_message
from param_server.manifest import Version
from param_server.security import NO_SECURITY, ClientSecurity
from param_server.transport import open_channel, translate


class Connection:
    """A channel to one process, its errors in our words; a context manager."""

    def __init__(
        self, address: str, *, name: str, timeout_s: float, security: ClientSecurity = NO_SECURITY
    ) -> None:
        self.where = f"{name} {address}"
        self._timeout_s = timeout_s
        self.channel = open_channel(address, security)

    def close(self) -> None:
        self.channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def call(self, method: Any, request: Any) -> Any:
        try:
            return method(request, timeout=self._timeout_s, wait_for_ready=True)
        except grpc.RpcError as error:
            raise translate(error, where=self.where, timeout_s=self._timeout_s) from error


def version_or_none(message: Any, field: str) -> Version | None:
    if not message.HasField(field):
        return None
    return from_message(getattr(message, field))
