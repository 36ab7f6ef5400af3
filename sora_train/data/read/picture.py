"""One decoded frame to the picture that is shown: filters, alpha, size, RGB, upright."""

from __future__ import annotations

from typing import Any

import numpy as np
from av import VideoFrame
from av.filter import Graph
from av.video.reformatter import Interpolation

from sora_train.data.read.decode import Conversion, Track, on_white
from sora_train.data.read.orientation import upright

_DEINTERLACE = ("estdif", "mode=frame:deint=interlaced")  # looks at one frame alone
_TONE_MAP = ("scale", "out_transfer=bt709:out_primaries=bt709:out_color_matrix=bt709")


def picture_of(frame: Any, resize: tuple[int, int], track: Track, conversion: Conversion) -> np.ndarray:
    """The picture `(*resize, 3)` uint8 of a frame."""
    filters = [_DEINTERLACE] if conversion.deinterlace and track.interlaced else []
    filters += [_TONE_MAP] if conversion.tone_map and track.transfer else []
    frame = filtered(frame, filters) if filters else frame
    if any(component.is_alpha for component in frame.format.components):
        flat = on_white(frame.reformat(format="rgba").to_ndarray())
        frame = VideoFrame.from_ndarray(flat, format="rgb24")
    height, width = resize[::-1] if track.rotation % 180 else resize
    flat = frame.reformat(width, height, "rgb24", interpolation=Interpolation.BICUBIC).to_ndarray()
    return upright(flat, track.rotation, track.mirrored)


def filtered(frame: Any, filters: list[tuple[str, str]]) -> Any:
    """A frame through filters of FFmpeg that each look at one frame alone."""
    graph = Graph()
    last = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base)
    for name, arguments in filters:
        following = graph.add(name, arguments)
        last.link_to(following)
        last = following
    last.link_to(graph.add("buffersink"))
    graph.configure()
    graph.push(frame)
    graph.push(None)
    return graph.pull()
