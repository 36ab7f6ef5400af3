"""A web server over a folder, with or without byte ranges and with the faults that servers have; a Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class WebServer(ThreadingHTTPServer):
    """Serves a folder. `faults` are used up one per GET of a shard: a status, "reset", "short" or seconds to wait.

    Without `ranges` it gives the whole file instead; with `refuses` it answers a range with that status. `sizes` is
    whether it says how large files are.
    """

    daemon_threads = True

    def __init__(self, folder: Path, ranges: bool = True, refuses: int = 0, sizes: bool = True) -> None:
        self.folder, self.ranges, self.refuses, self.sizes = folder, ranges, refuses, sizes
        self.faults, self.asked = [], []
        super().__init__(("127.0.0.1", 0), partial(_Handler, directory=str(folder)))
        threading.Thread(target=self.serve_forever, daemon=True).start()

    faults: list[Any]
    asked: list[tuple[str, str]]  # path and range of each GET

    @property
    def url(self) -> str:
        """Where the folder is."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(SimpleHTTPRequestHandler):
    server: WebServer

    def do_GET(self) -> None:
        """Answer with a range, the whole file, or the next fault."""
        wanted = self.headers.get("Range", "")
        self.server.asked.append((self.path, wanted))
        if self.path.startswith("/api/"):
            self._hub()
            return
        if wanted and self.server.refuses:
            self.send_error(self.server.refuses)
            return
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        fault = self.server.faults.pop(0) if self.server.faults else None
        if isinstance(fault, int):
            self.send_error(fault)
            return
        if isinstance(fault, float):
            time.sleep(fault)
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted) if self.server.ranges else None
        part = data[int(found[1]) : int(found[2]) + 1] if found else data
        self.send_response(206 if found else 200)
        if found:
            self.send_header("Content-Range", f"bytes {found[1]}-{found[2]}/{len(data)}")
        if self.server.sizes:
            self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if fault == "reset":
            self.connection.close()
        else:
            self.wfile.write(part[: len(part) // 2] if fault == "short" else part)
            if fault == "short":
                self.connection.close()

    def do_HEAD(self) -> None:
        """Say how large a file is, or not."""
        if self.server.sizes:
            super().do_HEAD()
        else:
            self.send_response(200)
            self.end_headers()

    def translate_path(self, path: str) -> str:
        """Where a file is; of the hub's too."""
        return super().translate_path(re.sub(r"^/datasets/\w+/\w+/resolve/main/", "/", path))

    def _hub(self) -> None:
        """What a hub says of the data set whose files these are (huggingface.co/docs/hub/api)."""
        tree = [
            {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": hashlib.sha1(p.read_bytes()).hexdigest()}
            for p in sorted(self.server.folder.iterdir())
        ]
        about = {"id": "films/own", "sha": "0" * 40, "siblings": [], "private": False, "tags": [], "downloads": 0}
        body = json.dumps(tree if "/tree/" in self.path else about).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""
