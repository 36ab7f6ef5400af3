"""The stage `probe`: hash and format of a film, from its bytes, its headers and its first frame."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_tools.curation.films import frames, opened, seconds_of
from data_tools.curation.forbidden import read_forbidden
from data_tools.curation.stage import Drop, Item, Stage
from sora_train.data.read.by_pyav import Complaints
from sora_train.data.read.probe import HDR, shape_of

_PIECE = 8 << 20
_MODULES = ("data_tools.curation.probe", "data_tools.curation.films", "data_tools.curation.forbidden")


def stage(short_side: int, forbidden: Mapping[str, str]) -> Stage:
    """Build the stage, for films of at least `short_side` pixels; `forbidden` is from `list_parameters`."""
    parameters = {"short_side": short_side, "forbidden": dict(forbidden)}
    return Stage("probe", probe, ("path", "name", "size", "mtime_ns"), _MODULES, parameters)


def probe(item: Item, parameters: Mapping[str, Any], folder: Path) -> Item:
    """Hash a film, and read its format. Raises Drop if it is forbidden, undecodable, too small or too elongated."""
    listed = parameters["forbidden"]
    algorithms = read_forbidden(**listed).algorithms() if listed else []
    digests = _digests(item["path"], {"sha256", *algorithms})
    if listed and read_forbidden(**listed).has_file(digests):
        raise Drop("forbidden", f"on the list {Path(listed['path']).name}")
    with Complaints() as complaints, opened(item["path"]) as (film, stream):
        shown = next(frames(film, stream, complaints), None)
        if shown is None:
            raise Drop("undecodable", "no frame comes out of it")
        shape = shape_of(shown.frame, stream)
        _check_shape(shape["height"], shape["width"], parameters["short_side"])
        return {
            **shape, "sha256": digests["sha256"], "stream": stream.index, "codec": stream.codec_context.name,
            "duration": seconds_of(film, stream), "claimed": float(stream.average_rate or stream.base_rate or 0),
            "interlaced": bool(shown.frame.interlaced_frame), "transfer": HDR.get(int(shown.frame.color_trc), ""),
        }  # fmt: skip


def _check_shape(height: int, width: int, short_side: int) -> None:
    if min(height, width) < short_side:
        raise Drop("too small", f"{width}x{height}, the short side must be {short_side}")
    if max(height, width) * 9 > min(height, width) * 21:
        raise Drop("aspect", f"{width}x{height} is longer than 21:9")


def _digests(path: str, algorithms: set[str]) -> dict[str, str]:
    found = {name: hashlib.new(name, usedforsecurity=False) for name in algorithms}
    with Path(path).open("rb") as file:
        while piece := file.read(_PIECE):
            for one in found.values():
                one.update(piece)
    return {name: one.hexdigest() for name, one in found.items()}
