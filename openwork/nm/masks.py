"""Masks: which weights of each group are kept. Boolean, True means kept.

    G = groups, M = group size, K = G * M = weights along the reduction axis

`topn` is the definition. `topn_by_count` computes the same by comparing instead of sorting: a weight is
kept when fewer than N others in its group beat it. It is what training uses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

from openwork.nm.groups import Axis, from_rows, to_rows
from openwork.nm.pattern import Pattern, check_pattern
from openwork.utils.counted import counted
from openwork.utils.torch_private import is_traced, is_transformed

# The integers of the same width, and the bits of infinity.
_BITS = {
    torch.float64: (torch.int64, 0x7FF0_0000_0000_0000),
    torch.float32: (torch.int32, 0x7F80_0000),
    torch.float16: (torch.int16, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7F80),
}
_PART = 2**19  # weights: their temporary tensors stay in the cache
_COUNT_LIMIT = 32  # above this M, sorting is faster than comparing all pairs (measured, CPU)


def topn(score: Tensor, pattern: Pattern) -> Tensor:
    """Keep the `pattern.n` highest scores in each group of the last axis: (..., K) -> bool (..., K).

    Exactly N survive. Equal scores keep the lower index, on every device. NaN counts as the largest, so
    that it surfaces instead of vanishing. Raises ValueError when M does not divide K.

    >>> topn(torch.tensor([1.0, 3.0, 3.0, 3.0]), Pattern(2, 4))
    tensor([False,  True,  True, False])
    """
    score_GM = _grouped(score, pattern)
    order_GM = score_GM.argsort(dim=-1, descending=True, stable=True)
    mask_GM = torch.zeros_like(score_GM, dtype=torch.bool)
    return mask_GM.scatter_(-1, order_GM[..., : pattern.n], True).flatten(-2)


def topn_by_count(score: Tensor, pattern: Pattern) -> Tensor:
    """`topn` of scores that are non-negative (or NaN), faster: (..., K) -> bool (..., K), maybe a strided view."""
    if _transformed(score):
        return topn(score, pattern)
    score_GM = _grouped(score, pattern)
    if torch.compiler.is_compiling() or (score.device.type != "cpu" and pattern.m <= 8):
        return (_lost_pairs_at_once(sortable(score_GM.clone())) < pattern.n).flatten(-2)
    if pattern.m > _COUNT_LIMIT or score.device.type != "cpu":
        return topn(score, pattern)
    key_MG = sortable(score_GM.movedim(-1, 0).clone(memory_format=torch.contiguous_format))
    return (_lost_pairs_one_by_one(key_MG) < pattern.n).movedim(0, -1).flatten(-2)


def sortable(score: Tensor) -> Tensor:
    """Integers in the order of non-negative scores, NaN above infinity. Any shape; overwrites `score`.

    The sign bit is cleared: -0.0 equals 0.0, and the NaN that x86 makes of 0 * inf is negative.

    >>> sortable(torch.tensor([torch.inf, torch.nan, 0.0])).argsort().tolist()
    [2, 0, 1]
    """
    if score.dtype not in _BITS:
        raise TypeError(f"scores of dtype {score.dtype}; needed one of {', '.join(map(str, _BITS))}")
    kind, infinity = _BITS[score.dtype]
    return score.view(kind).bitwise_and_(torch.iinfo(kind).max).clamp_(max=infinity + 1)


def magnitude_mask(score: Tensor, pattern: Pattern, axis: Axis) -> Tensor:
    """The N:M mask of a weight from its non-negative scores, along its reduction axis: bool, shape and strides of
    `score`.

    Where M does not divide K, the last group of a row is short: it keeps its N highest as well.

    >>> magnitude_mask(torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.5, 0.4]]), Pattern(1, 4), Axis(1))
    tensor([[ True, False, False, False,  True, False]])
    """
    if _worth_parts(score, axis):
        return _mask_by_parts(score, pattern, axis)
    rows = to_rows(score, axis)
    K = rows.shape[-1]
    short = -K % pattern.m
    if short:
        rows = torch.nn.functional.pad(rows, (0, short))  # ties keep the lower index, so never the padding
    mask = from_rows(topn_by_count(rows, pattern)[..., :K], axis, tuple(score.shape))
    return torch.empty_like(score, dtype=torch.bool).copy_(mask)


def _worth_parts(score: Tensor, axis: Axis) -> bool:
    whole_rows = axis.dim > 0 and not axis.flat and score.shape[0] > 1
    # Not for subclasses: what `split` makes of a DTensor are copies, which take no mask.
    plain = type(score) is Tensor and score.device.type == "cpu" and not torch.compiler.is_compiling()
    return plain and whole_rows and score.numel() > 2 * _PART


def _mask_by_parts(score: Tensor, pattern: Pattern, axis: Axis) -> Tensor:
    """`magnitude_mask` of a large weight, some rows at a time: fresh memory costs more than the comparisons do."""
    mask = torch.empty_like(score, dtype=torch.bool)
    rows = max(1, _PART * score.shape[0] // score.numel())
    for part, part_mask in zip(score.split(rows), mask.split(rows), strict=True):
        part_mask.copy_(magnitude_mask(part, pattern, axis))
    return mask


def apply_mask(weight: Tensor, mask: Tensor) -> Tensor:
    """The weight where kept, +0.0 elsewhere. Selection, not multiplication: no -0.0, no NaN from inf.

    >>> apply_mask(torch.tensor([-1.0, -2.0]), torch.tensor([False, True]))
    tensor([ 0., -2.])
    """
    eager_cpu = weight.device.type == "cpu" and not torch.compiler.is_compiling()
    if (
        not eager_cpu
        or weight.dtype not in _BITS
        or _transformed(weight)
        or _transformed(mask)
        or _differentiated(weight)
    ):
        return torch.where(mask, weight, 0.0)
    kind, _ = _BITS[weight.dtype]
    # Eager `where` branches on each weight on a CPU; ANDing the bits with 0 or -1 does not (2 to 3 times faster).
    return (weight.view(kind) & mask.to(kind).neg_()).view(weight.dtype)


def kept_per_group(weight: Tensor, pattern: Pattern, axis: Axis) -> Tensor:
    """How many non-zeros each group of a weight holds: int64 (..., G). A short last group counts too.

    >>> kept_per_group(torch.tensor([[1.0, 0.0, 2.0, 0.0, 5.0, 6.0]]), Pattern(2, 4), Axis(1))
    tensor([[2, 2]])
    """
    rows = to_rows(weight != 0, axis)
    short = -rows.shape[-1] % pattern.m
    return torch.nn.functional.pad(rows, (0, short)).unflatten(-1, (-1, pattern.m)).sum(-1)


def too_dense(weight: Tensor, pattern: Pattern, axis: Axis) -> str:
    """Why a weight is not N:M along an axis; empty where it is.

    >>> too_dense(torch.tensor([[1.0, 2.0, 3.0, 0.0]]), Pattern(2, 4), Axis(1))
    '1 of 1 group holds more than 2 of 4 (the worst 3)'
    """
    return group_counts(weight, pattern, axis).too_dense(pattern)


@dataclass(frozen=True)
class GroupCounts:
    """How full the groups of a weight are: how many weights are not zero, in how many groups; in how many of these more
    than N; and the most in one."""

    nonzero: int
    groups: int
    crowded: int
    most: int

    def too_dense(self, pattern: Pattern) -> str:
        """Why such a weight is not N:M; empty where it is."""
        if not self.crowded:
            return ""
        holds = "holds" if self.crowded == 1 else "hold"
        what = f"{self.crowded} of {counted(self.groups, 'group')} {holds} more than {pattern.n} of {pattern.m}"
        return f"{what} (the worst {self.most})"


def group_counts(weight: Tensor, pattern: Pattern, axis: Axis) -> GroupCounts:
    """How full the groups of a weight are; a short last group counts too.

    >>> group_counts(torch.tensor([[1.0, 0.0, 2.0, 0.0, 5.0, 6.0]]), Pattern(1, 4), Axis(1))
    GroupCounts(nonzero=4, groups=2, crowded=2, most=2)
    """
    kept = kept_per_group(weight, pattern, axis)
    if not kept.numel():
        return GroupCounts(0, 0, 0, 0)
    return GroupCounts(int(kept.sum()), kept.numel(), int((kept > pattern.n).sum()), int(kept.max()))


def retained_share(weight: Tensor, mask: Tensor) -> float:
    """The kept share of the sum of squared weights; NaN on the meta device.

    >>> retained_share(torch.tensor([1.0, 3.0]), torch.tensor([False, True]))
    0.9
    """
    if weight.is_meta:
        return math.nan
    sums = torch.zeros(2, dtype=torch.float64, device=weight.device)
    largest = weight.abs().amax().clamp(min=torch.finfo(weight.dtype).tiny) if weight.dtype == torch.float64 else 1.0
    rows = (
        max(1, _PART * len(weight) // max(1, weight.numel())) if weight.ndim and sums.is_cpu else max(1, weight.numel())
    )
    for part, part_mask in zip(weight.split(rows), mask.split(rows), strict=True) if weight.ndim else [(weight, mask)]:
        squares = (part.double() / largest).square()
        sums += torch.stack([apply_mask(squares, part_mask).sum(), squares.sum()])
    kept, everything = sums.tolist()
    return kept / everything if everything else 1.0


def _differentiated(weight: Tensor) -> bool:
    """Whether a derivative is asked for, backward or forward."""
    backward = weight.requires_grad and torch.is_grad_enabled()
    return backward or forward_ad.unpack_dual(weight).tangent is not None


def _transformed(tensor: Tensor) -> bool:
    """Whether `torch.func` put it there, or it is traced: before torch 2.13 vmap cannot take the bits of floats as
    integers, and recordings of `torch.jit.trace` never can."""
    return not torch.compiler.is_compiling() and (is_transformed(tensor) or is_traced())


def _grouped(score: Tensor, pattern: Pattern) -> Tensor:
    check_pattern(pattern)
    if score.ndim == 0 or score.shape[-1] % pattern.m:
        size = counted(score.shape[-1], "weight") if score.ndim else "no weights"
        raise ValueError(
            f"last axis has {size}, not a multiple of M={pattern.m} (shape {tuple(score.shape)}); "
            "exclude this layer, or use remainder='pad'"
        )
    return score.unflatten(-1, (score.shape[-1] // pattern.m, pattern.m))


def _lost_pairs_at_once(key_GM: Tensor) -> Tensor:
    """How many others in its group beat each weight. One expression, which a compiler fuses."""
    mine, other = key_GM[..., :, None], key_GM[..., None, :]
    index = torch.arange(key_GM.shape[-1], device=key_GM.device)
    return ((other > mine) | ((other == mine) & (index < index[:, None]))).sum(-1)


def _lost_pairs_one_by_one(key_MG: Tensor) -> Tensor:
    """The same, group axis first, without the M x M intermediate: what eager mode on a CPU likes.

    Every weight starts as beaten by all before it in its group, and takes back those that it beats.
    """
    M = key_MG.shape[0]
    lost_MG = torch.empty_like(key_MG, dtype=torch.uint8)
    for i in range(M):
        lost_MG[i].fill_(i)
    for i in range(M - 1):
        later_wins = (key_MG[i + 1 :] > key_MG[i]).view(torch.uint8)
        lost_MG[i].add_(later_wins.sum(0, dtype=torch.uint8))
        lost_MG[i + 1 :].sub_(later_wins)
    return lost_MG
