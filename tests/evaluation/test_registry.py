"""Metrics by name and group, what is missing, and what becomes of their figures."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest
from rich.console import Console

from sora_train.core.cli import InputError
from sora_train.evaluation.metric import METRICS, Metric, Models, Sample, Unavailable, metric, register
from sora_train.evaluation.outcome import conclude
from sora_train.evaluation.registry import choose
from sora_train.evaluation.results import Judged, as_json, summarise, table

VIDEO = np.random.default_rng(0).integers(0, 256, (5, 24, 32, 3), dtype=np.uint8)


@pytest.fixture
def registered() -> Iterator[None]:
    """One metric of each kind, entered as anyone would."""
    before = dict(METRICS)

    @metric("brightness_of_frames", groups=("quick",), better=None)
    def _brightness(made_THWC: np.ndarray, real_THWC: np.ndarray | None, sample: Sample) -> dict[str, float]:
        return {"light": float(made_THWC.mean()), "none": float("nan")}

    def missing(models: Models) -> Metric:
        raise Unavailable("needs nolibrary (pip install nolibrary)")

    register("unavailable", ("quick",), missing)
    yield
    METRICS.clear()
    METRICS.update(before)


def test_a_missing_library_is_skipped_in_a_group_and_an_error_by_name(registered: None) -> None:
    judges = choose(["quick"], {})
    assert "brightness_of_frames" in judges.names and "unavailable" not in judges.names
    assert judges.skipped == ["unavailable: needs nolibrary (pip install nolibrary)"]
    with pytest.raises(InputError, match=r"metrics=unavailable: needs nolibrary \(pip install nolibrary\)"):
        choose(["quick", "unavailable"], {})
    with pytest.raises(InputError, match="did you mean 'psnr'"):
        choose(["pnsr"], {})


def test_a_name_stands_for_one_metric(registered: None) -> None:
    with pytest.raises(ValueError, match="already"):
        register("psnr", (), METRICS["psnr"].build)


def test_a_metric_gets_only_what_it_needs(registered: None) -> None:
    judges = choose(["quick"], {})
    bare = judges.judge(VIDEO, None, Sample("a")).figures
    assert not {"psnr", "ssim", "scene", "motion"} & set(bare)
    assert bare["brightness_of_frames"] == {"light": pytest.approx(VIDEO.mean())}
    assert {"psnr", "motion"} <= set(judges.judge(VIDEO, VIDEO, Sample("a", fps=8.0)).figures)
    with pytest.raises(InputError, match="b: psnr: need two uint8 arrays of one shape"):
        judges.judge(VIDEO[:3], VIDEO, Sample("b"))


def test_rows_have_intervals_chance_and_valid_json() -> None:
    judges = choose(["scene", "psnr"], {})
    right = [
        Judged(str(n), "", {"scene": {"shape": float(n < 5), "colour": 1.0}, "psnr": {"psnr_db": 30.0 + n}})
        for n in range(10)
    ]
    real = [Judged(str(n), "", {"scene": {"colour": 1.0}, "psnr": {"psnr_db": float("inf")}}) for n in range(3)]
    rows = summarise(judges.metrics, {"samples": right, "real videos": real})
    assert [row.name for row in rows] == ["colour", "shape", "psnr_db"]
    shown = table(rows, ["samples", "real videos"])
    assert [c.header for c in shown.columns] == ["figure", "samples", "real videos", "chance"]
    assert list(shown.columns[1].cells)[:2] == ["100.0% (72% to 100%, n=10)", "50.0% (24% to 76%, n=10)"]
    assert list(shown.columns[2].cells)[1] == "-" and list(shown.columns[3].cells) == ["16.7%", "25.0%", "-"]
    figures = as_json(rows)
    assert figures["shape"]["columns"]["samples"] == pytest.approx(
        {"value": 0.5, "low": 0.2366, "high": 0.7634, "n": 10}, abs=1e-4
    )
    outcome = conclude("t", {"run": "x"}, judges, {"samples": right, "real videos": real})
    back = json.loads(json.dumps(outcome.as_json(), allow_nan=False))
    assert back["videos"] == 10 and back["columns"]["real videos"][0]["figures"]["psnr_db"] == "inf"
    outcome.show(Console(quiet=True))
