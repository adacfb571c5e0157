"""`verify` said that a model was N:M while it multiplied dense weights: along the other axis, made by another product,
scaled by data, or of a buffer. Every product of a constant is sparse along its own sum, declared dense, or reported."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import openwork as ow


class Net(nn.Module):
    """A module that computes `forward(self, x)`."""

    def __init__(self, compute: Callable[[Net, Tensor], Tensor], buffers: dict[str, Tensor] | None = None, **children):
        super().__init__()
        self.compute = compute
        for name, child in children.items():
            setattr(self, name, child)
        for name, buffer in (buffers or {}).items():
            self.register_buffer(name, buffer)

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


def fc(inputs: int = 32, outputs: int = 32) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


def conv() -> nn.Conv2d:
    return nn.Conv2d(16, 16, 3, bias=False)


def latent(layer: nn.Module) -> Tensor:
    return layer.parametrizations.weight.original


def attended(self: Net, x: Tensor) -> Tensor:
    """Learned queries that look at the data, with plain matmuls."""
    q = self.q(self.latents.expand(len(x), -1, -1)).unflatten(-1, (4, 8)).transpose(1, 2)
    k, v = (each(x).unflatten(-1, (4, 8)).transpose(1, 2) for each in (self.k, self.v))
    return (q @ k.transpose(-1, -2)).softmax(-1) @ v


def modulated(self: Net, x: Tensor) -> Tensor:
    """StyleGAN2's convolution: the weight is scaled for each sample, and normalized."""
    style = self.style(x.mean((2, 3)))
    weight = self.conv.weight[None] * style[:, None, :, None, None]
    weight = weight * (weight.square().sum([2, 3, 4], keepdim=True) + 1e-8).rsqrt()
    return F.conv2d(x.flatten(0, 1)[None], weight.flatten(0, 1), groups=len(x))


def cached(self: Net, x: Tensor) -> Tensor:
    """A cache of keys is a buffer that holds data once it is written."""
    self.cache[:, 2:3] = self.fc(x)[:, None]
    return self.fc(x)[:, None] @ self.cache.transpose(1, 2)


def in_inference_mode(self: Net, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x @ self.fc.weight


def in_lower_precision(self: Net, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return F.linear(x, self.fc.weight.T)


@torch.library.custom_op("openwork_test::multiplied", mutates_args=())
def multiplied(x: Tensor, w: Tensor) -> Tensor:
    """Somebody's own operator."""
    return x @ w.T


VECTORS, IMAGES, SEQUENCES = (3, 32), (2, 16, 8, 8), (3, 7, 32)
STALE = {"weight": torch.randn(32, 32)}
DENSE = {
    "the other axis": (lambda s, x: x @ s.fc.weight, lambda: {"fc": fc()}, VECTORS),
    "of a weight that is not square": (
        lambda s, x: F.linear(s.fc(x), s.fc.weight.T),
        lambda: {"fc": fc(32, 16)},
        VECTORS,
    ),
    "the other axis, einsum": (lambda s, x: torch.einsum("bi,io->bo", x, s.fc.weight), lambda: {"fc": fc()}, VECTORS),
    "the other axis, tensordot": (
        lambda s, x: torch.tensordot(x, s.fc.weight, dims=([1], [0])),
        lambda: {"fc": fc()},
        VECTORS,
    ),
    "the other axis, vector": (lambda s, x: s.fc.weight.T @ x[0], lambda: {"fc": fc()}, VECTORS),
    "the other axis, vmap": (lambda s, x: torch.vmap(lambda a: s.fc.weight.T @ a)(x), lambda: {"fc": fc()}, VECTORS),
    "the other axis, written to": (
        lambda s, x: torch.zeros(3, 32).addmm_(x, s.fc.weight),
        lambda: {"fc": fc()},
        VECTORS,
    ),
    "the other axis, inference mode": (in_inference_mode, lambda: {"fc": fc()}, VECTORS),
    "the other axis, autocast": (in_lower_precision, lambda: {"fc": fc()}, VECTORS),
    "permuted inputs": (
        lambda s, x: F.linear(x, s.fc.weight[:, torch.arange(32) * 5 % 32]),
        lambda: {"fc": fc()},
        VECTORS,
    ),
    "every second input": (lambda s, x: F.linear(x[:, ::2], s.fc.weight[:, ::2]), lambda: {"fc": fc()}, VECTORS),
    "tied decoder": (lambda s, x: F.linear(s.fc(x).relu(), s.fc.weight.t()), lambda: {"fc": fc()}, VECTORS),
    "convolution with its axes exchanged": (
        lambda s, x: F.conv2d(x, s.conv.weight.transpose(0, 1)),
        lambda: {"conv": conv()},
        IMAGES,
    ),
    "transposed convolution": (
        lambda s, x: F.conv_transpose2d(s.conv(x), s.conv.weight),
        lambda: {"conv": conv()},
        IMAGES,
    ),
    "times a rotation": (
        lambda s, x: F.linear(x, s.fc.weight @ s.other),
        lambda: {"fc": fc(), "buffers": {"other": torch.randn(32, 32)}},
        VECTORS,
    ),
    "through a layer": (lambda s, x: F.linear(x, s.other(s.fc.weight)), lambda: {"fc": fc(), "other": fc()}, VECTORS),
    "low rank": (lambda s, x: F.linear(x, s.a.weight @ s.b.weight), lambda: {"a": fc(8, 32), "b": fc(32, 8)}, VECTORS),
    "made by a hypernetwork": (
        lambda s, x: F.conv2d(x, s.hyper(s.code).view(16, 16, 3, 3)),
        lambda: {"hyper": fc(8, 2304), "code": nn.Parameter(torch.randn(1, 8))},
        IMAGES,
    ),
    "mixture of weights": (
        lambda s, x: torch.einsum("be,eoi,bi->bo", x[:, :4].softmax(1), s.experts, x),
        lambda: {"experts": nn.Parameter(torch.randn(4, 32, 32)), "axis": {"experts": 2}},
        VECTORS,
    ),
    "standardized": (
        lambda s, x: F.linear(x, s.fc.weight - s.fc.weight.mean(1, keepdim=True)),
        lambda: {"fc": fc()},
        VECTORS,
    ),
    "shifted by data": (lambda s, x: F.linear(x, s.fc.weight + x.mean()), lambda: {"fc": fc()}, VECTORS),
    "latent": (lambda s, x: s.fc(x) + F.linear(x, latent(s.fc)), lambda: {"fc": fc()}, VECTORS),
    "latent, scaled by data": (
        lambda s, x: s.fc(x) + F.linear(x, latent(s.fc) * x.mean()),
        lambda: {"fc": fc()},
        VECTORS,
    ),
    "latent, scaled for each sample": (
        lambda s, x: torch.bmm(x[:, None], latent(s.fc) * x.mean(1)[:, None, None]) + s.fc(x)[:, None],
        lambda: {"fc": fc()},
        VECTORS,
    ),
    "latent, one by one and summed": (
        lambda s, x: s.fc(x) + (x[:, None, :] * latent(s.fc)).sum(-1),
        lambda: {"fc": fc()},
        VECTORS,
    ),
    "latent, one by one and averaged, one sample": (
        lambda s, x: s.fc(x) + (x[:, None, :] * latent(s.fc)).mean(-1),
        lambda: {"fc": fc()},
        (1, 32),
    ),
    "one by one, along the other axis": (
        lambda s, x: (x[:, :, None] * s.fc.weight).sum(1),
        lambda: {"fc": fc()},
        VECTORS,
    ),
    "in somebody's operator": (
        lambda s, x: s.fc(x) + torch.ops.openwork_test.multiplied(x, latent(s.fc)),
        lambda: {"fc": fc()},
        VECTORS,
    ),
    "a buffer": (
        lambda s, x: s.fc(x) + F.linear(x, s.table),
        lambda: {"fc": fc(), "buffers": {"table": torch.randn(32, 32)}},
        VECTORS,
    ),
    "a buffer in a convolution": (
        lambda s, x: s.conv(F.conv2d(x, s.table)),
        lambda: {"conv": conv(), "buffers": {"table": torch.randn(16, 16, 3, 3)}},
        IMAGES,
    ),
    "neither parameter nor buffer": (lambda s, x: s.fc(x) + x @ STALE["weight"], lambda: {"fc": fc()}, VECTORS),
}
SPARSE = {
    "copies and casts": (lambda s, x: F.linear(x, s.fc.weight.double().clone().float()), lambda: {"fc": fc()}, VECTORS),
    "einsum": (lambda s, x: torch.einsum("bi,oi->bo", x, s.fc.weight), lambda: {"fc": fc()}, VECTORS),
    "inner": (lambda s, x: torch.inner(x, s.fc.weight), lambda: {"fc": fc()}, VECTORS),
    "normalized, which keeps zeros": (
        lambda s, x: F.linear(x, F.normalize(s.fc.weight, dim=1)),
        lambda: {"fc": fc()},
        VECTORS,
    ),
    "gated rows": (lambda s, x: F.linear(x, s.fc.weight * x.mean(0)[:, None]), lambda: {"fc": fc()}, VECTORS),
    "one by one and summed": (lambda s, x: (x[:, None, :] * s.fc.weight).sum(-1), lambda: {"fc": fc()}, VECTORS),
    "cut between groups": (
        lambda s, x: F.linear(x[:, :15], s.fc.weight[:, :15]) + F.linear(x[:, 15:], s.fc.weight[:, 15:]),
        lambda: {"fc": fc()},
        VECTORS,
    ),
    "unfolded": (
        lambda s, x: F.linear(F.unfold(x, 3).mT, s.conv.weight.flatten(1).clone()),
        lambda: {"conv": conv()},
        IMAGES,
    ),
    "unfolded, channels last": (
        lambda s, x: F.linear(F.unfold(x, 3).mT, s.conv.weight.permute(0, 2, 3, 1).flatten(1)),
        lambda: {"conv": conv()},
        IMAGES,
    ),
    "modulated": (modulated, lambda: {"conv": conv(), "style": fc(16, 16)}, IMAGES),
    "looked-up experts": (
        lambda s, x: torch.bmm(x[:, None], s.experts[x.argmax(1) % 4].mT),
        lambda: {"experts": nn.Parameter(torch.randn(4, 32, 32)), "axis": {"experts": 2}},
        VECTORS,
    ),
    "learned queries": (
        attended,
        lambda: {**{name: fc() for name in "qkv"}, "latents": nn.Parameter(torch.randn(1, 5, 32))},
        SEQUENCES,
    ),
    "learned queries in torch's attention": (
        lambda s, x: s.attention(s.latents.expand(len(x), -1, -1), x, x)[0],
        lambda: {
            "attention": nn.MultiheadAttention(32, 4, batch_first=True),
            "latents": nn.Parameter(torch.randn(1, 5, 32)),
        },
        SEQUENCES,
    ),
    "a learned image": (
        lambda s, x: s.conv(s.start.expand(2, -1, -1, -1)) * x.mean(),
        lambda: {"conv": conv(), "start": nn.Parameter(torch.randn(1, 16, 8, 8))},
        IMAGES,
    ),
    "noise": (lambda s, x: s.fc(torch.randn(3, 32)) + s.fc(x), lambda: {"fc": fc()}, VECTORS),
    "a cache": (cached, lambda: {"fc": fc(), "buffers": {"cache": torch.zeros(3, 8, 32)}}, VECTORS),
    "positions and masks": (
        lambda s, x: s.fc((x + s.place) * s.rotation).softmax(-1) @ x.mT + s.mask,
        lambda: {
            "fc": fc(),
            "buffers": {name: torch.randn(7, 32) for name in ("place", "rotation")} | {"mask": torch.eye(7)},
        },
        SEQUENCES,
    ),
    "an outer product": (
        lambda s, x: s.fc((x[:, :1, None] @ s.frequencies).flatten(1)),
        lambda: {"fc": fc(), "buffers": {"frequencies": torch.randn(1, 32)}},
        VECTORS,
    ),
}


def made(case, **choices) -> tuple[nn.Module, Tensor]:
    compute, parts, shape = case
    parts = parts()
    axis = parts.pop("axis", "input")
    model = Net(compute, **parts)
    ow.sparsify(model, "2:4", ow.STE(), axis=axis, **choices)
    return model, torch.randn(shape)


@pytest.mark.parametrize("case", DENSE.values(), ids=DENSE.keys())
def test_a_dense_product_is_an_error_unless_it_is_allowed(case):
    model, x = made(case)
    ow.verify(model)  # the weights are as they should be
    with pytest.raises(ow.NotSparse):
        ow.verify(model, x)
    report = ow.verify(model, x, allow_dense=["*"])
    assert report.products.dense == len(report.products.allowed) >= 1
    assert "not every product does" in report.title
    assert "not accounted for but allowed" in str(report)


@pytest.mark.parametrize("case", SPARSE.values(), ids=SPARSE.keys())
def test_a_sparse_product_is_counted_and_raises_no_alarm(case):
    model, x = made(case)
    products = ow.verify(model, x).products
    assert products.sparse >= 1
    assert products.dense == 0


def test_what_is_multiplied_is_named():
    model, x = made(DENSE["a buffer"])
    with pytest.raises(ow.NotSparse, match=r"1 product is not accounted for:\n  table: \(32, 32\) multiplied in the m"):
        ow.verify(model, x)
    model, x = made(DENSE["times a rotation"])
    with pytest.raises(ow.NotSparse, match=r"fc\.weight: multiplied while .* \(computed from it and other\)") as error:
        ow.verify(model, x)
    assert error.value.unaccounted == frozenset()


# What is declared dense


def test_a_buffer_is_declared_by_exclude_or_allowed():
    case = DENSE["a buffer"]
    model, x = made(case, exclude=["table"])
    report = ow.verify(model, x)
    assert (report.products.sparse, report.products.dense) == (1, 1)
    assert report.products.declared == {"table": "excluded by 'table'"}
    ow.finalize(model)
    assert ow.verify(model, x, pattern=ow.Selection("2:4", exclude=["table"])).products.dense == 1
    assert ow.verify(model, x, pattern="2:4", allow_dense=["table"]).products.allowed.keys() == {"table"}
    with pytest.raises(ow.NotSparse, match="table"):
        ow.verify(model, x, pattern="2:4")
    with pytest.raises(TypeError, match="needed a list of globs"):
        ow.verify(model, x, pattern="2:4", allow_dense="table")


def test_what_cannot_be_sparse_is_dense_by_itself():
    model = Net(lambda s, x: s.fc(x @ s.bank), {"bank": torch.randn(201, 32)}, fc=fc())
    ow.sparsify(model, "2:4")
    declared = ow.verify(model, torch.randn(2, 201)).products.declared
    assert declared == {"bank": "reduction axis has 201 weights, not a multiple of 4"}


def test_a_layer_that_was_left_alone_is_listed_and_one_that_came_later_is_not_accounted_for():
    model = nn.Sequential(nn.Linear(10, 32), nn.Linear(32, 32), nn.Linear(32, 32))
    ow.sparsify(model, "2:4", exclude=["2"])
    x = torch.randn(1, 10)
    report = ow.verify(model, x)
    assert report.skipped == report.products.declared
    assert (report.products.sparse, report.products.dense) == (1, 2)
    model.append(nn.Linear(32, 32))
    with pytest.raises(ow.NotSparse, match=r"3\.weight: \(32, 32\) multiplied in 3 \(addmm\)"):
        ow.verify(model, x)
    assert ow.verify(model, x, allow_dense=["3"]).products.allowed.keys() == {"3.weight"}


def test_the_report_says_that_a_tied_head_is_dense():
    model = nn.Sequential(nn.Embedding(32, 32), nn.Linear(32, 32), nn.Linear(32, 32, bias=False))
    model[2].weight = model[0].weight
    ow.sparsify(model, "2:4")
    report = ow.verify(model, torch.tensor([[1, 2]]))
    assert report.products.declared == {"0.weight": "tied to 2.weight"}
    (line,) = [line for line in str(report).splitlines() if line.startswith("0.weight")]
    assert line.endswith("tied to 2.weight")


def test_modules_outside_of_what_was_sparsified_are_dense():
    model = nn.Sequential(nn.Sequential(fc()), fc())
    ow.sparsify(model[0], "2:4")
    declared = ow.verify(model, torch.randn(1, 32)).products.declared
    assert declared == {"1.weight": "in no module that sparsify was given"}


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.spectral_norm, nn.utils.parametrizations.orthogonal])
def test_weights_that_somebody_parametrized_are_dense_as_they_were_reported(norm):
    model = nn.Sequential(norm(fc()), fc())
    report = ow.sparsify(model, "2:4")
    x = torch.randn(2, 32)
    products = ow.verify(model, x).products
    assert (products.sparse, products.dense) == (1, 1)
    assert list(products.declared.values()) == list(report.skipped.values()) == ["its module is already parametrized"]
    ow.finalize(model)
    with torch.no_grad():
        assert ow.verify(model, x, pattern="2:4").products.dense == 1


def test_every_weight_of_a_recurrent_layer_is_a_product():
    model = nn.LSTM(8, 16)
    ow.sparsify(model, "2:4")
    assert ow.verify(model, torch.randn(2, 3, 8)).products.sparse % 2 == 0
    weights = [
        model.weight_ih_l0.detach(),
        model.parametrizations.weight_hh_l0.original,
        model.bias_ih_l0,
        model.bias_hh_l0,
    ]
    broken = type("Broken", (type(model),), {"_flat_weights": property(lambda self: weights, lambda *_: None)})
    model.__class__ = broken
    with pytest.raises(ow.NotSparse, match=r"^1 weight is denser.*\n  weight_hh_l0: "):
        ow.verify(model, torch.randn(2, 3, 8))


def test_packed_weights_of_quantized_layers_are_read():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dense, sparse = nn.Sequential(fc()), nn.Sequential(fc())
        ow.project(sparse, "2:4")
        quantized = {
            name: torch.ao.quantization.quantize_dynamic(each, {nn.Linear})
            for name, each in (("dense", dense), ("sparse", sparse))
        }
        model = Net(lambda s, x: s.fc(x) + s.other(x), fc=fc(), other=quantized["sparse"])
        ow.sparsify(model, "2:4")
        assert ow.verify(model, torch.randn(1, 32)).products.sparse == 2
        model.other = quantized["dense"]
        with pytest.raises(ow.NotSparse, match=r"other\.0\.constant"):
            ow.verify(model, torch.randn(1, 32))


# Compiled code, weights that are numbers only


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiled_code_is_seen_as_it_was_written(backend):
    wrong = torch.compile(lambda x, w: x @ w, backend=backend)
    model = nn.Sequential(Net(lambda s, x: wrong(x, s.fc.weight), fc=fc()))
    ow.sparsify(model, "2:4")
    with pytest.raises(ow.NotSparse, match=r"0\.fc\.weight: multiplied while"):
        ow.verify(torch.compile(model, backend=backend), torch.randn(3, 32))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 1e-45, -1e-45, 1.0])
def test_every_number_but_zero_counts(number):
    model = fc(8, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[number] * 2 + [-0.0] * 2 + [number] * 2 + [0.0] * 2]))
    ow.verify(model, pattern="2:4")
    with torch.no_grad():
        model.weight[0, 2] = number
    with pytest.raises(ow.NotSparse, match="1 of 2 groups"):
        ow.verify(model, pattern="2:4")


def test_a_short_last_group_is_held_to_n():
    model = fc(10, 1)
    ow.project(model, "2:4", remainder="pad")
    selection = ow.Selection("2:4", remainder="pad")
    assert ow.verify(model, torch.randn(1, 10), pattern=selection).products.sparse == 1
    assert not ow.verify(nn.Sequential(model, fc(1, 4), fc(4, 4)), pattern={"0": "4:4", "*": "4:4"}).sparse.get(
        "0.weight"
    )
    with pytest.raises(ValueError, match="reduction axis has 10 weights, not a multiple of 4"):
        ow.verify(model, pattern="2:4")


# Standardized weights


class Standardized(nn.Conv2d):
    """As in BiT and NFNets: what the forward multiplies is computed from the weight."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.flatten(1)[None]
        weight = F.batch_norm(flat, None, None, training=True).view_as(self.weight)
        return F.conv2d(x, weight, self.bias, padding=1)


def standardized() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(Standardized(8, 16, 3), nn.Conv2d(16, 8, 1)), torch.randn(1, 8, 6, 6)


def test_without_an_example_verify_says_what_it_cannot_see():
    model, x = standardized()
    ow.sparsify(model, "2:4")
    (note,) = ow.verify(model).notes
    assert note == "only an example shows what these layers multiply, whose forward is their own: Standardized (1)"
    with pytest.raises(ow.NotSparse, match=r"0\.weight: multiplied while"):
        ow.verify(model, x)


def test_with_an_example_sparsify_leaves_standardized_weights_dense():
    model, x = standardized()
    weight = model[0].weight.detach().clone()
    report = ow.sparsify(model, "2:4", example=x)
    assert report.sparse.keys() == {"1.weight"}
    assert report.skipped["0.weight"].startswith("its zeros reach no product: multiplied while ")
    assert report.macs_dense == 16 * 36 * (8 * 9 + 8)
    assert torch.equal(model[0].weight, weight)
    products = ow.verify(model, x).products
    assert (products.sparse, products.dense) == (1, 1)


def test_nothing_changes_where_the_example_shows_that_nothing_can_be_sparse():
    model = Net(lambda s, x: x @ s.fc.weight, fc=fc())
    before, memory = model.fc.weight.detach().clone(), model.fc.weight.data_ptr()
    with pytest.raises(ValueError, match=r"no weight that can be sparse:\n  fc\.weight: its zeros reach no product"):
        ow.sparsify(model, "2:4", example=torch.randn(3, 32))
    assert torch.equal(model.fc.weight, before)
    assert model.fc.weight.data_ptr() == memory
    assert type(model.fc) is nn.Linear


def test_a_weight_that_is_multiplied_both_ways_stays_sparse_and_is_noted():
    model = Net(lambda s, x: F.linear(s.fc(x), s.fc.weight.T), fc=fc())
    report = ow.sparsify(model, "2:4", example=torch.randn(3, 32))
    assert report.sparse.keys() == {"fc.weight"}
    assert report.notes[0].startswith("fc.weight is also multiplied while ")


@pytest.mark.filterwarnings("ignore")
def test_traced_and_scripted_models_are_held_by_their_products() -> None:
    model, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU()), torch.randn(2, 16)
    for make in (lambda: torch.jit.trace(model, x), lambda: torch.jit.script(model)):
        with pytest.raises(ValueError, match="name it with axis="):
            ow.verify(make(), x, pattern="2:4")
    ow.project(model, "2:4")
    for made in (torch.jit.trace(model, x), torch.jit.script(model)):
        with pytest.raises(ValueError, match="name it with axis="):
            ow.verify(made, pattern="2:4")
        for axis in ("input", {"0.weight": 1}):
            products = ow.verify(made, x, pattern=ow.Selection("2:4", axis=axis)).products
            assert (products.sparse, products.dense) == (1, 0)


def test_the_error_of_a_constant_says_what_allows_it() -> None:
    constant = torch.randn(16, 16)
    model = Net(lambda net, x: net.fc(x) @ constant, fc=nn.Linear(16, 16))
    ow.sparsify(model, "2:4")
    with pytest.raises(ow.NotSparse, match=r"\('constant' in allow_dense\)"):
        ow.verify(model, torch.randn(2, 16))
    assert ow.verify(model, torch.randn(2, 16), allow_dense=["constant"]).products.dense == 1
