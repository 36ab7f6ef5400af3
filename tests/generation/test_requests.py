"""Given frames, shots and pieces come where they belong, and every task of the command line makes its video."""

from __future__ import annotations

import json
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from sora_train import sample
from sora_train.config.load import build, to_yaml
from sora_train.config.schema import VAE_USE, Config, TileConfig, VaeConfig
from sora_train.core.cli import InputError
from sora_train.core.media import read_mp4, write_mp4
from sora_train.encoding.vae import FrozenVae
from sora_train.flow.ode import Request, noise_of
from sora_train.generation.long_video import in_pieces
from sora_train.generation.requests import Prompt, Shot, read_shots, spans
from sora_train.generation.sampler import Sampler, save_sample
from sora_train.models.video_model import build_video_model
from sora_train.models.video_vae.model import build_vae

SIZE = (9, 16, 16)


@pytest.fixture
def config(compose_tree: Callable[..., DictConfig], tmp_path: Path) -> Config:
    """A small model on a VAE of stride 2."""
    torch.manual_seed(0)
    vae = VaeConfig(widths=[8, 8], blocks=[0, 1], channels=4, strides=[[2, 1]], patch=4)
    (tmp_path / "vae").mkdir()
    save_file(build_vae(vae).state_dict(), tmp_path / "vae" / "vae.safetensors")
    shape = {key: value for key, value in asdict(vae).items() if key not in VAE_USE}
    (tmp_path / "vae" / "config.json").write_text(json.dumps(shape))
    small = ("model.width=32", "model.depth=1", "model.heads=2", "model.ffn=32", "text_encoder.width=16")
    here = (f"vae.path={tmp_path}/vae", f"run_dir={tmp_path}/run", "data.max_pixels=256", "flow.sampling_steps=1")
    return build(compose_tree("experiment=demo", *small, *here))


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
    made = list(in_pieces(config, sampler, Prompt(read_shots("x")), SIZE, 26, 5, overlap=2, loop=False))
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
    pieces = in_pieces(config, sampler, Prompt(read_shots("x")), (17, 16, 16), 45, 0, overlap=2, loop=False)
    made = np.concatenate(list(pieces))
    at_once = vae.decode(torch.cat((drawn[0][:, :8], drawn[1][:, 1:8], drawn[2][:, 1:]), dim=1))
    assert made.shape == (45, 16, 16, 3)
    assert np.abs(made.astype(int) - at_once[:45]).max() <= 1
    alone = vae.decode(drawn[1])[1:15]
    assert np.abs(alone.astype(int) - at_once[15:29])[0].max() > 1, "what stands before does show"


def test_a_long_video_goes_on_from_what_is_given_and_does_not_repeat_it(config: Config) -> None:
    given = np.broadcast_to(np.arange(7, dtype=np.uint8)[:, None, None, None], (7, 16, 16, 3))
    sampler: Any = Recorder()
    prompt = Prompt(read_shots("x"), before=given)
    assert numbers(in_pieces(config, sampler, prompt, SIZE, 10, 5, overlap=1, loop=False)) == list(range(7, 17))


@pytest.mark.parametrize("overlap", [1, 2])
def test_a_loop_leads_back_to_its_first_frame(config: Config, overlap: int) -> None:
    sampler: Any = Recorder()
    made = numbers(in_pieces(config, sampler, Prompt(read_shots("x")), SIZE, 20, 5, overlap=overlap, loop=True))
    closing = sampler.requests[-1]
    shown, last = {1: (17, 5), 2: (19, 3)}[overlap]
    assert closing.held.latents_CTHW[0, :, 0, 0].tolist() == [shown - 1, shown + 1 + MADE][:overlap]
    ((first, end),) = closing.given
    assert (first, end[0, :, 0, 0].tolist()) == (5 - overlap, [2, 4][:overlap])
    assert made == [*range(shown + last)], "some new frames, and the one after them is the first again"


def test_a_loop_of_what_was_given_leads_back_to_the_first_new_frame(config: Config) -> None:
    """Its first piece shows four frames, too few for an end of two latent frames: one is given, and one more made."""
    given = np.broadcast_to(np.arange(7, dtype=np.uint8)[:, None, None, None], (7, 16, 16, 3))
    sampler: Any = Recorder()
    prompt = Prompt(read_shots("x"), before=given)
    assert numbers(in_pieces(config, sampler, prompt, SIZE, 10, 5, overlap=2, loop=True)) == list(range(7, 7 + 10 + 5))
    ((end, latents),) = sampler.requests[-1].given
    assert (end, latents[0, :, 0, 0].tolist()) == (4, [9])


def test_an_overlap_without_room_is_refused(config: Config) -> None:
    sampler: Any = Recorder()
    with pytest.raises(InputError, match="overlap=3 of a piece's 5 latent frames; at most 2"):
        next(iter(in_pieces(config, sampler, Prompt(read_shots("x")), SIZE, 26, 5, overlap=3, loop=False)))


def test_shots_are_told_by_the_time_of_each_latent_frame() -> None:
    shots = [Shot(1.0, "a"), Shot(1.5, "b"), Shot(1.0, "c")]
    assert spans(shots, 5, 0, 2, 4.0) == ((3, "a"), (2, "b"))  # frames 0, 1, 3 | 5, 7 at four a second
    assert spans(shots, 5, 6, 2, 4.0) == ((3, "b"), (2, "c"))  # 6, 7, 9 | 11, 13
    assert spans(shots, 5, 60, 2, 4.0) == ((5, "c"),)
    assert spans([Shot(float("inf"), "a")], 5, 0, 2, 4.0) == ((5, "a"),)


@pytest.mark.parametrize("prompt", [[], [3], [{"seconds": 0, "caption": "a"}], [{"second": 1, "caption": "a"}]])
def test_a_list_that_is_no_shots_is_refused(prompt: Any) -> None:
    with pytest.raises(InputError, match="prompt"):
        read_shots(prompt)


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


TASKS = {
    "text": ([], 9),
    "image": (["image=first.png"], 9),
    "extension": (["video=clip.mp4"], 12 - 3 + 9),  # two latent frames of five are given
    "backwards": (["end_video=clip.mp4"], 9 + 12 - 5),
    "last frame": (["end_image=first.png"], 9),
    "between images": (["image=first.png", "end_image=first.png"], 9),
    "between videos": (["video=clip.mp4", "end_video=clip.mp4"], 12 - 1 + 9 + 12 - 3),
    "video to video": (["video=clip.mp4", "strength=0.5"], 9),
    "shots": (["prompt=[{seconds: 1, caption: one}, {seconds: 1.25, caption: two}]"], 9),
    "long": (["seconds=5", "overlap=1"], 19),
    "long at once": (["seconds=5", "whole=true"], 19),
    "loop": (["loop=true", "overlap=1"], 9 + 5),
}


@pytest.mark.filterwarnings("ignore")
def test_every_task_of_the_command_line(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    device = torch.device("cpu")
    sampler = Sampler(config, build_video_model(config).eval(), FrozenVae.load(config.vae, device), device)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(config))
    monkeypatch.setattr(sample, "load_sampler", lambda *_: sampler)
    monkeypatch.chdir(tmp_path)
    frames = np.random.default_rng(0).integers(0, 255, (12, 16, 16, 3), dtype=np.uint8)
    write_mp4("clip.mp4", frames, 4.0)
    Image.fromarray(frames[0]).save("first.png")
    for name, (options, length) in TASKS.items():
        monkeypatch.setattr(sys, "argv", ["sample", "run_dir=run", "prompt=a block", *options, f"out={name}.mp4"])
        assert sample.main() == 0
        video, fps = read_mp4(f"{name}.mp4")
        assert (name, len(video), fps) == (name, length, 4.0)
    monkeypatch.setattr(sys, "argv", ["sample", "run_dir=run", "prompt=a", "end_video=clip.mp4", "loop=true"])
    with pytest.raises(InputError, match="can't end in what is given"):
        sample.main()


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
    request = Prompt(read_shots("x"), before, after, most=2).request(config, vae, (9, 24, 24), 3)
    (video,) = sampler.videos([request])
    alone = [vae.decode(vae.encode(torch.from_numpy(f).permute(3, 0, 1, 2)[None])[0]) for f in (before, after)]
    assert np.abs(video[:3].astype(int) - alone[0]).max() <= 1
    assert np.array_equal(video[5:], alone[1][1:]), "and what is given at the end, without the frame it was led by"
