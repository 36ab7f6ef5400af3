"""Muon moves the matrices of blocks and nothing else, and what it does depends neither on ranks nor on ZeRO."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from sora_train.config.schema import OptimConfig
from sora_train.core.cli import InputError
from sora_train.methods.base import Network
from sora_train.models.text.encoder import TextEncoder
from sora_train.models.video_model import VideoModel
from sora_train.models.wan.family import WAN
from sora_train.models.wan.model import DiT
from sora_train.training.engine.muon import orthogonal
from sora_train.training.engine.optim import optimizer_of

WORKER = Path(__file__).with_name("muon_worker.py")
MUON = OptimConfig(matrices="muon")


def test_two_ranks_at_every_stage_do_as_one_process(python: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[3])}
    command = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(WORKER)]
    done = subprocess.run([*command, *"0123"], capture_output=True, text=True, env=environment, timeout=290)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert done.stdout.count("as by one process\n") == 4


def test_singular_values_end_near_one_whatever_the_shape_and_scale() -> None:
    torch.manual_seed(0)
    matrices = [torch.randn(12, 30) * 1e-4, torch.randn(30, 12) * 100, torch.randn(12, 30), torch.randn(16, 16)]
    for matrix, result in zip(matrices, orthogonal(matrices), strict=True):
        assert result.shape == matrix.shape
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        in_its_frame = left.mT @ result @ right.mT
        assert (in_its_frame - in_its_frame.diagonal().diag()).abs().max() < 1e-3, "the same singular vectors"
        large = values > 0.2 * values.max()
        assert in_its_frame.diagonal()[large].min() > 0.6 and in_its_frame.diagonal().max() < 1.3


def test_it_takes_the_matrices_of_blocks_and_of_the_text_encoder() -> None:
    network = VideoModel(DiT(8, 24, 2, 2, 48, 16), TextEncoder(16, 1, 2, 64), WAN)
    groups = optimizer_of(Network(network, [(network, 1.0)], matrices=network.matrices()), MUON).param_groups
    names = {id(p): name for name, p in network.named_parameters()}
    taken = {names[id(p)] for group in groups if group["muon"] for p in group["params"]}
    attentions = [
        f"{a}.{part}.weight" for a in ("self_attention", "cross_attention") for part in ("q", "k", "v", "out")
    ]
    block = [*attentions, "mlp.0.weight", "mlp.2.weight"]
    text = [f"text.layers.0.{part}.weight" for part in ("qkv", "out", "mlp.0", "mlp.2")]
    assert taken == {*(f"dit.blocks.{n}.{name}" for n in (0, 1) for name in block), *text}
    everything = [id(p) for group in groups for p in group["params"]]
    assert len(everything) == len(set(everything)) == len(names)


def test_a_method_that_names_no_matrices_is_refused() -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(InputError, match="optim.matrices=muon: this method names no matrices"):
        optimizer_of(Network(layer, [(layer, 1.0)]), MUON)
