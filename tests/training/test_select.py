"""Which weights are chosen, along which axis, and what is said of the others."""

import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import openwork as ow
from openwork.nm.groups import Axis
from openwork.training.select import decide
from openwork.training.selection import matches


class Experts(nn.Module):
    """Bare parameters, as mixture-of-experts layers have them: (experts, in, out)."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 8, 16))
        self.scale = nn.Parameter(torch.randn(8, 1, 1))
        self.router = nn.Linear(8, 4)

    def forward(self, x):
        return torch.bmm((x * self.scale.sum()).expand(4, -1, -1), self.up)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head.weight = self.embed.weight


class Shared(nn.Module):
    """One module under two names."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b = self.a
        self.c = nn.Linear(8, 8)


def reasons(model, pattern="2:4", **choices):
    """Reason by weight; "" where it becomes sparse."""
    return {each.name: each.reason for each in decide(model, ow.Selection(pattern, **choices))}


def axes(model, **choices):
    return {each.name: each.axis for each in decide(model, ow.Selection("2:4", **choices)) if each.pattern}


def patterns(model, pattern, **choices):
    return {each.name: str(each.pattern) for each in decide(model, ow.Selection(pattern, **choices))}


@pytest.mark.parametrize(
    ("module", "tensor", "axis"),
    [
        (nn.Linear(8, 4), "weight", Axis(1)),
        (nn.Conv1d(8, 4, 3), "weight", Axis(1)),
        (nn.Conv2d(8, 4, 3), "weight", Axis(1)),
        (nn.Conv3d(8, 4, 3), "weight", Axis(1)),
        (nn.Conv2d(16, 8, 3, groups=2), "weight", Axis(1)),
        (nn.ConvTranspose1d(8, 4, 3), "weight", Axis(0)),
        (nn.ConvTranspose2d(16, 8, 3, groups=2), "weight", Axis(0, blocks=2)),
        (nn.LSTM(8, 4), "weight_ih_l0", Axis(1)),
        (nn.LSTM(8, 8, proj_size=4), "weight_hr_l0", Axis(1)),
        (nn.GRUCell(8, 4), "weight_hh", Axis(1)),
        (nn.MultiheadAttention(8, 2), "in_proj_weight", Axis(1)),
        (nn.MultiheadAttention(8, 2), "out_proj.weight", Axis(1)),
        (nn.MultiheadAttention(8, 2, kdim=4, vdim=4), "k_proj_weight", Axis(1)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_groups_lie_along_the_input_channels(module, tensor, axis):
    assert axes(module)[tensor] == axis


def test_the_published_axis_is_flat_and_takes_the_three_channel_stem():
    model = nn.Sequential(nn.Conv2d(3, 8, 4), nn.Linear(8, 8))
    assert axes(model, axis="kernel") == {"0.weight": Axis(flat=True), "1.weight": Axis(flat=True)}
    assert list(axes(model)) == ["1.weight"]


@pytest.mark.parametrize(
    ("module", "tensor", "reason"),
    [
        (nn.Embedding(8, 8), "0.weight", "embedding: rows are looked up"),
        (nn.EmbeddingBag(8, 8), "0.weight", "embedding"),
        (nn.Conv2d(8, 16, 3, groups=8), "0.weight", "depthwise"),
        (nn.ConvTranspose2d(8, 8, 3, groups=8), "0.weight", "depthwise"),
        (nn.Conv2d(3, 8, 3), "0.weight", "reduction axis has 3 weights, not a multiple of 4"),
        (nn.Conv2d(12, 6, 3, groups=2), "0.weight", "reduction axis has 6 weights"),
        (nn.Bilinear(4, 4, 4), "0.weight", "no known reduction axis in Bilinear: name it with axis="),
        (nn.MultiheadAttention(8, 2, add_bias_kv=True), "0.bias_k", "no known reduction axis"),
        (parametrizations.weight_norm(nn.Linear(8, 8)), "0.parametrizations.weight.original0", "weight norm's lengths"),
        (parametrizations.spectral_norm(nn.Linear(8, 8)), "0.parametrizations.weight.original", "already parametrized"),
        (parametrizations.weight_norm(nn.LSTM(8, 8), "weight_hh_l0"), "0.weight_ih_l0", "already parametrized"),
        (nn.Linear(8, 8).to(torch.float8_e4m3fn), "0.weight", r"dtype torch\.float8_e4m3fn"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_what_cannot_be_sparse_is_listed_with_a_reason(module, tensor, reason):
    found = reasons(nn.Sequential(module, nn.Linear(8, 8)))
    assert not found["1.weight"]
    assert re.search(reason, found[tensor])


def test_parametrized_modules_are_left_alone():
    model = nn.Sequential(parametrizations.orthogonal(nn.Linear(8, 8)), nn.Linear(8, 8))
    kind, x = type(model[0]), torch.randn(2, 8)
    before = model[0](x)
    ow.sparsify(model, "2:4")
    assert torch.equal(model[0](x), before)
    ow.finalize(model)
    assert type(model[0]) is kind
    assert parametrize.is_parametrized(model[0])


def test_vectors_integers_and_buffers_are_no_candidates():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    model.register_buffer("table", torch.zeros(8, 8))
    model.count = nn.Parameter(torch.zeros(8, 8, dtype=torch.int64), requires_grad=False)
    assert list(reasons(model)) == ["0.weight"]


def test_axes_of_bare_parameters_are_named_by_glob():
    model = Experts()
    assert "name it with axis" in reasons(model)["up"]
    assert axes(model, axis={"up": -2})["up"] == Axis(1)
    ow.sparsify(model, "2:4", axis={"up": 1})
    assert int((model.up != 0).unflatten(1, (2, 4)).sum(2).max()) == 2
    assert list(model.state_dict()) == list(Experts().state_dict())
    ow.verify(model, torch.ones(3, 8))
    x = torch.randn(3, 8)
    before = model(x)
    assert torch.equal(ow.finalize(model)(x), before)


def test_entries_of_parameter_lists_and_dicts_can_be_named_too():
    each = torch.randn(3, 8, 8)
    model = nn.ModuleDict({"a": nn.ParameterList([*each[:2]]), "b": nn.ParameterDict({"k": each[2]})})
    keys = list(model.state_dict())
    ow.sparsify(model, "2:4", axis={"a.0": 0, "b": 1})
    assert int((model["a"][0] != 0).unflatten(0, (2, 4)).sum(1).max()) == 2
    assert int((model["b"]["k"] != 0).unflatten(1, (2, 4)).sum(2).max()) == 2
    assert list(model.state_dict()) == keys
    assert type(ow.finalize(model)["a"]) is nn.ParameterList


def test_a_named_axis_overrides_the_known_one():
    assert axes(nn.Linear(8, 8), axis={"weight": 0}) == {"weight": Axis(0)}


# Patterns, remainders, exclusions


def test_the_first_matching_glob_gives_the_pattern():
    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(4)])
    found = patterns(model, {"0": "1:4", "2": "4:4", "[01]*": ow.Pattern(2, 8)})
    assert found == {"0.weight": "1:4", "1.weight": "2:8", "2.weight": "4:4", "3.weight": "None"}
    assert reasons(model, {"0": "1:4"})["1.weight"] == "no pattern given for it"


def test_a_pattern_with_n_equal_to_m_keeps_everything_and_counts_as_dense():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    weight = model[1].weight.detach().clone()
    report = ow.sparsify(model, {"1": "4:4", "*": "2:4"})
    assert torch.equal(model[1].weight, weight)
    for each in (report, found := ow.verify(model, torch.randn(2, 8))):
        assert (each.sparse, each.skipped) == ({"0.weight": ow.Pattern(2, 4)}, {"1.weight": "4:4 keeps every weight"})
        assert each.summary.startswith("1 weight sparse, 1 dense;")
    assert found.products
    assert (found.products.sparse, found.products.dense) == (1, 1)


def test_a_constant_is_not_accounted_for_by_a_pattern_that_prunes_nothing():
    class Beside(nn.Linear):
        def forward(self, x):
            return super().forward(x) + x @ self.table

    model = nn.Sequential(Beside(8, 8), nn.Linear(8, 8))
    model[0].register_buffer("table", torch.randn(8, 8))
    ow.sparsify(model, {"1": "4:4", "*": "2:4"})
    with pytest.raises(ow.NotSparse, match=r"1 product is not accounted for:\n  0\.table: "):
        ow.verify(model, torch.randn(2, 8))


def test_remainders_are_skipped_padded_or_refused():
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(1, 8))
    assert reasons(model)["0.weight"] == "reduction axis has 6 weights, not a multiple of 4"
    padded = reasons(model, remainder="pad")
    assert not padded["0.weight"]
    assert padded["2.weight"]  # one weight a group is no pattern
    with pytest.raises(ValueError, match=r"0\.weight \(8, 6\).*remainder='skip' or 'pad'"):
        decide(model, ow.Selection("2:4", remainder="error"))
    decide(model, ow.Selection("2:4", remainder="error", exclude=["0", "2"]))


def test_a_padded_group_keeps_its_n_highest_as_well():
    model = nn.Linear(6, 2, bias=False)
    model.weight.data = torch.tensor([[1.0, 2, 3, 4, 5, 6], [6.0, 5, 4, 3, 2, 1]])
    ow.sparsify(model, "1:4", remainder="pad")
    assert model.weight.tolist() == [[0, 0, 0, 4, 0, 6], [6, 0, 0, 0, 2, 0]]
    ow.verify(model, torch.ones(1, 6))


@pytest.mark.parametrize("glob", ["1", "1.weight", "[1]", "*.1", "deep", "deep.1*"])
def test_exclusions_name_weights_modules_or_parents(glob):
    model = nn.Module()
    model.deep = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model.other = nn.Linear(8, 8)
    prefix = "" if glob.startswith(("deep", "*")) else "deep."
    found = reasons(model, exclude=[prefix + glob])
    assert found["deep.1.weight"] == f"excluded by {prefix + glob!r}"
    assert not found["other.weight"]


def test_a_glob_for_fc_does_not_match_fc2():
    assert matches("fc", "fc.weight")
    assert not matches("fc", "fc2.weight")


def test_tied_weights_are_listed_once_and_answer_to_each_name():
    assert list(reasons(Tied())) == ["embed.weight", "body.weight"]
    assert reasons(Tied())["embed.weight"] == "tied to head.weight"
    assert reasons(Tied(), exclude=["head"])["embed.weight"] == "excluded by 'head'"


def test_a_module_with_two_names_is_sparse_once_and_answers_to_both():
    assert reasons(Shared()) == {"a.weight": "", "c.weight": ""}
    assert reasons(Shared(), exclude=["b"])["a.weight"] == "excluded by 'b'"
    assert patterns(Shared(), {"b": "1:4", "c": "2:4"}) == {"a.weight": "1:4", "c.weight": "2:4"}
    model = Shared()
    keys = list(model.state_dict())
    ow.sparsify(model, "2:4")
    assert list(model.state_dict()) == keys
    model.load_state_dict(Shared().state_dict())
    Shared().load_state_dict(model.state_dict())
    ow.verify(ow.finalize(model), pattern="2:4")


def test_names_leave_out_what_wrappers_put_in():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = nn.Sequential(checkpoint_wrapper(nn.Linear(8, 8)), torch.compile(nn.Linear(8, 8)))
    assert list(ow.sparsify(model, "2:4", exclude=()).sparse) == ["0.weight", "1.weight"]
    ow.verify(model)


# Errors


@pytest.mark.parametrize(
    ("choices", "error", "message"),
    [
        ({"exclude": "0"}, TypeError, r"exclude='0' is one string; needed a list of globs, such as \['0'\]"),
        ({"exclude": ["frist"]}, ValueError, r"exclude glob 'frist' matches no weight .*close to it: first"),
        ({"exclude": ["conv9"]}, ValueError, "exclude glob 'conv9' matches no weight of two dims or more"),
        ({"axis": "output"}, ValueError, "axis='output'; needed 'input', 'kernel' or a mapping"),
        ({"axis": {"nothing": 1}}, ValueError, "axis glob 'nothing' matches no weight"),
        ({"axis": {"first": 2}}, ValueError, r"axis: first\.0\.weight has 2 dims \(8, 8\), found dim 2"),
        ({"axis": {"first": -3}}, ValueError, "found dim -3"),
        ({"remainder": "drop"}, ValueError, "remainder='drop'; needed 'skip', 'pad' or 'error'"),
        ({"pattern": {"secnod": "2:4"}}, ValueError, r"pattern glob 'secnod' matches no .*close to it: .*second"),
        ({"pattern": {"*": "2:4", "first": "1:4"}}, ValueError, "pattern glob 'first' decides nothing.*move it up"),
        ({"pattern": "2x4"}, ValueError, "'2x4' for a pattern"),
        ({"pattern": {"first": 2}}, TypeError, "for a pattern"),
        ({"pattern": "2:5"}, ValueError, r"no weight that can be sparse:\n  first\.0\.weight: reduction axis has 8"),
        ({"exclude": ["*"]}, ValueError, r"no weight that can be sparse:\n  first\.0\.weight: excluded by '\*'"),
    ],
    ids=str,
)
def test_choices_that_mean_nothing_are_refused(choices, error, message):
    model = nn.ModuleDict({name: nn.Sequential(nn.Linear(8, 8)) for name in ("first", "second")})
    with pytest.raises(error, match=message):
        decide(model, ow.Selection(**{"pattern": "2:4", **choices}))


def test_a_model_without_matrices_is_refused():
    with pytest.raises(ValueError, match=r"BatchNorm1d has no weight .*\n  it has no parameter of two dims or more"):
        decide(nn.BatchNorm1d(8), ow.Selection("2:4"))


def test_lazy_modules_are_refused_until_they_know_their_shape():
    model = nn.Sequential(nn.LazyLinear(8))
    with pytest.raises(ValueError, match=r"0\.weight is not initialized yet: run one forward"):
        ow.sparsify(model, "2:4")
    model(torch.ones(1, 8))
    assert ow.sparsify(model, "2:4").sparse


def test_a_selection_is_what_its_parts_are():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    selection = ow.Selection({"0": "1:4", "1": ow.Pattern(2, 4)}, exclude=["1"])
    assert ow.sparsify(model, selection, ow.STE()).sparse == {"0.weight": ow.Pattern(1, 4)}
    assert ow.Selection.of(selection) is selection
    assert ow.Selection.of("2:4") == ow.Selection(ow.Pattern(2, 4))


@pytest.mark.parametrize(
    ("selection", "keywords", "message"),
    [
        (ow.Selection("2:4"), {"exclude": ["0"]}, "beside a Selection: put them into it"),
        (ow.Selection(exclude=["0"]), {}, "has no pattern; needed the one to make weights sparse at"),
    ],
)
def test_a_selection_stands_alone_and_has_a_pattern(selection, keywords, message):
    for verb in (ow.sparsify, ow.project):
        with pytest.raises(ValueError, match=message):
            verb(nn.Linear(8, 8), selection, **keywords)


def test_two_axes_are_not_inferred():
    with pytest.raises(ValueError, match="transposable=True needs a pattern"):
        ow.Selection(transposable=True)
