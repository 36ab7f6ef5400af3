"""Training from precomputed latents is training on the fly: the same packs, noise and losses; others' are refused."""

from __future__ import annotations

import copy
import json
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

from data_tools import encode_latents
from data_tools.encode_latents import fixed_visits
from data_tools.inspect import View, render
from sora_train.config.cost import geometry
from sora_train.config.load import build
from sora_train.config.schema import Config, Fit, SourceConfig, StageConfig
from sora_train.core.batch import LatentPack
from sora_train.core.cli import InputError
from sora_train.data.index.index import load_index
from sora_train.data.index.make import index_shards
from sora_train.data.index.places import index_path
from sora_train.data.latents import read, texts_to_bytes, to_bytes
from sora_train.data.loader import Loader, Step
from sora_train.data.order.plan import Position
from sora_train.data.read.decode import DecodeError
from sora_train.data.read.encoded import header, probe, weights_hash
from sora_train.data.read.pool import Pool
from sora_train.data.shards import Shards
from sora_train.encoding.captions import tokenizer
from sora_train.encoding.vae import FrozenVae
from sora_train.models.video_vae.model import build_vae
from tests.stubs import diffusion

CPU = torch.device("cpu")
Compose = Callable[..., DictConfig]


@pytest.fixture
def config(compose_tree: Compose, corpus: list[str], tmp_path: Path) -> Config:
    """A run over the corpus whose clips are whole videos, with a small VAE of random weights."""
    tree = compose_tree("experiment=demo", "model.depth=1", "text_encoder.depth=1")
    made = build(tree, need_vae=False)
    folder = tmp_path / "vae"
    folder.mkdir()
    torch.manual_seed(0)
    save_file(build_vae(made.vae).state_dict(), folder / "vae.safetensors")
    made.vae = replace(made.vae, path=str(folder), cache_mib=64)
    made.data = replace(
        made.data, sources={"blocks": SourceConfig([str(Path(corpus[0]).parent / "*.tar")])}, validation=[],
        fps=8.0, max_frames=33, max_pixels=2304, max_tokens=1024, workers=1,
    )  # fmt: skip
    return made


def encoded(config: Config, out: Path, dtype: str = "fp32") -> Config:
    """Encode, and the configuration that trains from it."""
    assert encode_latents.encode(config, out, dtype) == 0
    return with_sources(config, out / "blocks")


def with_sources(config: Config, folder: Path) -> Config:
    return replace(config, data=replace(config.data, sources={"blocks": SourceConfig([f"{folder}/*.tar"])}))


def steps_of(config: Config, pool: Pool, count: int = 3) -> list[Step]:
    shards = Shards(config)
    shards.index()
    plan = shards.plan(config)
    return list(islice(Loader(plan, pool, [[0], [1]], Position(), 2), count))


class Half(nn.Module):
    """Predicts half of what it sees."""

    def forward(self, pack: LatentPack) -> Tensor:
        return pack.video.x_NP / 2


def losses(config: Config, steps: list[Step], encode: Callable[[Tensor], Tensor]) -> list[float]:
    task = diffusion(
        config.flow, geometry(config), config.vae.channels, encode, tokenizer(config), config.vae.cache_mib << 20
    )
    return [float(task.loss(Half(), pack).sum) for step in steps for pack in step.packs]


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(1, timeout_s=600) as pool:
        yield pool


def test_losses_are_those_of_encoding_on_the_fly(config: Config, tmp_path: Path, pool: Pool) -> None:
    def never(_: Tensor) -> Tensor:
        raise AssertionError("nothing is left to encode")

    fly = losses(config, steps_of(config, pool), FrozenVae.load(config.vae, CPU).encode)
    ready = encoded(config, tmp_path / "fp32")
    steps = steps_of(ready, pool)
    assert losses(ready, steps, never) == fly and len(set(fly)) == 6
    clips = [clip for step in steps for pack in step.packs for clip in pack.clips]
    page = render(load_index(Shards(ready).training), View(), pool, 24)
    assert "24 usable samples" in page and page.count("latents") >= 24 and "class=bad" not in page
    assert len({clip.key for clip in clips}) > 10 and all(not len(clip.video_TCHW) for clip in clips)
    assert {clip.caption for clip in clips} >= {"block number 4"}
    half = encoded(config, tmp_path / "bf16", "bf16")
    assert losses(half, steps_of(half, pool), never) == pytest.approx(fly, rel=2e-2)


def test_captions_and_fields_come_along_and_filters_are_done_with(config: Config, tmp_path: Path) -> None:
    config = replace(config, data=replace(config.data, filter="n >= 9 or height == 64"))
    encoded(config, tmp_path / "out")
    shards = [str(path) for path in sorted(tmp_path.glob("out/blocks/*.tar"))]
    index_shards(shards, workers=1)
    index = load_index(shards)
    source = load_index(Shards(config).training)
    kept = [n for n in range(24) if (n % 2 and n >= 9) or source.height[n] == 64]
    assert index.key.tolist() == [f"{n:05d}" for n in kept]
    for row, n in enumerate(kept):
        assert index.captions(row)[0] == source.captions(n)[0]
    assert {json.loads(text)["data.max_pixels"] for text in index.encoded()} == {2304}


def test_a_stopped_command_goes_on_and_ranks_share_the_shards(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    encoded(config, whole)
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", "29400")  # where the ranks would meet
        encoded(config, shared)
    names = [f"blocks/{n:06d}.tar" for n in range(3)]
    assert [(shared / n).read_bytes() for n in names] == [(whole / n).read_bytes() for n in names]
    (shared / names[2]).rename(shared / "blocks/000002.tmp0")
    capsys.readouterr()
    encoded(config, shared)
    said = capsys.readouterr().out
    assert said.count("there already") == 1 and "8 clips, 0 refused" in said
    assert (shared / names[2]).read_bytes() == (whole / names[2]).read_bytes()


OTHERWISE: list[tuple[Callable[[Config], None], str]] = [
    (lambda c: setattr(c.data, "fps", 4.0), r"data\.fps: 8\.0, this run has 4\.0"),
    (lambda c: setattr(c.data, "max_pixels", 1024), r"data\.max_pixels: 2304, this run has 1024"),
    (lambda c: setattr(c.data, "fit", Fit.crop), "data.fit: stretch, this run has crop"),
    (lambda c: setattr(c.data, "stages", [StageConfig(5, max_frames=9), StageConfig()]), r"stages\[0\].max_frames"),
    (lambda c: setattr(c, "method", "autoencoder"), "learns from pixels"),
]


def test_what_was_made_otherwise_is_refused_in_one_line(config: Config, tmp_path: Path) -> None:
    ready = encoded(config, tmp_path / "out")
    Shards(ready).index()
    for change, message in OTHERWISE:
        other = copy.deepcopy(ready)
        change(other)
        with pytest.raises(InputError, match=message) as raised:
            Shards(other).plan(other)
        assert "\n" not in str(raised.value)


def test_other_weights_are_refused_by_training_and_by_encoding(config: Config, tmp_path: Path) -> None:
    ready = encoded(config, tmp_path / "out")
    weights = load_file(Path(config.vae.path or "") / "vae.safetensors")
    name = next(n for n, tensor in weights.items() if tensor.numel() > 100)
    weights[name].view(-1)[7] += 1e-3
    save_file(weights, Path(config.vae.path or "") / "vae.safetensors")
    Shards(ready).index()
    with pytest.raises(InputError, match=r"vae\.path: [0-9a-f]{16}, this run has [0-9a-f]{16}; encode again"):
        Shards(ready).plan(ready)
    with pytest.raises(InputError, match="other shards, weights or settings; choose another out="):
        encode_latents.encode(config, tmp_path / "out", "fp32")
    with pytest.raises(InputError, match="holds latents already"):
        encode_latents.encode(ready, tmp_path / "again", "fp32")


def test_a_long_video_is_covered_from_its_first_frame_to_its_last(config: Config, corpus: list[str]) -> None:
    config.data.max_frames = 5
    index = load_index([corpus[0]])
    inputs = encode_latents.plan_inputs(config, [""], {"text_to_video": 1.0})
    found: dict[int, list[tuple[str, int]]] = {}
    for key, visit in fixed_visits(index, inputs):
        assert visit.frames == (1 if visit.sample % 4 == 0 else 5)
        found.setdefault(visit.sample, []).append((key, visit.first))
    assert found[0] == [("00000", 0)]
    assert found[1] == [("00001", 0), ("00001+1", 4)], "9 frames"
    assert [first for _, first in found[2]] == [0, 4, 8, 12], "17 frames"
    assert [first for _, first in found[3]] == [0, 8, 16, 24], "of 33 at 16 a second, every other"


def test_damage_is_refused_and_named(config: Config, tmp_path: Path, pool: Pool) -> None:
    ready = encoded(config, tmp_path / "out")
    Shards(ready).index()
    shard = tmp_path / "out/blocks/000001.tar"
    with tarfile.open(shard) as tar:
        at = next(m for m in tar if m.name == "00010.latent.safetensors").offset_data + 600
    data = bytearray(shard.read_bytes())
    data[at] ^= 0xFF
    shard.write_bytes(data)
    refused = [r for step in steps_of(ready, pool, 4) for r in step.refused]
    assert {(r.key, r.cause) for r in refused} <= {("00010", "checksum")}
    index_path(str(shard)).unlink()
    shard.write_bytes(bytes(data).replace(b'size\\":', b'sizf\\":'))
    index_shards([str(shard)], workers=1)
    with pytest.raises(InputError, match="no usable sample.*latent_header"):
        load_index([str(shard)])


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\xff" * 100, (10).to_bytes(8, "little") + b"[1, 2, 3] ", save({"latents": torch.zeros(2, 3)}),
        to_bytes(torch.zeros(1, 1, 1, 1), {"size": "1x1", "fps": "1", "made_with": "{}"}),
        to_bytes(torch.zeros(1, 1, 1, 1), {"size": "1x1x1", "fps": "nan", "made_with": "{}"}),
        to_bytes(torch.zeros(1, 1, 1, 1, dtype=torch.int32), {"size": "1x1x1", "fps": "1", "made_with": "{}"}),
        to_bytes(torch.zeros(1, 1, 1, 1), {"size": "1x1x1", "fps": "1", "made_with": "{}"})[:-1],
    ],
)  # fmt: skip
def test_what_is_no_latent_file_is_a_decode_error(data: bytes) -> None:
    with pytest.raises(DecodeError):
        probe(data, len(data))


def test_a_frozen_encoders_embeddings_stand_in_for_captions(config: Config, tmp_path: Path, pool: Pool) -> None:
    """With an encoder made up here: a caption's length in tokens, zeros after it."""

    def embed(captions: Any) -> tuple[Tensor, tuple[int, ...]]:
        rows = [torch.zeros(12, 4) for _ in captions]
        for row, caption in zip(rows, captions, strict=True):
            row[: 1 + len(caption) % 9] = 1.0 + len(caption)
        return torch.cat(rows), (12,) * len(rows)

    shards = Shards(config)
    encoder = encode_latents.Encoder(config, CPU, "fp32", pool, shards)
    encoder.embed = embed
    encoder.config = replace(config, text_encoder=replace(config.text_encoder, pad_to=12))
    encoder.shard(shards.training[0], "", tmp_path / "out/blocks/000000.tar")
    ready = with_sources(config, tmp_path / "out/blocks")
    steps = steps_of(ready, pool)
    index = load_index([str(tmp_path / "out/blocks/000000.tar")])
    for row in range(8):
        captions = index.captions(row)[0]
        expected = embed([*captions, ""])[0].split(12)
        assert all(torch.equal(a, b) for a, b in zip(read(index, row).texts, expected, strict=True))

    def never(_: Any) -> Any:
        raise AssertionError("nothing is left to embed")

    task = diffusion(replace(config.flow, caption_dropout=0.5), geometry(config), config.vae.channels, never, never)
    packs = [pack for step in steps for pack in step.packs if pack.clips]
    assert packs
    drops = set()
    for pack in packs:
        latent = task.prepare(pack)
        assert latent.video.layout.texts == (12,) * len(pack.clips)
        for clip, text in zip(pack.clips, latent.text.split(12), strict=True):
            drops.add(dropped := bool(torch.equal(text, embed([""])[0])))
            assert dropped or torch.equal(text, embed([clip.caption])[0])
    assert drops == {True, False}


def test_padding_is_not_stored() -> None:
    row = torch.cat((torch.ones(3, 8), torch.zeros(509, 8)))
    data = texts_to_bytes([row], 512)
    assert len(data) < 300 and header(data)["0000"]["shape"] == [3, 8]


def test_weights_are_told_apart_and_missing_ones_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no weights"):
        weights_hash(tmp_path)
    path = tmp_path / "a.safetensors"
    path.write_bytes(bytes(3 << 20))
    before = weights_hash(tmp_path)
    path.write_bytes(bytes((3 << 20) - 1) + b"\1")
    assert weights_hash(tmp_path) != before


@pytest.mark.parametrize(("arguments", "message"), [([], "missing: out="), (["out=x", "dtype=fp8"], "dtype=fp8")])
def test_wrong_use_is_one_line(monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str) -> None:
    monkeypatch.setattr(sys, "argv", ["encode_latents", *arguments])
    with pytest.raises(InputError, match=message):
        encode_latents.main()
