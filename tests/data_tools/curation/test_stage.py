"""A stage's work is done again when its code changes, and not when its description does."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_tools.curation.stage import code_version

CODE = '"""A module."""\n\n\ndef double(x: int) -> int:\n    """Return twice x."""\n    return 2 * x\n'


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [("twice x", "x, doubled", True), ("    return", "    # by two\n    return", True), ("2 * x", "3 * x", False)],
)
def test_only_code_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, same: bool) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "a_stage_of_a_test.py"
    found = []
    for text in (CODE, CODE.replace(old, new)):
        path.write_text(text)
        code_version.cache_clear()
        found.append(code_version((path.stem,)))
    assert (found[0] == found[1]) is same
