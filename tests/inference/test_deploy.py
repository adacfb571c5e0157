"""`ow.deploy`: the same outputs, faster where it was measured so and dense where not. Times are said, not taken."""

from __future__ import annotations

import copy
import io
import pickle
import sys
import warnings

import pytest
import torch
from fake_times import say
from torch import nn

import openwork as ow
from openwork.inference.layers import PackedConv1D, PackedConv1d, PackedConv2d, PackedLayer, PackedLinear
from openwork.recipes.models import allow_torchvision
from openwork.utils import timing
from openwork.utils.difference import largest_difference

X = torch.randn(2, 8, 9, 9)


class Net(nn.Module):
    """Everything that can be deployed and folded, and what cannot."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.grouped = nn.Conv2d(16, 16, 3, stride=2, dilation=2, padding=2, groups=2)
        self.norm = nn.BatchNorm2d(16)
        self.line = nn.Conv1d(16, 8, 3, padding="same")
        self.up, self.relu, self.down = nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 5)

    def forward(self, x):
        x = self.norm(self.grouped(self.stem(x))).flatten(2)
        return self.down(self.relu(self.up(self.line(x).mean(2))))


def shaken(model):
    """Normalizations that matter."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.bias, -1, 1)
    return model.eval()


def net(pattern="2:4"):
    model = shaken(Net())
    ow.project(model, pattern, exclude=["down"])
    return model


@pytest.fixture
def sparse_wins(monkeypatch):
    say(monkeypatch, gemm=0.5, gemv=0.6, sparse=0.5)


def deploy(model, x=X, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return ow.deploy(model, x, **options)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("pattern", ["2:4", "1:8"])
def test_the_same_outputs(weight_dtype, pattern, sparse_wins):
    model = net(pattern)
    before = copy.deepcopy(model.state_dict())
    fast = deploy(model, pattern=ow.Selection(pattern, exclude=["down"]), weight_dtype=weight_dtype)
    kinds = {name: type(each) for name, each in fast.named_modules() if isinstance(each, PackedLayer)}
    assert kinds == {"stem.0": PackedConv2d, "grouped": PackedConv2d, "line": PackedConv1d, "up": PackedLinear}
    assert not any(isinstance(each, nn.BatchNorm2d | nn.ReLU) for each in fast.modules())
    assert [fast.stem[0].relu, fast.grouped.relu, fast.up.relu] == [True, False, True]
    expected, found = model(X).detach(), fast(X)
    apart = float((found - expected).abs().max() / expected.abs().max())
    assert apart == pytest.approx(fast.deployment.difference, rel=1e-3)
    assert apart < {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.int8: 3e-2}[weight_dtype]
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert not any(each.requires_grad for each in fast.parameters())
    ow.verify(model, pattern=ow.Selection(pattern, exclude=["down"]))  # the model that was given is as it was


def test_other_batches_and_memory_formats(sparse_wins):
    model = net()
    fast = deploy(model, pattern=ow.Selection("2:4", exclude=["down"]))
    for x in (torch.randn(1, 8, 9, 9), torch.randn(7, 8, 9, 9).to(memory_format=torch.channels_last), X[:0]):
        torch.testing.assert_close(fast(x), model(x), atol=1e-5, rtol=1e-5)


def test_it_compiles_whole(sparse_wins):
    model = net()
    for weight_dtype in (torch.float32, torch.int8):
        fast = ow.deploy(model, X, pattern=ow.Selection("2:4", exclude=["down"]), weight_dtype=weight_dtype)
        assert any(isinstance(each, PackedConv2d) for each in fast.modules())
        compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            torch.testing.assert_close(compiled(X), fast(X))


@pytest.mark.skipif(not ow.kernels.vectors().dot_product, reason="needs AVX-512 with VBMI and VNNI")
def test_a_model_in_bfloat16(monkeypatch):
    """Everything but the grouped convolution by dot products; outputs as far from float64's as the dense model's."""
    say(monkeypatch, gemm=0.8, gemv=0.8, dot_product=0.5, sparse=0.5)
    model = net().bfloat16()
    x = X.bfloat16()
    fast = ow.deploy(model, x, pattern=ow.Selection("2:4", exclude=["down"]))
    kinds = {name: each.kind for name, each in fast.named_modules() if isinstance(each, PackedLayer)}
    assert kinds == {"stem.0": "dot_product", "grouped": "gemm", "line": "dot_product", "up": "dot_product"}
    exact = copy.deepcopy(model).double()(x.double())
    with torch.no_grad():
        y, dense = fast(x), model(x)
    assert y.dtype == torch.bfloat16
    assert (y - exact).abs().max() <= 2 * (dense - exact).abs().max() + 0.01 * exact.abs().max()
    assert {each.dtype for each in fast.state_dict().values() if each.is_floating_point()} == {torch.bfloat16}


def test_what_will_be_compiled_is_compared_compiled(monkeypatch):
    """Dense models gain more by it: here enough to win."""
    say(monkeypatch, gemm=0.5, gemv=0.5, sparse=0.5, **{"dense, compiled": 0.4})
    model, x = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval(), torch.randn(4, 16)
    ow.project(model, "2:4")
    fast = ow.deploy(model, x, pattern="2:4")
    assert fast.deployment.returned == "sparse"
    with pytest.warns(UserWarning, match="sparse is not faster than dense here"):
        dense = ow.deploy(model, x, pattern="2:4", timed_as="compiled")
    assert dense.deployment.whole == {"dense, compiled": 0.4, "sparse, compiled": 0.5}
    assert not any(isinstance(each, PackedLinear) for each in dense.modules())
    compiled = timing.compile_frozen(fast, x)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-5)
    assert not isinstance(fast, type(compiled))


def test_dense_is_kept_where_sparse_loses(monkeypatch):
    say(monkeypatch, gemm=2.0, gemv=2.0)
    model = net()
    with pytest.warns(UserWarning, match=r"^sparse is not faster .*returned \(see model\.deployment\)$"):
        fast = ow.deploy(model, X, pattern=ow.Selection("2:4", exclude=["down"]))
    assert fast.deployment.chosen == {}
    assert set(fast.deployment.whole) == {"dense", "dense, channels_last"}
    assert not any(isinstance(each, PackedLayer | nn.BatchNorm2d) for each in fast.modules())
    torch.testing.assert_close(fast(X), model(X), atol=1e-5, rtol=1e-5)


def test_only_winners_are_converted(monkeypatch):
    say(monkeypatch, gemm=0.5, gemv=2.0, oneDNN=0.4, sparse=0.5)
    fast = deploy(net(), pattern=ow.Selection("2:4", exclude=["down"]))
    assert {name for name, each in fast.named_modules() if isinstance(each, PackedLayer)} == {
        "stem.0",
        "grouped",
        "line",
    }
    assert type(fast.up) is nn.Linear


@pytest.mark.parametrize(("sparse", "wins"), [(0.96, True), (0.98, False)])
def test_the_whole_model_is_measured_too(monkeypatch, sparse, wins):
    say(monkeypatch, gemm=0.5, gemv=0.5, sparse=sparse)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fast = ow.deploy(net(), X, pattern=ow.Selection("2:4", exclude=["down"]))
    assert any(isinstance(each, PackedConv2d) for each in fast.modules()) == wins
    assert [str(each.message)[:37] for each in caught] == ["sparse is not faster than dense here:"] * (not wins)
    assert "whole model, dense, channels_last: 1000.00 ms" in str(fast.deployment)
    assert f"whole model, sparse: {sparse * 1000:.2f} ms" in str(fast.deployment)


@pytest.mark.parametrize("best", ["dense, channels_last", "sparse, channels_last", "sparse"])
def test_the_memory_format_that_was_fastest(monkeypatch, best):
    say(monkeypatch, gemm=0.5, torch=1.0, **{best: 0.1})
    model = shaken(nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)))
    ow.project(model, "2:4", exclude=["1"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast = ow.deploy(model, X, pattern=ow.Selection("2:4", exclude=["1"]))
    assert type(fast[0]) is (PackedConv2d if "sparse" in best else nn.Conv2d)
    assert fast[1].weight.is_contiguous(memory_format=torch.channels_last) == ("last" in best)
    assert fast(X).is_contiguous(memory_format=torch.channels_last) == ("last" in best)
    assert getattr(fast[0], "channels_last", "last" in best) == ("last" in best)  # also where no dense one is left
    torch.testing.assert_close(fast(X), model(X), atol=1e-5, rtol=1e-5)


def test_a_sparsified_model_is_finalized_in_a_copy(sparse_wins):
    model = shaken(Net())
    ow.sparsify(model, "2:4", exclude=["down"])
    fast = deploy(model)
    torch.testing.assert_close(fast(X), model(X), atol=1e-5, rtol=1e-5)
    assert isinstance(fast.up, PackedLinear)
    assert ow.masks(model)  # and goes on training
    assert model.up.weight.requires_grad


def test_a_model_in_training_mode_is_deployed_for_inference(sparse_wins):
    model = net().train()
    fast = deploy(model, pattern=ow.Selection("2:4", exclude=["down"]))
    assert model.training
    torch.testing.assert_close(fast(X), model.eval()(X), atol=1e-5, rtol=1e-5)


def test_patterns_are_inferred_with_a_warning(sparse_wins):
    model = net()
    with pytest.warns(UserWarning, match="inferred from the weights"):
        fast = ow.deploy(model, X)
    assert str(fast.up.pattern) == "2:4"


@pytest.mark.parametrize("whole", [nn.Linear(8, 6), nn.Conv1d(8, 6, 3)])
def test_one_layer_alone(whole, sparse_wins):
    ow.project(whole, "2:4")
    x = torch.randn(3, 8) if isinstance(whole, nn.Linear) else torch.randn(3, 8, 7)
    fast = deploy(whole, x, pattern="2:4")
    assert isinstance(fast, PackedLayer)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), whole(x), atol=1e-5, rtol=1e-5)
    assert fast.deployment.chosen


def test_a_layer_under_two_names_is_replaced_under_both(sparse_wins):
    model = Named(nn.Linear(8, 8))
    ow.project(model, "2:4")
    fast = deploy(model, torch.randn(3, 8), pattern="2:4")
    assert isinstance(fast.first, PackedLinear)
    assert fast.chain[0] is fast.first
    x = torch.randn(3, 8)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), atol=1e-5, rtol=1e-5)


class Named(nn.Module):
    """One layer under two names."""

    def __init__(self, layer):
        super().__init__()
        self.first, self.chain = layer, nn.Sequential(layer, nn.ReLU())

    def forward(self, x):
        return self.chain(x)


def test_torchs_fused_encoder_layer_runs_the_sparse_weights(sparse_wins, monkeypatch):
    """Its fused path reads weights past the layers."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    ow.project(model, "2:4")
    x = torch.randn(2, 5, 8)
    fast = deploy(model, x, pattern="2:4")
    calls = []
    usual = PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: calls.append(1) or usual(self, x))
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), model(x), atol=1e-5, rtol=1e-5)
    assert len(calls) == 4


def test_a_model_of_transformers(sparse_wins):
    allow_torchvision()  # which transformers imports where it is installed
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=20, n_positions=8, n_embd=16, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    ow.project(model, "2:4", exclude=["*wte*", "*wpe*", "lm_head*"])
    ids = {"input_ids": torch.arange(6)[None]}
    fast = deploy(model, ids, pattern=ow.Selection("2:4", exclude=["*wte*", "*wpe*", "lm_head*"]))
    assert isinstance(fast.transformer.h[1].mlp.c_fc, PackedConv1D)
    assert len(fast.deployment.chosen) == 8
    with torch.no_grad():
        torch.testing.assert_close(fast(**ids).logits, model(**ids).logits, atol=1e-4, rtol=1e-4)
    assert list(fast.state_dict()) == list(model.state_dict())


# --- saved, loaded, copied --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_saved_loaded_and_copied(sparse_wins, mode):
    model = net()
    with mode():  # whichever the caller is in, what is made can be loaded into
        fast = deploy(model, pattern=ow.Selection("2:4", exclude=["down"]))
    y = fast(X)
    state = fast.state_dict()
    plain = net()
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in plain.state_dict().items()}
    plain.load_state_dict(state)
    torch.testing.assert_close(plain(X), y, atol=1e-5, rtol=1e-5)
    other = deploy(net(), pattern=ow.Selection("2:4", exclude=["down"]))
    assert not torch.equal(other(X), y)
    other.load_state_dict(state)
    assert torch.equal(other(X), y)
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    for copied in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), torch.load(file, weights_only=False)):
        assert torch.equal(copied(X), y)
        assert copied.deployment == fast.deployment
        copied.load_state_dict(other.state_dict())


# --- what is refused or warned of -------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", [ow.plan, ow.deploy])
def test_mistakes(verb):
    dense = shaken(Net())
    for action, error, message in (
        (lambda: verb(dense, X, pattern="2:4"), ow.NotSparse, "5 weights are denser than their pattern:\n  stem.0"),
        (lambda: verb(dense, X), ow.NotSparse, "stem.0.weight: no N:M pattern with N < M holds"),
        (lambda: verb(net(), X, weight_dtype=torch.float16), ValueError,
         r"weight_dtype=torch\.float16; needed one of torch\.float32, torch\.bfloat16, torch\.int8"),
        (lambda: verb(Net().to("meta"), X), ValueError,
         r"the model is on meta; needed one CPU or one GPU: model"),
        (lambda: verb(net(), X, pattern=ow.Selection("2:4", exclude=["nothing"])), ValueError, "nothing"),
        (lambda: verb(net(), X[:, :7], pattern=ow.Selection("2:4", exclude=["down"])), RuntimeError, "channels"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            action()


def test_other_outputs_are_warned_of(sparse_wins, monkeypatch):
    model = net()
    module = sys.modules["openwork.inference.deploy"]
    usual = module.fold_batch_norm

    def wrong(model, example):
        usual(model, example)
        model.down.bias.data += 1

    monkeypatch.setattr(module, "fold_batch_norm", wrong)
    with pytest.warns(UserWarning, match=r"^outputs differ from the given model's by [\d.e-]+ of the largest, more th"):
        ow.deploy(model, X, pattern=ow.Selection("2:4", exclude=["down"]))


class Random(nn.Sequential):
    def forward(self, x):
        return super().forward(x + torch.rand(x.shape)), [torch.randn(2, 3), torch.arange(3), None]


def test_random_numbers_are_the_same_for_both(sparse_wins):
    model = Random(nn.Linear(8, 4))
    ow.project(model, "2:4")
    before = torch.get_rng_state()
    assert deploy(model, torch.randn(3, 8), pattern="2:4").deployment.difference < 1e-6
    torch.set_rng_state(before)


def difference(expected, found):
    return largest_difference(expected, found)


def test_differences():
    a, inf, nan = torch.tensor([1.0, -4.0]), float("inf"), float("nan")
    assert difference([a], [a]) == 0
    assert difference([a, 2 * a], [a, 3 * a]) == 0.5
    assert difference([a], [a.double() + 1]) == 0.25
    assert difference([a], [a[:1]]) == inf
    assert difference([a], []) == inf
    assert difference([], []) == 0
    assert difference([a[:0]], [a[:0]]) == 0
    for same in (nan, inf, -inf):
        strange = torch.tensor([1.0, same])
        assert difference([strange], [strange]) == 0
        assert difference([a], [strange]) == inf
        assert difference([strange], [a]) == inf
    assert difference([torch.zeros(2)], [torch.zeros(2)]) == 0
    assert difference([torch.zeros(2)], [torch.ones(2)]) == inf
