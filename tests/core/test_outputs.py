"""An output that can't be written is one line that names the file, the cause and the option."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from sora_train.core.cli import InputError
from sora_train.core.outputs import usable


def test_a_file_in_place_of_a_folder_is_named_with_the_option(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    target = tmp_path / "out" / "x"
    wanted = r"out/x can't be used: Not a directory; choose another out than .*/out/x"
    with pytest.raises(InputError, match=wanted), usable(target, "out"):
        target.mkdir()


def test_a_full_disk_asks_for_room(tmp_path: Path) -> None:
    wanted = "No space left on device; make room where run_dir=.* and give the command"
    with pytest.raises(InputError, match=wanted), usable(tmp_path, "run_dir"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_other_errors_are_not_about_the_output(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), usable(tmp_path, "out"):
        (tmp_path / "missing").read_bytes()
