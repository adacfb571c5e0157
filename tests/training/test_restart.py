"""`sparsify(pruned, dense=)`: the first mask and forward are those of the pruned network, and the mask can move."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import openwork as ow
from openwork.nm.groups import to_rows


def networks(seed=0, dtype=torch.float32, pattern="2:4", transposable=False, remainder="skip"):
    """A pruned network, whose kept weights somebody has changed, and the dense one that it was."""
    torch.manual_seed(seed)
    dense = nn.Sequential(nn.Conv2d(8, 12, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 10)).to(dtype)
    pruned = nn.Sequential(nn.Conv2d(8, 12, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 10)).to(dtype)
    pruned.load_state_dict(dense.state_dict())
    ow.project(pruned, ow.Selection(pattern, transposable=transposable, remainder=remainder))
    with torch.no_grad():
        for weight in (pruned[0].weight, pruned[3].weight):
            weight.mul_(torch.rand_like(weight) + 0.5)
    return pruned, dense


def values(model):
    return {f"{i}.weight": model[i].parametrizations.weight.original.detach() for i in (0, 3)}


X = torch.randn(5, 8, 3, 3, generator=torch.Generator().manual_seed(3))


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 4),
    m=st.sampled_from([2, 3, 4, 5, 8]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
    zeros=st.booleans(),
)
def test_the_first_mask_and_forward_are_those_of_the_pruned_network(n, m, dtype, seed, zeros):
    pattern = f"{min(n, m)}:{m}"
    pruned, dense = networks(seed, dtype, pattern, remainder="pad")
    if zeros:  # a solver may keep fewer than N
        with torch.no_grad():
            pruned[0].weight.mul_(torch.rand_like(pruned[0].weight) < 0.8)
    kept = {name: weight != 0 for name, weight in pruned.state_dict().items() if name.endswith("weight")}
    wanted = pruned(X.to(dtype)).detach()
    ow.sparsify(pruned, pattern, ow.SRSTE(), remainder="pad", dense=dense)
    assert torch.equal(pruned(X.to(dtype)), wanted)
    for name, mask in ow.masks(pruned).items():
        assert not (kept[name] & ~mask).any()
        assert not (mask & ~kept[name] & (values(pruned)[name] != 0)).any()


def test_pruned_weights_are_the_dense_ones_cut_below_what_is_kept():
    pruned, dense = networks()
    before = {name: tensor.clone() for name, tensor in pruned.state_dict().items()}
    ow.sparsify(pruned, "2:4", dense=dense.state_dict())
    axes = {"0.weight": ow.Axis(1), "3.weight": ow.Axis(1)}
    for name, weight in values(pruned).items():
        rows = [to_rows(each, axes[name]).reshape(-1, 4) for each in (weight, before[name], dense.state_dict()[name])]
        for now, old, was in zip(*(each.tolist() for each in rows), strict=True):
            least = min(abs(each) for each in old if each)
            wanted = [a if a else max(-0.99 * least, min(0.99 * least, b)) for a, b in zip(old, was, strict=True)]
            assert now == pytest.approx(wanted)


def test_a_group_that_keeps_fewer_stays_as_it_is():
    pruned, dense = nn.Sequential(nn.Linear(8, 1)), nn.Sequential(nn.Linear(8, 1))
    with torch.no_grad():
        pruned[0].weight.copy_(torch.tensor([[0.0, 5.0, 0.0, 0.0, 0.0, 1.0, 2.0, 0.0]]))
        dense[0].weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, -0.5]]))
    ow.sparsify(pruned, "2:4", dense=dense)
    weight = pruned[0].parametrizations.weight.original
    assert weight.tolist()[0] == pytest.approx([0.0, 5.0, 0.0, 0.0, 0.99, 1.0, 2.0, -0.5])


@pytest.mark.parametrize("least", [1.0, 1e-40, 1.4e-45])
@pytest.mark.parametrize("number", [torch.nan, torch.inf, 3.0])
def test_neither_rounding_nor_what_is_not_finite_moves_the_mask(number, least):
    """The smallest magnitude there is has nothing below it but 0; NaN counts as largest."""
    pruned, dense = nn.Sequential(nn.Linear(8, 1)), nn.Sequential(nn.Linear(8, 1))
    with torch.no_grad():
        pruned[0].weight.copy_(torch.tensor([[0.0, 0.0, least, -least] * 2]))
        dense[0].weight.fill_(number)
    ow.sparsify(pruned, "2:4", dense=dense)
    assert ow.masks(pruned)["0.weight"].tolist() == [[False, False, True, True] * 2]


def test_a_forward_in_bfloat16_has_the_same_mask():
    pruned, dense = networks()
    kept = {name: pruned.state_dict()[name] != 0 for name in ("0.weight", "3.weight")}
    ow.sparsify(pruned, "2:4", dense=dense)
    for name, weight in values(pruned).items():
        twin = nn.Conv2d(8, 12, 3) if weight.ndim == 4 else nn.Linear(12, 10)
        with torch.no_grad():
            twin.weight.copy_(weight)
        twin = nn.Sequential(twin.bfloat16())
        ow.project(twin, "2:4")
        assert torch.equal(twin[0].weight != 0, kept[name])


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_transposable_masks_stay_those_of_the_pruned_network(pattern):
    torch.manual_seed(0)
    dense, pruned = nn.Sequential(nn.Linear(24, 20)), nn.Sequential(nn.Linear(24, 20))
    pruned.load_state_dict(dense.state_dict())
    ow.project(pruned, ow.Selection(pattern, transposable=True, remainder="pad"))
    kept, x = pruned[0].weight != 0, torch.randn(3, 24)
    wanted = pruned(x).detach()
    ow.sparsify(pruned, pattern, ow.TransposableSRSTE(), remainder="pad", dense=dense)
    assert torch.equal(pruned(x), wanted)
    masked = pruned[0].parametrizations.weight[0]
    started = pruned[0].parametrizations.weight.original
    assert (started.detach() != 0).sum() > kept.sum()
    mask = masked.ranked(started, masked.end)  # what the next choice would be
    assert not (kept & ~mask).any()
    assert not (mask & ~kept & (started != 0)).any()


def test_the_flat_axis_and_other_axes():
    for options in ({"axis": "kernel"}, {"axis": {"0": 0, "3": 0}, "remainder": "pad"}):
        torch.manual_seed(0)
        pruned, dense = networks()
        pruned.load_state_dict(dense.state_dict())
        ow.project(pruned, "2:4", **options)
        wanted = pruned(X).detach()
        ow.sparsify(pruned, "2:4", dense=dense, **options)
        assert torch.equal(pruned(X), wanted)
        assert all((weight != 0).float().mean() > 0.9 for weight in values(pruned).values())


def test_the_mask_can_move_from_there():
    moved = []
    for start in (None, "dense"):
        pruned, dense = networks()
        ow.sparsify(pruned, "2:4", ow.SRSTE(), **({"dense": dense} if start else {}))
        optimizer = torch.optim.SGD(pruned.parameters(), 0.05)
        ow.attach(optimizer, pruned)
        first = ow.masks(pruned)
        for _ in range(3):
            optimizer.zero_grad()
            (pruned(X) - dense(X)).square().mean().backward()
            optimizer.step()
        moved.append(ow.sad(first["0.weight"], ow.masks(pruned)["0.weight"]))
    assert moved[1] > moved[0]


def test_stored_masks_are_the_pruned_network_s_and_a_finalized_one_is_as_before():
    pruned, dense = networks()
    before = {name: tensor.clone() for name, tensor in pruned.state_dict().items()}
    ow.sparsify(pruned, "2:4", dense=dense)
    ow.finalize(pruned)
    assert all(torch.equal(before[name], tensor) for name, tensor in pruned.state_dict().items())


# --- what is refused, before anything is changed ------------------------------------------------------------------


def refused(message, method=ow.SRSTE(), change=lambda pruned, dense: dense):  # noqa: B008
    pruned, dense = networks()
    dense = change(pruned, dense)
    before = {name: tensor.clone() for name, tensor in pruned.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        ow.sparsify(pruned, "2:4", method, dense=dense)
    assert type(pruned[0]) is nn.Conv2d
    assert all(torch.equal(before[name], tensor) for name, tensor in pruned.state_dict().items())


def test_another_network_is_refused():
    refused(r"dense has no 0\.weight, 3\.weight; it has nothing", change=lambda *_: {})
    refused(r"dense has no 3\.weight; it has 0\.weight, 0\.bias", change=lambda _, dense: dense[:1])
    refused(
        r"dense has 3\.weight of shape \(10, 4\), the pruned network \(10, 12\); needed the same",
        change=lambda _, dense: dense.state_dict() | {"3.weight": torch.zeros(10, 4)},
    )


def test_a_network_that_is_not_pruned_is_refused():
    def densify(pruned, dense):
        pruned.load_state_dict(dense.state_dict())
        return dense

    refused(r"0\.weight is not pruned to 2:4 as SRSTE.* would drop 432 weights that are not 0", change=densify)


@pytest.mark.parametrize("method", [ow.ASP(), ow.Dense()], ids=str)
def test_a_mask_that_does_not_move_is_refused(method):
    refused(r"dense= with .*, whose mask does not move: leave it out, or use ow\.SRSTE", method)


def test_a_2_4_mask_is_no_transposable_one():
    refused(r"0\.weight is not pruned to 2:4 as TransposableSRSTE", ow.TransposableSRSTE())
