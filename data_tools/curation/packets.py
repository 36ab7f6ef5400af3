"""Copies the packets of a span of a film without re-encoding, from the last decoder entry point before the span on.

An edit list hides the frames between the entry point and the span. A frame at the end of the span whose packet is
stored after that of a later frame is left out, because the later frame could not be hidden: up to three frames of H.264
with B-frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av

from data_tools.curation.films import opened
from data_tools.cut import write_part
from sora_train.data.read.bitstream import is_entry
from sora_train.data.read.decode import DecodeError

_EARLIER_S = (0.0, 10.0, 1e6)  # how long before the span to seek to, tried in turn: a container may seek too far


class Missed(Exception):
    """The frames that were cut differ from those of the film's full decode."""


def copy_span(film_path: str, stream_number: int, stamps: Sequence[int], path: Path) -> int:
    """Copy the packets of consecutive frames of a film into a file of its own, without re-encoding.

    Args:
        film_path: The film.
        stream_number: Number of its video stream.
        stamps: Presentation times of the frames in the stream's time base, ascending; empty if they are unknown.
        path: File to write.

    Returns:
        The number of frames copied, from the first on. Frames at the end may be missing (see above).

    Raises:
        Missed: The frames can't be identified by their times, or the container can't store the packets.
    """
    if not stamps:
        raise Missed("its packets don't say which frame is when")
    with opened(film_path, stream_number) as (film, stream):
        packets: list[Any] = []
        for earlier_s in _EARLIER_S:
            film.seek(max(0, stamps[0] - round(earlier_s / stream.time_base)), stream=stream, backward=True)
            packets = packets or _packets_of(film, stream, stamps[0], stamps[-1])
        shown = sorted(packet.pts for packet in packets if packet.pts >= stamps[0])
        if not shown or shown != list(stamps[: len(shown)]):
            raise Missed("its packets are not those of its frames")
        try:
            write_part(stream, packets, stamps[0], path)
        except (DecodeError, av.error.FFmpegError, ValueError) as error:
            raise Missed(f"its packets can't be in a file of their own: {error}") from error
    return len(shown)


def _packets_of(film: Any, stream: Any, first: int, last: int) -> list[Any]:
    """Read the packets from the last entry point before the stamp `first` to the first packet after the stamp `last`.

    Returns an empty list if reading began after all such entry points.
    """
    name, record = stream.codec_context.name, stream.codec_context.extradata or b""
    found: list[Any] = []
    for packet in film.demux(stream):
        if not packet.size:
            break
        if packet.pts is None:
            raise Missed("its packets don't say which frame is when")
        if packet.pts > last:
            break
        if packet.is_keyframe and packet.pts <= first and is_entry(name, memoryview(packet), record):
            found = []
        elif not found or packet.pts < found[0].pts:  # leading pictures of an open GOP lack their references
            continue
        found.append(packet)
    return found
