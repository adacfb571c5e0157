"""Schedules: what is in force at each step, and what everything says of a model while one runs."""

import io

import pytest
import torch
from torch import nn

import openwork as ow
from openwork.methods import Phase
from openwork.methods.groups import dense_groups
from openwork.nm.groups import Axis
from openwork.nm.masks import kept_per_group, magnitude_mask

torch.set_num_threads(1)

END = Phase(ow.Pattern(2, 4), Axis(1))


def in_force(schedule, steps, end=END):
    """What differs from the end, step by step: the pattern, beta, the share of dense groups."""
    phases = [schedule.phase(step, end) for step in range(steps)]
    return [(str(phase.pattern), round(phase.beta, 4), round(phase.dense_groups, 4)) for phase in phases]


def now(pattern="2:4", beta=0.0, share=0.0):
    return (pattern, beta, share)


SCHEDULES = {
    ow.Schedule(): [now()] * 6,
    ow.MaskDecay(4, linear=True): [now(beta=b) for b in (1, 0.75, 0.5, 0.25)] + [now()] * 2,
    ow.MaskDecay(3): [now(beta=b) for b in (1, 0.1, 0.01)] + [now()] * 3,
    ow.StructureDecay(4): [now("3:4")] * 4 + [now()] * 2,
    ow.StructureDecay(3, geometric=True): [now("16:32"), now("8:16"), now("4:8"), now(), now(), now()],
    ow.Ramp(4): [now(share=p) for p in (1, 0.75, 0.5, 0.25)] + [now()] * 2,
    ow.Ramp(2, "cubic"): [now(share=1), now(share=0.125)] + [now()] * 4,
    ow.Ramp(2, "cosine"): [now(share=1), now(share=0.7071)] + [now()] * 4,
    ow.Ramp(2, "exponential"): [now(share=1), now(share=0.3208)] + [now()] * 4,
    ow.DenseWarmup(2): [now("4:4")] * 2 + [now()] * 4,
    ow.DenseWarmup(2, ow.MaskDecay(2, linear=True)): [now("4:4")] * 2 + [now(beta=1), now(beta=0.5), now(), now()],
    ow.DenseTail(4): [now()] * 4 + [now("4:4")] * 2,
    ow.DenseTail(3, ow.StructureDecay(2)): [now("3:4")] * 2 + [now()] + [now("4:4")] * 3,
    ow.DenseWarmup(1, ow.DenseTail(3, ow.Ramp(1))): [now("4:4"), now(share=1), now(), now()] + [now("4:4")] * 2,
}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_what_is_in_force_step_by_step(schedule):
    assert in_force(schedule, 6) == SCHEDULES[schedule]
    assert eval(repr(schedule), vars(ow)) == schedule
    last = [step for step in range(1, 6) if SCHEDULES[schedule][step] != SCHEDULES[schedule][step - 1]]
    assert schedule.length == max(last, default=0)


@pytest.mark.parametrize(
    ("pattern", "stages"),
    [
        ("1:16", ["15:16", "8:16", "4:16", "2:16"]),
        ("1:4", ["3:4", "2:4"]),
        ("3:4", []),
        ("4:4", []),
        ("2:5", ["4:5"]),
        ("3:8", ["7:8", "4:8"]),
    ],
)
def test_the_stages_of_a_pattern(pattern, stages):
    assert [str(each) for each in ow.StructureDecay(10).patterns(ow.Pattern.parse(pattern))] == stages


def test_a_geometric_decay_has_the_density_of_the_end():
    stages = ow.StructureDecay(10, geometric=True).patterns(ow.Pattern(1, 16))
    assert [str(each) for each in stages] == ["4:64", "2:32"]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.99, 1.0])
def test_the_groups_with_the_smallest_norms_are_dense(share):
    score = torch.rand(6, 3, 2, 8, generator=torch.Generator().manual_seed(0)).movedim(-1, 1)
    phase = Phase(ow.Pattern(1, 4), Axis(1), dense_groups=share)
    found = dense_groups(score, phase).movedim(1, -1).reshape(-1, 4)
    sums = score.movedim(1, -1).reshape(-1, 4).sum(-1).tolist()
    smallest = sorted(range(72), key=lambda i: sums[i])[: int(share * 72)]
    assert found.tolist() == [[i in smallest] * 4 for i in range(72)]


def test_equal_norms_and_short_groups():
    phase = Phase(ow.Pattern(1, 4), Axis(1), dense_groups=0.5)
    assert dense_groups(torch.ones(2, 4), phase).tolist() == [[True] * 4, [False] * 4]
    score = torch.tensor([[1.0, 1.0, 1.0, 1.0, 3.0, 0.5]])
    assert dense_groups(score, phase).tolist() == [[False] * 4 + [True] * 2]


# --- models ----------------------------------------------------------------------------------------------------------

STEPS = 6
METHODS = [
    ow.STE(schedule=ow.MaskDecay(STEPS)),
    ow.SRSTE(0.1, schedule=ow.Ramp(STEPS)),
    ow.SRSTE(0.1, decoupled=True, schedule=ow.DenseWarmup(2, ow.StructureDecay(4))),
    ow.SSTE(schedule=ow.DenseWarmup(STEPS)),
    ow.TransposableSRSTE(0.1, 4, schedule=ow.DenseWarmup(STEPS)),
    ow.TransposableSRSTE(0.1, 4, schedule=ow.MaskDecay(STEPS)),
    ow.SdGf(STEPS),
    ow.SdGf(STEPS, geometric=True),
]
TAILS = [
    ow.STE(schedule=ow.DenseTail(STEPS)),
    ow.SSTE(schedule=ow.DenseTail(STEPS)),
    ow.TransposableSRSTE(0.1, 4, schedule=ow.DenseTail(STEPS)),
]


def net(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    return model, ow.sparsify(model, "2:4", method)


def adam(model):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    return optimizer, ow.attach(optimizer, model)


def train(model, optimizer, start, stop):
    for step in range(start, stop):
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        (model(x) - 3).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_until_it_ends_the_model_is_not_sparse_and_says_so(method, tmp_path):
    model, report = net(method)
    optimizer, handle = adam(model)
    assert f"not yet 2:4 (step 0 of {STEPS})" in str(report)
    assert report.rows[0].density == 0.5
    train(model, optimizer, 0, STEPS - 1)
    assert f"not yet 2:4 (step {STEPS - 1} of {STEPS})" in handle.unfinished
    assert int(kept_per_group(model[0].weight, ow.Pattern(2, 4), Axis(1)).max()) > 2
    for act in (ow.verify, lambda model: ow.save(model, tmp_path / "net.safetensors")):
        with pytest.raises(ow.NotSparse, match=r"0\.weight: .*not yet 2:4"):
            act(model)
    train(model, optimizer, STEPS - 1, STEPS)
    assert handle.unfinished == ""
    assert len(ow.verify(model, torch.ones(1, 16).double()).sparse) == 2
    ow.save(model, tmp_path / "net.safetensors")
    ow.verify(ow.finalize(model), pattern="2:4")


@pytest.mark.parametrize("method", TAILS, ids=str)
def test_a_model_that_ends_dense_is_held_to_nothing(method, tmp_path):
    model, report = net(method)
    assert "the model ends dense: the table says what is pruned before" in str(report)
    assert report.rows[0].density == 0.5
    optimizer, handle = adam(model)
    train(model, optimizer, 0, STEPS - 1)
    assert int(kept_per_group(model[0].weight, ow.Pattern(2, 4), Axis(1)).max()) == 2
    assert handle.unfinished == f"pattern 2:4: dense from step {STEPS} on (step {STEPS - 1})"
    with pytest.raises(ow.NotSparse, match="dense from step"):
        ow.verify(model)
    train(model, optimizer, STEPS - 1, STEPS + 2)
    assert handle.unfinished == ""
    latent = model[0].parametrizations.weight.original.detach().clone()
    assert torch.equal(model[0].weight, latent)
    with pytest.raises(ValueError, match="a schedule that ends dense, and keeps every weight"):
        ow.verify(model)
    ow.save(model, tmp_path / "net.safetensors")
    assert torch.equal(ow.load_state_dict(tmp_path / "net.safetensors")["0.weight"], latent)
    assert torch.equal(ow.finalize(model)[0].weight, latent)


@pytest.mark.parametrize("stop", [1, 3, STEPS, STEPS + 1])
@pytest.mark.parametrize("method", METHODS + TAILS, ids=str)
def test_a_resumed_run_is_the_run_that_was_not_interrupted(method, stop):
    (whole, _), (model, _), (resumed, _) = net(method), net(method), net(method)
    train(whole, adam(whole)[0], 0, STEPS + 4)
    optimizer, _ = adam(model)
    train(model, optimizer, 0, stop)
    torch.save([model.state_dict(), optimizer.state_dict()], file := io.BytesIO())
    file.seek(0)
    optimizer, handle = adam(resumed)
    with torch.no_grad():
        resumed[0].parametrizations.weight.original.add_(1)  # so that nothing is right by chance
    state, moments = torch.load(file, weights_only=True)
    resumed.load_state_dict(state)
    optimizer.load_state_dict(moments)
    assert bool(handle.unfinished) == (stop < STEPS)
    assert torch.equal(resumed[0].weight, model[0].weight)
    train(resumed, optimizer, stop, STEPS + 4)
    assert all(map(torch.equal, resumed.state_dict().values(), whole.state_dict().values()))


def test_a_decay_of_ste_passes_the_whole_gradient_and_mdgf_its_share():
    for method, share in ((ow.STE(schedule=ow.MaskDecay(2, linear=True)), 1.0), (ow.MdGf(2, linear=True), 0.5)):
        model = nn.Linear(4, 1, bias=False)
        ow.sparsify(model, "2:4", method)
        model.parametrizations.weight[0].go_to(1)
        latent = model.parametrizations.weight.original
        kept = ow.masks(model)["weight"]
        assert torch.equal(model.weight, torch.where(kept, latent, latent / 2))
        model.weight.sum().backward()
        assert torch.equal(latent.grad, torch.where(kept, 1.0, share))


@pytest.mark.parametrize("method", [*METHODS[1:4], METHODS[6], METHODS[7], *TAILS[:2]], ids=str)
def test_topology_is_that_of_the_pattern_whatever_is_in_force(method):
    model, _ = net(method)
    topology = ow.Topology(every=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    ow.attach(optimizer, model, topology=topology)
    masks = []
    for step in range(STEPS + 2):
        latent = [model[i].parametrizations.weight.original.detach() for i in (0, 2)]
        masks.append([magnitude_mask(weight.abs(), ow.Pattern(2, 4), Axis(1)) for weight in latent])
        train(model, optimizer, step, step + 1)
    expected = [sum(map(ow.sad, masks[0], later)) for later in masks[1:]]
    assert [record["sad_start"] for record in topology.records][:-1] == expected
    assert expected[-1] > 0


def test_compiled_code_stays_while_the_ramp_falls():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    (eager, _), (model, _) = net(METHODS[1]), net(METHODS[1])
    train(eager, adam(eager)[0], 0, STEPS + 2)
    optimizer, _ = adam(model)
    forward = torch.compile(model, backend=backend, fullgraph=True)
    train(forward, optimizer, 0, STEPS + 2)
    for found, expected in zip(model.state_dict().values(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert len(graphs) == 2


REFUSED = {
    "curve='square'; needed one of linear, cubic": lambda: ow.Ramp(4, "square"),
    "steps=0; needed a number of optimizer steps, 1 or more": lambda: ow.DenseWarmup(0),
    "which is N:M only from step 9 on": lambda: ow.DenseTail(9, ow.MaskDecay(9)),
    "SSTE with Ramp": lambda: ow.SSTE(schedule=ow.DenseWarmup(2, ow.Ramp(3))),
    "TransposableSRSTE with Ramp": lambda: ow.TransposableSRSTE(schedule=ow.Ramp(3)),
    "found 7 within a schedule": lambda: ow.DenseWarmup(2, 7),
    "schedule=7; needed a schedule": lambda: ow.STE(schedule=7),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_cannot_be_is_refused(said):
    with pytest.raises((ValueError, TypeError), match=said):
        REFUSED[said]()


def test_what_a_method_says_of_itself():
    assert repr(ow.STE()) == "STE()"
    assert repr(ow.SRSTE(0.5, schedule=ow.Ramp(4))) == "SRSTE(decay=0.5, schedule=Ramp(steps=4, curve='linear'))"
    tail = ow.TransposableSRSTE(schedule=ow.DenseTail(9))
    assert repr(tail).startswith("TransposableSRSTE(decay=0.0002, refresh_every=40, schedule=DenseTail(steps=9, ")
    assert repr(ow.TransposableSRSTE()) == "TransposableSRSTE(decay=0.0002, refresh_every=40)"
