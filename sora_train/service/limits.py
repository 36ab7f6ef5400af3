"""Limits and headers around every request: body size and time, addresses, rates, security headers, an audit log."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from sora_train.release.folder import append_line

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "media-src blob:; img-src 'self' blob:; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff", "referrer-policy": "no-referrer", "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin", "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()", "x-frame-options": "DENY",
}  # fmt: skip
CANT_WRITE = "the service can't write just now; try again later"
_TEXTS = {403: "not from this address", 408: "the body came too slowly", 413: "the body is too large",
          503: CANT_WRITE}  # fmt: skip
_log = logging.getLogger(__name__)
_MOST_BUCKETS = 10_000
_MOST_UNWRITTEN = 10_000


@dataclass(frozen=True)
class Bounds:
    """Bounds of a request's body and address."""

    json_bytes: int
    upload_bytes: int
    seconds: float  # in which the body must arrive
    allow: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...] = ()  # clients' networks; empty: all


class TooMuch(HTTPException):
    """A request beyond its bounds."""

    def __init__(self, status: int) -> None:
        super().__init__(status, _TEXTS[status], {"Connection": "close"})


class Rate:
    """Limits calls per minute by name: a token bucket for each name."""

    def __init__(self) -> None:
        self._buckets: dict[str, tuple[float, float]] = {}  # tokens left, and when they were counted
        self._lock = threading.Lock()

    def allows(self, name: str, per_minute: float) -> bool:
        """Take a token from a name's bucket; False if none is left."""
        now = time.monotonic()
        with self._lock:
            left, then = self._buckets.get(name, (per_minute, now))
            left = min(per_minute, left + (now - then) * per_minute / 60)
            if len(self._buckets) > _MOST_BUCKETS:
                self._buckets.clear()  # bounds the memory; most have refilled
            self._buckets[name] = (left - 1 if left >= 1 else left, now)
        return left >= 1


class Guarded:
    """ASGI middleware: enforces bounds, adds security headers, and writes the audit log."""

    def __init__(self, app: Callable[..., Awaitable[None]], bounds: Bounds, audit: Path, uploads: str) -> None:
        self.app, self.bounds, self.audit, self.uploads = app, bounds, audit, uploads
        self._unwritten: deque[dict[str, object]] = deque(maxlen=_MOST_UNWRITTEN)  # entries, while the disk is full

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = False
        entry: dict[str, object] = {
            "time": round(time.time(), 3), "address": (scope.get("client") or ("",))[0], "method": scope["method"],
            "path": scope["path"][:200], "status": 500,
        }  # fmt: skip
        facts: dict[str, object] = scope.setdefault("state", {}).setdefault("audit", {})

        async def sending(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun, entry["status"] = True, message["status"]
                kept = [(k, v) for k, v in message.get("headers", []) if k.decode("latin-1").lower() not in _HEADERS]
                message["headers"] = kept + [(k.encode(), v.encode()) for k, v in _HEADERS.items()]
                self._write(entry | facts)  # before the client gets the answer
            await send(message)

        try:
            if not self._may_come(scope):
                raise TooMuch(403)
            if scope["method"] != "GET" and not self._is_audited():
                raise TooMuch(503)  # nothing is changed without an audit entry
            await self.app(scope, self._bounded(scope, receive), sending)
        except TooMuch as error:
            if not begun:
                await JSONResponse({"detail": error.detail}, error.status_code, error.headers)(scope, receive, sending)
        finally:
            if not begun:
                self._write(entry | facts)

    def _write(self, entry: dict[str, object]) -> None:
        """Write the entry of an API request into the audit log; other requests aren't logged."""
        if str(entry["path"]).startswith("/api/"):
            self._unwritten.append(entry)
            self._is_audited()

    def _is_audited(self) -> bool:
        """Write the pending audit entries; False if that fails."""
        try:
            while self._unwritten:
                append_line(self.audit, self._unwritten[0])
                self._unwritten.popleft()
        except OSError as error:
            _log.error("%s can't be written: %s; %d entries wait", self.audit, error, len(self._unwritten))
            return False
        return True

    def _may_come(self, scope: Mapping[str, Any]) -> bool:
        if not self.bounds.allow:
            return True
        try:
            address = ipaddress.ip_address((scope.get("client") or ("",))[0])
        except ValueError:
            return False
        return any(address in network for network in self.bounds.allow)

    def _bounded(self, scope: Mapping[str, Any], receive: Receive) -> Receive:
        """Wrap `receive` so that it raises TooMuch for a body that is too large or too slow."""
        most = self.bounds.upload_bytes if scope["path"] == self.uploads else self.bounds.json_bytes
        said = next((v for k, v in scope["headers"] if k == b"content-length"), b"0")
        ends = time.monotonic() + self.bounds.seconds
        got, whole = 0, False

        async def receiving() -> Message:
            """Receive the next part of the body within its bounds."""
            nonlocal got, whole
            if not said.isdigit() or len(said) > 18 or int(said) > most:
                raise TooMuch(413)
            if whole:
                return await receive()  # waits for the end of the connection
            try:
                message = await asyncio.wait_for(receive(), max(0.0, ends - time.monotonic()))
            except TimeoutError as error:
                raise TooMuch(408) from error
            got += len(message.get("body", b""))
            whole = message["type"] != "http.request" or not message.get("more_body", False)
            if got > most:
                raise TooMuch(413)
            return message

        return receiving
