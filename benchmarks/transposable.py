"""What transposable masks keep, and what they cost. On a CPU, one thread.

    python benchmarks/transposable.py masks
    python benchmarks/transposable.py times

`masks` needs scipy: the best sum of a tile is the value of a linear program, which is integral. What training makes of
them: `openwork compare`, benchmarks/pretraining.py.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import openwork as ow
from openwork.nm.groups import Axis
from openwork.nm.masks import magnitude_mask
from openwork.nm.sinkhorn import best_approximate, completed, rounded_mask
from openwork.nm.transposable import best_2_4, transposable_mask
from openwork.ops import foreach_mask

TWO_OF_FOUR = ow.Pattern(2, 4)


def tiles_of(weight: Tensor, m: int) -> Tensor:
    """(O, K) -> the magnitudes of its tiles, (T, m, m)."""
    return weight.abs().unflatten(1, (-1, m)).unflatten(0, (-1, m)).movedim(2, 1).reshape(-1, m, m)


def share(score: Tensor, keep: Tensor) -> float:
    """The kept share of the sum of magnitudes."""
    return float(score.double()[keep].sum() / score.double().sum())


def seconds(function: Callable[[], object], rounds: int = 5) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def kept_at_2_4(name: str, weight: Tensor) -> None:
    tiles = tiles_of(weight, 4)
    every = share(weight.abs(), magnitude_mask(weight.abs(), TWO_OF_FOUR, Axis(1)))
    greedy = rounded_mask(tiles, 2)
    found = {
        "exact": best_2_4(tiles),
        "entropic": best_approximate(tiles, TWO_OF_FOUR),
        "greedy": greedy,
        "greedy, completed": completed(greedy, tiles, 2),
    }
    shares = ", ".join(f"{how} {share(tiles, keep):.4f}" for how, keep in found.items())
    lacking = float((greedy.sum((1, 2)) < 8).float().mean())
    print(f"{name}: 2:4 of rows alone {every:.4f}, {shares}; greedy keeps fewer than 8 in {lacking:.1%} of tiles")


def optimum(score: Tensor, n: int) -> float:
    import numpy as np
    from scipy import sparse
    from scipy.optimize import linprog

    m = len(score)
    matrix = sparse.vstack([sparse.kron(sparse.eye(m), np.ones(m)), sparse.kron(np.ones(m), sparse.eye(m))])
    return -float(linprog(-score.double().numpy().ravel(), A_eq=matrix, b_eq=np.full(2 * m, n), bounds=(0, 1)).fun)


def against_the_optimum(pattern: ow.Pattern, weight: Tensor, count: int) -> None:
    tiles = tiles_of(weight, pattern.m)[:count]
    best = torch.tensor([optimum(tile, pattern.n) for tile in tiles], dtype=torch.float64)
    greedy = completed(rounded_mask(tiles, pattern.n), tiles, pattern.n)
    sums = {how: (tiles.double() * keep).sum((1, 2)) for how, keep in
            {"entropic": best_approximate(tiles, pattern), "greedy, completed": greedy}.items()}  # fmt: skip
    for how, found in sums.items():
        each = found / best
        print(
            f"{pattern} {how}: {float(found.sum() / best.sum()):.5f} of the optimum over {count} tiles, the worst "
            f"{float(each.min()):.4f}, optimal in {float((each > 1 - 1e-6).float().mean()):.0%}"
        )


def masks() -> None:
    torch.manual_seed(0)
    million = torch.randn(1024, 1024)
    kept_at_2_4("normal weights", million)
    kept_at_2_4("uniform weights", torch.rand(1024, 1024))
    for text, count in (("2:4", 400), ("4:8", 300), ("8:16", 100), ("1:16", 100)):
        against_the_optimum(ow.Pattern.parse(text), million, count)


def times() -> None:
    million = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    score, rows, columns = million.abs(), Axis(1), Axis(0)
    found = {
        "2:4 of rows, native": seconds(lambda: foreach_mask([score], TWO_OF_FOUR, [rows])),
        "2:4 of rows, reference": seconds(lambda: magnitude_mask(score, TWO_OF_FOUR, rows)),
        "2:4 transposable, exact": seconds(lambda: transposable_mask(score, TWO_OF_FOUR, rows, columns)),
    }
    for text in ("4:8", "8:16"):
        pattern = ow.Pattern.parse(text)
        found[f"{text} transposable, entropic"] = seconds(
            lambda p=pattern: transposable_mask(score, p, rows, columns), 1
        )
    for what, each in found.items():
        print(f"{what}: {each * 1e3:.1f} ms for {million.numel()} weights")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["masks", "times"])
    torch.set_num_threads(1)
    if parser.parse_args().what == "masks":
        masks()
    else:
        times()


if __name__ == "__main__":
    main()
