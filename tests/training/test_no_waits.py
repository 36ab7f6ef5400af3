"""A step doesn't wait for its device but where it is said to; and the watch that says so sees what it should."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from sora_train.config.cost import geometry, training_cost
from sora_train.config.load import build
from sora_train.config.registry import METHODS
from sora_train.config.schema import Config, Precision
from sora_train.core.batch import Clip, Pack, Refusal
from sora_train.core.world import World
from sora_train.methods.base import trained
from sora_train.models.layers import ulysses
from sora_train.models.video_vae.model import build_vae
from sora_train.training.engine.ema import Ema
from sora_train.training.engine.engines import Engines
from sora_train.training.engine.power_ema import PowerEmas
from sora_train.training.engine.zero import Engine
from sora_train.training.health.guard import Guard
from sora_train.training.health.watch import Watch
from sora_train.training.parts import Marks, Parts
from sora_train.training.report.console import Console
from sora_train.training.report.meter import Meter
from sora_train.training.state.ledger import Ledger
from sora_train.training.trainer import Trainer
from tests import stubs
from tests.training.waits import DEVICE, Wait, Waits


class _DeepSpeed:
    """What our engine asks of DeepSpeed's, whose own waits aren't ours: forward and backward, and no update."""

    def __init__(self, network: nn.Module) -> None:
        self.network, self.applied = network, True

    def __call__(self, *arguments: Any) -> Any:
        return self.network(*arguments)

    def backward(self, loss: Tensor, scale_wrt_gas: bool) -> None:
        loss.backward()

    def step(self) -> None:
        return

    def get_global_grad_norm(self) -> Tensor:
        return torch.zeros((), device=DEVICE)

    def was_step_applied(self) -> bool:
        return self.applied


class _Engine(Engine):
    """Ours, with that in place of DeepSpeed's."""

    def __init__(self, network: nn.Module, config: Config, stage: int, passes: int) -> None:
        self.stage, self.fp32 = stage, config.precision is Precision.fp32
        self.passes, self._done, self.world, self.clip = passes, 0, 1, config.optim.clip
        self.names = {p: f"net/{name}" for name, p in network.named_parameters() if p.requires_grad}
        self.shapes = {name: tuple(p.shape) for p, name in self.names.items()}
        self.optimizer = torch.optim.AdamW([{"params": list(self.names), "base_lr": 1.0}], lr=1.0)
        self.module, self.engine, self._grad_norm, self._buckets = network, _DeepSpeed(network), 0.0, None
        self._own_loss = torch.zeros((), dtype=torch.float64, device=DEVICE)
        masters = {name: p.detach().float().view(-1) for p, name in self.names.items()}
        self.fragments = [stubs.fragment(name, master) for name, master in masters.items()]


class _Engines(Engines):
    """Ours, over one such engine."""

    def __init__(self, name: str, engine: Engine, config: Config) -> None:
        self._engines, self._with_average, self.fragments = {name: engine}, {name}, engine.fragments
        self.ema = Ema(engine.fragments, config.optim.ema_decay)
        self.powers = PowerEmas(engine.fragments, config.optim.ema_lengths)


class _Plan:
    hash = "plan"
    amendments = ()

    def before(self, at: Any, taken: int) -> str:
        return ""

    def amend(self, at: Any, taken: int, ahead: int, samples: Any) -> None:
        return

    def restore(self, amendments: Any) -> None:
        return


@dataclass
class _Step:
    position: tuple[int, int, int]
    packs: list[Pack]
    refused: list[Refusal] = field(default_factory=list)

    @property
    def samples(self) -> list[int]:
        return [clip.visit.sample for pack in self.packs for clip in pack.clips]


STEPS, EVERY = 3, 5  # the first and the last step are logged


def _run(
    config: Config, folder: Path, packs: list[Pack], stage: int = 1, plant: Callable[[nn.Module], object] | None = None
) -> list[Wait]:
    """The waits of a few steps of the real trainer, task and network, each over these packs."""
    config.run_dir, config.steps = str(folder / "run"), STEPS
    config.logging.every_steps, config.checkpoint.every_steps = EVERY, 0
    config.logging.validate_every = config.logging.sample_every = config.guard.hash_every = 0
    config.checkpoint.snapshot_every = 0
    config.vae.path = str(folder)
    save_file(build_vae(config.vae).state_dict(), folder / "vae.safetensors")
    learner = METHODS.get(config.method).learner(config, DEVICE)
    (name, trains), *_ = trained(learner.networks)
    dtype = torch.float32 if config.precision is Precision.fp32 else torch.bfloat16
    network: Any = trains.module.to(DEVICE, dtype)
    if config.parallel.sequence > 1:
        others = ulysses.Imagined(config.parallel.sequence)
        network.split_sequence(ulysses.Groups({others.parts: others}, others.parts))
        packs = [replace(pack, part=(0, others.parts)) for pack in packs]
    if plant is not None:
        plant(network)
    meter = Meter(geometry(config), training_cost(config), DEVICE, 1e12, 10**6)

    def steps(*_: Any) -> Iterator[_Step]:
        for number in range(STEPS):
            yield _Step((0, 0, number), packs)

    watch = Watch(folder / "logs", 60.0, 60.0, lambda reason: None)
    parts = Parts(
        learner, _Engines(name, _Engine(network, config, stage, len(packs)), config), meter, lambda step: None,
        Console(STEPS, False, folder), _Plan(), steps, lambda: iter(()), lambda *_: {},
        lambda _: Marks({}, None), Ledger(Path(config.run_dir), 0), None, Guard(), watch,
    )  # fmt: skip
    trainer = Trainer(config, World(), DEVICE, parts)
    with Waits([t for pack in packs for clip in pack.clips for t in _tensors(clip)]) as waits:  # the loader pins them
        assert trainer.loop() == 0
    trainer.close()
    assert trainer.step == STEPS
    return waits.found


def _tensors(clip: Clip) -> list[Tensor]:
    found: list[Tensor] = []
    clip.moved(lambda x: found.append(x) or x)
    return found


def _unlogged(waits: list[Wait]) -> list[str]:
    return [str(wait) for wait in waits if "Trainer.report" not in wait.inside]


_DEMO = ("experiment=demo", "model.depth=2")
_CASES = {
    "as configured": (),
    "bf16": ("precision=bf16",),
    "recomputing blocks": ("model.activation_checkpointing=block",),
    "recomputing all but attention": ("model.activation_checkpointing=selective",),
    "a timestep per frame": ("flow.per_frame_noise=1.0", "flow.shift_tokens=64"),
    "weighted by clip": ("flow.weighting=clip",),
    "predicting data": ("flow.prediction=x0",),
    "no cache of latents": ("vae.cache_mib=0",),
    "encoding in tiles": ("vae.cache_mib=0", "vae.tile.pixels=8", "vae.tile.overlap=2", "vae.tile.frames=1"),
    "several averages": ("optim.ema_lengths=[0.05,0.1]",),
    "adapters": ("model.lora.rank=2",),
    "ranks that share a pack": ("parallel.sequence=2",),
    "places scaled": ("model.rope_scaling=ntk", "model.rope_factors=[2.0,1.0,1.0]"),
}
_ALWAYS = ("as configured", "bf16", "recomputing all but attention", "adapters", "ranks that share a pack")


def _cases() -> list[Any]:
    campaign = pytest.mark.campaign
    return [pytest.param(keys, id=n, marks=() if n in _ALWAYS else campaign) for n, keys in _CASES.items()]


@pytest.mark.parametrize("overrides", _cases())
def test_a_step_waits_for_nothing_but_at_log_time(
    overrides: tuple[str, ...], compose_tree: Callable[..., DictConfig], make_clip: Callable[..., Clip],
    tmp_path: Path, process_group: torch.device,
) -> None:  # fmt: skip
    config = build(compose_tree(*_DEMO, *overrides), need_vae=False)
    tasks = ("text_to_video", "image_to_video", "interpolation", "frames")
    mixed = [make_clip((9, 36, 48), n, task) for n, task in enumerate(tasks)]
    mixed += [make_clip((1, 36, 36), 9, "image"), make_clip((17, 36, 24), 10, "extension")]
    packs = [Pack(mixed), Pack([])]
    waits = _run(config, tmp_path, packs)
    assert _unlogged(waits) == []
    assert {wait.inside[0] for wait in waits} == {"Meter.read", "Engine.grad_norm"}  # which the watch sees
    assert len(waits) == 2 * (2 + STEPS // EVERY)


def test_latents_and_text_that_were_encoded_before_are_not_waited_for(
    compose_tree: Callable[..., DictConfig], make_clip: Callable[..., Clip], tmp_path: Path,
    process_group: torch.device,
) -> None:  # fmt: skip
    config = build(compose_tree(*_DEMO), need_vae=False)
    clips = [make_clip((9, 36, 48), n) for n in range(3)]
    grid = geometry(config).grid(9, 36, 48)
    patch = geometry(config).patch
    for clip in clips[:2]:  # of the neighbours, the last is encoded here
        clip.latents_CTHW = torch.randn(config.vae.channels, grid[0], grid[1] * patch, grid[2] * patch)
    assert _unlogged(_run(config, tmp_path, [Pack(clips)])) == []


def test_an_autoencoder_waits_for_nothing_either(
    compose_tree: Callable[..., DictConfig], make_clip: Callable[..., Clip], tmp_path: Path,
    process_group: torch.device,
) -> None:  # fmt: skip
    config = build(compose_tree("experiment=demo_vae"), need_vae=False)
    packs = [Pack([make_clip((9, 36, 48), 1), make_clip((9, 36, 48), 2), make_clip((5, 24, 36), 3)]), Pack([])]
    assert _unlogged(_run(config, tmp_path, packs)) == []


def test_without_zero_in_fp32_the_gradient_norm_is_the_one_wait(
    compose_tree: Callable[..., DictConfig], make_clip: Callable[..., Clip], tmp_path: Path,
    process_group: torch.device,
) -> None:  # fmt: skip
    """There DeepSpeed doesn't look for what isn't finite, and we do."""
    config = build(compose_tree(*_DEMO), need_vae=False)
    waits = _run(config, tmp_path, [Pack([make_clip((9, 36, 48), 1)])], stage=0)
    unlogged = [wait for wait in waits if "Trainer.report" not in wait.inside]
    assert [(wait.inside[0], wait.text.partition("#")[0].strip()) for wait in unlogged] == [
        ("Engine._step_fp32", "self._grad_norm = known = float(norm)")
    ] * STEPS


def _item(x: Tensor) -> object:
    return x.sum().item()


def _condition(x: Tensor) -> object:
    return 1 if x.sum() > 0 else 2


def _mask(x: Tensor) -> object:
    return x[x > 0]


def _masked_write(x: Tensor) -> None:
    x[x > 0] = 0.0


def _to_host(x: Tensor) -> object:
    return x.cpu()


def _listed(x: Tensor) -> object:
    return x.tolist()


def _copied_out(x: Tensor) -> object:
    return torch.zeros(6).copy_(x)


def _from_list(x: Tensor) -> object:
    return torch.tensor([1.0, 2.0], device=x.device)


def _pageable(x: Tensor) -> object:
    return torch.ones(6).to(x.device, non_blocking=True)


def _blocking(x: Tensor) -> object:
    return torch.ones(6).to(x.device)


def _host_index(x: Tensor) -> object:
    return x[torch.tensor([0, 1])]


def _repeats(x: Tensor) -> object:
    return x.repeat_interleave(x.long())


def _distinct(x: Tensor) -> object:
    return x.unique()


def _places(x: Tensor) -> object:
    return x.nonzero()


def _compared(x: Tensor) -> object:
    return torch.equal(x, x)


def _host_choice(x: Tensor) -> object:
    return torch.where(x > 0, x, torch.tensor(1.0))


_PLANTED = (
    _item, _condition, _mask, _masked_write, _to_host, _listed, _copied_out, _from_list, _pageable, _blocking,
    _host_index, _repeats, _distinct, _places, _compared, _host_choice,
)  # fmt: skip


@pytest.mark.parametrize("wrong", _PLANTED, ids=lambda f: f.__name__)
def test_the_watch_sees_what_is_planted_and_names_the_line(wrong: Callable[[Tensor], object]) -> None:
    x = torch.zeros(6, device=DEVICE)
    with Waits() as waits:
        try:
            wrong(x)
        except AssertionError as error:  # where nothing can stand in for the answer
            assert "waits for the device" in str(error)
    [wait] = waits.found
    assert (wait.file, wait.inside[0]) == ("tests/training/test_no_waits.py", wrong.__name__)
    assert wait.line == inspect.getsourcelines(wrong)[1] + 1


def test_the_watch_lets_pass_what_waits_for_nothing() -> None:
    x, ready = torch.zeros(6, device=DEVICE), torch.ones(6)
    with Waits([ready]) as waits:
        place = ready.to(DEVICE, non_blocking=True).long()
        y = x[place] + x.index_select(0, place) + 2.0 + torch.tensor(1.0)
        y = torch.where(torch.isfinite(y), 1.0, float("nan")).repeat_interleave(3)
        x.to("cpu", non_blocking=True)
        ready.sum().item(), ready[ready > 0].tolist()
        y[:2] = 1.0
        assert x.repeat_interleave(place, output_size=12).shape == (12,)
    assert waits.found == []


@pytest.mark.parametrize(
    ("wrong", "backward"),
    [(_item, False), (_to_host, True)]
    + [pytest.param(*case, marks=pytest.mark.campaign) for case in
       ((_item, True), (_mask, False), (_mask, True), (_to_host, False))],
)  # fmt: skip
def test_a_wait_planted_in_a_step_is_caught(
    wrong: Callable[[Tensor], object], backward: bool, compose_tree: Callable[..., DictConfig],
    make_clip: Callable[..., Clip], tmp_path: Path, process_group: torch.device,
) -> None:  # fmt: skip
    def look(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if backward:
            output.register_hook(partial(_let, wrong))
        else:
            wrong(output)

    config = build(compose_tree(*_DEMO), need_vae=False)
    run = partial(
        _run, config, tmp_path, [Pack([make_clip((9, 36, 48), 1)])],
        plant=lambda network: network.get_submodule("dit.blocks.1").register_forward_hook(look),
    )  # fmt: skip
    line = f"test_no_waits.py:{inspect.getsourcelines(wrong)[1] + 1}: "
    if wrong is _mask:
        with pytest.raises(AssertionError, match=line):
            run()
        return
    unlogged = _unlogged(run())
    assert len(unlogged) == STEPS and all(line in wait for wait in unlogged)


def _let(wrong: Callable[[Tensor], object], gradient: Tensor) -> None:
    wrong(gradient)
