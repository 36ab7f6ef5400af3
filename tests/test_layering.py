"""Imports run one way, one heavy dependency has one file, and what must start fast imports no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BASE = {"core", "config"}
PARTS = {*BASE, "data", "models", "flow"}
MAY_IMPORT = {  # beside themselves
    "core": set[str](),
    "config": {"core"},
    "data": BASE,
    "models": BASE,
    "flow": BASE,
    "demo_world": BASE,
    "evaluation": {*BASE, "demo_world"},
    "encoding": {*BASE, "models"},
    "generation": {*PARTS, "encoding", "evaluation"},
    "methods": {*PARTS, "encoding", "generation"},
    "training": {*BASE, "methods"},  # what it is given: it imports none of those below methods
    "forecast": {*PARTS, "methods", "training"},
    "operations": {*PARTS, "encoding", "evaluation", "generation", "methods", "training", "forecast"},
    "release": {*PARTS, "evaluation", "generation", "training", "operations"},
    "service": {*BASE, "data", "generation", "release"},
    "top": {*PARTS, "encoding", "generation", "methods", "training", "forecast", "operations", "evaluation",
            "demo_world", "release", "service"},
    "data_tools": {*PARTS, "encoding", "demo_world"},
}  # fmt: skip
HEAVY = {
    "decord": {"sora_train/data/read/back_ends.py"},
    "deepspeed": {
        "sora_train/training/engine/collectives.py",
        "sora_train/training/engine/process_group.py",
        "sora_train/training/engine/zero.py",
    },
    "wandb": {"sora_train/training/report/writers.py"},
    "hydra": {"sora_train/config/hydra.py"},
    "diffusers": {"sora_train/models/video_vae/released.py"},
    "transformers": {
        "sora_train/models/text/released.py",
        "sora_train/evaluation/networks.py",
        "data_tools/curation/caption_folder.py",
        "data_tools/model_scores.py",
        "sora_train/release/local_guard.py",
    },
    "scenedetect": {"data_tools/curation/look.py"},
    "onnxruntime": {"data_tools/model_scores.py"},
    "ray": {"data_tools/curation/on_ray.py"},
    "httpx": {"sora_train/core/chat_server.py"},
    "c2pa": {"sora_train/release/provenance.py"},
    "cryptography": {"sora_train/release/certificates.py"},
    "fastapi": {"sora_train/service/app.py", "sora_train/service/server.py"},
    "peft": {"sora_train/models/wan/lora.py"},
    "tokenizers": {"sora_train/models/text/subwords.py"},
}


@cache
def imports() -> dict[str, set[str]]:
    """Every name that each of our files imports anywhere in it, in full (`from a import b` counts as a and a.b)."""
    found = {}
    for path in sorted([*ROOT.glob("sora_train/**/*.py"), *ROOT.glob("data_tools/**/*.py")]):
        names: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative imports hide where they lead"
                names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
        found[path.relative_to(ROOT).as_posix()] = names
    return found


def module(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def ours() -> dict[str, set[str]]:
    """Our modules, and which of our modules each imports."""
    modules = {module(file) for file in imports()}
    return {module(file): (names & modules) - {"sora_train", "data_tools"} for file, names in imports().items()}


def layer(name: str) -> str:
    if name.startswith("data_tools"):
        return "data_tools"
    part = name.split(".")[1]
    return part if part in MAY_IMPORT else "top"


def test_imports_run_one_way() -> None:
    wrong = [
        f"{name} imports {other}: {layer(name)} must not know {layer(other)}"
        for name, others in ours().items()
        for other in others
        if name not in ("sora_train", "data_tools")
        and layer(other) != layer(name)
        and layer(other) not in MAY_IMPORT[layer(name)]
    ]
    assert not wrong, "\n".join(wrong)


def test_every_layer_has_modules_and_imports_to_hold_to_it() -> None:
    layers = {layer(name) for name in ours() if name not in ("sora_train", "data_tools")}
    assert layers == set(MAY_IMPORT)
    plan = ours()["sora_train.data.order.plan"]
    assert {"sora_train.core.cost", "sora_train.core.seeds", "sora_train.data.index.index"} <= plan


def test_there_are_no_circles() -> None:
    try:
        TopologicalSorter(ours()).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("library", HEAVY)
def test_a_heavy_dependency_has_one_file(library: str) -> None:
    users = {file for file, names in imports().items() if any(n.split(".")[0] == library for n in names)}
    assert users == HEAVY[library]


def test_packages_have_no_facades() -> None:
    files = [*ROOT.glob("sora_train/**/__init__.py"), *ROOT.glob("data_tools/**/__init__.py")]
    assert len(files) >= 8
    assert not [str(path) for path in files if path.read_text()]


@pytest.mark.parametrize(
    "name", ["config.load", "core.world", "core.cost", "core.seeds", "data.read.decode", "data.read.pool"]
)
def test_it_starts_without_torch(name: str) -> None:
    code = f"import sora_train.{name}, sys; print({{m.split('.')[0] for m in sys.modules}} & {{'torch', 'deepspeed'}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "set()"
