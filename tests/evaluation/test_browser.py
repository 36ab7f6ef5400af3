"""The pages of evaluations in a real browser, opened from the disk: votes are given and handed over, videos play."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sora_train.core.media import write_mp4
from sora_train.evaluation.outcome import conclude
from sora_train.evaluation.page import evaluation_page
from sora_train.evaluation.registry import choose
from sora_train.evaluation.results import SAMPLES, Judged
from sora_train.evaluation.votes import pairs_of, read_votes, write_votes_page
from tests.browser import opened_page

pytestmark = pytest.mark.campaign  # a browser takes seconds to start, and not every machine has one


@pytest.fixture
def page() -> Iterator[Any]:
    """A page whose requests are in `page.asked`."""
    with opened_page() as found:
        found.asked = []
        found.on("request", lambda request: found.asked.append(request.url))
        yield found


def plays(page: Any, place: str) -> bool:
    """Wait until the video at a place has played a little, and return whether it did."""
    ends = time.monotonic() + 120
    while page.evaluate(f"document.querySelector('{place}').currentTime") <= 0.05:
        if time.monotonic() > ends:
            return False
        page.wait_for_timeout(50)
    return True


def test_votes_are_given_on_a_page_from_the_disk(page: Any, tmp_path: Path) -> None:
    for name, level in (("dark", 40), ("bright", 220)):
        (tmp_path / name).mkdir()
        for n in range(4):
            write_mp4(tmp_path / name / f"{n}.mp4", np.full((8, 32, 48, 3), level + n, np.uint8), 8)
    folders = [str(tmp_path / name) for name in ("dark", "bright")]
    pairs = pairs_of(folders, None, 4, 3, 0.25)
    write_votes_page(pairs, tmp_path / "votes.html")
    page.goto((tmp_path / "votes.html").as_uri())
    assert plays(page, "#left") and plays(page, "#right")
    for place, pair in enumerate(pairs):
        assert page.inner_text("#count") == f"{place} of 5"
        bright = "left" if pair.left == folders[1] else "right"
        if place == 2:
            page.reload()  # what was answered stays
        page.keyboard.press("1" if bright == "left" else "2") if place % 2 else page.click(f"text={bright} >> nth=-1")
    assert "All done" in page.inner_text("#prompt") and page.is_disabled("#b1")
    with page.expect_download() as download:
        page.click("#save")
    assert download.value.suggested_filename == "votes-votes.json"
    found, repeats = read_votes(str(tmp_path / "votes.key.json"), [str(download.value.path())])
    assert repeats == (1, 1) and len(found) == 4
    assert all((first if point else second) == folders[1] for first, second, point in found)
    assert page.problems == [] and all(url.startswith(("file://", "blob:")) for url in page.asked)


def test_the_page_of_an_evaluation_stands_alone(page: Any, tmp_path: Path) -> None:
    judged = [Judged(str(n), f"prompt {n}", {"psnr": {"psnr_db": 20.0 + n}}) for n in range(7)]
    for video in judged:
        write_mp4(tmp_path / f"{video.name}.mp4", np.full((8, 32, 48, 3), 90, np.uint8), 8)
    outcome = conclude("one run", {"split": "test"}, choose(["psnr"], {}), {SAMPLES: judged})
    files = {video.name: tmp_path / f"{video.name}.mp4" for video in judged}
    curves = {"psnr_db": [(100, 18.0), (200, 20.0)]}
    (tmp_path / "page.html").write_text(evaluation_page(outcome, files, curves), encoding="utf-8")
    page.goto((tmp_path / "page.html").as_uri())
    assert page.inner_text("h1") == "one run" and page.locator("video").count() == 6
    page.evaluate("document.querySelector('video').play()")
    assert plays(page, "video") and page.locator("svg").count() == 1
    box = page.locator("table").first.bounding_box()
    assert box and box["x"] + box["width"] <= page.viewport_size["width"]
    assert page.problems == [] and all(url.startswith(("file://", "data:")) for url in page.asked)
