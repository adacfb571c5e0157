"""`change_pattern`: weights that go on training at another pattern, and everything that speaks of it."""

import copy
import io
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import openwork as ow
from openwork.methods import Method, Schedule
from openwork.nm.masks import kept_per_group
from openwork.training.record import recorded_weights

D, DECAY, LR = torch.float64, 0.5, 0.05
SRSTE = ow.SRSTE(DECAY)


@dataclass(frozen=True)
class Scaled(Method):
    """A method that keeps something of the weight, which belongs to the pattern."""

    name: ClassVar[str] = "scaled"

    def state(self, weight, phase):
        return {"scale": weight.new_tensor(phase.pattern.m / phase.pattern.n)}

    def forward(self, weight, mask, phase, state):
        return super().forward(weight, mask, phase, state) * state["scale"]


@dataclass(frozen=True)
class Halving(Schedule):
    """SdGf: 8:8, 4:8, 2:8, ... down to the end's N."""

    def at(self, step, end):
        n, m = end.pattern.n, end.pattern.m
        return replace(end, pattern=ow.Pattern(max(n, m >> (step * m.bit_length() // self.steps)), m))


@dataclass(frozen=True)
class SdGf(Method):
    name: ClassVar[str] = "sdgf"
    refresh_every: int = 0

    @property
    def schedule(self):
        return Halving(steps=6, refresh_every=self.refresh_every)


METHODS = [
    SRSTE,
    ow.STE(),
    ow.ASP(),
    ow.TransposableSRSTE(DECAY, 3),
    ow.MdGf(6),
    Scaled(),
    SdGf(),
    SdGf(refresh_every=2),
    ow.SSTE(),
    ow.SdGf(6),
    ow.SRSTE(DECAY, schedule=ow.DenseWarmup(2, ow.Ramp(4))),
    ow.TransposableSRSTE(DECAY, 3, schedule=ow.MaskDecay(6)),
]
each_method = pytest.mark.parametrize("method", METHODS, ids=str)


def net(method=SRSTE, pattern="2:4"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8)).double()
    ow.sparsify(model, pattern, method)
    return model


def adam(model):
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    return optimizer, ow.attach(optimizer, model, topology=ow.Topology(every=1))


def train(model, optimizer, start, stop):
    for step in range(start, stop):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step), dtype=D)
        optimizer.zero_grad()
        (model(x) - x[:, :8]).square().mean().backward()
        optimizer.step()


def latent(model):
    return {name: model.get_submodule(name[:1]).parametrizations.weight.original for name in ("0.weight", "2.weight")}


def counts(model):
    """The most weights that each weight has in a group of 8, as it is multiplied."""
    return [int(kept_per_group(model[i].weight, ow.Pattern(1, 8), ow.Axis(1)).max()) for i in (0, 2)]


@each_method
def test_training_goes_on_at_the_new_pattern(tmp_path, method):
    model = net(method)
    optimizer, handle = adam(model)
    train(model, optimizer, 0, 4)
    before = {name: w.detach().clone() for name, w in latent(model).items()}
    moments = copy.deepcopy(optimizer.state_dict()["state"])
    report = ow.change_pattern(model, "1:8")
    assert set(report.sparse.values()) == {ow.Pattern(1, 8)}
    assert all(torch.equal(w, before[name]) for name, w in latent(model).items())
    for index, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(tensor, moments[index][key]) for key, tensor in state.items())
    train(model, optimizer, 4, 8)
    assert handle.steps == 8
    assert [record["step"] for record in handle.topology.records] == list(range(1, 9))
    assert handle.unfinished == ""
    assert counts(model) == [1, 1]
    assert set(ow.verify(model, torch.randn(2, 16, dtype=D)).sparse.values()) == {ow.Pattern(1, 8)}
    ow.save(model, tmp_path / "net.safetensors")
    plain = ow.finalize(copy.deepcopy(model))
    x = torch.randn(4, 16, dtype=D)
    assert torch.equal(plain(x), model(x))
    loaded = ow.load_state_dict(tmp_path / "net.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in plain.state_dict().items())


def test_it_is_the_equation_with_another_mask():
    """SGD by hand: two steps at 2:4, two at 1:8."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    ow.attach(optimizer, model)
    weights = {name: p.detach().clone() for name, p in latent(model).items()}
    for step, pattern in enumerate(("2:4", "2:4", "1:8", "1:8")):
        if step == 2:
            ow.change_pattern(model, "1:8")
        masks = {name: ow.topn(w.abs(), ow.Pattern.parse(pattern)) for name, w in weights.items()}
        train(model, optimizer, step, step + 1)
        for name, w in weights.items():
            gradient = latent(model)[name].grad
            weights[name] = w - LR * (gradient + DECAY * w * ~masks[name])
    assert all(torch.allclose(w, latent(model)[name], atol=1e-14) for name, w in weights.items())


@each_method
@pytest.mark.parametrize("given", ["2:4", "1:8"])
def test_a_resumed_run_goes_on_at_the_pattern_that_was_saved(method, given):
    """Whatever pattern sparsify is given in the process that resumes."""
    model = net(method)
    optimizer, handle = adam(model)
    train(model, optimizer, 0, 3)
    ow.change_pattern(model, "1:8")
    train(model, optimizer, 3, 4)
    saved = io.BytesIO()
    torch.save([each.state_dict() for each in (model, optimizer, handle)], saved)
    assert saved.seek(0) == 0
    train(model, optimizer, 4, 9)
    other = net(method, given)
    its_optimizer, its_handle = adam(other)
    for each, state in zip((other, its_optimizer, its_handle), torch.load(saved, weights_only=True), strict=True):
        each.load_state_dict(state)
    train(other, its_optimizer, 4, 9)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert its_handle.topology.records == handle.topology.records
    assert recorded_weights(other) == recorded_weights(model)
    assert counts(other) == [1, 1]


def test_a_checkpoint_has_its_keys_only_once_a_pattern_was_changed():
    model = net()
    assert set(model.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    ow.change_pattern(model, {"2": "1:8"})
    assert model.state_dict()["2.weight_pattern"].tolist() == [1, 8]
    assert "4.weight_pattern" not in model.state_dict()


def test_a_checkpoint_of_a_denser_mask_is_refused_by_name():
    model = net(ow.ASP())
    state = copy.deepcopy(model.state_dict())
    ow.change_pattern(model, "1:8")
    with pytest.raises(RuntimeError, match=r"0\.weight_mask: .*call ow\.change_pattern, or sparsify, at the pattern"):
        model.load_state_dict(state)
    ow.change_pattern(model, "2:4")
    model.load_state_dict(state)


def test_weights_that_no_glob_names_keep_their_pattern():
    model = net()
    report = ow.change_pattern(model, {"0": "1:4"})
    assert report.sparse == {"0.weight": ow.Pattern(1, 4), "2.weight": ow.Pattern(2, 4)}
    assert ow.verify(model).sparse == report.sparse
    assert "at other patterns" in str(report)
    ow.change_pattern(model, {"0": "4:4"})
    assert bool((model[0].weight != 0).all())


def test_patterns_may_loosen_again():
    model = net(ow.TransposableSRSTE(DECAY, 100))
    kept = [int(mask.sum()) for mask in ow.masks(model).values()]
    for pattern, share in (("1:4", 2), ("3:4", 2 / 3), ("2:4", 1)):
        ow.change_pattern(model, pattern)
        assert [int(mask.sum()) for mask in ow.masks(model).values()] == [round(each / share) for each in kept]
        ow.verify(model)


REFUSED = [
    (lambda: nn.Linear(8, 8), "1:4", {}, "Linear has no pattern that could be changed: ow.sparsify it"),
    (lambda: net()[0], "1:4", {}, "hand over the model that ow.sparsify got"),
    (net, {"3": "1:4"}, {}, r"'3' matches no sparse weight; there are 0\.weight, 2\.weight"),
    (net, "1:32", {}, r"0\.weight \(16, 16\): an axis has 16 weights, not a multiple of 32"),
    (lambda: net(ow.TransposableSRSTE()), {"0": "1:8", "2": "1:16"}, {}, r"2\.weight \(8, 16\): an axis has 8 weights"),
    (net, "1:4", {"remainder": "skip"}, "needed 'error' or 'pad'"),
]


@pytest.mark.parametrize(("make", "pattern", "options", "message"), REFUSED)
def test_what_cannot_be_is_refused_and_changes_nothing(make, pattern, options, message):
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        ow.change_pattern(model, pattern, **options)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_last_group_may_be_short():
    model = net()
    ow.change_pattern(model, "1:32", remainder="pad")
    assert bool(((model[0].weight != 0).sum(1) == 1).all())
    ow.verify(model)


def test_parts_and_wrappers():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8)).double()
    for i in (0, 1):
        ow.sparsify(model[i], "2:4", SRSTE)
    wrapped = AveragedModel(model)
    for each in (torch.compile(model), wrapped, nn.DataParallel(model)):
        ow.change_pattern(each, {"1": "1:8"})
    for each in (model, wrapped.module):
        assert ow.verify(each).sparse == {"0.weight": ow.Pattern(2, 4), "1.weight": ow.Pattern(1, 8)}
    ow.change_pattern(model[0], "1:4")
    assert ow.verify(model).sparse["0.weight"] == ow.Pattern(1, 4)


def test_the_record_holds_a_module_that_was_swapped_since():
    model = net()
    ow.change_pattern(model, "1:8")
    model[2] = nn.Linear(16, 8).double()
    ow.project(model[2], "2:4")
    with pytest.raises(ow.NotSparse, match=r"2\.weight"):
        ow.verify(model)


def test_compiled_code_follows():
    model = net()
    optimizer, _ = adam(model)
    twin = net()
    its_optimizer, _ = adam(twin)
    compiled = torch.compile(model, backend="eager")
    for start, pattern in ((0, "1:8"), (2, "2:4"), (4, "1:4")):
        train(compiled, optimizer, start, start + 2)
        train(twin, its_optimizer, start, start + 2)
        ow.change_pattern(compiled, pattern)
        ow.change_pattern(twin, pattern)
        x = torch.randn(2, 16, dtype=D)
        assert torch.equal(compiled(x), twin(x))
    assert all(torch.allclose(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_schedule_that_tightens_ends_at_the_new_pattern():
    model = net(SdGf(), "1:8")
    optimizer, handle = adam(model)
    seen = []
    for step in range(7):
        seen.append(counts(model)[0])
        if step == 3:
            assert "pattern" in handle.unfinished
            ow.change_pattern(model, {"0": "2:8", "2": "1:8"})
        train(model, optimizer, step, step + 1)
    assert seen == sorted(seen, reverse=True)
    assert seen[0] == 8
    assert counts(model) == [2, 1]
    ow.verify(model)
