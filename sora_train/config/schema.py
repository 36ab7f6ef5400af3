"""The configuration: one dataclass tree with every key, its default and its meaning.

The comment at the end of a field's line is its meaning in docs/config_reference.md. Imports neither torch nor
deepspeed, so that a mistake is reported within a second and before any process group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import MISSING

DECODERS = ("decord", "pyav", "torchcodec")
TASKS = (
    "text_to_video", "image_to_video", "extension", "extension_backwards", "interpolation", "frames", "memory", "image",
)  # fmt: skip
NATIVE = "native"  # as data.fps
TOKENIZERS = ("hashed", "bpe")
TOKENIZER = "tokenizer.json"  # file of a trained tokenizer, in the folder of a run or an export
_TASK_WEIGHTS = {
    "text_to_video": 0.8, "image_to_video": 0.1, "extension": 0.1, "extension_backwards": 0.0, "interpolation": 0.0,
    "frames": 0.0, "memory": 0.0,
}  # fmt: skip
SCHEDULES = ("linear", "cosine")
SOLVERS = ("euler", "heun", "adams_bashforth")
# settings of a run; the other keys of VaeConfig are its shape
VAE_USE = ("path", "cache_mib", "tile", "perceptual", "frozen_encoder")
WRITERS = ("tensorboard", "wandb", "prometheus")  # beside metrics.jsonl
DERIVED = {  # DeepSpeed keys that we set from ours
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


def clip_rate(fps: float | str) -> float:
    """Frames a second that `data.fps` asks of every clip; 0 for `native`, where each keeps its own rate."""
    return 0.0 if fps == NATIVE else float(fps)


class Precision(Enum):
    """Data type of weights and activations; fp32 master weights are kept with both."""

    fp32 = "fp32"
    bf16 = "bf16"


class Fit(Enum):
    """Ways to bring a video to a size that is a whole number of patches."""

    crop = "crop"  # resize to cover that size, then crop the centre
    stretch = "stretch"  # resize height and width independently, each by less than one patch


class Probe(Enum):
    """Part of each video or image that indexing decodes; frames are counted and checksums taken with each."""

    packets = "packets"  # packet headers only, for huge sets; damage is found when training decodes it, not all of it
    frame = "frame"  # the first frame too
    all = "all"  # every frame: a file in which a decoder finds damage anywhere is refused as a whole


class Previews(Enum):
    """The clips whose captions are sampled while a run trains."""

    held_out = "held_out"
    training = "training"  # clips of the first steps; shows whether a run can overfit them


class Prediction(Enum):
    """Parametrisation of the network's output. The loss is that of the velocity in every case."""

    velocity = "velocity"
    preconditioned = "preconditioned"  # velocity with the skip connection and output scaling of Karras et al. 2022
    x0 = "x0"  # the data
    noise = "noise"


class Weighting(Enum):
    """Unit that has equal weight in the loss."""

    token = "token"  # every generated token: long and large clips have more weight
    clip = "clip"  # every clip


class Timesteps(Enum):
    """Distribution that training timesteps are drawn from, before the shift."""

    logit_normal = "logit_normal"
    uniform = "uniform"


@dataclass
class LoraConfig:
    """Low-rank adapters (LoRA). With a rank above 0 they alone are trained; all other weights are frozen."""

    rank: int = 0  # rank of each adapter; 0: no adapters, all weights are trained
    alpha: float = 16.0  # an adapter's output is scaled by alpha / rank
    targets: list[str] = field(default_factory=lambda: ["q", "k", "v", "out"])  # suffixes of names of adapted layers
    init_from: str | None = None  # file of adapters to start from: of an export, diffusers, ComfyUI or kohya's scripts


@dataclass
class ModelConfig:
    """The diffusion transformer: keys that all families have. `model=NAME` chooses a size, and with it a family."""

    family: str = MISSING  # registered name of the model family, e.g. wan
    width: int = MISSING
    depth: int = MISSING  # blocks
    heads: int = MISSING
    ffn: int = MISSING  # width of the MLP
    patch: int = 2  # side of a patch in latent pixels
    activation_checkpointing: str = "none"  # recompute in backward: none, block (all of it), selective (not attention)
    mlp_chunk: int = 0  # tokens per chunk of an MLP, recomputed in backward to save memory; 0: all tokens at once
    attention: str = "auto"  # back end: auto, sdpa, varlen (FlashAttention), flex
    compile: bool = False  # torch.compile each block
    init_from: str | None = None  # released weights (diffusers' or Wan's own layout); their shape overrides model.*
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass
class TileConfig:
    """Sizes above which a frozen VAE processes a video in temporal pieces and spatial tiles, to bound memory."""

    frames: int = 64  # frames of a piece; the result equals that of the whole video
    pixels: int = 1024  # side of a tile in pixels
    overlap: int = 64  # pixels of context computed around each tile and cut off


@dataclass
class PerceptualConfig:
    """Perceptual loss of a VAE that is trained, from VGG16 weights in local files."""

    weight: float = 0.0  # relative to L1; 0: no perceptual loss
    files: list[str] = field(default_factory=list)  # torchvision's vgg16 weights, and optionally LPIPS's linear heads


@dataclass
class VaeConfig:
    """The video autoencoder: a trained one at `path`, or the shape of one to train."""

    path: str | None = None  # folder written by sora_train.export, or of a diffusers VAE
    frozen_encoder: bool = False  # train the decoder of the VAE at `path` alone, whose latents stay what they are
    class_name: str | None = None  # class of a diffusers VAE, read from its folder; null: our own
    cache_mib: int = 0  # size of each rank's cache of latents, for small data sets; 0: no cache
    tile: TileConfig = field(default_factory=TileConfig)
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    channels: int = 16  # latent channels
    patch: int = 2  # pixels per side that are folded into channels before the first convolution
    widths: list[int] = field(default_factory=lambda: [96, 192, 384])  # channels of each level
    blocks: list[int] = field(default_factory=lambda: [1, 2, 2])  # residual blocks of each level
    strides: list[list[int]] = field(default_factory=lambda: [[2, 2], [2, 2]])  # (time, space) between levels
    mse_weight: float = 4.0  # squared error, relative to L1
    kl_weight: float = 1e-4  # KL divergence of the latents from a unit Gaussian, relative to L1

    @property
    def temporal_stride(self) -> int:
        """Frames per latent frame."""
        return math.prod(time for time, _ in self.strides)

    @property
    def spatial_stride(self) -> int:
        """Pixels per latent pixel, along each side."""
        return self.patch * math.prod(space for _, space in self.strides)


@dataclass
class TextEncoderConfig:
    """A small text encoder that is trained with the model, or a released one at `path`, frozen."""

    path: str | None = None  # transformers folder of a T5 or umT5 (or a pipeline folder); its width overrides `width`
    pad_to: int = 0  # tokens to which a released encoder's embeddings are padded with zeros; Wan's weights need 512
    width: int = 128
    depth: int = 2  # layers
    heads: int = 4
    tokenizer: str = "hashed"  # hashed: words, no file; bpe: subwords, trained on the captions and kept with the run
    tokenizer_path: str | None = None  # file of a bpe tokenizer to take; null: that of init_from, or a new one
    buckets: int = 2048  # rows of the embedding table; a hashed word is the sum of two, a subword is one
    max_tokens: int = 128  # longer captions are cut off


@dataclass
class SourceConfig:
    """Shards that are sampled at one rate."""

    shards: list[str] = MISSING  # paths, globs, brace ranges
    repeat: float = 1.0  # visits of each sample per epoch; 1.5: one, and for half of the samples (by hash) two
    weight: float | None = None  # instead of repeat: share of an epoch's visits, relative to the other sources' weights
    filter: str = ""  # applied in addition to data.filter


@dataclass
class StageConfig:
    """A stage of a curriculum, with data settings of its own. Keys that are null keep the value of `data`."""

    until_step: int | None = None  # last step of the stage; null: to the end
    fps: int | float | str | None = None
    max_frames: int | None = None
    max_pixels: int | None = None
    weights: dict[str, float] = field(default_factory=dict)  # of sources; 0 where not named; empty: the sources' own
    tasks: dict[str, float] = field(default_factory=dict)  # weights of tasks; 0 where not named; empty: flow.tasks


@dataclass
class LimitsConfig:
    """Largest videos and images that are accepted; others are refused before anything of them is decoded."""

    pixels: int = 33554432  # of a frame; the default is about 8K UHD
    frames: int = 1048576
    bytes: int = 2147483648  # of the file


@dataclass
class CacheConfig:
    """Cache of remote shards on the disk of each node, shared by its ranks."""

    folder: str | None = None  # null: sora_train-UID in the system's temporary folder
    gib: float = 32.0  # upper limit of its size


@dataclass
class DataConfig:
    """Training data: sources, selection of samples, clips and packs, and decoding."""

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    validation: list[str] = field(default_factory=list)  # shards held out: paths, globs, brace ranges
    test: list[str] = field(default_factory=list)  # for `evaluate split=test`; training never looks at it
    filter: str = ""  # condition on the index, validation included, e.g. duration >= 2 and height >= 240
    side_tables: list[str] = field(default_factory=list)  # Parquet files with a column key: further columns of samples
    weight: str = ""  # visits of each sample per epoch, times its source's: an expression, e.g. score / 5; empty: 1
    stages: list[StageConfig] = field(default_factory=list)  # curriculum, in order; empty: one stage
    captions: dict[str, float] = field(default_factory=dict)  # weights of named captions; empty: equal weights
    index: str | None = None  # consolidated index of the training shards, for large sets
    probe: Probe | None = None  # part decoded for an index; null: all for shards without one, any index counts
    drop_refused: bool = False  # leave out of later epochs the samples that were refused
    fps: int | float | str = 16.0  # frames per second to train at, or native: each video's own
    max_frames: int = 81  # of a clip
    max_pixels: int = 102400  # height x width of a clip; larger videos are scaled down
    fit: Fit = Fit.crop
    slots: int = 8  # packs per optimizer step, divided over the ranks
    max_tokens: int = 8192  # of a slot
    pack_slots: int = 1  # slots that a pack may take, up to 1, 2, 4, 8, ...: where clips are long, ranks share them
    fill: float = 0.9  # target share of the token budget that the packs of a window fill
    window: int = 4096  # samples that are shuffled and packed together
    cost: str | None = None  # file of sora_train.calibrate: balance packs by measured seconds; null: by FLOPs
    workers: int = 2  # decode processes per rank
    prefetch_steps: int = 3  # steps decoded ahead
    decoded_mib: int = 0  # decoded clips that each rank keeps in memory, for a few clips; 0: none
    augment: str = ""  # registered change of training clips and their captions, e.g. mirror; empty: none
    decode_timeout_s: float = 60.0  # of one clip, before its decoder is killed
    decode_memory_gib: float = 8.0  # of one decode process
    max_bad_fraction: float = 0.2  # of the last 1000 samples that may fail; more stops the run
    decoders: list[str] = field(default_factory=lambda: ["decord", "pyav"])  # tried in this order
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    storage: dict[str, Any] = field(default_factory=dict)  # fsspec options by scheme, e.g. s3: {anon: true}
    commands: list[str] = field(default_factory=list)  # programs that shards named pipe:... may run
    deinterlace: bool = False  # interlaced videos, by FFmpeg's estdif; else as they are stored, both fields in a frame
    tone_map: bool = False  # HDR videos (PQ, HLG) to SDR, by FFmpeg's swscale; else their code values as if SDR

    @property
    def made_fps(self) -> float:
        """Frames a second of videos that are made: `fps`, or 24 where every clip keeps its own rate."""
        return clip_rate(self.fps) or 24.0


@dataclass
class FlowConfig:
    """The training objective (rectified flow) and the sampler."""

    tasks: dict[str, float] = field(default_factory=lambda: dict(_TASK_WEIGHTS))  # relative shares of the clips
    prediction: Prediction = Prediction.velocity
    timesteps: Timesteps = Timesteps.logit_normal
    mean: float = 0.0  # of the logit-normal
    std: float = 1.0  # of the logit-normal
    shift: float = 2.0  # t -> shift t / (1 + (shift - 1) t), towards noise
    shift_tokens: int = 0  # reference size: a clip's shift is shift sqrt(tokens / shift_tokens). 0: shift for all
    caption_dropout: float = 0.1  # share of clips trained with the empty caption, for classifier-free guidance
    per_frame_noise: float = 0.0  # share of clips whose latent frames each have a timestep of their own
    weighting: Weighting = Weighting.token
    guidance: float = 3.0  # scale of classifier-free guidance; 1: none
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # timesteps with guidance; none outside
    guidance_rescale: float = 0.0  # 0 to 1: how far the guided velocity's standard deviation is reset to the unguided's
    sampling_steps: int = 20
    sampling_aspect: tuple[int, int] = (1, 1)  # height to width of samples for which nothing else gives it
    solver: str = "euler"  # heun (two evaluations a step), adams_bashforth (one)


@dataclass
class MuonConfig:
    """Muon, where `optim.matrices` asks for it."""

    lr: float = 0.02  # an update's elements have a root mean square of 0.2 of it
    momentum: float = 0.95
    weight_decay: float = 0.0


@dataclass
class OptimConfig:
    """AdamW (or Muon), the learning rate schedule, and averages (EMA) of the weights."""

    matrices: str = "adamw"  # optimizer of the blocks' matrices: adamw, muon; AdamW moves all else, adapters too
    muon: MuonConfig = field(default_factory=MuonConfig)

    lr: float = 1e-3
    text_lr_scale: float = 1.0  # learning rate of the text encoder relative to the rest
    rates: dict[str, float] = field(default_factory=dict)  # relative rates by pattern of parameter names; 0: frozen
    base_width: int = 0  # model.width that the learning rates were tuned at: transferred by muP; 0: used as they are
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip: float = 1.0  # largest global gradient norm
    warmup_steps: int = 20
    schedule: str = "linear"  # how the learning rate falls at the end: linear, cosine
    decay_fraction: float = 0.5  # last fraction of the run, over which the learning rate falls; 0: it stays
    end_rate: float = 0.0  # share of the learning rate that it falls to
    ema_decay: float = 0.99
    ema_lengths: list[float] = field(default_factory=list)  # further averages: width / steps so far, e.g. [0.05, 0.1]


@dataclass
class ParallelConfig:
    """Division of a step over ranks and forward passes."""

    accumulation: int | None = None  # forward passes per step and rank; null: one per slot
    sequence: int = 1  # ranks that share the tokens of every pack (Ulysses) and act as one data-parallel rank


@dataclass
class CheckpointConfig:
    """Checkpoint interval, retention, and copies in remote storage."""

    every_steps: int = 200
    keep: int = 3  # number of newest checkpoints that are kept
    keep_every: int = 0  # checkpoints at multiples of this step are never deleted; 0: none
    best: str | None = None  # figure of logging.metrics; the checkpoint that is best by it is kept too; null: none
    snapshot_every: int = 1000  # steps between snapshots of optim.ema_lengths' averages in run_dir/snapshots
    snapshots: int = 64  # largest number of snapshots, spread evenly over the run
    mirror: str | None = None  # remote folder for copies of this run's checkpoints, e.g. s3://bucket/runs/x; null: none


@dataclass
class GuardConfig:
    """Protection from non-finite steps, loss spikes, diverging ranks, hangs and useless restarts."""

    max_bad_steps: int = 10  # consecutive steps with non-finite values (they are skipped) before a rollback
    spike: float = 12.0  # robust deviations (1.4826 MAD) above the median loss that count as a spike; 0 is off
    spike_steps: int = 3  # consecutive spikes before a rollback
    spike_window: int = 100  # number of losses from which median and MAD are computed
    leave_out_before: int = 2  # steps before the first bad one whose data a rollback leaves out, with the bad ones'
    max_rollbacks: int = 3  # of a run
    hash_every: int = 500  # steps between comparisons of the ranks' weights; 0: only before a save
    timeout_s: float = 600.0  # without progress before a rank counts as hanging
    slow_timeout_s: float = 3600.0  # the same in the first step, validation, sampling and when waiting for a save
    max_futile_restarts: int = 3  # consecutive automatic restarts without a new checkpoint
    accept_changes: bool = False  # resume although the model or its training data changed since the checkpoint


@dataclass
class LoggingConfig:
    """Metrics, validation, samples and profiles of a run, and the services they are written to."""

    every_steps: int = 10  # steps between logged metrics
    validate_every: int = 200  # steps between validations
    validation_clips: int = 64
    sample_every: int = 500  # steps between samples
    sample_clips: int = 4
    previews: Previews = Previews.held_out
    prompts: list[str] = field(default_factory=list)  # sampled instead of captions of clips; one with a comma in quotes
    evaluate_every: int = 0  # steps between evaluations by metrics of samples for held-out clips; 0: none
    evaluate_clips: int = 16  # held-out videos of an evaluation, always the same
    metrics: list[str] = field(default_factory=lambda: ["quick"])  # names or groups of metrics of an evaluation
    writers: list[str] = field(default_factory=lambda: ["tensorboard", "wandb"])  # in addition to metrics.jsonl
    project: str = ""  # of the wandb run; empty: WANDB_PROJECT, or sora_train
    group: str = ""  # of the wandb run; empty: WANDB_RUN_GROUP, or the folder that holds the run folder
    tags: list[str] = field(default_factory=list)  # of the wandb run; empty: WANDB_TAGS
    prometheus_port: int = 0  # HTTP port for Prometheus; 0: run_dir/metrics.prom, for its textfile collector
    profile_steps: list[int] = field(default_factory=list)  # first and last step to trace into run_dir/profile/
    wandb_finish_s: float = 60.0  # seconds that wandb's uploads may take at the end of a run
    memory_history: bool = False  # record stack traces of GPU allocations, for the snapshot when memory runs out
    peak_tflops: float | None = None  # of one device, for MFU; null: published for the GPU, measured on a CPU


@dataclass
class Config:
    """The configuration of a run; the resolved tree is written to run_dir/config.yaml."""

    run_dir: str = MISSING  # folder for everything that the run writes
    method: str = "diffusion"  # training method: diffusion, autoencoder, or a plugin's
    plugins: list[str] = field(default_factory=list)  # modules that register methods, model families, ...
    method_options: dict[str, Any] = field(default_factory=dict)  # settings of a plugin's method, by names of its own
    init_from: str | None = None  # run folder or export whose averaged weights a new run starts from
    seed: int = 0  # of initial weights, data order and noise
    steps: int = MISSING  # optimizer updates of the run
    epochs: float | None = None  # length of the run in epochs; null: `steps` says it
    precision: Precision = Precision.fp32
    threads: int | None = None  # CPU threads per rank; null: the machine's cores divided by its ranks
    model: ModelConfig = MISSING
    vae: VaeConfig = field(default_factory=VaeConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    data: DataConfig = field(default_factory=DataConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    deepspeed: dict[str, Any] = field(default_factory=dict)  # passed to DeepSpeed
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def tokenizer_file(self) -> str | None:
        """File of the trained tokenizer of a text encoder of our own; None for hashed words and released encoders."""
        text = self.text_encoder
        if text.path is not None or text.tokenizer != "bpe":
            return None
        return text.tokenizer_path or str(Path(self.run_dir) / TOKENIZER)
