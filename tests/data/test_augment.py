"""Augmentations: pixels and caption change together, by the visit alone, and never in what is kept."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from sora_train.config.rules import check
from sora_train.config.schema import Config, DataConfig, SourceConfig
from sora_train.core.cli import InputError
from sora_train.data.augment import augmented, mirror
from sora_train.data.read.pool import Pool
from tests.data.test_loader import clips_of, load, make_plan, pool

__all__ = ["pool"]
FRAMES = np.arange(2 * 2 * 3 * 3, dtype=np.uint8).reshape(2, 2, 3, 3)


@pytest.mark.parametrize(
    ("caption", "swapped"),
    [
        ("a ring moves to the left", "a ring moves to the right"),
        ("LEFT of it, a Right-hand glove, rightmost", "RIGHT of it, a Left-hand glove, leftmost"),
        ("leftwards, then rightward", "rightwards, then leftward"),
        ("bright leftovers, rightly so", "bright leftovers, rightly so"),
    ],
)
def test_mirror_turns_pixels_and_words_together(caption: str, swapped: str) -> None:
    seen = {}
    for seed in range(40):
        frames, text = augmented("mirror", mirror, FRAMES, caption, seed)
        turned = not np.array_equal(frames, FRAMES)
        assert np.array_equal(frames, FRAMES[:, :, ::-1] if turned else FRAMES)
        assert text == (swapped if turned else caption)
        seen[turned] = seen.get(turned, 0) + 1
        again = augmented("mirror", mirror, FRAMES, caption, seed)
        assert np.array_equal(again[0], frames) and again[1] == text
    assert 10 <= seen[True] <= 30


def test_an_augmentation_cannot_spoil_what_is_kept_or_change_a_clip_s_size() -> None:
    def writes(frames, caption, rng):  # type: ignore[no-untyped-def]
        frames[:] = 0
        return frames, caption

    with pytest.raises(ValueError, match="read-only"):
        augmented("writes", writes, FRAMES, "", 0)
    with pytest.raises(InputError, match=r"data.augment=cuts made \(1, 2, 3, 3\) of uint8 from a clip \(2, 2, 3, 3\)"):
        augmented("cuts", lambda frames, caption, rng: (frames[:1], caption), FRAMES, "", 0)


def test_training_clips_are_augmented_the_same_for_any_number_of_ranks(corpus: list[str], pool: Pool) -> None:
    plan, change = make_plan(corpus), partial(augmented, "mirror", mirror)
    plain = {clip.visit.seed: clip for clip in clips_of(load(plan, pool, 0, 1, 2))}
    alone = {clip.visit.seed: clip for clip in clips_of(load(plan, pool, 0, 1, 2, augment=change, cache_bytes=1 << 24))}
    parts = [load(plan, pool, rank, 2, 2, augment=change) for rank in (0, 1)]
    together = {clip.visit.seed: clip for steps in parts for clip in clips_of(steps)}
    assert alone.keys() == plain.keys() == together.keys()
    turned = 0
    for seed, clip in alone.items():
        assert clip.caption == together[seed].caption
        assert np.array_equal(clip.video_TCHW.numpy(), together[seed].video_TCHW.numpy())
        expected, caption = change(plain[seed].video_TCHW.permute(0, 2, 3, 1).numpy(), plain[seed].caption, seed)
        assert clip.caption == caption and np.array_equal(clip.video_TCHW.permute(0, 2, 3, 1).numpy(), expected)
        turned += not np.array_equal(clip.video_TCHW.numpy(), plain[seed].video_TCHW.numpy())
    assert 0 < turned < len(alone)


def test_unknown_names_and_caches_of_latents_are_refused() -> None:
    config = Config(run_dir="x", steps=1, data=DataConfig({"mine": SourceConfig(["x.tar"])}, augment="miror"))
    with pytest.raises(InputError, match="data.augment=miror; .*mirror"):
        check(config)
    config.data.augment, config.vae.cache_mib = "mirror", 64
    with pytest.raises(InputError, match="vae.cache_mib=64 keeps the latents"):
        check(config)
