"""Captions by a real server with OpenAI's interface, `transformers serve`, of a tiny model that learned one answer."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch

from sora_train.core.chat_server import Reply, Server
from tests.data_tools.curation import films
from tests.data_tools.curation.caption_stub import GOOD
from tests.data_tools.curation.outputs import lines, samples
from tests.data_tools.curation.test_caption_folder import jpeg, write_model

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(400)]
ANSWER = json.dumps(GOOD)


def teach(folder: Path, answer: str) -> None:
    """Give a model's vocabulary a word that is a whole answer, and let the model end every prompt with it."""
    from transformers import LlavaForConditionalGeneration

    path = folder / "tokenizer.json"
    stored = json.loads(path.read_text())
    stored["model"]["vocab"][answer] = stored["model"]["vocab"].pop("clip")
    path.write_text(json.dumps(stored))
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    said, end = stored["model"]["vocab"][answer], stored["model"]["vocab"]["</s>"]
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    generator = torch.Generator().manual_seed(0)
    others = torch.tensor([n for n in stored["model"]["vocab"].values() if n not in (said, end, 2)])  # 2: an image
    for _ in range(60):
        prompt = others[torch.randint(len(others), (16, 12), generator=generator)]
        ids = torch.cat([prompt, torch.tensor([[said, end]]).expand(16, 2)], 1)
        labels = torch.where(torch.arange(14) < 12, -100, ids)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.1
    model.save_pretrained(folder)


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of `transformers serve` with a model's folder."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder), "--device", "cpu"]
    log = folder.with_suffix(".log")
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    with log.open("w") as file:
        server = subprocess.Popen([*command, "--port", str(port)], stdout=file, stderr=file, env=environment)
    try:
        ends = time.monotonic() + 240
        while True:
            assert server.poll() is None and time.monotonic() < ends, log.read_text()[-2000:]
            try:
                httpx.get(f"http://localhost:{port}/v1/models", timeout=2, trust_env=False).raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.5)
        yield f"http://localhost:{port}/v1"
    finally:
        server.kill()
        server.wait()


def test_footage_is_captioned_by_transformers_serve(tmp_path: Path, curated: Callable[..., int]) -> None:
    pytest.importorskip("openai", reason="pip install -e '.[captions]'")
    model, footage, out = tmp_path / "model", tmp_path / "footage", tmp_path / "out"
    write_model(model)
    teach(model, ANSWER)
    for seed in (1, 2):
        films.write(footage / f"{seed}.mp4", films.shot(seed, 30))
    with served(model) as url:
        server = Server(url, None)
        pictures = [jpeg(frame) for frame in films.shot(1, 8)]
        assert server.model == str(model)
        assert server.ask("describe the clip", pictures, 0.0, 9) == Reply(ANSWER, False)
        assert server.ask("describe the clip", pictures, 0.0, 1) == Reply(ANSWER, True)
        server.close()
        assert curated(footage, out, f"captions={url}", "licence=CC0-1.0") == 0
    found = [sample["json"]["captions"] for sample in samples(out)]
    assert len(found) == 2 and all(captions["long"] == GOOD["long"] for captions in found)
    assert all("kept" in entry for entry in lines(out / "ledger/captions.jsonl"))
