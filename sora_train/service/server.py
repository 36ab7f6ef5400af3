"""The HTTP server of the service: time-outs, size limits, TLS, and a line printed when it is ready."""

from __future__ import annotations

import signal
import socket
import ssl
from dataclasses import dataclass
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from sora_train.core.cli import InputError

_HEAD_S = 10.0  # for a client to send the head of a request


@dataclass(frozen=True)
class Address:
    """Address that the service listens on, its TLS certificate, and the proxy in front of it."""

    host: str = "127.0.0.1"
    port: int = 0
    tls_certificate: str | None = None
    tls_key: str | None = None
    proxy: str | None = None  # address whose X-Forwarded-For header is trusted


def listening(at: Address) -> socket.socket:
    """Open a socket that listens at an address. Raises InputError if the address or the certificate can't be used."""
    if at.tls_certificate is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(at.tls_certificate, at.tls_key)
        except OSError as error:  # ssl.SSLError is an OSError
            raise InputError(f"tls_certificate={at.tls_certificate} and tls_key={at.tls_key}: {error}") from error
    try:
        family = socket.getaddrinfo(at.host, at.port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((at.host, at.port), family=family, backlog=2048)
    except OSError as error:
        said = error.strerror or error
        raise InputError(f"host={at.host} port={at.port}: {said}; another port= may be free") from error


class ImpatientProtocol(H11Protocol):
    """HTTP/1.1 that hangs up on clients that don't finish the head of a request in time."""

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._patience = self.loop.call_later(_HEAD_S, self._hang_up)

    def on_response_complete(self) -> None:
        """Begin to wait for the next request."""
        super().on_response_complete()
        self._patience.cancel()
        self._patience = self.loop.call_later(_HEAD_S, self._hang_up)

    def _hang_up(self) -> None:
        if (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing():
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._patience.cancel()
        super().connection_lost(exc)


def configuration(app: FastAPI, at: Address) -> uvicorn.Config:
    """The settings of the server."""
    return uvicorn.Config(
        app, host=at.host, port=at.port, http=ImpatientProtocol, ws="none", lifespan="off", log_level="warning",
        access_log=False, server_header=False, proxy_headers=at.proxy is not None, forwarded_allow_ips=at.proxy,
        timeout_keep_alive=5, limit_concurrency=512, h11_max_incomplete_event_size=32 << 10,
        ssl_certfile=at.tls_certificate, ssl_keyfile=at.tls_key,
    )  # fmt: skip


def serve_until_stopped(app: FastAPI, at: Address, listener: socket.socket, what: str) -> None:
    """Serve until SIGINT or SIGTERM. Prints `what` and the address when requests are accepted."""
    port = listener.getsockname()[1]

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                print(f"serving {what} at {'https' if at.tls_key else 'http'}://{at.host}:{port}/", flush=True)

    for stops in (signal.SIGINT, signal.SIGTERM):  # uvicorn ends at them, then raises them again: ignore that
        signal.signal(stops, lambda *_: None)
    Server(configuration(app, at)).run(sockets=[listener])
