"""Cuts parts of a video into separate files without decoding. The packets of a part are copied from the last decoder
entry point before it on, and an edit list hides the frames between the entry point and the part.

Each file is cut in a separate process, which, like decoders, has a deadline, no network and can't start programs:

    python -m data_tools.cut FILE FOLDER < '[[0.5, 1.0, false], [24, null, true]]'

writes FOLDER/N.mp4 for each part (start, end, and whether these are frames), and prints a JSON list with an error
message for each part, empty if it was written.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sora_train.data.read.back_ends import first_line
from sora_train.data.read.decode import DecodeError, container
from sora_train.data.read.decode_child import shut_in
from sora_train.data.read.packets import Line, choose_stream, read_line, read_packets

_DEADLINE_S = 600.0  # for all parts of a file
_IN_MP4 = {"h264", "hevc", "av1", "vp9", "mpeg4", "mpeg2video", "mpeg1video", "mjpeg"}  # others go into mov
_EARLY = 1e-4  # seconds by which a frame may precede the given start, which may be rounded


class Part(NamedTuple):
    """A part of a video, in seconds since the video's first frame, or in frame numbers from 0."""

    start: float
    end: float  # exclusive
    of_frames: bool = False

    def __str__(self) -> str:
        return f"{self.start:.10g}-{self.end:.10g}{'f' if self.of_frames else ''}"


def cut_file(path: Path, parts: Sequence[Part], folder: Path) -> list[str]:
    """Write the parts of a file as `N.mp4` into a folder, in a separate process.

    Returns:
        An error message for each part; empty if it was written.
    """
    asked = json.dumps([[p.start, None if p.end == float("inf") else p.end, p.of_frames] for p in parts])
    command = [sys.executable, "-m", "data_tools.cut", str(path), str(folder)]
    try:
        done = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=_DEADLINE_S)
        wrong: list[str] = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return [f"not cut within {_DEADLINE_S:g} s"] * len(parts)
    except ValueError:
        return [f"the process that cuts ended with {done.returncode}"] * len(parts)
    return wrong


def main() -> int:
    """Cut the file of the command line into the parts of stdin."""
    path, folder = Path(sys.argv[1]), Path(sys.argv[2])
    parts = [Part(start, float("inf") if end is None else end, frames) for start, end, frames in json.load(sys.stdin)]
    shut_in()
    print(json.dumps(cut(path, parts, folder)))
    return 0


def cut(path: Path, parts: Sequence[Part], folder: Path) -> list[str]:
    """As `cut_file`, in this process."""
    import av

    try:
        with path.open("rb") as opened:
            kind = container(opened.read(1024))
        if kind is None:
            return ["not a video"] * len(parts)
        with av.open(str(path), format=kind, metadata_errors="replace") as file:
            stream = choose_stream(file)
            packets = read_packets(file, stream)
            line = read_line(file, stream, packets)
            return [_part(stream, packets, line, part, folder / f"{n}.mp4") for n, part in enumerate(parts)]
    except (av.error.FFmpegError, OSError) as error:
        return [first_line(error)] * len(parts)
    except DecodeError as error:
        return [error.detail] * len(parts)


def _part(stream: Any, packets: list[Any], line: Line, part: Part, path: Path) -> str:
    import av

    try:
        wanted, first, last = _range(stream, line, part)
        write_part(stream, packets[first : last + 1], int(line.stamps[wanted].min()), path)
        with av.open(str(path)) as file:
            shown = sum(bool(p.size) and not p.is_discard for p in file.demux(video=0))
        if shown != len(wanted):
            return f"{stream.codec_context.name} can't be cut there: {shown} frames for {len(wanted)} would be shown"
    except (av.error.FFmpegError, OSError, ValueError) as error:
        return first_line(error)
    except DecodeError as error:
        return error.detail
    return ""


def _range(stream: Any, line: Line, part: Part) -> tuple[np.ndarray, int, int]:
    """Indexes of the packets whose frames a part shows, and of the first and the last packet to copy.

    Frames at the end of the part are left out if their packets follow that of a frame behind the part. Raises
    DecodeError if the frames' times are unknown or the part has no frame.
    """
    if line.unclear:
        raise DecodeError(
            "cut", "its packets don't say which frame comes when; convert it, for example to H.264 in mp4"
        )
    early, unit = (0.0, "frames") if part.of_frames else (_EARLY, "s")
    at: np.ndarray = (line.stamps - line.stamps[line.shown].min()) * float(stream.time_base)
    if part.of_frames:
        at = np.searchsorted(np.sort(line.stamps[line.shown]), line.stamps).astype(np.float64)
    places = np.flatnonzero(line.shown & (at >= part.start - early) & (at < part.end - early))
    if not len(places):
        final = f"{at[line.shown].max():.10g}"
        raise DecodeError("cut", f"no frame from {part.start:g} to {part.end:g} {unit}; the last one is at {final}")
    start = line.stamps[places].min()
    entries = np.flatnonzero(line.entries & (line.stamps <= start))
    first = int(entries[-1]) if len(entries) else 0
    after = np.flatnonzero(line.shown[first:] & (at[first:] >= part.end - early))
    last = first + int(after[0]) - 1 if len(after) else len(line.stamps) - 1
    return places[(places >= first) & (places <= last)], first, last


def write_part(stream: Any, packets: list[Any], start: int, path: Path) -> None:
    """Copy packets into a file whose first shown frame has the time stamp `start`; earlier frames get negative times.

    Raises DecodeError if the container can't store the codec.
    """
    import av

    kind = "mp4" if stream.codec_context.codec.canonical_name in _IN_MP4 else "mov"
    try:
        with av.open(str(path), "w", format=kind) as file:
            copy = file.add_stream_from_template(stream, opaque=True)  # works without an encoder for the codec
            copy.time_base = Fraction(stream.time_base)
            for packet, stamp in zip(packets, _decoding_stamps(packets), strict=True):
                moved = av.Packet(bytes(packet))
                moved.pts, moved.dts = packet.pts - start, stamp - start
                moved.duration, moved.time_base = packet.duration, stream.time_base
                moved.is_keyframe, moved.stream = packet.is_keyframe, copy
                file.mux(moved)
    except av.error.PatchWelcomeError as error:
        name = stream.codec_context.name
        raise DecodeError(
            "cut", f"{name} can't be in mp4, which a part needs; convert it, for example to H.264"
        ) from error


def _decoding_stamps(packets: list[Any]) -> list[int]:
    """Decoding time stamps of packets: the file's, or, without any (Matroska), derived from the display times."""
    known = [packet.dts for packet in packets]
    if None not in known:
        return known
    shown = sorted(packet.pts for packet in packets)
    late = max(stamp - packet.pts for stamp, packet in zip(shown, packets, strict=True))
    return [stamp - late for stamp in shown]


if __name__ == "__main__":
    sys.exit(main())
