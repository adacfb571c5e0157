"""What every kind of layer is multiplied with: the error that a report states is that of the outputs themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import openwork as ow
from openwork.pruning import inputs
from openwork.training.selection import Selection


class Experts(nn.Module):
    """Four experts, (experts, in, out): each sees the tokens that `rows` deals to it, so many each."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 16, 12))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.weight)


class Grouped(Experts):
    def forward(self, x: Tensor) -> Tensor:
        ends = torch.tensor([40, 100, 130, 200], dtype=torch.int32)
        return torch._grouped_mm(x, self.weight, offs=ends)  # the operator behind transformers' experts


class OneByOne(Experts):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[i * 40 : (i + 1) * 40] @ self.weight[i] for i in range(4)])


class Function(nn.Module):
    """A layer of one weight and any function of it."""

    def __init__(self, weight: Tensor, function: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.weight, self.function = nn.Parameter(weight), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


def _layer(layer: nn.Module, *shape: int, axis: Any = "input") -> Any:
    return pytest.param(layer, torch.Size(shape), axis, id=type(layer).__name__ + "x".join(map(str, shape)))


def _function(weight: tuple[int, ...], function: Callable[[Tensor, Tensor], Tensor], *shape: int, axis: int) -> Any:
    return _layer(Function(torch.randn(weight), function), *shape, axis={"weight": axis})


torch.manual_seed(0)
LAYERS = [
    _layer(nn.Linear(16, 12), 100, 16),
    _layer(nn.Linear(16, 12), 2, 3, 50, 16),
    _layer(nn.Conv1d(8, 12, 3, padding=1), 9, 8, 20),
    _layer(nn.Conv2d(8, 12, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), 5, 8, 9, 10),
    _layer(nn.Conv2d(16, 12, 3, groups=2, padding="same"), 5, 16, 7, 8),
    _layer(nn.Conv2d(8, 12, 3, padding=1, padding_mode="reflect"), 5, 8, 7, 8),
    _layer(nn.Conv3d(8, 4, 2), 5, 8, 4, 5, 6),
    _layer(nn.Conv2d(8, 12, 3, stride=(2,)), 5, 8, 9, 8),  # type: ignore[arg-type]
    _layer(nn.ConvTranspose2d(8, 12, 2, stride=2), 5, 8, 6, 7),
    _layer(nn.ConvTranspose2d(16, 12, 2, stride=3, groups=2), 5, 16, 6, 7),
    _layer(nn.ConvTranspose2d(8, 12, 3, stride=(3, 4), padding=(1, 0), output_padding=(2, 3)), 3, 8, 2, 3),
    _layer(nn.ConvTranspose1d(8, 12, 2, stride=4, padding=2, dilation=3), 30, 8, 2),
    _layer(Experts(), 4, 50, 16, axis={"weight": 1}),
    _layer(Grouped(), 200, 16, axis={"weight": 1}),
    _layer(OneByOne(), 160, 16, axis={"weight": 1}),
    _function((16, 12), lambda x, w: x @ w, 99, 16, axis=0),
    _function((16, 12), lambda x, w: F.linear(x, w.T), 7, 20, 16, axis=0),
    _function((12, 16), lambda x, w: w @ x, 16, 99, axis=1),
    _function((4, 12, 16), lambda x, w: torch.einsum("sbk,bok->sbo", x, w), 60, 4, 16, axis=2),
    _function((36, 16), lambda x, w: torch.stack([F.linear(x, part) for part in w.chunk(3)]), 99, 16, axis=1),
    _function((12, 16), lambda x, w: torch.matmul(x, w.T.expand(3, -1, -1)), 3, 40, 16, axis=1),
    _function((12, 16), lambda x, w: F.linear(x.bfloat16(), w.bfloat16()).float(), 99, 16, axis=1),
]


@pytest.mark.parametrize("solver", [ow.Magnitude(), ow.SparseGPT()], ids=["diagonal", "whole"])
@pytest.mark.parametrize(("layer", "shape", "axis"), LAYERS)
def test_the_error_told_is_that_of_the_outputs(
    layer: nn.Module, shape: torch.Size, axis: Any, solver: ow.Solver, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    x, dense = torch.randn(shape), {name: value.clone() for name, value in layer.state_dict().items()}
    if "bias" in dense:
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    try:
        before = layer(x).detach()
        (told,) = ow.prune(layer, "2:4", [x], solver=solver, axis=axis).layers
        ow.verify(layer, pattern=Selection("2:4", axis=axis))
        error = float((layer(x).detach() - before).square().sum() / before.square().sum())
        assert told.note == ""
        if solver.needs_gram:  # scores look at the diagonal alone, so their error is an estimate
            assert told.error == pytest.approx(error, rel=0.05 if before.dtype != torch.float32 else 1e-3)
        assert told.error <= told.masked + 1e-6
    finally:
        layer.load_state_dict(dense)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_wide_convolution_is_solved_tap_by_tap(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tap is a linear layer on what it meets of the padded input."""
    monkeypatch.setattr(inputs, "_WHOLE", 8)
    torch.manual_seed(0)
    layer, x = nn.Conv1d(16, 12, 3, stride=2, padding=1, groups=groups, bias=False), torch.randn(4, 16, 40)
    taps = [nn.Linear(16 // groups, 12 // groups, bias=False) for _ in range(3 * groups)]
    padded = F.pad(x, (1, 1)).unflatten(1, (groups, -1))
    for i, linear in enumerate(taps):
        tap, group = divmod(i, groups)
        with torch.no_grad():
            linear.weight.copy_(layer.weight.unflatten(0, (groups, -1))[group, :, :, tap])
        ow.prune(linear, "2:4", [padded[:, group, :, tap : tap + 39 : 2].movedim(1, -1)], solver=ow.SparseGPT())
    ow.prune(layer, "2:4", [x], solver=ow.SparseGPT())
    expected = torch.stack([linear.weight for linear in taps]).unflatten(0, (3, groups))
    torch.testing.assert_close(layer.weight.unflatten(0, (groups, -1)), expected.permute(1, 2, 3, 0))


class Attention(nn.Module):
    def __init__(self, **sizes: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True, **sizes)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        out: Tensor = self.attention(x, y, y, need_weights=False)[0]
        return out


@pytest.mark.parametrize("alone", [True, False], ids=["self", "cross"])
def test_packed_projections_of_attention_see_their_own_inputs(alone: bool) -> None:
    torch.manual_seed(0)
    model, x, y = Attention(), torch.randn(8, 10, 16), torch.randn(8, 30, 16)
    y = x if alone else y
    parts = [nn.Linear(16, 16, bias=False) for _ in range(3)]
    for linear, weight, each in zip(parts, model.attention.in_proj_weight.chunk(3), (x, y, y), strict=True):
        with torch.no_grad():
            linear.weight.copy_(weight)
        ow.prune(linear, "2:4", [each], solver=ow.SparseGPT())
    report = ow.prune(model, "2:4", [(x, y)], solver=ow.SparseGPT())
    torch.testing.assert_close(model.attention.in_proj_weight, torch.cat([linear.weight for linear in parts]))
    assert report.layers[0].name == "attention.in_proj_weight"
    assert report.layers[0].samples == 80
    assert [layer.note for layer in report.layers] == ["", ""]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_see_their_input_and_their_state(kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)
    model, x = kind(16, 8, num_layers=2), torch.randn(6, 10, 16)
    report = ow.prune(model, "2:4", [x], solver=ow.SparseGPT())
    assert [layer.samples for layer in report.layers] == [60] * 4
    assert all(layer.note == "" and layer.error < layer.masked for layer in report.layers)


def test_layers_of_an_encoder_are_seen_though_torch_could_fuse_them() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    report = ow.prune(model, "2:4", [torch.randn(4, 25, 16)], solver=ow.SparseGPT())
    assert [layer.samples for layer in report.layers] == [100] * 8
    assert all(layer.note == "" and layer.error < layer.masked for layer in report.layers)
    assert torch.backends.mha.get_fastpath_enabled()


def test_an_expert_sees_its_own_tokens_and_one_without_goes_by_magnitude() -> None:
    torch.manual_seed(0)
    model = Experts()
    x = torch.randn(4, 60, 16)

    def some(x: Tensor, w: Tensor) -> Tensor:
        return torch.cat([x[0] @ w[0], x[1, :2] @ w[1], x[2] @ w[2]])  # two tokens for expert 1, none for expert 3

    layer, alone = Function(model.weight.detach().clone(), some), nn.Linear(16, 12, bias=False)
    with torch.no_grad():
        alone.weight.copy_(model.weight[2].T)
    ow.prune(alone, "2:4", [x[2]], solver=ow.SparseGPT())
    magnitude = ow.topn(model.weight[3].T.detach().abs(), ow.Pattern(2, 4)).T
    (told,) = ow.prune(layer, "2:4", [x], solver=ow.SparseGPT(), axis={"weight": 1}).layers
    torch.testing.assert_close(layer.weight[2], alone.weight.T)
    torch.testing.assert_close(layer.weight[3], model.weight[3] * magnitude)
    assert torch.equal(layer.weight[1], model.weight[1] * (layer.weight[1] != 0)), "two samples move no weight"
    assert told.samples == 2
    assert told.note == (
        "by Wanda: fewer samples than a 4th of its 16 inputs; 25% of it by magnitude: no calibration sample reached it"
    )


def test_a_product_that_cannot_be_read_is_told() -> None:
    torch.manual_seed(0)
    layer = nn.Bilinear(8, 8, 4)
    (told,) = ow.prune(layer, "2:4", [(torch.randn(9, 8), torch.randn(9, 8))], axis={"weight": 2}).layers
    assert told.note == "by magnitude: its inputs in operator _trilinear are not known"
    assert math.isnan(told.error)


def test_a_temporal_convolution_is_no_batch_of_products() -> None:
    """Also where it has as many steps as taps."""
    layer = Function(torch.randn(3, 16, 8), lambda x, w: torch.conv_tbc(x, w, torch.zeros(8), 1))
    (told,) = ow.prune(layer, "2:4", [torch.randn(3, 50, 16)], axis={"weight": 1}).layers
    assert told.note == "by magnitude: its inputs in operator conv_tbc are not known"
