"""Adapters: nothing changes at the start, nothing but them is trained, and merged they compute the same."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from safetensors.torch import load_file
from torch import Tensor, nn

from sora_train import export
from sora_train.config.load import build, load, to_yaml
from sora_train.config.schema import Config, LoraConfig, OptimConfig, Precision
from sora_train.core.batch import LatentPack, Layout, Stream
from sora_train.core.cli import InputError
from sora_train.models.video_model import build_video_model, starting_model, whole_weights
from sora_train.models.wan.family import WAN
from sora_train.models.wan.lora import merge, targeted
from sora_train.models.wan.model import DiT
from sora_train.training.engine.optim import adamw
from sora_train.training.engine.zero import Pace
from tests import stubs

SMALL = (
    "experiment=demo", "model.width=24", "model.depth=2", "model.heads=2", "model.ffn=48", "model.frequencies=16",
    "text_encoder.width=16", "text_encoder.heads=2", "text_encoder.buckets=64", "model.patch=1", "vae.channels=8",
    "vae.path=nowhere",
)  # fmt: skip
LORA = ("model.lora.rank=3", "model.lora.alpha=6", "model.lora.targets=[q,mlp.2,text_in.0,time_in.2,out.project]")
LAYOUT = Layout(((2, 2, 3), (1, 2, 2)), (3, 2))


@pytest.fixture
def config(compose_tree: Callable[..., DictConfig]) -> Config:
    return build(compose_tree(*SMALL, *LORA), need_vae=False)


def pack() -> LatentPack:
    generator = torch.Generator().manual_seed(0)
    x, target = (torch.randn(LAYOUT.tokens, 8, generator=generator) for _ in range(2))
    t_of_N = torch.tensor(LAYOUT.lengths).new_tensor([0] * LAYOUT.lengths[0] + [1] * LAYOUT.lengths[1])
    ids = torch.randint(0, 64, (sum(LAYOUT.texts), 2), generator=generator)
    t_M, weight = torch.tensor([0.3, 0.7]), torch.ones(LAYOUT.tokens)
    video = Stream(LAYOUT, x, target, weight, t_M, t_of_N, t_M[t_of_N], torch.tensor([0, 1]))
    return LatentPack({"video": video}, ids)


def adapters_of(network: nn.Module, move: float = 0.0) -> dict[str, Tensor]:
    """What is trained of a network, moved at random."""
    torch.manual_seed(1)
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for p in trained.values():
            p.add_(move * torch.randn_like(p))
    return {name: p.detach().clone() for name, p in trained.items()}


def test_at_the_start_nothing_is_changed(config: Config) -> None:
    """Against the network of the same seed without adapters; its head isn't zero, or all would be."""
    torch.manual_seed(config.seed)
    plain = build_video_model(config)
    adapted = starting_model(config)
    for network, head in ((plain, plain.dit.out.project), (adapted, adapted.dit.out.project.base_layer)):
        with torch.no_grad():
            head.weight.copy_(torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(2)))
        network.requires_grad_(network is adapted)
    expected = plain(pack())
    assert expected.std() > 0.1
    assert torch.equal(adapted(pack()), expected)


def test_the_start_depends_on_the_seed_alone(config: Config) -> None:
    """Whatever was drawn before, and without disturbing what is drawn later."""
    torch.manual_seed(5)
    one = starting_model(config).state_dict()
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), after)
    two = starting_model(config).state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_steps_change_the_adapters_alone(config: Config, stage: int) -> None:
    network = starting_model(config)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    optimizer = adamw([(network.dit, 1.0)], OptimConfig(lr=0.1))
    options = {"zero_optimization": {"stage": stage}}
    engine = stubs.engine(network, optimizer, Precision.fp32, passes=1, clip=1.0, options=options)
    trained = {name.removeprefix("net/") for name in engine.names.values()}
    assert trained == {name for name in before if ".lora_" in name}
    for _ in range(3):
        engine.pace = Pace(100.0)
        engine.backward((engine(pack()) - pack().video.target_NP).square().sum())
        assert engine.step()
    changed = {name for name, p in network.named_parameters() if not torch.equal(p, before[name])}
    assert changed == trained


def test_merged_weights_compute_what_the_adapted_network_does(config: Config) -> None:
    adapted = starting_model(config)
    trained = adapters_of(adapted, move=0.2)
    merged = build_video_model(config)
    merged.load_state_dict(whole_weights(config, trained))
    with torch.no_grad():
        expected, without = adapted(pack()), starting_model(config)(pack())
        torch.testing.assert_close(merged(pack()), expected, rtol=1e-5, atol=1e-5)
    assert (expected - without).abs().max() > 0.1


def test_merging_by_value() -> None:
    weights = {"l.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "l.bias": torch.ones(2)}
    down, up = torch.tensor([[1.0, 10.0]]), torch.tensor([[2.0], [3.0]])
    parts = {"l.lora_A.default.weight": down, "l.lora_B.default.weight": up}
    merged = merge(weights, parts, LoraConfig(rank=2, alpha=1.0))
    assert merged["l.weight"].tolist() == [[2.0, 12.0], [4.5, 19.0]]
    assert merged["l.bias"] is weights["l.bias"] and weights["l.weight"].tolist() == [[1.0, 2.0], [3.0, 4.0]]


@pytest.mark.parametrize("target", WAN.adapter_targets)
def test_every_target_names_layers(target: str) -> None:
    with torch.device("meta"):
        names = targeted(DiT(8, 24, 12, 2, 48, 16), [target])
    often = {"q": 24, "k": 24, "v": 24, "out": 24}.get(target, 12 if "attention" in target or "mlp" in target else 1)
    assert len(names) == often
    assert all(f".{name}".endswith(f".{target}") for name in names)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.lora.targets=[q,self_attenton.k]",), r"no layer .*; did you mean 'self_attention.k'"),
        (("model.lora.targets=[]",), "model.lora.targets is empty; known: q, k"),
        (("model.lora.rank=-1",), "model.lora.rank=-1 must not be below 0"),
        (("model.lora.alpha=0",), "model.lora.alpha=0.0 must be above 0"),
        (("method=autoencoder",), "model.lora is for the video model"),
    ],
)
def test_wrong_keys_are_answered_in_one_line(
    compose_tree: Callable[..., DictConfig], overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(InputError, match=message) as raised:
        build(compose_tree(*SMALL, *LORA, *overrides), need_vae=False)
    assert "\n" not in str(raised.value)


def exported(config: Config, trained: dict[str, Tensor], run: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Export a run of these adapters."""
    run.mkdir(exist_ok=True)
    (run / "config.yaml").write_text(to_yaml(config))
    monkeypatch.setattr(export, "trained_weights", lambda _: trained)
    monkeypatch.setattr(sys, "argv", ["export", f"run_dir={run}", f"out={run / form}", f"format={form}"])
    assert export.main() == 0
    return run / form


@pytest.fixture
def vae(tmp_path: Path) -> Path:
    """A folder where an export looks for the VAE."""
    (tmp_path / "vae").mkdir()
    shape = '{"channels": 8, "patch": 4, "widths": [4, 4], "blocks": [0, 0], "strides": [[4, 1]]}'
    (tmp_path / "vae" / "config.json").write_text(shape)
    return tmp_path / "vae"


def test_a_plain_export_is_merged_and_says_so(
    compose_tree: Callable[..., DictConfig], vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = build(compose_tree(*SMALL, *LORA, f"vae.path={vae}"))
    trained = adapters_of(starting_model(config), move=0.2)
    out = exported(config, trained, tmp_path / "run", "safetensors", monkeypatch)
    written, expected = load_file(out / "model.safetensors"), whole_weights(config, trained)
    assert written.keys() == expected.keys() and all(torch.equal(written[n], expected[n]) for n in written)
    assert load(out).model.lora.rank == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.lora.rank=0",), "trained no adapters"),
        ((), "belong to weights made from its seed"),
        (("flow.prediction=preconditioned",), "flow.prediction=preconditioned"),
    ],
)
def test_adapters_that_nobody_could_use_are_not_written(
    compose_tree: Callable[..., DictConfig], vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    overrides: tuple[str, ...], message: str,
) -> None:  # fmt: skip
    keys = (*SMALL, *LORA, f"vae.path={vae}", "flow.prediction=velocity", *overrides)
    config: Any = build(compose_tree(*keys))
    with pytest.raises(InputError, match=message):
        exported(config, {}, tmp_path / "run", "adapter", monkeypatch)
