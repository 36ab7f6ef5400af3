"""A training step of our transformer beside diffusers' Wan and LTX of the same width, depth, tokens and precision.

    python -m benchmarks.model_step [rounds=3] [modes=eager,compiled] [precisions=fp32,bf16]

One thread, CPU time, in turns in one process: forward, backward and AdamW on two clips of 512 tokens, 8 layers of 384.
Beside each its model FLOPs as torch counts them, over the best rate of a matrix product of the model's own shape that
was measured in the same rounds. Peak memory is that of one more process each.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import LTXVideoTransformer3DModel, WanTransformer3DModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.report import write
from sora_train.batch import Layout
from sora_train.cli import options
from sora_train.models.dit import DiT

WIDTH, DEPTH, HEADS, FFN, CLIPS, GRID, TEXT, CHANNELS = 384, 8, 6, 1536, 2, (8, 8, 8), 32, 16
TOKENS = GRID[0] * GRID[1] * GRID[2]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Loss = Callable[[], torch.Tensor]


@dataclass
class Options:
    """Command-line options."""

    rounds: int = 3
    modes: str = "eager,compiled"
    precisions: str = "fp32,bf16"


def ours(dtype: torch.dtype, compiled: bool) -> tuple[nn.Module, Loss]:
    """Our transformer on the pack of both clips."""
    dit = DiT(4 * CHANNELS, WIDTH, DEPTH, HEADS, FFN, WIDTH).to(dtype)
    for block in dit.blocks if compiled else ():
        block.compile()
    layout = Layout((GRID,) * CLIPS, (TEXT,) * CLIPS)
    x, text = torch.randn(layout.tokens, 4 * CHANNELS, dtype=dtype), torch.randn(CLIPS * TEXT, WIDTH, dtype=dtype)
    t_of = torch.arange(CLIPS).repeat_interleave(TOKENS)
    return dit, lambda: dit(x, text, torch.tensor([0.3, 0.7]), t_of, layout).float().square().mean()


def wan(dtype: torch.dtype, compiled: bool) -> tuple[nn.Module, Loss]:
    """Diffusers' Wan on a batch of both."""
    model = WanTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS, in_channels=CHANNELS, out_channels=CHANNELS,
        text_dim=WIDTH, ffn_dim=FFN, num_layers=DEPTH,
    ).to(dtype)  # fmt: skip
    run = torch.compile(model) if compiled else model
    x = torch.randn(CLIPS, CHANNELS, GRID[0], 2 * GRID[1], 2 * GRID[2], dtype=dtype)
    text, t = torch.randn(CLIPS, TEXT, WIDTH, dtype=dtype), torch.tensor([300.0, 700.0])
    return model, lambda: run(x, t, text, return_dict=False)[0].float().square().mean()


def ltx(dtype: torch.dtype, compiled: bool) -> tuple[nn.Module, Loss]:
    """Diffusers' LTX on a batch of both."""
    model = LTXVideoTransformer3DModel(
        in_channels=4 * CHANNELS, out_channels=4 * CHANNELS, num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS, cross_attention_dim=WIDTH, num_layers=DEPTH, caption_channels=WIDTH,
    ).to(dtype)  # fmt: skip
    run = torch.compile(model) if compiled else model
    x, text = torch.randn(CLIPS, TOKENS, 4 * CHANNELS, dtype=dtype), torch.randn(CLIPS, TEXT, WIDTH, dtype=dtype)
    mask, t, (frames, height, width) = torch.ones(CLIPS, TEXT), torch.tensor([300.0, 700.0]), GRID

    def loss() -> torch.Tensor:
        out = run(x, text, t, mask, num_frames=frames, height=height, width=width, return_dict=False)[0]
        return out.float().square().mean()

    return model, loss


MODELS = {"ours": ours, "diffusers Wan": wan, "diffusers LTX": ltx}


def step_of(name: str, precision: str, compiled: bool) -> tuple[Callable[[], None], int]:
    """A training step, and its model FLOPs."""
    torch.manual_seed(0)
    model, loss = MODELS[name](DTYPES[precision], False)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        loss().backward()
    model, loss = MODELS[name](DTYPES[precision], compiled)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, counter.get_total_flops()


def product(dtype: torch.dtype) -> Callable[[], None]:
    """The matrix product of the MLP, ten times."""
    a, b = torch.randn(CLIPS * TOKENS, WIDTH, dtype=dtype), torch.randn(WIDTH, FFN, dtype=dtype)

    def multiply() -> None:
        for _ in range(10):
            a @ b

    return multiply


def seconds(call: Callable[[], None]) -> float:
    """CPU time of one call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def peak_mib(name: str, precision: str, mode: str) -> int:
    """Peak memory of a process that takes two steps."""
    command = [sys.executable, "-m", "benchmarks.model_step", "--peak", name, precision, mode]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def main() -> None:
    """Measure and write the table."""
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--peak"]:
        name, precision, mode = sys.argv[2:]
        step, _ = step_of(name, precision, mode == "compiled")
        step(), step()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
        return
    o = options(Options, __doc__)
    rows = []
    for precision in o.precisions.split(","):
        for mode in o.modes.split(","):
            steps = {name: step_of(name, precision, mode == "compiled") for name in MODELS}
            multiply = product(DTYPES[precision])
            for step, _ in steps.values():
                step(), step()
            times: dict[str, list[float]] = {name: [] for name in ("product", *steps)}
            for _ in range(o.rounds):
                for name, call in (("product", multiply), *((name, step) for name, (step, _) in steps.items())):
                    times[name].append(seconds(call))
            rate = 10 * 2 * CLIPS * TOKENS * WIDTH * FFN / min(times["product"])
            for name, (_, flops) in steps.items():
                best = min(times[name])
                rows.append([
                    f"{name}, {mode}, {precision}", f"{best * 1e3:.0f} ms", f"{flops / 1e9:.1f} GFLOP",
                    f"{flops / best / 1e9:.0f} of {rate / 1e9:.0f} GFLOP/s", f"{flops / best / rate:.0%}",
                    f"{min(times['ours']) / best:.2f}", f"{peak_mib(name, precision, mode)} MiB",
                ])  # fmt: skip
    write(
        "Training step of the transformer beside diffusers' Wan and LTX",
        "8 layers of 384, two clips of 512 tokens, one thread, CPU time, AdamW included, best of the rounds in turns.",
        ["model", "step", "model FLOPs", "rate", "share of the matmul rate", "speed against ours", "peak memory"],
        rows,
    )


if __name__ == "__main__":
    main()
