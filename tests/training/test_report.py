"""The report counts what is there: weights, bytes with index bits, multiply-adds; and prints all of it."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

import openwork as ow
from openwork.training.report import Report, Row
from openwork.utils.torchvision_compat import ensure_torchvision


@pytest.fixture(scope="module")
def models():
    return ensure_torchvision().models


def report_of(model, x, **choices):
    return ow.sparsify(model, "2:4", example=x, **choices)


def test_a_row_counts_weights_bytes_and_macs():
    row = Row("fc", (8, 16), ow.Pattern(2, 4), "", kept=64, retained=0.9, groups=32, weight_bits=16, macs_dense=128)
    assert row.weights == 128
    assert row.density == 0.5
    assert (row.macs_dense, row.macs_sparse) == (128, 64)
    assert row.bytes_dense == 256
    assert row.bytes_sparse == 64 * 2 + 32 * 4 // 8  # 2:4 needs 4 bits a group


@pytest.mark.parametrize(("pattern", "bits"), [("2:4", 4), ("1:16", 4), ("7:8", 8), ("1:2", 1), ("4:4", 4)])
def test_index_bits_are_indices_or_a_bitmask_where_smaller(pattern, bits):
    row = ow.sparsify(nn.Linear(64, 2), pattern).rows[0]
    assert row.bytes_sparse == row.kept * 4 + math.ceil(128 / ow.Pattern.parse(pattern).m * bits / 8)


def test_bytes_are_rounded_up():
    assert ow.sparsify(nn.Linear(4, 1), "2:4").rows[0].bytes_sparse == 2 * 4 + 1


def test_retained_is_the_kept_share_of_the_squares():
    model = nn.Linear(4, 1, bias=False)
    model.weight.data = torch.tensor([[1.0, -2.0, 3.0, 0.0]])
    assert ow.sparsify(model, "1:4").rows[0].retained == pytest.approx(9 / 14)
    model = nn.Linear(4, 1, bias=False)
    model.weight.data.zero_()
    assert ow.sparsify(model, "1:4").rows[0].retained == 1


def test_totals_cover_every_parameter():
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4))
    report = ow.sparsify(model, "1:4", exclude=["2"])
    assert report.parameters_dense == sum(p.numel() for p in model.parameters())
    assert report.parameters_sparse == report.parameters_dense - 128 * 3 // 4
    assert report.macs_dense is None
    assert report.macs_sparse is None
    assert ow.verify(model).parameters_dense == report.parameters_dense
    ow.finalize(model)
    assert report.parameters_sparse == sum(int((p != 0).sum()) for p in model.parameters() if p.ndim > 1) + 16 + 32 + 4


def test_the_table_shows_shape_pattern_reason_density_energy_parameters_and_macs():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1))
    text = str(report_of(model, torch.ones(1, 3, 6, 6)))
    lines = [line.split() for line in text.splitlines()]
    assert lines[0] == ["Sequential,", "sr-ste"]
    assert " ".join(lines[1]) == "weight shape pattern density retained weights bytes MACs reason"
    reason = "reduction axis has 3 weights, not a multiple of 4"
    assert lines[2] == ["0.weight", "8x3x3x3", "dense", "1.000", "1.000", "216", "864", "3.456k", *reason.split()]
    assert lines[3][:4] == ["1.weight", "8x8x1x1", "2:4", "0.500"]
    assert " ".join(lines[3][5:]) == "64 -> 32 256 -> 136 1.024k -> 512"
    summary = "1 weight sparse, 1 dense; parameters 296 -> 264 (89.2%); candidate bytes with index bits 89.3% of dense"
    assert text.splitlines()[-1] == f"{summary}; MACs 4.48k -> 3.968k (88.6%)"


def test_columns_are_aligned_and_notes_come_last():
    rows = (Row("a", (4, 4), ow.Pattern(2, 4), "", 8, 1.0, 4), Row("long.name", (4, 16), None, "why", 64, 1.0))
    lines = str(Report(rows, "title", notes=("a note",))).splitlines()
    assert len({line.index(word) for line, word in zip(lines[1:4], ("shape", "4x4", "4x16"), strict=True)}) == 1
    assert lines[-1] == "a note"
    assert "MACs" not in lines[1]


def test_it_prints_through_rich():
    rich = pytest.importorskip("rich.console")
    report = report_of(nn.Linear(8, 8), torch.ones(1, 8))
    console = rich.Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report)
    text = console.export_text()
    assert report.summary in text
    assert "64 -> 32" in text


# Multiply-adds


@pytest.mark.parametrize(
    ("name", "axis", "dense", "sparse"),
    [
        ("resnet18", "kernel", 1.814, {"2:4": 0.907, "1:4": 0.454, "1:16": 0.114}),
        ("resnet50", "kernel", 4.089, {"2:4": 2.046, "1:4": 1.024, "1:16": 0.257}),
        ("resnet18", "input", 1.814, {"2:4": 0.966, "1:4": 0.542, "1:16": 0.224}),
        ("resnet50", "input", 4.089, {"2:4": 2.105, "1:4": 1.112, "1:16": 0.368}),
    ],
)
def test_macs_of_resnets_are_the_published_ones(models, name, axis, dense, sparse):
    """In units of 10^9, at 224 x 224, fc dense; axis="kernel" is what Zhou et al., ICLR 2021, count."""
    for pattern, expected in sparse.items():
        with torch.device("meta"):
            model, x = getattr(models, name)(), torch.empty(1, 3, 224, 224)
            report = ow.sparsify(model, pattern, axis=axis, exclude=["fc"], example=x)
        assert (round(report.macs_dense / 1e9, 3), round(report.macs_sparse / 1e9, 3)) == (dense, expected)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = (each.unflatten(-1, (2, 8)).transpose(1, 2) for each in self.qkv(x).chunk(3, -1))
        return self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def by_name(report):
    return {row.name: row.macs_dense for row in report.rows}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("placed", [False, True], ids=["plain", "with positions"])
def test_attention_is_counted_and_belongs_to_no_weight(batch, placed):
    class Placed(Attention):
        def __init__(self):
            super().__init__()
            self.place = nn.Parameter(torch.randn(1, 5, 16))

        def forward(self, x):
            return super().forward(x + self.place)

    report = report_of(Placed() if placed else Attention(), torch.randn(batch, 5, 16))
    macs = by_name(report)
    assert macs["qkv.weight"] == batch * 5 * 16 * 48
    assert macs["out.weight"] == batch * 5 * 16 * 16
    assert report.other_macs == batch * 2 * 2 * 5 * 5 * 8  # two products of two heads
    assert report.macs_dense == sum(macs.values()) + report.other_macs
    assert report.macs_sparse == sum(macs.values()) // 2 + report.other_macs


@pytest.mark.parametrize("training", [True, False])
def test_fused_layers_are_counted_part_by_part(training):
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1).train(training)
    report = report_of(model, torch.randn(1, 5, 16))
    assert [macs // 5 for macs in by_name(report).values()] == [16 * 48, 16 * 16, 16 * 32, 16 * 32]
    assert report.other_macs == 2 * 5 * 5 * 16
    assert model.training == training


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent_layers_count_every_step(kind, gates):
    report = report_of(kind(8, 16), torch.randn(7, 2, 8))
    assert by_name(report) == {"weight_ih_l0": 14 * 8 * 16 * gates, "weight_hh_l0": 14 * 16 * 16 * gates}
    assert report.other_macs == 0


@pytest.mark.parametrize(
    ("model", "x", "macs"),
    [
        (nn.Linear(8, 4), (8,), 32),
        (nn.Linear(8, 4), (2, 3, 8), 192),
        (nn.Conv2d(8, 4, 3), (1, 8, 5, 5), 9 * 9 * 32),
        (nn.Conv2d(8, 4, 3, groups=2), (1, 8, 5, 5), 9 * 9 * 16),
        (nn.ConvTranspose2d(8, 4, 3), (1, 8, 2, 2), 4 * 9 * 32),
        (nn.Conv1d(8, 4, 3, stride=2), (2, 8, 5), 2 * 2 * 3 * 32),
    ],
    ids=str,
)
def test_macs_of_single_layers(model, x, macs):
    assert report_of(model, torch.randn(x)).macs_dense == macs


def test_a_layer_used_twice_counts_twice_and_an_idle_one_not_at_all():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.fc(self.fc(x))

    assert by_name(report_of(Twice(), torch.ones(1, 8))) == {"fc.weight": 128, "idle.weight": 0}


def test_learned_queries_leave_the_macs_to_the_weight():
    class Queries(nn.Module):
        def __init__(self):
            super().__init__()
            self.queries, self.fc = nn.Parameter(torch.randn(5, 8)), nn.Linear(8, 4)

        def forward(self, x):
            return self.fc(self.queries) + x

    assert by_name(report_of(Queries(), torch.ones(4))) == {"queries": 0, "fc.weight": 160}


def test_data_on_the_right_of_a_weight_leaves_it_the_macs():
    class Readout(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.fc = nn.Embedding(10, 8), nn.Linear(8, 4)

        def forward(self, ids):
            return (self.fc.weight @ self.embed(ids).T).T + self.fc.weight.mv(self.embed(ids[0]))

    assert by_name(report_of(Readout(), torch.arange(3))) == {"embed.weight": 0, "fc.weight": 4 * 32}


def test_experts_are_counted_by_the_tokens_they_get():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 16, 8))

        def forward(self, x):
            return functional.grouped_mm(x, self.weight, offs=torch.tensor([3, 4], dtype=torch.int32))

    report = report_of(Experts().bfloat16(), torch.ones(4, 16, dtype=torch.bfloat16), axis={"weight": 1})
    assert by_name(report) == {"weight": 4 * 16 * 8}


def test_on_the_meta_device_only_the_energy_is_unknown():
    with torch.device("meta"):
        report = ow.sparsify(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8)), "1:4", remainder="pad")
    real = ow.sparsify(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8)), "1:4", remainder="pad")
    assert [(row.kept, row.groups, row.bytes_sparse) for row in report.rows] == [(16, 16, 68), (16, 16, 68)]
    assert [(row.kept, row.groups, row.bytes_sparse) for row in real.rows] == [(16, 16, 68), (16, 16, 68)]
    assert math.isnan(report.rows[0].retained)
