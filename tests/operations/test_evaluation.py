"""Evaluation while a run trains: figures of fixed clips, the same whoever makes them, and the best step."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from sora_train.core.batch import Clip
from sora_train.core.cli import InputError
from sora_train.core.world import World
from sora_train.evaluation.registry import choose
from sora_train.operations.evaluation import RunEvaluation
from sora_train.operations.held_out import Previewer

Make = Callable[..., Clip]


def evaluation(clips: list[Clip], best: str | None = None) -> RunEvaluation:
    held: Any = SimpleNamespace(get=lambda: clips)
    plan: Any = SimpleNamespace(index=SimpleNamespace(fields=lambda row: {}))
    return RunEvaluation(held, plan, choose(["psnr", "motion"], {}), best)


def real(clip: Clip) -> np.ndarray:
    return clip.video_TCHW.permute(0, 2, 3, 1).numpy()


def previewer(world: World, change: int = 0, stop: bool = False) -> Previewer:
    return Previewer(
        lambda clip: np.clip(real(clip).astype(int) + change, 0, 255).astype(np.uint8), world, lambda: stop
    )


@pytest.fixture
def clips(make_clip: Make) -> list[Clip]:
    return [make_clip((5, 16, 16), seed) for seed in range(3)]


@pytest.fixture
def gathered(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The shares of two ranks, which the second of them puts together."""
    shares: list[Any] = []

    def gather(everyone: list[Any], mine: Any) -> None:
        shares.append(mine)
        everyone[:] = [*shares, *[[]] * (len(everyone) - len(shares))]

    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    return shares


def test_two_ranks_find_the_figures_of_one(clips: list[Clip], gathered: list[Any]) -> None:
    one = evaluation(clips).marks(previewer(World(), 9)).figures
    gathered.clear()
    for rank in (0, 1):
        two = evaluation(clips).marks(previewer(World(rank=rank, size=2), 9)).figures
    assert [len(share) for share in gathered] == [2, 1], "the third clip is made twice, and counts once"
    assert two == one and {"psnr_db", "motion"} <= one.keys()


def test_a_better_sample_has_the_higher_score(clips: list[Clip], gathered: list[Any]) -> None:
    scores = []
    for change in (60, 6):
        gathered.clear()
        scores.append(evaluation(clips, "psnr_db").marks(previewer(World(), change)).score)
    assert scores[0] < scores[1]


@pytest.mark.parametrize(("best", "says"), [("pnsr", "psnr"), ("motion", "psnr")])
def test_a_figure_that_says_nothing_of_better_is_refused(
    clips: list[Clip], gathered: list[Any], best: str, says: str
) -> None:
    with pytest.raises(InputError, match=f"checkpoint.best={best}.*{says}"):
        evaluation(clips, best).marks(previewer(World()))


def test_a_signal_breaks_it_off_without_figures(clips: list[Clip], gathered: list[Any]) -> None:
    assert evaluation(clips).marks(previewer(World(), stop=True)).figures == {} and not gathered


def test_shards_without_videos_are_refused(gathered: list[Any]) -> None:
    with pytest.raises(InputError, match="data.validation holds no video"):
        evaluation([]).marks(previewer(World()))
