"""A deployed layer is a module like the one whose place it takes: its class, attributes, parameters, dtypes, state."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import openwork as ow
import openwork.inference.deploy as deploying
from openwork.inference.layers import PackedLayer, pack_layer
from openwork.layouts.layout import kind_named

P24 = ow.Pattern(2, 4)
MADE: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Linear(64, 48), torch.randn(5, 64)),
    "no bias": (lambda: nn.Linear(64, 48, bias=False), torch.randn(5, 64)),
    "conv1d": (lambda: nn.Conv1d(8, 6, 3, stride=2, padding=1), torch.randn(2, 8, 9)),
    "conv2d": (lambda: nn.Conv2d(8, 6, (3, 1), stride=2, padding=(1, 0), dilation=2), torch.randn(2, 8, 9, 9)),
    "grouped": (lambda: nn.Conv2d(16, 6, 3, groups=2, bias=False), torch.randn(2, 16, 9, 9)),
}


def pair(name: str, kind: str = "gemm", dtype: torch.dtype = torch.float32, stored: Any = None) -> tuple[Any, Any]:
    layer = MADE[name][0]().to(dtype)
    ow.project(layer, P24)
    layer = layer.eval().requires_grad_(False)
    return layer, pack_layer(layer, P24, kind_named(kind), stored or dtype)


@pytest.mark.parametrize("name", MADE)
def test_class_and_attributes(name: str) -> None:
    dense, fast = pair(name)
    dense.told_by_somebody = "kept"
    fast = pack_layer(dense, P24, kind_named("gemm"), torch.float32)
    assert isinstance(fast, type(dense))
    for attribute, value in vars(dense).items():
        if not attribute.startswith("_"):
            assert getattr(fast, attribute) == value, attribute
    assert dense.extra_repr() == fast.extra_repr()
    assert (fast.bias is None) == (dense.bias is None)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MADE)
def test_parameters(name: str, dtype: torch.dtype, stored: torch.dtype) -> None:
    dense, fast = pair(name, dtype=dtype, stored=stored)
    form = [(key, p.shape, p.dtype, p.device, p.requires_grad, type(p)) for key, p in dense.named_parameters()]
    found = [(key, p.shape, p.dtype, p.device, p.requires_grad, nn.Parameter) for key, p in fast.named_parameters()]
    assert form == found
    assert all(isinstance(p, nn.Parameter) for p in fast.parameters())
    assert sum(p.numel() for p in fast.parameters()) == sum(p.numel() for p in dense.parameters())
    assert fast.weight.dtype == dtype
    assert fast.weight.shape == dense.weight.shape
    assert torch.equal(fast.weight == 0, dense.weight == 0) or stored == torch.int8
    if stored == dtype:
        assert torch.equal(fast.weight, dense.weight)
        assert fast.weight.detach().abs().sum() == dense.weight.abs().sum()


@pytest.mark.parametrize("name", ["linear", "no bias"])
def test_weights_that_are_written(name: str) -> None:
    """Nothing that is written is lost: it is packed, or an error."""
    dense, fast = pair(name)
    x = MADE[name][1]
    fast.weight = nn.Parameter(dense.weight * 2)
    torch.testing.assert_close(fast(x), nn.functional.linear(x, dense.weight * 2, dense.bias))
    writes: tuple[Callable[[], object], ...] = (
        lambda: fast.weight.data.normal_(),
        lambda: fast.weight.copy_(dense.weight),
        lambda: fast.weight.add_(1),
        lambda: fast.weight.__setitem__(0, 0.0),
        lambda: nn.init.kaiming_uniform_(fast.weight),
        lambda: torch.add(dense.weight, 1, out=fast.weight),
        lambda: setattr(fast.weight, "data", dense.weight),
        fast.reset_parameters,
    )
    before = fast(x)
    for write in writes:
        with pytest.raises(TypeError, match="weight of a deployed layer, which is packed"):
            write()
    for wrong in (torch.zeros(3, 3), None, torch.ones_like(dense.weight)):  # shape, kind, pattern
        with pytest.raises(ValueError, match="weight"):
            fast.weight = wrong
    assert torch.equal(fast(x), before)
    if fast.bias is not None:
        fast.bias.data.add_(1)
        torch.testing.assert_close(fast(x), before + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["linear", "no bias", "conv1d", "conv2d"])
def test_dtypes_are_the_dense_layers(name: str, given: torch.dtype, autocast: Any, dtype: torch.dtype) -> None:
    dense, fast = pair(name, dtype=dtype)
    x = MADE[name][1].to(given)
    with torch.no_grad(), torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        try:
            expected = dense(x)
        except RuntimeError:
            with pytest.raises(TypeError, match=r"input of torch\.\w+ for a layer in torch\."):
                fast(x)
            return
        found = fast(x)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("kind", ["gemm", "gemv"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts(dtype: torch.dtype, kind: str) -> None:
    dense, fast = pair("linear", kind)
    x = MADE["linear"][1]
    model, plain = (
        nn.Sequential(copy.deepcopy(fast), nn.ReLU()).to(dtype),
        nn.Sequential(copy.deepcopy(dense)).to(dtype),
    )
    assert {p.dtype for p in model.parameters()} == {dtype}
    torch.testing.assert_close(model[0](x.to(dtype)), plain(x.to(dtype)), atol=0.02, rtol=0.02)
    assert torch.equal(model[0].weight, plain[0].weight)
    back = model.float()
    assert back(x).dtype == torch.float32
    assert {p.dtype for p in back.parameters()} == {torch.float32}
    assert fast(x).dtype == torch.float32  # the copy it was made of
    for move in (fast.double, lambda: fast.to("meta")):
        with pytest.raises(TypeError, match=r"PackedLinear is packed for cpu in torch\.float32: convert or move"):
            move()
    assert fast.share_memory().packed.values.is_shared()
    assert torch.equal(fast.to(memory_format=torch.channels_last)(x), fast(x))


@pytest.mark.parametrize("name", MADE)
def test_copies_pickles_and_programs(name: str) -> None:
    dense, fast = pair(name)
    x = MADE[name][1]
    y, file = fast(x), io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    made = {
        "copy": copy.copy(fast),
        "deepcopy": copy.deepcopy(fast),
        "pickle": pickle.loads(pickle.dumps(fast)),
        "torch.save": torch.load(file, weights_only=False),
    }
    if name in ("no bias", "conv2d"):
        made["compile"] = torch.compile(fast, backend="aot_eager")
        made["export"] = torch.export.export(fast, (x,)).module()
    for each in made.values():
        torch.testing.assert_close(each(x), y)
    assert [key for key, _ in made["pickle"].named_parameters()] == [key for key, _ in dense.named_parameters()]
    assert torch.equal(copy.deepcopy(fast.weight), fast.weight)
    assert torch.equal(pickle.loads(pickle.dumps(fast.weight)), fast.weight)
    assert str(fast).startswith(type(fast).__name__)


def test_code_that_asks_a_layer_while_it_is_compiled() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(64, 48)

        def forward(self, x: Tensor) -> Tensor:
            x = x.to(self.head.weight.dtype).to(next(self.parameters()).device)
            return self.head(x)[..., : self.head.out_features]

    net = Asks().eval().requires_grad_(False)
    ow.project(net, P24)
    x = torch.randn(5, 64)
    expected = net(x)
    net.head = pack_layer(net.head, P24, kind_named("gemm"), torch.float32)
    torch.testing.assert_close(net(x), expected)
    torch.testing.assert_close(torch.compile(net, backend="aot_eager")(x), expected)
    torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), expected)


def test_gradients_are_refused_and_other_weights_are_taken() -> None:
    dense, fast = pair("linear")
    x, other = torch.randn(5, 64), torch.randn(48, 64)
    found = torch.func.functional_call(fast, {"weight": other}, (x,))
    torch.testing.assert_close(found, nn.functional.linear(x, other, dense.bias))
    with pytest.raises(RuntimeError, match="is for inference, and its input requires grad"):
        fast(x.clone().requires_grad_())
    fast.requires_grad_(True)
    with pytest.raises(RuntimeError, match="is for inference, and its weight requires grad"):
        fast(x)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), dense(x))
    fast.requires_grad_(False)
    calls: list[int] = []
    fast.register_forward_hook(lambda *_: calls.append(1))
    fast.apply(lambda module: module)
    fast(x)
    assert calls == [1]


def test_states_go_both_ways() -> None:
    for name in MADE:
        dense, fast = pair(name)
        other, x = MADE[name][0](), MADE[name][1]
        assert list(fast.state_dict()) == list(dense.state_dict())
        assert not any(type(each) is not Tensor for each in fast.state_dict().values())
        other.load_state_dict(fast.state_dict())
        torch.testing.assert_close(other(x), fast(x), atol=1e-5, rtol=1e-5)
        ow.project(other, P24)
        again = pair(name)[1]
        assert not again.load_state_dict(other.state_dict(), assign=True).missing_keys
        assert torch.equal(again(x), fast(x))
        with pytest.raises(RuntimeError, match="Missing key"):
            fast.load_state_dict({})


# --- whole models -----------------------------------------------------------------------------------------------------


class Normed(nn.Module):
    """Convolutions with and without a bias before normalizations with and without parameters, one in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32)
        self.second, self.plain = nn.Conv2d(32, 32, 3, bias=False), nn.BatchNorm2d(32, affine=False, eps=1e-3)
        self.third, self.last = nn.Conv2d(32, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.also = self.third
        self.head, self.normed = nn.Linear(16, 8, bias=False), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.last(self.third(self.plain(self.second(x)))))
        return self.normed(self.head(x.mean((2, 3))))


def trained() -> Normed:
    net = Normed()
    for _ in range(5):
        net(3 * torch.randn(4, 16, 8, 8) + 1)
    for each in net.modules():
        if isinstance(each, nn.BatchNorm2d | nn.BatchNorm1d) and each.affine:
            nn.init.uniform_(each.weight, 0.5, 2)
            each.weight.data[::2] *= -1  # zeros times these are -0.0, which files take for weights
            nn.init.normal_(each.bias)
    ow.project(net.eval(), P24)
    return net


@pytest.mark.parametrize("wins", ["sparse", "dense"])
def test_the_state_of_a_model_with_folded_normalizations(
    wins: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(deploying, "_winner", lambda whole: wins)
    monkeypatch.setattr("openwork.inference.choose.MARGIN", 1e9)
    net, other, x = trained(), trained(), torch.randn(4, 16, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast, second = ow.deploy(net, x, pattern=P24), ow.deploy(other, x, pattern=P24)
    assert any(isinstance(each, PackedLayer) for each in fast.modules()) == (wins == "sparse")
    close = {"atol": 1e-5, "rtol": 1e-4}
    with torch.no_grad():
        expected, y = net(x), fast(x)
        torch.testing.assert_close(y, expected, **close)
        state = fast.state_dict()
        assert {k: (v.shape, v.dtype) for k, v in state.items()} == {
            k: (v.shape, v.dtype) for k, v in net.state_dict().items()
        }
        assert list(state) == list(net.state_dict())
        for strict in (True, False):  # into the plain model, also a trained one
            plain = trained().eval()
            plain.load_state_dict(state, strict=strict)
            torch.testing.assert_close(plain(x), expected, **close)
        second.load_state_dict(state)  # into another deployed one: what was written, exactly
        assert torch.equal(second(x), y)
        second.load_state_dict(other.state_dict())  # of the plain model: folded anew
        torch.testing.assert_close(second(x), other(x), **close)
        for copied in (copy.deepcopy(second), pickle.loads(pickle.dumps(second))):
            copied.load_state_dict(net.state_dict())
            torch.testing.assert_close(copied(x), expected, **close)
        outer = nn.ModuleDict({"net": second})  # a part of another model
        outer.load_state_dict({f"net.{key}": each for key, each in net.state_dict().items()})
        torch.testing.assert_close(second(x), expected, **close)
    with pytest.raises(RuntimeError, match="was folded into"):
        second.load_state_dict(
            {key: each for key, each in net.state_dict().items() if "running" not in key}, strict=False
        )
    assert [name for name, _ in fast.named_parameters() if "norm" in name] == [
        name for name, _ in net.named_parameters() if "norm" in name
    ]
    if wins == "dense":
        ow.save(fast, tmp_path / "net.safetensors", pattern=P24)
        loaded = ow.load(tmp_path / "net.safetensors", Normed().eval())
        torch.testing.assert_close(loaded(x), expected, **close)
        with pytest.raises(ValueError, match=r"4 batch normalizations of the model are folded \(norm, \.\.\.\)"):
            ow.load(tmp_path / "net.safetensors", fast)


def test_models_that_ask_their_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploying, "_winner", lambda whole: "sparse")
    monkeypatch.setattr("openwork.inference.choose.MARGIN", 1e9)
    net = nn.Sequential(nn.Linear(64, 64, bias=False), nn.ReLU(), nn.Linear(64, 32, bias=False)).eval()
    ow.project(net, P24)
    fast = ow.deploy(net, torch.randn(4, 64), pattern=P24)
    assert all(isinstance(each, PackedLayer) for each in (fast[0], fast[2]))
    first = next(fast.parameters())
    assert (first.device, first.dtype) == (torch.device("cpu"), torch.float32)
    assert sum(p.numel() for p in fast.parameters()) == sum(p.numel() for p in net.parameters())
    assert [each for each in fast.modules() if isinstance(each, nn.Linear)] == [fast[0], fast[2]]
