"""Two processes that share every batch train like one that has all of it, and four go on where two stopped.

The processes are started once for all tests (`ranks.py`); each leaves what it found in a file.
"""

from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from plain_loop import distance
from sharing import filled_once
from works_with import ranks
from works_with.harness import Scenario, check, reference

import openwork as ow

TOLERANCE = 1e-4
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"),
]


def start(work, count, folder):
    mp.spawn(ranks.start, (work, count, folder), nprocs=count)


def left_by(count, folder):
    return [torch.load(folder / f"{count}-{rank}.pt", weights_only=False) for rank in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return filled_once(tmp_path_factory, "works_with", partial(start, ranks.two, 2))


@pytest.fixture(scope="module")
def two(folder):
    return left_by(2, folder)


@pytest.mark.parametrize("name", ranks.SCENARIOS | ranks.SPLIT)
def test_it_takes_the_steps_of_the_equations(row, two, name):
    scenario = (ranks.SCENARIOS | ranks.SPLIT)[name]
    kinds = {kind.__name__: kind for kind in (*ranks.nets_of(Scenario(always=True)), ranks.Feedforward)}
    for found in two:
        results = {kinds[kind]: result for kind, result in found[name].items()}
        check(row, "Two processes", name, scenario, results)


def test_a_lost_term_would_be_seen():
    for scenario in ranks.SCENARIOS.values():
        if "fixed" not in scenario.reference:
            for kind in ranks.nets_of(scenario):
                assert (
                    distance(reference(scenario, kind, decay=0.0), reference(scenario, kind)) > 10 * scenario.tolerance
                )


@pytest.mark.parametrize("name", ranks.CUT)
def test_groups_that_the_shards_cut_are_right(row, two, name):
    for found in two:
        for difference, same_topology in found["cut"][name]:
            assert difference < 1e-6
            assert same_topology
    row("Two processes", name, difference={"one layer": max(each for each, _ in two[0]["cut"][name])}, tolerance=1e-6)


@pytest.mark.parametrize("name", ranks.METHODS)
def test_a_method_on_shards_is_that_of_one_process(row, two, name):
    for found in two:
        difference, same_topology = found["methods"][name]
        assert difference < 1e-6
        assert same_topology
    row("Two processes", name, difference={"one layer": two[0]["methods"][name][0]}, tolerance=1e-6)


def test_a_process_holds_no_masks_of_whole_layers_for_the_step(two):
    unsharded = 0 if ow.kernels.status().isa else 2  # a kernel finds the mask again on the way
    for found in two:
        assert found["held"] == [0, unsharded]


def continued(row, saved, ends):
    """The line of the page, after comparing what each process ended with."""
    for weights, steps in ends:
        assert steps == ranks.STEPS
        assert distance(weights, saved) < TOLERANCE
        assert distance(weights, reference(Scenario(), ranks.SAVED)) < TOLERANCE
    what = f"`torch.distributed.checkpoint`, saved by 2 processes under FSDP2, continued by {len(ends)}"
    found = {ranks.SAVED.__name__: distance(ends[0][0], saved)}
    row("Two processes", what, difference=found, tolerance=TOLERANCE)


def test_a_checkpoint_of_two_processes_is_continued_by_one(row, two, folder):
    """Saved by torch.distributed.checkpoint in the middle, model and optimizer."""
    continued(row, two[0]["saved"], [ranks.load_and_go_on(ranks.SAVED, folder / "checkpoint", Scenario())])


@pytest.mark.for_the_page
def test_a_checkpoint_of_two_processes_is_continued_by_four(row, two, folder):
    start(ranks.four, 4, folder)
    continued(row, two[0]["saved"], left_by(4, folder))


REFUSED = {
    "torch's `ColwiseParallel` on a sparsified layer": "Colwise or Rowwise of openwork.integrations.tensor_parallel",
    "torch's `RowwiseParallel` on a sparsified layer": "Colwise or Rowwise of openwork.integrations.tensor_parallel",
    "`Rowwise` that cuts groups apart": "cuts groups of 4 apart: take Colwise",
    "`ow.sparsify` after `fully_shard`": "is sharded: call ow.sparsify before fully_shard",
    "`ow.finalize` of a sharded model": "load its full state dict into a model sparsified alike",
    "`FullyShardedDataParallel` (FSDP1)": "only fully_shard (FSDP2) works",
    "an optimizer built before `fully_shard`": "holds none now: something replaced them",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused(row, two, what):
    for found in two:
        assert REFUSED[what] in found["refused"][what]
    row("Two processes", what, error=two[0]["refused"][what])
