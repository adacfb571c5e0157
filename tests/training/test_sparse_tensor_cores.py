"""Accelerated training: the same steps as without, through packed products of 2:4 matrices, forward and backward."""

import copy
import dataclasses
import pickle
import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import openwork as ow
from openwork.files.packing import pack_weight, unpack_weight
from openwork.kernels.cuda import algorithm_cache
from openwork.nm.groups import Axis
from openwork.nm.masks import kept_per_group
from openwork.training import accelerated_linear
from openwork.training import sparse_tensor_cores as module

PATTERN = ow.Pattern(2, 4)
COUNTS = {"pack": 0, "multiply": 0}


@dataclass(frozen=True)
class OnCPU:
    """Values and indices, as a sparse tensor core has them; packing refuses what is not 2:4 along the last axis."""

    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64, torch.bfloat16)

    def pack(self, weight):
        COUNTS["pack"] += 1
        weight = weight.contiguous()
        assert int(kept_per_group(weight, PATTERN, Axis(1)).max()) <= 2
        return (*pack_weight(weight, PATTERN, Axis(1)), tuple(weight.shape))

    def multiply(self, x, packed, bias):
        COUNTS["multiply"] += 1
        values, indices, shape = packed
        return nn.functional.linear(x, unpack_weight(values, indices, PATTERN, Axis(1), shape), bias)


def net(method=None, pattern="2:4"):
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 10))
    ow.sparsify(made, pattern, method or ow.TransposableSRSTE(decay=0.5, refresh_every=2))
    return made


def accelerated(model, example=None, engine=OnCPU()):
    return module.accelerate_with(engine, model, module._layers(model), example)


def batches(steps=5, dtype=torch.float32):
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(8, 32, generator=draw).to(dtype) for _ in range(steps)]


def trained(model, forward=None, parts=1):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    ow.attach(optimizer, model)
    for x in batches():
        optimizer.zero_grad()
        for part in x.chunk(parts):
            ((forward or model)(part).square().mean() / parts).backward()
        optimizer.step()
    return model.state_dict()


def close(a, b, tolerance=1e-5):
    return a.keys() == b.keys() and all(torch.allclose(a[name].float(), b[name].float(), atol=tolerance) for name in a)


@pytest.mark.parametrize("parts", [1, 2])
def test_it_trains_as_without(parts):
    plain, fast = net(), net()
    report = accelerated(fast)
    assert list(report.sparse) == ["0.weight", "2.weight"]
    assert report.dense == {}
    COUNTS.update(pack=0, multiply=0)
    assert close(trained(plain, parts=parts), trained(fast, parts=parts))
    # 5 steps: forward and transpose of two layers, but the first layer's input wants no gradient; packed once a step
    assert {"pack": 5 * 3, "multiply": 5 * 3 * parts} == COUNTS


def test_the_term_and_the_refresh_matter_here():
    kept = trained(net(ow.TransposableSRSTE(decay=0.5, refresh_every=100)))
    assert not close(kept, trained(net()), 1e-4)
    assert not close(trained(net(ow.TransposableSRSTE(0.0, 2))), trained(net()), 1e-4)


def test_gradients_of_input_weight_and_bias():
    plain, fast = net(), net()
    accelerated(fast)
    x, y = (torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(2)).requires_grad_() for _ in range(2))
    plain(x).sum().backward()
    fast(y).sum().backward()
    assert torch.allclose(x.grad, y.grad, atol=1e-6)
    for a, b in zip(plain.parameters(), fast.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6)


def test_recomputed_forwards_share_what_was_packed():
    fast = net()
    accelerated(fast)
    COUNTS.update(pack=0)
    checkpoint(fast, batches()[0].requires_grad_(), use_reentrant=False).sum().backward()
    assert COUNTS["pack"] == 4


def test_a_changed_weight_is_packed_again():
    fast, x = net(), batches()[0]
    accelerated(fast)
    with torch.no_grad():
        before = fast(x)
        fast[0].parametrizations.weight.original.mul_(2)
        fast[0].bias.mul_(2)
    assert torch.allclose(
        fast[:2](x), 2 * nn.functional.relu(nn.functional.linear(x, fast[0].weight / 2, fast[0].bias / 2))
    )
    assert not torch.allclose(fast(x), before)


def test_under_autocast_the_products_are_bfloat16():
    plain, fast = net(), net()
    accelerated(fast, engine=OnCPU((torch.bfloat16,)))
    with torch.autocast("cpu", torch.bfloat16):
        a, b = plain(batches()[0]), fast(batches()[0])
    assert b.dtype == torch.bfloat16
    assert torch.allclose(a.float(), b.float(), atol=2e-2)
    b.sum().backward()
    assert fast[0].parametrizations.weight.original.grad.dtype == torch.float32


def test_a_dtype_that_tensor_cores_do_not_take_runs_dense_and_says_so_once():
    plain, fast = net(), net()
    accelerated(fast, engine=OnCPU((torch.bfloat16,)))
    with pytest.warns(UserWarning, match="float32, which sparse tensor cores do not take"):
        y = fast(batches()[0])
    assert torch.equal(y, plain(batches()[0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast(batches()[0])


def test_copies_are_accelerated_and_finalize_ends_it():
    fast, x = net(), batches()[0]
    accelerated(fast)
    y = fast(x)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        COUNTS.update(multiply=0)
        assert torch.equal(twin(x), y)
        assert COUNTS["multiply"] == 2
    ow.verify(fast, x)
    ow.finalize(fast)
    assert type(fast[0]) is nn.Linear
    assert torch.allclose(fast(x), y)


def test_it_compiles_around_the_products():
    plain, fast = net(), net()
    accelerated(fast)
    assert close(trained(plain), trained(fast, torch.compile(fast, backend="eager")))


def test_with_an_example_each_layer_is_timed(monkeypatch):
    times = iter([3.0, 2.0, 2.0, 3.0])  # dense, sparse of the first layer, then of the second

    def clock(device):
        assert device == torch.device("cpu")
        return lambda variants: {name: (each(), next(times))[1] for name, each in variants.items()}

    monkeypatch.setattr(module, "clock", clock)
    fast = net()
    report = accelerated(fast, batches()[0])
    assert report.sparse == {"0.weight": (3.0, 2.0)}
    assert report.dense == {"2.weight": "sparse is slower: 0.67 x dense"}
    assert "1 layer trains on sparse tensor cores, 1 dense" in str(report)
    assert "1.50 x dense" in str(report)
    assert type(fast[0]).__name__ == "AcceleratedLinear"
    assert type(fast[2]).__name__ == "ParametrizedLinear"


def test_in_a_captured_graph_packing_is_part_of_each_matmul(monkeypatch):
    """Replays change weights unseen, so what was packed before a capture, or since, is not trusted."""
    fast, x = net(), batches()[0]
    accelerated(fast)
    matmul = fast[0].__dict__["_openwork_matmul"]
    fast(x), fast(x)
    COUNTS.update(pack=0)
    fast(x)
    assert COUNTS["pack"] == 0
    monkeypatch.setattr(accelerated_linear, "capturing", lambda tensor: True)
    fast(x)
    monkeypatch.setattr(accelerated_linear, "capturing", lambda tensor: False)
    before = COUNTS["pack"]
    fast(x)
    assert (before, COUNTS["pack"]) == (3, 6)  # two layers, and one again for the gradient of its input
    assert copy.deepcopy(matmul).captured is False


def test_layers_that_do_not_fit_say_why():
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Linear(32, 20), nn.Linear(32, 16), nn.Linear(32, 32))
    ow.sparsify(model, {"3": "4:8", "*": "2:4"}, ow.TransposableSRSTE())
    report = accelerated(model)
    assert list(report.sparse) == ["2.weight"]
    assert report.dense == {
        "0.weight": "Conv2d: only nn.Linear is accelerated",
        "1.weight": "shape (20, 32): needed multiples of 16",
        "3.weight": "4:8 is not within 2:4",
    }


def test_on_a_cpu_it_says_what_is_missing_and_that_training_works():
    with pytest.raises(RuntimeError, match=r"the model is on cpu: .*training runs without ow.accelerate"):
        ow.accelerate(net())


def test_wrong_models_are_refused():
    with pytest.raises(ValueError, match="not sparsified"):
        ow.accelerate(nn.Linear(16, 16))
    with pytest.raises(ValueError, match="masks are not transposable"):
        ow.accelerate(net(ow.SRSTE()))
    with pytest.raises(ValueError, match=r"no layer that can be accelerated:\n  0\.weight: 4:8 is not within 2:4"):
        ow.accelerate(net(pattern={"0": "4:8"}))


def test_torch_s_own_operators_are_called_as_they_want_it(monkeypatch):
    """No GPU: in place of cuSPARSELt's operators those of `OnCPU`, where torch's private ones are named."""
    stand_in, searched = OnCPU((torch.bfloat16,)), []

    def product(x, packed, meta, bias, outputs, algorithm, out):
        assert (algorithm, out) == ((7, 2, 1), torch.bfloat16)
        return stand_in.multiply(x, packed_parts[packed], bias)

    def pack(weight):
        assert weight.is_contiguous()
        made = torch.empty(weight.numel() * 9 // 16, dtype=weight.dtype)
        packed_parts[made] = stand_in.pack(weight)
        return made, None

    packed_parts = {}
    backend = dataclasses.replace(
        module.BACKENDS["cusparselt"],
        pack=pack,
        product=product,
        search=lambda *found: (searched.append(found), (7, 2, 1))[1],
        missing=lambda device: "",
    )
    monkeypatch.setitem(module.BACKENDS, "cusparselt", backend)
    monkeypatch.setattr(algorithm_cache, "read", lambda file: {})
    monkeypatch.setattr(algorithm_cache, "add", lambda *entry: None)
    monkeypatch.setattr(module.SparseTensorCores, "check", lambda self, weight: None)
    plain, fast = net(), net()
    assert list(ow.accelerate(fast).sparse) == ["0.weight", "2.weight"]
    for model in (plain, fast):
        with torch.autocast("cpu", torch.bfloat16):
            trained(model)
    assert close(plain.state_dict(), fast.state_dict(), 2e-2)
    assert len(searched) == 3  # two layers forward, and one input that wants a gradient; once for all steps
