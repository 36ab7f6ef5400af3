"""Captions from sidecars of a film, read as `data_tools.build_shards` does. Each clip of the film gets them."""

from __future__ import annotations

from pathlib import Path

from data_tools.captions import Names, Refused, sidecar
from data_tools.curation.stage import Item, Outcome
from sora_train.data.index.captions import CAPTION_FIELDS, named_captions


def caption_beside(clip: Item, folder: Path) -> tuple[Item, Outcome]:
    """Add the captions of its film to a clip; drop the clip if there are none. Returns the clip and its outcome."""
    film = folder / clip["name"]
    try:
        found = sidecar(film, Names(path.name for path in film.parent.iterdir()))
    except Refused as reason:
        return clip, {"dropped": [reason.kind, reason.detail]}
    if found is None:
        return clip, {"dropped": ["no caption", f"no text beside {clip['name']}"]}
    captions = named_captions(next(found[name] for name in reversed(CAPTION_FIELDS) if name in found))
    return clip | {"captions": captions, "about": {}}, {"kept": {}}
