"""The page of an evaluation: its worst and best samples, videos and stills alike, and no empty part."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from sora_train.core.media import write_mp4
from sora_train.evaluation.outcome import conclude
from sora_train.evaluation.page import evaluation_page
from sora_train.evaluation.registry import choose
from sora_train.evaluation.results import SAMPLES, Judged


def test_worst_and_best_are_shown_and_what_there_is_not_is_left_out(tmp_path: Path) -> None:
    frames = np.full((3, 16, 16, 3), 90, np.uint8)
    write_mp4(tmp_path / "0.mp4", frames, 4.0)
    Image.fromarray(frames[0]).save(tmp_path / "1.png")
    judged = [
        Judged(name, f"<{name}>", {"psnr": {"psnr_db": value}}) for name, value in (("moves", 9.0), ("still", 3.0))
    ]
    outcome = conclude("one run", {"split": "test"}, choose(["psnr"], {}), {SAMPLES: judged})
    text = evaluation_page(outcome, {"moves": tmp_path / "0.mp4", "still": tmp_path / "1.png"})
    assert text.count('<video controls loop muted playsinline src="data:video/mp4;base64,') == 2, "in worst and in best"
    assert text.count('<img class=sample alt="" src="data:image/png;base64,') == 2
    assert "&lt;still&gt;" in text and "<still>" not in text
    assert text.index("psnr_db: worst") < text.index("psnr_db: best")
    assert "Distances" not in text and "Over checkpoints" not in text and "Left out" not in text
    assert "Over checkpoints" in evaluation_page(outcome, {}, {"psnr_db": [(1, 2.0), (2, 3.0)]})
