"""The configuration: one dataclass tree with every key, its default and its meaning.

Imports neither torch nor deepspeed, so that a mistake is answered within a moment and before any process group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

DECODERS = ("decord", "pyav", "torchcodec")
TASKS = (
    "text_to_video", "image_to_video", "extension", "extension_backwards", "interpolation", "frames", "image",
)  # fmt: skip
_TASK_WEIGHTS = {
    "text_to_video": 0.8, "image_to_video": 0.1, "extension": 0.1, "extension_backwards": 0.0, "interpolation": 0.0,
    "frames": 0.0,
}  # fmt: skip
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
    """The diffusion transformer: the keys of every family. `model=NAME` picks a size, and with it a family."""

    family: str = MISSING  # folder of sora_train/models that builds it
    width: int = MISSING
    depth: int = MISSING  # blocks
    heads: int = MISSING
    ffn: int = MISSING  # width of the MLP
    patch: int = 2  # latent pixels a side
    activation_checkpointing: str = "none"  # recompute in backward: none, block (all of it), selective (not attention)
    mlp_chunk: int = 0  # tokens that go through an MLP at a time, and again in backward, to save memory; 0 for all
    attention: str = "auto"  # back end: auto, sdpa, varlen (FlashAttention), flex
    compile: bool = False  # torch.compile of the block
    init_from: str | None = None  # released weights of the family (a diffusers folder) to start from; their shape rules
    lora: LoraConfig = field(default_factory=LoraConfig)


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
    channels: int = 16
    patch: int = 2
    widths: list[int] = field(default_factory=lambda: [96, 192, 384])
    blocks: list[int] = field(default_factory=lambda: [1, 2, 2])
    strides: list[list[int]] = field(default_factory=lambda: [[2, 2], [2, 2]])  # (time, space) between levels
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
    depth: int = 2
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
    side_tables: list[str] = field(default_factory=list)  # Parquet files with a column key: further columns of samples
    weight: str = ""  # visits of each sample per epoch, times its source's: an expression, e.g. score / 5; empty: 1
    stages: list[StageConfig] = field(default_factory=list)  # one after the other; empty: one
    captions: dict[str, float] = field(default_factory=dict)  # weights of named captions; empty: all alike
    index: str | None = None  # consolidated index of the training shards, for large sets
    probe: Probe = Probe.packets  # what is decoded of shards that have no index yet; frame takes some times longer
    drop_refused: bool = False  # leave samples that were refused out of later epochs
    fps: float = 16.0  # frames a second to train at; faster videos are thinned out
    max_frames: int = 81
    max_pixels: int = 102400  # height x width; larger videos are scaled down
    fit: Fit = Fit.crop
    slots: int = 8  # packs of an optimizer step, shared out over the ranks
    max_tokens: int = 8192  # of a slot
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

    tasks: dict[str, float] = field(default_factory=lambda: dict(_TASK_WEIGHTS))  # share of the clips, by weight
    prediction: Prediction = Prediction.velocity
    timesteps: Timesteps = Timesteps.logit_normal
    mean: float = 0.0  # of the logit-normal
    std: float = 1.0
    shift: float = 2.0  # t -> shift t / (1 + (shift - 1) t), towards noise
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
class MuonConfig:
    """Muon, where `optim.matrices` asks for it."""

    lr: float = 0.02  # an update's elements have a root mean square of 0.2 of it
    momentum: float = 0.95
    weight_decay: float = 0.0


@dataclass
class OptimConfig:
    """AdamW (and Muon), the schedule, and the moving average of the weights."""

    matrices: str = "adamw"  # what moves the matrices of blocks: adamw, muon; all else is moved by AdamW
    muon: MuonConfig = field(default_factory=MuonConfig)

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
    method: str = "diffusion"  # what is trained: diffusion, autoencoder, or a plugin's
    plugins: list[str] = field(default_factory=list)  # modules that register methods or model families
    init_from: str | None = None  # run folder or export whose averaged weights a new run starts from
    seed: int = 0  # of weights, order, noise
    steps: int = MISSING  # optimizer updates of the run
    precision: Precision = Precision.fp32
    threads: int | None = None  # CPU threads per rank; null: the cores of the machine shared out
    model: ModelConfig = MISSING
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
