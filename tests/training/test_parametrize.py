"""How a module reads its masked weights: classes, the cache of one forward, checkpointing, compilation."""

import copy
import threading
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import openwork as ow
from openwork.methods import Method
from openwork.methods.schedule import ONCE
from openwork.nm.masks import apply_mask
from openwork.training.parametrize import masked_modules, unwrap, weight_name

METHODS = (ow.SRSTE(), ow.STE(), ow.ASP())


def mlp():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))


def dense(module, tensor="weight"):
    """The dense weight behind a masked one."""
    return module.parametrizations[tensor].original


@dataclass(frozen=True)
class Counting(Method):
    """A method that counts how often it ranks a weight, and notes the grad mode."""

    name: ClassVar[str] = "counting"
    modes: list = field(default_factory=list, compare=False)

    def score(self, weight, state):
        self.modes.append(torch.is_grad_enabled())
        return weight.abs()


@dataclass(frozen=True)
class Signed(Method):
    """A method with a score of its own: the largest positive weights."""

    name: ClassVar[str] = "signed"

    @property
    def schedule(self):
        return ONCE

    def score(self, weight, state):
        return weight.clamp(min=0)

    def backward(self, gradient, mask, phase, state):
        return apply_mask(gradient, mask)


class Repeated(nn.Module):
    """One block, used several times; `between` runs after each use, `region` runs the block."""

    def __init__(self, times, region=None):
        super().__init__()
        self.block, self.times = nn.Linear(8, 8), times
        self.region = region or (lambda block, x: block(x))
        self.between = lambda: None

    def forward(self, x):
        for _ in range(self.times):
            x = self.region(self.block, x)
            self.between()
        return x


def counted(model):
    method = Counting()
    ow.sparsify(model, "2:4", method)
    method.modes.clear()  # of the report
    return method.modes


# Classes


def test_modules_of_one_class_share_one_masked_class():
    model = nn.Sequential(*[mlp() for _ in range(3)])
    ow.sparsify(model, "2:4")
    assert len({type(module) for _, module in masked_modules(model)}) == 1


def test_a_masked_module_is_still_an_instance_of_its_class():
    model = mlp()
    ow.sparsify(model, "2:4")
    assert isinstance(model[0], nn.Linear)
    assert parametrize.is_parametrized(model[0], "weight")


@pytest.mark.parametrize("value", [nn.Parameter(torch.zeros(16, 8)), torch.zeros(16, 8)], ids=["parameter", "tensor"])
def test_assigning_to_a_sparse_weight_says_what_to_write_instead(value):
    model = mlp()
    ow.sparsify(model, "2:4")
    with pytest.raises(RuntimeError, match=r"sparsified Linear.*parametrizations\.weight\.original\.copy_"):
        model[0].weight = value


def test_assigning_other_parameters_and_attributes_still_works():
    model = mlp()
    ow.sparsify(model, "2:4")
    model[0].bias, model[0].note = nn.Parameter(torch.ones(16)), "kept"
    assert model[0].bias.sum() == 16
    model[0].extra = nn.Parameter(torch.zeros(2))
    del model[0].note


def test_writing_into_the_dense_weight_as_the_error_says_changes_the_sparse_one():
    model = mlp()
    ow.sparsify(model, "2:4")
    with torch.no_grad():
        dense(model[0]).copy_(torch.arange(128.0).view(16, 8))
    assert model[0].weight[0].tolist() == [0, 0, 2, 3, 0, 0, 6, 7]


def test_parametrizing_another_tensor_later_is_refused_and_leaves_all_layers_whole():
    model, other = mlp(), mlp()
    ow.sparsify(model, "2:4")
    ow.sparsify(other, "2:4")
    with pytest.raises(RuntimeError, match=r"parametrizing bias of a sparsified Linear: call ow\.finalize first"):
        parametrize.register_parametrization(model[0], "bias", nn.Identity())
    assert model(torch.zeros(1, 8)).shape == other(torch.zeros(1, 8)).shape


def test_removing_a_sparse_weight_is_refused():
    model = mlp()
    ow.sparsify(model, "2:4")
    with pytest.raises(RuntimeError, match="removing"):
        del model[0].weight


def test_a_parametrization_on_top_is_baked_in_by_finalize():
    model = mlp()
    ow.sparsify(model, "2:4")
    parametrizations.spectral_norm(model[0])
    model.eval()
    x = torch.randn(3, 8)
    before = model(x)
    ow.finalize(model)
    assert torch.equal(model(x), before)


# The cache of one forward


def test_a_block_used_12_times_masks_its_weight_once():
    model = Repeated(12)
    modes = counted(model)
    model(torch.randn(2, 8))
    assert modes == [True]
    with torch.no_grad():
        model(torch.randn(2, 8))
    assert modes == [True, False]


def test_the_gradient_of_a_repeated_block_is_that_of_masking_each_time():
    model, x = Repeated(5), torch.randn(2, 8)
    ow.sparsify(model, "2:4")
    model(x).square().sum().backward()
    cached = dense(model.block).grad.clone()
    dense(model.block).grad = None
    for _ in range(5):  # called from outside, a block has no root forward around it, and nothing is kept
        x = model.block(x)
    x.square().sum().backward()
    torch.testing.assert_close(cached, dense(model.block).grad)


@pytest.mark.parametrize("training", [True, False])
def test_an_encoder_layer_masks_each_weight_once(training):
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).train(training)
    modes = counted(model)
    with torch.set_grad_enabled(training):
        model(torch.randn(2, 5, 16))
    assert modes == [training] * 4


@pytest.mark.parametrize("first", [torch.no_grad, torch.inference_mode])
def test_a_weight_read_without_gradients_has_them_later_in_the_same_forward(first):
    """As in self-distillation, where one forward makes its own targets."""
    model = Repeated(1)

    def region(block, x):
        with first():
            target = block(x)
        return block(x) - target.clone()

    model.region = region
    ow.sparsify(model, "2:4")
    model(torch.ones(1, 8)).sum().backward()
    assert torch.equal(dense(model.block).grad, torch.ones(8, 8))


def test_nothing_is_kept_between_forwards():
    model = Repeated(2)
    modes = counted(model)
    for _ in range(3):
        model(torch.randn(2, 8))
    assert len(modes) == 3
    assert not model.block.parametrizations.weight[0].cache._here.seen


def test_a_write_between_two_reads_of_one_forward_is_seen():
    model, seen = Repeated(2), []
    ow.sparsify(model, "2:4")

    def between():
        seen.append(model.block.weight.detach().clone())
        with torch.no_grad():
            dense(model.block).mul_(2)

    model.between = between
    model(torch.randn(2, 8))
    assert torch.equal(seen[1], seen[0] * 2)


def test_a_weight_exchanged_between_two_reads_of_one_forward_is_seen():
    model, seen = Repeated(2), []
    ow.sparsify(model, "2:4")

    def between():
        seen.append(model.block.weight.detach().clone())
        dense(model.block).data = dense(model.block).data * 2

    model.between = between
    model(torch.randn(2, 8))
    assert torch.equal(seen[1], seen[0] * 2)


@pytest.mark.parametrize("kind", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_step_inside_a_forward_is_seen(optimizer, kind):
    """Where a strategy runs the training step as the forward of the root. Fused steps raise no version."""
    model, seen = Repeated(2), []
    ow.sparsify(model, "2:4", ow.STE())
    dense(model.block).grad = torch.ones(8, 8)
    step = optimizer([dense(model.block)], lr=0.1, **kind).step

    def between():
        seen.append(model.block.weight.detach().clone())
        step()

    model.between = between
    with torch.no_grad():
        model(torch.randn(2, 8))
    assert not torch.equal(seen[0], seen[1])
    ow.verify(model)


def test_other_parameters_in_one_forward_are_told_apart():
    """As an inner loop of meta-learning does it: the same module, called with one set of parameters after another."""
    model, weights = Repeated(1), [torch.randn(8, 8) for _ in range(2)]
    name = "parametrizations.weight.original"
    model.region = lambda block, x: [torch.func.functional_call(block, {name: each}, (x,)) for each in weights]
    ow.sparsify(model, "2:4")
    first, second = model(torch.ones(1, 8))
    assert not torch.equal(first, second)


def test_an_exception_inside_a_forward_leaves_nothing_behind():
    model = Repeated(2)
    modes = counted(model)
    model.between = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        model(torch.randn(2, 8))
    model.between = lambda: None
    dense(model.block).data.zero_()  # not counted by torch: only an emptied cache can see it
    assert not model.block.weight.any()
    model(torch.randn(2, 8))
    assert len(modes) == 3


def test_an_interrupted_forward_does_not_make_the_next_one_stale():
    model = Repeated(1)
    ow.sparsify(model, "2:4")
    model.between = lambda: (_ for _ in ()).throw(KeyboardInterrupt)  # for which torch runs no forward hooks
    with pytest.raises(KeyboardInterrupt):
        model(torch.ones(1, 8))
    model.between = lambda: None
    dense(model.block).data.zero_()
    assert torch.equal(model(torch.ones(1, 8))[0], model.block.bias)


def test_a_nested_call_of_the_root_ends_no_cache():
    model = Repeated(3)
    modes, inner = counted(model), []
    model.between = lambda: inner or inner.append(0) or model(torch.randn(1, 8))
    model(torch.randn(2, 8))
    assert len(modes) <= 2
    assert not model.block.parametrizations.weight[0].cache._here.seen


def test_two_threads_do_not_share_a_cache():
    model, barrier, found = Repeated(2), threading.Barrier(2), {}
    modes = counted(model)
    model.between = barrier.wait

    def forward(grad):
        with torch.set_grad_enabled(grad):
            found[grad] = model(torch.ones(1, 8))

    threads = [threading.Thread(target=forward, args=(grad,)) for grad in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(modes) == [False, True]
    assert found[True].requires_grad
    assert not found[False].requires_grad
    assert torch.equal(found[True], found[False])


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_regions_that_share_a_block_give_the_gradients_of_plain_ones(method, reentrant):
    def region(block, x):
        return checkpoint(block, x, use_reentrant=reentrant)

    plain = Repeated(3)
    other = copy.deepcopy(plain)
    other.region = region
    for model in (plain, other):
        ow.sparsify(model, "2:4", method)
        model(torch.ones(2, 8, requires_grad=True)).square().sum().backward()
    torch.testing.assert_close(dense(other.block).grad, dense(plain.block).grad)


def test_reentrant_checkpointing_masks_once_per_grad_mode_in_a_forward():
    model = Repeated(4, lambda block, x: checkpoint(block, x, use_reentrant=True))
    modes = counted(model)
    out = model(torch.ones(2, 8, requires_grad=True))
    model.region = lambda block, x: block(x)
    assert modes == [False]
    out.sum().backward()
    assert modes == [False] + [True] * 4


def test_a_checkpointed_root_gives_the_gradients_of_a_plain_one():
    model, x = Repeated(3), torch.ones(2, 8, requires_grad=True)
    ow.sparsify(model, "2:4")
    model(x).square().sum().backward()
    plain = dense(model.block).grad.clone()
    dense(model.block).grad = None
    checkpoint(model, x, use_reentrant=False).square().sum().backward()
    torch.testing.assert_close(dense(model.block).grad, plain)
    assert not model.block.parametrizations.weight[0].cache._here.seen


# Dtypes, devices, strides


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("late", [True, False], ids=["after", "before"])
def test_models_of_other_dtypes(dtype, late):
    model = mlp() if late else mlp().to(dtype)
    ow.sparsify(model, "2:4")
    model.to(dtype)
    out = model(torch.ones(2, 8, dtype=dtype))
    assert out.dtype == dtype
    ow.verify(model)
    ow.finalize(model)
    assert torch.equal(model(torch.ones(2, 8, dtype=dtype)), out)
    assert model[0].weight.dtype == dtype


def test_the_mask_is_that_of_the_rounded_weight_that_the_forward_saw():
    """As FSDP2 does it: the forward sees bfloat16, the optimizer updates float32."""
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data = torch.tensor([[1.0, 1.001, 1.002, 1.003]])  # all equal in bfloat16
    ow.sparsify(layer, "2:4")
    masked = layer.parametrizations.weight[0]
    assert masked.mask_of(dense(layer)).tolist() == [[False, False, True, True]]
    masked(dense(layer).to(torch.bfloat16))
    assert masked.mask_of(dense(layer)).tolist() == [[True, True, False, False]]
    assert masked.effective(dense(layer)).dtype == torch.float32


def test_channels_last_weights_keep_their_strides():
    model = nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last)
    plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    strides = model.weight.stride()
    for each in (model, plain):
        ow.sparsify(each, "2:4")
    assert model.weight.stride() == strides != plain.weight.stride()
    assert torch.equal(model.weight, plain.weight)
    assert ow.finalize(model).weight.stride() == strides


def test_frozen_weights_are_masked_and_stay_frozen():
    model = mlp()
    model[0].weight.requires_grad_(False)
    ow.sparsify(model, "2:4")
    model(torch.ones(2, 8)).sum().backward()
    assert dense(model[0]).grad is None
    assert dense(model[2]).grad is not None
    ow.verify(model)
    assert not ow.finalize(model)[0].weight.requires_grad


def test_a_method_with_a_score_of_its_own_decides_the_mask():
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data = torch.tensor([[-4.0, 1.0, 2.0, -3.0]])
    ow.sparsify(layer, "2:4", Signed())
    assert layer.weight.tolist() == [[0, 1, 2, 0]]


def test_inference_mode():
    model = Repeated(3)
    modes = counted(model)
    with torch.inference_mode():
        model(torch.ones(1, 8))
    assert modes == [False]


# Compilation and transforms


@pytest.fixture
def dynamo():
    from torch._dynamo import testing

    torch._dynamo.reset()
    yield testing
    torch._dynamo.reset()


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_compiling_gives_one_graph_and_no_recompilation_over_steps(dynamo, method):
    counter = dynamo.CompileCounter()
    model, x = nn.Sequential(mlp(), Repeated(3)), torch.randn(2, 8)
    ow.sparsify(model, "2:4", method)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ow.attach(optimizer, model)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(3):
        optimizer.zero_grad()
        compiled(x).square().mean().backward()
        optimizer.step()
    assert counter.frame_count == 1
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_compiled_gradients_are_the_eager_ones(dynamo, method):
    model, x = mlp(), torch.randn(2, 8)
    ow.sparsify(model, "2:4", method)
    torch.compile(model, backend="aot_eager", fullgraph=True)(x).square().sum().backward()
    compiled = dense(model[0]).grad.clone()
    model.zero_grad()
    model(x).square().sum().backward()
    torch.testing.assert_close(compiled, dense(model[0]).grad)


class Block(nn.Module):
    """Not an nn.Sequential, whose code the compiler skips as torch's own."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


def frames(dynamo, model):
    torch._dynamo.reset()
    counter = dynamo.CompileCounter()
    for block in model:
        block.compile(backend=counter)
    model(torch.randn(2, 8))
    return counter.frame_count


def test_compiling_equal_blocks_one_by_one_compiles_them_once(dynamo):
    plain, sparse = (nn.Sequential(*[Block() for _ in range(6)]) for _ in range(2))
    ow.sparsify(sparse, "2:4")
    assert frames(dynamo, sparse) == frames(dynamo, plain) > 0


def test_export_of_a_sparsified_and_of_a_finalized_model():
    model, x = mlp().eval(), torch.randn(2, 8)
    ow.sparsify(model, "2:4")
    expected = model(x)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
    exported = torch.export.export(ow.finalize(model), (x,))
    torch.testing.assert_close(exported.module()(x), expected)
    assert list(exported.state_dict) == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_functional_call_masks_the_given_parameters_and_leaves_the_model():
    model, x = mlp(), torch.randn(2, 8)
    ow.sparsify(model, "2:4")
    other, before = mlp(), copy.deepcopy(model.state_dict())
    given = dict(zip(model.state_dict(), other.state_dict().values(), strict=True))
    parameters = {name: given[weight_name(name)] for name, _ in model.named_parameters()}
    out = torch.func.functional_call(model, parameters, x)
    ow.project(other, "2:4")
    assert torch.equal(out, other(x))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))


def test_functional_gradients_are_the_usual_ones():
    model, x = mlp(), torch.randn(2, 8)
    ow.sparsify(model, "2:4")
    parameters = {name: each.detach() for name, each in model.named_parameters()}
    grads = torch.func.grad(lambda p: torch.func.functional_call(model, p, x).sum())(parameters)
    model(x).sum().backward()
    for name, each in model.named_parameters():
        torch.testing.assert_close(grads[name], each.grad)


def test_an_ensemble_is_run_at_once_by_vmap():
    models, x = [mlp() for _ in range(3)], torch.randn(2, 8)
    for each in models:
        ow.sparsify(each, "2:4")
    state = torch.func.stack_module_state(models)
    out = torch.vmap(lambda *state: torch.func.functional_call(models[0], state, (x,)))(*state)
    torch.testing.assert_close(out, torch.stack([each(x) for each in models]))


# Names and wrappers


class OneChild(nn.Module):
    """A model whose only child is called like the one of a wrapper."""

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(8, 8)

    def forward(self, x):
        return self.module(x)


def test_a_model_with_a_child_called_module_is_no_wrapper():
    model = OneChild()
    assert unwrap(model) is model
    assert list(ow.sparsify(model, "2:4").sparse) == ["module.weight"]
    ow.verify(model, torch.ones(1, 8))
    assert list(model.state_dict()) == ["module.weight", "module.bias"]


def distributed(model):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    return nn.parallel.DistributedDataParallel(model)


@pytest.fixture
def no_group_left():
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("no_group_left")
@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, distributed], ids=["compile", "dp", "ddp"])
def test_wrapped_models_are_sparsified_verified_and_finalized_inside(wrap):
    model = mlp()
    wrapped = wrap(model)
    assert unwrap(wrapped) is model
    assert list(ow.sparsify(wrapped, "2:4").sparse) == ["0.weight", "2.weight"]
    ow.verify(wrapped, torch.ones(1, 8))
    assert ow.finalize(wrapped) is wrapped
    assert type(model[0]) is nn.Linear


def test_averaged_and_nested_wrappers_are_unwrapped():
    averaged = AveragedModel(mlp())
    assert unwrap(averaged) is averaged.module
    assert unwrap(torch.compile(nn.DataParallel(averaged))) is averaged.module


@pytest.mark.parametrize(
    ("inside", "outside"),
    [
        ("fc.parametrizations.weight.original", "fc.weight"),
        ("parametrizations.weight.original", "weight"),
        ("a._orig_mod.fc.parametrizations.w-1.original", "a.fc.w-1"),
        ("fc.bias", "fc.bias"),
        ("fc.parametrizations.weight.original0", "fc.parametrizations.weight.original0"),
    ],
)
def test_weight_name_is_that_of_the_plain_model(inside, outside):
    assert weight_name(inside) == outside
