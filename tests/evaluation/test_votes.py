"""Blind pairs in the seed's order, strengths from votes, and votes that don't belong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sora_train.core.cli import InputError
from sora_train.core.media import write_mp4
from sora_train.evaluation.votes import pairs_of, read_votes, strengths, write_votes_page


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    for model in ("a", "b", "c"):
        (tmp_path / model).mkdir()
        for n in range(6):
            write_mp4(tmp_path / model / f"{n}.mp4", np.zeros((2, 16, 16, 3), np.uint8), 8)
    return [str(tmp_path / model) for model in ("a", "b", "c")]


def test_order_and_sides_come_from_the_seed(folders: list[str], tmp_path: Path) -> None:
    pairs = pairs_of(folders, None, 100, 0, 0.25)
    assert pairs == pairs_of(folders, None, 100, 0, 0.25) != pairs_of(folders, None, 100, 1, 0.25)
    asked, again = ([p for p in pairs if p.again is flag] for flag in (False, True))
    assert len(asked) == 18 and len(again) == 4
    assert {(p.name, frozenset((p.left, p.right))) for p in asked} == {
        (str(n), frozenset(two)) for n in range(6) for two in (folders[:2], folders[1:], folders[::2])
    }
    for repeat in again:
        first = next(p for p in asked if (p.name, p.left, p.right) == (repeat.name, repeat.right, repeat.left))
        assert pairs.index(first) < pairs.index(repeat), "the other way round, and later"
    assert 3 <= sum(p.left < p.right for p in asked) <= 15
    assert len(pairs_of(folders, None, 5, 0, 0.0)) == 5
    with pytest.raises(InputError, match="two folders"):
        pairs_of(folders[:1], None, 5, 0, 0.0)


def test_the_page_tells_nobody_who_is_who(folders: list[str], tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("".join(f"{n}\tprompt </script> {n}\n" for n in range(6)))
    pairs = pairs_of(folders[:2], str(tmp_path / "p.txt"), 6, 0, 0.5)
    write_votes_page(pairs, tmp_path / "pages" / "votes.html")
    text = (tmp_path / "pages" / "votes.html").read_text()
    assert "../a/0.mp4" in text and "prompt </script>" not in text and "://" not in text
    votes = [{"trial": n, "choice": "left" if p.left == folders[0] else "right"} for n, p in enumerate(pairs)]
    sheet = tmp_path / "sheet.json"
    sheet.write_text(json.dumps({"page": "votes", "votes": votes}))
    found, repeats = read_votes(str(tmp_path / "pages" / "votes.key.json"), [str(sheet)])
    assert len(found) == 6 and repeats == (3, 3)
    first, second = strengths(found)
    assert first.model == folders[0] and first.value == -second.value > 1 and first.votes == 6
    sheet.write_text(json.dumps({"votes": [{"trial": 99, "choice": "left"}]}))
    with pytest.raises(InputError, match="no votes for"):
        read_votes(str(tmp_path / "pages" / "votes.key.json"), [str(sheet)])


def test_known_strengths_lie_in_their_intervals() -> None:
    """In at least 90 of 100 simulations; each model counts."""
    rng, truth = np.random.default_rng(0), np.array([1.0, 0.3, -0.2, -1.1])
    held = np.zeros(len(truth))
    for _ in range(100):
        votes = []
        for _ in range(200):
            a, b = rng.permutation(4)[:2]
            wins = rng.random() < 1 / (1 + np.exp(truth[b] - truth[a]))
            votes.append((str(a), str(b), float(wins)))
        for one in strengths(votes):
            held[int(one.model)] += one.low <= truth[int(one.model)] <= one.high
    assert (held >= 90).all(), held


def test_a_tie_is_half_a_win_and_one_that_never_lost_is_finite() -> None:
    ties = strengths([("a", "b", 0.5)] * 10)
    assert ties[0].value == pytest.approx(0.0) and ties[0].low < 0 < ties[0].high
    sure = strengths([("a", "b", 1.0)] * 10)
    assert np.isfinite(sure[0].value) and sure[0].value > 1
    with pytest.raises(InputError, match="two models"):
        strengths([])
