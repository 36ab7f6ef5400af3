"""Decode processes that crash, hang or are killed: the answer still comes, or a cause does, and no process stays."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import av
import decord
import numpy as np
import pytest
from PIL import Image

from sora_train.core.cli import InputError
from sora_train.core.media import encode_mp4, read_mp4
from sora_train.data.index.index import load_index
from sora_train.data.read.decode import DecodeError, Limits
from sora_train.data.read.decode_child import Server
from sora_train.data.read.pool import Pool
from tests.data.deadlines import Deadlines

VIDEO = 2  # rows of the corpus: 17 frames of 64x64 at 8 fps
LONG = 7  # 33 frames of 48x96 at 16 fps
IMAGE = 0


@pytest.fixture
def pool() -> Iterator[Pool]:
    with Pool(1, timeout_s=60) as pool:
        yield pool


def pid_of(pool: Pool) -> int:
    process = pool._children[0].process
    assert process is not None
    return process.pid


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ask(pool: Pool, corpus: list[str], row: int, frames: list[int], size: tuple[int, int] = (64, 64)) -> np.ndarray:
    return pool.decode(*load_index(corpus).member(row), frames, size, (0, 0, *size)).result()


def test_a_decode_in_a_child_equals_decord_itself(pool: Pool, corpus: list[str], tmp_path: Path) -> None:
    path, _, (offset, size, _) = load_index(corpus).member(LONG)
    (tmp_path / "clip.mp4").write_bytes(Path(path).read_bytes()[offset : offset + size])
    reader = decord.VideoReader(str(tmp_path / "clip.mp4"))
    frames = [0, 2, 4, 30, 32]
    whole = pool.decode(*load_index(corpus).member(LONG), frames, (48, 96), (0, 0, 48, 96)).result()
    assert np.array_equal(whole, reader.get_batch(frames).asnumpy())
    cut = pool.decode(*load_index(corpus).member(LONG), frames, (48, 96), (8, 16, 32, 64)).result()
    assert np.array_equal(cut, whole[:, 8:40, 16:80])
    smaller = decord.VideoReader(str(tmp_path / "clip.mp4"), width=64, height=32).get_batch(frames).asnumpy()
    assert np.array_equal(ask(pool, corpus, LONG, frames, (32, 64)), smaller)


@pytest.mark.parametrize("width", [16, 24, 40, 48, 72])
def test_small_widths_that_decord_pads_come_whole(pool: Pool, tmp_path: Path, width: int) -> None:
    ramp = np.linspace(0, 255, width).astype(np.uint8)
    video = np.broadcast_to(ramp[None, None, :, None], (9, 32, width, 3)) // 8 * np.arange(9)[:, None, None, None]
    path = tmp_path / "clip.mp4"
    path.write_bytes(encode_mp4(video.astype(np.uint8), 8))
    whole, _ = read_mp4(path)
    native = pool.decode(str(path), "mp4", (0, -1, None), [0, 4, 8], (32, width), (0, 0, 32, width)).result()  # type: ignore[arg-type]
    assert np.abs(native.astype(int) - whole[[0, 4, 8]]).max() <= 3
    path.write_bytes(encode_mp4(np.repeat(np.repeat(video.astype(np.uint8), 2, 1), 2, 2), 8))
    halved = pool.decode(str(path), "mp4", (0, -1, None), [0, 4, 8], (32, width), (0, 0, 32, width)).result()  # type: ignore[arg-type]
    assert np.abs(halved.astype(int) - whole[[0, 4, 8]]).mean() < 3


def test_an_image_is_one_frame(pool: Pool, corpus: list[str]) -> None:
    assert ask(pool, corpus, IMAGE, [0]).shape == (1, 64, 64, 3)
    path, extension, (offset, size, crc32) = load_index(corpus).member(IMAGE)
    probed = pool.probe(path, extension, offset, size).result()
    assert probed == {
        "frames": 1, "fps": 0.0, "duration": 0.0, "vfr": False, "careful": False, "sequential": False, "stream": 0,
        "rotation": 0, "mirrored": False, "interlaced": False, "transfer": "", "pixel_aspect": 1.0, "width": 64,
        "height": 64, "codec": "png", "pixel_format": "RGB", "crc32": crc32,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"member": (0, 100, 0)}, "checksum"),
        ({"member": (1 << 40, 100, None)}, "truncated"),
        ({"path": "/nowhere.tar"}, "missing"),
        ({"frames": [0, 17]}, "short"),
        ({"crop": (0, 0, 80, 80)}, "size"),
    ],
)
def test_what_goes_wrong_has_one_word(pool: Pool, corpus: list[str], change: dict[str, object], cause: str) -> None:
    path, extension, member = load_index(corpus).member(VIDEO)
    request = {"path": path, "extension": extension, "member": member, "frames": [0], "resize": (64, 64)}
    with pytest.raises(DecodeError) as caught:
        pool.decode(**request | {"crop": (0, 0, 64, 64)} | change).result()  # type: ignore[arg-type]
    assert caught.value.cause == cause
    assert ask(pool, corpus, VIDEO, [0]).shape == (1, 64, 64, 3), "the next request is unharmed"


def test_a_long_clip_comes_in_pieces(pool: Pool, corpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    frames = list(range(17))
    whole = ask(pool, corpus, VIDEO, frames)
    for in_one in (1, 5, 16):
        monkeypatch.setattr("sora_train.data.read.pool._PIECE", in_one * 64 * 64 * 3 + 100)
        assert np.array_equal(ask(pool, corpus, VIDEO, frames), whole)
    with Pool(1, timeout_s=120) as fresh:
        ask(fresh, corpus, VIDEO, frames)
        assert os.fstat(fresh._children[0].memory.fileno()).st_size == 16 * 64 * 64 * 3


def test_where_shared_memory_is_full_a_file_on_disk_takes_its_place(
    pool: Pool, corpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ask(pool, corpus, VIDEO, [0])
    real, failures = os.posix_fallocate, [OSError(errno.ENOSPC, "No space left on device")]

    def full(*arguments: int) -> None:
        if failures:
            raise failures.pop()
        real(*arguments)

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert np.array_equal(ask(pool, corpus, VIDEO, [0, 1, 2])[:1], whole) and not failures
    failures += [OSError(errno.ENOSPC, "full"), OSError(errno.ENOSPC, "full")]
    with pytest.raises(DecodeError, match="shared_memory: no room"):
        ask(pool, corpus, VIDEO, list(range(17)))
    assert np.array_equal(ask(pool, corpus, VIDEO, [0]), whole)


def test_reading_that_fails_is_tried_again_before_it_counts(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sora_train.data.read.pool._PAUSES", (0.0, 0.0))
    path = tmp_path / "clip.mp4"
    path.mkdir()  # opens, and can't be read
    with pytest.raises(DecodeError) as caught:
        pool.probe(str(path), "mp4").result()
    assert caught.value.cause == "io"
    assert pool._children[0].asked == 3


def test_decoders_that_do_not_load_are_named_and_without_any_it_is_an_input_error(corpus: list[str]) -> None:
    with Pool(1, decoders=("nothing", "pyav")) as pool:
        errors = pool.load_errors()
        assert "nothing" in errors["nothing"] and errors["pyav"] == ""
        assert ask(pool, corpus, VIDEO, [0]).shape == (1, 64, 64, 3)
    with Pool(1, decoders=("nothing",)) as pool, pytest.raises(InputError, match=r"data.decoders=\['nothing'\]"):
        ask(pool, corpus, VIDEO, [0])


@pytest.mark.skipif(sys.platform != "linux", reason="the filter is Linux's")
def test_a_decoder_that_is_taken_over_has_no_network_and_starts_no_program() -> None:
    code = """
import socket, subprocess
from sora_train.data.read.decode_child import shut_in
shut_in()
call = lambda: socket.create_connection(("127.0.0.1", 9))
for deed in (socket.socket, lambda: subprocess.run(["true"]), call):
    try:
        deed()
    except PermissionError:
        print("refused")
print(open("/etc/hostname").readable())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["refused", "refused", "refused", "True"]


@pytest.mark.campaign
def test_memory_stays_flat_over_five_thousand_clips(corpus: list[str]) -> None:
    index = load_index(corpus)
    with Pool(1, timeout_s=60) as pool:

        def megabytes() -> float:
            pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in (os.getpid(), pid_of(pool))]
            return sum(pages) * 4096 / 2**20

        sizes = []
        for number in range(4900):  # below the recycling, so that it is one child's memory
            row = (1, 2, 3, 5, 6, 7)[number % 6]
            height, width = int(index.height[row]), int(index.width[row])
            pool.decode(*index.member(row), [0, 4, 8], (height, width), (0, 0, height, width)).result()
            if number % 100 == 99:
                sizes.append(megabytes())
    half = sizes[len(sizes) // 2 :]
    print(f"\n{sizes[0]:.1f} MiB after 100 clips, {half[0]:.1f} after 2,500, {half[-1]:.1f} after 4,900")
    assert half[-1] - half[0] < 8, sizes


def test_a_child_killed_during_a_request_is_replaced_and_the_request_answered(pool: Pool, corpus: list[str]) -> None:
    before = ask(pool, corpus, VIDEO, [0, 1])
    first = pid_of(pool)
    os.kill(first, signal.SIGSTOP)  # so that the request is surely under way when the child dies
    waiting = pool.decode(*load_index(corpus).member(VIDEO), [0, 1], (64, 64), (0, 0, 64, 64))
    time.sleep(0.2)
    assert not waiting.done()
    os.kill(first, signal.SIGKILL)
    assert np.array_equal(waiting.result(timeout=120), before)
    assert pid_of(pool) != first and not is_running(first)


def test_a_child_that_hangs_is_killed_at_its_deadline_and_the_request_answered(
    pool: Pool, corpus: list[str], deadlines: Deadlines
) -> None:
    before = ask(pool, corpus, VIDEO, [3])
    first = pid_of(pool)
    os.kill(first, signal.SIGSTOP)
    given = iter([1.0])
    deadlines(lambda request: next(given, 60.0))
    start = time.monotonic()
    assert np.array_equal(ask(pool, corpus, VIDEO, [3]), before)
    assert time.monotonic() - start > 0.9
    assert pid_of(pool) != first and not is_running(first)


def test_a_sample_that_hangs_twice_is_at_fault_and_the_next_is_unharmed(corpus: list[str], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "hangs.mp4")  # opening it waits for a writer that never comes
    with Pool(1, timeout_s=1) as pool:
        with pytest.raises(DecodeError, match="no answer within 1 s, twice") as caught:
            pool.probe(str(tmp_path / "hangs.mp4"), "mp4").result()
        assert caught.value.cause == "timeout"
        pool.timeout_s = 60
        assert ask(pool, corpus, VIDEO, [0]).shape == (1, 64, 64, 3)


def test_members_probed_together_are_each_answered_whatever_one_of_them_does(
    corpus: list[str], tmp_path: Path, deadlines: Deadlines
) -> None:
    path, extension, (offset, size, crc32) = load_index(corpus).member(VIDEO)
    good = (path, extension, offset, size)
    (tmp_path / "page.mp4").write_bytes(b"<html>")
    bad = [(str(tmp_path / "page.mp4"), "mp4", 0, -1), (path, extension, 1 << 40, 100), ("/nowhere.tar", "mp4", 0, 9)]
    os.mkfifo(tmp_path / "hangs.mp4")
    hangs = (str(tmp_path / "hangs.mp4"), "mp4", 0, -1)
    with Pool(1, timeout_s=60) as pool:
        alone = pool.probe(*good).result()
        assert alone["crc32"] == crc32
        found = pool.probe_all([good, *bad, good], pixels=False).result()
        first = pid_of(pool)
        assert found[0] == found[-1] == alone
        assert [e.cause for e in found[1:-1] if isinstance(e, DecodeError)] == ["not_a_video", "truncated", "missing"]
        deadlines(lambda request: 1.0 if "hangs.mp4" in json.dumps(request) else 60.0)
        found = pool.probe_all([good, hangs, good], pixels=False).result()
        assert found[0] == found[-1] == alone and pid_of(pool) != first
        assert isinstance(found[1], DecodeError) and found[1].cause == "timeout"


def test_a_decoder_out_of_memory_is_a_cause_and_not_a_stop(pool: Pool, tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    Image.fromarray(np.zeros((12000, 12000), np.uint8)).save(path, compress_level=1)
    pool.memory_bytes, pool.limits = 512 << 20, Limits(pixels=1 << 30)  # taken over by a child when it starts
    with pytest.raises(DecodeError, match="memory"):
        pool.probe(str(path), "png").result()


def test_a_child_sees_no_credentials_and_imports_no_torch(corpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, "hush-hush")
    with Pool(1) as pool:
        ask(pool, corpus, VIDEO, [0])
        environment = Path(f"/proc/{pid_of(pool)}/environ").read_bytes()
        loaded = Path(f"/proc/{pid_of(pool)}/maps").read_text()
    assert b"PATH=" in environment
    assert b"hush-hush" not in environment
    assert "decord" in loaded and "libtorch" not in loaded


def test_a_child_inherits_no_open_file_beside_its_own(pool: Pool, corpus: list[str], tmp_path: Path) -> None:
    with (tmp_path / "secret").open("w") as secret:
        os.set_inheritable(secret.fileno(), True)
        ask(pool, corpus, VIDEO, [0])
        open_files = [str(link.readlink()) for link in Path(f"/proc/{pid_of(pool)}/fd").iterdir()]
    assert not [name for name in open_files if "secret" in name]


def test_a_closed_pool_leaves_no_process(corpus: list[str]) -> None:
    with Pool(3, timeout_s=120) as pool:
        member = load_index(corpus).member(VIDEO)
        for done in [pool.decode(*member, [0], (64, 64), (0, 0, 64, 64)) for _ in range(12)]:
            done.result()
        pids = [child.process.pid for child in pool._children if child.process]
        assert pids and all(map(is_running, pids))
    assert not any(map(is_running, pids))


def test_closing_does_not_wait_for_a_decoder_that_hangs(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "hangs.mp4")
    pool = Pool(1, timeout_s=3600)
    pending = pool.probe(str(tmp_path / "hangs.mp4"), "mp4")
    while not pool._children or pool._children[0].process is None:
        time.sleep(0.01)
    time.sleep(0.5)
    first = pid_of(pool)
    pool.close()  # before this test's time is up, though the decoder has an hour
    assert not is_running(first) and not is_running(pid_of(pool))
    assert isinstance(pending.exception(timeout=1), Exception)


@pytest.fixture
def ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyAV's own FFmpeg under the names that torchcodec looks for."""
    import av

    bundled = Path(av.__file__).parents[1] / "av.libs"
    for path in bundled.glob("lib*.so.*"):
        named = re.fullmatch(r"(lib\w+)-[0-9a-f]+(\.so\.\d+)[.\d]*", path.name)
        if named:
            (tmp_path / (named[1] + named[2])).symlink_to(path)
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{tmp_path}:{bundled}")


def test_torchcodec_takes_its_place_in_the_chain_where_its_libraries_are(ffmpeg: None, corpus: list[str]) -> None:
    if importlib.util.find_spec("torchcodec") is None:
        pytest.skip("sora_train[torchcodec] is not installed")
    frames = [0, 2, 4, 30, 32]
    with Pool(1) as pool:
        expected = ask(pool, corpus, LONG, frames, (48, 96)).astype(int)
    with Pool(1, decoders=("torchcodec", "pyav")) as pool:
        if said := pool.load_errors()["torchcodec"]:
            pytest.skip(f"not of a version that goes with PyAV's FFmpeg: {said}")
        assert np.abs(ask(pool, corpus, LONG, frames, (48, 96)) - expected).max() <= 2
        maps = Path(f"/proc/{pid_of(pool)}/maps").read_text()
        assert "libtorchcodec_core" in maps and "decord" not in maps


def test_torchcodec_without_its_libraries_is_left_out_with_one_line_and_the_chain_goes_on(
    corpus: list[str],
) -> None:
    if importlib.util.find_spec("torchcodec") is None:
        pytest.skip("sora_train[torchcodec] is not installed")
    with Pool(1, decoders=("torchcodec", "pyav")) as pool:
        said = pool.load_errors()["torchcodec"]
        if not said:
            pytest.skip("FFmpeg's libraries are installed here")
        assert "\n" not in said and "finds none of libavutil.so" in said and len(said) < 300
        assert ask(pool, corpus, VIDEO, [0, 1]).shape == (2, 64, 64, 3)


def test_an_error_code_of_ffmpeg_is_not_one_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """FFmpeg's -1 looks like a missing permission: the sample is at fault, and isn't read again as one of a network."""
    server, raised = Server.__new__(Server), []

    def failing(self: Server, request: dict[str, object]) -> dict[str, object]:
        raise raised[0]

    monkeypatch.setattr(Server, "_answer", failing)
    logged = (16, "mpeg2video", "invalid mb type in P-frame\n")
    for error, cause, said in (
        (av.error.PermissionError(1, "Operation not permitted", "avcodec_send_packet()", logged), "undecodable",
         "FFmpeg: invalid mb type in P-frame (code 1)"),
        (av.error.PermissionError(1, "Operation not permitted", "avformat_open_input"), "undecodable",
         "FFmpeg: avformat_open_input failed, without saying why (code 1)"),
        (av.error.PermissionError(1, "Operation not permitted"), "undecodable",
         "FFmpeg: it failed, without saying why (code 1)"),
        (OSError(5, "Input/output error"), "io", "OSError: [Errno 5] Input/output error"),
    ):  # fmt: skip
        raised[:] = [error]
        assert server._reply({}) == {"cause": cause, "detail": said}
