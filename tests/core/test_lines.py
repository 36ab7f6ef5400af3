"""Lines that grow with a run: cut and read from the end, whatever is torn, and never more than the end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sora_train.core.lines import cut_after, entries, entries_after


def write(path: Path, steps: list[int], end: str = "") -> Path:
    path.write_text("".join(json.dumps({"step": step, "text": "x" * 90}) + "\n" for step in steps) + end)
    return path


def steps_of(path: Path) -> list[int]:
    return [entry["step"] for entry in entries(path)]


def bytes_read() -> int:
    """Bytes that this process has read so far, from whatever file."""
    return int(Path("/proc/self/io").read_text().split()[1])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=30), st.integers(-1, 10), st.sampled_from(["", '{"step": 3, ', "\0\n"]))
def test_a_cut_leaves_what_is_not_later(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], after: int, end: str
) -> None:
    path = write(tmp_path_factory.mktemp("lines") / "a.jsonl", sorted(steps), end)
    assert [entry["step"] for entry in entries_after(path, after)] == [step for step in sorted(steps) if step > after]
    cut_after(path, after)
    assert path.read_bytes() == write(path.with_name("b"), [s for s in sorted(steps) if s <= after]).read_bytes()


def test_lines_that_stay_are_kept_and_torn_ones_in_the_middle_are_passed_over(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [1, 2])
    path.write_text(path.read_text() + '{"step": 3\n' + '{"step": 4, "kept": true}\n{"step": 5}\n[6]\n')
    assert [entry["step"] for entry in entries_after(path, 2)] == [4, 5]
    cut_after(path, 2, stays=lambda entry: "kept" in entry)
    assert steps_of(path) == [1, 2, 4]
    cut_after(tmp_path / "none.jsonl", 2)
    assert not (tmp_path / "none.jsonl").exists() and entries_after(tmp_path / "none.jsonl", 2) == []


def test_a_tail_longer_than_what_is_read_at_once_is_found(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", list(range(5000)))  # half a megabyte
    assert [entry["step"] for entry in entries_after(path, 100)] == list(range(101, 5000))
    cut_after(path, 100)
    assert steps_of(path) == list(range(101))


def test_what_a_resume_reads_does_not_grow_with_the_run(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", list(range(100_000)))
    before = bytes_read()
    assert len(entries_after(path, 99_949)) == 50
    cut_after(path, 99_949)
    assert bytes_read() - before < 300_000 < path.stat().st_size / 30
    assert path.read_bytes().endswith(b'{"step": 99949, "text": "' + b"x" * 90 + b'"}\n')
