"""Latents to tokens and back, in a fixed order."""

from __future__ import annotations

import pytest
import torch

from sora_train.flow.patches import patchify, unpatchify


@pytest.mark.parametrize(("shape", "patch"), [((4, 3, 4, 6), 2), ((1, 1, 2, 2), 1), ((6, 2, 9, 3), 3)])
def test_a_round_trip_loses_nothing(shape: tuple[int, int, int, int], patch: int) -> None:
    latents = torch.randn(shape)
    channels, frames, height, width = shape
    grid = (frames, height // patch, width // patch)
    tokens = patchify(latents, patch)
    assert tokens.shape == (grid[0] * grid[1] * grid[2], patch**2 * channels)
    assert torch.equal(unpatchify(tokens, grid, patch), latents)


def test_tokens_run_over_time_height_width_and_their_numbers_over_height_width_channel() -> None:
    c, t, h, w = torch.meshgrid(*(torch.arange(n) for n in (2, 2, 4, 4)), indexing="ij")
    tokens = patchify(1000 * c + 100 * t + 10 * h + w, 2)
    assert tokens[0].tolist() == [0, 1000, 1, 1001, 10, 1010, 11, 1011]
    assert tokens[:, 0].tolist() == [0, 2, 20, 22, 100, 102, 120, 122]
