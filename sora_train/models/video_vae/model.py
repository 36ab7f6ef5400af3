"""A causal 3-D video autoencoder: the latent of a frame depends on that frame and earlier ones only.

Pixels are folded into channels (`patch`), then convolved causally and downsampled in time and space level by level, as
in the video tokenisers of Wan (arXiv 2503.20314) and LTX (arXiv 2501.00103). 1 + k * stride frames become 1 + k latent
frames, so that an image is a video of one frame.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sora_train.config.schema import VaeConfig

_CALM = 1e-3  # epsilon of the norm; large, because gradients would spike in uniform areas, whose energy is near 0


class VideoVAE(nn.Module):
    """Encoder and decoder between pixels in [-1, 1] and a diagonal Gaussian over latents.

    `widths[i]` are the channels of level i, `strides[i] = (time, space)` the downsampling from level i to i + 1.
    """

    def __init__(
        self, channels: int, patch: int, widths: list[int], blocks: list[int], strides: list[tuple[int, int]]
    ) -> None:
        super().__init__()
        self.channels = channels
        self.temporal_stride = math.prod(t for t, _ in strides)
        self.spatial_stride = patch * math.prod(s for _, s in strides)
        self.encoder = Encoder(channels, patch, widths, blocks, strides)
        self.decoder = Decoder(channels, patch, widths, blocks, strides)
        self.latents_mean: Tensor
        self.latents_std: Tensor
        self.register_buffer("latents_mean", torch.zeros(channels))
        self.register_buffer("latents_std", torch.ones(channels))

    def encode(self, video_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latents, each `(B, channels, 1 + (T - 1) / stride, H / s, W / s)`.

        Raises ValueError if the frames aren't 1 + k * temporal_stride or the sides aren't multiples of spatial_stride.
        """
        frames, height, width = video_BCTHW.shape[2:]
        if (frames - 1) % self.temporal_stride or height % self.spatial_stride or width % self.spatial_stride:
            raise ValueError(
                f"a video of {frames} frames, {height}x{width}: the frames must be 1 + a multiple of "
                f"{self.temporal_stride} and the sides multiples of {self.spatial_stride}"
            )
        return _moments(self.encoder(video_BCTHW))

    def encode_pieces(self, pieces: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Encode a video piece by piece; yields the moments of each piece, equal to those of the whole video.

        Pieces have a multiple of `temporal_stride` frames, the first one more. Each convolution keeps the last frames
        of its input for the next piece.
        """
        with _remembering(self.encoder):
            for piece_BCTHW in pieces:
                yield _moments(self.encoder(piece_BCTHW))

    def decode_pieces(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """Decode latents piece by piece, in pieces of any length; equal to decoding them as a whole."""
        with _remembering(self.decoder):
            for piece_BCTHW in pieces:
                yield self.decoder(piece_BCTHW)

    def forward(self, videos_BCTHW: list[Tensor], noises_BCTHW: list[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Reconstruct batches of videos, each of one size, from sampled latents.

        Args:
            videos_BCTHW: Batches of pixels in [-1, 1].
            noises_BCTHW: Standard normal noise for the latents of each batch.

        Returns:
            Reconstruction, and mean and log-variance of the latents, for each batch.
        """
        results = []
        dtype = next(self.parameters()).dtype
        for video, noise in zip(videos_BCTHW, noises_BCTHW, strict=True):
            mean, log_variance = self.encode(video.to(dtype))
            results.append((self.decode(mean + noise.to(mean.dtype) * (0.5 * log_variance).exp()), mean, log_variance))
        return results

    def decode(self, latents_BCTHW: Tensor) -> Tensor:
        """Decode latents to pixels `(B, 3, 1 + (T - 1) * stride, H * s, W * s)` in about [-1, 1], not clamped."""
        return self.decoder(latents_BCTHW)

    def normalise(self, latents_BCTHW: Tensor) -> Tensor:
        """Scale latents to mean 0 and standard deviation 1 per channel, as measured on the training data."""
        return (latents_BCTHW - self.latents_mean.view(-1, 1, 1, 1)) / self.latents_std.view(-1, 1, 1, 1)

    def denormalise(self, latents_BCTHW: Tensor) -> Tensor:
        """Inverse of `normalise`."""
        return latents_BCTHW * self.latents_std.view(-1, 1, 1, 1) + self.latents_mean.view(-1, 1, 1, 1)


def _moments(out_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance from the encoder's output."""
    mean, spread = out_BCTHW.chunk(2, dim=1)
    log_variance = 0.1 * spread - 3.0  # small at the start of training, or the noise would drown the latents
    return mean, log_variance.clamp(-20.0, 10.0)


class Encoder(nn.Module):
    """Maps pixels to the mean and the log variance of the latents."""

    def __init__(
        self, channels: int, patch: int, widths: list[int], blocks: list[int], strides: list[tuple[int, int]]
    ) -> None:
        super().__init__()
        self.patch = patch
        layers: list[nn.Module] = [Project(3 * patch**2, widths[0])]
        for level, width in enumerate(widths):
            layers += [ResBlock(width) for _ in range(blocks[level])]
            if level < len(strides):
                layers.append(Down(width, widths[level + 1], *strides[level]))
        self.layers = nn.Sequential(*layers, Project(widths[-1], 2 * channels))

    def forward(self, video_BCTHW: Tensor) -> Tensor:
        """Encode `(B, 3, T, H, W)` to `(B, 2 * channels, t, h, w)`."""
        batch = video_BCTHW.shape[0]
        x = F.pixel_unshuffle(video_BCTHW.transpose(1, 2).flatten(0, 1), self.patch)
        return self.layers(x.unflatten(0, (batch, -1)).transpose(1, 2))


class Decoder(nn.Module):
    """Latents to pixels."""

    def __init__(
        self, channels: int, patch: int, widths: list[int], blocks: list[int], strides: list[tuple[int, int]]
    ) -> None:
        super().__init__()
        self.patch = patch
        layers: list[nn.Module] = [Project(channels, widths[-1])]
        for level in reversed(range(len(widths))):
            layers += [ResBlock(widths[level]) for _ in range(blocks[level])]
            if level:
                layers.append(Up(widths[level], widths[level - 1], *strides[level - 1]))
        self.layers = nn.Sequential(*layers, Project(widths[0], 3 * patch**2))

    def forward(self, latents_BCTHW: Tensor) -> Tensor:
        """Decode `(B, channels, t, h, w)` to `(B, 3, T, H, W)`."""
        x = self.layers(latents_BCTHW)
        batch = x.shape[0]
        x = F.pixel_shuffle(x.transpose(1, 2).flatten(0, 1), self.patch)
        return x.unflatten(0, (batch, -1)).transpose(1, 2)


class CausalConv(nn.Conv3d):
    """A 3x3x3 convolution that is causal in time: two copies of the first frame are padded before it, none at the end.

    While a video is processed in pieces, `remembers` is set, and `past` is the last two frames of the previous piece.
    """

    remembers = False
    past: Tensor | None = None

    def __init__(self, inputs: int, outputs: int, stride: tuple[int, int, int] = (1, 1, 1)) -> None:
        super().__init__(inputs, outputs, kernel_size=3, stride=stride, padding=(0, 1, 1))

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        """Convolve `(B, C, T, H, W)` to `(B, C', 1 + (T - 1) / stride, ...)`."""
        first = x_BCTHW[:, :, :1]
        if self.past is None:
            whole, skip = torch.cat((first, first, x_BCTHW), dim=2), 0
        else:  # the last window ended with the previous piece; the next one ends `stride` frames into this piece
            whole, skip = torch.cat((self.past, x_BCTHW), dim=2), self.stride[0] - 1
        if self.remembers:
            self.past = whole[:, :, -2:].clone()
        return super().forward(whole[:, :, skip:])


@contextmanager
def _remembering(network: nn.Module) -> Iterator[None]:
    """Context in which successive calls of a network process successive pieces of one video."""
    layers = [layer for layer in network.modules() if isinstance(layer, CausalConv)]
    for layer in layers:
        layer.remembers = True
    try:
        yield
    finally:
        for layer in layers:
            layer.remembers, layer.past = False, None


def start_small(conv: nn.Conv3d) -> None:
    """Scale down the weights of a convolution with a shortcut, so that training starts near the shortcut alone."""
    with torch.no_grad():
        conv.weight.mul_(0.1)
        conv.bias.zero_()  # type: ignore[union-attr]


class ChannelNorm(nn.Module):
    """RMS normalisation over the channels of each position (a norm over time would depend on later frames)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width, 1, 1, 1))

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        """Normalise; the shape is unchanged."""
        energy = x_BCTHW.square().mean(1, keepdim=True)
        return x_BCTHW * torch.rsqrt(energy + _CALM) * self.scale


class ResBlock(nn.Module):
    """Residual block of two normalised convolutions; initialised as the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        last = CausalConv(width, width)
        first = (ChannelNorm(width), nn.SiLU(), CausalConv(width, width))
        self.layers = nn.Sequential(*first, ChannelNorm(width), nn.SiLU(), last)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        """Apply the block; the shape is unchanged."""
        return x_BCTHW + self.layers(x_BCTHW)


class Project(CausalConv):
    """A causal convolution with a fixed shortcut (`regroup`), initialised near the shortcut alone."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        start_small(self)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        """Project `(B, C, T, H, W)` to `(B, C', T, H, W)`."""
        return super().forward(x_BCTHW) + regroup(x_BCTHW, self.out_channels)


class Down(nn.Module):
    """Downsampling by a strided causal convolution with a fixed shortcut: T frames become 1 + (T - 1) / time.

    The shortcut folds merged positions into channels and averages these to `outputs` channels (Chen et al. 2024, "Deep
    Compression Autoencoder", arXiv 2410.10733). With it, training starts from a rough but working autoencoder.
    """

    def __init__(self, inputs: int, outputs: int, time: int, space: int) -> None:
        super().__init__()
        self.outputs, self.time, self.space = outputs, time, space
        self.conv = CausalConv(inputs, outputs, (time, space, space))
        start_small(self.conv)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        """Downsample `(B, C, T, H, W)` to `(B, C', 1 + (T - 1) / time, H / space, W / space)`."""
        missing = self.time - 1 if self.conv.past is None else 0
        first = x_BCTHW[:, :, :1].expand(-1, -1, missing, -1, -1)
        folded = fold(torch.cat((first, x_BCTHW), dim=2), self.time, self.space)
        return self.conv(x_BCTHW) + regroup(folded, self.outputs)


class Up(nn.Module):
    """Upsampling: a causal convolution with a fixed shortcut computes all new positions as channels, then `unfold`.

    Every frame becomes `time` frames, and the first time - 1 are dropped, so that 1 + k frames become 1 + k * time.
    """

    def __init__(self, inputs: int, outputs: int, time: int, space: int) -> None:
        super().__init__()
        self.time, self.space = time, space
        self.conv = CausalConv(inputs, outputs * time * space**2)
        start_small(self.conv)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        """Upsample `(B, C, T, H, W)` to `(B, C', 1 + (T - 1) * time, H * space, W * space)`."""
        surplus = self.time - 1 if self.conv.past is None else 0
        x = self.conv(x_BCTHW) + regroup(x_BCTHW, self.conv.out_channels)
        return unfold(x, self.time, self.space)[:, :, surplus:]


def fold(x_BCTHW: Tensor, time: int, space: int) -> Tensor:
    """Fold blocks of time x space x space positions into channels: `(B, C * time * space**2, T / time, ...)`."""
    x = x_BCTHW.unflatten(4, (-1, space)).unflatten(3, (-1, space)).unflatten(2, (-1, time))
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)


def unfold(x_BCTHW: Tensor, time: int, space: int) -> Tensor:
    """Inverse of `fold`."""
    x = x_BCTHW.unflatten(1, (-1, time, space, space)).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)


def regroup(x_BCTHW: Tensor, channels: int) -> Tensor:
    """Change the number of channels to `channels` by averaging or repeating adjacent ones."""
    have = x_BCTHW.shape[1]
    common = math.lcm(have, channels)
    x = x_BCTHW.repeat_interleave(common // have, dim=1)
    return x.unflatten(1, (channels, -1)).mean(2)


def build_vae(config: VaeConfig) -> VideoVAE:
    """Build the autoencoder of a configuration, randomly initialised."""
    return VideoVAE(config.channels, config.patch, config.widths, config.blocks, [(t, s) for t, s in config.strides])
