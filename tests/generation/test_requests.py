"""Given frames, shots and pieces come where they belong."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor

from sora_train.config.load import build
from sora_train.config.schema import Config, TileConfig
from sora_train.core.cli import InputError
from sora_train.core.media import read_mp4
from sora_train.encoding.vae import FrozenVae
from sora_train.flow.ode import Request, noise_of
from sora_train.generation.long_video import in_pieces
from sora_train.generation.output import save_sample
from sora_train.generation.requests import Prompt, Shot, clip_size, read_shots, spans
from sora_train.generation.sampler import Sampler
from sora_train.models.video_model import build_video_model

SIZE = (9, 16, 16)


MADE = 0.25  # marks latents that the model made; what is encoded from pixels is whole


class Recorder:
    """A sampler whose latents are the numbers of their last frames, whose clips count on from what is given, and that
    keeps its requests and how many latents were decoded together."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.decoded: list[int] = []
        self.vae: Any = SimpleNamespace(encode=self.encode, decode=self.decode)

    def encode(self, video_BCTHW: Tensor) -> Tensor:
        return video_BCTHW[:, :, ::2].float()

    def decode(self, latents_CTHW: Tensor) -> np.ndarray:
        self.decoded.append(latents_CTHW.shape[1])
        last = latents_CTHW[0, :, 0, 0].int()
        frames = torch.stack((last - 1, last), dim=1).flatten()[1:].numpy()
        return np.broadcast_to(frames.astype(np.uint8)[:, None, None, None], (len(frames), 16, 16, 3)).copy()

    def latents(self, requests: list[Request]) -> list[Tensor]:
        (request,) = requests
        self.requests.append(request)
        known = [latents for first, latents in request.given if first == 0]
        known += [] if request.held is None else [request.held.latents_CTHW]
        first = int(known[0][0, 0, 0, 0]) if known else 0
        return [(first + 2 * torch.arange(5) + MADE).view(1, 5, 1, 1).expand(3, 5, 16, 16)]


def numbers(pieces: Any) -> list[int]:
    return [int(frame[0, 0, 0]) for piece in pieces for frame in piece]


def test_a_long_video_is_held_to_the_latents_and_the_noise_of_the_overlap(config: Config) -> None:
    sampler: Any = Recorder()
    made = list(in_pieces(config, sampler, Prompt([Shot(float("inf"), "x")]), SIZE, 26, 5, overlap=2, loop=False))
    assert numbers(made) == list(range(26))
    assert [len(piece) for piece in made] == [7, 6, 6, 7], "what the next piece makes anew isn't shown, but at the end"
    first, *others = sampler.requests
    assert first.held is None and not any(r.given for r in sampler.requests)
    held = [r.held.latents_CTHW[0, :, 0, 0].tolist() for r in others]
    assert held == [[6, 8 + MADE], [12, 14 + MADE], [18, 20 + MADE]], "only a clip's first latent is encoded anew"
    noises = [noise_of(r, config.vae.channels, config.model.patch) for r in sampler.requests]
    for request, before, noise in zip(others, noises, noises[1:], strict=False):
        assert torch.equal(request.held.noise_CTHW, before[:, 3:]) and torch.equal(noise[:, :2], before[:, 3:])
        assert not torch.equal(noise[:, 2:], before[:, :3])
    assert sampler.decoded == [4, 4 + 3, 5 + 3, 5 + 4], "new ones after those before them, at most a piece of those"
    assert len({r.seed for r in sampler.requests}) == 4 and first.seed == 5


def test_a_seam_is_decoded_like_any_other_place(config: Config) -> None:
    """The frames of all pieces are those of their latents decoded at once, whatever a network makes."""
    vae = FrozenVae.load(config.vae, torch.device("cpu"))
    drawn: list[Tensor] = []

    class Drawn(Sampler):
        def latents(self, requests: Any) -> list[Tensor]:
            drawn.append(torch.randn(4, 9, 4, 4, generator=torch.Generator().manual_seed(len(drawn))))
            return drawn[-1:]

    sampler = Drawn(config, build_video_model(config), vae, torch.device("cpu"))
    pieces = in_pieces(config, sampler, Prompt([Shot(float("inf"), "x")]), (17, 16, 16), 45, 0, overlap=2, loop=False)
    made = np.concatenate(list(pieces))
    at_once = vae.decode(torch.cat((drawn[0][:, :8], drawn[1][:, 1:8], drawn[2][:, 1:]), dim=1))
    assert made.shape == (45, 16, 16, 3)
    assert np.abs(made.astype(int) - at_once[:45]).max() <= 1
    alone = vae.decode(drawn[1])[1:15]
    assert np.abs(alone.astype(int) - at_once[15:29])[0].max() > 1, "what stands before does show"


def test_a_long_video_goes_on_from_what_is_given_and_does_not_repeat_it(config: Config) -> None:
    given = np.broadcast_to(np.arange(7, dtype=np.uint8)[:, None, None, None], (7, 16, 16, 3))
    sampler: Any = Recorder()
    prompt = Prompt([Shot(float("inf"), "x")], before=given)
    assert numbers(in_pieces(config, sampler, prompt, SIZE, 10, 5, overlap=1, loop=False)) == list(range(7, 17))


def test_a_new_shot_begins_from_the_last_frame_before_it(config: Config) -> None:
    sampler: Any = Recorder()
    shots = [Shot(2.5, "a"), Shot(0.01, "no frame of this one"), Shot(2.0, "b"), Shot(1.0, "never reached")]
    made = list(in_pieces(config, sampler, Prompt(shots), SIZE, 17, 5, overlap=2, loop=False))
    per_second = config.data.made_fps
    assert numbers(made) == list(range(17)) and per_second == 4.0
    first, more, turn = sampler.requests
    assert [r.caption for r in sampler.requests] == ["a", "a", "b"] and not any(r.shots for r in sampler.requests)
    assert more.held is not None and not first.given and not more.given
    ((place, latents),) = turn.given
    assert turn.held is None and (place, latents.shape[1], int(latents[0, 0, 0, 0])) == (0, 1, 9), "ten frames of a"
    assert len({r.seed for r in sampler.requests}) == 3


@pytest.mark.parametrize("overlap", [1, 2])
def test_the_end_of_a_loop_is_held_to_its_beginning_as_a_piece_is_to_the_one_before(
    config: Config, overlap: int
) -> None:
    sampler: Any = Recorder()
    made = numbers(
        in_pieces(config, sampler, Prompt([Shot(float("inf"), "x")]), SIZE, 20, 5, overlap=overlap, loop=True)
    )
    first, closing = sampler.requests[0], sampler.requests[-1]
    shown, last = {1: (17, 6), 2: (19, 6)}[overlap]
    assert closing.held.latents_CTHW[0, :, 0, 0].tolist() == [shown - 1, shown + 1 + MADE][:overlap]
    assert closing.held_end.latents_CTHW[0, :, 0, 0].tolist() == [2 + MADE, 4 + MADE][:overlap] and not closing.given
    noise = noise_of(first, config.vae.channels, config.model.patch)
    assert torch.equal(closing.held_end.noise_CTHW, noise[:, 1 : 1 + overlap]) and closing.held_end.release
    skipped = 2 * overlap - 1  # what stands before the last latent of the overlap is made anew, and shown at the end
    assert made == [*range(skipped, shown + last)]


def test_a_loop_of_what_was_given_leads_back_to_that(config: Config) -> None:
    """A beginning that is given isn't made anew: the end is held to all of it, up to the frame before the first."""
    given = np.broadcast_to(np.arange(7, dtype=np.uint8)[:, None, None, None], (7, 16, 16, 3))
    sampler: Any = Recorder()
    prompt = Prompt([Shot(float("inf"), "x")], before=given, opening=given[:5])
    assert numbers(in_pieces(config, sampler, prompt, SIZE, 10, 5, overlap=2, loop=True)) == list(range(7, 7 + 10 + 3))
    held = sampler.requests[-1].held_end
    assert held.latents_CTHW[0, :, 0, 0].tolist() == [2, 4] and not held.release


def test_a_loop_of_an_image_leads_back_to_it_and_what_follows(config: Config) -> None:
    sampler: Any = Recorder()
    given = np.zeros((1, 16, 16, 3), np.uint8)
    prompt = Prompt([Shot(float("inf"), "x")], before=given, opening=given)
    made = numbers(in_pieces(config, sampler, prompt, SIZE, 10, 5, overlap=2, loop=True))
    held = sampler.requests[-1].held_end
    assert held.latents_CTHW[0, :, 0, 0].tolist() == [2, 4], "the frames that were made after the image"
    assert made[0] == 1


def test_an_overlap_without_room_is_refused(config: Config) -> None:
    sampler: Any = Recorder()
    with pytest.raises(InputError, match="overlap=3 of a piece's 5 latent frames; at most 2"):
        next(iter(in_pieces(config, sampler, Prompt([Shot(float("inf"), "x")]), SIZE, 26, 5, overlap=3, loop=False)))


def test_shots_are_told_by_the_time_of_each_latent_frame() -> None:
    shots = [Shot(1.0, "a"), Shot(1.5, "b"), Shot(1.0, "c")]
    assert spans(shots, 5, 0, 2, 4.0) == ((3, "a"), (2, "b"))  # frames 0, 1, 3 | 5, 7 at four a second
    assert spans(shots, 5, 6, 2, 4.0) == ((3, "b"), (2, "c"))  # 6, 7, 9 | 11, 13
    assert spans(shots, 5, 60, 2, 4.0) == ((5, "c"),)
    assert spans([Shot(float("inf"), "a")], 5, 0, 2, 4.0) == ((5, "a"),)


def test_shots_are_a_json_list() -> None:
    text = '[{"seconds": 2, "caption": "a: b #1"}, {"seconds": 0.5, "caption": ""}]'
    assert read_shots(text) == [Shot(2.0, "a: b #1"), Shot(0.5, "")]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "[3]", '[{"seconds": 0, "caption": "a"}]', '[{"second": 1, "caption": "a"}]', "{seconds: 1}",
     '[{"seconds": true, "caption": "a"}]', '[{"seconds": NaN, "caption": "a"}]', '[{"seconds": 1, "caption": 3}]'],
)  # fmt: skip
def test_a_list_that_is_no_shots_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="shots") as refused:
        read_shots(text)
    assert "\n" not in str(refused.value)


def test_memory_is_flat_in_the_length_of_a_video(tmp_path: Path) -> None:
    peaks = []
    for count in (16, 64):
        pieces = (np.full((16, 128, 128, 3), n, dtype=np.uint8) for n in range(count))
        tracemalloc.start()
        path = save_sample(tmp_path, str(count), pieces, 8.0, {})
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(read_mp4(path)[0]) == 16 * count
    assert peaks[1] < peaks[0] + 4 * 16 * 128 * 128 * 3, "what the sheet shows, not sixty pieces more"


def test_a_large_video_goes_through_the_vae_in_pieces_and_tiles(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = FrozenVae.load(config.vae, torch.device("cpu"))
    parts = FrozenVae.load(replace(config.vae, tile=TileConfig(4, 16, 24)), torch.device("cpu"))
    video = torch.randint(0, 256, (1, 3, 9, 32, 48), dtype=torch.uint8)
    latents = whole.encode(video)
    largest: list[int] = []
    layer = parts.vae.encoder.layers[0]
    layer.register_forward_pre_hook(lambda _, arguments: largest.append(arguments[0][0, 0].numel()))
    torch.testing.assert_close(parts.encode(video), latents, rtol=1e-4, atol=1e-5)
    assert len(largest) == 12 and max(largest) <= 5 * 8 * 12, "six tiles of two pieces"
    difference = parts.decode(latents[0]).astype(int) - whole.decode(latents[0])
    assert abs(difference).max() <= 1 and difference.shape == (9, 32, 48, 3)


def test_given_frames_come_back_as_from_the_vae_alone(config: Config) -> None:
    """Both ends of a clip whose middle is made by a network that nobody trained."""
    vae = FrozenVae.load(config.vae, torch.device("cpu"))
    sampler = Sampler(config, build_video_model(config).eval(), vae, torch.device("cpu"))
    before, after = (
        np.random.default_rng(n).integers(0, 255, (count, 24, 24, 3), dtype=np.uint8) for n, count in ((0, 3), (1, 5))
    )
    request = Prompt([Shot(float("inf"), "x")], before, after, most=2).request(config, vae, (9, 24, 24), 3)
    (video,) = sampler.videos([request])
    alone = [vae.decode(vae.encode(torch.from_numpy(f).permute(3, 0, 1, 2)[None])[0]) for f in (before, after)]
    assert np.abs(video[:3].astype(int) - alone[0]).max() <= 1
    assert np.array_equal(video[5:], alone[1][1:]), "and what is given at the end, without the frame it was led by"


@pytest.mark.parametrize(
    ("given", "height", "width", "size"),
    [
        (None, None, None, (480, 832)),
        (None, 960, None, (960, 1664)),
        (None, None, 1664, (960, 1664)),
        ((100, 100), None, None, (640, 640)),
        ((100, 50), 384, None, (384, 192)),
        (None, 64, 64, (64, 64)),
    ],
)
def test_a_clip_has_the_shape_of_what_is_given_else_the_configured_one(
    compose_tree: Callable[..., DictConfig], given: tuple[int, int] | None, height: int | None, width: int | None,
    size: tuple[int, int],
) -> None:  # fmt: skip
    tree = compose_tree(
        "experiment=demo", "vae.strides=[[1,2],[2,2],[2,2]]", "vae.widths=[4,4,4,4]", "vae.blocks=[0,0,0,0]",
        "model.patch=1", "data.max_pixels=399360", "flow.sampling_aspect=[480,832]",
    )  # fmt: skip
    assert clip_size(build(tree, need_vae=False), given, height, width, None)[1:] == size
