"""An output that can't be written is one line that names the file, the cause and the option."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from sora_train.core.cli import InputError
from sora_train.core.outputs import usable


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "r/starts.json can't be used: No space left on device; make room where run_dir=r lies"),
        (errno.EROFS, "r/starts.json can't be used: Read-only file system; choose another run_dir than r"),
    ],
)
def test_a_run_folder_that_cannot_be_written_is_one_line(number: int, said: str) -> None:
    with pytest.raises(InputError, match=said), usable(Path("r"), "run_dir"):
        raise OSError(number, os.strerror(number), "r/starts.json")
    with pytest.raises(FileNotFoundError), usable(Path("r"), "run_dir"):
        raise FileNotFoundError(errno.ENOENT, "not there", "vae.safetensors")


def test_a_file_or_a_dangling_link_in_the_place_of_the_run_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "file/run", "link"):
        with (
            pytest.raises(InputError, match=r"can't be used: (File exists|Not a directory)"),
            usable(tmp_path / name, "out"),
        ):
            (tmp_path / name).mkdir(parents=True, exist_ok=True)
