"""A server with OpenAI's chat interface that fails as servers do."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

GOOD = {
    "short": "Coloured discs drift over a soft field.",
    "medium": "Coloured discs drift slowly over a field of soft patches. The camera glides to one side.",
    "long": "Many coloured discs of several sizes lie over a field of soft, blurred patches. The camera glides evenly "
    "to one side, so that discs leave on one edge while others come in at the opposite one. The light is even.",
    "subject": "coloured discs", "camera": "glides to one side",
}  # fmt: skip


@dataclass
class Stub:
    """A server: `faults` are taken in turn by requests, one each; then, or for "ok", the answer is good."""

    faults: list[str] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)
    url: str = ""

    def answer(self, fault: str) -> tuple[int, bytes]:
        """Status and body of the answer to a request."""
        if fault.isdigit():
            return int(fault), b'{"error": "no"}'
        if fault == "html":
            return 200, b"<html>proxy</html>"
        if fault == "slow":
            time.sleep(1.5)
        content = {
            "refusal": "I'm sorry, but I can't help with that.",
            "loop": json.dumps({"long": "the same words again and " * 20}),
            "garbage": '{"short": "cut',
            "plain": "Coloured discs drift over a field of soft patches.",
            "opener": json.dumps({"short": "The video shows coloured discs that drift over a field."}),
        }.get(fault, json.dumps(GOOD))
        finish = "length" if fault == "length" else "stop"
        choice = {"message": {"role": "assistant", "content": content}, "finish_reason": finish}
        return 200, json.dumps({"choices": [choice]}).encode()


@contextmanager
def serve(faults: Sequence[str] = ()) -> Iterator[Stub]:
    """Run a stub while the block lasts."""
    stub = Stub(list(faults))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send(200, b'{"data": [{"id": "stub"}]}')

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with stub.lock:
                stub.requests.append(body)
                stub.keys.add(self.headers.get("Authorization", ""))
                fault = stub.faults.pop(0) if stub.faults else "ok"
            if fault == "drop":
                self.close_connection = True
                return
            self._send(*stub.answer(fault))

        def _send(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with suppress(BrokenPipeError):  # of a client that waited no longer
                self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    stub.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
