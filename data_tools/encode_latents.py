"""Precompute latents and text embeddings, so that training decodes no video and runs no VAE or frozen text encoder.

    python -m data_tools.encode_latents experiment=demo out=FOLDER [dtype=fp32] [key=value ...]
    torchrun --nproc-per-node N -m data_tools.encode_latents experiment=demo out=FOLDER ...

Each shard of data.sources.NAME becomes OUT/NAME/NNNNNN.tar, each of data.validation OUT/validation/NNNNNN.tar, with the
samples that pass the configuration's filters: KEY.latent.safetensors (stored as `dtype`: fp32, bf16 or fp16),
KEY.text.safetensors where text_encoder.path is set, and the captions and fields as KEY.json. Then train with
data.sources.NAME.shards=[OUT/NAME/*.tar] and otherwise the same command.

The clips are fixed, so training sees the same ones in every epoch. They are cropped to the centre of the picture, as
in training. As many as cover the whole video are evenly spaced from its first frame to its last (KEY, KEY+1, ...). A
training run with another VAE, text encoder, frame rate, size or code is refused. Existing shards aren't encoded again,
so that a stopped command resumes where it was. Samples that couldn't be decoded are listed in NNNNNN.refused.jsonl
beside the shard.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds

from sora_train.config.hydra import run_hydra
from sora_train.config.registry import METHODS
from sora_train.config.schema import Config
from sora_train.core.batch import Refusal, Visit
from sora_train.core.cli import InputError, run
from sora_train.core.options import choice, options_and_overrides
from sora_train.core.outputs import usable
from sora_train.core.pixels import to_video
from sora_train.core.world import from_environment
from sora_train.data.index.index import Index, load_index
from sora_train.data.index.make import index_shards
from sora_train.data.index.side_tables import SideTables
from sora_train.data.index.tar import Member, walk
from sora_train.data.latents import texts_to_bytes, to_bytes
from sora_train.data.loader import refusal
from sora_train.data.order.filters import Filter
from sora_train.data.order.plan import PlanInputs
from sora_train.data.order.selection import Selection
from sora_train.data.order.times import source_frames
from sora_train.data.read.decode import DecodeError
from sora_train.data.read.encoded import DTYPES, LATENT, TEXT, header, made_with
from sora_train.data.read.pool import Pool
from sora_train.data.shards import Shards, plan_inputs
from sora_train.encoding.captions import tokenizer
from sora_train.encoding.vae import FrozenVae

_STORED = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_AHEAD = 64  # clips that are decoded while others are encoded
_HEAD = 1 << 20  # most bytes that are read of a header


@dataclass
class Options:
    """Options of the command, apart from those of the configuration."""

    out: str
    dtype: str = choice(tuple(_STORED), "fp32")


def main() -> int:
    """Encode the shards of the configuration on the command line."""
    o = options_and_overrides(Options, __doc__, "runs/encoded")
    return run_hydra(lambda config: encode(config, Path(o.out), o.dtype))


def encode(config: Config, out: Path, dtype: str) -> int:
    """Encode this rank's share of a configuration's shards: every `world.size`-th one."""
    if not METHODS.get(config.method).reads_latents:
        raise InputError("an autoencoder learns from pixels; give the experiment of the video model")
    if config.data.stages:
        raise InputError("data.stages ask for several sizes; encode each by itself, with data.stages=[] and its sizes")
    world = from_environment()
    device = torch.device("cuda", world.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    shards = Shards(config)
    places = _places(shards, config, out)
    with Pool.of(config.data, shards.store) as pool, usable(out, "out"):
        encoder = Encoder(config, device, dtype, pool, shards)
        for shard, text_filter, path in places[world.rank :: world.size]:
            print(f"{path}: {encoder.shard(shard, text_filter, path)}", flush=True)
    return 0


def _places(shards: Shards, config: Config, out: Path) -> list[tuple[str, str, Path]]:
    """List every shard with its filter and the path for its latents."""
    numbers: dict[str, int] = {}
    places = []
    everything = [*zip(shards.training, shards.filters, shards.source_of, strict=True)]
    everything += [(shard, config.data.filter, "validation") for shard in shards.validation]
    if "validation" in shards.source_of and shards.validation:
        raise InputError("a source is called validation, which is where data.validation goes; rename data.sources")
    for shard, text_filter, source in everything:
        number = numbers[source] = numbers.get(source, -1) + 1
        places.append((shard, text_filter, out / source / f"{number:06d}.tar"))
    return places


class Encoder:
    """Encodes shards of videos into shards of latents."""

    def __init__(self, config: Config, device: torch.device, dtype: str, pool: Pool, shards: Shards) -> None:
        self.config, self.dtype, self.pool, self.shards = config, dtype, pool, shards
        self.vae = FrozenVae.load(config.vae, device)
        frozen = config.text_encoder.path is not None
        self.embed: Callable[[Sequence[str]], Any] | None = tokenizer(config, device) if frozen else None
        self.tables = SideTables(config.data.side_tables, shards.store)
        self.made_with = json.dumps(made_with(config), sort_keys=True)

    def shard(self, shard: str, text_filter: str, path: Path) -> str:
        """Encode one shard, unless that is done already. Returns a line of counts for the log.

        Args:
            shard: Shard of videos.
            text_filter: Filter that its samples must pass.
            path: Shard of latents to write.

        Raises:
            InputError: `path` has latents made otherwise, or `shard` contains latents.
        """
        index_shards([shard], self.config.data.workers, self.shards.store, self.shards.wanted.limits)
        index = load_index([shard], self.shards.store, allow_empty=True)
        index = self.tables.join(index, asked=Filter(text_filter).columns)
        if index.encoded() - {""}:
            raise InputError(f"{shard} holds latents already")
        about = {"made_with": self.made_with, "source": f"{index.fingerprint[:16]} {text_filter}"}
        if self._is_there(path, about):
            return "there already"
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".tmp{from_environment().rank}")
        inputs = plan_inputs(self.config, [text_filter], {"text_to_video": 1.0})
        refused: list[Refusal] = []
        count = 0
        with temporary.open("wb") as file, wds.TarWriter(file, encoder=False, mtime=0) as tar:
            for key, visit, pixels in self._decoded(index, inputs):
                try:
                    members = self._members(index, visit, pixels.result(), about)
                except DecodeError as error:
                    refused.append(refusal(index, visit.sample, error))
                    continue
                for extension, data in members:
                    tar.write({"__key__": key, extension: data})
                count += 1
        lines = "".join(json.dumps(asdict(r)) + "\n" for r in refused)
        path.with_suffix(".refused.jsonl").write_text(lines)
        temporary.replace(path)
        return f"{count} clips, {len(refused)} refused"

    def _decoded(self, index: Index, inputs: PlanInputs) -> Iterator[tuple[str, Visit, Future[np.ndarray]]]:
        """Yield key, visit and pixels of every clip of a shard, in order; `_AHEAD` clips are decoded ahead."""
        waiting: list[tuple[str, Visit, Future[np.ndarray]]] = []
        for key, visit in fixed_visits(index, inputs):
            track = index.track(visit.sample)
            frames = source_frames(visit, track.fps, track.vfr)
            pixels = self.pool.decode(*index.member(visit.sample), frames, visit.resize, visit.crop, track=track)
            waiting.append((key, visit, pixels))
            if len(waiting) > _AHEAD:
                yield waiting.pop(0)
        yield from waiting

    def _members(
        self, index: Index, visit: Visit, frames_THWC: np.ndarray, about: dict[str, str]
    ) -> list[tuple[str, bytes]]:
        """Encode one clip into the members of its sample; alone, so that it doesn't depend on others in a batch."""
        captions, named = index.captions(visit.sample)
        fields = index.fields(visit.sample) | (named or {"caption": captions[0]})
        size = "x".join(map(str, visit.size))
        latents = self.vae.encode(to_video(frames_THWC).transpose(0, 1).unsqueeze(0))[0].to(_STORED[self.dtype])
        members = [(LATENT, to_bytes(latents, about | {"size": size, "fps": repr(visit.fps)}))]
        if self.embed is not None:
            rows = [self.embed([text])[0] for text in (*captions, "")]
            members.append((TEXT, texts_to_bytes(rows, self.config.text_encoder.pad_to)))
        return [*members, ("json", json.dumps(fields).encode())]

    def _is_there(self, path: Path, about: dict[str, str]) -> bool:
        """Tell whether `path` has latents made with the same settings. Raises InputError if it has others."""
        if not path.is_file():
            return False
        with path.open("rb") as file:
            first = next((found for found in walk(file) if isinstance(found, Member)), None)
            if first is None:
                return False
            file.seek(first.offset)
            try:
                found = header(file.read(min(first.size, _HEAD)))
                known = json.loads(found["__metadata__"]["about"])
            except (DecodeError, KeyError, ValueError) as error:
                raise InputError(f"{path} is in the place of latents and holds none; choose another out=") from error
        stored = DTYPES.get(found.get("latents", {}).get("dtype", ""))
        if {name: known.get(name) for name in about} != about or stored != self.dtype:
            raise InputError(f"{path} holds latents of other shards, weights or settings; choose another out=")
        return True


def fixed_visits(index: Index, inputs: PlanInputs) -> Iterator[tuple[str, Visit]]:
    """Yield key and visit of the clips that cover each sample that passes the filter, in the order of the index."""
    rows, _ = Selection(index, inputs.filters).rows(np.zeros(1, dtype=np.int64))
    cut = inputs.cuts(index, rows)
    for n, row in enumerate(rows.tolist()):
        frames, whole, span = int(cut.frames[n]), int(index.frames[row]), int(cut.span[n])
        # one clip is enough: the rest of the video fills no latent frame
        short = int(cut.available[n]) < frames + inputs.geometry.temporal_stride
        top, left, height, width = map(int, cut.crop[n])
        resize = (int(cut.resize[n, 0]), int(cut.resize[n, 1]))
        firsts = [0] if short else np.linspace(0, whole - span, -(-whole // span)).astype(int).tolist()
        for piece, first in enumerate(firsts):
            key = f"{index.key[row]}+{piece}" if piece else str(index.key[row])
            yield (
                key,
                Visit(row, first, frames, float(cut.fps[n]), resize, (top, left, height, width), "text_to_video", 0),
            )


if __name__ == "__main__":
    run(main)
