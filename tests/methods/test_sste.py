"""S-STE: its equations against a definition by sorting, its frozen scale, and what becomes of both."""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import openwork as ow
from openwork.methods import Phase
from openwork.methods.sste import soft_threshold
from openwork.nm.groups import Axis, to_rows

torch.set_num_threads(1)

LR, MOMENTUM = 0.1, 0.9


def by_sorting(group, n):
    """S(w) of one group, weight by weight, from the paper's words."""
    short = sorted(abs(w) for w in group)
    threshold = short[len(group) - n - 1] if len(group) > n else 0.0
    return [0.0 if abs(w) <= threshold else (abs(w) - threshold) * (1 if w > 0 else -1) for w in group]


def soft_by_sorting(rows, n, m):
    return torch.tensor(
        [[x for i in range(0, len(row), m) for x in by_sorting(row[i : i + m], n)] for row in rows.tolist()],
        dtype=rows.dtype,
    )


def scale_by_hand(weight, soft):
    return float((weight.double() * soft.double()).sum() / soft.double().square().sum())


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 8), m=st.integers(1, 8), K=st.integers(1, 17), ties=st.booleans(), seed=st.integers(0, 99))
def test_the_threshold_is_the_largest_magnitude_that_goes(n, m, K, ties, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, K, generator=generator, dtype=torch.float64)
    weight = (weight * 2).round() if ties else weight
    phase = Phase(ow.Pattern(min(n, m), m), Axis(1))
    method = ow.SSTE()
    soft = soft_threshold(weight, method.mask(method.score(weight, {}), phase), phase)
    # A short group keeps its N largest as well: as if weights of 0 filled it up.
    filled = nn.functional.pad(weight, (0, -K % m))
    assert torch.equal(soft, soft_by_sorting(filled, phase.pattern.n, m)[:, :K])
    assert not torch.signbit(soft[soft == 0]).any()


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "1:16", "3:8"])
@pytest.mark.parametrize(
    ("make", "axis"),
    [(lambda: nn.Linear(32, 4), Axis(1)), (lambda: nn.Conv2d(16, 4, 3), Axis(1))],
    ids=["linear", "conv"],
)
def test_a_layer_multiplies_with_scaled_soft_weights(make, axis, pattern):
    layer, wanted = make().double(), ow.Pattern.parse(pattern)
    weight = layer.weight.detach().clone()
    ow.sparsify(layer, pattern, ow.SSTE())
    rows = to_rows(weight, axis)
    soft = soft_by_sorting(rows.reshape(-1, rows.shape[-1]), wanted.n, wanted.m).view(rows.shape)
    found = to_rows(layer.weight.detach(), axis)
    torch.testing.assert_close(found, scale_by_hand(rows, soft) * soft, rtol=1e-14, atol=0)
    assert ow.verify(layer).sparse == {"weight": wanted}


def test_the_scale_brings_the_soft_weights_nearest_to_the_weights():
    layer = nn.Linear(64, 8)
    weight = layer.weight.detach().clone()
    ow.sparsify(layer, "2:4", ow.SSTE())
    soft, scale = layer.weight.detach() / layer.weight_scale, float(layer.weight_scale)
    errors = [float((weight - factor * scale * soft).square().sum()) for factor in (0.99, 1.0, 1.01)]
    assert min(errors) == errors[1]
    assert scale > 1


def test_with_equal_magnitudes_fewer_than_n_are_left():
    layer = nn.Linear(4, 3, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -1.0, 1.0, 5.0], [2.0, 2.0, 2.0, -2.0], [0.0, 0.0, 0.0, 3.0]]))
    ow.sparsify(layer, "2:4", ow.SSTE())
    assert (layer.weight != 0).tolist() == [[False, False, False, True], [False] * 4, [False, False, False, True]]
    ow.verify(layer)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
def test_weights_that_are_all_equal_have_a_finite_scale(value):
    layer = nn.Linear(8, 8)
    nn.init.constant_(layer.weight, value)
    ow.sparsify(layer, "2:4", ow.SSTE())
    assert layer.weight_scale == 1
    assert not layer.weight.any()
    layer(torch.ones(1, 8)).sum().backward()
    assert torch.equal(layer.parametrizations.weight.original.grad, torch.ones(8, 8))


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e-25), (torch.float32, 1e25), (torch.float16, 2e3)])
def test_the_scale_depends_on_no_size_of_the_weights(dtype, size):
    layer, other = nn.Linear(16, 8), nn.Linear(16, 8)
    with torch.no_grad():
        other.weight.copy_(layer.weight * size)
    ow.sparsify(layer, "2:4", ow.SSTE())
    ow.sparsify(other := other.to(dtype), "2:4", ow.SSTE())
    assert float(other.weight_scale) == pytest.approx(float(layer.weight_scale), rel=2e-3)


class ByHand(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, scale):
        return scale * soft_by_sorting(weight, 2, 4)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def batches(start, stop):
    return [
        torch.randn(4, 8, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(start, stop)
    ]


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)


def train(model, optimizer, data):
    for x in data:
        optimizer.zero_grad()
        (model(x) - 3).square().mean().backward()
        optimizer.step()


def test_trains_as_its_equations_say():
    plain, model = net(), net()
    ow.sparsify(model, "2:4", ow.SSTE())  # it adds nothing to the step, so nothing is attached
    train(model, sgd(model), batches(0, 12))
    optimizer = sgd(plain)
    scales = [scale_by_hand(w, soft_by_sorting(w, 2, 4)) for w in (plain[0].weight.detach(), plain[2].weight.detach())]
    for x in batches(0, 12):
        optimizer.zero_grad()
        first, second = (ByHand.apply(plain[i].weight, scale) for i, scale in zip((0, 2), scales, strict=True))
        hidden = nn.functional.linear(x, first, plain[0].bias).tanh()
        (nn.functional.linear(hidden, second, plain[2].bias) - 3).square().mean().backward()
        optimizer.step()
    for i in (0, 2):
        torch.testing.assert_close(model[i].parametrizations.weight.original, plain[i].weight, rtol=1e-13, atol=1e-14)


def test_a_resumed_run_is_the_run_that_was_not_interrupted():
    whole, model, resumed = net(), net(), net(seed=1)
    for each in (whole, model, resumed):
        ow.sparsify(each, "2:4", ow.SSTE())
    train(whole, sgd(whole), batches(0, 8))
    optimizer = sgd(model)
    train(model, optimizer, batches(0, 3))
    torch.save([model.state_dict(), optimizer.state_dict()], file := io.BytesIO())
    file.seek(0)
    state, moments = torch.load(file, weights_only=True)
    resumed.load_state_dict(state)
    optimizer = sgd(resumed)
    optimizer.load_state_dict(moments)
    train(resumed, optimizer, batches(3, 8))
    assert all(map(torch.equal, resumed.state_dict().values(), whole.state_dict().values()))


def test_the_finished_model_has_the_scale_in_its_weights(tmp_path):
    model, x = net(), batches(0, 1)[0]
    ow.sparsify(model, "2:4", ow.SSTE())
    train(model, sgd(model), batches(0, 3))
    output = model(x)
    ow.save(model, tmp_path / "net.safetensors")
    finished = ow.finalize(copy.deepcopy(model))
    assert torch.equal(finished(x), output)
    assert list(finished.state_dict()) == list(net().state_dict())
    ow.verify(finished, x, pattern="2:4")
    again = net(seed=1)
    ow.sparsify(again, "2:4", ow.SSTE())
    ow.load(tmp_path / "net.safetensors", again)  # pruned weights have a threshold of 0: the scale is 1
    assert torch.equal(again(x), output)


def test_a_model_that_gets_its_values_later_has_the_scale_of_those():
    with torch.device("meta"):
        model = nn.Linear(8, 8)
        ow.sparsify(model, "2:4", ow.SSTE())
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    nn.init.normal_(model.parametrizations.weight.original)
    twin = nn.Linear(8, 8)
    with torch.no_grad():
        twin.weight.copy_(model.parametrizations.weight.original)
    ow.sparsify(twin, "2:4", ow.SSTE())
    assert torch.equal(model.state_dict()["weight_scale"], twin.weight_scale)
    assert torch.equal(model.weight, twin.weight)
    model(torch.ones(1, 8))
    with torch.no_grad():
        model.parametrizations.weight.original.mul_(2).clamp_(max=1)
    assert torch.equal(model.weight_scale, twin.weight_scale)  # frozen since the first forward


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_scale_stays_when_the_model_changes_its_dtype(dtype):
    model = nn.Linear(32, 8)
    ow.sparsify(model, "2:4", ow.SSTE())
    with torch.no_grad():
        model.parametrizations.weight.original.pow_(3)  # so that a new scale would be another
    scale = model.weight_scale.clone()
    model.to(dtype)
    assert torch.equal(model.weight_scale, scale.to(dtype))
    assert model(torch.ones(1, 32, dtype=dtype)).dtype == dtype
    assert torch.equal(model.weight_scale, scale.to(dtype))


def test_a_pruned_network_does_not_start_from_its_dense_weights():
    model = net()
    dense = copy.deepcopy(model)
    ow.project(model, "2:4")
    with pytest.raises(ValueError, match=r"dense= with SSTE\(\), which multiplies with something else"):
        ow.sparsify(model, "2:4", ow.SSTE(), dense=dense)
