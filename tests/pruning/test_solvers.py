"""One-shot solvers against exhaustive search, exact least squares and the definition of each, on small layers."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from openwork.nm.pattern import Pattern
from openwork.pruning.alps import ALPS
from openwork.pruning.magnitude import Magnitude
from openwork.pruning.refit import Refit
from openwork.pruning.solver import Groups, Solver, damped, relative_error
from openwork.pruning.sparsegpt import SparseGPT
from openwork.pruning.wanda import Wanda

SOLVERS = (Magnitude(), Wanda(), SparseGPT(), Refit(), Refit(Magnitude()), ALPS())


def problem(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and the Gram matrix of inputs that differ in size and are correlated."""
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randn(4 * columns, columns, generator=draw) @ torch.randn(columns, columns, generator=draw)
    inputs = mixed / columns**0.5 * (0.2 + torch.rand(columns, generator=draw)) + torch.randn(columns, generator=draw)
    return torch.randn(rows, columns, generator=draw), (inputs.T @ inputs).float()


def kept(weight: Tensor, pattern: Pattern) -> Tensor:
    return (weight != 0).unflatten(1, (-1, pattern.m)).sum(-1)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "1:16", "3:8", "8:64"], ids=str)
@pytest.mark.parametrize("transposable", [False, True])
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_every_pattern_is_kept_in_every_group(solver: Solver, pattern: str, transposable: bool) -> None:
    given = Pattern.parse(pattern)
    if transposable and given.m == 64:
        pytest.skip("minutes")
    W, H = problem(16 if given.m < 64 else 4, 2 * max(given.m, 16))
    found = solver.solve(W, H, Groups(given, W.shape[1], transposable))
    assert found.isfinite().all()
    assert kept(found, given).le(given.n).all()
    assert transposable or kept(found, given).eq(given.n).all()
    assert not transposable or kept(found.T.contiguous(), given).le(given.n).all()


def exact(W: Tensor, A: Tensor, mask: Tensor) -> Tensor:
    """The least squares problem of each row by itself, in double precision."""
    W, A, found = W.double(), A.double(), torch.zeros_like(W, dtype=torch.float64)
    for row, S in enumerate(mask):
        found[row, S] = torch.linalg.solve(A[S][:, S], (A @ W[row])[S])
    return found


@pytest.mark.parametrize("mask_from", [Magnitude(), Wanda(), SparseGPT()], ids=repr)
def test_refit_solves_the_least_squares_problem_of_its_mask(mask_from: Solver) -> None:
    W, H = problem(12, 32)
    groups = Groups(Pattern(2, 4), 32)
    mask = mask_from.solve(W, H, groups) != 0
    found = Refit(mask_from, steps=200).solve(W, H, groups)
    assert torch.equal(found != 0, mask)
    A = damped(H, 0.01)
    least = relative_error(exact(W, A, mask), W, A)
    assert least < relative_error(found, W, A) < 1.0001 * least


def test_sparsegpt_is_its_definition() -> None:
    """Column by column over the whole matrix, in double precision, with the inverse itself."""
    W, H = problem(8, 160, seed=3)  # more than one block
    A, found = damped(H, 0.01).double(), W.double().clone()
    U = torch.linalg.cholesky(torch.linalg.inv(A)).T
    for j in range(160):
        if j % 4 == 0:
            mask = Groups(Pattern(2, 4), 4).mask((found[:, j : j + 4] / U.diagonal()[j : j + 4]).square())
        error = torch.where(mask[:, j % 4], 0, found[:, j] / U[j, j])
        found[:, j][~mask[:, j % 4]] = 0
        found[:, j + 1 :] -= torch.outer(error, U[j, j + 1 :])
    torch.testing.assert_close(
        SparseGPT().solve(W, H, Groups(Pattern(2, 4), 160)).double(), found, rtol=1e-3, atol=1e-4
    )


def best(W: Tensor, A: Tensor, pattern: Pattern) -> float:
    """The smallest error of one row over all masks."""
    groups = W.shape[1] // pattern.m
    choices = list(itertools.combinations(range(pattern.m), pattern.n))
    errors = []
    for chosen in itertools.product(choices, repeat=groups):
        mask = torch.zeros(1, W.shape[1], dtype=torch.bool)
        mask[0, [group * pattern.m + place for group, places in enumerate(chosen) for place in places]] = True
        errors.append(relative_error(exact(W, A, mask), W, A))
    return min(errors)


def test_alps_comes_near_the_best_of_all_masks() -> None:
    pattern, ratios = Pattern(2, 4), []
    for seed in range(12):
        W, H = problem(1, 12, seed)
        A = damped(H, 0.01)
        found = ALPS().solve(W, H, Groups(pattern, 12))
        ratios.append(relative_error(found, W, A) / best(W, A, pattern))
    assert min(ratios) > 0.999
    assert sum(ratio < 1.01 for ratio in ratios) >= 6
    assert sum(ratios) / len(ratios) < 1.4


def test_what_costs_more_loses_less() -> None:
    W, H = problem(64, 128)
    errors = [relative_error(solver.solve(W, H, Groups(Pattern(2, 4), 128)), W, H) for solver in SOLVERS]
    magnitude, wanda, sparsegpt, wanda_refit, _, alps = errors
    assert alps < wanda_refit < sparsegpt < wanda < magnitude


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_what_keeps_everything_changes_nothing(solver: Solver) -> None:
    W, H = problem(8, 32)
    torch.testing.assert_close(solver.solve(W, H, Groups(Pattern(4, 4), 32)), W, rtol=1e-3, atol=1e-4)


def test_groups_of_a_convolution_end_with_its_taps() -> None:
    groups = Groups(Pattern(2, 4), 6)
    assert [(each.start, each.stop) for each in groups.slices(12)] == [(0, 4), (4, 6), (6, 10), (10, 12)]
    W, H = problem(8, 12)
    for solver in SOLVERS:
        found = solver.solve(W, H, groups) != 0
        assert found.view(8, 2, 6)[..., :4].sum(-1).eq(2).all()
        assert found.view(8, 2, 6)[..., 4:].all()


def test_the_diagonal_is_enough_for_scores() -> None:
    W, H = problem(8, 32)
    groups = Groups(Pattern(2, 4), 32)
    for solver in (Magnitude(), Wanda()):
        assert not solver.needs_gram
        assert torch.equal(solver.solve(W, H, groups), solver.solve(W, H.diagonal(), groups))
    assert Wanda().solve(W, torch.arange(32.0), groups)[0, :4].nonzero().flatten().tolist() == (
        (W[0, :4].abs() * torch.arange(4.0).sqrt()).topk(2).indices.sort().values.tolist()
    )
