"""The axis of a weight that its module does not tell is that which the products of an example sum over."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import openwork as ow
from openwork.files.checkpoint import check
from openwork.nm.groups import Axis
from openwork.training.seen_axes import seen_axes

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
IDS = (X[:, 0] > 0).long()


class Bare(nn.Module):
    """A function of bare parameters of these shapes, and of data."""

    def __init__(self, compute, *shapes):
        super().__init__()
        torch.manual_seed(0)
        self.weights = nn.ParameterList(torch.randn(*shape) for shape in shapes)
        self.compute = compute

    def forward(self, x):
        return self.compute(x, *self.weights)


def seen(model, x=X):
    return list(seen_axes(model, x, dict(model.named_parameters())).values())


def images(x):
    return x[..., None, None].expand(3, 8, 5, 5)


@pytest.mark.parametrize(
    ("shape", "axis", "compute"),
    [
        ((8, 16), 0, lambda x, w: x @ w),
        ((8, 8), 0, lambda x, w: x @ w),
        ((8, 8), 1, lambda x, w: x @ w.T),
        ((8, 16), 0, lambda x, w: F.linear(x, w.T)),
        ((16, 8), 1, lambda x, w: w @ x.T),
        ((16, 8), 1, lambda x, w: w @ x[0]),
        ((4, 8, 16), 1, lambda x, w: torch.bmm(x.expand(4, 3, 8), w)),
        ((4, 16, 8), 2, lambda x, w: torch.einsum("bi,eoi->beo", x, w)),
        ((8, 4, 16), 0, lambda x, w: torch.einsum("bi,ihd->bhd", x, w)),
        ((4, 16, 8), 2, lambda x, w: F.linear(x, w[2])),
        ((4, 16, 8), 2, lambda x, w: torch.bmm(w[IDS], x[:, :, None])),
        ((24, 8), 1, lambda x, w: sum(F.linear(x, part) for part in w.chunk(3))),
        ((8, 48), 0, lambda x, w: sum(x @ part for part in w.chunk(3, -1))),
        ((16, 8), 1, lambda x, w: x.bfloat16() @ w.T.bfloat16().contiguous()),
        ((16, 8), 1, lambda x, w: F.linear(x, torch.cat([w, w])) * 2),
        ((16, 8), 1, lambda x, w: torch.bmm(x.expand(2, 3, 8), torch.stack([w, w]).mT)),
        ((16, 8), 1, lambda x, w: (x[:, None] * w).sum(-1)),
        ((2, 16, 8), 2, lambda x, w: x.expand(2, 3, 8) @ torch.empty(2, 16, 8).copy_(w).mT),
        ((16, 8, 8), 2, lambda x, w: F.bilinear(x, x, w)),
        ((10, 8), 1, lambda x, w: x @ w[torch.arange(4)].T),
        ((2, 8, 4, 8), 3, lambda x, w: x @ w[torch.tensor([0, 1]), torch.tensor([2, 3])].mT),
        ((16, 8, 3), 1, lambda x, w: F.conv1d(images(x)[..., 0], w)),
        ((16, 8, 3, 3), 1, lambda x, w: F.conv2d(images(x), w)),
        ((16, 8, 3, 3), 1, lambda x, w: w.flatten(1) @ F.unfold(images(x), 3)),
        ((16, 8, 3, 3), 1, lambda x, w: F.conv2d(images(x).reshape(1, 24, 5, 5), _modulated(w, x), groups=3)),
    ],
)
def test_the_axis_is_the_one_that_products_sum_over(shape, axis, compute):
    model = Bare(compute, shape)
    assert seen(model) == [Axis(axis)]
    assert ow.sparsify(model, "2:4", example=X).sparse == {"weights.0": ow.Pattern(2, 4)}
    ow.verify(model, X)


def _modulated(weight, style):
    return (weight[None] * style[:, None, :, None, None]).view(-1, *weight.shape[1:])


def test_blocks_of_a_transposed_convolution_are_seen():
    assert seen(Bare(lambda x, w: F.conv_transpose2d(images(x), w, groups=2), (8, 16, 3, 3))) == [Axis(0, blocks=2)]


def test_of_dims_that_are_summed_together_it_is_the_longest():
    heads = Bare(lambda x, w: torch.einsum("bhd,hdo->bo", x.view(3, 2, 4), w), (2, 4, 16))
    assert seen(heads) == [Axis(1)]
    assert seen(Bare(lambda x, w: torch.tensordot(x.view(3, 4, 2), w, 2), (4, 2, 16))) == [Axis(0)]


def test_casts_that_autocast_keeps_are_seen_again():
    model = Bare(F.linear, (16, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(X)
        assert seen(model) == seen(model) == [Axis(1)]
        assert ow.sparsify(model, "2:4", example=X).sparse


def test_layouts_without_strides_are_not_followed():
    model = Bare(lambda x, w, known: torch.sparse.mm(w.to_sparse(), x.T).sum() + x @ known, (16, 8), (8, 8))
    report = ow.sparsify(model, "2:4", example=X)
    assert "is computed of it" in report.skipped["weights.0"]


def test_the_output_axis_is_the_other_one_of_each_matrix():
    model = Bare(lambda x, w: torch.einsum("bi,eoi->beo", x, w), (4, 16, 8))
    ow.sparsify(model, "2:4", ow.TransposableSRSTE(), example=X)
    for dim in (1, 2):
        assert int((model.weights[0] != 0).unflatten(dim, (-1, 4)).sum(dim + 1).max()) == 2


def test_the_direction_of_a_normalized_weight_is_seen():
    model = Bare(F.linear, (16, 8))
    model.weight = nn.Parameter(torch.randn(16, 8))
    model.compute = lambda x, w: F.linear(x, model.weight) @ w
    nn.utils.parametrizations.weight_norm(model, "weight")
    assert set(ow.sparsify(model, "2:4", example=X).sparse) == {"weights.0", "parametrizations.weight.original1"}


def test_both_factors_of_low_rank_are_weights():
    assert seen(Bare(lambda x, a, b: x @ a.T @ b.T, (4, 8), (16, 4))) == [Axis(1), Axis(1)]


@pytest.mark.parametrize(
    ("shape", "reason", "compute"),
    [
        ((10, 8), "its rows are looked up and not multiplied", lambda x, w: w[IDS] + x),
        ((10, 8), "its rows are looked up and not multiplied", lambda x, w: F.embedding(IDS, w) + x),
        ((3, 8), "it is not multiplied in the example", lambda x, w: x + w),
        ((8, 8), "its products sum over different dims, 0 and 1", lambda x, w: x @ w @ w.T),
        ((1, 16), "its products sum over one of its numbers each", lambda x, w: x[:, :1] @ w),
        ((8, 1, 3, 3), "its products sum over one of its numbers each", lambda x, w: F.conv2d(images(x), w, groups=8)),
        ((16, 8), "what mm multiplies is computed of it", lambda x, w: x @ (w @ torch.eye(8)).T),
    ],
)
def test_weights_without_one_axis_stay_dense_and_say_why(shape, reason, compute):
    model = Bare(lambda x, w, known: compute(x, w).sum() + x @ known, shape, (8, 8))
    report = ow.sparsify(model, "2:4", example=X)
    assert report.skipped["weights.0"].startswith(f"no known reduction axis in ParameterList: {reason}")
    assert list(report.sparse) == ["weights.1"]


def test_zeros_that_reach_no_product_are_found_as_in_known_layers():
    standardized = Bare(lambda x, w, known: F.linear(x, w - w.mean(1, keepdim=True)) @ known, (16, 8), (16, 4))
    report = ow.sparsify(standardized, "2:4", example=X)
    assert report.skipped["weights.0"].startswith("its zeros reach no product")
    assert list(report.sparse) == ["weights.1"]


def test_what_was_said_comes_first():
    model = Bare(lambda x, a, b, c: x @ a + x @ b + x @ c, (8, 8), (8, 8), (8, 8))
    report = ow.sparsify(model, "2:4", axis={"weights.0": 1}, exclude=["weights.1"], example=X)
    assert report.skipped["weights.0"].startswith("its zeros reach no product")  # dim 1 is not summed
    assert report.skipped["weights.1"] == "excluded by 'weights.1'"
    assert list(report.sparse) == ["weights.2"]


def test_remainders_and_the_flat_grouping_are_those_of_known_layers():
    def compute(x, whole, short):
        return x @ whole + x[:, :6] @ short

    skipped = ow.project(Bare(compute, (8, 8), (6, 8)), "2:4", example=X).skipped
    assert skipped == {"weights.1": "reduction axis has 6 weights, not a multiple of 4"}
    assert not ow.project(Bare(compute, (8, 8), (6, 8)), "2:4", remainder="pad", example=X).skipped
    flat = Bare(F.linear, (8, 8))
    ow.project(flat, "2:4", axis="kernel", example=X)
    assert int((flat.weights[0] != 0).view(-1, 4).sum(1).max()) == 2


def test_without_an_example_the_reason_says_what_to_do():
    skipped = ow.project(nn.Sequential(nn.Linear(8, 8), nn.Bilinear(8, 8, 8)), "2:4").skipped
    assert skipped["1.weight"] == "no known reduction axis in Bilinear: name it with axis={glob: dim}, or give example="


# A finished model, whose axes are known from its example alone


def finished(**choices):
    model = Bare(lambda x, a, b: x @ a + x @ b, (8, 8), (8, 8))
    ow.sparsify(model, "2:4", example=X, **choices)
    return ow.finalize(model)


def test_a_plain_model_is_held_along_the_axes_of_the_example():
    report = ow.verify(finished(), X, pattern="2:4")
    assert list(report.sparse) == ["weights.0", "weights.1"]
    assert report.products == ow.verify(finished(), X, pattern=ow.Selection("2:4", axis={"*": 0})).products
    with pytest.warns(UserWarning, match="2:4 for 2 weights"):
        assert list(ow.verify(finished(), X).sparse) == ["weights.0", "weights.1"]


def test_a_weight_that_is_dense_along_it_is_held_where_its_axis_is_named():
    model = finished(exclude=["weights.1"])
    dense = "no known reduction axis in ParameterList, and dense along that of its products"
    assert ow.verify(model, X, pattern="2:4").skipped["weights.1"].startswith(dense)
    with pytest.warns(UserWarning, match="2:4 for 1 weight"):
        assert ow.verify(model, X).skipped["weights.1"].startswith(dense)
    with pytest.raises(ow.NotSparse, match=r"1 weight is denser than its pattern:\n  weights\.1: 16 of 16"):
        ow.verify(model, X, pattern=ow.Selection("2:4", axis={"*": 0}))


@pytest.mark.parametrize("pattern", [None, "2:4"])
@pytest.mark.filterwarnings("ignore:no pattern was given")
def test_a_plain_model_is_saved_along_them(tmp_path, pattern):
    model = finished(exclude=["weights.1"])
    ow.save(model, tmp_path / "net.safetensors", pattern=pattern, example=X)
    sparse = [entry.name for entry in check(tmp_path / "net.safetensors") if entry.pattern]
    assert sparse == ["weights.0"]
    again = Bare(model.compute, (8, 8), (8, 8))
    ow.load(tmp_path / "net.safetensors", into=again)
    assert torch.equal(again(X), model(X))
