"""Attention over packed sequences: tokens attend to the tokens of their own group only.

One function, `packed_attention`, with three back ends:

    sdpa    torch's fused attention, batch by batch of groups; any device
    varlen  FlashAttention over all groups in one call; CUDA, bf16 or fp16. Uses FlashAttention-4 or 3 if such a
            package is installed, else the FlashAttention-2 that is built into torch
    flex    FlexAttention with a block mask (`torch.nn.attention.flex_attention`), compiled; CUDA

For torch.compile, attention is a custom operator (flex: a graph break) that takes group lengths as host tensors.
Hence a new layout of the pack causes neither recompilation nor a synchronisation with the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import attention as implementations
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import register_flop_formula

from sora_train.core.batch import send
from sora_train.core.cli import InputError
from sora_train.models.layers.batches import batches

BACKENDS = ("auto", "sdpa", "varlen", "flex")
_ALL_KEYS = {"window_size_left": -1, "window_size_right": -1}  # no sliding window
_FEW_KEYS = 256  # up to this many keys, a CPU's backward pass is faster in fp32 than in bf16 (up to 4x for captions)
_aten = torch.ops.aten


def packed_attention(
    q_NKd: Tensor,
    k_NKd: Tensor,
    v_NKd: Tensor,
    q_lengths: Sequence[int] | Tensor,
    k_lengths: Sequence[int] | Tensor,
    backend: str = "auto",
) -> Tensor:
    """Compute softmax(q k^T / sqrt(d)) v within each group.

    Args:
        q_NKd: Queries of all groups end to end.
        k_NKd: Keys of all groups end to end; their number may differ from the queries'.
        v_NKd: Values, one per key.
        q_lengths: Queries of each group. Tensors of lengths are int64 on the host.
        k_lengths: Keys of each group. A group may have keys and no queries, but not queries and no keys.
        backend: One of `BACKENDS`.

    Returns:
        `(N, K, d)`, like the queries.

    Raises:
        ValueError: The lengths don't add up to the tensors' sizes.
        InputError: The back end can't run on this device.
    """
    q_host, k_host = (x if isinstance(x, Tensor) else host_lengths(x) for x in (q_lengths, k_lengths))
    return _attend(q_NKd, k_NKd, v_NKd, q_host, k_host, choose(backend, q_NKd.device.type, q_NKd.dtype))


def _attend(q: Tensor, k: Tensor, v: Tensor, q_lengths: Tensor, k_lengths: Tensor, backend: str) -> Tensor:
    if backend == "flex":
        return _flex(q, k, v, q_lengths, k_lengths)
    return _forward(q, k, v, q_lengths, k_lengths, backend)[0]


def host_lengths(lengths: Sequence[int]) -> Tensor:
    """Make a tensor of lengths, int64 on the host; it is real even while a forecast traces with fake tensors."""
    with _disable_current_modes():
        return torch.tensor(lengths, dtype=torch.int64, device="cpu")


@torch.compiler.assume_constant_result  # called at compile time and not traced, because it may try out kernels
def choose(backend: str, device: str, dtype: torch.dtype) -> str:
    """Choose the back end for a device type and dtype. Raises InputError if the configured one can't run there."""
    return _chosen(backend, device, dtype)


@lru_cache
def _chosen(backend: str, device: str, dtype: torch.dtype) -> str:
    half = dtype in (torch.bfloat16, torch.float16)
    if backend == "auto":
        if device != "cuda":
            return "sdpa"
        return "varlen" if half and newest_flash(dtype) else "flex" if _works("flex", dtype) else "sdpa"
    if backend in ("varlen", "flex") and device != "cuda":
        raise InputError(f"model.attention={backend} needs a CUDA GPU, and this is {device}; use auto or sdpa")
    if backend == "varlen" and not half:
        raise InputError(f"model.attention=varlen computes in bf16, not in {dtype}; set precision=bf16, or use flex")
    if backend == "varlen" and not newest_flash(dtype):
        raise InputError("model.attention=varlen: FlashAttention doesn't run on this GPU or isn't built in; use auto")
    return backend


@lru_cache
def newest_flash(dtype: torch.dtype) -> str | None:
    """Activate the newest FlashAttention that works on this GPU. Returns FA4, FA3, FA2, or None if none works."""
    for version in ("FA4", "FA3"):
        try:
            implementations.activate_flash_attention_impl(version)
        except (AttributeError, ImportError, RuntimeError, ValueError):  # an older torch, or not installed
            continue
        if _works("varlen", dtype):
            return version
        implementations.restore_flash_attention_impl()
    return "FA2" if _works("varlen", dtype) else None


def _works(backend: str, dtype: torch.dtype) -> bool:
    """Test a back end's forward and backward pass on two small groups, as the build or the GPU may lack its kernels."""
    try:
        q = torch.ones(32, 1, 64, device="cuda", dtype=dtype, requires_grad=True)
        lengths = host_lengths((16, 16))
        with torch.enable_grad():
            _attend(q, q, q, lengths, lengths, backend).sum().backward()
        return True
    except (RuntimeError, NotImplementedError, ImportError):
        return False


@torch.library.custom_op("sora_train::packed_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, q_lengths: Tensor, k_lengths: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """Output `(N, K, d)`, and the log-sum-exp of each query's scores `(K, N)` for the backward pass."""
    q_list, k_list = q_lengths.tolist(), k_lengths.tolist()
    if sum(q_list) != q.shape[0] or sum(k_list) != k.shape[0] or len(q_list) != len(k_list):
        raise ValueError(f"groups of {q_list} queries and {k_list} keys don't match {q.shape}, {k.shape}")
    if backend == "varlen":
        bounds = _bounds(tuple(q_list), tuple(k_list), q.device)
        out, lse, *_ = _aten._flash_attention_forward(q, k, v, *bounds, 0.0, False, False, **_ALL_KEYS)
        return out, lse
    out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), _statistics(q)
    for batch in batches(q_list, k_list, padding=q.device.type == "cpu"):
        qs, ks, vs = batch.queries.take(q), batch.keys.take(k), batch.keys.take(v)
        if q.device.type == "cpu":
            bias = batch.bias(q)
            o, s = _aten._scaled_dot_product_flash_attention_for_cpu(qs, ks, vs, 0.0, False, attn_mask=bias)
        else:
            o, s, *_ = _aten._scaled_dot_product_efficient_attention(qs, ks, vs, None, True)
        batch.queries.put(o, out)
        batch.queries.put(s[..., : qs.shape[2], None], lse.T[..., None])
    return out, lse


def _statistics(q: Tensor) -> Tensor:
    """Uninitialised tensor for the log-sum-exp of each query's scores."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((q.shape[1], q.shape[0]), dtype=dtype)


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, q_lengths: Tensor, k_lengths: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), _statistics(q)


@torch.library.custom_op("sora_train::packed_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, q_lengths: Tensor, k_lengths: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of queries, keys and values, in their shapes."""
    q_list, k_list = q_lengths.tolist(), k_lengths.tolist()
    if backend == "varlen":
        bounds = _bounds(tuple(q_list), tuple(k_list), q.device)
        rng, unused = torch.zeros(2, dtype=torch.uint64, device=q.device), q.new_empty(0)  # unused without dropout
        dq, dk, dv = _aten._flash_attention_backward(
            grad, q, k, v, out, lse, *bounds, 0.0, False, rng, unused, **_ALL_KEYS
        )
        return dq, dk, dv
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for batch in batches(q_list, k_list, padding=q.device.type == "cpu"):
        qs, ks, vs = batch.queries.take(q), batch.keys.take(k), batch.keys.take(v)
        gs, os = batch.queries.without_padding(batch.queries.take(grad)), batch.queries.take(out)
        ls = batch.queries.take(lse.T[..., None]).squeeze(3)
        if q.device.type == "cpu":
            exact = lse.dtype if ks.shape[2] <= _FEW_KEYS else q.dtype
            gs, qs, ks, vs, os = (x.to(exact) for x in (gs, qs, ks, vs, os))
            grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
                gs, qs, ks, vs, os, ls, 0.0, False, attn_mask=batch.bias(qs)
            )
        else:
            ls = F.pad(ls, (0, -ls.shape[-1] % 32), value=float("inf"))  # the kernel's alignment
            seed = torch.zeros((), dtype=torch.int64, device=q.device)
            *grads, _ = _aten._scaled_dot_product_efficient_attention_backward(
                gs, qs, ks, vs, None, os, ls, seed, seed, 0.0, [True, True, True, False]
            )
        for rows, part, whole in zip((batch.queries, batch.keys, batch.keys), grads, (dq, dk, dv), strict=True):
            rows.put(part.to(q.dtype), whole)
    return dq, dk, dv


@_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, q_lengths: Tensor, k_lengths: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@register_flop_formula([torch.ops.sora_train.packed_attention], get_raw=True)
def _forward_flops(q: Tensor, k: Tensor, v: Tensor, q_lengths: Tensor, k_lengths: Tensor, *_: Any, **__: Any) -> int:
    pairs = sum(a * b for a, b in zip(q_lengths.tolist(), k_lengths.tolist(), strict=True))
    return 4 * q.shape[1] * q.shape[2] * int(pairs)


@register_flop_formula([torch.ops.sora_train.packed_attention_backward], get_raw=True)
def _backward_flops(grad: Tensor, q: Tensor, *rest: Any, **__: Any) -> int:
    """FLOPs of four matrix products (gradients of values, scores, queries, keys), recomputation not counted."""
    return 2 * _forward_flops(q, q, q, *rest[4:6])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(grad.contiguous(), *ctx.saved_tensors, ctx.backend), None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


@lru_cache(maxsize=64)
def _bounds(q_list: tuple[int, ...], k_list: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, int, int]:
    """Cumulative lengths (`cu_seqlens`) on the device, and the largest lengths. Cached: computed once per layout."""
    q_ends, k_ends = (send(torch.tensor([0, *x]).cumsum(0).int(), device) for x in (q_list, k_list))
    return q_ends, k_ends, max(q_list), max(k_list)


@torch.compiler.disable
def _flex(q: Tensor, k: Tensor, v: Tensor, q_lengths: Tensor, k_lengths: Tensor) -> Tensor:
    mask = _block_mask(tuple(q_lengths.tolist()), tuple(k_lengths.tolist()), q.device)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    return _compiled_flex()(q, k, v, block_mask=mask).squeeze(0).transpose(0, 1)


@lru_cache(maxsize=16)
def _block_mask(q_list: tuple[int, ...], k_list: tuple[int, ...], device: torch.device) -> Any:
    """Block mask of FlexAttention. Cached: computed once per layout, not in every layer."""
    from torch.nn.attention.flex_attention import create_block_mask

    q_group, k_group = (
        send(torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)), device)
        for lengths in (q_list, k_list)
    )

    def same(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return q_group[query] == k_group[key]

    return create_block_mask(same, None, None, len(q_group), len(k_group), device=device)


@lru_cache(maxsize=1)
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)
