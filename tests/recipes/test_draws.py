import random

import numpy as np
import pytest
import torch

from openwork.recipes.draws import batch_indices, order, sample_seed, seed_step, uniform


def test_order_is_a_permutation_that_depends_on_seed_and_epoch_alone():
    first = order(3, 1, 1000)
    assert sorted(first) == list(range(1000))
    assert np.array_equal(first, order(3, 1, 1000))
    assert not np.array_equal(first, order(3, 2, 1000))
    assert not np.array_equal(first, order(4, 1, 1000))


def test_order_is_the_same_on_every_machine():
    assert order(0, 0, 8).tolist() == [5, 4, 6, 3, 1, 2, 0, 7]


def test_a_samples_draws_do_not_depend_on_its_batch():
    whole = uniform(7, 2, np.arange(100), 3)
    assert np.array_equal(whole[40:50], uniform(7, 2, np.arange(40, 50), 3))
    assert np.array_equal(whole[[9, 3]], uniform(7, 2, np.array([9, 3]), 3))


@pytest.mark.parametrize("changed", [(8, 2), (7, 3)])
def test_draws_change_with_seed_and_epoch(changed):
    assert not np.isin(uniform(7, 2, np.arange(100), 3), uniform(*changed, np.arange(100), 3)).any()


def test_draws_are_uniform_and_independent():
    draws = uniform(0, 0, np.arange(20_000), 2)
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = np.histogram(draws[:, 0], bins=10, range=(0, 1))[0]
    assert abs(counts - 2000).max() < 5 * np.sqrt(2000)
    neighbours = np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]
    columns = np.corrcoef(draws.T)[0, 1]
    assert abs(neighbours) < 5 / np.sqrt(20_000)
    assert abs(columns) < 5 / np.sqrt(20_000)


def test_batches_resume_in_the_middle_of_an_epoch():
    whole = batch_indices(1, 0, 100, 16)
    assert len(whole) == 6  # the last four samples are dropped
    rest = batch_indices(1, 0, 100, 16, start=4)
    assert all(np.array_equal(a, b) for a, b in zip(whole[4:], rest, strict=True))


def test_ranks_and_micro_batches_share_out_the_same_steps():
    whole = batch_indices(1, 0, 100, 16)
    # two ranks with two micro-batches each: parts 0 and 2 are rank 0's, 1 and 3 rank 1's
    ranks = [batch_indices(1, 0, 100, 16, split=4, take=take) for take in ([0, 2], [1, 3])]
    for step, samples in enumerate(whole):
        shared = np.concatenate([rank[2 * step + micro] for micro in (0, 1) for rank in ranks])
        assert np.array_equal(samples, shared)


def test_seed_step_fixes_every_generator():
    def draw():
        return torch.rand(1).item(), float(np.random.rand()), random.random()  # noqa: NPY002

    seed_step(0, 5, 0, 0)
    first = draw()
    draw()
    seed_step(0, 5, 0, 0)
    assert draw() == first
    seed_step(0, 6, 0, 0)
    assert not set(draw()) & set(first)


def test_a_sample_s_seed_is_its_own_and_leaves_the_generator_as_it_was():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    drawn = []
    for key in ((1, 2, 3), (1, 2, 4), (1, 2, 3)):
        with sample_seed(*key):
            drawn.append(torch.rand(1))
    assert drawn[0] == drawn[2] != drawn[1]
    assert torch.equal(torch.rand(3), expected)
