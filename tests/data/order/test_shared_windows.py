"""Windows shared by the ranks of a node: planned once, the same for all, and never needed."""

from __future__ import annotations

import hashlib
import multiprocessing
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest

from sora_train.data.order.shared_windows import SharedWindows, Window
from sora_train.data.order.visits import Visits


def window(count: int) -> Window:
    n = np.arange(count)
    two, four = np.stack((n, n), 1), np.stack((n, n, n, n), 1)
    visits = Visits(n, n, n, n / 3, two, four, ("text_to_video", "image"), n % 2, n.astype(np.uint64) + 2**63, n)
    return visits, [[[0, 2], []], [[1], list(range(3, count))]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("sora_train.data.order.shared_windows._MEMORY", tmp_path)
    return tmp_path


def test_what_is_read_back_is_what_was_planned(folder: Path) -> None:
    planned = []

    def plan() -> Window:
        planned.append(1)
        return window(9)

    first, second = (SharedWindows("run", owner=False).get("0-0", plan) for _ in range(2))
    assert planned == [1] and first[1] == second[1] == window(9)[1]
    assert first[0] is not None and second[0] is not None
    assert [second[0][n] for n in range(9)] == [first[0][n] for n in range(9)]
    assert second[0][3].seed == 2**63 + 3 and second[0][3].task == "image"
    nothing = SharedWindows("run", owner=False)
    assert nothing.get("0-1", lambda: (None, [])) == nothing.get("0-1", plan) == (None, [])


def test_few_windows_are_kept_and_the_owner_removes_them(folder: Path) -> None:
    shared = SharedWindows("run", owner=False)
    for n in range(9):
        shared.get(str(n), lambda: window(4))
    assert len(list(shared.folder.glob("*.npz"))) == 4 and shared.folder.stat().st_mode & 0o077 == 0
    shared.remove()
    assert not list(folder.iterdir())
    assert shared.get("0", lambda: window(4))[1] == window(4)[1], "each rank plans for itself"


def test_a_torn_file_is_planned_again(folder: Path) -> None:
    shared = SharedWindows("run", owner=False)
    shared.get("0", lambda: window(4))
    (file,) = shared.folder.glob("*.npz")
    for damaged in (b"", file.read_bytes()[:100], b"x" * 50):
        file.write_bytes(damaged)
        assert shared.get("0", lambda: window(4))[1] == window(4)[1]


def rank(results: Queue[tuple[int, str]], together: Barrier) -> None:
    planned = []

    def plan() -> Window:
        planned.append(1)
        return window(500)

    shared = SharedWindows("run", owner=False)
    packs = []
    for n in range(20):
        together.wait(timeout=250)
        packs.append(shared.get(str(n), plan)[1])
    results.put((len(planned), hashlib.sha256(repr(packs).encode()).hexdigest()))


def test_ranks_at_once_plan_each_window_once(folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    results: Queue[tuple[int, str]] = context.Queue()
    together = context.Barrier(3)
    ranks = [context.Process(target=rank, args=(results, together)) for _ in range(3)]
    for process in ranks:
        process.start()
    answers = [results.get(timeout=250) for _ in ranks]
    for process in ranks:
        process.join()
    assert len({digest for _, digest in answers}) == 1
    assert sum(planned for planned, _ in answers) == 20
