"""Rectified flow over packs: what is noised, what bears loss, and that packing changes none of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sora_train.config.schema import TASKS, FlowConfig, Prediction, Timesteps, Weighting
from sora_train.core.batch import Clip, LatentPack, Pack, Stream
from sora_train.core.cost import Geometry
from sora_train.core.loss import LEVELS
from sora_train.flow.objective import draw_timesteps, shift_of, shifted
from sora_train.flow.patches import patchify
from sora_train.flow.prediction import velocity
from sora_train.flow.tasks import given_frames
from sora_train.methods.diffusion.learner import DiffusionLearner
from sora_train.models.text.encoder import tokenize_captions
from tests.stubs import diffusion

GEOMETRY = Geometry(4, 4, 2)
MakeClip = Callable[..., Clip]


def encode(video_BCTHW: Tensor) -> Tensor:
    """An encoder that can be checked by hand: every fourth frame, pixels averaged in blocks of four."""
    frames = video_BCTHW[:, :, ::4].float() / 127.5 - 1.0
    return torch.nn.functional.avg_pool3d(frames, (1, 4, 4))


def make_task(**changes: object) -> DiffusionLearner:
    config = FlowConfig(shift=2.0, caption_dropout=0.0)
    return diffusion(replace(config, **changes), GEOMETRY, 3, encode, lambda texts: tokenize_captions(texts, 64, 32))


@pytest.fixture
def clips(make_clip: MakeClip) -> list[Clip]:
    return [
        make_clip((17, 16, 24), 1, "text_to_video", "one"),
        make_clip((17, 16, 24), 2, "image_to_video", "and two"),
        make_clip((1, 32, 32), 3, "image", ""),
        make_clip((9, 24, 16), 4, "extension", "now four"),
    ]


class Zero(nn.Module):
    """Predicts no velocity at all."""

    def forward(self, pack: LatentPack) -> Tensor:
        return torch.zeros_like(pack.video.x_NP)


def by_clip(pack: Stream, values: Tensor) -> list[Tensor]:
    return list(values.split(pack.layout.lengths))


def test_x_t_lies_on_the_line_from_latents_to_noise(clips: list[Clip]) -> None:
    pack = make_task().prepare(Pack(clips)).video
    t_N = pack.t_M[pack.t_of_N].unsqueeze(1)
    clean = torch.cat([patchify(encode(c.video_TCHW.transpose(0, 1)[None])[0], 2) for c in clips])
    torch.testing.assert_close(pack.x_NP, clean + t_N * pack.target_NP, rtol=1e-5, atol=1e-5)
    noise = pack.target_NP + clean
    assert abs(noise.mean().item()) < 0.05 and abs(noise.std().item() - 1) < 0.05


def test_given_frames_are_clean_and_bear_no_weight(clips: list[Clip]) -> None:
    pack = make_task().prepare(Pack(clips)).video
    for clip, x, weight, index in zip(
        clips, by_clip(pack, pack.x_NP), by_clip(pack, pack.weight_N), by_clip(pack, pack.t_of_N), strict=True
    ):
        clean = encode(clip.video_TCHW.transpose(0, 1)[None])[0]
        frames = clean.shape[1]
        given = torch.tensor(given_frames(clip.visit.task, frames, clip.visit.seed))
        per_frame = given.repeat_interleave(len(x) // frames)
        assert torch.equal(x[per_frame], patchify(clean, 2)[per_frame])
        assert torch.equal(weight, (~per_frame).float())
        assert (pack.t_M[index[per_frame]] == 0).all()
        assert len(set(pack.t_M[index[~per_frame]].tolist())) == 1 and (pack.t_M[index[~per_frame]] > 0).all()
    assert [int(w.sum()) for w in by_clip(pack, pack.weight_N)][:3] == [5 * 6, 4 * 6, 16]


def test_the_weight_is_known_before_anything_is_encoded(clips: list[Clip]) -> None:
    task = make_task()
    for chosen in ([], clips[:1], clips[1:3], clips):
        assert task.weight(Pack(chosen)) == task.prepare(Pack(chosen)).video.weight_N.sum().item()


def test_noise_and_timesteps_are_the_same_whatever_the_packing(clips: list[Clip]) -> None:
    task = make_task()
    together = task.prepare(Pack(clips)).video
    other = task.prepare(Pack(clips[::-1])).video
    for n, clip in enumerate(clips):
        alone = task.prepare(Pack([clip])).video
        for pack, place in ((together, n), (other, len(clips) - 1 - n)):
            for name in ("x_NP", "target_NP", "weight_N", "level_N"):
                assert torch.equal(by_clip(pack, getattr(pack, name))[place], getattr(alone, name))
            t_N = pack.t_M[pack.t_of_N]
            assert torch.equal(by_clip(pack, t_N)[place], alone.t_M[alone.t_of_N])


def test_two_visits_of_one_sample_get_other_noise(make_clip: MakeClip) -> None:
    one = make_clip((5, 16, 16), 1)
    two = replace(one, visit=replace(one.visit, seed=2))
    a, b = (make_task().prepare(Pack([clip])).video for clip in (one, two))
    assert not torch.equal(a.t_M, b.t_M)
    assert abs(np.corrcoef((a.target_NP).flatten(), b.target_NP.flatten())[0, 1]) < 0.5


def test_an_empty_pack_has_no_weight_and_a_finite_loss_that_reaches_the_network() -> None:
    task, network = make_task(), nn.Linear(12, 12)
    network.forward = lambda pack: nn.functional.linear(pack.video.x_NP, network.weight, network.bias)  # type: ignore[method-assign]
    loss = task.loss(network, Pack([]))
    loss.sum.backward()
    assert task.weight(Pack([])) == 0.0 and loss.sum.item() == 0.0
    assert loss.level_weight.sum() == 0
    assert network.weight.grad is not None and not network.weight.grad.any()


def test_the_loss_is_squared_error_per_number_summed_over_tokens_that_bear_it(clips: list[Clip]) -> None:
    task = make_task()
    pack = task.prepare(Pack(clips)).video
    expected = (pack.target_NP.double() ** 2).mean(1)[pack.weight_N > 0].sum().item()
    loss = task.loss(Zero(), Pack(clips))
    assert loss.sum.item() == pytest.approx(expected, rel=1e-5)
    assert loss.level_sum.shape == loss.level_weight.shape == (LEVELS,)
    assert loss.level_sum.sum().item() == pytest.approx(expected, rel=1e-5)
    assert loss.level_weight.sum().item() == task.weight(Pack(clips))


def test_captions_are_dropped_by_the_visits_own_draw(make_clip: MakeClip) -> None:
    clips = [make_clip((1, 8, 8), seed, "image", "five words in a row") for seed in range(400)]
    texts = {rate: make_task(caption_dropout=rate).prepare(Pack(clips)).video.layout.texts for rate in (0.0, 0.25, 1.0)}
    assert set(texts[0.0]) == {6} and set(texts[1.0]) == {1}
    assert 70 < texts[0.25].count(1) < 130
    assert texts[0.25] == make_task(caption_dropout=0.25).prepare(Pack(clips)).video.layout.texts


@pytest.mark.parametrize(
    ("t", "shift", "result"), [(0.5, 1.0, 0.5), (0.5, 3.0, 0.75), (0.0, 3.0, 0.0), (1.0, 3.0, 1.0)]
)
def test_the_shift_moves_towards_noise_and_keeps_the_ends(t: float, shift: float, result: float) -> None:
    assert shifted(t, shift) == pytest.approx(result)


def test_timesteps_follow_their_distribution() -> None:
    def draw(**changes: object) -> np.ndarray:
        config = replace(FlowConfig(shift=1.0), **changes)
        return np.array([draw_timesteps(config, seed, (1, 2, 2))[0] for seed in range(4000)])

    uniform = draw(timesteps=Timesteps.uniform)
    assert np.abs(np.sort(uniform) - (np.arange(4000) + 0.5) / 4000).max() < 1.95 / math.sqrt(4000)  # p = 0.001
    logit = np.log(draw(mean=0.5, std=0.8) / (1 - draw(mean=0.5, std=0.8)))
    assert abs(logit.mean() - 0.5) < 0.05 and abs(logit.std() - 0.8) < 0.04
    shifted_up = draw(timesteps=Timesteps.uniform, shift=3.0)
    np.testing.assert_allclose(shifted_up, 3 * uniform / (1 + 2 * uniform))
    assert all(values.min() > 0 and values.max() < 1 for values in (uniform, shifted_up))


def test_a_share_of_clips_has_a_timestep_per_frame_and_given_frames_stay_clean(clips: list[Clip]) -> None:
    task = make_task(per_frame_noise=1.0)
    pack = task.prepare(Pack(clips)).video
    clean = torch.cat([patchify(encode(c.video_TCHW.transpose(0, 1)[None])[0], 2) for c in clips])
    t_N = pack.t_M[pack.t_of_N]
    torch.testing.assert_close(pack.x_NP, clean + t_N.unsqueeze(1) * pack.target_NP, rtol=1e-5, atol=1e-5)
    assert torch.equal(pack.level_N[pack.weight_N > 0], t_N[pack.weight_N > 0])
    assert not t_N[pack.weight_N == 0].any()
    for clip, t in zip(clips, by_clip(pack, t_N), strict=True):
        per_frame = t.unflatten(0, (GEOMETRY.grid(*clip.visit.size)[0], -1))
        generated = per_frame[per_frame[:, 0] > 0]
        assert (generated == generated[:, :1]).all() and len(set(generated[:, 0].tolist())) == len(generated)
    clip_of_N = torch.arange(4).repeat_interleave(torch.tensor(pack.layout.lengths))
    assert torch.equal(pack.clip_of_M[pack.t_of_N], clip_of_N)
    shares = [
        len(set(draw_timesteps(FlowConfig(per_frame_noise=0.3, shift=1.0), seed, (5, 2, 2)))) for seed in range(1000)
    ]
    assert set(shares) == {1, 5} and 240 < shares.count(5) < 360
    drawn = [
        t for seed in range(2000) for t in draw_timesteps(FlowConfig(per_frame_noise=1.0, shift=1.0), seed, (2, 2, 2))
    ]
    logit = np.log(np.array(drawn) / (1 - np.array(drawn)))
    assert abs(logit.mean()) < 0.05 and abs(logit.std() - 1) < 0.04


def test_weighted_by_clip_every_clip_counts_alike(clips: list[Clip]) -> None:
    task = make_task(weighting=Weighting.clip)
    pack = task.prepare(Pack(clips)).video
    assert task.weight(Pack(clips)) == 4 and task.weight(Pack([])) == 0
    assert [w.sum().item() for w in by_clip(pack, pack.weight_N)] == pytest.approx([1.0] * 4)
    means = [
        (target.square().mean(1) * (weight > 0)).sum() / (weight > 0).sum()
        for target, weight in zip(by_clip(pack, pack.target_NP), by_clip(pack, pack.weight_N), strict=True)
    ]
    assert task.loss(Zero(), Pack(clips)).sum.item() == pytest.approx(sum(means).item(), rel=1e-5)


def test_the_loss_by_task_is_that_of_its_clips(clips: list[Clip]) -> None:
    task = make_task()
    total, weight = task.loss(Zero(), Pack([*clips, replace(clips[0])])).by_task
    for clip in clips:
        times = 1 + (clip is clips[0])
        alone = task.loss(Zero(), Pack([clip]))
        place = TASKS.index(clip.visit.task)
        assert total[place].item() == pytest.approx(times * alone.sum.item(), rel=1e-5)
        assert weight[place].item() == times * task.weight(Pack([clip]))
    assert weight.count_nonzero() == len(clips)
    assert not task.loss(Zero(), Pack([])).by_task.any()


def test_a_cache_encodes_each_clip_once_and_keeps_to_its_room(clips: list[Clip]) -> None:
    calls: list[tuple[int, ...]] = []

    def counted(video_BCTHW: Tensor) -> Tensor:
        calls.append(tuple(video_BCTHW.shape))
        return encode(video_BCTHW)

    def task(room: int) -> DiffusionLearner:
        return diffusion(FlowConfig(), GEOMETRY, 3, counted, lambda texts: tokenize_captions(texts, 64, 32), room)

    cached, plain = task(1 << 20), task(0)
    first, again = cached.prepare(Pack(clips)).video, cached.prepare(Pack(clips)).video
    assert calls == [(1, 3, *clip.video_TCHW.shape[:1], *clip.video_TCHW.shape[2:]) for clip in clips]
    assert torch.equal(first.x_NP, again.x_NP)
    assert torch.equal(first.x_NP, plain.prepare(Pack(clips)).video.x_NP)
    calls.clear()
    cramped = task(1)  # no room for anything: everything is encoded anew
    cramped.prepare(Pack(clips))
    cramped.prepare(Pack(clips))
    assert len(calls) == 2 * len(clips)


@pytest.mark.parametrize("prediction", [Prediction.x0, Prediction.noise])
def test_data_or_noise_that_is_known_gives_the_velocity(clips: list[Clip], prediction: Prediction) -> None:
    pack = make_task(per_frame_noise=0.5).prepare(Pack(clips)).video
    t_N1 = pack.t_M[pack.t_of_N].unsqueeze(1)
    data = pack.x_NP - t_N1 * pack.target_NP
    known = data if prediction is Prediction.x0 else data + pack.target_NP
    apart = t_N1 if prediction is Prediction.x0 else 1.0 - t_N1
    found = velocity(prediction, known, pack)
    assert found.isfinite().all(), "given frames stand at t = 0"
    clear = (apart > 0.05).squeeze(1)
    torch.testing.assert_close(found[clear], pack.target_NP[clear], rtol=1e-3, atol=1e-3)
    near = ~clear & (pack.weight_N > 0)
    assert (found[near].abs() <= pack.target_NP[near].abs() + 1e-4).all(), "no division by what is nearly nothing"


def test_the_shift_grows_with_the_root_of_the_tokens() -> None:
    flow = FlowConfig(shift=3.0, shift_tokens=64)
    assert [shift_of(flow, grid) for grid in ((1, 8, 8), (4, 8, 8), (1, 4, 4))] == [3.0, 6.0, 1.5]
    assert shift_of(FlowConfig(shift=3.0), (4, 8, 8)) == 3.0
    for seed in range(50):
        small, large = (draw_timesteps(flow, seed, grid)[0] for grid in ((1, 8, 8), (4, 8, 8)))
        assert large == pytest.approx(shifted(shifted(small, 1 / 3.0), 6.0))


def test_the_cache_tells_training_and_validation_samples_apart(make_clip: Callable[..., Clip]) -> None:
    """Both number their samples from 0: clips that are alike in all but their pixels must not share latents."""
    ours = make_clip((9, 16, 16), seed=1)
    theirs = replace(ours, video_TCHW=255 - ours.video_TCHW)
    cached = diffusion(FlowConfig(), GEOMETRY, 3, encode, lambda texts: tokenize_captions(texts, 64, 32), 1 << 20)
    plain = diffusion(FlowConfig(), GEOMETRY, 3, encode, lambda texts: tokenize_captions(texts, 64, 32))
    for clip in (ours, theirs, ours):
        assert torch.equal(cached.prepare(Pack([clip])).video.x_NP, plain.prepare(Pack([clip])).video.x_NP)
