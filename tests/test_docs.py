"""Commands in README and docs name modules, options, files and keys that exist; the pages build strictly."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from itertools import takewhile
from pathlib import Path

import pytest
from omegaconf import DictConfig

from sora_train.plan import Options as PlanOptions
from tests.documented import ROOT, commands

OURS = r"(?:[A-Z_]+=\S+ )*(?:python -m (?:sora_train|data_tools|benchmarks)\.|\./launch/|sbatch .*launch/)"
PLACEHOLDER = re.compile(r"\.\.\.|\b[A-Z]{2,}\b|\[\w+=")
MIXED = ("sora_train.calibrate", "data_tools.encode_latents", "data_tools.inspect")
TRAINING = ("sora_train.train", "sora_train.plan")


@pytest.mark.parametrize("command", [command for command in commands() if re.match(OURS, command)])
def test_a_command_of_the_docs_exists(command: str, compose_tree: Callable[..., DictConfig]) -> None:
    given = list(takewhile(lambda word: word != ">", shlex.split(command)))
    words = [word for word in given if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    script = next((w for w in words if "launch/" in w), None)
    if script is not None:
        assert (ROOT / script).is_file()
        name, arguments = "sora_train.train", words[words.index(script) + 1 :]
        if not arguments or script.endswith(("quickstart.sh", "setup.sh", "test.sh")):
            return
    else:
        name, arguments = words[2], words[3:]
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()
    if PLACEHOLDER.search(" ".join(arguments).replace("-m", "")):
        return
    given = [a for a in arguments if "=" in a and not a.startswith("-")]
    if name in TRAINING:
        mine = {field.name for field in fields(PlanOptions)} if name.endswith("plan") else set()
        given = [re.sub(r"=tag\(.*interval\((\S+),.*", r"=\1", a) for a in given]  # one value of what is swept
        swept = [re.sub(r"(=[^\[{]*?),.*", r"\1", a) for a in given if a.partition("=")[0] not in mine]
        ours = [a for a in swept if not a.startswith(("hydra/", "hydra."))]  # "+hydra." would be wrong
        compose_tree(*ours)
    elif not name.startswith("benchmarks") and hasattr(importlib.import_module(name), "Options"):
        known = {field.metadata.get("key", field.name) for field in fields(importlib.import_module(name).Options)}
        others = [a for a in given if a.partition("=")[0] not in known]
        if name in MIXED:  # options of the command beside overrides of the configuration
            compose_tree(*others)
        else:
            assert not others


def test_tests_that_the_pages_name_exist() -> None:
    tests: dict[str, str] = {}
    for path in (ROOT / "tests").rglob("*.py"):
        tests[path.name] = tests.get(path.name, "") + path.read_text()
    text = "\n".join(page.read_text() for page in (ROOT / "docs").glob("*.md"))
    files = set(re.findall(r"\btest_\w+\.py\b", text))
    assert len(files) > 40 and files <= set(tests)
    named = re.findall(r"\b(test_\w+\.py)::(test_\w+)", text)
    assert len(named) > 40
    assert [pair for pair in named if f"def {pair[1]}" not in tests[pair[0]]] == []


def test_there_are_commands_to_check() -> None:
    found = " ".join(commands())
    assert len(commands()) >= 60
    parts = ("sora_train.plan", "launch/multinode.sh", "sbatch", "data_tools.lint", "-m hydra")
    assert all(part in found for part in parts)


def test_the_pages_build_strictly(tmp_path: Path) -> None:
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, env=quiet)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site/recipes/index.html").is_file()
