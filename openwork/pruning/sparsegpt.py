"""SparseGPT (Frantar and Alistarh, ICML 2023, arXiv 2301.00774): columns are pruned from left to right, and what each
loses is made up for by the columns to its right.

    H^-1 = U' U, U upper triangular
    in each group of M columns, once its first one is reached: keep the N largest  W_ij^2 / U_jj^2
    for each column j:   e = (W_j - pruned W_j) / U_jj;   W_k -= e U_jk for all k > j
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from openwork.pruning.solver import Groups, Solver, damped

_BLOCK = 128  # columns that are updated one by one, before all others are at once


@dataclass(frozen=True)
class SparseGPT(Solver):
    """Prune column by column, and compensate in those to the right. `damp`: share of the Gram matrix's mean diagonal
    that is added to it. Source: Frantar and Alistarh, ICML 2023, arXiv:2301.00774.

    >>> import torch, openwork as ow
    >>> model, batch = torch.nn.Sequential(torch.nn.Linear(16, 8)), torch.randn(64, 16)
    >>> 0 < ow.prune(model, "2:4", [batch], solver=ow.SparseGPT()).error < 1
    True
    """

    damp: float = 0.01

    def solve(self, weight: Tensor, gram: Tensor, groups: Groups) -> Tensor:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(gram.double(), self.damp)))
        U = torch.linalg.cholesky(inverse, upper=True).to(weight.dtype)
        weight = weight.clone()
        for block in _blocks(groups, weight.shape[1]):
            columns = slice(block[0].start, block[-1].stop)
            errors = _prune_block(weight[:, columns], U[columns, columns], block, groups)
            weight[:, columns.stop :] -= errors @ U[columns, columns.stop :]
        return weight


def _prune_block(weight: Tensor, U: Tensor, block: list[slice], groups: Groups) -> Tensor:
    """Prune some columns in place; the errors (R, columns) that those to the right make up for."""
    errors, scale = torch.empty_like(weight), U.diagonal()
    for group in block:
        group = slice(group.start - block[0].start, group.stop - block[0].start)
        mask = groups.mask((weight[:, group] / scale[group]).square())
        for column, kept in zip(range(group.start, group.stop), mask.T, strict=True):
            pruned = torch.where(kept, weight[:, column], 0)
            errors[:, column] = (weight[:, column] - pruned) / scale[column]
            weight[:, column] = pruned
            weight[:, column + 1 :].addr_(errors[:, column], U[column, column + 1 :], alpha=-1)
    return errors


def _blocks(groups: Groups, columns: int) -> list[list[slice]]:
    """The groups, about 128 columns at a time."""
    blocks: list[list[slice]] = [[]]
    for group in groups.slices(columns):
        if blocks[-1] and group.stop - blocks[-1][0].start > _BLOCK:
            blocks.append([])
        blocks[-1].append(group)
    return blocks
