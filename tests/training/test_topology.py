"""The recorder, on mask sequences written by hand."""

from __future__ import annotations

import io
import json

import pytest
import torch
from torch import Tensor

from openwork.nm.mask_stats import sad
from openwork.training.topology import Topology

torch.set_num_threads(1)

Masks = dict[str, Tensor]


def masks(a: str, b: str = "10") -> Masks:
    """Two layers: "1100 0011" is a mask of two rows."""
    layers = {"a": a, "b": b}
    return {name: torch.tensor([[c == "1" for c in row] for row in text.split()]) for name, text in layers.items()}


START = masks("1100 1100")
# Each step: masks before and after it. Between steps 2 and 3 the mask moves outside of a recorded step.
STEPS = {
    1: (START, masks("1010 1100")),
    2: (masks("1010 1100"), masks("0011 1100", "01")),
    3: (masks("0011 1010", "01"), masks("1100 1010", "10")),
}
# Per layer: weights, SAD since the start, since the last record, over the step.
EXPECTED = {
    1: {"a": (8, 2, 2, 2), "b": (2, 0, 0, 0)},
    2: {"a": (8, 4, 2, 2), "b": (2, 2, 2, 2)},
    3: {"a": (8, 2, 6, 4), "b": (2, 0, 2, 2)},
}
KEYS = ("weights", "sad_start", "sad_last", "sad_step")


def recorded(steps: range, topology: Topology | None = None, *, keep: bool = False) -> Topology:
    if topology is None:
        topology = Topology(every=1, keep=keep)
        topology.begin(START)
    for step in steps:
        topology.record(step, *STEPS[step])
    return topology


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_records_hold_the_divergences_of_each_layer(step: int, keep: bool) -> None:
    record = recorded(range(1, 4), keep=keep).records[step - 1]
    assert record["step"] == step
    assert {name: tuple(layer[key] for key in KEYS) for name, layer in record["layers"].items()} == EXPECTED[step]


@pytest.mark.parametrize("step", [1, 2, 3])
def test_totals_are_the_sums_of_the_layers(step: int) -> None:
    record = recorded(range(1, 4)).records[step - 1]
    sums = tuple(sum(values) for values in zip(*EXPECTED[step].values(), strict=True))
    assert tuple(record[key] for key in KEYS) == sums


def test_record_is_returned_and_fit_for_json() -> None:
    topology = Topology()
    topology.begin(START)
    record = topology.record(100, *STEPS[1])
    assert topology.records == [record]
    assert json.loads(json.dumps(record)) == record


@pytest.mark.parametrize(("every", "due"), [(1, [1, 2, 3, 4, 5, 6]), (2, [2, 4, 6]), (4, [4]), (7, [])])
def test_a_record_is_due_every_so_many_steps(every: int, due: list[int]) -> None:
    topology = Topology(every=every)
    assert [step for step in range(1, 7) if topology.due(step)] == due


# --- comparing any two -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("a", "b"), [(0, 1), (0, 3), (1, 2), (1, 3), (3, 1), (2, 2)])
def test_kept_masks_compare_at_any_two_steps(a: int, b: int) -> None:
    after = {0: START, **{step: pair[1] for step, pair in STEPS.items()}}
    expected = {name: sad(after[a][name], after[b][name]) for name in START}
    assert recorded(range(1, 4), keep=True).between(a, b) == expected | {"": sum(expected.values())}


def test_start_and_last_compare_without_keeping() -> None:
    topology = recorded(range(1, 4))
    assert topology.between(0, 3) == {"a": 2, "b": 0, "": 2}
    assert topology.between(3, 0) == topology.between(0, 3)


@pytest.mark.parametrize("keep", [False, True])
def test_start_compares_with_itself_before_any_record(keep: bool) -> None:
    assert recorded(range(0), keep=keep).between(0, 0) == {"a": 0, "b": 0, "": 0}


@pytest.mark.parametrize(("a", "b", "missing"), [(1, 3, [1]), (3, 2, [2]), (1, 2, [1, 2]), (0, 9, [9])])
def test_masks_not_kept_are_named(a: int, b: int, missing: list[int]) -> None:
    with pytest.raises(ValueError, match="keep=True") as error:
        recorded(range(1, 4)).between(a, b)
    assert f"no masks of steps {missing}; there are [0, 3]" in str(error.value)


def test_memory_does_not_grow_without_keeping() -> None:
    topology = recorded(range(0))
    for step in range(1, 50):
        topology.record(step, *STEPS[1])
        assert sorted(topology.snapshots) == [0, step]


def test_masks_are_kept_at_one_bit_a_weight() -> None:
    topology = Topology(every=1, keep=True)
    large = {"a": torch.ones(64, 100, dtype=torch.bool)}
    topology.begin(large)
    for step in range(1, 4):
        topology.record(step, large, large)
    stored = sum(bits.untyped_storage().nbytes() for masks in topology.snapshots.values() for bits in masks.values())
    assert stored == 4 * 64 * 100 // 8


def test_a_mask_that_changes_later_does_not_change_what_was_recorded() -> None:
    topology = Topology(every=1)
    buffers = masks("1100 1100")
    topology.begin(buffers)
    buffers["a"].logical_not_()
    assert topology.record(1, buffers, buffers)["sad_start"] == 8


# --- resuming ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("stop", [0, 1, 2, 3])
def test_a_resumed_recorder_continues_as_if_never_stopped(stop: int, keep: bool) -> None:
    whole = recorded(range(1, 4), keep=keep)
    first = recorded(range(1, stop + 1), keep=keep)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    resumed = Topology(every=1, keep=keep)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    recorded(range(stop + 1, 4), resumed)
    assert resumed.records == whole.records
    assert resumed.between(0, 3) == whole.between(0, 3)
    assert resumed.snapshots.keys() == whole.snapshots.keys()


def test_a_saved_state_stays_as_it_was() -> None:
    topology = recorded(range(1, 3))
    state = topology.state_dict()
    recorded(range(3, 4), topology)
    assert [record["step"] for record in state["records"]] == [1, 2]
    assert sorted(state["snapshots"]) == [0, 2]


def test_a_run_that_kept_all_can_go_on_without_keeping() -> None:
    resumed = Topology(every=1)
    resumed.load_state_dict(recorded(range(1, 3), keep=True).state_dict())
    recorded(range(3, 4), resumed)
    assert sorted(resumed.snapshots) == [0, 3]


# --- for loggers, and errors -------------------------------------------------------------------------------------


def test_scalars_are_the_last_record_in_total() -> None:
    assert recorded(range(1, 4)).scalars() == {
        "sad/start": 2.0,
        "sad/last": 8.0,
        "sad/step": 6.0,
        "flip_rate/start": 0.2,
        "flip_rate/last": 0.8,
        "flip_rate/step": 0.6,
    }


def test_there_are_no_scalars_before_a_record() -> None:
    assert recorded(range(0)).scalars() == {}


@pytest.mark.parametrize("every", [0, -1, 0.5])
def test_a_spacing_below_one_step_is_refused(every: int) -> None:
    with pytest.raises(ValueError, match=f"every={every}; needed"):
        Topology(every=every)


def test_a_record_before_the_start_is_refused() -> None:
    with pytest.raises(ValueError, match=r"record before begin\(masks\)"):
        Topology().record(1, *STEPS[1])


def test_masks_of_another_model_are_refused() -> None:
    topology = recorded(range(1, 2))
    with pytest.raises(ValueError, match=r"other weights than at the start, in \['b', 'c'\]"):
        topology.record(2, *({"a": each["a"], "c": each["b"]} for each in STEPS[2]))
    assert [record["step"] for record in topology.records] == [1]


def test_masks_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="they must be equal"):
        recorded(range(0)).record(1, masks("1" * 9), masks("1" * 9))
