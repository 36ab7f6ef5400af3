"""What several tests need: a few real shards, clips without files, a process group of one."""

from __future__ import annotations

import copy
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig
from PIL import Image

from sora_train.core.batch import Clip, Visit
from sora_train.core.media import encode_mp4
from sora_train.data.index.make import index_shards
from tests.forkserver.start import client_of

os.environ["SORA_TRAIN_RELEASE"] = "off"  # a release folder of the user's must not change what tests make


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--campaign", action="store_true", help="run the long fault campaigns too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith("tests/runs/"))  # the longest first: no worker ends alone
    if not config.getoption("--campaign"):
        for item in items:
            if item.get_closest_marker("campaign"):
                item.add_marker(pytest.mark.skip(reason="a long campaign; --campaign runs it"))


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An executable that runs commands as the interpreter does, without the seconds of importing torch and DeepSpeed.

    The processes of a session share one server (tests/forkserver). What a cold start costs or imports is tested with
    `sys.executable` instead.
    """
    folder, worker = tmp_path_factory.getbasetemp(), "PYTEST_XDIST_WORKER" in os.environ
    return str(client_of((folder.parent if worker else folder) / "forkserver", os.getppid() if worker else os.getpid()))


SIZES = ((64, 64), (48, 96), (96, 48))
KINDS = ((1, 0.0), (9, 8.0), (17, 8.0), (33, 16.0))  # frames, fps; one frame is an image


def picture(seed: int, frames: int, height: int, width: int) -> np.ndarray:
    """A bright block that moves over a gradient: unlike for every seed and frame, and small as a video."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 120, width)[None, None, :, None] * rng.uniform(0.3, 1.0, 3)
    video = np.broadcast_to(ramp, (frames, height, width, 3)).astype(np.uint8).copy()
    top, left = rng.integers(0, height - 24), rng.integers(0, width // 2)
    for t in range(frames):
        video[t, top : top + 24, (left + t) % (width - 24) : (left + t) % (width - 24) + 24] = rng.integers(120, 255)
    return video


def sample(number: int) -> dict[str, object]:
    """A WebDataset sample; every second one has a json with two named captions, the others a txt."""
    (frames, fps), (height, width) = KINDS[number % 4], SIZES[number // 4 % 3]
    video = picture(number, frames, height, width)
    if frames == 1:
        buffer = io.BytesIO()
        Image.fromarray(video[0]).save(buffer, "PNG")
        media = {"png": buffer.getvalue()}
    else:
        media = {"mp4": encode_mp4(video, fps)}
    if number % 2:
        captions = {"short": f"block {number}", "long": f"a block of light, number {number}"}
        return {"__key__": f"{number:05d}", **media, "json": json.dumps({"captions": captions, "n": number}).encode()}
    return {"__key__": f"{number:05d}", **media, "txt": f"block number {number}".encode()}


def write_shard(path: Path, samples: list[dict[str, object]]) -> str:
    """Write samples as webdataset does."""
    with wds.TarWriter(str(path)) as tar:
        for entry in samples:
            tar.write(entry)
    return str(path)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three indexed shards of eight samples: 24 videos and images of three sizes, 1 to 33 frames, 8 and 16 fps."""
    folder = tmp_path_factory.mktemp("corpus")
    shards = [
        write_shard(folder / f"train-{s:06d}.tar", [sample(n) for n in range(8 * s, 8 * s + 8)]) for s in range(3)
    ]
    index_shards(shards, workers=1)
    return shards


@pytest.fixture
def own_corpus(corpus: list[str], tmp_path: Path) -> list[str]:
    """A copy of the shards and their indexes that a test may damage."""
    shutil.copytree(Path(corpus[0]).parent, tmp_path / "corpus")
    return [str(tmp_path / "corpus" / Path(shard).name) for shard in corpus]


@pytest.fixture(scope="session")
def write_samples() -> Callable[[Path, list[dict[str, object]]], str]:
    """Write any samples as a shard."""
    return write_shard


@pytest.fixture(scope="session")
def make_sample() -> Callable[[int], dict[str, object]]:
    """Make the sample of any number."""
    return sample


@pytest.fixture(scope="session")
def make_clip() -> Callable[..., Clip]:
    """Make a clip of random pixels that depend on its seed alone."""

    def make(size: tuple[int, int, int], seed: int = 0, task: str = "text_to_video", caption: str = "a block") -> Clip:
        frames, height, width = size
        visit = Visit(seed, 0, frames, 8.0, (height, width), (0, 0, height, width), task, seed)
        pixels = torch.randint(
            0, 256, (frames, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
        )
        return Clip(visit, f"clip-{seed}", caption, pixels)

    return make


COMPOSED: dict[tuple[str, ...], DictConfig] = {}  # by overrides; many tests begin with the same


@pytest.fixture
def compose_tree() -> Iterator[Callable[..., DictConfig]]:
    """Compose conf/ with overrides, as the command line would."""
    from sora_train.config.hydra import CONF

    def make(*overrides: str) -> DictConfig:
        if overrides not in COMPOSED:
            with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
                COMPOSED[overrides] = compose("train", overrides=["run_dir=runs/test", *overrides])
        return copy.deepcopy(COMPOSED[overrides])

    GlobalHydra.instance().clear()
    yield make
    GlobalHydra.instance().clear()


@pytest.fixture(scope="session")
def process_group() -> Iterator[torch.device]:
    """A process group of this process alone."""
    import torch.distributed as dist

    from sora_train.core.world import World
    from sora_train.training.engine.process_group import connect

    yield connect(World())
    dist.destroy_process_group()
