"""Where the groups of a weight lie: one definition for training, verifying, packing and kernels.

Groups of M run along the axis that the GEMM sums over (the input channels), so that a kernel can skip
the pruned products. `to_rows` gives every weight the same form: rows of K weights to be cut into groups.

    K = weights along the reduction axis of one output
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Axis:
    """The reduction axis of a weight.

    `dim` is the axis itself. `blocks` > 1 says that `dim` holds that many independent reductions one
    after the other (ConvTranspose keeps all its `groups` in dim 0). `flat` is the grouping of the
    published results, over the flattened weight: for reproducing old numbers only, no kernel runs it.

    >>> import torch
    >>> to_rows(torch.nn.ConvTranspose2d(8, 4, 3).weight, Axis(0)).shape  # outputs and taps, inputs
    torch.Size([4, 3, 3, 8])
    """

    dim: int = 1
    blocks: int = 1
    flat: bool = False


def reduction_size(shape: tuple[int, ...], axis: Axis) -> int:
    """K: how many weights one output sums over along the axis.

    >>> reduction_size((64, 32, 3, 3), Axis(1)), reduction_size((32, 16, 4, 4), Axis(0, blocks=2))
    (32, 16)
    """
    if not axis.flat:
        return shape[axis.dim] // axis.blocks
    size = 1
    for length in shape:
        size *= length
    return size


def to_rows(weight: Tensor, axis: Axis) -> Tensor:
    """The weight with its reduction axis last: (..., K), a view unless `axis.flat`.

    The leading dims enumerate the rows. It depends on logical positions only, so channels_last and
    other strides give the same rows.

    >>> import torch
    >>> to_rows(torch.zeros(64, 32, 3, 3), Axis(1)).shape
    torch.Size([64, 3, 3, 32])
    """
    if axis.flat:
        return weight.reshape(1, -1)
    if axis.blocks > 1:
        return weight.unflatten(axis.dim, (axis.blocks, -1)).movedim(axis.dim + 1, -1)
    return weight.movedim(axis.dim, -1)


def from_rows(rows: Tensor, axis: Axis, shape: tuple[int, ...]) -> Tensor:
    """Inverse of `to_rows`: (..., K) back to `shape`."""
    if axis.flat:
        return rows.reshape(shape)
    if axis.blocks > 1:
        return rows.movedim(-1, axis.dim + 1).flatten(axis.dim, axis.dim + 1)
    return rows.movedim(-1, axis.dim)
