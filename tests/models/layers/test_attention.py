"""Packed attention is the plain formula with a block mask, forwards and backwards."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sora_train.core.cli import InputError
from sora_train.models.layers.attention import choose, packed_attention


def plain(q_NKd: Tensor, k_NKd: Tensor, v_NKd: Tensor, q_lengths: list[int], k_lengths: list[int]) -> Tensor:
    """The oracle: softmax over all keys, those of other groups at minus infinity."""
    groups = torch.arange(len(q_lengths))
    q_group, k_group = (
        groups.repeat_interleave(torch.tensor(q_lengths)),
        groups.repeat_interleave(torch.tensor(k_lengths)),
    )
    scores = torch.einsum("nkd,mkd->knm", q_NKd, k_NKd) / q_NKd.shape[-1] ** 0.5
    scores = scores.masked_fill(q_group[:, None] != k_group[None, :], float("-inf"))
    return torch.einsum("knm,mkd->nkd", scores.softmax(-1), v_NKd)


LENGTHS = {
    "one clip": ([7], [7]),
    "clips of all lengths": ([5, 5, 3, 9, 9, 9, 2], [5, 5, 3, 9, 9, 9, 2]),
    "clips of one token": ([1, 1, 4, 1], [1, 1, 4, 1]),
    "cross": ([6, 6, 2, 2], [3, 3, 1, 8]),
    "equal queries, unequal keys": ([4, 4, 4], [2, 5, 2]),
    "unequal groups in one padded batch": ([9, 2, 9, 3, 2, 30], [4, 7, 1, 7, 2, 30]),
    "a group too large to pad others to": ([3, 200, 2, 3], [3, 200, 2, 3]),
    "keys that nobody asks for": ([0, 4, 0, 0, 3], [2, 5, 2, 1, 1]),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_packed_attention_equals_the_plain_formula(name: str) -> None:
    q_lengths, k_lengths = LENGTHS[name]
    torch.manual_seed(0)
    inputs = [
        torch.randn(n, 2, 8, dtype=torch.float64, requires_grad=True) for n in (sum(q_lengths), *[sum(k_lengths)] * 2)
    ]
    upstream = torch.randn(sum(q_lengths), 2, 8, dtype=torch.float64)
    results = []
    for attention in (packed_attention, plain):
        out = attention(*inputs, q_lengths, k_lengths)
        results.append((out, *torch.autograd.grad(out, inputs, upstream)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_other_precisions_stay_within_their_rounding(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    lengths = [40, 40, 1, 17]
    exact = [torch.randn(98, 2, 16, dtype=torch.float64) for _ in range(4)]
    results = []
    for attention, to in ((packed_attention, dtype), (plain, torch.float64)):
        q, k, v = (x.to(dtype).to(to).requires_grad_() for x in exact[:3])
        out = attention(q, k, v, lengths, lengths)
        results.append((out, *torch.autograd.grad(out, (q, k, v), exact[3].to(dtype).to(to))))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).abs().max() < tolerance * theirs.abs().max()


def test_a_caption_of_few_tokens_is_differentiated_in_full_precision() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(n, 2, 16).bfloat16().requires_grad_() for n in (96, 5, 5))
    grad = torch.randn(96, 2, 16).bfloat16()
    packed_attention(q, k, v, (96,), (5,)).backward(grad)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    plain(*exact, (96,), (5,)).backward(grad.double())
    for one, two in zip((q, k, v), exact, strict=True):
        error = (one.grad.double() - two.grad).abs()
        assert float(error.max() / two.grad.abs().max()) < 2**-8  # the result's own rounding, and the output's


def test_the_compiler_sees_one_operation_whatever_the_lengths() -> None:
    q = torch.randn(9, 2, 8, requires_grad=True)
    lengths = torch.tensor([4, 4, 1])
    for n in (lengths, torch.tensor([3, 3, 3])):  # padded in a batch, and equal
        torch.library.opcheck(torch.ops.sora_train.packed_attention.default, (q, q, q, n, n, "sdpa"))
    graphs: list[list[str]] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    compiled = torch.compile(lambda x, n: packed_attention(x, x, x, n, n, "sdpa"), backend=backend, fullgraph=True)
    for n in (lengths, torch.tensor([1, 2, 6]), torch.tensor([3, 3, 3])):
        torch.testing.assert_close(compiled(q, n), packed_attention(q, q, q, n, n))
    assert len(graphs) == 1 and sum("packed_attention" in target for target in graphs[0]) == 1


def test_back_ends_for_gpus_are_refused_elsewhere_with_one_line() -> None:
    x = torch.randn(4, 1, 8)
    for backend in ("varlen", "flex"):
        with pytest.raises(InputError, match=f"model.attention={backend} needs a CUDA GPU, and this is cpu"):
            packed_attention(x, x, x, [4], [4], backend)
    with pytest.raises(InputError, match="varlen computes in bf16"):
        choose("varlen", "cuda", torch.float32)
    assert choose("auto", "cpu", torch.bfloat16) == choose("sdpa", "cpu", torch.float32) == "sdpa"


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@GPU
@pytest.mark.parametrize("backend", ["sdpa", "varlen", "flex"])
@pytest.mark.parametrize("name", LENGTHS)
def test_back_ends_for_gpus_equal_the_plain_formula(name: str, backend: str) -> None:
    q_lengths, k_lengths = LENGTHS[name]
    torch.manual_seed(0)
    sizes = (sum(q_lengths), sum(k_lengths), sum(k_lengths), sum(q_lengths))
    exact = [torch.randn(n, 2, 64).bfloat16() for n in sizes]
    results = []
    for attention, to, extra in ((packed_attention, torch.bfloat16, (backend,)), (plain, torch.float64, ())):
        device = "cuda" if extra else "cpu"
        q, k, v = (x.to(device, to).requires_grad_() for x in exact[:3])
        out = attention(q, k, v, q_lengths, k_lengths, *extra)
        results.append((out, *torch.autograd.grad(out, (q, k, v), exact[3].to(device, to))))
    for ours, theirs in zip(*results, strict=True):
        assert (ours.cpu().double() - theirs).abs().max() < 2e-2 * theirs.abs().max()


def test_a_clip_of_one_token_attends_to_itself() -> None:
    value = torch.randn(1, 2, 4)
    torch.testing.assert_close(packed_attention(torch.randn(1, 2, 4), torch.randn(1, 2, 4), value, [1], [1]), value)


@pytest.mark.parametrize(("q_lengths", "k_lengths"), [([3], [4]), ([2, 2], [4]), ([5], [5])])
def test_groups_that_do_not_add_up_are_refused(q_lengths: list[int], k_lengths: list[int]) -> None:
    x = torch.randn(4, 1, 2)
    with pytest.raises(ValueError, match="don't match"):
        packed_attention(x, x, x, q_lengths, k_lengths)
