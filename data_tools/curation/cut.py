"""The stage `cut`: writes a span of a film as a separate video, exact to the frame.

Decoding begins at the key frame before the span. The first and the last frame are compared with those of the stage
`look`, which decoded the whole film. If they differ, or if frames are missing, the film is decoded from its beginning.
With `copy` the film's own packets are copied where possible (`packets.py`), and the same two frames are compared. A
film that is a single clip is copied, unless it must be cropped or made smaller.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from data_tools.curation.films import frames, glance, opened, small_size
from data_tools.curation.packets import Missed, copy_span
from data_tools.curation.shots import mark_of
from data_tools.curation.stage import Drop, Item, Stage
from data_tools.media_files import hash_of, media_extension
from sora_train.core.media import write_mp4
from sora_train.data.read.by_pyav import Complaints
from sora_train.data.read.decode import AS_STORED, Track, shown_at
from sora_train.data.read.picture import picture_of

_STILLS_SIDE = 512  # longest side of the pictures for captions, pixels
_READS = (
    "key", "path", "sha256", "look", "stream", "height", "width", "rotation", "mirrored", "interlaced", "transfer",
    "fps", "vfr", "timed", "frames", "start", "end", "border", "marks", "stamps", "duration",
)  # fmt: skip
_MODULES = tuple(f"data_tools.curation.{name}" for name in ("cut", "films", "packets", "shots"))


def stage(crf: int, gop: int, max_side: int | None, stills: int, copy: bool = False) -> Stage:
    """Build the stage.

    Args:
        crf: Quality of the encoder; lower is better.
        gop: Distance between key frames, in frames.
        max_side: Short side in pixels that larger clips are scaled down to; None: they aren't scaled.
        stills: Number of pictures kept for captions.
        copy: Copy a span's packets without re-encoding, where they show exactly its frames.
    """
    parameters = {"crf": crf, "gop": gop, "max_side": max_side, "stills": stills, "copy": copy}
    return Stage("cut", cut, _READS, _MODULES, parameters, files=("clip", "stills"))


def cut(item: Item, parameters: Mapping[str, Any], folder: Path) -> Item:
    """Write the clip and the pictures for its caption. Returns the fields of the clip."""
    cv2.setNumThreads(1)
    source = _Source(item, parameters, folder.parent)
    whole = item["start"] == 0 and item["end"] == item["frames"] and not any(item["border"]) and not source.is_smaller
    extension = media_extension(item["path"]) if whole else "mp4"
    name = f"{item['key']}.{extension}"
    temporary = folder / f".{item['key']}.{os.getpid()}.mp4"
    frames, copied = item["end"] - item["start"], whole
    try:
        if whole:
            shutil.copyfile(item["path"], temporary)
            for _ in source.pictures(from_start=True):
                continue
        elif parameters["copy"] and (found := source.copy(temporary)):
            frames, copied = found, True
        else:
            source.write(temporary)
        temporary.replace(folder / name)
    finally:
        temporary.unlink(missing_ok=True)
    stills = f"{item['key']}.stills.npz" if parameters["stills"] else ""
    if stills:
        temporary = folder / f".{item['key']}.{os.getpid()}.npz"
        np.savez(temporary, *[np.frombuffer(one, np.uint8) for one in source.stills])
        temporary.replace(folder / stills)
    end = item["start"] + frames
    return {"clip": name, "stills": stills, "digest": hash_of(folder / name), "copied": copied, "end": end}


class _Source:
    """The source of a clip: reads the pictures of a span of a film, and encodes or copies it."""

    def __init__(self, item: Item, parameters: Mapping[str, Any], work: Path) -> None:
        self.item, self.parameters = item, parameters
        self.track = Track(**{name: item[name] for name in ("rotation", "mirrored", "interlaced", "transfer")})
        top, bottom, left, right = item["border"]
        inner = item["height"] - top - bottom, item["width"] - left - right
        largest = parameters["max_side"]
        self.is_smaller = largest is not None and min(inner) > largest
        self.size = small_size(*inner, largest) if self.is_smaller and largest is not None else inner
        self._seen = np.load(work / "look" / item["look"])
        self.wanted = self._numbers()
        self.stills: list[bytes] = []

    def copy(self, path: Path) -> int:
        """Copy the span's packets. Returns the number of frames that they show; 0 if the span must be encoded."""
        if any(self.item["border"]) or self.is_smaller or self.track.rotation or self.track.mirrored:
            return 0
        stamps = self._seen["stamps"][self.item["start"] : self.item["end"]].tolist()
        try:
            count = copy_span(self.item["path"], self.item["stream"], stamps if self.item["timed"] else [], path)
            self._look_through(path, count)
        except (Missed, Drop):
            self.stills.clear()
            return 0
        return count

    def _look_through(self, path: Path, count: int) -> None:
        """Decode a copied span and keep stills. Raises Missed if its frames differ from those of the film."""
        places, number = self._still_places(count), 0
        with Complaints() as complaints, opened(str(path)) as (film, stream):
            for number, shown in enumerate(frames(film, stream, complaints), 1):
                if number in (1, count):
                    self._compare(shown.frame, mark_of(self._seen["tiny"][self.item["start"] + number - 1]))
                if number - 1 in places:
                    self.stills.append(_jpeg(self._picture(shown.frame)))
                if shown.doubtful:
                    raise Missed("its packets can't be decoded without what is before them")
        if number != count:
            raise Missed(f"{number} of {count} frames came out")

    def _still_places(self, count: int) -> set[int]:
        places = np.linspace(0, count - 1, self.parameters["stills"] + 2).round().astype(int)[1:-1]
        return set(places.tolist())

    def write(self, path: Path) -> None:
        """Encode the span, decoded from a key frame, else from the film's beginning. Raises Drop if both fail."""
        for from_start in [False, True] if self.item["timed"] else [True]:
            self.stills.clear()
            pictures = (picture[None] for picture in self.pictures(from_start))
            try:
                write_mp4(path, pictures, self.item["fps"], self.parameters["crf"], self.parameters["gop"])
                return
            except Missed as error:
                reason = str(error)
        raise Drop("changed", reason)

    def pictures(self, from_start: bool) -> Iterator[np.ndarray]:
        """Yield the pictures of the clip, `(H, W, 3)` uint8. Raises Missed if frames differ or are missing."""
        number, given, still_places = self.item["start"], 0, self._still_places(len(self.wanted))
        for frame in self._frames(from_start):
            last = number + 1 == self.item["end"]
            if number == self.item["start"] or last:
                self._compare(frame, self.item["marks"][1 if last else 0])
            picture: np.ndarray | None = None
            while given < len(self.wanted) and self.wanted[given] == number:
                picture = self._picture(frame) if picture is None else picture
                if given in still_places:
                    self.stills.append(_jpeg(picture))
                yield picture
                given += 1
            number += 1
            if last:
                return
        raise Missed(f"{number - self.item['start']} of {self.item['end'] - self.item['start']} frames came out")

    def _numbers(self) -> list[int]:
        """Numbers of the film's frames that the clip shows: all of the span, or resampled if the film's rate varies."""
        first, end = self.item["start"], self.item["end"]
        if not self.item["vfr"]:
            return list(range(first, end))
        times = self._seen["times"][first:end]
        count = max(1, round(float(times[-1] - times[0]) * self.item["fps"]))
        return [first + number for number in shown_at(times, range(count), self.item["fps"])]

    def _frames(self, from_start: bool) -> Iterator[Any]:
        """Yield the film's frames of the span."""
        first, last = self.item["stamps"]
        with Complaints() as complaints, opened(self.item["path"], self.item["stream"]) as (film, stream):
            if not from_start:
                film.seek(first, stream=stream, backward=True)
            for number, shown in enumerate(frames(film, stream, complaints)):
                stamp = shown.frame.pts
                if self.item["timed"] and stamp is not None:
                    begun, over = stamp >= first, stamp > last
                else:
                    begun, over = number >= self.item["start"], number >= self.item["end"]
                if over:
                    return
                if begun:
                    yield shown.frame

    def _compare(self, frame: Any, mark: int) -> None:
        track = self.track
        _, tiny = glance(frame, self.item["height"], self.item["width"], track.rotation, track.mirrored)
        if mark_of(tiny) != mark:
            raise Missed("its frames are not those that were seen before")

    def _picture(self, frame: Any) -> np.ndarray:
        top, _, left, _ = self.item["border"]
        height, width = self.item["height"], self.item["width"]
        if not any(self.item["border"]):
            return picture_of(frame, self.size, self.track, AS_STORED)
        whole = picture_of(frame, (height, width), self.track, AS_STORED)
        inner = whole[top : height - self.item["border"][1], left : width - self.item["border"][3]]
        if not self.is_smaller:
            return inner
        return cv2.resize(np.ascontiguousarray(inner), self.size[::-1], interpolation=cv2.INTER_AREA)


def _jpeg(picture_HWC: np.ndarray) -> bytes:
    """Encode a picture as JPEG, with a long side of at most `_STILLS_SIDE` pixels."""
    height, width = picture_HWC.shape[:2]
    scale = min(1.0, _STILLS_SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture_HWC)).resize(size, Image.Resampling.BILINEAR).save(
        buffer, "JPEG", quality=85
    )
    return buffer.getvalue()
