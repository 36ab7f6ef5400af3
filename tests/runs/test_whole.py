"""The way from clips to an evaluated model through the commands that the quickstart gives, with tiny networks."""

from __future__ import annotations

import json

import av
import pytest
from PIL import Image

from sora_train.data.index.index import load_index
from tests.checkout import Checkout


@pytest.mark.timeout(900)  # a minute, but not on a busy machine
def test_from_clips_to_an_evaluated_model(quickstart: tuple[Checkout, dict[str, str]]) -> None:
    checkout, said = quickstart
    (table,) = [text for command, text in said.items() if "sora_train.evaluate" in command]
    run = checkout.folder / "runs/demo"
    index = load_index([str(path) for path in sorted((checkout.folder / "runs/demo_latents/demo").glob("*.tar"))])
    lines = [line for rank in (0, 1) for line in (run / f"ledger/rank-{rank}.jsonl").read_text().splitlines()]
    ledger = [json.loads(line) for line in lines]
    assert {line["step"] for line in ledger} == {1, 2, 3} and not any(line["refused"] for line in ledger)
    trained = [sample for line in ledger for sample in line["samples"]]
    assert len({int(index.frames[row]) for row in trained}) == 3, "an image and clips of two lengths"
    portrait, landscape = (
        any(sign * (index.height[row] - index.width[row]) > 0 for row in trained) for sign in (1, -1)
    )
    assert portrait and landscape
    assert json.loads((run / "evaluation.json").read_text())["videos"] == 8 and "colour" in table
    videos = list(run.glob("samples/**/*.mp4"))
    for video in videos:
        with av.open(str(video)) as file:
            assert file.streams.video[0].codec_context.pix_fmt == "yuv420p"
        data = video.read_bytes()
        assert data.index(b"moov") < data.index(b"mdat"), "plays while it loads"
        Image.open(video.with_name(f"{video.stem}-sheet.png")).verify()
    assert len(videos) >= 3
