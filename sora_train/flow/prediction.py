"""What the network's output means: velocity itself, or a residual, the data or the noise, from which it follows."""

from __future__ import annotations

from torch import Tensor

from sora_train.config.schema import Prediction
from sora_train.core.batch import Stream

_LEAST = 0.05  # what a difference to data or noise is divided by at least, as in Li and He 2025 (arXiv 2511.13720)


def velocity(prediction: Prediction, output_NP: Tensor, stream: Stream) -> Tensor:
    """The velocity noise - x_0 of every token, `(N, P)` fp32, from the network's output for the stream.

    Preconditioned: with x_0 of unit variance the best linear guess of the velocity from x_t is (2t - 1) x_t / s^2,
    s^2 = (1 - t)^2 + t^2, and what it leaves has variance 1 / s^2; the network predicts that rest, scaled to unit
    variance (Karras et al. 2022, arXiv 2206.00364, section 5, carried over to the straight path).

    From x_t = (1 - t) x_0 + t noise follow velocity = (x_t - x_0) / t and velocity = (noise - x_t) / (1 - t).
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
