"""A convolution as a matmul: the numbers that describe it, and its weight as (O, K).

O = outputs, C = channels of one group, R, S = kernel, K = R * S * C, each C rounded up to M
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from torch import Tensor
from torch.nn import functional as F

from openwork.nm.pattern import Pattern
from openwork.utils.counted import counted

_LEAST = {"kernel": 1, "stride": 1, "padding": 0, "dilation": 1}


@dataclass(frozen=True)
class ConvGeometry:
    """Height and width of each; `padding` zeros on both sides. An operator takes it as nine integers."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @classmethod
    def of(cls, numbers: Sequence[int]) -> ConvGeometry:
        """The inverse of `numbers`. Raises ValueError where they describe no convolution."""
        if len(numbers) != 9:
            names = ", ".join(field.name for field in fields(cls))
            raise ValueError(f"geometry of {counted(len(numbers), 'number')}, {list(numbers)}; needed nine: {names}")
        kernel, stride, padding, dilation = ((numbers[i], numbers[i + 1]) for i in (0, 2, 4, 6))
        geometry = cls(kernel, stride, padding, dilation, numbers[8])
        for name, least in _LEAST.items():
            pair = getattr(geometry, name)
            if min(pair) < least or max(pair) >= 2**31:
                raise ValueError(f"{name} {list(pair)}; needed two numbers, of at least {least} and below 2**31")
        if not 1 <= geometry.groups < 2**31:
            raise ValueError(f"groups {geometry.groups}; needed at least 1")
        return geometry

    @property
    def numbers(self) -> list[int]:
        return [*self.kernel, *self.stride, *self.padding, *self.dilation, self.groups]

    @property
    def turned(self) -> ConvGeometry:
        """The same with height and width exchanged.

        >>> ConvGeometry((5, 1), (2, 1), (0, 3), (1, 1), 4).turned
        ConvGeometry(kernel=(1, 5), stride=(1, 2), padding=(3, 0), dilation=(1, 1), groups=4)
        """
        pairs = {name: getattr(self, name)[::-1] for name in _LEAST}
        return replace(self, **pairs)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Of images of that size.

        >>> ConvGeometry((7, 7), (2, 2), (3, 3), (1, 1), 1).output_size(224, 112)
        (112, 56)
        """
        return self._along(0, height), self._along(1, width)

    def _along(self, dim: int, size: int) -> int:
        reach = self.dilation[dim] * (self.kernel[dim] - 1)
        return (size + 2 * self.padding[dim] - reach - 1) // self.stride[dim] + 1


def conv_rows(weight: Tensor, pattern: Pattern) -> Tensor:
    """A convolution's weight (O, C, R, S) as that of a matmul: (O, R * S * C), channels innermost, C padded to M."""
    return F.pad(weight.movedim(1, -1), (0, -weight.shape[1] % pattern.m)).flatten(1)


def from_conv_rows(rows: Tensor, channels: int, kernel: tuple[int, int]) -> Tensor:
    """Inverse of `conv_rows`: (O, R * S * C) -> (O, C, R, S)."""
    return rows.view(len(rows), *kernel, -1)[..., :channels].movedim(-1, 1).contiguous()


def patches(images: Tensor, geometry: ConvGeometry, pattern: Pattern) -> Tensor:
    """What each output pixel sums over: (N, C, H, W) -> (N, outH, outW, K), channels innermost. With a kernel of one
    pixel and images that have their channels last, a view; a larger kernel copies each pixel once for each place."""
    pixels = images.permute(0, 2, 3, 1)
    (high, wide), more = geometry.padding, -pixels.shape[3] % pattern.m
    if high or wide or more:
        pixels = F.pad(pixels, (0, more, wide, wide, high, high))
    if geometry.kernel == (1, 1):
        return pixels[:, :: geometry.stride[0], :: geometry.stride[1]]
    pixels = pixels.contiguous()
    size, steps = geometry.output_size(images.shape[2], images.shape[3]), pixels.stride()
    apart = [steps[1 + i] * geometry.stride[i] for i in (0, 1)] + [steps[1 + i] * geometry.dilation[i] for i in (0, 1)]
    shape = (len(pixels), *size, *geometry.kernel, pixels.shape[3])
    return pixels.as_strided(shape, (steps[0], *apart, steps[3])).flatten(3)
