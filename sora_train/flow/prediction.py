"""Parametrisations of the network's output: the velocity, or a value from which the velocity is computed."""

from __future__ import annotations

from torch import Tensor

from sora_train.config.schema import Prediction
from sora_train.core.batch import Stream

_LEAST = 0.05  # smallest divisor (t, or 1 - t) of a difference, as in Li and He 2025 (arXiv 2511.13720)


def velocity(prediction: Prediction, output_NP: Tensor, stream: Stream) -> Tensor:
    """Compute the velocity noise - x_0 of every token, `(N, P)` fp32, from the network's output for a stream.

    x0 and noise: x_t = (1 - t) x_0 + t noise gives velocity = (x_t - x_0) / t = (noise - x_t) / (1 - t).

    Preconditioned (Karras et al. 2022, arXiv 2206.00364, section 5, for the straight path): if x_0 has unit variance,
    the best linear estimate of the velocity from x_t is (2t - 1) x_t / s^2 with s^2 = (1 - t)^2 + t^2, and its residual
    has variance 1 / s^2. The network predicts the negative residual, scaled to unit variance.
    """
    output_NP = output_NP.float()
    if prediction is Prediction.velocity:
        return output_NP
    t_N1 = stream.t_M[stream.t_of_N].unsqueeze(1)
    if prediction is Prediction.x0:
        return (stream.x_NP - output_NP) / t_N1.clamp(min=_LEAST)
    if prediction is Prediction.noise:
        return (output_NP - stream.x_NP) / (1.0 - t_N1).clamp(min=_LEAST)
    variance = (1.0 - t_N1).square() + t_N1.square()
    return stream.x_NP * ((2.0 * t_N1 - 1.0) / variance) - output_NP * variance.rsqrt()
