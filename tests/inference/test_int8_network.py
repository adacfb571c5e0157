"""A network in int8 as a whole: bytes from layer to layer, a module like any other, float32 where int8 costs much."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from fake_times import say
from int8_nets import IMAGES, PATTERNS, TOKENS, Encoder, ResNet, network
from torch import nn

import openwork as ow
import openwork.kernels as kernels
from openwork.inference.int8_network import MOST_ERROR, int8_network
from openwork.inference.layers import PackedConv2d, PackedLinear
from openwork.inference.program import Filled, Product, Program, Ref, Step
from openwork.kernels.cpu import native
from openwork.nm.pattern import Pattern

pytestmark = pytest.mark.skipif(not kernels.vectors().dot_product, reason="needs AVX-512 with VBMI and VNNI")
ops = torch.ops.openwork
INT8 = {"pattern": "2:4", "weight_dtype": torch.int8}


@pytest.fixture
def int8_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, int8=0.1, sparse=0.5, dot_product=0.1, bytes=0.5)


def deployed(model: nn.Module, example: Any = IMAGES, **options: Any) -> Any:
    pattern = PATTERNS if isinstance(model, ResNet) else "2:4"
    given = {**INT8, "pattern": pattern, "calibrate": [example], "engine_seconds": 0, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return ow.deploy(model, example, **given)


def steps(fast: Any, function: Any) -> list[Any]:
    return [step for step in fast.forward.steps if step.function is function]


def products(fast: Any) -> list[Product]:
    return [step.function for step in fast.forward.steps if isinstance(step.function, Product)]


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@torch.no_grad()
def test_activations_stay_bytes_from_layer_to_layer(int8_wins: None) -> None:
    model = network(ResNet)
    fast = deployed(model)
    assert fast.deployment.returned == "int8 network"
    assert type(fast) is ResNet
    assert len(fast.deployment.chosen) == 6
    assert len(fast.deployment.network.chosen) == 6
    # One way in; out of the last convolution, and into the head.
    assert [len(steps(fast, each)) for each in (ops.to_bytes.default, ops.from_bytes.default)] == [2, 0]
    names = {id(each): name for name, each in fast.named_modules()}
    form = {names[id(each.layer)]: (each.whole[3], each.scales[1] > 0) for each in products(fast)}
    assert form == {
        "stem": (1, True),  # dense, on bytes all the same
        "blocks.0.conv1": (1, True),
        "blocks.0.conv2": (1, True),  # with the residual and the ReLU after it
        "blocks.1.conv1": (1, True),
        "blocks.1.conv2": (1, False),  # the mean reads floats
        "blocks.1.down.0": (0, True),  # a residual and nothing else
        "head": (0, False),
    }
    assert not any(step.function is torch.ops.aten.add.Tensor for step in fast.forward.steps)
    assert apart(fast(IMAGES), model(IMAGES)) < 0.05
    assert fast.deployment.network.error == pytest.approx(apart(fast(IMAGES), model(IMAGES)), rel=0.2)


@torch.no_grad()
def test_an_encoder_quantizes_what_layers_share_once(int8_wins: None) -> None:
    model = network(Encoder)
    fast = deployed(model, TOKENS)
    assert len(steps(fast, ops.to_bytes.default)) == 2  # query and key; what goes up
    assert [each.whole[3] for each in products(fast)] == [0, 0, 2, 0]
    found, expected = fast(mask=TOKENS["mask"], x=TOKENS["x"]), model(**TOKENS)
    assert list(found) == ["y"]
    assert apart(found["y"], expected["y"]) < 0.05


@torch.no_grad()
@pytest.mark.parametrize(("kind", "example"), [(ResNet, IMAGES), (Encoder, TOKENS)])
def test_kernels_and_references_give_the_same(
    kind: type[nn.Module], example: Any, int8_wins: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = deployed(network(kind), example)
    run = (lambda: fast(example)) if kind is ResNet else (lambda: fast(**example)["y"])
    found = run()
    monkeypatch.setattr("openwork.kernels.cpu.bytes.native.isa", lambda: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(found, run(), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2, 3, 0])
def test_any_batch(batch: int, int8_wins: None) -> None:
    for example in (IMAGES, IMAGES[:1]):
        fast = deployed(network(ResNet), example, calibrate=[IMAGES])
        three = torch.cat([IMAGES, IMAGES[:1]])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = fast(three[:batch])
        assert found.shape == (batch, 10)
        for i in range(batch):
            torch.testing.assert_close(found[i : i + 1], fast(three[i : i + 1]), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_what_it_was_not_made_for_runs_layer_by_layer_and_says_so(int8_wins: None) -> None:
    model = network(ResNet)
    fast = deployed(model)
    larger = torch.randn(2, 3, 16, 16)
    with pytest.warns(UserWarning, match=r"layer by layer.*an input is \(2, 3, 16, 16\), in the example"):
        found = fast(larger)
    assert apart(found, model(larger)) < 0.05
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast(larger)  # it is said once
    fast.forward.has_warned = False
    with pytest.warns(UserWarning, match="autocast"), torch.autocast("cpu", torch.bfloat16):
        fast(IMAGES)
    fast.forward.has_warned = False
    with pytest.warns(UserWarning, match="training mode"):
        fast.train()(IMAGES)
    fast.forward.has_warned = False
    with torch.enable_grad(), pytest.warns(UserWarning, match="requires grad"), pytest.raises(RuntimeError):
        fast.eval()(IMAGES.clone().requires_grad_())
    fast.forward.has_warned = False
    with pytest.warns(UserWarning, match="a layer was changed"):
        found = torch.func.functional_call(fast, {"head.weight": torch.zeros(10, 128)}, IMAGES)
    torch.testing.assert_close(found, fast.head.bias.expand(2, 10))


@torch.no_grad()
def test_it_is_copied_pickled_and_saved_like_a_model(int8_wins: None) -> None:
    model = network(ResNet)
    fast = deployed(model)
    expected = fast(IMAGES)
    again = pickle.loads(pickle.dumps(fast))
    copied = copy.deepcopy(fast)
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    for each in (again, copied, torch.load(file, weights_only=False)):
        assert isinstance(each.forward, Program)
        assert each.forward.model is each
        assert each.blocks[0].conv1 in each.forward.layers
        torch.testing.assert_close(each(IMAGES), expected, rtol=0, atol=0)
    assert list(fast.state_dict()) == list(model.state_dict())
    assert type(fast.blocks[0].conv1) is PackedConv2d
    assert type(fast.head) is PackedLinear
    torch.testing.assert_close(fast.blocks[0].conv1.weight.shape, model.blocks[0].conv1.weight.shape)
    with pytest.raises(ValueError, match="deploy"):
        ow.save(fast, io.BytesIO())


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))  # torch.save takes the second
def test_steps_of_any_arguments_are_pickled(protocol: int) -> None:
    clone, places = torch.ops.aten.clone.default, (Ref(0),)
    steps = [
        Step(Filled(clone, (Ref(0),), {"memory_format": torch.contiguous_format}, places), places, 1),
        Step(torch.ops.aten.mul.Tensor, (Ref(0), 2.0), 2),
        Step(Filled(torch.ops.aten.cat.default, ([Ref(0), Ref(0)], 1), {}, places), places, 3),
    ]
    again = pickle.loads(pickle.dumps(steps, protocol))
    x = torch.randn(4, 3).t()
    for step, other in zip(steps, again, strict=True):
        found, expected = ([x if arg == Ref(0) else arg for arg in each.args] for each in (other, step))
        result = other.function(*found)
        torch.testing.assert_close(result, step.function(*expected))
        assert result.stride() == step.function(*expected).stride()
        assert (other.to, other.last) == (step.to, step.last)


@pytest.mark.slow
@torch.no_grad()
def test_it_may_be_compiled_and_stays_what_it_is(int8_wins: None) -> None:
    fast = deployed(network(ResNet))
    torch.testing.assert_close(torch.compile(fast)(IMAGES), fast(IMAGES), rtol=0, atol=0)


@torch.no_grad()
def test_what_is_loaded_counts(int8_wins: None) -> None:
    model, other = network(ResNet), network(ResNet)
    other.head.weight.mul_(2)
    fast = deployed(model)
    before = fast(IMAGES)
    fast.load_state_dict(other.state_dict())
    assert apart(fast(IMAGES), other(IMAGES)) < 0.06 < 0.2 < apart(before, other(IMAGES))
    fast.head.weight = torch.zeros(10, 128)
    torch.testing.assert_close(fast(IMAGES), fast.head.bias.expand(2, 10), rtol=0, atol=0)


@torch.no_grad()
def test_a_layer_that_costs_much_stays_float32(int8_wins: None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    x, first = torch.randn(20, 64), model[0]
    x[:, :4] *= 1000  # some inputs are a thousand times what others are: one scale is for none
    first.weight[:, :4] /= 1000
    ow.project(model, "2:4")
    fast = deployed(model, x)
    found = fast.deployment.network
    assert found.errors["0"] > MOST_ERROR > found.error
    assert found.errors["2"] < MOST_ERROR
    assert list(found.float32) == ["0"]
    assert "it alone costs" in found.float32["0"]
    assert found.chosen == fast.deployment.chosen == {"2.weight": "dot_product"}
    assert "0 stays float32" in str(found)
    assert str(found) in str(fast.deployment)
    assert apart(fast(x), model(x)) == pytest.approx(found.error)


class Branches(ResNet):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x if x.sum() > 0 else x + 1)


@torch.no_grad()
def test_a_network_that_is_no_graph_runs_layer_by_layer(int8_wins: None) -> None:
    model = network(Branches)
    with pytest.warns(UserWarning, match=r"no int8 network, layer by layer instead: torch\.export does not take it"):
        fast = ow.deploy(model, IMAGES, pattern=PATTERNS, weight_dtype=torch.int8, calibrate=[IMAGES], engine_seconds=0)
    assert fast.deployment.returned.startswith("sparse")
    assert not isinstance(fast.__dict__.get("forward"), Program)
    assert "torch.export does not take it" in str(fast.deployment)


@torch.no_grad()
def test_what_is_faster_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, int8=0.6, sparse=0.5, dot_product=0.1)
    fast = deployed(network(ResNet))
    assert fast.deployment.returned.startswith("sparse")
    assert "forward" not in fast.__dict__
    assert "int8 network" in fast.deployment.whole
    assert len(fast.deployment.chosen) == 6  # without the stem, which is not sparse


@torch.no_grad()
def test_a_dense_layer_that_is_not_faster_on_bytes_stays_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, int8=0.1, bytes=1.0)
    model = network(ResNet)
    fast = deployed(model)
    assert type(fast.stem) is nn.Conv2d
    assert "stem" not in fast.deployment.network.errors
    assert [step.function for step in fast.forward.steps].count(fast.stem) == 1
    assert apart(fast(IMAGES), model(IMAGES)) < 0.05


@torch.no_grad()
def test_without_dot_products_it_says_so(int8_wins: None) -> None:
    before = native.isa()
    assert before is not None
    kernels.use_isa("avx2")
    try:
        model = network(ResNet)
        found, report = int8_network(model, IMAGES, {"head.weight": Pattern(2, 4)}, [IMAGES])
    finally:
        kernels.use_isa(before.name)
    assert found is None
    assert "this CPU has no dot products" in report.reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_dtype": torch.float32}, "weight_dtype=torch.float32 on cpu; it is for weight_dtype=torch.int8"),
        ({"calibrate": []}, "at least one"),
        ({"calibrate": IMAGES}, "needed a list of examples"),
        ({"calibrate": [torch.randn(2, 5, 12, 12)]}, "a batch does not fit the example"),
    ],
)
def test_calibration_that_makes_no_sense_is_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        deployed(network(ResNet), **options)


@torch.no_grad()
def test_batches_that_are_not_finite_leave_layers_in_float32(int8_wins: None) -> None:
    bad = IMAGES.clone()
    bad[0, 0, 0, 0] = torch.nan
    with pytest.warns(UserWarning, match="no int8 network"):
        fast = ow.deploy(
            network(ResNet), IMAGES, pattern=PATTERNS, weight_dtype=torch.int8, calibrate=[bad], engine_seconds=0
        )
    assert fast.deployment.network.reason
