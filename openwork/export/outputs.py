"""What every exporter starts from and ends with: the plain model, its arguments, and a comparison of outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from openwork.training.parametrize import masked_modules, unwrap
from openwork.training.record import sparsity_records
from openwork.training.sparsify import finalize
from openwork.training.weight_norm import factors, fold_weight_norm
from openwork.utils.copied import copied
from openwork.utils.difference import largest_difference
from openwork.utils.example import quiet, run
from openwork.utils.torch_private import tree_leaves

# Largest difference of any output, as a share of the largest output: other kernels add up in another order.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


def exportable(model: nn.Module) -> nn.Module:
    """The model that is exported: of one in training a finalized copy, which shares nothing; any other unmodified.

    A deployed model is exported unmodified, too: its modules call operators of `openwork`, which survive
    `torch.export`. `tests/export/test_program.py` holds them to it.
    """
    model = unwrap(model)
    if sparsity_records(model) or any(True for _ in masked_modules(model)):
        return finalize(copied(model))
    return model


def folded(model: nn.Module) -> tuple[nn.Module, dict[str, str]]:
    """The model that is exported as a program, with weight normalization folded into the weights, and the new names of
    weights that were the direction of one."""
    plain = exportable(model)
    if not factors(plain):
        return plain, {}
    own = copied(plain) if plain is unwrap(model) else plain
    return own, fold_weight_norm(own)


def outputs(model: nn.Module, example: Any) -> list[Tensor]:
    """Every tensor that the model returns for an example, in eval mode."""
    with quiet(model):
        return [output for output in tree_leaves(run(model, example)) if isinstance(output, Tensor)]


def check_equal(what: str, results: Sequence[Tensor], expected: Sequence[Tensor], allowed: float = 0.0) -> float:
    """The largest difference, as a share of the largest output. Raises RuntimeError where it is more than rounding, or
    than `allowed`, if that is more."""
    if [output.shape for output in results] != [output.shape for output in expected]:
        shapes = [tuple(output.shape) for output in results], [tuple(output.shape) for output in expected]
        raise RuntimeError(f"{what} gives outputs of shapes {shapes[0]}, the model {shapes[1]}: nothing was written")
    worst = 0.0
    for mine, model in zip(results, expected, strict=True):
        difference = largest_difference([model], [mine])
        if not difference <= max(allowed, _TOLERANCE.get(model.dtype, 0.0)):
            raise RuntimeError(
                f"{what} gives other outputs than the model (difference {difference:.1e} of the largest): nothing was "
                "written; please report it, with the model"
            )
        worst = max(worst, difference)
    return worst
