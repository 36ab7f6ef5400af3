"""Bad input of every kind we know of, made from a seed: broken videos, captions, tars, bombs, playlists, malice.

`Corpus.samples` makes the members of one sample, `damaged_tar` damages a finished shard (`TARS`), `hostile_names` adds
names that point elsewhere. What is not in `HARMLESS` must be refused by the index.
"""

from __future__ import annotations

import gzip
import io
import pickle
import random
import struct
import tarfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from PIL import Image

Members = dict[str, bytes]
MARKER = "marker-of-code-that-ran"  # what a payload would leave behind
LISTENER = "http://127.0.0.1:{port}/hit"


class Evil:
    """Pickles to a command that leaves the marker."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        import os

        return os.system, (f"touch {self.folder / MARKER}",)


def _flip(data: bytes, rng: random.Random, first: int, last: int, count: int) -> bytes:
    out = bytearray(data)
    for _ in range(count):
        out[rng.randrange(first, last)] ^= 1 << rng.randrange(8)
    return bytes(out)


def _box(data: bytes, name: bytes) -> tuple[int, int]:
    """Offset and size of a box of an mp4."""
    at = data.index(name) - 4
    return at, int.from_bytes(data[at : at + 4], "big")


def _moov(video: bytes, rng: random.Random, count: int = 3) -> bytes:
    at, size = _box(video, b"moov")
    return _flip(video, rng, at + 8, at + size, count)


def _zeroed(video: bytes, rng: random.Random) -> bytes:
    at, size = _box(video, b"mdat")
    start = rng.randrange(at + 8, at + max(9, size - 500))
    return video[:start] + bytes(min(500, len(video) - start)) + video[start + 500 :]


def _playlist(url: str) -> bytes:
    return f"#EXTM3U\n#EXT-X-VERSION:3\n#EXTINF:1,\n{url}\n#EXT-X-ENDLIST\n".encode()


def _huge_size(video: bytes, rng: random.Random) -> bytes:
    """Headers that claim 65,535 x 65,535 pixels."""
    out = bytearray(video)
    for name, place in ((b"tkhd", 80), (b"avc1", 28)):
        at = video.index(name)
        width = struct.pack(">HH", 65535, 0) * 2 if name == b"tkhd" else struct.pack(">HH", 65535, 65535)
        out[at + place : at + place + len(width)] = width
    return bytes(out)


def _many_frames(video: bytes, rng: random.Random) -> bytes:
    """A sample table that claims four thousand million frames."""
    out = bytearray(video)
    at = video.index(b"stsz")
    out[at + 12 : at + 16] = struct.pack(">I", 0xFFFFFFF0)
    return bytes(out)


def _elsewhere(video: bytes, url: str, kind: bytes = b"url ") -> bytes:
    """An mp4 whose pictures are said to lie in another file, at a URL."""
    at = video.index(b"dref") - 4
    entry = at + 16
    old = int.from_bytes(video[entry : entry + 4], "big")
    said = struct.pack(">I4sI", 12 + len(url) + 1, kind, 0) + url.encode() + b"\0"
    out = bytearray(video[:entry] + said + video[entry + old :])
    for name in (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"):
        box = out.index(name) - 4
        size = int.from_bytes(out[box : box + 4], "big") + len(said) - old
        out[box : box + 4] = size.to_bytes(4, "big")
    return bytes(out)


@cache
def _png_bomb() -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (40000, 40000)).save(buffer, "PNG")
    return buffer.getvalue()


def _image(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, kind)
    return buffer.getvalue()


class Corpus:
    """Makes bad samples; `folder` is where payloads would leave their marker, `port` where somebody listens."""

    def __init__(self, video: bytes, folder: Path, port: int) -> None:
        self.video, self.folder, self.url = video, folder, LISTENER.format(port=port)
        text = {"txt": b"a block"}
        v = video
        mdat = _box(v, b"mdat")[0] + 8
        deep = ("[" * 100_000).encode()
        self.samples: dict[str, Callable[[random.Random], Members]] = {
            "payload_flip": lambda r: {"mp4": _flip(v, r, mdat, len(v), 1), **text},
            "payload_flips": lambda r: {"mp4": _flip(v, r, mdat, len(v), 5), **text},
            "payload_zeros": lambda r: {"mp4": _zeroed(v, r), **text},
            "header_flip": lambda r: {"mp4": _moov(v, r), **text},
            "header_flips": lambda r: {"mp4": _moov(v, r, 20), **text},
            "cut_short": lambda r: {"mp4": v[: r.randrange(1, len(v))], **text},
            "random_tail": lambda r: {"mp4": v[:mdat] + r.randbytes(len(v) - mdat), **text},
            "empty": lambda r: {"mp4": b"", **text},
            "random": lambda r: {"mp4": r.randbytes(r.randrange(1, 4000)), **text},
            "random_box": lambda r: {"mp4": b"\0\0\0\x20ftypisom" + r.randbytes(2000), **text},
            "random_mkv": lambda r: {"mkv": b"\x1aE\xdf\xa3" + r.randbytes(2000), **text},
            "random_avi": lambda r: {"avi": b"RIFF\0\0\0\0AVI " + r.randbytes(2000), **text},
            "html": lambda r: {"mp4": b"<html>503 Service Unavailable</html>", **text},
            "image_as_video": lambda r: {"mp4": _image("PNG"), **text},
            "gif_as_mp4": lambda r: {"mp4": _image("GIF"), **text},
            "video_as_image": lambda r: {"jpg": v, **text},
            "gif_as_png": lambda r: {"png": _image("GIF"), **text},
            "claims_pixels": lambda r: {"mp4": _huge_size(v, r), **text},
            "claims_frames": lambda r: {"mp4": _many_frames(v, r), **text},
            "png_bomb": lambda r: {"png": _png_bomb(), **text},
            "playlist": lambda r: {"mp4": _playlist(self.url), **text},
            "playlist_in_box": lambda r: {"mp4": b"\0\0\0\x10ftyp" + _playlist(self.url), **text},
            "media_elsewhere": lambda r: {"mp4": _elsewhere(v, self.url), **text},
            "media_in_a_file": lambda r: {"mp4": _elsewhere(v, "file:///etc/passwd", b"alis"), **text},
            "concat_script": lambda r: {"mp4": b"ffconcat version 1.0\nfile /etc/passwd\n", **text},
            "dash": lambda r: {"mkv": f"<MPD><BaseURL>{self.url}</BaseURL></MPD>".encode(), **text},
            "sdp": lambda r: {"avi": b"v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n", **text},
            "no_caption": lambda r: {"mp4": v},
            "empty_caption": lambda r: {"mp4": v, "txt": b" \n\t"},
            "caption_bytes": lambda r: {"mp4": v, "txt": b"\xff\xfe" + r.randbytes(50)},
            "caption_zeros": lambda r: {"mp4": v, "txt": b"a\0b"},
            "caption_huge": lambda r: {"mp4": v, "txt": b"x" * (2 << 20)},
            "json_broken": lambda r: {"mp4": v, "json": b'{"caption": "a'},
            "json_list": lambda r: {"mp4": v, "json": b'["a"]'},
            "json_deep": lambda r: {"mp4": v, "json": deep},
            "json_number": lambda r: {"mp4": v, "json": b'{"captions": 7}'},
            "only_text": lambda r: dict(text),
            "pickle": lambda r: self._malicious(r, "pkl"),
            "pickle_pyd": lambda r: self._malicious(r, "pyd"),
            "pickle_pth": lambda r: self._malicious(r, "pth"),
            "pickle_gz": lambda r: self._malicious(r, "pyd.gz"),
            "pickle_as_video": lambda r: {"mp4": pickle.dumps(Evil(self.folder)), **text},
            "pickle_as_json": lambda r: {"mp4": v, "json": pickle.dumps(Evil(self.folder))},
            "gzip_bomb": lambda r: {"mp4": v, **text, "txt.gz": gzip.compress(bytes(8 << 20))},
        }

    def _malicious(self, rng: random.Random, extension: str) -> Members:
        """A good sample with a payload beside it, which must be left alone."""
        data = pickle.dumps(Evil(self.folder))
        return {"mp4": self.video, "txt": b"a block", extension: gzip.compress(data) if "gz" in extension else data}


# may decode: the damage may hit what no one reads, or is beside the sample and ignored; a GIF is a video
HARMLESS = {
    "payload_flip", "payload_flips", "payload_zeros", "header_flip", "header_flips", "cut_short", "random_tail",
    "claims_pixels", "media_elsewhere", "media_in_a_file", "pickle", "pickle_pyd", "pickle_pth", "pickle_gz",
    "gzip_bomb", "gif_as_mp4",
}  # fmt: skip


def damaged_tar(kind: str, data: bytes, rng: random.Random) -> bytes:
    """A shard's bytes with one fault of the tar itself."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = [(m.offset, m.offset_data, m.size) for m in tar]
    header, start, size = rng.choice(members[1:])
    out = bytearray(data)
    if kind == "tar_cut_between":
        return data[:header]
    if kind == "tar_cut_inside":
        return data[: start + rng.randrange(max(1, size))]
    if kind == "tar_cut_anywhere":
        return data[: rng.randrange(512, len(data))]
    if kind == "tar_header_flip":
        out[header + rng.randrange(0, 257)] ^= 1 << rng.randrange(8)
    elif kind == "tar_zero_header":
        out[header : header + 512] = bytes(512)
    elif kind == "tar_zero_block":
        out[start : start + 512] = bytes(512)
    elif kind == "tar_random_block":
        out[header : header + 512] = rng.randbytes(512)
    elif kind == "tar_claims_size":
        out[header + 124 : header + 136] = b"\x80" + bytes(3) + (1 << 50).to_bytes(8, "big")
        total = sum(out[header : header + 148]) + 8 * 32 + sum(out[header + 156 : header + 512])
        out[header + 148 : header + 156] = b"%06o\0 " % total
    elif kind == "tar_html":
        return b"<html>404 not found</html>" * 40
    elif kind == "tar_empty":
        return b""
    else:
        raise KeyError(kind)
    return bytes(out)


TARS = (
    "tar_cut_between", "tar_cut_inside", "tar_cut_anywhere", "tar_header_flip", "tar_zero_header", "tar_zero_block",
    "tar_random_block", "tar_claims_size", "tar_html", "tar_empty",
)  # fmt: skip


DAMAGES = ("one bit", "five bits", "500 zeros", "header bits", "other media", "lost tail")


def altered(kind: str, video: bytes, rng: random.Random) -> bytes:
    """The bytes of a media member, as many as before, after damage that an index made before it knows nothing of."""
    if kind == "one bit":
        return _flip(video, rng, 0, len(video), 1)
    if kind == "five bits":
        return _flip(video, rng, 0, len(video), 5)
    if kind == "500 zeros":
        return _zeroed(video, rng)
    if kind == "header bits":
        return _moov(video, rng)
    if kind == "other media":
        return rng.randbytes(len(video))
    if kind == "lost tail":
        at = rng.randrange(len(video) - 1)
        return video[:at] + bytes(len(video) - at)
    raise KeyError(kind)


def hostile_names(path: Path, samples: list[tuple[str, Members]]) -> None:
    """Append samples whose names point elsewhere, and links, to a shard."""
    with tarfile.open(path, "a") as tar:
        for key, members in samples:
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        for kind, target in ((tarfile.SYMTYPE, "/etc/passwd"), (tarfile.LNKTYPE, "../../x"), (tarfile.FIFOTYPE, "")):
            info = tarfile.TarInfo("link.mp4")
            info.type, info.linkname = kind, target
            tar.addfile(info)
