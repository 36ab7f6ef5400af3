"""Trace of one forward and backward pass with fake tensors: bytes alive over time, and FLOPs and bytes per operation.

The real networks, learner and autograd run under torch's FakeTensorMode. Shapes, saved activations, recomputation and
the frozen VAE are therefore those of a run, for any model, but nothing is computed. Scratch memory of kernels isn't
included.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves
from torch.utils.flop_counter import flop_registry

from sora_train.config.cost import geometry
from sora_train.config.registry import METHODS
from sora_train.config.schema import Config
from sora_train.core.batch import Clip, Pack, Visit
from sora_train.methods.base import trained
from sora_train.models.layers import ulysses

Size = tuple[int, int, int]  # frames, height, width of a clip
_CAPTION = " ".join(["word"] * 31)  # with the start token 32 tokens, as in core.cost.TEXT_TOKENS
_SEPARATE = {"convolution": "convolution", "attention": "attention", "mm": "matmul", "bmm": "matmul"}


@dataclass(frozen=True)
class Like:
    """Shape, stride and dtype of a tensor argument."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Call:
    """An operation with its arguments, from which the call can be repeated for a measurement.

    Arguments are flattened as a pytree. Tensors are replaced by `Like`, and tensors of lengths, whose values are known
    in a trace, by the tuple of their values.
    """

    function: Any
    leaves: tuple[Any, ...]
    spec: TreeSpec = field(compare=False)


@dataclass(frozen=True)
class Operation:
    """Work of one operation of a pass."""

    kind: str  # matmul, attention, convolution or memory
    flops: int
    bytes: int  # read and written
    fp32: bool
    call: Call | None = None


@dataclass(frozen=True)
class Made:
    """The moment when the gradient of a parameter is computed. Bytes include this gradient, but no earlier ones."""

    most: int  # peak of bytes alive since the previous gradient
    now: int  # bytes alive
    elements: int  # of the parameter


@dataclass(frozen=True)
class Trace:
    """Memory (in addition to weights) and work of one pass."""

    activations: int  # peak bytes alive, gradients of parameters excluded
    made: tuple[Made, ...]  # gradients, in the order of the backward pass
    encoder: int  # peak bytes alive while the clips are encoded and noised
    encoder_weights: int  # bytes of the frozen networks
    operations: tuple[Operation, ...]
    modules: int = 0  # number of modules of the trained networks
    exchanged: int = 0  # bytes sent by a rank for sequence parallelism
    ranks: int = 1  # number of ranks that share the pack

    @property
    def flops(self) -> int:
        """FLOPs of the pass, recomputation included."""
        return sum(operation.flops for operation in self.operations)


class Recorder(TorchDispatchMode):
    """Dispatch mode that counts the bytes of live storages, those of `ignore` excluded, and lists all operations."""

    def __init__(self, ignore: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = self._since = 0
        self.made: list[Made] = []
        self.operations: list[Operation] = []
        self._seen: set[int] = set()
        for tensor in ignore:
            self._watch(tensor, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for tensor in tensors:
            self._watch(tensor)
        self.peak = max(self.peak, self.live)
        self._since = max(self._since, self.live)
        if not func.is_view and tensors:
            self.operations.append(_operation(func, args, kwargs or {}, out, tensors))
        return out

    def gradient(self, elements: int) -> None:
        """Record that the gradient of a parameter of `elements` was computed."""
        self.made.append(Made(self._since, self.live, elements))
        self._since = 0

    def _watch(self, tensor: Tensor, nbytes: int | None = None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes() if nbytes is None else nbytes
        self._seen.add(key)
        self.live += size
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def _operation(func: Any, args: Any, kwargs: Any, out: Any, results: list[Tensor]) -> Operation:
    name = func.overloadpacket.__name__
    inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    moved = sum(t.numel() * t.element_size() for t in (*inputs, *results))
    flops = 0
    if func.overloadpacket in flop_registry:
        with _disable_current_modes():  # attention's formula reads the lengths of its groups
            flops = int(flop_registry[func.overloadpacket](*args, **kwargs, out_val=out))
    kind = next((kind for part, kind in _SEPARATE.items() if part in name), "memory") if flops else "memory"
    call = _call(func, args, kwargs)
    return Operation(kind, flops, moved, bool(inputs) and inputs[0].dtype == torch.float32, call)


def _call(func: Any, args: Any, kwargs: Any) -> Call:
    leaves, spec = tree_flatten((args, kwargs))

    def plain(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if not isinstance(leaf, FakeTensor) and leaf.dim() == 1 and leaf.dtype == torch.int64:
            return tuple(leaf.tolist())
        return Like(tuple(leaf.shape), leaf.stride(), leaf.dtype)

    with _disable_current_modes():
        return Call(func, tuple(map(plain, leaves)), spec)


class _Network:
    """Stand-in for an engine: runs the network and its backward pass, and updates nothing."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self, *arguments: Any) -> Any:
        return self._module(*arguments)

    def backward(self, loss_sum: Tensor) -> None:
        """Back-propagate the loss."""
        loss_sum.backward()

    def step(self) -> bool:
        """Do nothing; memory and time of the optimizer are computed without a trace."""
        return True


class _Networks(dict[str, _Network]):
    """Stand-in for `Engines`."""

    @contextmanager
    def averaged(self, *names: str) -> Iterator[None]:
        """Do nothing, since averaged weights have the same shapes."""
        yield


def trace(config: Config, sizes: Sequence[Size], encoded: bool = False, ranks: int | None = None) -> Trace:
    """Trace one forward and backward pass of a rank over a pack of clips of these sizes.

    Args:
        config: Configuration of the run.
        sizes: Frames, height and width of each clip.
        encoded: Clips have latents from the shards; otherwise the frozen VAE encodes their pixels.
        ranks: Number of ranks that share the pack; None: `parallel.sequence`.
    """
    # lengths of attention's groups are real tensors, because the FLOPs depend on their values
    with _fresh_caches(), FakeTensorMode(allow_non_fake_inputs=True):
        learner = METHODS.get(config.method).planned(config)
        networks = learner.networks
        others = ulysses.Imagined(ranks or config.parallel.sequence)
        learning: list[Any] = [network.module for _, network in trained(networks)]
        frozen = [network.module for network in networks.values() if not network.trained]
        if others.parts > 1:
            for module in learning:
                module.split_sequence(ulysses.Groups({others.parts: others}))
        clips = (clip_of(number, size) for number, size in enumerate(sizes))
        shared = (0, others.parts)
        pack = Pack([_with_latents(clip, config) for clip in clips] if encoded else list(clips), part=shared)
        recorder, encoder = Recorder([t for module in (*learning, *frozen) for t in _tensors(module)]), [0]

        def begun(_: nn.Module, arguments: Any) -> None:
            """Attribute the memory peak so far to the encoder; called when the first trained network starts."""
            if not encoder[0]:
                encoder[0], recorder.peak = recorder.peak, recorder.live

        learning[0].register_forward_pre_hook(begun)
        for parameter in (p for module in learning for p in module.parameters() if p.requires_grad):
            parameter.register_post_accumulate_grad_hook(_let_go(recorder))
        engines = _Networks({name: _Network(network.module) for name, network in trained(networks)})
        with recorder:
            learner.step(engines, [pack])
    weights = sum(p.numel() * p.element_size() for module in frozen for p in module.parameters())
    r, modules = recorder, sum(1 for module in learning for _ in module.modules())
    return Trace(r.peak, tuple(r.made), encoder[0], weights, tuple(r.operations), modules, others.sent, others.parts)


def _with_latents(clip: Clip, config: Config) -> Clip:
    """Copy of a clip as in shards with precomputed latents: with latents, without pixels."""
    (frames, height, width), grid = clip.visit.size, geometry(config)
    shape = (1 + (frames - 1) // grid.temporal_stride, height // grid.spatial_stride, width // grid.spatial_stride)
    return replace(clip, video_TCHW=clip.video_TCHW[:0], latents_CTHW=torch.zeros(config.vae.channels, *shape))


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


@contextmanager
def _fresh_caches() -> Iterator[None]:
    """Context in which the models' caches (RoPE angles, masks) are empty, so that real and fake tensors don't mix."""

    def clear() -> None:
        for name, module in sys.modules.copy().items():  # a copy, as a finalizer that runs meanwhile may import
            if name.startswith(("sora_train.models.", "sora_train.flow.", "sora_train.encoding.")):
                for value in vars(module).copy().values():
                    if hasattr(value, "cache_clear"):
                        value.cache_clear()

    clear()
    try:
        yield
    finally:
        clear()


def _let_go(recorder: Recorder) -> Callable[[Tensor], None]:
    """Make a hook that records a gradient and frees it."""

    def hook(parameter: Tensor) -> None:
        recorder.gradient(parameter.numel())
        parameter.grad = None

    return hook


def clip_of(number: int, size: Size) -> Clip:
    """Make a blank clip of a size, with a caption of typical length."""
    frames, height, width = size
    task = "image" if frames == 1 else "text_to_video"
    visit = Visit(number, 0, frames, 8.0, (height, width), (0, 0, height, width), task, 2 * number + 1)
    return Clip(visit, str(number), _CAPTION, torch.zeros(frames, 3, height, width, dtype=torch.uint8))
