"""Folding batch normalization: only where it normalizes what the layer gives, along the layer's outputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from openwork.folding import fold_batch_norm, following_relu


def ready(*layers: nn.Module) -> nn.Sequential:
    model = nn.Sequential(*layers).eval()
    with torch.no_grad():
        for each in model:
            if isinstance(each, nn.BatchNorm1d | nn.BatchNorm2d) and each.running_mean is not None:
                each.running_mean.normal_()
                each.running_var.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize(
    ("layers", "shape", "folded"),
    [
        ((nn.Linear(8, 6), nn.BatchNorm1d(6)), (3, 8), True),
        ((nn.Linear(8, 6, bias=False), nn.BatchNorm1d(6, affine=False)), (3, 8), True),
        ((nn.Linear(8, 6), nn.BatchNorm1d(6)), (3, 6, 8), False),  # normalizes dim 1, the layer's outputs are dim 2
        ((nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)), (2, 4, 9), True),
        ((nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)), (4, 8), False),  # one image of 6 x 6: again dim 1 is not the outputs
        ((nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)), (2, 4, 5, 5), True),
        ((nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False)), (2, 4, 5, 5), True),
        ((nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, track_running_stats=False)), (2, 4, 5, 5), False),
        ((nn.Linear(8, 6), nn.ReLU(), nn.BatchNorm1d(6)), (3, 8), False),
    ],
)
def test_the_outputs_stay(layers, shape, folded):
    model, x = ready(*layers), torch.randn(shape)
    with torch.no_grad():
        expected = model(x)
        assert fold_batch_norm(model, x) == ["0"] * folded
        torch.testing.assert_close(model(x), expected)
    assert isinstance(model[-1], nn.Identity) == folded


def test_a_relu_is_found_where_nothing_else_reads_what_it_takes():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.relu, self.other = nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(), nn.ReLU()

        def forward(self, x):
            y = self.a(x)
            return self.relu(y) + y + self.other(self.b(x))

    assert following_relu(Both(), torch.randn(2, 4)) == {"b": "other"}
