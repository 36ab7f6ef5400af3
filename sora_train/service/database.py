"""The service's SQLite database: keys of users, jobs and uploads. An accepted job survives a kill."""

from __future__ import annotations

import hashlib
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sora_train.core.cli import InputError

QUEUED, RUNNING, DONE, FAILED, REFUSED, CANCELLED = "queued", "running", "done", "failed", "refused", "cancelled"
ENDED = (DONE, FAILED, REFUSED, CANCELLED)
ATTEMPTS = 3  # starts of a job: one that crashes the service must not do so again and again
DAY = 86400.0
_PREFIX = "sora_"
_WAIT_S = 20.0  # for another writer
_SCHEMA = """
CREATE TABLE IF NOT EXISTS keys (
    name TEXT PRIMARY KEY, hash TEXT NOT NULL UNIQUE, made REAL NOT NULL, revoked REAL,
    seconds_per_day REAL NOT NULL, requests_per_minute INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, key TEXT NOT NULL, state TEXT NOT NULL,
    request TEXT NOT NULL, seconds REAL NOT NULL, made REAL NOT NULL, started REAL, ended REAL,
    progress REAL NOT NULL DEFAULT 0, attempts INTEGER NOT NULL DEFAULT 0, message TEXT NOT NULL DEFAULT '',
    file TEXT NOT NULL DEFAULT ''
);
CREATE INDEX IF NOT EXISTS jobs_by_state ON jobs (state, key);
CREATE INDEX IF NOT EXISTS jobs_by_key ON jobs (key, made);
CREATE TABLE IF NOT EXISTS uploads (id TEXT PRIMARY KEY, key TEXT NOT NULL, bytes INTEGER NOT NULL, made REAL NOT NULL);
"""
_FAIREST = """
SELECT id FROM jobs LEFT JOIN (SELECT key AS whose, MAX(started) AS last FROM jobs GROUP BY key) ON whose = key
WHERE state = 'queued' ORDER BY COALESCE(last, 0), number LIMIT 1
"""  # of the key whose last job started the longest ago, the oldest job


@dataclass(frozen=True)
class Key:
    """A user of the service, with the limits of its key."""

    name: str
    seconds_per_day: float  # of video
    requests_per_minute: int
    revoked: float | None = None


@dataclass(frozen=True)
class Job:
    """A requested video. Times are in seconds since the epoch."""

    number: int
    id: str
    key: str
    state: str
    request: str  # JSON
    seconds: float  # length of the video
    made: float
    started: float | None
    ended: float | None
    progress: float  # 0 to 1
    attempts: int
    message: str
    file: str  # name of the video within the folder of outputs


class Database:
    """Keys, jobs and uploads. Every method may be called from any thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._local = threading.local()
        with self._writing() as db:
            db.executescript(_SCHEMA)

    # keys

    def add_key(self, name: str, seconds_per_day: float, requests_per_minute: int) -> str:
        """Create a key and return it; only its hash is stored. Raises InputError for a name that is taken."""
        key = _PREFIX + secrets.token_urlsafe(32)
        row = (name, hash_of(key), time.time(), seconds_per_day, requests_per_minute)
        try:
            with self._writing() as db:
                db.execute("INSERT INTO keys VALUES (?, ?, ?, NULL, ?, ?)", row)
        except sqlite3.IntegrityError as error:
            raise InputError(f"there is a key of the name {name!r}; take another name") from error
        return key

    def revoke(self, name: str) -> None:
        """Revoke a key and cancel its queued and running jobs. Raises InputError if there is no such key."""
        with self._writing() as db:
            now = time.time()
            if not db.execute("UPDATE keys SET revoked = ? WHERE name = ? AND revoked IS NULL", (now, name)).rowcount:
                raise InputError(f"there is no key of the name {name!r} that could be revoked")
            db.execute(
                "UPDATE jobs SET state = 'cancelled', ended = ?, message = 'the key was revoked'"
                " WHERE key = ? AND state IN ('queued', 'running')", (now, name),
            )  # fmt: skip

    def all_keys(self) -> list[Key]:
        """All keys, in the order of their names."""
        rows = self._rows("SELECT name, seconds_per_day, requests_per_minute, revoked FROM keys ORDER BY name")
        return [Key(*row) for row in rows]

    def key(self, secret: str) -> Key | None:
        """Find the key with this secret; None if unknown or revoked. The lookup by hash leaks no timing."""
        rows = self._rows(
            "SELECT name, seconds_per_day, requests_per_minute, revoked FROM keys WHERE hash = ? AND revoked IS NULL",
            hash_of(secret),
        )
        return Key(*rows[0]) if rows else None

    # jobs

    def add_job(self, key: Key, request: str, seconds: float, most_waiting: int) -> str | None:
        """Queue a job and return its id; None if the key has `most_waiting` unfinished ones, or no seconds left."""
        id, now = secrets.token_hex(16), time.time()
        with self._writing() as db:
            (waiting,) = db.execute(
                "SELECT COUNT(*) FROM jobs WHERE key = ? AND state IN ('queued', 'running')", (key.name,)
            ).fetchone()
            (used,) = db.execute(_USED, (key.name, now - DAY)).fetchone()
            if waiting >= most_waiting or used + seconds > key.seconds_per_day:
                return None
            row = (id, key.name, QUEUED, request, seconds, now)
            db.execute("INSERT INTO jobs (id, key, state, request, seconds, made) VALUES (?, ?, ?, ?, ?, ?)", row)
        return id

    def used(self, key: Key) -> float:
        """Seconds of video that a key requested in the last 24 hours, without failed, refused and cancelled jobs."""
        return float(self._rows(_USED, key.name, time.time() - DAY)[0][0])

    def job(self, id: str, key: str) -> Job | None:
        """Find a job of this key; None if it is unknown or another key's."""
        rows = self._rows("SELECT * FROM jobs WHERE id = ? AND key = ?", id, key)
        return Job(*rows[0]) if rows else None

    def jobs(self, key: str, most: int = 100) -> list[Job]:
        """The newest `most` jobs of a key, newest first."""
        rows = self._rows("SELECT * FROM jobs WHERE key = ? ORDER BY number DESC LIMIT ?", key, most)
        return [Job(*row) for row in rows]

    def ahead(self, job: Job) -> int:
        """Number of jobs of all keys that were accepted earlier and have not ended."""
        (count,) = self._rows(
            "SELECT COUNT(*) FROM jobs WHERE state IN ('queued', 'running') AND number < ?", job.number
        )[0]
        return int(count)

    def claim(self) -> Job | None:
        """Mark the next job as running and return it, fairly between keys; None if none is queued."""
        with self._writing() as db:
            found = db.execute(_FAIREST).fetchone()
            if found is None:
                return None
            db.execute(
                "UPDATE jobs SET state = 'running', started = ?, attempts = attempts + 1, progress = 0 WHERE id = ?",
                (time.time(), found[0]),
            )
            return Job(*db.execute("SELECT * FROM jobs WHERE id = ?", found).fetchone())

    def recover(self) -> int:
        """Queue the running jobs of a killed service again; those started `ATTEMPTS` times fail. Returns how many."""
        with self._writing() as db:
            db.execute(
                "UPDATE jobs SET state = 'failed', ended = ?, message = 'the service ended during this job, every time'"
                " WHERE state = 'running' AND attempts >= ?", (time.time(), ATTEMPTS),
            )  # fmt: skip
            return db.execute("UPDATE jobs SET state = 'queued' WHERE state = 'running'").rowcount

    def put_back(self, id: str) -> None:
        """Put a running job back into the queue, without counting the attempt."""
        with self._writing() as db:
            db.execute(
                "UPDATE jobs SET state = 'queued', attempts = attempts - 1 WHERE id = ? AND state = 'running'", (id,)
            )

    def progress(self, id: str, share: float) -> bool:
        """Store the progress of a running job, 0 to 1; False if it is no longer running, because it was cancelled."""
        with self._writing() as db:
            return (
                db.execute("UPDATE jobs SET progress = ? WHERE id = ? AND state = 'running'", (share, id)).rowcount > 0
            )

    def end(self, id: str, state: str, message: str = "", file: str = "") -> bool:
        """Store the final state of a running job; False if it is no longer running."""
        with self._writing() as db:
            return db.execute(
                "UPDATE jobs SET state = ?, message = ?, file = ?, ended = ?, progress = ?"
                " WHERE id = ? AND state = 'running'",
                (state, message, file, time.time(), 1.0 if state == DONE else 0.0, id),
            ).rowcount > 0  # fmt: skip

    def cancel(self, id: str, key: str) -> bool:
        """Cancel a queued or running job of a key; False if there is none with this id."""
        with self._writing() as db:
            return db.execute(
                "UPDATE jobs SET state = 'cancelled', ended = ?"
                " WHERE id = ? AND key = ? AND state IN ('queued', 'running')",
                (time.time(), id, key),
            ).rowcount > 0  # fmt: skip

    def expired(self, before: float) -> list[str]:
        """Delete jobs that ended and uploads that were made before a time. Returns the names of their files."""
        with self._writing() as db:
            ended = "state NOT IN ('queued', 'running') AND ended < ?"
            files = [str(file) for (file,) in db.execute(f"SELECT file FROM jobs WHERE {ended}", (before,)) if file]
            uploads = [str(id) for (id,) in db.execute("SELECT id FROM uploads WHERE made < ?", (before,))]
            db.execute(f"DELETE FROM jobs WHERE {ended}", (before,))
            db.execute("DELETE FROM uploads WHERE made < ?", (before,))
        return files + uploads

    # uploads

    def add_upload(self, key: str, size: int, most_bytes: int) -> str | None:
        """Register an upload of `size` bytes and return its id; None if the key's uploads would exceed `most_bytes`."""
        id = secrets.token_hex(16)
        with self._writing() as db:
            (held,) = db.execute("SELECT COALESCE(SUM(bytes), 0) FROM uploads WHERE key = ?", (key,)).fetchone()
            if held + size > most_bytes:
                return None
            db.execute("INSERT INTO uploads VALUES (?, ?, ?, ?)", (id, key, size, time.time()))
        return id

    def remove_upload(self, id: str) -> None:
        """Delete the entry of an upload that could not be stored."""
        with self._writing() as db:
            db.execute("DELETE FROM uploads WHERE id = ?", (id,))

    def has_upload(self, id: str, key: str) -> bool:
        """Tell whether there is an upload with this id of this key."""
        return bool(self._rows("SELECT 1 FROM uploads WHERE id = ? AND key = ?", id, key))

    def _connection(self) -> sqlite3.Connection:
        """This thread's connection."""
        if not hasattr(self._local, "connection"):
            self._local.connection = sqlite3.connect(self.path, timeout=_WAIT_S, isolation_level=None)
            self._local.connection.execute("PRAGMA journal_mode = WAL")
            self._local.connection.execute("PRAGMA synchronous = FULL")  # accepted jobs survive a power cut
        connection: sqlite3.Connection = self._local.connection
        return connection

    def _rows(self, query: str, *values: Any) -> list[Any]:
        return self._connection().execute(query, values).fetchall()

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """Context of one write transaction, which waits for other writers when it begins."""
        connection = self._connection()
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
        except BaseException:
            connection.rollback()
            raise
        connection.commit()


_USED = """
SELECT COALESCE(SUM(seconds), 0) FROM jobs
WHERE key = ? AND made > ? AND state NOT IN ('failed', 'refused', 'cancelled')
"""


def hash_of(secret: str) -> str:
    """The hash of a key. Keys are 256 random bits, so no slow hash is needed."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
