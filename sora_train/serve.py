"""Serve a model to users with a key: an HTTP API, a persistent queue, and a small web page.

    python -m sora_train.serve run_dir=RUN [host=127.0.0.1] [port=8400] [tls_certificate=FILE tls_key=FILE]
        [folder=RUN/service] [most_seconds=10] [batch=4] [allow=[10.0.0.0/8]] [proxy=127.0.0.1] [keep_days=7]
        [release=FOLDER|off] [steps=20] [guidance=3] [height=32] [width=32]
    python -m sora_train.serve run_dir=RUN add=NAME [seconds_per_day=60] [requests_per_minute=120]
    python -m sora_train.serve run_dir=RUN revoke=NAME
    python -m sora_train.serve run_dir=RUN list=true

`add` creates a key and prints it; it can't be shown again. The page is at http://HOST:PORT/, the API's description at
/openapi.json. Guard, mark and signature are configured in the release folder; without one the service doesn't start,
unless release=off. For TLS, use a proxy, or tls_certificate and tls_key. See docs/release.md.
"""

from __future__ import annotations

import ipaddress
import logging
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path

from sora_train.core.cli import InputError, run
from sora_train.core.options import named, number, options
from sora_train.service.database import DAY, Database

OUTPUTS, UPLOADS = "outputs", "uploads"


@dataclass
class Options:
    """Command-line options; docs/release.md has a table of them."""

    run_dir: str
    folder: str | None = None  # of the service: database, outputs, records
    host: str = "127.0.0.1"
    port: int = number(8400, least=0, most=65535)
    tls_certificate: str | None = None
    tls_key: str | None = None
    most_seconds: float = number(10.0, above=0, most=3600)
    batch: int = number(4, least=1, most=64)  # jobs that are generated as one batch
    allow: list[str] = number([])  # networks; empty: all
    proxy: str | None = None  # address of the proxy whose X-Forwarded-For header is trusted
    keep_days: float = number(7.0, above=0)  # for videos, prompts and uploads
    most_upload: int = number(32 << 20, least=1)  # bytes
    release: str | None = None
    steps: int | None = number(None, least=1, most=10_000)
    guidance: float | None = number(None, least=0, most=1000)
    height: int | None = number(None, least=1, most=16384)
    width: int | None = number(None, least=1, most=16384)
    add: str | None = None
    revoke: str | None = None
    show: bool = named("list", False)
    seconds_per_day: float = number(60.0, least=0)
    requests_per_minute: int = number(120, least=1)


def main() -> int:
    """Serve, or create, revoke or list API keys."""
    o = options(Options, __doc__)
    if not Path(o.run_dir).is_dir():
        raise InputError(f"there is no folder {o.run_dir}")
    folder = Path(o.folder) if o.folder is not None else Path(o.run_dir) / "service"
    database = _opened(folder)
    if o.add is not None:
        if not o.add.isprintable() or not 1 <= len(o.add) <= 60:
            raise InputError(f"add={o.add!r} must be a name of 1 to 60 characters")
        print(database.add_key(o.add, o.seconds_per_day, o.requests_per_minute))
    elif o.revoke is not None:
        database.revoke(o.revoke)
        print(f"{o.revoke}: revoked")
    elif o.show:
        for key in database.all_keys():
            state = "revoked" if key.revoked else f"{database.used(key):g} of {key.seconds_per_day:g} seconds today"
            print(f"{key.name}: {state}")
    else:
        return _serve(o, folder, database)
    return 0


def _opened(folder: Path) -> Database:
    """Open the database in a service's folder; create both if missing. Raises InputError."""
    try:
        for part in (folder, folder / OUTPUTS, folder / UPLOADS):
            part.mkdir(parents=True, exist_ok=True)
            part.chmod(0o700)
        return Database(folder / "service.sqlite")
    except OSError as error:
        raise InputError(f"folder={folder} can't be used: {error.strerror or error}") from error
    except sqlite3.Error as error:
        raise InputError(f"{folder / 'service.sqlite'} can't be used: {error}") from error


def _serve(o: Options, folder: Path, database: Database) -> int:
    try:
        from sora_train.service.app import Terms, build_app
        from sora_train.service.limits import Bounds
        from sora_train.service.server import Address, listening, serve_until_stopped
    except ImportError as error:
        raise InputError(f"{error.name} isn't installed: pip install 'sora_train[serve]'") from error
    from sora_train.generation.options import Options as SampleOptions
    from sora_train.operations.lock import RunLock
    from sora_train.operations.source import Source
    from sora_train.release.chosen import safeguards_for
    from sora_train.release.folder import OFF, find
    from sora_train.service.studio import Studio
    from sora_train.service.worker import Worker

    release = find(o.release)
    if release is None and o.release != OFF:
        raise InputError("nothing guards, marks or signs: python -m sora_train.release init, or release=off")
    if (o.tls_certificate is None) != (o.tls_key is None):
        raise InputError("tls_certificate= and tls_key= go together")
    safeguards = safeguards_for(o.release, closed=True)
    bounds = Bounds(1 << 16, o.most_upload, 30.0, _networks(o.allow))
    lock = RunLock(folder)
    address = Address(o.host, o.port, o.tls_certificate, o.tls_key, o.proxy)
    listener = listening(address)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    sampling = SampleOptions(run_dir=o.run_dir, steps=o.steps, guidance=o.guidance, height=o.height, width=o.width)
    source = Source(sampling)
    data = source.config.data
    studio = Studio(source, safeguards, folder, o.most_seconds)
    worker = Worker(database, studio, o.batch, lambda: _remove_old(database, folder, o.keep_days))
    terms = Terms(
        o.most_seconds, min(data.max_frames / data.made_fps, o.most_seconds),
        contact="" if release is None else release.settings.contact, prompt_hash=safeguards.prompt_hash,
    )  # fmt: skip
    app = build_app(folder, database, terms, bounds, worker.wake)
    studio.open()
    worker.start()
    try:
        serve_until_stopped(app, address, listener, o.run_dir)
    finally:
        worker.stop()
        studio.close()
        lock.release()
    return 0


def _networks(texts: list[str]) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
    try:
        return tuple(ipaddress.ip_network(text) for text in texts)
    except ValueError as error:
        raise InputError(f"allow={texts}: {error}; give networks such as 10.0.0.0/8") from error


def _remove_old(database: Database, folder: Path, days: float) -> None:
    """Remove videos, prompts and uploads that are older than `keep_days`."""
    for name in database.expired(time.time() - days * DAY):
        (folder / UPLOADS / name).unlink(missing_ok=True)
        stem = name.rpartition(".")[0]
        for file in (folder / OUTPUTS).glob(f"{stem}*") if stem else ():
            file.unlink()


if __name__ == "__main__":
    run(main)
