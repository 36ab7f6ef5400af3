"""A release release_folder, and short clips that look like something."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks.release_marks import texture
from sora_train.core.cli import InputError
from sora_train.release import __main__ as command
from sora_train.release.folder import ReleaseFolder
from tests.generation.conftest import config, folder, made, sample  # noqa: F401  (fixtures)

pytest.importorskip("c2pa")

Give = Callable[..., int]


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch) -> Give:
    """Give a command of `sora_train.release`; returns its exit code."""

    def give(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["release", *arguments])
        try:
            return command.main()
        except InputError as error:
            print(error, file=sys.stderr)
            return 2

    return give


@pytest.fixture(scope="session")
def made_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release release_folder as `init` makes it."""
    path = tmp_path_factory.mktemp("release") / "folder"
    arguments = sys.argv
    sys.argv = ["release", "init", f"release={path}", "provider=Test Lab", "contact=lab@example.org"]
    try:
        assert command.main() == 0
    finally:
        sys.argv = arguments
    return path


@pytest.fixture
def release_folder(made_folder: Path, tmp_path: Path) -> ReleaseFolder:
    """A copy of it that a test may change."""
    shutil.copytree(made_folder, tmp_path / "release")
    return ReleaseFolder(tmp_path / "release")


@pytest.fixture(scope="session")
def scene() -> Callable[..., np.ndarray]:
    """Make frames of soft textures that drift, as pictures of the world have them; every seed another."""

    def make(seed: int, frames: int = 16, height: int = 144, width: int = 192) -> np.ndarray:
        return texture(seed, (height, width), frames)

    return make
