"""The canonical rows of a weight: what stands last is what the module sums over.

The definition is the module itself. Zero one entry of the last axis in every row that reads it, run the module, and
exactly one input must have stopped to matter.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from openwork.nm.groups import Axis, from_rows, reduction_size, to_rows
from openwork.nm.masks import magnitude_mask
from openwork.nm.pattern import Pattern
from openwork.training.select import known_axis

torch.set_num_threads(1)


def inputs_that_matter(output: Tensor, source: Tensor, dim: int) -> list[int]:
    """Which entries of `source` along `dim` the output depends on."""
    (gradient,) = torch.autograd.grad(output, source, torch.rand_like(output) + 0.5)
    return gradient.movedim(dim, 0).flatten(1).any(1).nonzero().flatten().tolist()


def others(size: int, gone: int) -> list[int]:
    return [i for i in range(size) if i != gone]


def axis_of(module: nn.Module, tensor: str) -> Axis:
    axis, reason = known_axis(module, tensor)
    assert axis is not None, reason
    return axis


# --- linear and convolutional modules ----------------------------------------------------------------------------

CONVS: list[tuple[Callable[..., nn.Module], int]] = [
    (nn.Conv1d, 1),
    (nn.Conv2d, 2),
    (nn.Conv3d, 3),
    (nn.ConvTranspose1d, 1),
    (nn.ConvTranspose2d, 2),
    (nn.ConvTranspose3d, 3),
]


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize(("make", "dims"), CONVS, ids=lambda x: getattr(x, "__name__", ""))
@pytest.mark.parametrize("channel", [0, 4, 11])
def test_conv_rows_run_over_inputs(make: Callable[..., nn.Module], dims: int, groups: int, channel: int) -> None:
    torch.manual_seed(0)
    module = make(12, 6, kernel_size=(2, 3, 1)[:dims], groups=groups)
    rows = to_rows(module.weight.detach(), axis_of(module, "weight"))
    K = 12 // groups
    assert rows.shape[-1] == K
    by_group = rows if module.transposed and groups > 1 else rows.unflatten(0, (groups, -1))
    by_group[channel // K, ..., channel % K] = 0
    x = torch.randn(2, 12, *(4,) * dims, requires_grad=True)
    assert inputs_that_matter(module(x), x, 1) == others(12, channel)


@pytest.mark.parametrize("feature", [0, 5, 7])
def test_linear_rows_run_over_inputs(feature: int) -> None:
    module = nn.Linear(8, 6)
    to_rows(module.weight.detach(), axis_of(module, "weight"))[..., feature] = 0
    x = torch.randn(3, 8, requires_grad=True)
    assert inputs_that_matter(module(x), x, -1) == others(8, feature)


@pytest.mark.parametrize("feature", [0, 5, 7])
def test_hugging_face_conv1d_rows_run_over_inputs(feature: int) -> None:
    module = pytest.importorskip("transformers.pytorch_utils").Conv1D(6, 8)  # outputs first
    to_rows(module.weight.detach(), axis_of(module, "weight"))[..., feature] = 0
    x = torch.randn(3, 8, requires_grad=True)
    assert inputs_that_matter(module(x), x, -1) == others(8, feature)


# --- attention and recurrent modules -----------------------------------------------------------------------------


@pytest.mark.parametrize("feature", [0, 7])
def test_attention_in_proj_rows_run_over_embedding(feature: int) -> None:
    module = nn.MultiheadAttention(8, 2, batch_first=True)
    to_rows(module.in_proj_weight.detach(), axis_of(module, "in_proj_weight"))[..., feature] = 0
    x = torch.randn(2, 5, 8, requires_grad=True)
    assert inputs_that_matter(module(x, x, x)[0], x, -1) == others(8, feature)


@pytest.mark.parametrize(("which", "size"), [("q", 8), ("k", 6), ("v", 10)])
def test_attention_separate_projection_rows_run_over_their_features(which: str, size: int) -> None:
    module = nn.MultiheadAttention(8, 2, kdim=6, vdim=10, batch_first=True)
    name = f"{which}_proj_weight"
    to_rows(getattr(module, name).detach(), axis_of(module, name))[..., 3] = 0
    sources = {"q": 8, "k": 6, "v": 10}
    x = {key: torch.randn(2, 5, width, requires_grad=True) for key, width in sources.items()}
    output, _ = module(x["q"], x["k"], x["v"])
    assert inputs_that_matter(output, x[which], -1) == others(size, 3)


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(("tensor", "size"), [("weight_ih_l0", 5), ("weight_ih_l0_reverse", 5), ("weight_ih_l1", 16)])
def test_recurrent_input_rows_run_over_inputs(make: type[nn.RNNBase], tensor: str, size: int) -> None:
    module = make(5, 8, num_layers=2, bidirectional=True)
    weight = getattr(module, tensor)
    rows = to_rows(weight.detach(), axis_of(module, tensor))
    assert rows.shape == (weight.shape[0], size)


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_zeroed_recurrent_input_does_not_matter(make: Callable[..., nn.Module]) -> None:
    module = make(5, 8)
    tensor = "weight_ih" if isinstance(module, nn.RNNCellBase) else "weight_ih_l0"
    to_rows(getattr(module, tensor).detach(), axis_of(module, tensor))[..., 3] = 0
    x = torch.randn(3, 5, requires_grad=True)
    assert inputs_that_matter(_output(module(x)), x, -1) == others(5, 3)


@pytest.mark.parametrize("make", [nn.LSTM, nn.RNN, nn.LSTMCell, nn.RNNCell])
def test_zeroed_recurrent_state_does_not_matter(make: Callable[..., nn.Module]) -> None:
    module = make(5, 8)
    tensor = "weight_hh" if isinstance(module, nn.RNNCellBase) else "weight_hh_l0"
    to_rows(getattr(module, tensor).detach(), axis_of(module, tensor))[..., 3] = 0
    h = torch.randn(1, 8, requires_grad=True)
    state = (h, torch.randn(1, 8)) if isinstance(module, nn.LSTM | nn.LSTMCell) else h
    assert inputs_that_matter(_output(module(torch.randn(1, 5), state)), h, -1) == others(8, 3)


@pytest.mark.parametrize("make", [nn.GRU, nn.GRUCell])
def test_zeroed_gru_state_matters_to_itself_only(make: Callable[..., nn.Module]) -> None:
    module = make(5, 8)
    tensor = "weight_hh" if isinstance(module, nn.RNNCellBase) else "weight_hh_l0"
    to_rows(getattr(module, tensor).detach(), axis_of(module, tensor))[..., 3] = 0
    h = torch.randn(1, 8, requires_grad=True)
    rest = _output(module(torch.randn(1, 5), h))[..., others(8, 3)]  # h[3] reaches output 3 through the gate alone
    assert inputs_that_matter(rest, h, -1) == others(8, 3)


def test_lstm_projection_rows_run_over_hidden_state() -> None:
    module = nn.LSTM(5, 8, proj_size=4)
    to_rows(module.weight_hr_l0.detach(), axis_of(module, "weight_hr_l0"))[..., 3] = 0
    c = torch.randn(1, 8, requires_grad=True)
    output, _ = module(torch.randn(1, 5), (torch.randn(1, 4), c))
    assert inputs_that_matter(output, c, -1) == others(8, 3)


def _output(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


# --- the views themselves ----------------------------------------------------------------------------------------

FORMS = [
    ((6, 8), Axis(1)),
    ((6, 8), Axis(0)),
    ((6, 8, 3), Axis(1)),
    ((6, 8, 3, 2), Axis(1)),
    ((6, 8, 3, 2), Axis(3)),
    ((6, 8, 3, 2, 2), Axis(1)),
    ((6, 8, 3, 2), Axis(0, blocks=3)),
    ((6, 8, 3, 2), Axis(1, blocks=2)),
    ((6, 8, 3, 2), Axis(flat=True)),
]


@pytest.mark.parametrize(("shape", "axis"), FORMS)
def test_from_rows_is_the_inverse_of_to_rows(shape: tuple[int, ...], axis: Axis) -> None:
    weight = torch.randn(shape)
    rows = to_rows(weight, axis)
    assert rows.shape[-1] == reduction_size(shape, axis)
    assert torch.equal(from_rows(rows, axis, shape), weight)


@pytest.mark.parametrize(("shape", "axis"), FORMS)
def test_rows_of_other_strides_are_the_same_rows(shape: tuple[int, ...], axis: Axis) -> None:
    weight = torch.randn(shape)
    strided = weight.movedim(0, -1).contiguous().movedim(-1, 0)
    assert not strided.is_contiguous()
    assert torch.equal(to_rows(strided, axis), to_rows(weight, axis))


@pytest.mark.parametrize(("shape", "axis"), [each for each in FORMS if not each[1].flat])
def test_rows_are_a_view(shape: tuple[int, ...], axis: Axis) -> None:
    weight = torch.zeros(shape)
    to_rows(weight, axis).fill_(1)
    assert weight.all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=2, max_size=5), st.integers(0, 4), st.integers(1, 3))
def test_rows_group_what_differs_along_the_axis_only(lengths: list[int], dim: int, blocks: int) -> None:
    dim %= len(lengths)
    lengths[dim] *= blocks
    index = torch.cartesian_prod(*(torch.arange(length) for length in lengths)).reshape(*lengths, -1)
    rows = torch.stack([to_rows(index[..., i], Axis(dim, blocks)) for i in range(len(lengths))], -1)
    K = lengths[dim] // blocks
    along = rows[..., dim]
    assert torch.equal(along, along[..., :1] + torch.arange(K))
    assert (along[..., 0] % K == 0).all()
    elsewhere = rows[..., [i for i in range(len(lengths)) if i != dim]]
    assert torch.equal(elsewhere, elsewhere[..., :1, :].expand_as(elsewhere))


def published_mask(weight: Tensor, pattern: Pattern) -> Tensor:
    """`Sparse.forward` of the authors' code (aojunzz/NM-sparsity, devkit/sparse_ops/sparse_ops.py), as a mask."""
    groups = weight.detach().abs().reshape(-1, pattern.m)
    smallest = groups.argsort(dim=1)[:, : pattern.m - pattern.n]
    return torch.ones_like(groups).scatter_(1, smallest, 0).reshape(weight.shape).bool()


@pytest.mark.parametrize("shape", [(6, 8), (4, 6, 3, 2), (2, 4, 3, 3, 2)])
@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(1, 4), Pattern(1, 8)], ids=str)
@pytest.mark.parametrize("memory", [torch.contiguous_format, "last"], ids=["contiguous", "channels_last"])
def test_flat_axis_reproduces_the_published_masks(shape: tuple[int, ...], pattern: Pattern, memory: object) -> None:
    weight = torch.randperm(torch.Size(shape).numel()).reshape(shape) - 7.25  # no ties, which theirs leaves open
    found = weight.movedim(1, -1).contiguous().movedim(-1, 1) if memory == "last" else weight
    assert torch.equal(magnitude_mask(found.abs(), pattern, Axis(flat=True)), published_mask(weight, pattern))


def test_flat_and_input_axis_differ_for_convolutions() -> None:
    weight = torch.arange(2 * 4 * 3 * 3.0).reshape(2, 4, 3, 3)
    flat, along_input = (magnitude_mask(weight, Pattern(2, 4), axis) for axis in (Axis(flat=True), Axis(1)))
    assert not torch.equal(flat, along_input)
