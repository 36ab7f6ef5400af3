"""Pieces of a long video see an earlier frame, and go on from the one before as without it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sora_train.config.schema import Config, StageConfig
from sora_train.core.cli import InputError
from sora_train.flow.ode import Request, noise_of
from sora_train.generation.long_video import in_pieces
from sora_train.generation.memory import BEFORE_OVERLAP, Memory, remembers
from sora_train.generation.requests import Prompt, Shot
from tests.generation.test_requests import MADE, Recorder, numbers

SIZE = (9, 16, 16)
FOREVER = [Shot(float("inf"), "x")]


class Remembering(Recorder):
    """A recorder whose clips count on from the overlap, wherever in the clip that is."""

    def latents(self, requests: list[Request]) -> list[Tensor]:
        (request,) = requests
        if request.held is None or not request.held.skipped:
            return super().latents(requests)
        self.requests.append(request)
        first = int(request.held.latents_CTHW[0, 0, 0, 0]) - 2 * request.held.skipped
        return [(first + 2 * torch.arange(5) + MADE).view(1, 5, 1, 1).expand(3, 5, 16, 16)]


def frame(value: int) -> np.ndarray:
    return np.full((2, 2, 3), value, dtype=np.uint8)


def pieces(config: Config, sampler: Any, prompt: Prompt, frames: int) -> list[np.ndarray]:
    return list(in_pieces(config, sampler, prompt, SIZE, frames, 5, overlap=1, loop=False, memory=True))


def test_every_piece_but_the_first_sees_the_frame_that_differs_most_from_the_last(config: Config) -> None:
    sampler: Any = Remembering()
    made = pieces(config, sampler, Prompt(FOREVER), 17)
    assert numbers(made) == list(range(17))
    assert [len(piece) for piece in made] == [9, 4, 4], "two latents of a piece's five: the rest is seen or held to"
    first, *others = sampler.requests
    assert first.held is None and not first.given
    assert [[(at, int(x[0, 0, 0, 0])) for at, x in r.given] for r in others] == [[(0, 0)], [(0, 0)]]
    assert [r.held.places for r in others] == [range(2, 3)] * 2
    assert [r.held.latents_CTHW[0, :, 0, 0].tolist() for r in others] == [[8 + MADE], [12 + MADE]]
    noises = [noise_of(r, config.vae.channels, config.model.patch) for r in sampler.requests]
    for before, noise in zip(noises, noises[1:], strict=False):
        assert torch.equal(noise[:, 2], before[:, 4]) and not torch.equal(noise[:, 3:], before[:, 3:])


def test_a_new_shot_sees_an_earlier_frame_and_begins_from_the_last_one(config: Config) -> None:
    sampler: Any = Remembering()
    made = pieces(config, sampler, Prompt([Shot(2.25, "a"), Shot(1.0, "b")]), 13)
    first, turn = sampler.requests
    assert (first.caption, turn.caption, len(made[0])) == ("a", "b", 9)
    assert [(at, int(x[0, 0, 0, 0])) for at, x in turn.given] == [(0, 0)]
    assert turn.held.places == range(BEFORE_OVERLAP, BEFORE_OVERLAP + 1)
    assert turn.held.latents_CTHW[0, :, 0, 0].tolist() == [8], "the last frame of a, standing still"


def test_what_is_given_is_remembered_but_the_first_piece_begins_from_it_alone(config: Config) -> None:
    given = np.broadcast_to(np.arange(100, 109, dtype=np.uint8)[:, None, None, None], (9, 16, 16, 3))
    sampler: Any = Remembering()
    pieces(config, sampler, Prompt(FOREVER, before=given), 12)
    first, second = sampler.requests
    assert first.held is None and [at for at, _ in first.given] == [0]
    assert [(at, int(x[0, 0, 0, 0])) for at, x in second.given] == [(0, 100)]


def test_the_frames_kept_are_spread_over_the_video_and_bounded() -> None:
    memory = Memory(frame(255))
    assert memory.recall(frame(0)) is None, "nothing was made yet"
    for number in range(1000):
        memory.add(frame(number // 4))
    found = memory.recall(frame(255))
    assert found is not None and found.max() < 4, "the earliest is the most different"
    assert len(memory._frames) <= 64 and {int(f[0, 0, 0]) // 64 for f in memory._frames} == {0, 1, 2, 3}


def test_a_run_has_memory_if_it_trained_that(config: Config) -> None:
    assert not remembers(config)
    assert remembers(replace(config, flow=replace(config.flow, tasks={"memory": 0.1, "text_to_video": 0.9})))
    stages = [StageConfig(until_step=5), StageConfig(tasks={"memory": 1.0})]
    assert remembers(replace(config, data=replace(config.data, stages=stages)))


def test_memory_needs_room(config: Config) -> None:
    with pytest.raises(InputError, match="memory and overlap=2 leave nothing to make in a piece of 4 latent frames"):
        list(in_pieces(config, Recorder(), Prompt(FOREVER), (7, 16, 16), 20, 5, overlap=2, loop=False, memory=True))  # type: ignore[arg-type]
