"""What a report says of weights that cannot be sparse, and what its numbers add up to."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import openwork as ow


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(8, 8)
        self.spectrum = nn.Parameter(torch.randn(8, 8, dtype=torch.complex64))
        self.wave = nn.Linear(8, 8, dtype=torch.complex64)
        self.empty = nn.Linear(8, 0)
        for name, values in {
            "indices": torch.ones(4, 4, dtype=torch.int64),  # no weights, and no row of the report
            "bytes": torch.ones(4, 4, dtype=torch.int8),
            "packed": torch.ones(4, 4, dtype=torch.uint8),
            "small": torch.ones(4, 4).to(torch.float8_e4m3fn),
            "coo": torch.eye(4).to_sparse(),
        }.items():
            setattr(self, name, nn.Parameter(values, requires_grad=False))

    def forward(self, x):
        return self.plain(x)


REASONS = {
    "spectrum": "dtype torch.complex64",
    "wave.weight": "dtype torch.complex64",
    "empty.weight": r"it holds no numbers: shape (0, 8)",
    "bytes": "dtype torch.int8",
    "small": "dtype torch.float8_e4m3fn",
    "packed": "dtype torch.uint8",
    "coo": "layout torch.sparse_coo",
}


@pytest.mark.parametrize("call", [ow.sparsify, ow.project])
def test_every_weight_is_in_the_report_with_its_reason(call) -> None:
    model = Odd()
    report = call(model, "2:4")
    assert list(report.sparse) == ["plain.weight"]
    assert report.skipped.keys() == REASONS.keys()
    assert all(report.skipped[name].startswith(reason) for name, reason in REASONS.items())
    assert report.parameters_dense == sum(parameter.numel() for parameter in model.parameters())
    assert report.parameters_dense - report.parameters_sparse == 32
    assert "complex64" in str(report)


def test_such_weights_train_verify_and_finalize_beside_sparse_ones() -> None:
    model = Odd()
    ow.sparsify(model, "2:4")
    model(torch.randn(2, 8)).sum().backward()
    ow.verify(model, torch.randn(2, 8))
    ow.finalize(model)
    ow.verify(model, torch.randn(2, 8), pattern=ow.Selection("2:4", exclude=["bytes"]))


def test_a_model_of_complex_weights_alone_says_why() -> None:
    with pytest.raises(ValueError, match=r"0\.weight: dtype torch\.complex64: needed"):
        ow.sparsify(nn.Sequential(nn.Linear(8, 8, dtype=torch.complex64)), "2:4")


def test_a_quantized_weight_is_told_from_an_ordinary_one() -> None:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    quantize_(model[0], Int8WeightOnlyConfig())
    report = ow.sparsify(model, "2:4")
    assert list(report.sparse) == ["1.weight"]
    assert "whose numbers are not its own" in report.skipped["0.weight"]


def test_excluded_weights_count_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    report = ow.sparsify(model, {"0": "2:4", "1": "1:4"}, exclude=["1"], example=torch.randn(1, 8))
    assert report.skipped == {"1.weight": "excluded by '1'", "2.weight": "no pattern given for it"}
    assert (report.parameters_dense, report.parameters_sparse, report.other_parameters) == (216, 184, 24)
    assert (report.macs_dense, report.macs_sparse) == (192, 160)
