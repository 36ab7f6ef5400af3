"""The service with a maker that needs no model, in this process or in one of its own that can be killed."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import uvicorn

from sora_train.core.cli import InputError
from sora_train.core.media import write_mp4
from sora_train.service.app import Terms, build_app
from sora_train.service.database import Database, Job
from sora_train.service.limits import Bounds
from sora_train.service.server import Address, configuration
from sora_train.service.worker import Cancelled, Watch, Worker

BOUNDS = Bounds(1 << 16, 1 << 20, 2.0)


class Painter:
    """Stands in for the model: a grey video after a while. `slow` seconds a job; the prompt "fail" fails."""

    def __init__(self, folder: Path, slow: float = 0.0) -> None:
        self.folder, self.slow, self.made = folder, slow, list[str]()

    def together(self, jobs: Sequence[Job], next: Job) -> bool:
        return True

    def make(self, watches: Sequence[Watch]) -> dict[str, str | Exception]:
        return {watch.job.id: self._one(watch) for watch in watches}

    def forget(self, job: Job) -> None:
        (self.folder / "outputs" / f"{job.id}.mp4").unlink(missing_ok=True)

    def _one(self, watch: Watch) -> str | Exception:
        prompt = json.loads(watch.job.request)["prompt"]
        if prompt == "fail":
            return InputError("it can't be")
        if prompt == "break":
            return ZeroDivisionError("a fault of ours")
        began = time.monotonic()
        while time.monotonic() < began + self.slow:  # which a test may end by setting it
            try:
                watch.progress(0.5)
            except Cancelled as error:
                return error
            time.sleep(0.02)
        name = f"{watch.job.id}.mp4"
        write_mp4(self.folder / "outputs" / name, np.full((4, 32, 32, 3), 100, dtype=np.uint8), 8)
        self.made.append(watch.job.id)
        return name


class Running:
    """A service that answers."""

    def __init__(
        self, folder: Path, slow: float = 0.0, bounds: Bounds = BOUNDS, batch: int = 2, most_waiting: int = 8
    ) -> None:
        for part in ("outputs", "uploads"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        self.database, self.painter = Database(folder / "service.sqlite"), Painter(folder, slow)
        self._worker = Worker(self.database, self.painter, batch, lambda: None)
        terms = Terms(4.0, 1.0, most_waiting=most_waiting, most_upload_bytes=3 << 20, contact="lab@example.org")
        app = build_app(folder, self.database, terms, bounds, self._worker.wake)
        self._server = uvicorn.Server(configuration(app, Address()))
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        self._worker.start()
        self.port: int = self._server.servers[0].sockets[0].getsockname()[1]

    def stop(self) -> None:
        self._worker.stop()
        self._server.should_exit = True
        self._thread.join(10)


if __name__ == "__main__":  # FOLDER SECONDS: serve until killed
    print(Running(Path(sys.argv[1]), float(sys.argv[2]), batch=1).port, flush=True)
    time.sleep(300)
