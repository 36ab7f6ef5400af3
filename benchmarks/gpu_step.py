"""Our step on one large GPU: attention back ends against the plain formula, then time, TFLOP/s and MFU.

    python -m benchmarks.gpu_step [tiny=false] [seconds=450] [write=false] [out=gpu_step.json]

`attention`: each back end in bf16, forwards and backwards, on one clip, many clips and clips of one token, against
softmax(q k^T / sqrt(d)) v in fp32. `step`: forward, backward and fused AdamW of the transformer in bf16 on one clip of
8k, 32k and 74k tokens: 1.3B whole, and two blocks of the width of 5B and 14B; eager and compiled. `trainer`: real runs
of the trainer on demo clips at ZeRO 1, 2 and 3, decoding and VAE included, with their share of waiting for data.

FLOPs are the model's, without what is recomputed. Each case stands alone: one that doesn't fit, or a back end that
isn't there, is a row that says so, and so is one that `seconds` left no time for. Exits with 1 if a back end computed
something else than the formula. `tiny=true` does the same with small sizes, anywhere.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.report import command, write
from sora_train.config.cost import cost, shapes
from sora_train.config.hydra import CONF
from sora_train.config.load import build
from sora_train.config.schema import VAE_USE, Config
from sora_train.core.batch import Grid, Layout
from sora_train.core.cli import InputError, run
from sora_train.core.options import options
from sora_train.forecast.out_of_memory import is_out_of_memory
from sora_train.models.layers.attention import BACKENDS, choose, packed_attention
from sora_train.models.video_model import build_video_model
from sora_train.models.video_vae.model import build_vae
from sora_train.training.report.meter import peak_flops

_GRIDS: dict[str, Grid] = {"8k": (8, 32, 32), "32k": (21, 30, 52), "74k": (21, 45, 80)}  # the others: Wan's 480p, 720p
_MODELS = {"1b3": None, "5b": 2, "14b": 2}  # blocks; None: all
_KEPT = {"8k": "none", "32k": "selective", "74k": "block"}  # activation checkpointing of a whole model
_GROUPS = {"one clip": [1500], "many clips": [700, 300, 1, 64, 435], "clips of one token": [1] * 96}
_TOLERANCE = 2e-2  # of the largest value: bf16 has 8 bits
_TEXT = 512  # tokens of a caption
_NOWHERE = ("run_dir=nowhere", "vae.path=nowhere", "data.sources.demo.shards=[nowhere]")
_WARM_UP, _STEPS = 2, 5
_FORMS = {
    "error": "{:.1e}", "seconds": "{:.3f} s", "tokens_per_s": "{:,.0f}", "tflops": "{:.1f}", "mfu": "{:.1%}",
    "memory_gib": "{:.1f} GiB", "data_wait": "{:.1%}",
}  # fmt: skip
_ROOT = Path(__file__).parents[1]


@dataclass
class Options:
    """Command-line options."""

    tiny: bool = False
    seconds: float = 450.0
    write: bool = False
    out: str = "gpu_step.json"


@dataclass
class Row:
    """One case: what it is, and its figures or why there are none."""

    part: str
    case: str
    failed: str = ""
    error: float | None = None  # largest difference to the formula, as a share of the largest value
    seconds: float | None = None
    tokens_per_s: float | None = None
    tflops: float | None = None
    mfu: float | None = None
    memory_gib: float | None = None
    data_wait: float | None = None


def attention_cases(device: torch.device, tiny: bool) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Each back end on each kind of pack."""
    for name, lengths in _GROUPS.items():
        groups = [min(n, 40) for n in lengths] if tiny else lengths
        for backend in BACKENDS[1:]:
            case = f"{backend}, {name}"
            yield case, partial(_attention, case, groups, backend, device)


def _attention(case: str, lengths: list[int], backend: str, device: torch.device) -> Row:
    try:
        choose(backend, device.type, torch.bfloat16)
    except InputError as error:
        return Row("attention", case, f"not here: {error}")
    torch.manual_seed(0)
    heads, size = (2, 16) if device.type == "cpu" else (8, 128)
    q, k, v, weight = (torch.randn(sum(lengths), heads, size, device=device).bfloat16() for _ in range(4))
    halves = tuple(x.clone().requires_grad_() for x in (q, k, v))
    wholes = tuple(x.float().requires_grad_() for x in (q, k, v))
    out = packed_attention(halves[0], halves[1], halves[2], lengths, lengths, backend)
    expected = _plain(wholes[0], wholes[1], wholes[2], lengths)
    found = (out, *torch.autograd.grad(out, halves, weight))
    right = (expected, *torch.autograd.grad(expected, wholes, weight.float()))
    difference = max(_difference(a, b) for a, b in zip(found, right, strict=True))
    return Row("attention", case, "" if difference <= _TOLERANCE else f"off by more than {_TOLERANCE:.0%}", difference)


def _difference(found: Tensor, right: Tensor) -> float:
    return float((found.detach().float() - right.detach()).abs().max() / right.detach().abs().max().clamp(min=1e-3))


def _plain(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    parts = (x.transpose(0, 1).split(lengths, dim=1) for x in (q, k, v))
    outs = [((a @ b.mT) * q.shape[-1] ** -0.5).softmax(-1) @ c for a, b, c in zip(*parts, strict=True)]
    return torch.cat(outs, dim=1).transpose(0, 1)


def step_cases(device: torch.device, tiny: bool) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Each model at each length, eager and compiled."""
    for length, grid in _GRIDS.items():
        for model, depth in _MODELS.items():
            for compiled in (False, True):
                blocks = "" if depth is None else f", {depth} blocks"
                case = f"{model}{blocks}, {length}, {'compiled' if compiled else 'eager'}"
                keys = [f"model={'demo' if tiny else model}", f"model.compile={compiled}"]
                keys += [f"model.depth={depth}"] if depth else []
                keys += [f"model.activation_checkpointing={_KEPT[length] if depth is None else 'none'}"]
                yield case, partial(_step, case, keys, (2, 4, 4) if tiny else grid, device)


def _step(case: str, keys: list[str], grid: Grid, device: torch.device) -> Row:
    config = _config([*keys, "precision=bf16"])
    layout = Layout((grid,), (_TEXT,))
    torch.manual_seed(0)
    with torch.device(device):
        dit = build_video_model(config).dit.bfloat16()
        x, target = torch.randn(2, layout.tokens, shapes(config).patch_features).bfloat16()
        text = torch.randn(_TEXT, config.text_encoder.width).bfloat16()
        t, t_of = torch.tensor([0.4]), torch.zeros(layout.tokens, dtype=torch.long)
        clip_of = torch.zeros(1, dtype=torch.long)
    optimizer = torch.optim.AdamW(dit.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        (dit(x, text, t, t_of, layout, clip_of).float() - target.float()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(_WARM_UP):
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = [_seconds(step, device) for _ in range(_STEPS)]
    middle = statistics.median(times)
    rate = cost(config).training([layout.tokens], (_TEXT,)) / middle
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    return Row(
        "step", case, seconds=middle, tokens_per_s=layout.tokens / middle, tflops=rate / 1e12,
        mfu=rate / peak_flops(device, None), memory_gib=peak,
    )  # fmt: skip


def _seconds(step: Callable[[], None], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    step()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _config(overrides: list[str]) -> Config:
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        return build(compose("train", ["experiment=demo", *_NOWHERE, *overrides]), need_vae=False)


def trainer_cases(folder: Path, tiny: bool) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Runs of the whole trainer in a process of their own."""
    for stage in (1, 2, 3):
        case = f"ZeRO {stage}, {'demo' if tiny else '1b3, packs of 8,192 tokens'}"
        yield case, partial(_trainer, case, stage, folder, tiny)


def _trainer(case: str, stage: int, folder: Path, tiny: bool) -> Row:
    data, run_dir = folder / "data", folder / f"zero{stage}"
    if not (folder / "vae").exists():
        make = ["data_tools.make_demo", f"out={data}", f"clips={24 if tiny else 512}", "held_out=0", "shard_clips=64"]
        subprocess.run([sys.executable, "-m", *make], check=True, cwd=_ROOT, stdout=subprocess.DEVNULL)
        _untrained_vae(folder / "vae")
    sizes = ["steps=3", "data.max_tokens=256"] if tiny else ["steps=12", "data.max_tokens=8192", "model=1b3"]
    train = [
        sys.executable, "-m", "sora_train.train", "experiment=demo", *sizes, "data.slots=1", f"run_dir={run_dir}",
        "precision=bf16", f"deepspeed=zero{stage}", f"vae.path={folder}/vae", "data.validation=[]",
        f"data.sources.demo.shards=[{data}/train-*.tar]", "logging.writers=[]", "logging.every_steps=1",
        "logging.validate_every=0", "logging.sample_every=0", "checkpoint.every_steps=100000",
    ]  # fmt: skip
    done = subprocess.run(train, cwd=_ROOT, capture_output=True, text=True)
    if done.returncode:
        last = (done.stdout + done.stderr).strip().splitlines()[-1]
        return Row("trainer", case, f"exit code {done.returncode}: {last}")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "tokens_per_s" in line][_WARM_UP:]
    seconds, rate, mfu, wait = (
        statistics.median(line[key] for line in lines) for key in ("step_time", "tokens_per_s", "mfu", "data_wait")
    )
    return Row("trainer", case, seconds=seconds, tokens_per_s=rate, mfu=mfu, data_wait=wait)


def _untrained_vae(folder: Path) -> None:
    """An export of a VAE as it begins: it costs what a trained one does."""
    folder.mkdir()
    config = _config([]).vae
    save_file(build_vae(config).state_dict(), folder / "vae.safetensors")
    shape = {key: value for key, value in asdict(config).items() if key not in VAE_USE}
    (folder / "config.json").write_text(json.dumps(shape) + "\n")


def attempt(part: str, case: str, work: Callable[[], Row]) -> Row:
    """The row of a case, also where it fails or doesn't fit."""
    try:
        return work()
    except RuntimeError as error:
        reason = "out of memory" if is_out_of_memory(error) else f"{type(error).__name__}: {str(error).splitlines()[0]}"
        return Row(part, case, reason)
    finally:
        torch.compiler.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _cells(row: Row) -> tuple[str, ...]:
    values = asdict(row)
    figures = ("" if values[key] is None else form.format(values[key]) for key, form in _FORMS.items())
    return row.part, row.case, *figures, row.failed


def main() -> int:
    """Run every case that there is time for; write JSON, and with `write` the table."""
    o = options(Options, __doc__)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not o.tiny:
        raise InputError("benchmarks.gpu_step needs a CUDA GPU; tiny=true runs its small form anywhere")
    begun, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        parts = {
            "attention": attention_cases(device, o.tiny), "step": step_cases(device, o.tiny),
            "trainer": trainer_cases(Path(folder), o.tiny),
        }  # fmt: skip
        for part, cases in parts.items():
            for case, work in cases:
                late = time.monotonic() - begun > o.seconds
                rows.append(Row(part, case, "no time left") if late else attempt(part, case, work))
                print(" | ".join(_cells(rows[-1])), flush=True)
    Path(o.out).write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if o.write:
        header = ("part", "case", "error", "step", "tokens/s", "TFLOP/s", "MFU", "memory", "data wait", "")
        about = f"`{command()}`: bf16, medians of {_STEPS} steps; FLOPs are the model's, without what is recomputed."
        write("The step on one GPU", about, header, [_cells(row) for row in rows])
    return int(any(row.part == "attention" and row.error is not None and row.failed for row in rows))


if __name__ == "__main__":
    run(main)
