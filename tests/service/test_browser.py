"""The page in a real browser: entering, asking, watching, playing; another's video and a revoked key are refused."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sora_train.core.media import write_mp4
from tests.browser import opened_page
from tests.service.conftest import Service

pytestmark = pytest.mark.campaign  # a browser takes seconds to start, and not every machine has one


@pytest.fixture
def page() -> Iterator[Any]:
    """A page of the browser that is installed here."""
    with opened_page() as found:
        yield found


def enter(page: Any, service: Service, key: str) -> None:
    page.goto(f"http://127.0.0.1:{service.port}/")
    page.fill("#key", key)
    page.click("#door button")


def test_the_way_of_a_guest(page: Any, service: Service, tmp_path: Path) -> None:
    ada, bob = service.database.add_key("ada", 100, 6000), service.database.add_key("bob", 100, 6000)
    service.painter.slow = 0.7
    enter(page, service, "sora_wrong")
    page.wait_for_selector("text=no valid key")
    enter(page, service, ada)
    page.wait_for_selector("#inside:not([hidden])")
    assert "ada: 100.0 of 100 seconds left today" in page.inner_text("#me")
    write_mp4(tmp_path / "given.mp4", np.zeros((4, 32, 32, 3), dtype=np.uint8), 8)
    page.fill("#prompt", "<b>a red ring</b>")
    page.fill("#seconds", "1.5")
    page.fill("#seed", "7")
    page.set_input_files("#given", str(tmp_path / "given.mp4"))
    page.click("#wish button")
    page.wait_for_selector("li progress:not([hidden])")
    assert page.inner_text("li > div:first-child") == "<b>a red ring</b>", "text, not markup"
    page.wait_for_selector("li video")
    ends = time.monotonic() + 120  # the page's policy forbids Playwright's own waiting, which evaluates text
    while page.evaluate("document.querySelector('li video').currentTime") <= 0.1:
        assert time.monotonic() < ends, "the video doesn't play"
        page.wait_for_timeout(100)
    assert page.evaluate("document.querySelector('li video').videoWidth") == 32
    (job,) = service.database.jobs("ada")
    assert '"seed":7' in job.request and '"video":"' in job.request and job.seconds == 1.5
    with page.expect_download() as download:
        page.click("li a")
    assert Path(download.value.path()).stat().st_size > 500
    page.once("dialog", lambda dialog: dialog.accept("that's me"))
    page.click("li .report")
    page.wait_for_selector("text=reported, thank you")
    assert "that's me" in (service.folder / "reports.jsonl").read_text()
    fetch = "([path, key]) => fetch(path, {headers: {Authorization: `Bearer ${key}`}}).then(answer => answer.status)"
    assert page.evaluate(fetch, [f"/api/jobs/{job.id}/video", ada]) == 200
    assert page.evaluate(fetch, [f"/api/jobs/{job.id}/video", bob]) == 404
    service.database.revoke("ada")
    page.wait_for_selector("#door:not([hidden])")
    assert page.evaluate(fetch, [f"/api/jobs/{job.id}/video", ada]) == 401
    assert page.problems == []


def test_a_job_is_cancelled_on_the_page(page: Any, start: Callable[..., Service]) -> None:
    service = start()
    service.painter.slow = 30.0
    enter(page, service, service.database.add_key("ada", 100, 6000))
    page.fill("#prompt", "a ring")
    page.click("#wish button")
    page.click("li .cancel")
    page.wait_for_selector("li .state:text('cancelled')")
    assert page.problems == []
