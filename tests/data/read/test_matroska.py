"""Checksums of Matroska files."""

from __future__ import annotations

import numpy as np
import pytest

from sora_train.data.read.decode import DecodeError, Limits
from sora_train.data.read.matroska import broken_element
from sora_train.data.read.probe import probe
from tests.data import damaged_clips

WIDE = Limits()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    footage = damaged_clips.footage(np.random.default_rng(0))[:16]
    folder = tmp_path_factory.mktemp("matroska")
    options = {"preset": "ultrafast", "x265-params": "log-level=none"}
    return damaged_clips.clean("libx265", options, 8, "mkv", footage, folder)


def test_a_flipped_bit_anywhere_in_a_cluster_is_noticed(whole: bytes) -> None:
    assert broken_element(whole) is None and probe(whole, "mkv", WIDE)["frames"] == 16
    first = whole.index(b"\x1f\x43\xb6\x75")
    for place in range(first + 20, len(whole) - 200, 997):
        damaged = bytearray(whole)
        damaged[place] ^= 4
        assert broken_element(bytes(damaged)) is not None
        with pytest.raises(DecodeError, match=r"^damaged: the checksum of the Matroska element at byte \d+"):
            probe(bytes(damaged), "mkv", WIDE)


def test_what_has_no_checksums_or_is_cut_off_passes(whole: bytes) -> None:
    first = whole.index(b"\x1f\x43\xb6\x75")
    for data in (b"", b"\x1a\x45\xdf\xa3", bytes(100), b"\xff" * 100, whole[: first + 500], whole[:first] + bytes(64)):
        assert broken_element(data) is None
