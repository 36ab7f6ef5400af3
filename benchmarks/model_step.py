"""A training step of our transformer beside diffusers' Wan and LTX of the same width, depth, tokens and precision.

    python -m benchmarks.model_step [part=step] [precision=fp32] [rounds=7] [batches=2]

`part=step`: two clips of 512 tokens, eager and compiled. `part=mixes`: batches of eight clips as training meets them,
drawn as benchmarks/packing.py draws them for three stages, with rows and columns of tokens divided so that two cores
can do it; ours packs them, the others pad each clip to the longest one of its batch (and don't mask what pads it).

8 layers of 384, one thread, CPU time. A step is forward, backward and fused AdamW on weights of that precision. All
take a step in every round, in turns, beside the matrix products whose best rate is what a share refers to; FLOPs are
those of the model as torch counts them, without recomputation. Memory is what a step adds to the process at most.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import LTXVideoTransformer3DModel, WanTransformer3DModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.packing import STAGES, simulate
from benchmarks.report import write
from sora_train.core.batch import Grid, Layout
from sora_train.core.options import options
from sora_train.data.order.visits import fit_sizes
from sora_train.models.wan.model import DiT

WIDTH, DEPTH, HEADS, FFN, TEXT, CHANNELS = 384, 8, 6, 1536, 32, 16
TWO_CLIPS: tuple[Grid, ...] = ((8, 8, 8),) * 2
PRODUCTS = ((1024, WIDTH, FFN), (1024, FFN, WIDTH), (1024, 1024, 1024))  # rows, inner, columns
DIVISORS = {"256p": 8, "480p": 12, "up to 720p": 16}  # of the rows and columns of tokens
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Call = Callable[[], object]


@dataclass
class Options:
    """Command-line options."""

    part: str = "step"
    precision: str = "fp32"
    rounds: int = 7
    batches: int = 2


def ours(dtype: torch.dtype, compiled: bool) -> tuple[nn.Module, Callable[..., torch.Tensor]]:
    """Our transformer on a pack."""
    dit = DiT(4 * CHANNELS, WIDTH, DEPTH, HEADS, FFN, WIDTH).to(dtype)
    for block in dit.blocks if compiled else ():
        block.compile()

    def run(grids: Sequence[Grid]) -> torch.Tensor:
        layout = Layout(tuple(grids), (TEXT,) * len(grids))
        x = torch.randn(layout.tokens, 4 * CHANNELS, dtype=dtype)
        text = torch.randn(len(grids) * TEXT, WIDTH, dtype=dtype)
        t_of = torch.arange(len(grids)).repeat_interleave(torch.tensor(layout.lengths))
        return dit(x, text, torch.linspace(0.3, 0.7, len(grids)), t_of, layout)

    return dit, run


def wan(dtype: torch.dtype, compiled: bool) -> tuple[nn.Module, Callable[..., torch.Tensor]]:
    """Diffusers' Wan on a batch."""
    model = WanTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS, in_channels=CHANNELS, out_channels=CHANNELS,
        text_dim=WIDTH, ffn_dim=FFN, num_layers=DEPTH,
    ).to(dtype)  # fmt: skip
    forward = torch.compile(model) if compiled else model

    def run(grids: Sequence[Grid]) -> torch.Tensor:
        frames, height, width = longest(grids)
        x = torch.randn(len(grids), CHANNELS, frames, 2 * height, 2 * width, dtype=dtype)
        text, t = torch.randn(len(grids), TEXT, WIDTH, dtype=dtype), torch.linspace(300, 700, len(grids))
        return forward(x, t, text, return_dict=False)[0]

    return model, run


def ltx(dtype: torch.dtype, compiled: bool) -> tuple[nn.Module, Callable[..., torch.Tensor]]:
    """Diffusers' LTX on a batch."""
    model = LTXVideoTransformer3DModel(
        in_channels=4 * CHANNELS, out_channels=4 * CHANNELS, num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS, cross_attention_dim=WIDTH, num_layers=DEPTH, caption_channels=WIDTH,
    ).to(dtype)  # fmt: skip
    forward = torch.compile(model) if compiled else model

    def run(grids: Sequence[Grid]) -> torch.Tensor:
        frames, height, width = longest(grids)
        x = torch.randn(len(grids), frames * height * width, 4 * CHANNELS, dtype=dtype)
        text, t = torch.randn(len(grids), TEXT, WIDTH, dtype=dtype), torch.linspace(300, 700, len(grids))
        mask, grid = torch.ones(len(grids), TEXT), {"num_frames": frames, "height": height, "width": width}
        return forward(x, text, t, mask, **grid, return_dict=False)[0]

    return model, run


MODELS = {"ours": ours, "diffusers Wan": wan, "diffusers LTX": ltx}


def tokens(grid: Grid) -> int:
    """Tokens of a clip."""
    return grid[0] * grid[1] * grid[2]


def longest(grids: Sequence[Grid]) -> Grid:
    """The grid of the longest clip."""
    return max(grids, key=tokens)


def stepper(name: str, dtype: torch.dtype, compiled: bool) -> Callable[[Sequence[Grid]], None]:
    """Takes a training step on clips of these grids."""
    torch.manual_seed(0)
    model, run = MODELS[name](dtype, compiled)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

    def step(grids: Sequence[Grid]) -> None:
        run(grids).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def flops(name: str, grids: Sequence[Grid]) -> int:
    """Model FLOPs of a step."""
    _, run = MODELS[name](torch.float32, False)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        run(grids).square().mean().backward()
    return counter.get_total_flops()


def products(dtype: torch.dtype) -> dict[str, tuple[Call, int]]:
    """Matrix products of several shapes, five at a time, and the FLOPs of the five."""
    made: dict[str, tuple[Call, int]] = {}
    for rows, inner, columns in PRODUCTS:
        a, w = torch.randn(rows, inner, dtype=dtype), torch.randn(columns, inner, dtype=dtype)
        for form, right in (("w", w.t().contiguous()), ("w^T", w.t())):
            call = partial(_five, a, right)
            made[f"{rows}x{inner} {form} {columns}"] = (call, 5 * 2 * rows * inner * columns)
    return made


def _five(a: torch.Tensor, b: torch.Tensor) -> None:
    for _ in range(5):
        a @ b


def seconds(call: Call) -> float:
    """CPU time of one call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def added_mib(call: Call) -> float:
    """Measure the most that a call adds to the memory of the process."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed doesn't count as there before
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    call()
    return (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])


def rate(times: dict[str, list[float]], made: dict[str, tuple[Call, int]]) -> list[float]:
    """FLOP/s of the fastest product in each round."""
    by_round = zip(*times.values(), strict=True)
    return [max(made[name][1] / t for name, t in zip(made, row, strict=True)) for row in by_round]


def in_turns(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call))
    return times


def spread(values: Sequence[float], form: str) -> str:
    """Median, least and most."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def measure_step(precision: str, rounds: int) -> None:
    """Two clips of 512 tokens, eager and compiled."""
    dtype, made = DTYPES[precision], products(DTYPES[precision])
    steps: dict[str, Call] = {}
    for mode in ("eager", "compiled"):
        for name in MODELS:
            steps[f"{name}, {mode}"] = partial(stepper(name, dtype, mode == "compiled"), TWO_CLIPS)
    work = {name: flops(name, TWO_CLIPS) for name in MODELS}
    for call in (*steps.values(), *(call for call, _ in made.values())):
        call(), call()
    times = in_turns({**{name: call for name, (call, _) in made.items()}, **steps}, rounds)
    rates = rate({name: times[name] for name in made}, made)
    rows = []
    for name, call in steps.items():
        model, mode = name.split(", ")
        mine, count = times[f"ours, {mode}"], work[model]
        share = [count / t / r for t, r in zip(times[name], rates, strict=True)]
        ratio = [t / m for t, m in zip(times[name], mine, strict=True)]
        gain = [e / t for e, t in zip(times[f"{model}, eager"], times[name], strict=True)]
        rows.append([
            name, spread([1e3 * t for t in times[name]], ".0f") + " ms", f"{count / 1e9:.1f}",
            f"{count / statistics.median(times[name]) / 1e9:.0f}", spread(share, ".1%"), spread(ratio, ".2f"),
            "" if mode == "eager" else spread(gain, ".2f"), f"{added_mib(call):.0f} MiB",
        ])  # fmt: skip
    write(
        f"Training step beside diffusers' Wan and LTX, {precision}",
        "8 layers of 384, two clips of 512 tokens, one thread, CPU time, fused AdamW included. Median (least to most) "
        f"of {rounds} rounds in turns. Matmul: {spread([r / 1e9 for r in rates], '.0f')} GFLOP/s, the fastest product "
        "of each round.",
        ["model", "step", "model GFLOP", "GFLOP/s", "share of matmul", "ours is faster by", "compiled over eager",
         "memory a step adds"],
        rows,
    )  # fmt: skip


def batches_of(stage: str, count: int) -> list[tuple[Grid, ...]]:
    """Token grids of the first batches of eight clips of a stage."""
    clips = simulate(8 * count, STAGES[stage])
    crop = fit_sizes(clips.height, clips.width, clips.max_pixels, 16, "crop")[1]
    by, grids = 16 * DIVISORS[stage], []
    for frames, height, width in zip(clips.frames.tolist(), crop[:, 2].tolist(), crop[:, 3].tolist(), strict=True):
        grids.append((1 + (frames - 1) // 4, max(1, round(height / by)), max(1, round(width / by))))
    return [tuple(grids[n : n + 8]) for n in range(0, len(grids), 8)]


def measure_mixes(precision: str, rounds: int, count: int) -> None:
    """Batches of eight clips of three stages, eager."""
    steps = {name: stepper(name, DTYPES[precision], False) for name in MODELS}
    rows = []
    for stage in STAGES:
        batches = batches_of(stage, count)
        useful = sum(tokens(grid) for grids in batches for grid in grids)
        padded = sum(8 * tokens(longest(grids)) for grids in batches)

        def every(step: Callable[[Sequence[Grid]], None], batches: list[tuple[Grid, ...]] = batches) -> None:
            for grids in batches:
                step(grids)

        calls: dict[str, Call] = {name: partial(every, step) for name, step in steps.items()}
        calls["ours"]()
        times = in_turns(calls, rounds)
        best = [min(row) for row in zip(*(times[name] for name in MODELS if name != "ours"), strict=True)]
        for name in MODELS:
            ratio = [b / t for b, t in zip(best, times[name], strict=True)]
            rows.append([
                f"{stage}, {name}", f"{useful / padded:.0%}" if name != "ours" else "100%",
                spread([useful / t for t in times[name]], ",.0f"), spread(ratio, ".2f"),
                f"{max(added_mib(partial(steps[name], grids)) for grids in batches):.0f} MiB",
            ])  # fmt: skip
    write(
        f"Batches of eight clips of all sizes beside padded peers, {precision}",
        f"The first {count} batches of each stage, one after the other; rows and columns of tokens divided by "
        f"{', '.join(map(str, DIVISORS.values()))}. Eager, 8 layers of 384, one thread, CPU time, fused AdamW "
        f"included. Median (least to most) of {rounds} rounds in turns.",
        ["stage, model", "tokens that are used", "useful tokens/s", "over the best peer", "memory a step adds"],
        rows,
    )  # fmt: skip


def main() -> None:
    """Measure one part in one precision."""
    torch.set_num_threads(1)
    o = options(Options, __doc__ or "")
    if o.part == "step":
        measure_step(o.precision, o.rounds)
    else:
        measure_mixes(o.precision, o.rounds, o.batches)


if __name__ == "__main__":
    main()
