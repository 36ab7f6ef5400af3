"""Manifests: signed last, trusted by one's own root, broken by any change; marks that remain where they are lost."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

from sora_train.core.cli import InputError
from sora_train.core.media import read_mp4, write_mp4, write_png
from sora_train.generation.output import Target, save
from sora_train.generation.safeguards import Refused
from sora_train.release.chosen import safeguards_for
from sora_train.release.folder import ReleaseFolder
from sora_train.release.provenance import Signing, read_manifest
from sora_train.release.safeguards import Released
from sora_train.release.verify import verify

Scene = Callable[..., np.ndarray]
Give = Callable[..., int]
ABOUT = {
    "prompt": "a red ring",
    "seed": 3,
    "weights": "w",
    "given": {},
    "options": {"run_dir": "runs/x"},
    "file": "clip.mp4",
}


def signed(release_folder: ReleaseFolder, out: Path, frames: np.ndarray, **about: object) -> Path:
    safeguards = Released(release_folder)
    its = ABOUT | about
    return save(Target(out, "clip"), frames, 8.0, its | safeguards.about(its), safeguards)


def copied(path: Path, out: Path) -> Path:
    """The same streams in a new file, as a messenger or an editor writes it."""
    with av.open(str(path)) as source, av.open(str(out), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    return out


def test_a_sample_is_trusted_and_says_where_it_comes_from(
    release_folder: ReleaseFolder, tmp_path: Path, scene: Scene
) -> None:
    path = signed(release_folder, tmp_path, scene(0))
    found = verify(path, release_folder, None)
    assert found.manifest is not None and found.manifest.state == "Trusted" and not found.manifest.faults
    claims = found.manifest.claims
    assert (claims["provider"], claims["seed"], claims["run"], claims["model"]) == ("Test Lab", 3, "x", "w")
    assert found.manifest.source_type == "trainedAlgorithmicMedia"
    assert "red ring" not in json.dumps(claims) and len(claims["prompt_hash"]) == 32
    assert found.mark_holds and found.known == claims["mark"]["id"] and claims["mark"]["held"]
    sheet = read_manifest(tmp_path / "clip-sheet.png", release_folder.text("root.pem"))
    assert sheet is not None and sheet.state == "Trusted"
    assert json.loads((tmp_path / "clip.json").read_text())["release"]["mark"] == found.known


def test_nothing_touches_a_file_after_it_was_signed(
    release_folder: ReleaseFolder, tmp_path: Path, scene: Scene
) -> None:
    """Any later writer would break the manifest; none of the sample's files is written after."""
    path = signed(release_folder, tmp_path, scene(0))
    for name in ("clip.mp4", "clip-sheet.png"):
        manifest = read_manifest(tmp_path / name, release_folder.text("root.pem"))
        assert manifest is not None and manifest.state == "Trusted", name
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["clip-sheet.png", "clip.json", "clip.mp4"]
    with path.open("ab") as file:
        file.write(b"\0\0\0\x0cmdatmore")
    assert not verify(path, release_folder, None).manifest_holds


def test_signing_leaves_the_frames(release_folder: ReleaseFolder, tmp_path: Path, scene: Scene) -> None:
    write_mp4(tmp_path / "plain.mp4", scene(0), 8.0)
    before, _ = read_mp4(tmp_path / "plain.mp4")
    shutil.copy(tmp_path / "plain.mp4", tmp_path / "draft.mp4")
    Signing(release_folder).sign(tmp_path / "draft.mp4", tmp_path / "signed.mp4", {"model": "m"})
    assert np.array_equal(read_mp4(tmp_path / "signed.mp4")[0], before) and not (tmp_path / "draft.mp4").exists()


def test_every_flipped_bit_of_the_pictures_breaks_the_manifest(
    release_folder: ReleaseFolder, tmp_path: Path, scene: Scene
) -> None:
    path = signed(release_folder, tmp_path, scene(0, frames=4))
    data, root = path.read_bytes(), release_folder.text("root.pem")
    start = data.index(b"mdat") + 4
    rng = np.random.default_rng(0)
    for place in rng.integers(start, start + int.from_bytes(data[start - 8 : start - 4], "big") - 8, 100):
        damaged = bytearray(data)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        manifest = read_manifest(path, root)
        assert manifest is not None and manifest.state == "Invalid", place


def test_a_stream_copy_loses_the_manifest_and_keeps_the_mark(
    release_folder: ReleaseFolder, tmp_path: Path, scene: Scene
) -> None:
    path = copied(signed(release_folder, tmp_path, scene(0)), tmp_path / "copy.mp4")
    found = verify(path, release_folder, None)
    assert found.manifest is None and found.mark_holds and found.holds
    assert found.known, "the release_folder's record knows the id"
    with (release_folder.path / "marks.jsonl").open("ab") as record:
        record.write(b'{"mark": "a1b2\xff')
    assert verify(path, release_folder, None).known == found.known, "a line that was cut short hides no other"


def test_what_was_given_is_kept_with_its_own_manifest(
    release_folder: ReleaseFolder, tmp_path: Path, scene: Scene
) -> None:
    given = signed(release_folder, tmp_path / "earlier", scene(0))
    write_png(tmp_path / "plain.png", scene(1)[0])
    options = {"run_dir": "x", "video": str(given), "end_image": str(tmp_path / "plain.png")}
    path = signed(release_folder, tmp_path, scene(2), given={"video": "hash", "end_image": "hash"}, options=options)
    manifest = read_manifest(path, release_folder.text("root.pem"))
    assert manifest is not None and manifest.state == "Trusted", manifest
    assert sorted(manifest.ingredients) == ["clip.mp4", "plain.png"]
    assert manifest.source_type == "compositeWithTrainedAlgorithmicMedia"
    assert manifest.kept == 2, "the given video's manifest is within the file, beside this one"


def test_another_root_does_not_trust_it(
    release_folder: ReleaseFolder, tmp_path: Path, scene: Scene, release: Give, capsys: pytest.CaptureFixture[str]
) -> None:
    path = signed(release_folder, tmp_path, scene(0))
    assert release("init", f"release={tmp_path}/other", "provider=Others") == 0
    assert release("verify", f"video={path}", f"release={tmp_path}/other") == 1
    assert "isn't trusted" in capsys.readouterr().out
    assert release("verify", f"video={path}", "release=off", f"trust={release_folder.path}/root.pem") == 0
    assert "manifest holds" in capsys.readouterr().out


def test_verify_says_what_holds(
    release_folder: ReleaseFolder, tmp_path: Path, scene: Scene, release: Give, capsys: pytest.CaptureFixture[str]
) -> None:
    named = f"release={release_folder.path}"
    path = signed(release_folder, tmp_path, scene(0))
    assert release("verify", f"video={path}", named) == 0
    assert "manifest and mark hold" in capsys.readouterr().out
    write_mp4(tmp_path / "none.mp4", scene(5), 8.0)
    assert release("verify", f"video={tmp_path}/none.mp4", named) == 1
    assert "neither manifest nor mark holds" in capsys.readouterr().out
    assert release("verify", f"video={tmp_path}/absent.mp4", named) == 2
    (tmp_path / "text.mp4").write_text("no video")
    assert release("verify", f"video={tmp_path}/text.mp4", named) == 2


def test_a_video_made_elsewhere_is_signed(
    release_folder: ReleaseFolder, tmp_path: Path, scene: Scene, release: Give
) -> None:
    write_mp4(tmp_path / "theirs.mp4", scene(0), 8.0)
    command = ["sign", f"video={tmp_path}/theirs.mp4", f"out={tmp_path}/ours.mp4", "generator=Other 2"]
    assert release(*command, f"release={release_folder.path}") == 0
    manifest = read_manifest(tmp_path / "ours.mp4", release_folder.text("root.pem"))
    assert manifest is not None and manifest.state == "Trusted" and manifest.claims["model"] == "Other 2"
    assert release("sign", f"video={tmp_path}/theirs.mp4", f"out={tmp_path}/x.webm", "generator=a") == 2


def test_init_makes_what_its_owner_alone_can_read(release_folder: ReleaseFolder, release: Give, tmp_path: Path) -> None:
    assert release("init", f"release={tmp_path}/new", "provider=A") == 0
    for name in ("sign.key", "mark.key"):
        assert stat.S_IMODE((tmp_path / "new" / name).stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
    assert release("init", f"release={tmp_path}/new", "provider=A") == 2, "keys in use are not replaced"
    assert release("init", f"release={tmp_path}/more", "provider=A", "key=x.key") == 2


def test_an_init_that_was_stopped_or_given_a_wrong_certificate_can_be_given_again(
    release: Give, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    given = ("init", f"release={tmp_path}/new", "provider=A")
    with monkeypatch.context() as stopped, pytest.raises(KeyboardInterrupt):
        stopped.setattr("sora_train.release.commands.shutil.copyfile", killed)
        release(*given)
    for name in ("chain", "key", "root"):
        (tmp_path / name).write_text("no certificate")
    own = (f"certificate={tmp_path}/chain", f"key={tmp_path}/key", f"trust={tmp_path}/root")
    assert release(*given, *own) == 2
    assert release(*given) == 0 and (tmp_path / "new/words.txt").is_file()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("release.json", "{", "is not JSON"),
        ("release.json", '{"provider": "A", "colour": 1}', "there is no option 'colour'"),
        ("sign.key", "nothing", "can't sign"),
        ("words.txt", "no category", "line 1 must be"),
        ("mark.key", "no key", "mark.key is no key"),
        ("mark.key", "", "mark.key is too short"),
    ],
)
def test_a_damaged_folder_is_said_before_anything_is_made(
    release_folder: ReleaseFolder, name: str, content: str, message: str
) -> None:
    (release_folder.path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        safeguards_for(str(release_folder.path))


def test_a_format_without_manifests_is_refused_unless_signing_is_off(release_folder: ReleaseFolder) -> None:
    for format in ("webm", "frames"):
        with pytest.raises(InputError, match="release.sign=false"):
            safeguards_for(str(release_folder.path)).check_format(format)
        safeguards_for(str(release_folder.path), sign=False).check_format(format)


def test_a_refused_video_leaves_no_file(release_folder: ReleaseFolder, tmp_path: Path, scene: Scene) -> None:
    safeguards = Released(release_folder)
    assert safeguards.guard is not None

    class Sees:
        name, sees = "stub", True

        def text(self, text: str) -> None:
            return None

        def frames(self, frames: np.ndarray) -> object:
            from sora_train.release.verdict import Verdict

            return Verdict("anything", "stub")

    safeguards.guard = type(safeguards.guard)([Sees()], True)  # type: ignore[list-item]
    out = tmp_path / "out"
    with pytest.raises(Refused):
        save(Target(out, "whole"), scene(0), 8.0, ABOUT, safeguards)
    with pytest.raises(Refused):
        save(Target(out, "pieces"), iter([scene(0), scene(1)]), 8.0, ABOUT, safeguards)
    assert list(out.iterdir()) == []
    lines = [json.loads(line) for line in (release_folder.path / "refusals.jsonl").read_text().splitlines()]
    assert [line["category"] for line in lines] == ["anything"] * 2 and "red ring" not in str(lines)


def test_openssl_agrees_with_the_chain(release_folder: ReleaseFolder) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl here")
    command = [
        "openssl",
        "verify",
        "-CAfile",
        str(release_folder.path / "root.pem"),
        str(release_folder.path / "chain.pem"),
    ]
    assert subprocess.run(command, capture_output=True, timeout=250).returncode == 0
