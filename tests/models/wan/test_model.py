"""The transformer over packs: clips in one pack are as good as alone, and know nothing of each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from sora_train.config.load import build
from sora_train.core.batch import Layout
from sora_train.core.cli import InputError
from sora_train.models.wan.model import DiT, timestep_embedding

GRIDS, TEXTS = ((2, 2, 3), (1, 1, 1), (3, 2, 2), (2, 2, 3)), (4, 1, 6, 2)
TIMES = (0.3, 0.0, 0.7, 1.0, 0.5)
P, E = 8, 12


def make_dit(**changes: Any) -> DiT:
    """A small network with every weight alive (the real one starts with a head and modulations of zero)."""
    torch.manual_seed(0)
    dit = DiT(**{"patch_features": P, "width": 24, "depth": 2, "heads": 2, "ffn": 48, "text_width": E} | changes)
    with torch.no_grad():
        for p in dit.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return dit


def make_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor, Layout]:
    layout = Layout(GRIDS, TEXTS)
    generator = torch.Generator().manual_seed(1)
    x_NP = torch.randn(layout.tokens, P, generator=generator)
    text_LE = torch.randn(sum(TEXTS), E, generator=generator)
    t_of_N = torch.randint(0, len(TIMES), (layout.tokens,), generator=generator)
    return x_NP, text_LE, torch.tensor(TIMES), t_of_N, layout


def alone(clip: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Layout]:
    x_NP, text_LE, t_M, t_of_N, layout = make_inputs()
    tokens = slice(layout.offsets[clip], layout.offsets[clip + 1])
    text = slice(sum(TEXTS[:clip]), sum(TEXTS[: clip + 1]))
    return x_NP[tokens], text_LE[text], t_M, t_of_N[tokens], Layout((GRIDS[clip],), (TEXTS[clip],))


def test_a_pack_equals_its_clips_run_apart_in_output_and_gradients() -> None:
    packed, apart = make_dit(), make_dit()
    out = packed(*make_inputs())
    separate = torch.cat([apart(*alone(clip)) for clip in range(len(GRIDS))])
    torch.testing.assert_close(out, separate, rtol=1e-4, atol=1e-5)
    out.square().sum().backward()
    for clip in range(len(GRIDS)):
        apart.zero_grad() if clip == 0 else None
        apart(*alone(clip)).square().sum().backward()
    for (name, one), two in zip(packed.named_parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-3, atol=1e-3 * float(two.grad.abs().max()), msg=name)


@pytest.mark.parametrize("clip", range(len(GRIDS)))
def test_changing_one_clip_changes_nothing_in_another(clip: int) -> None:
    dit = make_dit()
    x_NP, text_LE, t_M, t_of_N, layout = make_inputs()
    before = dit(x_NP, text_LE, t_M, t_of_N, layout)
    tokens = slice(layout.offsets[clip], layout.offsets[clip + 1])
    x_NP[tokens] += 1.0
    text_LE[sum(TEXTS[:clip]) : sum(TEXTS[: clip + 1])] -= 1.0
    t_of_N[tokens] = (t_of_N[tokens] + 1) % len(TIMES)
    changed = (dit(x_NP, text_LE, t_M, t_of_N, layout) != before).any(1)
    assert changed[tokens].all()
    changed[tokens] = False
    assert not changed.any()


def test_every_token_of_a_clip_sees_every_other() -> None:
    dit, (x_NP, *rest) = make_dit(), alone(0)
    x_NP.requires_grad_()
    dit(x_NP, *rest)[0].sum().backward()
    assert (x_NP.grad.abs().sum(1) > 0).all()


def test_text_and_timestep_matter() -> None:
    dit, (x_NP, text_LE, t_M, t_of_N, layout) = make_dit(), alone(0)
    before = dit(x_NP, text_LE, t_M, t_of_N, layout)
    assert ((dit(x_NP, text_LE + 1, t_M, t_of_N, layout) - before).abs() > 1e-4).any()
    assert ((dit(x_NP, text_LE, t_M + 0.1, t_of_N, layout) - before).abs() > 1e-4).any()


def test_a_timestep_is_looked_up_per_token() -> None:
    """The same times in another order of the table give the same output."""
    dit, (x_NP, text_LE, t_M, t_of_N, layout) = make_dit(), make_inputs()
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(
        dit(x_NP, text_LE, t_M, t_of_N, layout), dit(x_NP, text_LE, t_M[order], order.argsort()[t_of_N], layout)
    )


@pytest.mark.parametrize("kind", ["block", "selective"])
def test_activation_checkpointing_changes_nothing(kind: str) -> None:
    plain, checkpointed = make_dit(), make_dit(activation_checkpointing=kind)
    outs = [dit(*make_inputs()) for dit in (plain, checkpointed)]
    assert torch.equal(*outs)
    for out in outs:
        out.square().sum().backward()
    for one, two in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)


def test_selective_checkpointing_runs_attention_once_and_all_else_twice() -> None:
    flops = {}
    for kind in ("none", "selective", "block"):
        dit = make_dit(activation_checkpointing=kind)
        counter = FlopCounterMode(display=False)
        with counter:
            dit(*make_inputs()).square().sum().backward()
        flops[kind] = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    attention = "sora_train.packed_attention"
    assert flops["selective"][attention] == flops["none"][attention] == flops["block"][attention] / 2
    assert flops["selective"]["aten.addmm"] == flops["block"]["aten.addmm"] > 1.5 * flops["none"]["aten.addmm"]


@pytest.mark.filterwarnings("error:Dynamo detected")  # it must not look into how a back end is chosen
def test_a_compiled_block_computes_the_same() -> None:
    """Over three layouts; eager code for the graphs, since what is looked at is what the compiler sees."""
    plain, compiled = make_dit(), make_dit()
    for block in compiled.blocks:
        block.compile(backend="aot_eager")
    inputs = (make_inputs(), alone(0), alone(2))
    for arguments in inputs:
        torch.testing.assert_close(compiled(*arguments), plain(*arguments), rtol=1e-4, atol=1e-5)
    for dit in (plain, compiled):
        dit.zero_grad()
        dit(*inputs[0]).square().sum().backward()
    for one, two in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-3, atol=1e-4 * float(one.grad.abs().max()))


def test_a_fresh_network_predicts_zero_and_its_gates_are_as_configured() -> None:
    dit = DiT(P, 24, 2, 2, 48, E, gate_init=0.3)
    assert torch.equal(dit(*make_inputs()), torch.zeros(Layout(GRIDS, TEXTS).tokens, P))
    assert dit.blocks[1].modulation[:, 0].tolist() == pytest.approx([0.0, 0.0, 0.3, 0.0, 0.0, 0.3])


def test_the_timestep_embedding_is_cosines_then_sines_of_1000_t() -> None:
    embedded = timestep_embedding(torch.tensor([0.0, 0.5]), 8)
    assert embedded[0].tolist() == [1.0] * 4 + [0.0] * 4
    angles = 500.0 * torch.tensor([1.0, 0.1, 0.01, 0.001])
    torch.testing.assert_close(embedded[1], torch.cat((angles.cos(), angles.sin())), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.mlp_chunk=-1",), "model.mlp_chunk=-1 tokens; must be 0"),
        (("model.mlp_chunk=512", "model.compile=true"), "set one of them to 0 or false"),
    ],
)
def test_what_an_mlp_cannot_be_chunked_by_is_refused(
    compose_tree: Callable[..., DictConfig], overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        build(compose_tree("experiment=demo", *overrides), need_vae=False)


def test_an_mlp_in_chunks_gives_the_same_and_keeps_less() -> None:
    kept, results = [], []
    for chunk in (0, 10):  # of 43 tokens, so the last chunk is a smaller one
        dit, held = make_dit(mlp_chunk=chunk), []
        with saved_tensors_hooks(lambda x, held=held: held.append(x) or x, lambda x: x):
            out = dit(*make_inputs())
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad for p in dit.parameters())])
        kept.append(sum(x.numel() for x in held if x.shape[-1:] == (48,)))  # the MLP's inner width
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4 * float(one.abs().max()))
    assert kept[0] >= 2 * 2 * 43 * 48 and kept[1] < kept[0] / 10
