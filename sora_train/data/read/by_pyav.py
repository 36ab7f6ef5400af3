"""The PyAV back end: frames by their presentation time, or counted from the start; damaged frames are refused.

A single requested frame is the frame of a decode from the start. If a decoder reports damage between the packet at
which decoding began and a requested frame, the file is decoded from the start; if it reports damage again, the frame is
refused.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any

import av
import numpy as np

from sora_train.data.read.decode import Conversion, DecodeError, Limits, Track, check_pixels, container, shown_at
from sora_train.data.read.packets import Line, choose_stream, read_line, read_packets, times_of
from sora_train.data.read.picture import picture_of

_CONCEALED = "concealing"  # so begins what a decoder says, as information, of blocks that it made up
_UNREFERENCED = "mmco: unref short failure"  # H.264: a frame that is to be let go was never there
_HELD = 16  # frames that H.264 may refer to


class Complaints:
    """Collects reports of FFmpeg's demuxers and decoders while it is open: errors, and concealment of missing data."""

    def __enter__(self) -> Complaints:
        self._before, self._seen = av.logging.get_level(), 0
        av.logging.set_level(av.logging.INFO)
        av.logging.set_skip_repeated(False)
        self._capture = av.logging.Capture(local=True)
        self._lines = self._capture.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._capture.__exit__(*error)
        av.logging.set_level(self._before)

    def take(self) -> list[str]:
        """Those since the last call."""
        lines, self._seen = self._lines[self._seen :], len(self._lines)
        return [
            f"{name}: {text.strip()}"
            for level, name, text in lines
            if level <= av.logging.ERROR or text.startswith(_CONCEALED)
        ]


def read(
    data: bytes, wanted: Sequence[float], resize: tuple[int, int], track: Track, limits: Limits, conversion: Conversion
) -> np.ndarray:
    """Frames `(T, H, W, 3)` of the wanted numbers, ascending; raises DecodeError."""
    with (
        Complaints() as complaints,
        av.open(io.BytesIO(data), format=container(data), metadata_errors="replace") as file,
    ):
        stream = choose_stream(file, track.stream)
        check_pixels(stream.height, stream.width, limits)
        packets = read_packets(file, stream)
        source = Source(stream.codec_context, packets, read_line(file, stream, packets), complaints)
        numbers = _numbers(source.line, wanted, track, float(stream.time_base))
        take = source.counted if track.sequential else source.asked_for
        pictures = {number: picture_of(frame, resize, track, conversion) for number, frame in take(numbers)}
        return np.stack([pictures[number] for number in numbers])


def _numbers(line: Line, wanted: Sequence[float], track: Track, time_base: float) -> list[int]:
    """Wanted frames, counted in the order that they are shown."""
    count = track.frames or int(line.shown.sum())
    if track.vfr:
        numbers = shown_at(times_of(line, count, time_base), wanted, track.fps)
    else:
        numbers = [int(number) for number in wanted]
    if numbers[-1] >= count:
        raise DecodeError("short", f"frame {numbers[-1]} wanted of {count}")
    return numbers


class Source:
    """The packets of a stream and the decoder that takes them."""

    def __init__(self, codec: Any, packets: list[Any], line: Line, complaints: Complaints) -> None:
        self.codec, self.packets, self.line, self.complaints = codec, packets, line, complaints
        places = np.flatnonzero(line.shown)
        self.places = places[np.argsort(line.stamps[places], kind="stable")]  # of packets, in the order they are shown
        self._place = {int(line.stamps[place]): int(place) for place in places}
        self._doubts: list[tuple[int, str]] = []  # places of packets that a decoder complained about, and how

    def all(self) -> Iterator[Any]:
        """Every frame of a decode from the start, in the order in which they come out."""
        yield from self._decoded(0)

    def refuse_damage(self, cut: bool) -> None:
        """Raise DecodeError if the decoder complained of anything in the decode before.

        In a file that was `cut` off the packets behind the last one that is shown don't count.
        """
        last = max(np.flatnonzero(self.line.shown), default=-1) if cut else len(self.packets)
        for place, said in self._doubts:
            if place <= last:
                raise DecodeError("damaged", f"packet {place} of {len(self.packets)}: {said}")

    def counted(self, wanted: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """The wanted frames of a decode from the start, by the order in which they come out, with their numbers."""
        left, number = set(wanted), 0
        for number, frame in enumerate(self._decoded(0)):
            if number in left:
                if frame.is_corrupt or self._doubts:
                    raise DecodeError("damaged", self._said(frame))
                yield number, frame
                left.discard(number)
            if not left:
                return
        raise DecodeError("short", f"frame {max(left)} wanted, {number} came out")

    def asked_for(self, wanted: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """The wanted frames, each decoded from the last packet before it that decoding may begin at."""
        if max(wanted) >= len(self.places):
            raise DecodeError("short", f"frame {max(wanted)} wanted of {len(self.places)}")
        groups: dict[int, dict[int, int]] = {}  # by the place that decoding begins at: numbers by the place of packets
        for number in sorted(set(wanted)):
            place = int(self.places[number])
            groups.setdefault(self._start(place), {})[place] = number
        for start, numbers in groups.items():
            try:
                yield from self._some(start, numbers)
            except DecodeError:
                if start == 0:
                    raise
                yield from self._some(0, numbers)

    def _start(self, place: int) -> int:
        """The last place, of those that decoding may begin at, whose frame is shown no later than that of `place`."""
        before = np.flatnonzero(self.line.entries[: place + 1])
        fitting = before[self.line.stamps[before] <= self.line.stamps[place]]
        return int(fitting[-1]) if len(fitting) else 0

    def _some(self, start: int, numbers: dict[int, int]) -> Iterator[tuple[int, Any]]:
        """The frames of some packets, by place, from a decode that begins at `start`; what is given is taken away."""
        begun = start == 0 or not self.line.shown[start]  # what is hidden doesn't come out
        for frame in self._decoded(start):
            place = self._place.get(frame.dts if frame.pts is None else frame.pts, -1)
            begun = begun or (place == start and bool(frame.key_frame))
            if place not in numbers:
                continue
            if not begun or frame.is_corrupt or any(at <= place for at, _ in self._doubts):
                raise DecodeError("damaged", self._said(frame))
            yield numbers.pop(place), frame
            if not numbers:
                return
        raise DecodeError("short", f"{len(numbers)} frame(s) did not come out, the first is {min(numbers.values())}")

    def _decoded(self, start: int) -> Iterator[Any]:
        """Frames as they come out of a decode from a place on; notes at which packets the decoder complains."""
        if self.codec.is_open:
            self.codec.flush_buffers()
        self._doubts = []
        self.complaints.take()
        for place in range(start, len(self.packets) + 1):
            frames: list[Any] = []
            try:
                frames = self.codec.decode(self.packets[place] if place < len(self.packets) else None)
            except av.error.FFmpegError as error:  # goes on behind it, as the ffmpeg program does
                self._doubts.append((place, str(error)))
            said = [(place, text) for text in self.complaints.take()]
            said += [(place, "zeros inside a unit")] if place in self.line.broken else []
            self._doubts += [doubt for doubt in said if not self._is_forgiven(start, *doubt)]
            yield from frames

    def _is_forgiven(self, start: int, place: int, said: str) -> bool:
        """Tell whether a complaint is about frames from before the start, which nothing that is shown needs."""
        if place == len(self.packets):
            return False
        unreferenced = _UNREFERENCED in said and place - start <= _HELD
        if start == 0:  # of a file that was cut at an open group
            return unreferenced and not self.line.shown[place]
        return unreferenced or bool(self.line.stamps[place] < self.line.stamps[start])

    def _said(self, frame: Any) -> str:
        return self._doubts[0][1] if self._doubts else f"the frame at {frame.time} s can't be decoded whole"
