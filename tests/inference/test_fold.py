"""Which normalizations and ReLUs are taken into the layer before them, and that the outputs stay what they were."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from openwork.inference.fold import fold_batch_norm, following_relu, replace

IMAGES, SIGNAL, ROWS = (2, 8, 9, 9), (2, 8, 12), (3, 8)


class Net(nn.Module):
    """A network of named modules whose forward is the function given."""

    def __init__(self, forward: Callable[..., object], **modules: nn.Module):
        super().__init__()
        self.how = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> object:
        return self.how(self, x)


def evaluated(model: nn.Module) -> nn.Module:
    """In eval mode and float64, with statistics that matter."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, least in ((module.running_mean, -1.0), (module.running_var, 0.5)):
                if tensor is not None:
                    tensor.uniform_(least, 2.0)
            if module.weight is not None:
                nn.init.uniform_(module.weight, -2, 2)
                nn.init.uniform_(module.bias, -2, 2)
    return model.double().eval()


def conv(**options: object) -> nn.Conv2d:
    return nn.Conv2d(8, 8, 3, **options)  # type: ignore[arg-type]


def leaves(found: object) -> list[Tensor]:
    return list(found) if isinstance(found, tuple) else [found]  # type: ignore[list-item]


def under_two_names() -> Net:
    layer, norm = conv(), nn.BatchNorm2d(8)
    return Net(lambda m, x: m.layers(x), first=layer, layers=nn.Sequential(layer, norm), last=norm)


FOLDED = {
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(8, 8, 3), nn.BatchNorm1d(8)), SIGNAL, ["0"]),
    "conv2d": (lambda: nn.Sequential(conv(), nn.BatchNorm2d(8)), IMAGES, ["0"]),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(8, 8, 1), nn.BatchNorm3d(8)), (2, 8, 2, 3, 4), ["0"]),
    "grouped": (lambda: nn.Sequential(conv(groups=2, dilation=2), nn.BatchNorm2d(8)), IMAGES, ["0"]),
    "strided, without bias": (lambda: nn.Sequential(conv(bias=False, stride=2), nn.BatchNorm2d(8)), IMAGES, ["0"]),
    "linear": (lambda: nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6)), ROWS, ["0"]),
    "linear, not affine": (lambda: nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6, affine=False)), ROWS, ["0"]),
    "conv, not affine": (lambda: nn.Sequential(conv(bias=False), nn.BatchNorm2d(8, affine=False)), IMAGES, ["0"]),
    "trained on several GPUs": (lambda: nn.Sequential(conv(), nn.SyncBatchNorm(8)), IMAGES, ["0"]),
    "dropout between": (lambda: nn.Sequential(conv(), nn.Dropout2d(), nn.BatchNorm2d(8)), IMAGES, ["0"]),
    "one after the other": (
        lambda: nn.Sequential(conv(), nn.BatchNorm2d(8), nn.ReLU(inplace=True), conv(), nn.BatchNorm2d(8)),
        IMAGES,
        ["0", "3"],
    ),
    "a functional ReLU in place after it": (
        lambda: Net(lambda m, x: m.norm(m.conv(x)).relu_(), conv=conv(), norm=nn.BatchNorm2d(8)),
        IMAGES,
        ["conv"],
    ),
    "both under two names": (under_two_names, IMAGES, ["first"]),
    "one branch of two": (
        lambda: Net(lambda m, x: m.norm(m.a(x)) + m.b(x), a=conv(), b=conv(), norm=nn.BatchNorm2d(8)),
        IMAGES,
        ["a"],
    ),
}


@pytest.mark.parametrize("name", FOLDED)
def test_folds(name):
    make, shape, expected = FOLDED[name]
    model = evaluated(make())
    x = torch.randn(shape, dtype=torch.float64)
    before = model(x)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert fold_batch_norm(model, x) == expected
    assert len(norms) == len(expected)
    assert not [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)


def hooked(which: str) -> Net:
    """The output of a module goes through a user's hook."""
    model = Net(lambda m, x: m.norm(m.conv(x)), conv=conv(), norm=nn.BatchNorm2d(8))
    model.get_submodule(which).register_forward_hook(lambda module, given, found: found * 2)
    return model


def own_forward() -> Net:
    model = Net(lambda m, x: m.norm(m.conv(x)), conv=conv(), norm=nn.BatchNorm2d(8))
    usual = model.conv.forward
    model.conv.forward = lambda x: usual(x).tanh()
    return model


def keeps(model: Net, x: Tensor) -> Tensor:
    model.features = model.conv(x)
    return model.norm(model.features)


def shared_weight_of_another_layer() -> Net:
    model = Net(lambda m, x: m.norm(m.a(x)) + m.b(x), a=conv(), b=conv(), norm=nn.BatchNorm2d(8))
    model.b.weight, model.b.bias = model.a.weight, model.a.bias
    return model


NORM_IN_FORWARD = lambda m, x: nn.functional.batch_norm(m.conv(x), m.norm.running_mean, m.norm.running_var)  # noqa: E731
NORMS = lambda m, x: m.norm(m.conv(x)) + m.norm(m.other(x))  # noqa: E731


def part(forward: Callable[..., object], **others: nn.Module) -> Callable[[], Net]:
    return lambda: Net(forward, **{"conv": conv(padding=1), "norm": nn.BatchNorm2d(8), **others})


LEFT = {
    "returned as well": (part(lambda m, x: (m.norm(y := m.conv(x)), y)), IMAGES),
    "kept for later": (part(keeps), IMAGES),
    "read twice": (part(lambda m, x: m.norm(y := m.conv(x)) + y), IMAGES),
    "read by a view": (part(lambda m, x: m.norm(y := m.conv(x)) + y.flatten(1).sum()), IMAGES),
    "called twice": (part(lambda m, x: m.norm(m.conv(m.conv(x)))), IMAGES),
    "a normalization for two layers": (part(NORMS, other=conv(padding=1)), IMAGES),
    "a normalization called twice": (part(lambda m, x: m.norm(m.norm(m.conv(x)))), IMAGES),
    "changed in place before": (part(lambda m, x: m.norm(m.conv(x).mul_(2))), IMAGES),
    "ReLU between": (lambda: nn.Sequential(conv(), nn.ReLU(inplace=True), nn.BatchNorm2d(8)), IMAGES),
    "before the layer": (lambda: nn.Sequential(nn.BatchNorm2d(8), conv()), IMAGES),
    "statistics of the batch": (lambda: nn.Sequential(conv(), nn.BatchNorm2d(8, track_running_stats=False)), IMAGES),
    "channels that are another dim": (lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), (2, 8, 8)),
    "one channel of many outputs": (lambda: nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(1)), (2, 1, 8)),
    "a batch of none": (lambda: nn.Sequential(nn.Conv1d(8, 8, 1), nn.BatchNorm1d(8)), (8, 8)),
    "a hook on the layer": (lambda: hooked("conv"), IMAGES),
    "a hook on the normalization": (lambda: hooked("norm"), IMAGES),
    "another forward": (own_forward, IMAGES),
    "functional": (part(NORM_IN_FORWARD), IMAGES),
    "a transposed convolution": (lambda: nn.Sequential(nn.ConvTranspose2d(8, 8, 3), nn.BatchNorm2d(8)), IMAGES),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_does_not_fold(name):
    make, shape = LEFT[name]
    model = evaluated(make())
    x = torch.randn(shape, dtype=torch.float64)
    before = model(x)
    assert fold_batch_norm(model, x) == []
    for now, then in zip(leaves(model(x)), leaves(before), strict=True):
        assert torch.equal(now, then)


def test_a_weight_that_another_layer_shares_stays_its():
    model = evaluated(shared_weight_of_another_layer())
    x = torch.randn(IMAGES, dtype=torch.float64)
    before = model(x)
    assert fold_batch_norm(model, x) == ["a"]
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)


def test_a_normalization_in_training_mode_stays():
    model = evaluated(nn.Sequential(conv(), nn.BatchNorm2d(8)))
    model[1].train()
    assert fold_batch_norm(model, torch.randn(IMAGES, dtype=torch.float64)) == []
    assert isinstance(model[1], nn.BatchNorm2d)


def test_zeros_stay_zeros_and_bfloat16_is_rounded_once():
    model = evaluated(nn.Sequential(conv(), nn.BatchNorm2d(8))).bfloat16()
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        model[0].weight[:, ::2] = 0
        exact[0].weight[:, ::2] = 0
    fold_batch_norm(model, torch.randn(IMAGES).bfloat16())
    fold_batch_norm(exact, torch.randn(IMAGES).double())
    assert not model[0].weight[:, ::2].any()
    for name in ("weight", "bias"):
        close = torch.allclose(getattr(model[0], name).double(), getattr(exact[0], name), rtol=2**-8, atol=1e-6)
        assert close, name
    assert model[0].weight.dtype == torch.bfloat16


def test_hooks_are_gone_afterwards_also_after_an_error():
    model = evaluated(nn.Sequential(conv(), nn.BatchNorm2d(8), nn.ReLU()))
    with pytest.raises(RuntimeError):
        fold_batch_norm(model, torch.randn(2, 7, 9, 9, dtype=torch.float64))
    fold_batch_norm(model, torch.randn(IMAGES, dtype=torch.float64))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def relu(inplace: bool) -> nn.Sequential:
    return nn.Sequential(conv(), nn.ReLU(inplace=inplace), conv())


CONV = {"conv": "norm"}
RELUS = {
    "after a convolution": (lambda: relu(False), {"0": "1"}),
    "in place, and read by the next": (lambda: relu(True), {"0": "1"}),
    "in place, the result not used": (part(lambda m, x: (y := m.conv(x), m.norm(y))[0], norm=nn.ReLU(True)), CONV),
    "in place, and returned": (part(lambda m, x: m.norm(m.conv(x)), norm=nn.ReLU(True)), CONV),
    "read before it, in place": (part(lambda m, x: (y := m.conv(x)).sum() + m.norm(y), norm=nn.ReLU(True)), {}),
    "read after it": (part(lambda m, x: m.norm(y := m.conv(x)) + y, norm=nn.ReLU()), {}),
    "returned before it": (part(lambda m, x: (m.norm(y := m.conv(x)), y), norm=nn.ReLU()), {}),
    "for two": (part(lambda m, x: m.norm(m.norm(m.conv(x)) + x), norm=nn.ReLU()), {}),
    "ReLU6": (part(lambda m, x: m.norm(m.conv(x)), norm=nn.ReLU6()), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", RELUS)
def test_relu_that_follows(name):
    make, expected = RELUS[name]
    model = make()
    x = torch.randn(IMAGES)
    assert following_relu(model, x) == expected


def test_sparse_tensors_pass_by():
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

        def forward(self, x, neighbours):
            return self.norm(self.layer(torch.sparse.mm(neighbours, x)))

    neighbours = torch.eye(3, dtype=torch.float64).to_sparse()
    model, x = evaluated(Graph()), torch.randn(ROWS, dtype=torch.float64)
    before = model(x, neighbours)
    assert fold_batch_norm(model, (x, neighbours)) == ["layer"]
    torch.testing.assert_close(model(x, neighbours), before, rtol=1e-12, atol=1e-12)


def test_replace_finds_every_name():
    old, new = nn.ReLU(), nn.Tanh()
    model = Net(lambda m, x: x, a=old, b=old, c=nn.Sequential(old, nn.ReLU()))
    replace(model, old, new)
    assert [model.a, model.b, model.c[0]] == [new] * 3
    assert type(model.c[1]) is nn.ReLU
