"""Sparsified models compute what the masked dense models compute, in whatever way they are used and copied."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import openwork as ow

METHODS = (ow.SRSTE(), ow.STE(), ow.ASP())


def mlp():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))


def dense(module, tensor="weight"):
    return module.parametrizations[tensor].original


def pruned(weight, dim=1, n=2, m=4):
    """The n largest of every m along `dim`, by sorting."""
    groups = weight.detach().movedim(dim, -1).unflatten(-1, (-1, m))
    order = groups.abs().argsort(dim=-1, descending=True, stable=True)
    keep = torch.zeros_like(groups).scatter_(-1, order[..., :n], 1.0)
    return (groups * keep).flatten(-2).movedim(-1, dim)


def pruned_twin(model, dims):
    """A dense copy of a plain model, its weights pruned."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, dim in dims.items():
            twin.get_parameter(name).copy_(pruned(twin.get_parameter(name), dim))
    return twin


LAYERS = [
    (lambda: nn.Linear(8, 6), (3, 8), {"weight": 1}),
    (lambda: nn.Conv1d(8, 6, 3), (2, 8, 5), {"weight": 1}),
    (lambda: nn.Conv2d(16, 8, 3, groups=2), (2, 16, 5, 5), {"weight": 1}),
    (lambda: nn.ConvTranspose2d(8, 6, 3), (2, 8, 3, 3), {"weight": 0}),
    (lambda: nn.GRUCell(8, 4), (3, 8), {"weight_ih": 1, "weight_hh": 1}),
    (lambda: nn.LSTM(8, 8, 2, bidirectional=True, proj_size=4), (3, 2, 8), None),
]


@pytest.mark.parametrize(
    ("make", "shape", "dims"), LAYERS, ids=lambda value: value().__class__.__name__ if callable(value) else ""
)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_layer_multiplies_with_the_pruned_weight(make, shape, dims, method):
    model, x = make(), torch.randn(shape)
    dims = dims or {name: 1 for name, each in model.named_parameters() if each.ndim == 2}
    twin = pruned_twin(model, dims)
    ow.sparsify(model, "2:4", method)
    torch.testing.assert_close(model(x), twin(x))


def test_grouped_transposed_convolutions_group_inside_their_blocks():
    model, x = nn.ConvTranspose2d(16, 8, 3, groups=2), torch.randn(2, 16, 3, 3)
    ow.sparsify(model, "2:4")
    halves = [nn.ConvTranspose2d(8, 4, 3) for _ in range(2)]
    for half, weight, bias in zip(halves, dense(model).chunk(2), model.bias.chunk(2), strict=True):
        half.weight.data, half.bias.data = pruned(weight, 0), bias.data
    expected = torch.cat([half(part) for half, part in zip(halves, x.chunk(2, 1), strict=True)], 1)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_gradient_goes_where_the_method_says(method):
    model, x = nn.Linear(8, 6), torch.randn(3, 8)
    twin = pruned_twin(model, {"weight": 1})
    ow.sparsify(model, "2:4", method)
    model(x).square().sum().backward()
    twin(x).square().sum().backward()
    expected = twin.weight.grad if not isinstance(method, ow.ASP) else twin.weight.grad * (twin.weight != 0)
    torch.testing.assert_close(dense(model).grad, expected)


# Attention: weights read without a call of the module that owns them

ENCODER_DIMS = {
    "self_attn.in_proj_weight": 1,
    "self_attn.out_proj.weight": 1,
    "linear1.weight": 1,
    "linear2.weight": 1,
}


def attention_by_hand(model, x, weights):
    """Multi-head self-attention from its equations, one head at a time."""
    q, k, v = (x @ weights["in_proj_weight"].T + model.in_proj_bias).chunk(3, -1)
    heads = [
        (a @ b.transpose(1, 2) / a.shape[-1] ** 0.5).softmax(-1) @ c
        for a, b, c in zip(*(each.chunk(model.num_heads, -1) for each in (q, k, v)), strict=True)
    ]
    return torch.cat(heads, -1) @ weights["out_proj.weight"].T + model.out_proj.bias


@pytest.mark.parametrize("mode", ["training", "eval", "fast path"])
def test_attention_is_masked_dense_math(mode):
    model, x = nn.MultiheadAttention(16, 2, batch_first=True), torch.randn(2, 5, 16)
    weights = {name: pruned(model.get_parameter(name)) for name in ("in_proj_weight", "out_proj.weight")}
    ow.sparsify(model, "2:4")
    model.train(mode == "training")
    with torch.set_grad_enabled(mode != "fast path"):
        found = model(x, x, x, need_weights=mode == "training")[0]
    torch.testing.assert_close(found, attention_by_hand(model, x, weights))


def test_attention_with_separate_projections_is_masked_too():
    model = nn.MultiheadAttention(16, 2, kdim=8, vdim=4)
    names = ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")
    twin = pruned_twin(model, dict.fromkeys(names, 1))
    assert set(ow.sparsify(model, "2:4").sparse) == set(names)
    inputs = torch.randn(5, 2, 16), torch.randn(5, 2, 8), torch.randn(5, 2, 4)
    torch.testing.assert_close(model(*inputs)[0], twin(*inputs)[0])


def kernels(model, x):
    """The names of the operators that a forward runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(x)
    return {event.name for event in profile.events()}


@pytest.mark.parametrize("fast", [True, False])
def test_the_encoder_layer_is_sparse_in_its_fast_path_and_beside_it(fast):
    layer, x = nn.TransformerEncoderLayer(16, 2, 32, dropout=0, batch_first=True).eval(), torch.randn(2, 5, 16)
    twin = pruned_twin(layer, ENCODER_DIMS)
    model = nn.Sequential(layer)
    ow.sparsify(model, "2:4")
    with torch.set_grad_enabled(not fast):
        assert ("aten::_transformer_encoder_layer_fwd" in kernels(model, x)) == fast
        torch.testing.assert_close(model(x), twin(x))


# Copies


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("make", [mlp, lambda: nn.LSTM(8, 8), lambda: nn.TransformerEncoderLayer(8, 2, 16)])
@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle, by_torch_save])
def test_copies_are_right_and_independent(make, method, copied):
    model, x = make().eval(), torch.randn(3, 2, 8)
    ow.sparsify(model, "2:4", method)
    model(x)  # an RNN leaves tensors behind that cannot be copied
    other = copied(model)
    before = model.state_dict()
    assert list(other.state_dict()) == list(before)
    leaf = next(iter(other.parameters()))
    assert torch.equal(
        torch.cat([p.flatten() for p in model.parameters()]), torch.cat([p.flatten() for p in other.parameters()])
    )
    with torch.no_grad():
        leaf.add_(1)
    ow.verify(other, x)
    ow.finalize(other)
    assert type(other) is make().__class__
    assert not other._forward_hooks
    ow.verify(model, x)
    ow.verify(other, x, pattern="2:4")


def test_finalizing_one_of_two_copies_leaves_the_other_training():
    model = mlp()
    ow.sparsify(model, "2:4")
    other = copy.deepcopy(model)
    ow.finalize(model)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    ow.attach(optimizer, other)
    for _ in range(3):
        optimizer.zero_grad()
        other(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
    ow.verify(other, torch.randn(1, 8))
    assert torch.equal(other[0].weight, pruned(dense(other[0])))


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.5)], ids=["swa", "ema"])
def test_averages_are_taken_of_dense_weights_and_then_pruned(method, average):
    model = mlp()
    ow.sparsify(model, "2:4", method)
    mask = model[0].weight != 0
    averaged = AveragedModel(model, multi_avg_fn=average)
    history = []
    for _ in range(2):
        with torch.no_grad():
            dense(model[0]).copy_(torch.randn(16, 8))
        averaged.update_parameters(model)
        history.append(dense(model[0]).detach().clone())
    mean = (history[0] + history[1]) / 2
    torch.testing.assert_close(dense(averaged.module[0]).detach(), mean)
    torch.testing.assert_close(averaged.module[0].weight, mean * mask if isinstance(method, ow.ASP) else pruned(mean))
    ow.verify(averaged, torch.ones(1, 8))
    ow.finalize(averaged)
    ow.verify(model)


# Reports, refusals, projection


def test_weights_count_as_kept_exactly_n_of_m():
    report = ow.sparsify(nn.Sequential(nn.Linear(16, 4), nn.Linear(4, 4)), {"0": "1:16", "1": "3:4"})
    assert [row.kept for row in report.rows] == [4, 12]


@pytest.mark.parametrize("wrap", [lambda model: model, torch.compile, nn.DataParallel])
def test_sparsifying_twice_is_refused(wrap):
    model = mlp()
    ow.sparsify(model, "2:4")
    with pytest.raises(ValueError, match=r"0, 2 sparsified already; call ow\.finalize\(model\) first"):
        ow.sparsify(wrap(model), "1:4")
    with pytest.raises(ValueError, match="Linear sparsified already"):
        ow.sparsify(model[0], "1:4")
    ow.verify(model)


def test_a_part_and_then_the_rest_can_be_sparsified():
    model = nn.Sequential(mlp(), mlp())
    ow.sparsify(model[0], "2:4", ow.ASP())
    ow.sparsify(model[1], "1:4")
    assert {str(each) for each in ow.verify(model, torch.ones(1, 8)).sparse.values()} == {"2:4", "1:4"}
    ow.finalize(model)
    ow.verify(model, pattern={"0": "2:4", "1": "1:4"})


@pytest.fixture
def group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_sharded_models_are_refused():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    late, early = mlp(), mlp()
    fully_shard(late, mesh=mesh)
    with pytest.raises(ValueError, match=r"0\.weight is sharded: call ow\.sparsify before fully_shard"):
        ow.sparsify(late, "2:4")
    with pytest.raises(ValueError, match="sharded"):
        ow.project(late, "2:4")
    ow.sparsify(early, "2:4")
    fully_shard(early, mesh=mesh)
    with pytest.raises(ValueError, match="is sharded: load its full state dict into a model sparsified alike"):
        ow.finalize(early)


@pytest.mark.usefixtures("group")
def test_masks_of_a_sharded_model_are_those_of_the_moment():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    from openwork.integrations.tensor_parallel import Colwise

    model = nn.Sequential(nn.Linear(8, 8))
    ow.sparsify(model, "2:4", ow.TransposableSRSTE(refresh_every=1))
    parallelize_module(model, init_device_mesh("cpu", (1,)), {"0": Colwise()})
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
    topology = ow.Topology(1)
    ow.attach(optimizer, model, topology=topology)
    masks = ow.masks(model)["0.weight"]
    before = masks.full_tensor().clone()
    model(torch.randn(4, 8)).square().sum().backward()
    optimizer.step()
    assert torch.equal(masks.full_tensor(), before)
    assert topology.records[0]["sad_step"] == topology.records[0]["sad_start"] > 0


@pytest.mark.usefixtures("group")
def test_a_method_with_state_refuses_sharded_weights():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    class Scaled(ow.STE):
        def state(self, weight, phase):
            return {"scale": weight.abs().mean()}

    model = nn.Linear(8, 8)
    ow.sparsify(model, "2:4", Scaled())
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match=r"weight is sharded, and .* keeps scale for each weight"):
        ow.attach(torch.optim.SGD(model.parameters(), lr=0.1), model)


@pytest.mark.parametrize("method", ["sr-ste", ow.SRSTE, None])
def test_a_method_must_be_a_method_object(method):
    with pytest.raises(TypeError, match=r"needed a method object such as ow\.SRSTE\(\)"):
        ow.sparsify(mlp(), "2:4", method)


def test_a_refusal_leaves_the_model_as_it_was():
    model = mlp()
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        ow.sparsify(model, "2:4", example=torch.ones(1, 3))
    with pytest.raises(ValueError, match="matches no weight"):
        ow.sparsify(model, "2:4", exclude=["fc"])
    assert [type(each) for each in model] == [type(each) for each in mlp()]
    assert ow.sparsify(model, "2:4").sparse


def test_masks_are_those_of_the_forward():
    model = mlp()
    ow.sparsify(model, "2:4", exclude=["2"])
    assert torch.equal(ow.masks(model)["0.weight"], model[0].weight != 0)
    assert list(ow.masks(model)) == ["0.weight"]


def test_dense_masks_nothing_and_says_so():
    model, x = mlp(), torch.randn(2, 8)
    before = model(x)
    report = ow.sparsify(model, "2:4", ow.Dense())
    assert torch.equal(model(x), before)
    assert "ow.Dense masks nothing" in str(report)
    assert int(ow.masks(model)["0.weight"].sum()) == 64


def test_project_prunes_a_plain_model_after_averaging_in_place():
    models = [ow.finalize(each) for each in (mlp(), mlp()) if ow.sparsify(each, "2:4")]
    average = models[0]
    parameters = list(average.parameters())
    with torch.no_grad():
        for mine, other in zip(parameters, models[1].parameters(), strict=True):
            mine.lerp_(other, 0.5)
    mean = average[0].weight.detach().clone()
    with pytest.raises(ow.NotSparse):
        ow.verify(average, pattern="2:4")
    report = ow.project(average, "2:4", exclude=["2"])
    assert report.skipped == {"2.weight": "excluded by '2'"}
    assert torch.equal(average[0].weight, pruned(mean))
    assert not average[0].weight[average[0].weight == 0].signbit().any()
    assert all(a is b for a, b in zip(average.parameters(), parameters, strict=True))


def test_project_refuses_a_sparsified_model():
    model = mlp()
    ow.sparsify(model, "2:4")
    with pytest.raises(ValueError, match=r"sparsified already; call ow\.finalize"):
        ow.project(model, "2:4")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_keep_the_lower_index_and_pruned_weights_are_plus_zero(dtype):
    model = nn.Linear(8, 2, bias=False).to(dtype)
    model.weight.data.fill_(-1)
    ow.sparsify(model, "2:4")
    assert (model.weight != 0).tolist() == [[True, True, False, False] * 2] * 2
    assert not model.weight[:, 2:4].signbit().any()


def test_nan_surfaces():
    model = nn.Linear(4, 1, bias=False)
    model.weight.data = torch.tensor([[5.0, torch.nan, 4.0, 3.0]])
    ow.sparsify(model, "1:4")
    assert model.weight[0].isnan().tolist() == [False, True, False, False]


def test_evaluation_and_report_leave_the_random_state():
    model, x = nn.Sequential(mlp(), nn.Dropout()), torch.ones(1, 8)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    ow.sparsify(model, "2:4", example=x)
    ow.verify(model, x)
    assert torch.equal(torch.rand(1), expected)
    assert model.training
    assert model[1].training


def test_functional_of_a_masked_weight_is_the_layer():
    model, x = nn.Linear(8, 8), torch.randn(2, 8)
    ow.sparsify(model, "2:4")
    assert torch.equal(functional.linear(x, model.weight, model.bias), model(x))


def test_a_model_is_changed_as_a_whole_or_not_at_all():
    class Failing(ow.STE):
        def score(self, weight, state):
            raise RuntimeError("no score")

    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(RuntimeError, match="no score"):
        ow.sparsify(model, "2:4", Failing())
    ow.sparsify(model, "2:4", ow.STE())


def test_a_transposable_selection_is_kept_along_both_axes_or_refused():
    model, both = nn.Linear(8, 8), ow.Selection("2:4", transposable=True)
    ow.project(model, both)
    ow.verify(model, pattern=both)
    with pytest.raises(ValueError, match=r"transposable=True with SRSTE.*use ow\.TransposableSRSTE"):
        ow.sparsify(nn.Linear(8, 8), both, ow.SRSTE())


@pytest.mark.parametrize("scale", [1e22, 1e-24])
def test_retained_is_the_same_at_any_scale(scale):
    model = nn.Linear(8, 8)
    expected = ow.project(copy.deepcopy(model), "2:4").rows[0].retained
    with torch.no_grad():
        model.weight.mul_(scale)
    assert ow.project(model, "2:4").rows[0].retained == pytest.approx(expected, rel=1e-5)


def test_the_masked_weight_may_be_changed_in_place_where_it_is_read():
    model = nn.Linear(8, 8)
    ow.sparsify(model, "2:4", ow.STE())
    model.weight.mul_(2).sum().backward()
    assert torch.equal(model.parametrizations.weight.original.grad, torch.full((8, 8), 2.0))
