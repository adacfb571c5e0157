"""MaxQ: its queries against loops over single weights, its ramp, and the finished weights."""

import copy
import io
import math

import pytest
import torch
from torch import nn

import openwork as ow

torch.set_num_threads(1)

TAU, STEPS, DECAY, LR = 0.01, 6, 0.5, 0.05


def queried(values, n, m):
    """What each of a set of magnitudes is raised by: from the paper's words, one by one."""
    cut = len(values) * (m - n) // m
    if cut == 0:
        return [0.0] * len(values)
    ranked = sorted(range(len(values)), key=lambda i: (-values[i], i))
    top = ranked[: len(values) - cut]
    threshold = (values[ranked[len(top) - 1]] + values[ranked[len(top)]]) / 2
    return [1 / (1 + math.exp(-(v - threshold) / TAU)) if i in top else 0.0 for i, v in enumerate(values)]


def query_by_hand(weight, n, m, out=0):
    """1 + q_filter + q_kernel of a weight whose outputs lie along `out`."""
    w = weight.detach().abs().double().movedim(out, 0)
    result = torch.ones_like(w)
    for o in range(w.shape[0]):
        result[o] += torch.tensor(queried(w[o].flatten().tolist(), n, m), dtype=w.dtype).view(w[o].shape)
    if w.ndim > 2 and w.shape[2:].numel() > 1:
        flat, spots = result.flatten(2), w.flatten(2)
        for position in range(spots.shape[2]):
            here = spots[:, :, position]
            flat[:, :, position] += torch.tensor(queried(here.flatten().tolist(), n, m), dtype=w.dtype).view(here.shape)
        result = flat.view(w.shape)
    return result.movedim(0, out)


def keep(weight, n, m, dim, dense=0.0):
    """The N:M mask along `dim`, all True in so large a share of the groups, those with the smallest sums."""
    rows = weight.detach().abs().movedim(dim, -1)
    groups = rows.reshape(-1, m).tolist()
    smallest = sorted(range(len(groups)), key=lambda i: sum(groups[i]))[: int(dense * len(groups))]
    mask = []
    for g, group in enumerate(groups):
        top = sorted(range(m), key=lambda i: (-group[i], i))[:n]
        mask.append([g in smallest or i in top for i in range(m)])
    return torch.tensor(mask).view(rows.shape).movedim(-1, dim)


LAYERS = {
    "linear": (lambda: nn.Linear(16, 6), 0),
    "conv": (lambda: nn.Conv2d(8, 4, 3), 0),
    "1x1 conv": (lambda: nn.Conv2d(8, 4, 1), 0),
    "transposed conv": (lambda: nn.ConvTranspose2d(8, 4, 2), 1),
}


@pytest.mark.parametrize("done", [0, 2, STEPS])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 8), (4, 4)])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_multiplies_with_queried_weights(name, n, m, done):
    make, out = LAYERS[name]
    torch.manual_seed(0)
    layer = make().double()
    weight = layer.weight.detach().clone()
    ow.sparsify(layer, f"{n}:{m}", ow.MaxQ(STEPS))
    layer.parametrizations.weight[0].go_to(done)
    mask = keep(weight, n, m, 1 - out, dense=max(0.0, 1 - done / STEPS))
    expected = torch.where(mask, weight * query_by_hand(weight, n, m, out), 0.0)
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-12, atol=0)
    if n == m:
        assert torch.equal(layer.weight, weight)


def net(seed=0, method=None):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    ow.sparsify(model, "2:4", method or ow.MaxQ(STEPS, decay=DECAY))
    return model


def sgd(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    return optimizer, ow.attach(optimizer, model)


def batches(start, stop):
    return [
        torch.randn(4, 8, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(start, stop)
    ]


def train(model, optimizer, data, forward=None):
    for x in data:
        optimizer.zero_grad()
        ((forward or model)(x) - 3).square().mean().backward()
        optimizer.step()


def latent(model):
    return [model[i].parametrizations.weight.original for i in (0, 2)]


def test_trains_as_its_equations_say():
    model, (first, second) = net(), (w.detach().clone() for w in latent(net()))
    biases = [model[i].bias.detach().clone() for i in (0, 2)]
    train(model, sgd(model)[0], batches(0, STEPS + 3))
    parameters = [first, second, *biases]
    velocity = [torch.zeros_like(p) for p in parameters]
    for step, x in enumerate(batches(0, STEPS + 3)):
        masks = [keep(w, 2, 4, 1, dense=max(0.0, 1 - step / STEPS)) for w in parameters[:2]]
        used = [w * mask * query_by_hand(w, 2, 4) for w, mask in zip(parameters, masks, strict=False)]
        leaves = [each.detach().requires_grad_() for each in (*used, *parameters[2:])]
        y = nn.functional.linear(nn.functional.linear(x, leaves[0], leaves[2]).tanh(), leaves[1], leaves[3])
        gradients = list(torch.autograd.grad((y - 3).square().mean(), leaves))
        for i, mask in enumerate(masks):
            gradients[i] = gradients[i] + DECAY * parameters[i] * ~mask
        velocity = [0.9 * v + g for v, g in zip(velocity, gradients, strict=True)]
        parameters = [p - LR * v for p, v in zip(parameters, velocity, strict=True)]
    for found, expected in zip(latent(model), parameters, strict=False):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("stop", [2, STEPS + 1])
def test_a_resumed_run_is_the_run_that_was_not_interrupted(stop):
    whole, model, resumed = net(), net(), net(seed=1)
    train(whole, sgd(whole)[0], batches(0, STEPS + 3))
    optimizer, _ = sgd(model)
    train(model, optimizer, batches(0, stop))
    torch.save([model.state_dict(), optimizer.state_dict()], file := io.BytesIO())
    file.seek(0)
    optimizer, _ = sgd(resumed)
    state, moments = torch.load(file, weights_only=True)
    resumed.load_state_dict(state)
    optimizer.load_state_dict(moments)
    train(resumed, optimizer, batches(stop, STEPS + 3))
    assert all(map(torch.equal, resumed.state_dict().values(), whole.state_dict().values()))


def test_the_finished_weights_have_the_queries_in_them(tmp_path):
    model, x = net(), batches(0, 1)[0]
    optimizer, handle = sgd(model)
    train(model, optimizer, batches(0, 3))
    assert handle.unfinished == "50.0% of the groups dense: not yet 2:4 (step 3 of 6)"
    with pytest.raises(ow.NotSparse, match="of the groups dense: not yet 2:4"):
        ow.verify(model)
    train(model, optimizer, batches(3, STEPS))
    ow.verify(model, x)
    output = model(x)
    ow.save(model, tmp_path / "net.safetensors")
    finished = ow.finalize(copy.deepcopy(model))
    assert torch.equal(finished(x), output)
    assert torch.equal(ow.load_state_dict(tmp_path / "net.safetensors")["0.weight"], finished[0].weight)
    ow.verify(finished, pattern="2:4")
    rows = latent(model)[0].detach()
    assert float((finished[0].weight.detach() / rows).abs().max()) > 1.01  # not the latent weight
    again = net()
    with pytest.raises(ValueError, match="would multiply with something else than the finished weight of the file"):
        ow.load(tmp_path / "net.safetensors", again)  # it would be queried twice
    assert torch.equal(latent(again)[0], latent(net())[0])


def test_compiled_code_stays_while_the_ramp_falls():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    eager, model = net(), net()
    train(eager, sgd(eager)[0], batches(0, STEPS + 2))
    train(model, sgd(model)[0], batches(0, STEPS + 2), torch.compile(model, backend=backend, fullgraph=True))
    for found, expected in zip(latent(model), latent(eager), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert len(graphs) == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_trace_has_the_formula():
    layer = nn.Linear(16, 6)
    ow.sparsify(layer, "2:4", ow.MaxQ(1))
    layer.parametrizations.weight[0].go_to(1)
    x = torch.randn(2, 16)
    torch.testing.assert_close(torch.jit.trace(layer.eval(), x)(x), layer(x))


def test_weights_of_zeros_and_of_equal_magnitude():
    layer = nn.Linear(8, 2, bias=False)
    with torch.no_grad():
        layer.weight[0].zero_()
        layer.weight[1].fill_(-2.0)
    ow.sparsify(layer, "2:4", ow.MaxQ(1))
    layer.parametrizations.weight[0].go_to(1)
    assert layer.weight.tolist() == [[0.0] * 8, [-3.0, -3.0, 0.0, 0.0, -2.0, -2.0, 0.0, 0.0]]  # the first four are top
    assert not torch.signbit(layer.weight[0]).any()
    ow.verify(layer)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: ow.MaxQ(0), "steps=0"),
        (lambda: ow.MaxQ(5, tau=0.0), "tau=0.0"),
        (lambda: ow.MaxQ(5, decay=math.inf), "decay=inf"),
        (lambda: ow.MaxQ(5, curve="square"), "curve='square'"),
        (lambda: ow.sparsify(nn.Conv1d(8, 4, 3), "2:4", ow.MaxQ(5)), r"knows no filters of a weight \(4, 8, 3\)"),
    ],
)
def test_what_cannot_be_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        wrong()
