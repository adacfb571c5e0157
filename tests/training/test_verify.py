"""`verify` finds each layer that is denser than its pattern, by name, and only those."""

import contextlib
import copy
import re

import pytest
import torch
from torch import nn
from torch.nn import functional

import openwork as ow
from openwork.nm.groups import Axis
from openwork.training.verify import tightest


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(8, 16, batch_first=True)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.fc = nn.Linear(16, 8)

    def forward(self, x):
        x = self.rnn(x)[0]
        return self.fc(self.attention(x, x, x)[0])


def net():
    model = Net()
    ow.sparsify(model, "2:4")
    return model


@pytest.fixture
def x():
    return torch.randn(2, 5, 8)


def dense(module, tensor="weight"):
    return module.parametrizations[tensor].original


def subclass(module, **members):
    module.__class__ = type("Broken", (type(module),), members)


def problems(model, *args, **choices):
    """What `verify` says of each layer; nothing where it is content."""
    try:
        ow.verify(model, *args, **choices)
    except ow.NotSparse as error:
        return error.layers
    return {}


# One layer broken, in each of the ways that were seen in real models


def stale_lstm(model, make):
    """The kernel gets a list of weights that was made before the weights were masked."""
    rnn = model.rnn
    weights = [make(dense(rnn, "weight_ih_l0")), rnn.weight_hh_l0.detach(), rnn.bias_ih_l0, rnn.bias_hh_l0]
    subclass(rnn, _flat_weights=property(lambda self: weights, lambda self, value: None))
    return "rnn.weight_ih_l0"


def stale_lstm_parameter(model):
    return stale_lstm(model, lambda weight: weight)


def stale_lstm_copy(model):
    return stale_lstm(model, lambda weight: weight.detach().clone())


def swapped_module(model):
    model.fc = nn.Linear(16, 8)
    return "fc.weight"


def removed_module(model):
    model.fc = nn.Identity()
    return "fc.weight"


def dense_in_proj(model):
    def forward(self, q, k, v):
        weights = dense(self, "in_proj_weight"), self.in_proj_bias, None, None, False, 0.0
        inputs = (each.transpose(0, 1) for each in (q, k, v))
        out = functional.multi_head_attention_forward(
            *inputs, self.embed_dim, self.num_heads, *weights, self.out_proj.weight, self.out_proj.bias
        )
        return out[0].transpose(0, 1), None

    subclass(model.attention, forward=forward)
    return "attention.in_proj_weight"


def averaged_copy(model):
    """One layer is shared with a copy that was finalized first and averaged afterwards."""
    copies = [ow.finalize(each) for each in (copy.deepcopy(model), net())]
    with torch.no_grad():
        copies[0].fc.weight.lerp_(copies[1].fc.weight, 0.5)
    model.fc = copies[0].fc
    return "fc.weight"


def live_adapter(model):
    a, b = nn.Parameter(torch.randn(8, 2)), nn.Parameter(torch.randn(2, 16))
    model.fc.a, model.fc.b = a, b
    subclass(model.fc, forward=lambda self, x: functional.linear(x, self.weight + self.a @ self.b, self.bias))
    return "fc.weight"


def merged_adapter(model):
    ow.finalize(model.fc)
    with torch.no_grad():
        model.fc.weight += torch.randn(8, 2) @ torch.randn(2, 16)
    return "fc.weight"


def cast_dense_weight(model):
    subclass(model.fc, forward=lambda self, x: functional.linear(x.double(), dense(self).double()).float())
    return "fc.weight"


def second_use_dense(model):
    subclass(model.fc, forward=lambda self, x: functional.linear(x, self.weight) + x @ dense(self).T)
    return "fc.weight"


BREAKS = [
    stale_lstm_parameter,
    stale_lstm_copy,
    swapped_module,
    removed_module,
    dense_in_proj,
    averaged_copy,
    live_adapter,
    merged_adapter,
    cast_dense_weight,
    second_use_dense,
]


@pytest.mark.parametrize("damage", BREAKS, ids=lambda each: each.__name__)
def test_the_one_broken_layer_is_named(damage, x):
    model = net()
    name = damage(model)
    assert list(problems(model, x)) == [name]


def test_the_healthy_twin_passes(x):
    model = net()
    assert not problems(model)
    assert not problems(model, x)
    assert ow.verify(model, x).notes == ()
    assert not problems(copy.deepcopy(model).train(), x)
    assert not problems(ow.finalize(model), x, pattern="2:4")


def test_noise_that_the_model_draws_is_drawn_from_nowhere():
    model = Scope(lambda self, x: self.fc(x + torch.randn(8)), fc=nn.Linear(8, 8))
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    ow.sparsify(model, "2:4", example=torch.ones(1, 8))
    ow.verify(model, torch.ones(1, 8))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("damage", [stale_lstm_copy, dense_in_proj, live_adapter], ids=lambda each: each.__name__)
def test_only_an_example_shows_what_the_weights_do_not(damage):
    model = net()
    damage(model)
    assert not problems(model)


@pytest.mark.parametrize("damage", [averaged_copy, merged_adapter], ids=lambda each: each.__name__)
def test_a_finalized_model_is_held_to_a_given_pattern(damage, x):
    model = net()
    name = damage(model)
    ow.finalize(model)
    assert list(problems(model, pattern="2:4")) == list(problems(model, x, pattern="2:4")) == [name]
    ow.project(model, "2:4")
    assert not problems(model, x, pattern="2:4")


def test_the_error_lists_layers_with_what_was_found(x):
    model = net()
    model.fc = nn.Linear(16, 8)
    with pytest.raises(
        ow.NotSparse, match=r"1 weight is denser than its pattern:\n  fc\.weight: 32 of 32 groups"
    ) as error:
        ow.verify(model)
    assert error.value.layers == {"fc.weight": "32 of 32 groups hold more than 2 of 4 (the worst 4)"}
    model = net()
    second_use_dense(model)
    with pytest.raises(ow.NotSparse, match=r"fc\.weight: multiplied while 32 of 32 groups hold more than 2 of 4"):
        ow.verify(model, x)


# What reaches the products


class Scope(nn.Module):
    """A module that computes `forward(self, x)`."""

    def __init__(self, compute, **children):
        super().__init__()
        self.compute = compute
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, *args):
        return self.compute(self, *args)


def encoder():
    return nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True))


def test_the_fast_path_is_watched_as_it_runs(x):
    model, x = encoder(), torch.randn(2, 5, 16)
    ow.sparsify(model, "2:4")
    ran = []
    original = torch._transformer_encoder_layer_fwd
    try:
        torch._transformer_encoder_layer_fwd = lambda *args: ran.append(0) or original(*args)
        assert ow.verify(model, x).notes == ()
    finally:
        torch._transformer_encoder_layer_fwd = original
    assert ran
    layer = model[0].linear2
    subclass(layer, weight=property(lambda self: dense(self)))
    assert list(problems(model, x)) == ["0.linear2.weight"]


def test_activations_of_a_weights_shape_are_not_taken_for_it():
    model = Scope(lambda self, x: self.fc(x) @ self.fc(x).T, fc=nn.Linear(8, 16))
    ow.sparsify(model, "2:4")
    assert not problems(model, torch.randn(8, 8))
    assert not problems(model, torch.randn(16, 8))


def test_fixed_matrices_are_not_taken_for_weights_but_accounted_for():
    model = Scope(lambda self, x: self.inner(self.fc(x @ self.hadamard)), fc=nn.Linear(8, 8))
    model.register_buffer("hadamard", torch.randn(8, 8))
    other = torch.randn(8, 8)
    model.inner = Scope(lambda self, x: x @ other)  # of the shape of a weight that lies elsewhere
    ow.sparsify(model, "2:4")
    assert problems(model, torch.randn(3, 8)).keys() == {"hadamard", "inner.constant"}
    assert not problems(model, torch.randn(3, 8), allow_dense=["hadamard", "inner"])


def test_learned_queries_are_not_taken_for_weights():
    def forward(self, x):
        return self.second(self.first(self.queries).relu() + self.queries) @ x.T

    model = Scope(forward, first=nn.Linear(8, 8), second=nn.Linear(8, 8), queries=nn.Parameter(torch.randn(8, 8)))
    ow.sparsify(model, "2:4")
    assert not problems(model, torch.randn(8, 8))


def test_a_batch_of_one_is_not_taken_for_its_position_embedding():
    model = Scope(
        lambda self, x: self.fc(self.fc(x + self.place)), fc=nn.Linear(8, 8), place=nn.Parameter(torch.randn(1, 5, 8))
    )
    ow.sparsify(model, "2:4", axis={"place": -1})
    assert not problems(model, torch.randn(1, 5, 8))


def test_looked_up_rows_of_a_sparse_table_are_sparse():
    def forward(self, x):
        return torch.bmm(x[:, None], self.experts[torch.tensor([2, 0, 1]) + x.argmin().mul(0)])

    model = Scope(forward, experts=nn.Parameter(torch.randn(4, 8, 16)))
    ow.sparsify(model, "2:4", axis={"experts": 1})
    assert ow.verify(model, torch.randn(3, 8)).notes == ()
    subclass(model, experts=property(lambda self: dense(self, "experts")))
    assert "experts" in problems(model, torch.randn(3, 8))


def test_a_stale_tensor_in_a_batched_product_is_found():
    model = Scope(
        lambda self, x: torch.bmm(x.expand(4, -1, -1), self.experts), experts=nn.Parameter(torch.randn(4, 8, 16))
    )
    ow.sparsify(model, "2:4", axis={"experts": 1})
    stale = dense(model, "experts").detach().clone()
    assert not problems(model, torch.randn(3, 8))
    model.compute = lambda self, x: torch.bmm(x.expand(4, -1, -1), stale)
    found = problems(model, torch.randn(3, 8))
    assert re.match("multiplied in a tensor that is none of the model's parameters", found["experts"])


@pytest.mark.parametrize("healthy", [True, False])
def test_weights_joined_at_run_time_are_recognized(healthy):
    def forward(self, x):
        read = (lambda layer: layer.weight) if healthy else dense
        return functional.linear(x, torch.cat([read(self.q), self.k.weight]))

    model = Scope(forward, q=nn.Linear(8, 6), k=nn.Linear(8, 6))
    ow.sparsify(model, "2:4")
    assert bool(problems(model, torch.randn(3, 8))) != healthy


@pytest.mark.parametrize("transposed", [lambda w: w.T.contiguous(), lambda w: w.to(torch.float64).float().T])
def test_copies_may_lie_transposed(transposed):
    model = Scope(lambda self, x: x @ transposed(self.fc.weight), fc=nn.Linear(8, 8))
    ow.sparsify(model, "2:4")
    assert not problems(model, torch.randn(3, 8))
    model.compute = lambda self, x: x @ transposed(dense(self.fc))
    assert list(problems(model, torch.randn(3, 8))) == ["fc.weight"]


@pytest.mark.parametrize("healthy", [True, False])
def test_views_are_checked_as_the_whole_weight(healthy):
    def forward(self, x):
        read = self.conv.weight if healthy else dense(self.conv)
        return functional.linear(x.flatten(1), read.flatten(1))

    model = Scope(forward, conv=nn.Conv2d(8, 4, 3))
    ow.sparsify(model, "2:4")
    if healthy:
        assert ow.verify(model, torch.randn(2, 8, 3, 3)).notes == ()
    else:
        assert list(problems(model, torch.randn(2, 8, 3, 3))) == ["conv.weight"]


def test_an_error_that_the_model_handles_does_not_confuse_the_watch():
    stale = torch.randn(16, 8)

    def forward(self, x):
        with contextlib.suppress(RuntimeError):
            self.fc(x[:, :3])
        return functional.linear(x, stale)

    model = Scope(forward, fc=nn.Linear(8, 16), last=nn.Linear(16, 8))
    ow.sparsify(model, "2:4")
    assert set(problems(model, torch.randn(2, 8))) == {"fc.weight", "last.weight"}


def test_what_the_example_does_not_show_is_noted():
    model = Scope(lambda self, x: self.used(x), used=nn.Linear(8, 8), idle=nn.Linear(8, 8))
    ow.sparsify(model, "2:4")
    assert ow.verify(model, torch.randn(1, 8)).notes == ("not reached by the example: idle.weight",)
    model.compute = lambda self, x: functional.linear(
        self.idle(x), self.used.weight.double().view(4, 16)[:, :8].float()
    )
    assert ow.verify(model, torch.randn(1, 8)).notes == ()
    model.compute = lambda self, x: functional.linear(
        self.idle(x).view(1, 2, 4), self.used.weight.double().float().view(16, 4)
    )
    assert ow.verify(model, torch.randn(1, 8)).notes == ()  # cut along its groups


@pytest.mark.parametrize(
    "example", [(torch.ones(1, 8), 2.0), {"x": torch.ones(1, 8), "scale": 2.0}], ids=["tuple", "dict"]
)
def test_examples_are_arguments_or_keywords(example):
    class Scaled(nn.Linear):
        def forward(self, x, scale):
            return super().forward(x * scale)

    model = Scaled(8, 8)
    report = ow.sparsify(model, "2:4", example=example)
    assert report.macs_dense == 64
    assert ow.verify(model, example).notes == ()


def test_casts_compilation_and_checkpointing_do_not_hide_weights():
    from torch.utils.checkpoint import checkpoint

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return checkpoint(self.second, self.first(x), use_reentrant=False)

    model = Scope(forward, first=nn.Linear(8, 8), second=nn.Sequential(nn.Linear(8, 8)))
    ow.sparsify(model, "2:4")
    model.first.compile(backend="eager")
    assert ow.verify(model, torch.randn(2, 8)).notes == ()


def test_an_error_of_the_model_stays_what_it_is_and_leaves_nothing_behind(x):
    model = net().train()
    with pytest.raises(RuntimeError, match=r"input\.size"):
        ow.verify(model, torch.randn(2, 5, 7))
    assert model.training
    assert model.fc.training
    assert not torch.nn.modules.module._global_forward_hooks
    assert not problems(model, x)


# Plain models


def test_without_a_pattern_the_tightest_is_inferred_with_a_warning():
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(16, 8))
    ow.project(model, {"0": "2:4", "1": "1:16"}, exclude=["2"])
    with pytest.warns(UserWarning, match=r"inferred from the weights \(2:4 for 1, 1:16 for 1 weights\)") as caught:
        report = ow.verify(model)
    assert caught[0].filename == __file__
    assert {name: str(each) for name, each in report.sparse.items()} == {"0.weight": "2:4", "1.weight": "1:16"}
    assert report.skipped == {"2.weight": "no N:M pattern with N < M holds"}


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "1:4", "3:8", "1:16", "5:16", "1:64"])
def test_the_tightest_pattern_is_the_one_that_was_used(pattern):
    model = nn.Linear(128, 8)
    ow.project(model, pattern)
    assert str(tightest(model.weight, Axis(1))) == pattern


def test_one_weight_too_many_is_found():
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8))
    ow.project(model, "2:4")
    with torch.no_grad():
        model[1].weight[3, 4:8] = torch.tensor([0.0, 1.0, 1.0, 1.0])
    assert problems(model, pattern="2:4") == {"1.weight": "1 of 16 groups holds more than 2 of 4 (the worst 3)"}


def test_a_dense_model_has_no_pattern():
    assert problems(nn.Linear(8, 8)) == {"weight": "no N:M pattern with N < M holds"}


def test_a_plain_report_lists_what_was_not_held_to_the_pattern():
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    ow.project(model, "2:4", exclude=["2"])
    report = ow.verify(model, pattern=ow.Selection("2:4", exclude=["2"]))
    assert list(report.sparse) == ["1.weight"]
    assert report.skipped == {
        "0.weight": "reduction axis has 6 weights, not a multiple of 4",
        "2.weight": "excluded by '2'",
    }
    assert list(problems(model, pattern="2:4")) == ["2.weight"]


def test_the_axis_of_a_pattern_counts():
    model = nn.Linear(8, 8)
    ow.project(model, "2:4", axis={"weight": 0})
    assert not problems(model, pattern=ow.Selection("2:4", axis={"weight": 0}))
    assert problems(model, pattern="2:4")


# Refusals


@pytest.mark.parametrize("choice", ["2:4", ow.Selection(exclude=["fc"]), ow.Selection("2:4", axis="kernel")], ids=str)
def test_a_sparsified_model_is_held_to_what_was_recorded_alone(choice):
    with pytest.raises(ValueError, match="held to what sparsify recorded; pattern= is for plain models"):
        ow.verify(net(), pattern=choice)


def test_a_model_of_the_dense_method_has_nothing_to_verify():
    model = nn.Linear(8, 8)
    ow.sparsify(model, "2:4", ow.Dense())
    with pytest.raises(ValueError, match=r"trains with ow\.Dense, .*keeps every weight: there is nothing to verify"):
        ow.verify(model)


def test_who_gives_a_pattern_is_told_how_layers_are_left_out():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    ow.project(model, "2:4", exclude=["1"])
    with pytest.raises(
        ow.NotSparse, match=r"\n  1\.weight: .*\nlayers that are to stay dense are left out by pattern=ow\.S"
    ):
        ow.verify(model, pattern="2:4")
    ow.verify(model, pattern=ow.Selection("2:4", exclude=["1"]))
