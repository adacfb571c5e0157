"""Pairs of frames with exact optical flow, made from photos in the manner of FlyingChairs (Dosovitskiy et al. 2015).

A photo is the background; a few smooth patches cut from photos lie on it. Each is moved by an affine map of its own,
patches on top of the motion of the background. So the flow of a pixel at x is A x - x, with A of the frontmost layer
there, up to rounding. Points are (2, H, W), x before y.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BACKGROUND = 1.5  # sides of the photo's part that a background is taken from, in sides of the frame
# Ranges: translation in shares of the frame's width, rotation in radians, log of the scale. Half of each is one
# standard deviation. With a frame of 128 pixels the mean length of the flow is about 6 pixels.
_BACKGROUND_MOTION = 0.056, 0.08, 0.06
_PATCH_MOTION = 0.094, 0.2, 0.12
_PATCHES = 3, 6
_HARMONICS = 4  # of an outline, as a function of the angle


@dataclass(frozen=True)
class Outline:
    """A star-shaped region: the points closer to the centre than radius * (1 + sum of waves of the angle)."""

    centre: tuple[float, float]
    radius: float
    amplitudes: Sequence[float] = ()
    phases: Sequence[float] = ()

    def alpha(self, points: Tensor) -> Tensor:
        """Coverage in [0, 1] at points (2, H, W), with an edge one pixel wide: (H, W)."""
        x, y = points[0] - self.centre[0], points[1] - self.centre[1]
        angle, reach = torch.atan2(y, x), torch.ones_like(x)
        for k, (amplitude, phase) in enumerate(zip(self.amplitudes, self.phases, strict=True), start=1):
            reach = reach + amplitude * torch.cos(k * angle + phase)
        return (0.5 + self.radius * reach - torch.hypot(x, y)).clamp(0, 1)


@dataclass(frozen=True)
class SceneLayer:
    """A part of a photo that moves. `motion` takes points of frame 1 to frame 2; without outline it fills the frame."""

    photo: Tensor  # (3, H', W')
    corner: tuple[float, float]  # where the frame's point (0, 0) lies in the photo, x before y
    motion: np.ndarray  # (3, 3)
    outline: Outline | None = None

    def at(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Colour (3, H, W) and coverage (H, W) at points of frame 1. Beyond its edges the photo is mirrored."""
        height, width = self.photo.shape[1:]
        x = (points[0] + self.corner[0]) * (2 / (width - 1)) - 1
        y = (points[1] + self.corner[1]) * (2 / (height - 1)) - 1
        grid = torch.stack([x, y], dim=-1)[None]
        colour = F.grid_sample(self.photo[None], grid, padding_mode="reflection", align_corners=True)[0]
        return colour, torch.ones_like(x) if self.outline is None else self.outline.alpha(points)


def frame_points(height: int, width: int) -> Tensor:
    """Every pixel's own place, (2, H, W)."""
    y, x = torch.meshgrid(torch.arange(height).float(), torch.arange(width).float(), indexing="ij")
    return torch.stack([x, y])


def moved(points: Tensor, motion: np.ndarray) -> Tensor:
    """Points (2, H, W) under an affine map (3, 3), which must move none to infinity."""
    linear, shift = (torch.from_numpy(part).float() for part in (motion[:2, :2], motion[:2, 2]))
    return torch.einsum("ij,jhw->ihw", linear, points) + shift[:, None, None]


def render(layers: Sequence[SceneLayer], height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two frames (3, H, W) and the flow (2, H, W) from the first to the second, in pixels. Back to front."""
    points = frame_points(height, width)
    first, second, flow = torch.zeros(3, height, width), torch.zeros(3, height, width), torch.zeros(2, height, width)
    for layer in layers:
        colour, alpha = layer.at(points)
        first = torch.lerp(first, colour, alpha)
        flow = torch.where(alpha > 0.5, moved(points, layer.motion) - points, flow)
        colour, alpha = layer.at(moved(points, np.linalg.inv(layer.motion)))
        second = torch.lerp(second, colour, alpha)
    return first, second, flow


def affine(draw: np.random.Generator, ranges: tuple[float, float, float], about: tuple[float, float]) -> np.ndarray:
    """A random motion (3, 3): rotation and scale about a point, then translation; each clipped at two deviations."""
    shift, turn, zoom = ranges
    x, y, angle, scale = np.clip(draw.normal(0, 0.5, 4), -1, 1) * (shift, shift, turn, zoom)
    c, s = math.exp(scale) * math.cos(angle), math.exp(scale) * math.sin(angle)
    px, py = about
    return np.array([[c, -s, px - c * px + s * py + x], [s, c, py - s * px - c * py + y], [0, 0, 1]])


def scene(photos: Sequence[Tensor], draw: np.random.Generator, height: int, width: int) -> list[SceneLayer]:
    """The layers of a random scene, back to front. Photos are (3, H', W'), at least `BACKGROUND` frames large."""

    def ranges(shares: tuple[float, float, float]) -> tuple[float, float, float]:
        return shares[0] * width, shares[1], shares[2]

    def place(factor: float) -> tuple[Tensor, tuple[float, float]]:
        """A photo and a corner in it such that the frame, `factor` as large about its middle, lies inside."""
        photo = photos[int(draw.integers(len(photos)))]
        rim = (factor - 1) / 2
        sides = zip((width, height), (photo.shape[2], photo.shape[1]), strict=True)
        x, y = (float(draw.uniform(rim * side, room - (1 + rim) * side)) for side, room in sides)
        return photo, (x, y)

    ground = affine(draw, ranges(_BACKGROUND_MOTION), (width / 2, height / 2))
    layers = [SceneLayer(*place(BACKGROUND), ground)]
    for _ in range(draw.integers(_PATCHES[0], _PATCHES[1] + 1)):
        centre = float(draw.uniform(0, width)), float(draw.uniform(0, height))
        radius = float(np.clip(draw.normal(0.16, 0.12), 0.06, 0.35)) * width
        amplitudes = draw.uniform(0, 0.45, _HARMONICS) / np.arange(1, _HARMONICS + 1)
        outline = Outline(centre, radius, amplitudes.tolist(), draw.uniform(0, 2 * math.pi, _HARMONICS).tolist())
        motion = ground @ affine(draw, ranges(_PATCH_MOTION), centre)
        layers.append(SceneLayer(*place(1.0), motion, outline))
    return layers
