"""Engines that run a stage on all its items: worker processes on this machine, or Ray on a cluster (`on_ray.py`).

A worker that dies or hangs on an item is replaced, and the item is tried once more before it counts as failed. So no
film can stop the others.
"""

from __future__ import annotations

import multiprocessing
import queue
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from data_tools.curation.ledger import Ledger
from data_tools.curation.stage import Item, Outcome, Stage, attempt
from data_tools.progress import progress
from sora_train.core.cli import InputError

_TRIES = 2
_START_S = 120.0  # time-out for a process to start
_PER_SECOND = 20.0  # seconds of work that a second of film may take


class Engine(Protocol):
    """Runs a stage on items, in any order."""

    def run(self, stage: Stage, items: Sequence[Item], folder: Path) -> Iterator[tuple[int, Outcome]]:
        """Yield each item's number with its outcome as it is done."""
        ...

    def close(self) -> None:
        """Release the engine's resources."""
        ...


def take_through(stage: Stage, items: Sequence[Item], ledger: Ledger, engine: Engine) -> list[tuple[Item, Outcome]]:
    """Run a stage on items; outcomes that the ledger has are taken from it.

    Returns:
        The items with their outcomes. Items that are kept have the stage's new fields.

    Raises:
        InputError: The disk is full.
    """
    digests = [stage.digest(item) for item in items]
    outcomes: dict[int, Outcome] = {}
    for number, digest in enumerate(digests):
        known = ledger.outcome(stage, digest)
        if known is not None:
            outcomes[number] = known
    pending = [number for number in range(len(items)) if number not in outcomes]
    if pending:
        with progress(len(pending), stage.name) as advance:
            for place, outcome in engine.run(stage, [items[number] for number in pending], ledger.folder(stage)):
                if "full" in outcome:
                    raise InputError(
                        f"no room in {ledger.out}: {outcome['full']}; make room, then give the same command"
                    )
                number = pending[place]
                ledger.add(stage, items[number]["id"], digests[number], outcome)
                outcomes[number] = outcome
                advance(1)
    return [(items[n] | outcomes[n].get("kept", {}), outcomes[n]) for n in range(len(items))]


class ProcessPool:
    """Worker processes of this machine, each with a thread that feeds it. Use as a context manager.

    Args:
        workers: Processes.
        timeout_s: Seconds that an item may take, plus `_PER_SECOND` for each second of its film.
    """

    def __init__(self, workers: int, timeout_s: float = 120.0) -> None:
        self._timeout_s = timeout_s
        self._workers = [_Worker() for _ in range(workers)]

    def run(self, stage: Stage, items: Sequence[Item], folder: Path) -> Iterator[tuple[int, Outcome]]:
        """Yield each item's number with its outcome as it is done."""
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        for number in range(len(items)):
            waiting.put(number)
        done: queue.SimpleQueue[tuple[int, Outcome | BaseException]] = queue.SimpleQueue()
        ended = threading.Event()

        def feed(worker: _Worker) -> None:
            """Give a worker one waiting item after another, and put each outcome into `done`."""
            while not ended.is_set():
                try:
                    number = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    done.put((number, self._answer(worker, stage, items[number], folder)))
                except BaseException as error:  # raised in the caller's thread
                    done.put((number, error))

        threads = [threading.Thread(target=feed, args=(worker,), daemon=True) for worker in self._workers[: len(items)]]
        for thread in threads:
            thread.start()
        try:
            for _ in items:
                number, outcome = done.get()
                if isinstance(outcome, BaseException):
                    raise outcome
                yield number, outcome
        finally:
            if not ended.is_set() and any(thread.is_alive() for thread in threads):
                ended.set()

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.end()

    def __enter__(self) -> ProcessPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self, worker: _Worker, stage: Stage, item: Item, folder: Path) -> Outcome:
        allowed = self._timeout_s + _PER_SECOND * float(item.get("duration") or 0.0)
        for _ in range(_TRIES):
            try:
                return worker.ask((stage, item, folder), allowed)
            except TimeoutError:
                cause, detail = "timeout", f"no answer within {allowed:.0f} s"
            except EOFError:
                cause, detail = "crash", "the worker died"
        return {"failed": [cause, f"{detail}, {_TRIES} times"]}


class _Worker:
    """One process, started on first use and again after it has died or was killed."""

    def __init__(self) -> None:
        self._process: Any = None
        self._connection: Connection | None = None

    def ask(self, work: tuple[Stage, Item, Path], timeout_s: float) -> Outcome:
        """Send work and wait for its outcome. Raises TimeoutError or EOFError, after which the process has ended."""
        try:
            if self._process is None or not self._process.is_alive():
                self._start()
            assert self._connection is not None
            self._connection.send(work)
            if not self._connection.poll(timeout_s):
                raise TimeoutError
            return self._connection.recv()
        except (EOFError, ConnectionError) as error:
            self.end()
            raise EOFError from error
        except TimeoutError:
            self.end()
            raise

    def end(self) -> None:
        """Kill the process and close its pipe."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _start(self) -> None:
        self.end()
        context = multiprocessing.get_context("spawn")
        mine, its = context.Pipe()
        self._process = context.Process(target=_serve, args=(its,), daemon=True)
        self._process.start()
        its.close()
        self._connection = mine
        if not mine.poll(_START_S):
            raise TimeoutError
        mine.recv()


def _serve(connection: Connection) -> None:
    """Process work items until the other end of the pipe is closed, for example because the command was killed."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C at the terminal is the command's to handle
    connection.send("ready")
    while True:
        try:
            stage, item, folder = connection.recv()
        except (EOFError, ConnectionError):
            return
        try:
            connection.send(attempt(stage, item, folder))
        except ConnectionError:
            return
