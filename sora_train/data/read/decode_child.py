"""The decode child: a process without torch, network, credentials or a shell, that `pool.py` may kill at any moment.

It reads one JSON request per line from stdin and answers with JSON lines. Pixels go into the shared memory file whose
descriptor the parent hands over, in pieces where they don't fit at once; bytes that the parent fetched come that way.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import platform
import re
import resource
import signal
import struct
import sys
import tempfile
import zlib
from typing import Any, BinaryIO

import numpy as np

from sora_train.data.read.animation import EXTENSION, decode_animation, probe_animation
from sora_train.data.read.back_ends import Options, by_ffmpeg, decode, first_line, load_error
from sora_train.data.read.decode import Conversion, DecodeError, Limits, Track, checked, read_member
from sora_train.data.read.probe import probe

_HEARD = 1 << 14  # bytes of what a decoder wrote that are looked at
_WRITTEN = 64 << 20  # bytes that it may write
_HARMLESS = re.compile(r"deprecated pixel format")  # of swscale, for every video of full range


class Server:
    """Answers requests until the parent closes the pipe."""

    def __init__(self, requests: BinaryIO, answers: BinaryIO, memory_file: int, options: dict[str, Any]) -> None:
        self.requests, self.answers, self.memory_file = requests, answers, memory_file
        self.errors = {name: load_error(name) for name in options["decoders"]}
        self.options = Options(
            [name for name, error in self.errors.items() if not error],
            Limits(**options["limits"]),
            Conversion(**options["conversion"]),
            Overheard().take,
        )
        self._mapped: mmap.mmap | None = None

    def run(self) -> None:
        """Serve; whatever a decoder raises, the sample is at fault and is named."""
        for line in self.requests:
            request = json.loads(line)
            if request["op"] == "many":
                self._send({"replies": [self._reply({**one, "handed": False}) for one in request["requests"]]})
            else:
                self._send(self._reply(request))

    def _reply(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            return self._answer(request)
        except DecodeError as error:
            return {"cause": error.cause, "detail": error.detail}
        except MemoryError:
            return {"cause": "memory", "detail": "over the decoder's memory limit (data.decode_memory_gib)"}
        except FileNotFoundError as error:
            return {"cause": "missing", "detail": str(error)}
        except OSError as error:
            # FFmpeg's codes look like the system's: the -1 of a demuxer or decoder would be a missing permission
            if type(error).__module__.startswith("av."):
                return {"cause": "undecodable", "detail": by_ffmpeg(error)}
            return {"cause": "io" if error.errno else "undecodable", "detail": first_line(error)}
        except Exception as error:
            return {"cause": "undecodable", "detail": first_line(error)}

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["op"] == "decoders":
            return {"errors": self.errors}
        decoders = self.options.decoders
        if not decoders:
            return {"cause": "no_decoder", "detail": "; ".join(f"{n}: {e}" for n, e in self.errors.items())}
        offset, size = request["offset"], request["size"]
        handed = request["handed"]
        data = os.pread(self.memory_file, size, 0) if handed else read_member(request["path"], offset, size)
        checked(data, offset, size, request["crc32"])
        if request["op"] == "probe":
            if request["extension"] == EXTENSION:
                figures = probe_animation(data, self.options.limits)
            else:
                depth = request["pixels"], request["whole"]
                figures = probe(data, request["extension"], self.options.limits, *depth)
            return {**figures, "crc32": zlib.crc32(data)}
        options = self.options._replace(decoders=decoders[1:] if request["spare"] else decoders)
        track, resize = Track(*request["track"]), tuple(request["resize"])
        if request["extension"] == EXTENSION:
            pixels = decode_animation(data, request["frames"], resize, track, options.limits)
        else:
            pixels = decode(data, request["extension"], request["frames"], resize, track, options)
        top, left, height, width = request["crop"]
        pixels = pixels[:, top : top + height, left : left + width]
        if list(pixels.shape[1:3]) != [height, width]:
            raise DecodeError("size", f"decoded {pixels.shape[1:3]}, wanted {(height, width)}")
        return self._hand_over(pixels, request["piece"])

    def _hand_over(self, pixels: np.ndarray, piece: int) -> dict[str, Any]:
        """Put the frames into the shared memory, `piece` at a time; the answer to the last piece is returned."""
        for first in range(0, len(pixels), piece):
            part = pixels[first : first + piece]
            target = np.frombuffer(self._memory(part.nbytes), np.uint8, part.size)
            target.reshape(part.shape)[:] = part
            del target  # the map can't be replaced while an array looks into it
            if first + piece < len(pixels):
                self._send({"first": first, "frames": len(part), "more": True})
                self.requests.readline()  # the parent has taken the piece
        return {"first": first, "frames": len(part), "more": False}

    def _memory(self, size: int) -> mmap.mmap:
        if self._mapped is None or len(self._mapped) < size:
            self._mapped = mmap.mmap(self.memory_file, 0)
        return self._mapped

    def _send(self, reply: dict[str, Any]) -> None:
        self.answers.write(json.dumps(reply).encode() + b"\n")
        self.answers.flush()


class Overheard:
    """Redirects the decoders' stdout and stderr, where alone decord's FFmpeg reports damage, to an unnamed file.

    A pipe would block a decoder that writes more than the pipe's buffer.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115, for as long as the process
        os.dup2(self._file.fileno(), 2)
        os.dup2(self._file.fileno(), 1)  # what a decoder prints must not look like an answer either

    def take(self) -> str:
        """The first line that was written since the last call; empty if there is none that tells of damage."""
        descriptor = self._file.fileno()
        if not os.fstat(descriptor).st_size:
            return ""
        lines = os.pread(descriptor, _HEARD, 0).decode("ascii", "replace").splitlines()
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)  # where the copies at 1 and 2 write, too
        return next((line.strip()[:200] for line in lines if line.strip() and not _HARMLESS.search(line)), "")


_CALLS = {  # of the kernel: architecture's number in a filter; socket, connect, execve, execveat, ptrace
    "x86_64": (0xC000003E, (41, 42, 59, 322, 101)),
    "aarch64": (0xC00000B7, (198, 203, 221, 281, 117)),
}


def shut_in() -> None:
    """Restrict this process on Linux: it ends with its parent, and can't use the network or start programs.

    An attacker who takes over a decoder thus has neither. A seccomp filter answers the system calls with EPERM; it is
    only installed on x86-64 and ARM64.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if platform.machine() not in _CALLS:
        return
    architecture, numbers = _CALLS[platform.machine()]
    load, equal, give = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET
    refuse, allow = 0x00050001, 0x7FFF0000  # SECCOMP_RET_ERRNO|EPERM, SECCOMP_RET_ALLOW
    steps = [(load, 0, 0, 4), (equal, 0, len(numbers) + 2, architecture), (load, 0, 0, 0)]
    steps += [(equal, len(numbers) - n, 0, number) for n, number in enumerate(numbers)]
    steps += [(give, 0, 0, allow), (give, 0, 0, refuse)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    fprog = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(steps), ctypes.addressof(program)))
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    libc.prctl(22, 2, ctypes.byref(fprog), 0, 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def main() -> None:
    """Run a child: arguments are the descriptor of the shared memory and the options as JSON."""
    memory_file, options = int(sys.argv[1]), json.loads(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when a child goes
    resource.setrlimit(resource.RLIMIT_AS, (options["memory_bytes"],) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_WRITTEN,) * 2)  # Python ignores the signal: a write fails
    answers = os.fdopen(os.dup(1), "wb")
    server = Server(sys.stdin.buffer, answers, memory_file, options)
    shut_in()
    server.run()


if __name__ == "__main__":
    main()
