"""Products with compressed weights as operators: what compilers need to know of them, of every kind of a CPU."""

from __future__ import annotations

import pytest
import torch

import openwork.kernels as kernels
from openwork.layouts.conv import ConvGeometry, conv_rows
from openwork.layouts.layout import Kind, Vectors, kinds_on
from openwork.nm.pattern import Pattern
from openwork.nm.quantize import quantize_weight

ops = torch.ops.openwork
P24 = Pattern(2, 4)
KEPT = [(kind, dtype) for kind in kinds_on("cpu") for dtype in kind.weight_dtypes]
WINDOW = ConvGeometry((3, 1), (1, 2), (1, 0), (1, 1), 1)


@pytest.mark.parametrize("convolves", [False, True], ids=["linear", "conv2d"])
@pytest.mark.parametrize(("kind", "weight_dtype"), KEPT, ids=lambda each: getattr(each, "name", str(each)))
def test_compilers_see_them(kind: Kind, weight_dtype: torch.dtype, convolves: bool) -> None:
    """The schema, the fake kernel and the real one say the same."""
    operator = getattr(ops, f"{kind.name}_{'conv2d' if convolves else 'linear'}", None)
    if convolves and operator is None:
        assert "conv2d" not in vars(kind)
        return
    weight = torch.randn(10, 8, 3, 1) * torch.tensor([1, 0, 0, 1] * 2)[:, None, None]
    numbers, scales = quantize_weight(conv_rows(weight, P24), weight_dtype)
    here = kernels.vectors()
    layout = kind.pack(numbers, scales, P24, here if kind.stand_in(here) is kind else Vectors(lanes=16))
    x = torch.randn(2, 8, 5, 4) if convolves else torch.randn(3, 24)
    geometry = [WINDOW.numbers] if convolves else []
    packed = (layout.tensors(), torch.ones(10), layout.integers)
    assert operator is not None, f"{kind.name} has no operator"
    arguments = (x.to(kind.multiplies(weight_dtype)[0]), *packed, *geometry, True)
    torch.library.opcheck(operator.default, arguments)
