"""Sparsity and quantization-aware training: prepare it first, then sparsify; the other order says so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.ao import quantization as ao

import openwork as ow
from openwork.nm.groups import Axis
from openwork.nm.masks import too_dense

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
X = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 16)
    return nn.Sequential(ao.QuantStub(), *layers, ao.DeQuantStub()).train()


def with_qconfig(model: nn.Module) -> nn.Module:
    model.qconfig = ao.get_default_qat_qconfig("x86")
    return model


def train(model: nn.Module, x: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    ow.attach(optimizer, model)
    for _ in range(3):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def check(weight: Tensor) -> None:
    values = weight.int_repr() if weight.is_quantized else weight
    assert values.dtype == torch.int8
    assert not too_dense(values, ow.Pattern(2, 4), Axis(1))


def test_prepared_then_sparsified_is_sparse_in_int8() -> None:
    model = ao.fuse_modules_qat(net(), [["1", "2", "3"]])
    ao.prepare_qat(with_qconfig(model), inplace=True)
    report = ow.sparsify(model, "2:4", ow.SRSTE(0.02))
    assert list(report.sparse) == ["1.weight", "5.weight"]
    train(model, X)
    ow.verify(model, X)
    ow.finalize(model.eval())
    converted = ao.convert(model)
    check(converted[1].weight())
    check(converted[5].weight())


def test_prepared_by_tracing_then_sparsified() -> None:
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx

    plain = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 16)).train()
    model = prepare_qat_fx(plain, ao.get_default_qat_qconfig_mapping("x86"), (X,))
    ow.sparsify(model, "2:4", ow.SRSTE(0.02))
    train(model, X)
    ow.finalize(model.eval())
    check(convert_fx(model).get_submodule("3").weight())


def dynamic(model: nn.Module) -> object:
    return ao.quantize_dynamic(model.eval(), {nn.Linear})


def prepared(model: nn.Module) -> object:
    return ao.prepare_qat(with_qconfig(model), inplace=True)


def prepared_for_calibration(model: nn.Module) -> object:
    model.qconfig = ao.get_default_qconfig("x86")
    return ao.prepare(ao.convert(ao.prepare(model.eval())))


@pytest.mark.parametrize("call", [prepared, dynamic, prepared_for_calibration])
@pytest.mark.parametrize("layer", [nn.Linear(16, 16), nn.Conv2d(8, 8, 1), nn.Conv1d(8, 8, 1)], ids=str)
def test_a_sparsified_model_is_not_replaced_by_a_quantized_one(call, layer) -> None:
    if call is dynamic and not isinstance(layer, nn.Linear):
        pytest.skip("torch quantizes these not dynamically")
    model = nn.Sequential(layer.__class__(*((16, 16) if isinstance(layer, nn.Linear) else (8, 8, 1)))).train()
    ow.sparsify(model, "2:4")
    with pytest.raises(RuntimeError, match=r"prepare_qat before ow\.sparsify.*ow\.finalize first"):
        call(model)
    ow.verify(model)


def test_a_finalized_model_is_quantized_and_stays_sparse() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    ow.sparsify(model, "2:4")
    ow.finalize(model)
    check(dynamic(model)[0].weight())


class TestTorchao:
    """The library that took over from torch.ao."""

    @staticmethod
    def prepare(model: nn.Module) -> None:
        pytest.importorskip("torchao")
        from torchao.quantization import quantize_
        from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

        weights = IntxFakeQuantizeConfig(torch.int8, "per_channel")
        quantize_(model, QATConfig(weight_config=weights, step="prepare"))

    def test_prepared_then_sparsified(self) -> None:
        model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)), torch.randn(8, 64)
        self.prepare(model)
        ow.sparsify(model, "2:4", ow.SRSTE(0.02))
        train(model, x)
        ow.verify(model)
        ow.finalize(model)
        from torchao.quantization import quantize_
        from torchao.quantization.qat import QATConfig

        quantize_(model, QATConfig(step="convert"))
        ow.verify(model, pattern="2:4")

    def test_sparsified_then_prepared_says_what_the_weight_is(self) -> None:
        model = nn.Sequential(nn.Linear(64, 64))
        ow.sparsify(model, "2:4")
        with pytest.raises(RuntimeError, match=r"weight of a sparsified Linear.* assigned .*before ow\.sparsify"):
            self.prepare(model)

    def test_an_exported_program_is_prepared_then_sparsified(self) -> None:
        pytest.importorskip("torchao")
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
        x = torch.randn(8, 16)
        plain = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
        model = prepare_qat_pt2e(torch.export.export(plain, (x,)).module(), quantizer)
        assert len(ow.sparsify(model, "2:4", ow.SRSTE(0.02), axis={"*.weight": 1}).sparse) == 2
        train(model, x)
        ow.finalize(model)
        quantized = [each for each in convert_pt2e(model).state_dict().values() if each.dtype == torch.int8]
        assert len(quantized) == 2
        for weight in quantized:
            check(weight)
