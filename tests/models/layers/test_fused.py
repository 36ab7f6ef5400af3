"""The written-out steps of a block equal autograd's own of the plain formula, and keep no more than they say."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from sora_train.models.layers.fused import Gelu, gated_sum, modulated_norm, normed_heads
from sora_train.models.layers.rope import rotate, rotations

N, D, M, HEADS, EPS = 12, 24, 3, 2, 1e-6
T_OF_N = torch.tensor([0, 0, 2, 2, 2, 0, 2, 2, 0, 0, 2, 2])  # timestep 1 stands at no token
ROPE = rotations([(3, 2, 2)], D // HEADS, 100.0, torch.device("cpu"))


def plain_modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, (D,), eps=EPS) * (1 + scale)[T_OF_N] + shift[T_OF_N]


def plain_normed_heads(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (D,), weight, EPS).unflatten(-1, (HEADS, -1))


STEPS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "modulated norm": (
        lambda x, shift, scale: modulated_norm(x, shift, scale, T_OF_N, EPS), plain_modulated_norm,
        ((N, D), (M, D), (M, D)),
    ),
    "gated sum": (
        lambda x, y, gate: gated_sum(x, y, gate, T_OF_N), lambda x, y, gate: x + gate[T_OF_N] * y,
        ((N, D), (N, D), (M, D)),
    ),
    "heads": (lambda x, w: normed_heads(x, w, EPS, HEADS, None), plain_normed_heads, ((N, D), (D,))),
    "turned heads": (
        lambda x, w: normed_heads(x, w, EPS, HEADS, ROPE), lambda x, w: rotate(plain_normed_heads(x, w), *ROPE),
        ((N, D), (D,)),
    ),
    "gelu": (Gelu(), lambda x: F.gelu(x, approximate="tanh"), ((150, 5),)),  # more rows than are done at a time
}  # fmt: skip


def run(step: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Its value, and the gradient of each input under one that isn't constant."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = step(*leaves)
    out.backward(torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out))
    return out.detach(), [x.grad for x in leaves if x.grad is not None]


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_step_equals_the_plain_formula_forwards_and_backwards(name: str, dtype: torch.dtype) -> None:
    ours, plain, shapes = STEPS[name]
    torch.manual_seed(0)
    inputs = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]
    out, grads = run(ours, inputs)
    expected, expected_grads = run(plain, [x.double() for x in inputs])
    assert out.dtype == dtype and len(grads) == len(shapes)
    near = {"rtol": 1e-6, "atol": 1e-7} if dtype is torch.float64 else {"rtol": 2e-2, "atol": 2e-2}  # rope is fp32
    torch.testing.assert_close(out.double(), expected, **near)
    for grad, exact in zip(grads, expected_grads, strict=True):
        assert grad.dtype == dtype
        scale = float(exact.abs().max())
        torch.testing.assert_close(grad.double() / scale, exact / scale, **near)


@pytest.mark.parametrize("name", STEPS)
def test_the_compiler_gets_the_same(name: str) -> None:
    ours, _, shapes = STEPS[name]
    torch.manual_seed(1)
    inputs = [torch.randn(shape) for shape in shapes]
    compiled = torch.compile(lambda *x: ours(*x), backend="aot_eager", fullgraph=True)
    for one, two in zip(run(ours, inputs), run(compiled, inputs), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "wide"), [("modulated norm", 1), ("gated sum", 1), ("turned heads", 1), ("gelu", 1)])
def test_no_more_than_one_wide_tensor_is_kept(name: str, wide: int) -> None:
    ours, _, shapes = STEPS[name]
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        ours(*(torch.randn(shape, requires_grad=True) for shape in shapes))
    assert sum(tuple(x.shape) == shapes[0] for x in kept) == wide
