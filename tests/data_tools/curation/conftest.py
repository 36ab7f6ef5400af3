"""A small folder of footage, and the command as a user gives it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from data_tools import curate
from tests.data_tools.curation import films
from tests.data_tools.curation.outputs import SMALL

LICENCES = """
allowed = ["CC0-1.0", "CC-BY-4.0"]

[[source]]
id = "ours"
match = ["own/*"]
licence = "CC0-1.0"
obtained = "made here"
consent = "not applicable"

[[source]]
id = "theirs"
match = "bought/*"
licence = "CC-BY-4.0"
url = "https://example.org/films"
commercial = false
"""


@pytest.fixture(scope="session")
def footage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Films with shots of known frames, some that can't be used, and one that nobody has the rights in."""
    folder = tmp_path_factory.mktemp("footage")
    (folder / "licences.toml").write_text(LICENCES)
    three = films.joined([films.shot(1, 36), films.shot(2, 60, 0.5), films.shot(3, 40)])
    films.write(folder / "own/three.mp4", three.frames_THWC)
    boxed = films.letterboxed(films.shot(4, 48), 18)
    films.write(folder / "own/boxed.mp4", films.joined([boxed, films.letterboxed(films.still(5, 40), 18)]).frames_THWC)
    again = films.shot(2, 60, 0.5)[12:, :, ::-1]  # a part of the second shot of the first film, mirrored
    films.write(folder / "bought/again.mp4", films.joined([films.shot(6, 40), again]).frames_THWC, crf=26)
    films.write(folder / "found/nobodys.mp4", films.shot(7, 30))
    (folder / "bought/page.mp4").write_bytes(b"<html>not a film</html>")
    (folder / "bought/cut.mp4").write_bytes((folder / "own/three.mp4").read_bytes()[:400])
    (folder / "own/copy.mp4").write_bytes((folder / "own/three.mp4").read_bytes())
    films.write(folder / "own/tiny.mp4", films.shot(8, 30)[:, :48, :96])
    return folder


@pytest.fixture(scope="session")
def out(footage: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one run with two workers."""
    place = tmp_path_factory.mktemp("curated") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["curate", f"videos={footage}", f"out={place}", *SMALL, "workers=2"])
        assert curate.main() == 0
    return place


@pytest.fixture
def curated(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Give the command."""

    def give(folder: Path, out: Path, *more: str) -> int:
        monkeypatch.setattr("sys.argv", ["curate", f"videos={folder}", f"out={out}", *SMALL, "workers=1", *more])
        return curate.main()

    return give
