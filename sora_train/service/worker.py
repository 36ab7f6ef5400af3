"""The worker: takes jobs from the queue, fairly between keys, and makes several at a time if possible."""

from __future__ import annotations

import errno
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from sora_train.core.cli import InputError
from sora_train.generation.safeguards import Refused
from sora_train.service.database import DONE, FAILED, REFUSED, Database, Job

_log = logging.getLogger(__name__)
_POLL_S = 0.2
_NOTE_S = 0.5  # least time between two updates of a job's progress
_TIDY_S = 3600.0
_AGAIN_S = 5.0  # pause after a failed write, for example on a full disk


class Cancelled(Exception):
    """The jobs that are being made were cancelled, or the service stops."""


@dataclass(frozen=True)
class Watch:
    """A job, and a callback for its progress."""

    job: Job
    progress: Callable[[float], None]  # takes the share done, 0 to 1; raises Cancelled


class Maker(Protocol):
    """Makes videos. `service/studio.py` has the one with a model."""

    def together(self, jobs: Sequence[Job], next: Job) -> bool:
        """Tell whether `next` can be made together with `jobs`."""

    def make(self, watches: Sequence[Watch]) -> dict[str, str | Exception]:
        """Make the videos of jobs.

        Returns:
            By job id the name of its video, or the exception that prevented it, such as Refused or Cancelled.
        """

    def forget(self, job: Job) -> None:
        """Remove the files of a job that was cancelled while it was made."""


class Worker:
    """A thread that makes the queued jobs."""

    def __init__(self, database: Database, maker: Maker, batch: int, tidy: Callable[[], None]) -> None:
        self._database, self._maker, self._batch, self._tidy = database, maker, batch, tidy
        self._end, self._new = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="worker", daemon=True)

    def start(self) -> None:
        """Start the thread, after jobs that a killed service left were queued again."""
        if again := self._database.recover():
            _log.warning("%d job(s) of a service that was killed are taken up again", again)
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread and wait for its end. Running jobs are put back into the queue."""
        self._end.set()
        self._new.set()
        self._thread.join()

    def wake(self) -> None:
        """Tell the thread that there is a new job."""
        self._new.set()

    def _run(self) -> None:
        while not self._end.is_set():
            try:
                self._work()
            except (sqlite3.Error, OSError) as error:
                _log.error("jobs wait, since the service can't write: %s", error)
                self._end.wait(_AGAIN_S)
                with suppress(sqlite3.Error):
                    self._database.recover()  # running jobs; if a video exists already, it is delivered

    def _work(self) -> None:
        held: Job | None = None  # claimed, but not made together with the last jobs
        tidied = -_TIDY_S
        while not self._end.is_set():
            if time.monotonic() - tidied >= _TIDY_S:
                self._tidy()
                tidied = time.monotonic()
            first = held or self._database.claim()
            if first is None:
                self._new.wait(_POLL_S)
                self._new.clear()
                continue
            jobs, held = [first], None
            while len(jobs) < self._batch and (other := self._database.claim()) is not None:
                if not self._maker.together(jobs, other):
                    held = other
                    break
                jobs.append(other)
            self._make(jobs)
        if held is not None:
            self._database.put_back(held.id)

    def _make(self, jobs: Sequence[Job]) -> None:
        watches = [Watch(job, self._progress_of(job)) for job in jobs]
        try:
            outcomes = self._maker.make(watches)
        except Exception as error:  # a bug ends these jobs, not the service
            _log.exception("a job failed")
            outcomes = {job.id: error for job in jobs}
        full: OSError | None = None
        for job in jobs:
            outcome = outcomes[job.id]
            if (no_room := _full_disk(outcome)) is not None:
                full = no_room
                self._database.put_back(job.id)
            elif isinstance(outcome, str):
                if not self._database.end(job.id, DONE, file=outcome):
                    self._maker.forget(job)
            elif isinstance(outcome, Refused):
                self._database.end(job.id, REFUSED, f"refused: {outcome.category}")
            elif isinstance(outcome, InputError):
                self._database.end(job.id, FAILED, str(outcome))
            elif isinstance(outcome, Cancelled):
                self._database.put_back(job.id)  # the service stops; a job that its owner cancelled has ended already
            else:
                self._database.end(job.id, FAILED, "an error of the service; its log says more")
        if full is not None:
            raise full

    def _progress_of(self, job: Job) -> Callable[[float], None]:
        noted = 0.0

        def note(share: float) -> None:
            nonlocal noted
            if self._end.is_set():
                raise Cancelled
            if time.monotonic() - noted >= _NOTE_S:
                noted = time.monotonic()
                with suppress(sqlite3.OperationalError):  # a full disk must not stop a running job
                    if not self._database.progress(job.id, share):
                        raise Cancelled

        return note


def _full_disk(outcome: str | Exception) -> OSError | None:
    """The OSError of a full disk or quota that caused a job's outcome; None for other outcomes."""
    cause = outcome.__cause__ if isinstance(outcome, InputError) else outcome
    return cause if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT) else None
