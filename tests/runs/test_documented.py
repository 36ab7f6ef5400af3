"""Every command of README and docs is given as it stands, in a checkout with tiny networks, and ends with 0.

Those that stay until they are stopped must answer; those in NOT_RUN are named there with the reason.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkout import Checkout
from tests.data_tools.curation import films
from tests.documented import NOT_RUN, all_sessions, as_run, commands

SERVERS = {"tensorboard": r"TensorBoard \S+ at (http\S+)", "mkdocs serve": r"Serving on (http\S+)"}
QUICK = r"--help|--cfg|^source "  # these write nothing and want nothing
SIZES = r"sora_train\.plan|operations\.reference|benchmarks\."  # these want the configuration as it is
PACKAGES = {"hydra/sweeper=optuna": "optuna", "mkdocs serve": "material", "tensorboard": "tensorboard"}
OWN = (2, 6, 10)  # numbers of samples that are videos with a caption beside them


def cases() -> list[Any]:
    found = []
    for session in all_sessions():
        given = [command for command in session if command not in NOT_RUN]
        slow = not all(re.search(QUICK, command) for command in given)
        marks = pytest.mark.campaign if slow else ()
        if given:
            found.append(pytest.param(given, marks=marks, id=given[0].replace("/", ".")[:70]))
    return found


def test_what_is_not_run_stands_in_the_docs() -> None:
    assert set(NOT_RUN) <= set(commands())


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("given", cases())
def test_commands_of_the_docs_run(given: list[str], request: pytest.FixtureRequest, tmp_path: Path) -> None:
    for part, package in PACKAGES.items():
        if any(part in command for command in given):
            pytest.importorskip(package)
    if all(re.search(f"{QUICK}|{SIZES}", command) for command in given):
        checkout = Checkout(tmp_path / "sora_train", small=False)
    elif "./launch/quickstart.sh" in given:  # it takes no options, so what it makes is as large as it comes
        checkout = Checkout(tmp_path / "sora_train")
    else:
        checkout = request.getfixturevalue("furnished").copy(tmp_path / "sora_train")
    if any("checkpoint=old" in command for command in given):
        request.getfixturevalue("runs")("imports")
        (checkout.folder / "old").mkdir()
        (checkout.folder / "old/checkpoints").symlink_to(tmp_path / "bed/stage-3/theirs")
    for command in given:
        line = as_run(command)
        if answer := next((answer for start, answer in SERVERS.items() if command.startswith(start)), None):
            serve(checkout, line, answer)
        else:
            assert "does not provide the extra" not in checkout.give(line)
    shutil.rmtree(checkout.folder)


def serve(checkout: Checkout, line: str, answer: str) -> None:
    """Start what serves, and get its first page from where it says it is."""
    server = subprocess.Popen(
        line.split(), cwd=checkout.folder, env=checkout.settings(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    assert server.stdout
    try:
        said = ""
        while not (found := re.search(answer, said)):
            assert (more := server.stdout.readline()), said
            said += more
        with urllib.request.urlopen(found[1], timeout=60) as page:
            assert page.status == 200 and b"<html" in page.read().lower()
    finally:
        server.terminate()
        server.wait(timeout=30)
        server.stdout.close()


@pytest.fixture(scope="session")
def furnished(
    quickstart: tuple[Checkout, dict[str, str]], make_sample: Callable[[int], dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Checkout:  # fmt: skip
    """The quickstart's checkout with what else a reader has: videos, shards, a VAE, released weights."""
    from tests.models.test_released import write_pipeline
    from tests.models.video_vae.test_perceptual import random_vgg

    checkout = quickstart[0].copy(tmp_path_factory.mktemp("furnished") / "sora_train")
    folder = checkout.folder
    (folder / "my_videos").mkdir()
    table = ["file,caption"]
    for number in OWN:
        sample = make_sample(number)
        (folder / f"my_videos/{number}.mp4").write_bytes(sample["mp4"])
        (folder / f"my_videos/{number}.txt").write_bytes(sample["txt"])
        table.append(f"{number}.mp4,block {number}")
    (folder / "table.csv").write_text("\n".join(table) + "\n")
    checkout.give("python -m data_tools.build_shards videos=my_videos out=shards && ln -s shards my")
    (folder / "raw").mkdir()
    (folder / "raw/licences.toml").write_text(
        'allowed = ["CC0-1.0"]\n[[source]]\nid = "nasa"\nmatch = "*"\nlicence = "CC0-1.0"\n'
    )
    films.write(folder / "raw/film.mp4", films.joined([films.shot(1, 30), films.shot(2, 30)]).frames_THWC)
    (folder / "raw/film.txt").write_text("coloured discs over soft patches")
    (folder / "vae").symlink_to("runs/demo_vae/export")
    write_pipeline(folder / "Wan2.1-T2V-1.3B-Diffusers")
    vgg = random_vgg()
    heads = {name: weight for name, weight in vgg.items() if name.startswith("lin")}
    torch.save({name: weight for name, weight in vgg.items() if name not in heads}, folder / "vgg16.pth")
    torch.save(heads, folder / "lpips_vgg.pth")
    return checkout
