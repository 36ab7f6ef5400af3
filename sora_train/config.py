"""The configuration: one dataclass tree that mirrors conf/, and every check that spans several keys.

Longer than most files: the whole tree stands in one place, beside the rules that span it. Imports neither torch nor
deepspeed, so that a mistake is answered within a moment and before any process group.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

from sora_train.cli import InputError, nearest
from sora_train.released import text_width, transformer_shape, vae_shape

_SECRET = re.compile(r"(?i)(api_?key|secret|password|access_?token|credential|^key$|^token$|account_?key)")
DECODERS = ("decord", "pyav", "torchcodec")
TASKS = (
    "text_to_video", "image_to_video", "extension", "extension_backwards", "interpolation", "frames", "image",
)  # fmt: skip
LORA_TARGETS = (  # linear layers of the transformer by the ends of their names
    "q", "k", "v", "out", "self_attention.q", "self_attention.k", "self_attention.v", "self_attention.out",
    "cross_attention.q", "cross_attention.k", "cross_attention.v", "cross_attention.out", "mlp.0", "mlp.2",
    "text_in.0", "text_in.2", "time_in.0", "time_in.2", "time_modulation.1", "out.project",
)  # fmt: skip
ROPE_SCALINGS = ("none", "interpolation", "ntk")
SOLVERS = ("euler", "heun", "adams_bashforth")
VAE_USE = ("path", "cache_mib", "tile", "perceptual")  # how a run uses its VAE; the rest of VaeConfig is its shape
WRITERS = ("tensorboard", "wandb", "prometheus")  # beside metrics.jsonl
DERIVED = {  # DeepSpeed keys that follow from ours
    "train_batch_size": "data.slots",
    "train_micro_batch_size_per_gpu": "data.slots",
    "gradient_accumulation_steps": "parallel.accumulation",
    "gradient_clipping": "optim.clip",
    "optimizer": "optim",
    "scheduler": "optim",
    "bf16": "precision",
    "fp16": "precision",
    "steps_per_print": "logging.every_steps",
    "tensorboard": "logging.writers",
    "wandb": "logging.writers",
}


class Method(Enum):
    """What a run trains."""

    diffusion = "diffusion"
    autoencoder = "autoencoder"


class Precision(Enum):
    """Type of weights and activations; fp32 master weights are kept either way."""

    fp32 = "fp32"
    bf16 = "bf16"


class Fit(Enum):
    """How a video comes to a size that the patch grid divides."""

    crop = "crop"  # resize to cover, cut the middle out
    stretch = "stretch"  # resize each side by itself, by less than one patch


class Probe(Enum):
    """What indexing decodes of a video or image; its frames are counted and its checksum taken either way."""

    packets = "packets"  # headers only; a picture that is damaged inside is found when training decodes it
    frame = "frame"  # the first picture too


class Previews(Enum):
    """The clips whose captions are sampled while a run trains."""

    held_out = "held_out"
    training = "training"  # those of the first steps: whether a run learns its samples by heart


class Prediction(Enum):
    """What the network's output means."""

    velocity = "velocity"
    preconditioned = "preconditioned"  # velocity through skip and scale, so that input and output keep unit variance
    x0 = "x0"  # the data; the loss is the velocity's all the same
    noise = "noise"  # the noise; likewise


class Weighting(Enum):
    """What counts alike in the loss."""

    token = "token"  # every generated token: long and large clips count more
    clip = "clip"  # every clip


class Timesteps(Enum):
    """Distribution that training timesteps are drawn from, before the shift."""

    logit_normal = "logit_normal"
    uniform = "uniform"


@dataclass
class LoraConfig:
    """Low-rank adapters: with a rank, they alone are trained, and all other weights stay as they are."""

    rank: int = 0  # of each adapter; 0: none, all weights are trained
    alpha: float = 16.0  # an adapter counts alpha / rank
    targets: list[str] = field(default_factory=lambda: ["q", "k", "v", "out"])  # layers by the ends of their names


@dataclass
class ModelConfig:
    """The diffusion transformer."""

    width: int = MISSING
    depth: int = MISSING
    heads: int = MISSING
    ffn: int = MISSING  # width of the MLP
    patch: int = 2  # latent pixels a side
    frequencies: int = 256  # of the timestep embedding
    rope_theta: float = 10000.0
    gate_init: float = 0.0  # start of the blocks' gates; 0 is adaLN-zero
    pooled_text: bool = False  # the caption's mean joins the timestep; without it a short run hardly hears the caption
    absolute_positions: bool = False  # tell each token its place in the clip, beside RoPE; helps small models
    activation_checkpointing: str = "none"  # recompute in backward: none, block (all of it), selective (not attention)
    mlp_chunk: int = 0  # tokens that go through an MLP at a time, and again in backward, to save memory; 0 for all
    attention: str = "auto"  # back end: auto, sdpa, varlen (FlashAttention), flex
    compile: bool = False  # torch.compile of the block
    init_from: str | None = None  # a diffusers Wan transformer or pipeline folder to start from; its shape rules
    lora: LoraConfig = field(default_factory=LoraConfig)
    rope_scaling: str = "none"  # for clips longer or larger than trained: none, interpolation, ntk
    rope_factors: tuple[float, float, float] = (1.0, 1.0, 1.0)  # new / trained length of time, height, width


@dataclass
class TileConfig:
    """Videos above this size go through a frozen VAE in pieces and tiles."""

    frames: int = 64  # of a piece; the result is that of the whole
    pixels: int = 1024  # side of a tile
    overlap: int = 64  # pixels around a tile that are computed along with it


@dataclass
class PerceptualConfig:
    """Perceptual loss of a VAE that is trained, from VGG16 weights in local files."""

    weight: float = 0.0  # beside L1; 0: none
    files: list[str] = field(default_factory=list)  # torchvision's vgg16; LPIPS's heads from another, where wanted


@dataclass
class VaeConfig:
    """The video autoencoder: a trained one at `path`, or the shape of one to train."""

    path: str | None = None  # folder written by sora_train.export, or of a diffusers VAE
    class_name: str | None = None  # of a diffusers VAE, read from its folder; null: our own
    cache_mib: int = 0  # latents that each rank remembers, for small data sets seen many times
    tile: TileConfig = field(default_factory=TileConfig)
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    channels: int = 6
    patch: int = 4
    widths: list[int] = field(default_factory=lambda: [32, 64])
    blocks: list[int] = field(default_factory=lambda: [0, 2])
    strides: list[list[int]] = field(default_factory=lambda: [[4, 1]])  # (time, space) between levels
    mse_weight: float = 4.0  # beside L1
    kl_weight: float = 1e-4

    @property
    def temporal_stride(self) -> int:
        """Frames to a latent frame."""
        return math.prod(time for time, _ in self.strides)

    @property
    def spatial_stride(self) -> int:
        """Pixels to a latent pixel, per side."""
        return self.patch * math.prod(space for _, space in self.strides)


@dataclass
class TextEncoderConfig:
    """Our own text encoder, trained along with the model; or a released one at `path`, frozen."""

    path: str | None = None  # a T5 or umT5 folder of transformers (or a pipeline folder); its width rules
    pad_to: int = 0  # zeros after a released encoder's embeddings up to this many tokens; Wan's weights want 512
    width: int = 128
    depth: int = 1
    heads: int = 4
    buckets: int = 2048  # rows of the table of words; each word is the sum of two
    max_tokens: int = 128


@dataclass
class SourceConfig:
    """Shards that are drawn from at one rate."""

    shards: list[str] = MISSING  # paths, globs, brace ranges
    repeat: float = 1.0  # visits of each sample per epoch; the fraction is drawn by hash
    weight: float | None = None  # instead: share of an epoch's visits, relative to the other sources' weights
    filter: str = ""  # beside data.filter


@dataclass
class StageConfig:
    """A part of training with a plan of its own; what is null stays as data has it."""

    until_step: int | None = None  # null: to the end
    fps: float | None = None
    max_frames: int | None = None
    max_pixels: int | None = None
    weights: dict[str, float] = field(default_factory=dict)  # of sources, those not named 0; empty: theirs
    tasks: dict[str, float] = field(default_factory=dict)  # weights of tasks, those not named 0; empty: flow.tasks


@dataclass
class LimitsConfig:
    """What a video or image may be at most; more is refused before anything of it is decoded."""

    pixels: int = 33554432  # of a frame; 8K UHD fits
    frames: int = 1048576
    bytes: int = 2147483648


@dataclass
class CacheConfig:
    """Where remote shards are kept on a node, for all of its ranks."""

    folder: str | None = None  # null: sora_train-UID in the system's temporary folder
    gib: float = 32.0  # never more than this


@dataclass
class DataConfig:
    """What a step is made of."""

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    validation: list[str] = field(default_factory=list)
    filter: str = ""  # which samples may be used, e.g. duration >= 2 and height >= 240; validation too
    stages: list[StageConfig] = field(default_factory=list)  # one after the other; empty: one
    captions: dict[str, float] = field(default_factory=dict)  # weights of named captions; empty: all alike
    index: str | None = None  # consolidated index of the training shards, for large sets
    probe: Probe = Probe.packets  # what is decoded of shards that have no index yet; frame takes some times longer
    drop_refused: bool = False  # leave samples that were refused out of later epochs
    fps: float = 8.0  # frames a second to train at; faster videos are thinned out
    max_frames: int = 17
    max_pixels: int = 1024  # height x width; larger videos are scaled down
    fit: Fit = Fit.crop
    slots: int = 2  # packs of an optimizer step, shared out over the ranks
    max_tokens: int = 1024  # of a slot
    fill: float = 0.9  # share of the token budget that a window's steps aim at
    window: int = 4096  # samples planned together
    workers: int = 2  # decode processes per rank
    prefetch_steps: int = 3
    decode_timeout_s: float = 60.0
    decode_memory_gib: float = 8.0
    max_bad_fraction: float = 0.2  # of the last 1000 samples; more is a stop
    decoders: list[str] = field(default_factory=lambda: ["decord", "pyav"])  # in turn; a failure goes to the next
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    storage: dict[str, Any] = field(default_factory=dict)  # fsspec options by scheme, e.g. s3: {anon: true}
    commands: list[str] = field(default_factory=list)  # programs that shards named pipe:... may run


@dataclass
class FlowConfig:
    """The objective and the sampler."""

    tasks: dict[str, float] = field(default_factory=lambda: {"text_to_video": 1.0})  # weights
    prediction: Prediction = Prediction.velocity
    timesteps: Timesteps = Timesteps.logit_normal
    mean: float = 0.0  # of the logit-normal
    std: float = 1.0
    shift: float = 1.0  # t -> shift t / (1 + (shift - 1) t), towards noise
    shift_tokens: int = 0  # tokens of a clip that `shift` is meant for; others: shift sqrt(tokens / this). 0: all alike
    caption_dropout: float = 0.1
    per_frame_noise: float = 0.0  # share of clips whose latent frames each have a timestep of their own
    weighting: Weighting = Weighting.token
    guidance: float = 3.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # timesteps with guidance; elsewhere the caption alone
    guidance_rescale: float = 0.0  # 1: the guided velocity gets the deviation of the one without guidance; 0: it stays
    sampling_steps: int = 20
    solver: str = "euler"  # heun (two evaluations a step), adams_bashforth (one)


@dataclass
class OptimConfig:
    """AdamW, its schedule, and the moving average of the weights."""

    lr: float = 1e-3
    text_lr_scale: float = 1.0  # learning rate of the text encoder relative to the rest
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip: float = 1.0  # global gradient norm
    warmup_steps: int = 20
    decay_fraction: float = 0.5  # last part of the run over which the rate falls linearly to 0
    ema_decay: float = 0.99
    ema_lengths: list[float] = field(default_factory=list)  # further averages, e.g. [0.05, 0.1]: deviation / run so far


@dataclass
class ParallelConfig:
    """How a step is shared out."""

    accumulation: int | None = None  # forward passes per step and rank; null: one per slot
    sequence: int = 1  # ranks that share the tokens of a pack (Ulysses); slots go to groups of so many ranks


@dataclass
class CheckpointConfig:
    """When to save, and what to keep."""

    every_steps: int = 200
    keep: int = 3  # the newest
    keep_every: int = 0  # and for ever every one whose step this divides; 0 is none
    snapshot_every: int = 1000  # steps between copies of optim.ema_lengths' averages in run_dir/snapshots
    snapshots: int = 64  # of them kept, evenly over the run
    mirror: str | None = None  # folder of this run alone to copy them to, e.g. s3://bucket/runs/x; null: none


@dataclass
class GuardConfig:
    """What protects a run from bad steps, hanging ranks and itself."""

    max_bad_steps: int = 10  # steps in a row that aren't finite, and were skipped, before a rollback
    spike: float = 12.0  # robust deviations (1.4826 MAD) above the median loss that count as a spike; 0 is off
    spike_steps: int = 3  # in a row, before a rollback
    spike_window: int = 100  # losses that median and MAD are taken over
    leave_out_before: int = 2  # steps before the first bad one that a rollback leaves out along with the bad ones
    max_rollbacks: int = 3  # of a run
    hash_every: int = 500  # steps between comparisons of the ranks' weights; 0 is only before a save
    timeout_s: float = 600.0  # without progress before a rank counts as hanging
    slow_timeout_s: float = 3600.0  # the same in the first step, validation, sampling and while a save is waited for
    max_futile_restarts: int = 3  # automatic restarts without a new checkpoint between them
    accept_changes: bool = False  # go on from a checkpoint although the model or what it is trained on changed


@dataclass
class LoggingConfig:
    """What a run says, and where."""

    every_steps: int = 10
    validate_every: int = 200
    validation_clips: int = 64
    sample_every: int = 500
    sample_clips: int = 4
    previews: Previews = Previews.held_out
    writers: list[str] = field(default_factory=lambda: ["tensorboard", "wandb"])  # beside metrics.jsonl
    project: str = "sora_train"
    group: str = ""  # of the wandb run; empty: the folder that the run folder lies in
    tags: list[str] = field(default_factory=list)  # of the wandb run
    prometheus_port: int = 0  # where Prometheus reads; 0: run_dir/metrics.prom, for its textfile collector
    profile_steps: list[int] = field(default_factory=list)  # first and last step to trace into run_dir/profile/
    wandb_finish_s: float = 60.0  # seconds that wandb's uploads may take at the end of a run
    memory_history: bool = False  # have the memory snapshot of a GPU that ran out name the line of each allocation
    peak_tflops: float | None = None  # of one device, for MFU; null: known for the GPU, measured on a CPU


@dataclass
class Config:
    """Everything a run needs to know; the resolved tree is written to run_dir/config.yaml."""

    run_dir: str = MISSING  # folder for everything that a run writes
    method: Method = Method.diffusion
    seed: int = 0  # of weights, order, noise
    steps: int = MISSING  # optimizer updates of the run
    precision: Precision = Precision.fp32
    threads: int | None = None  # CPU threads per rank; null: the cores of the machine shared out
    model: ModelConfig = field(default_factory=ModelConfig)
    vae: VaeConfig = field(default_factory=VaeConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    data: DataConfig = field(default_factory=DataConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    deepspeed: dict[str, Any] = field(default_factory=dict)  # handed on to DeepSpeed
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


def build(tree: DictConfig, need_vae: bool = True) -> Config:
    """The typed, checked configuration of a composed tree. Raises InputError with one line for the first mistake.

    The shape of a VAE at `vae.path` replaces what the tree says of it; `need_vae` False goes on where it isn't there.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), tree)
        assert isinstance(merged, DictConfig)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise InputError(f"{missing[0]} has no value; give {missing[0]}=... or choose an experiment=...")
        config = OmegaConf.to_object(merged)
    except (ConfigKeyError, ValidationError, OmegaConfBaseException) as error:
        raise InputError(_explain(error)) from error
    assert isinstance(config, Config)
    checkpointing = config.model.activation_checkpointing
    config.model.activation_checkpointing = {"False": "none", "True": "block"}.get(checkpointing, checkpointing)
    _take_released_shapes(config)
    if config.vae.path is not None and config.vae.class_name is None:
        shape = Path(config.vae.path) / "config.json"
        if shape.is_file():
            config.vae = VaeConfig(
                **json.loads(shape.read_text()) | {name: getattr(config.vae, name) for name in VAE_USE}
            )
        elif need_vae:
            raise InputError(
                f"no VAE at vae.path={config.vae.path}; train one (experiment=demo_vae) and export it there"
            )
    check(config)
    return config


def _take_released_shapes(config: Config) -> None:
    """The shapes of released models replace what the tree says of them; they must fit each other."""
    if config.vae.path is not None:
        for key, value in (vae_shape(config.vae.path) or {}).items():
            setattr(config.vae, key, value)
    text = config.text_encoder
    if text.path is not None:
        text.width = text_width(text.path)
    if config.model.init_from is None:
        return
    shape = transformer_shape(config.model.init_from)
    channels, width = shape.pop("channels"), shape.pop("text_width")
    for key, value in shape.items():
        setattr(config.model, key, value)
    _require(
        channels == config.vae.channels,
        f"model.init_from has {channels} latent channels, the VAE {config.vae.channels}; set vae.path to its VAE",
    )
    _require(
        width == text.width,
        f"model.init_from reads text {width} wide, the text encoder gives {text.width}; set text_encoder.path",
    )


def load(run_dir: str | Path) -> Config:
    """The configuration that a run was started with. Raises InputError if the folder holds no run."""
    path = Path(run_dir) / "config.yaml"
    if not path.is_file():
        raise InputError(f"{run_dir} holds no run (there is no {path}); check run_dir")
    tree = OmegaConf.load(path)
    assert isinstance(tree, DictConfig)
    return build(tree)


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML, secrets masked."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def to_dict(config: Config) -> dict[str, Any]:
    """The resolved configuration as plain values; anything whose key speaks of a secret is masked."""
    tree = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    return _masked(tree)


def _masked(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: "***" if v and _SECRET.search(str(k)) else _masked(v) for k, v in value.items()}
    return [_masked(v) for v in value] if isinstance(value, list) else value


def known_keys(tree: Any = None, prefix: str = "") -> list[str]:
    """Every dotted key of the configuration."""
    tree = OmegaConf.structured(Config) if tree is None else tree
    keys: list[str] = []
    for key in tree:
        keys.append(prefix + str(key))
        if not OmegaConf.is_missing(tree, key) and isinstance(tree[key], DictConfig):
            keys += known_keys(tree[key], f"{prefix}{key}.")
    return keys


def check(config: Config) -> None:
    """Every rule that spans keys; raises InputError for the first that is broken."""
    model, vae, data, flow = config.model, config.vae, config.data, config.flow
    positive = {
        "logging.wandb_finish_s": config.logging.wandb_finish_s,
        "steps": config.steps, "data.slots": data.slots, "data.max_frames": data.max_frames, "data.fps": data.fps,
        "data.max_tokens": data.max_tokens, "data.window": data.window, "data.workers": data.workers,
        "data.prefetch_steps": data.prefetch_steps, "optim.lr": config.optim.lr, "optim.clip": config.optim.clip,
        "checkpoint.snapshot_every": config.checkpoint.snapshot_every,
        "checkpoint.snapshots": config.checkpoint.snapshots,
        "checkpoint.every_steps": config.checkpoint.every_steps, "checkpoint.keep": config.checkpoint.keep,
        "logging.every_steps": config.logging.every_steps, "flow.shift": flow.shift,
        "flow.sampling_steps": flow.sampling_steps, "model.heads": model.heads, "model.patch": model.patch,
        "text_encoder.buckets": config.text_encoder.buckets - 1, "data.max_bad_fraction": data.max_bad_fraction,
        "guard.max_bad_steps": config.guard.max_bad_steps, "guard.spike_steps": config.guard.spike_steps,
        "guard.spike_window": config.guard.spike_window, "guard.timeout_s": config.guard.timeout_s,
        "guard.slow_timeout_s": config.guard.slow_timeout_s, "vae.tile.frames": vae.tile.frames,
        "vae.tile.pixels": vae.tile.pixels,
    }  # fmt: skip
    for key, value in positive.items():
        _require(value > 0, f"{key}={value} must be above 0")
    for key, count in {
        "checkpoint.keep_every": config.checkpoint.keep_every, "guard.hash_every": config.guard.hash_every,
        "guard.spike": config.guard.spike, "guard.leave_out_before": config.guard.leave_out_before,
        "guard.max_rollbacks": config.guard.max_rollbacks,
        "guard.max_futile_restarts": config.guard.max_futile_restarts, "vae.tile.overlap": vae.tile.overlap,
        "flow.shift_tokens": flow.shift_tokens,
    }.items():  # fmt: skip
        _require(count >= 0, f"{key}={count} must not be below 0")
    _require(bool(data.sources), "data.sources is empty; name shards, e.g. +data.sources.mine.shards=[my/*.tar]")
    _require(0.0 < data.fill <= 1.0, f"data.fill={data.fill} must be in (0, 1]")
    _require(config.method is not Method.autoencoder or config.deepspeed.get("zero_optimization", {}).get("stage") != 3,
             "an autoencoder runs each size by itself, which ZeRO-3 can't follow; use stage 0, 1 or 2")  # fmt: skip
    _require(config.parallel.accumulation is None or config.parallel.accumulation > 0,
             f"parallel.accumulation={config.parallel.accumulation} must be above 0, or null")  # fmt: skip
    sequence = config.parallel.sequence
    _require(sequence > 0, f"parallel.sequence={sequence} must be above 0")
    _require(sequence == 1 or config.method is Method.diffusion, "an autoencoder has no sequence; parallel.sequence=1")
    if config.method is Method.diffusion:
        _check_diffusion(config)
    _check_lora(config)
    _check_text(config.text_encoder)
    _check_mirror(config.checkpoint.mirror)
    lengths = config.optim.ema_lengths
    _require(all(0.0 < length < 0.28 for length in lengths) and len(set(lengths)) == len(lengths),
             f"optim.ema_lengths={lengths} must be different numbers in (0, 0.28), e.g. [0.05, 0.1]")  # fmt: skip
    _check_vae(vae)
    unknown = [name for name in config.logging.writers if name not in WRITERS]
    _require(not unknown, f"logging.writers has no {unknown}; known: {', '.join(WRITERS)}")
    profiled = config.logging.profile_steps
    _require(not profiled or (len(profiled) == 2 and 0 < profiled[0] <= profiled[1]),
             f"logging.profile_steps={profiled} must be first and last step to trace, e.g. [20, 24]")  # fmt: skip
    _check_data(data)
    _check_deepspeed(config.deepspeed)
    _check_mixing(data)


def _check_diffusion(config: Config) -> None:
    model, sequence = config.model, config.parallel.sequence
    _require(model.heads % sequence == 0,
             f"model.heads={model.heads} must be a multiple of parallel.sequence={sequence}")  # fmt: skip
    _require(model.width % model.heads == 0 and model.width // model.heads % 2 == 0,
             f"model.width={model.width} must be an even multiple of model.heads={model.heads}")  # fmt: skip
    _require(config.vae.path is not None, "vae.path is not set; train a VAE (experiment=demo_vae) and export it first")
    for name, chosen, known in (
        ("activation_checkpointing", model.activation_checkpointing, ("none", "block", "selective")),
        ("attention", model.attention, ("auto", "sdpa", "varlen", "flex")),
        ("rope_scaling", model.rope_scaling, ROPE_SCALINGS),
    ):
        _require(chosen in known, f"model.{name}={chosen}; {nearest(chosen, list(known))}")
    _require(model.mlp_chunk >= 0, f"model.mlp_chunk={model.mlp_chunk} tokens; must be 0 (all at once) or more")
    _require(not (model.mlp_chunk and model.compile),
             "model.mlp_chunk and model.compile: a block would be compiled anew for each number of chunks; "
             "set one of them to 0 or false")  # fmt: skip
    factors = list(model.rope_factors)
    _require(len(factors) == 3 and min(factors) >= 1.0,
             f"model.rope_factors={factors} must be three, none below 1: time, height, width")  # fmt: skip
    _require(model.rope_scaling != "none" or max(factors) == 1.0,
             f"model.rope_factors={factors} say nothing with model.rope_scaling=none; "
             "choose interpolation or ntk, or leave them at 1")  # fmt: skip
    _check_flow(config.flow, config.data)


def _check_vae(vae: VaeConfig) -> None:
    _require(vae.class_name is not None or len(vae.widths) == len(vae.blocks) == len(vae.strides) + 1,
             "vae.widths and vae.blocks need one entry per level, vae.strides one less")  # fmt: skip
    weight, files = vae.perceptual.weight, vae.perceptual.files
    _require(weight >= 0, f"vae.perceptual.weight={weight} must not be below 0")
    _require(weight == 0 or bool(files),
             "vae.perceptual.weight needs VGG16 weights; give vae.perceptual.files=[vgg16.pth], or 0")  # fmt: skip


def _check_mirror(mirror: str | None) -> None:
    if mirror is None:
        return
    found = re.fullmatch(r"([a-z][a-z0-9+.-]*)://([^/]*)(/?.*)", mirror)
    _require(
        found is not None and bool(found[2] + found[3].strip("/")),
        f"checkpoint.mirror={mirror} must be a URL such as s3://bucket/runs/x or file:///mnt/backup/x, or null",
    )
    assert found is not None
    _require(found[1] not in ("http", "https"), f"checkpoint.mirror={mirror}: nothing can be written to http")
    _require(":" not in found[2].rpartition("@")[0],
             "checkpoint.mirror holds a password; give it by the environment or data.storage")  # fmt: skip


def _check_text(text: TextEncoderConfig) -> None:
    _require(text.path is not None or text.width % text.heads == 0,
             f"text_encoder.width={text.width} must be a multiple of its heads")  # fmt: skip
    _require(
        text.path is not None or text.pad_to == 0,
        "text_encoder.pad_to is for a released encoder: set text_encoder.path too, or text_encoder.pad_to=0",
    )
    _require(
        text.pad_to == 0 or text.pad_to >= text.max_tokens,
        f"text_encoder.pad_to={text.pad_to} must be 0 or at least text_encoder.max_tokens={text.max_tokens}",
    )


def _check_lora(config: Config) -> None:
    lora = config.model.lora
    _require(lora.rank >= 0, f"model.lora.rank={lora.rank} must not be below 0")
    if lora.rank == 0:
        return
    _require(config.method is Method.diffusion, "model.lora is for the video model; method=diffusion, or lora.rank=0")
    _require(lora.alpha > 0, f"model.lora.alpha={lora.alpha} must be above 0")
    _require(bool(lora.targets), f"model.lora.targets is empty; known: {', '.join(LORA_TARGETS)}")
    unknown = [name for name in lora.targets if name not in LORA_TARGETS]
    _require(not unknown, f"model.lora.targets has no layer {unknown[:1]}; "
                          + (nearest(unknown[0], list(LORA_TARGETS)) if unknown else ""))  # fmt: skip
    _require(
        config.model.init_from is None or config.text_encoder.path is not None,
        "model.lora trains adapters of the transformer alone, and our own text encoder would stay at random beside "
        "model.init_from; set text_encoder.path to the encoder that those weights were trained with",
    )


def _check_flow(flow: FlowConfig, data: DataConfig) -> None:
    staged = {f"data.stages[{n}].tasks": stage.tasks for n, stage in enumerate(data.stages) if stage.tasks}
    for key, tasks in {"flow.tasks": flow.tasks, **staged}.items():
        unknown = [task for task in tasks if task not in TASKS]
        _require(not unknown, f"{key} has no {unknown[:1]}; {nearest(unknown[0], list(TASKS)) if unknown else ''}")
        _require(min(tasks.values(), default=0) >= 0 and sum(tasks.values()) > 0,
                 f"{key}: no weight may be below 0, and one must be above")  # fmt: skip
    _require(flow.solver in SOLVERS, f"flow.solver={flow.solver!r}; {nearest(flow.solver, list(SOLVERS))}")
    for key, value in {"per_frame_noise": flow.per_frame_noise, "guidance_rescale": flow.guidance_rescale}.items():
        _require(0.0 <= value <= 1.0, f"flow.{key}={value} must be in [0, 1]")
    low, high = flow.guidance_interval
    _require(0.0 <= low <= high <= 1.0, f"flow.guidance_interval={[low, high]} must be timesteps, the lower one first")


def _check_data(data: DataConfig) -> None:
    unknown = [name for name in data.decoders if name not in DECODERS]
    _require(not unknown, f"data.decoders has no {unknown[:1]}; {nearest(str((unknown or [''])[0]), list(DECODERS))}")
    _require(bool(data.decoders) and len(set(data.decoders)) == len(data.decoders),
             f"data.decoders={data.decoders}: name at least one, and each once")  # fmt: skip
    positive = {"limits.pixels": data.limits.pixels, "limits.frames": data.limits.frames,
                "limits.bytes": data.limits.bytes, "cache.gib": data.cache.gib,
                "decode_timeout_s": data.decode_timeout_s, "decode_memory_gib": data.decode_memory_gib}  # fmt: skip
    for key, value in positive.items():
        _require(value > 0, f"data.{key}={value} must be above 0")
    strange = [name for name in data.commands if not re.fullmatch(r"[\w./+-]+", name)]
    _require(not strange, f"data.commands={strange[:1]} must be names of programs, without arguments, e.g. [rclone]")
    wrong = [kind for kind, options in data.storage.items() if not isinstance(options, dict)]
    _require(not wrong, f"data.storage.{(wrong or [''])[0]} must be a map of options, e.g. +data.storage.s3.anon=true")


def _check_deepspeed(options: dict[str, Any]) -> None:
    for key, ours in DERIVED.items():
        _require(key not in options, f"deepspeed.{key} follows from {ours}; set that instead")
    zero = options.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    _require(stage in (0, 1, 2, 3), f"deepspeed.zero_optimization.stage={stage}; known: 0, 1, 2, 3")
    _require(
        not zero.get("round_robin_gradients"),
        "deepspeed.zero_optimization.round_robin_gradients breaks the fragment mapping; turn it off",
    )


def _check_mixing(data: DataConfig) -> None:
    weights = {name: source.weight for name, source in data.sources.items() if source.weight is not None}
    _require(not weights or len(weights) == len(data.sources),
             f"data.sources: {sorted(weights)} have a weight and others none; give it to all or none")  # fmt: skip
    _require(not weights or all(data.sources[name].repeat == 1.0 for name in weights),
             "data.sources: a source has a weight or a repeat, not both")  # fmt: skip
    named = [("data.captions", data.captions)] if data.captions else []
    named += [("data.sources.*.weight", weights)] if weights else []
    last = 0
    for number, stage in enumerate(data.stages):
        key = f"data.stages[{number}]"
        named += [(f"{key}.weights", stage.weights)] if stage.weights else []
        unknown = sorted(set(stage.weights) - set(data.sources))
        _require(not unknown, f"{key}.weights: there is no source {unknown[:1]}; "
                              + (nearest(unknown[0], list(data.sources)) if unknown else ""))  # fmt: skip
        is_last = number == len(data.stages) - 1
        _require((stage.until_step is None) == is_last,
                 f"{key}.until_step={stage.until_step}: the last stage alone has none (null)")  # fmt: skip
        _require(is_last or (stage.until_step or 0) > last,
                 f"{key}.until_step={stage.until_step} must be above {last}, where the stage begins")  # fmt: skip
        last = stage.until_step or last
        for name in ("fps", "max_frames", "max_pixels"):
            value = getattr(stage, name)
            _require(value is None or value > 0, f"{key}.{name}={value} must be above 0")
    for key, values in named:
        _require(min(values.values()) >= 0 and sum(values.values()) > 0,
                 f"{key}: no weight may be below 0, and one must be above")  # fmt: skip


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def _explain(error: Exception) -> str:
    """One line for an OmegaConf error: the full key, what is wrong, and the nearest key where one is unknown."""
    key = str(getattr(error, "full_key", "") or "")
    if isinstance(error, ConfigKeyError):
        return f"there is no key {key!r}; {nearest(key, known_keys())}"
    return f"{key}: {str(error).splitlines()[0]}"
