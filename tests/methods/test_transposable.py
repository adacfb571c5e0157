"""Training with transposable masks: the equations, with a mask that stays for k steps, and what survives a resume."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import openwork as ow
from openwork.nm.groups import Axis
from openwork.nm.masks import kept_per_group
from openwork.nm.transposable import all_masks
from openwork.training.dtensor import full_tensor

torch.set_num_threads(1)

LR, MOMENTUM, DECAY, EVERY = 0.1, 0.9, 0.5, 3
PATTERN = ow.Pattern(2, 4)
TARGET = torch.tensor([9.0, -9.0, 3.0, -3.0], dtype=torch.float64)  # far away, so that masks move
METHOD = ow.TransposableSRSTE(decay=DECAY, refresh_every=EVERY)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1, bias=False)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.conv(x).relu().mean((2, 3)))


def net(method=METHOD, **options):
    torch.manual_seed(0)
    model = Net().double()
    ow.sparsify(model, "2:4", method, **options)
    return model


def batches(steps):
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(4, 4, 5, 5, generator=draw, dtype=torch.float64) for _ in range(steps)]


def train(model, data, optimizer=None, forward=None):
    if optimizer is None:
        optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
        ow.attach(optimizer, model)
    for x in data:
        optimizer.zero_grad()
        ((model if forward is None else forward)(x) - TARGET).square().mean().backward()
        optimizer.step()
    return optimizer


def mask_by_trying(weight):
    """The best of the 90 masks for each 4x4 tile of outputs by inputs: (O, K, ...) -> bool."""
    last = weight.detach().abs().movedim((0, 1), (-2, -1))
    keep = torch.empty_like(last, dtype=torch.bool)
    for o in range(0, last.shape[-2], 4):
        for k in range(0, last.shape[-1], 4):
            tile = last[..., o : o + 4, k : k + 4]
            sums = (tile[..., None, :, :] * all_masks(PATTERN)).sum((-2, -1))
            keep[..., o : o + 4, k : k + 4] = all_masks(PATTERN)[sums.argmax(-1)]
    return keep.movedim((-2, -1), (0, 1))


def by_hand(start, data):
    """SGD with momentum on w~ = w where kept, plus decay * w where pruned; masks anew after every EVERY steps."""
    w = {name: each.detach().clone() for name, each in start.items()}
    velocity = {name: torch.zeros_like(each) for name, each in w.items()}
    sparse = ("conv.weight", "fc.weight")
    keep, path = {name: mask_by_trying(w[name]) for name in sparse}, []
    for step, x in enumerate(data, 1):
        used = {name: each.where(keep[name], 0 * each) if name in keep else each.clone() for name, each in w.items()}
        leaves = [each.requires_grad_() for each in used.values()]
        hidden = nn.functional.conv2d(x, used["conv.weight"], padding=1).relu().mean((2, 3))
        loss = (nn.functional.linear(hidden, used["fc.weight"], used["fc.bias"]) - TARGET).square().mean()
        for name, gradient in zip(used, torch.autograd.grad(loss, leaves), strict=True):
            if name in keep:
                gradient = gradient + DECAY * w[name].where(~keep[name], 0 * w[name])
            velocity[name] = MOMENTUM * velocity[name] + gradient
            w[name] = w[name] - LR * velocity[name]
        if step % EVERY == 0:
            keep = {name: mask_by_trying(w[name]) for name in sparse}
        path.append((dict(w), keep))
    return path


def latent(model):
    return {name: each for name, each in model.state_dict().items() if "_mask" not in name}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def close(a, b):
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], rtol=0, atol=1e-10) for name in a)


def test_it_takes_the_steps_of_the_equations():
    model, data = net(), batches(8)
    optimizer = None
    for x, (weights, keep) in zip(data, by_hand(latent(net()), data), strict=True):
        optimizer = train(model, [x], optimizer)
        assert close(latent(model), weights)
        assert equal(ow.masks(model), keep)


def test_the_masks_move_when_they_may_and_only_then():
    model = net()
    topology = ow.Topology(every=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    ow.attach(optimizer, model, topology=topology)
    before = ow.masks(model)
    train(model, batches(12), optimizer)
    moved = {record["step"] for record in topology.records if record["sad_step"]}
    assert len(moved) >= 2
    assert moved <= {3, 6, 9, 12}
    assert not equal(before, ow.masks(model))


def test_masks_are_exact_along_both_axes_and_verify_holds_them_so():
    model = net()
    train(model, batches(4))
    for mask in ow.masks(model).values():
        for axis in (Axis(1), Axis(0)):
            assert (kept_per_group(mask, PATTERN, axis) == 2).all()
    report = ow.verify(model, batches(1)[0])
    assert "2 weights keep their patterns along the output axis as well" in report.notes
    model.fc.parametrizations.weight[0].mask[:, :4] = torch.tensor([True, True, False, False])
    with pytest.raises(ow.NotSparse, match=r"fc.weight: 2 of 8 groups hold more than 2 of 4 .* along the output axis"):
        ow.verify(model)


def test_a_plain_model_is_verified_along_both_axes_where_asked():
    model = ow.finalize(net())
    ow.verify(model, pattern=ow.Selection("2:4", transposable=True))
    with torch.no_grad():
        model.fc.weight.zero_()[:, 0] = 1
    ow.verify(model, pattern="2:4")
    with pytest.raises(ow.NotSparse, match="along the output axis"):
        ow.verify(model, pattern=ow.Selection("2:4", transposable=True))
    with pytest.raises(ValueError, match="transposable=True needs a pattern"):
        ow.verify(model, pattern=ow.Selection(transposable=True))


# --- what survives -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_a_resumed_run_is_the_run_that_was_not_interrupted(stop):
    data = batches(8)
    whole, first = net(), net()
    train(whole, data)
    optimizer = train(first, data[:stop])
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    state = torch.load(file)
    second = net()
    again = torch.optim.SGD(second.parameters(), lr=LR, momentum=MOMENTUM)
    ow.attach(again, second)
    second.load_state_dict(state["model"])
    again.load_state_dict(state["optimizer"])
    train(second, data[stop:], again)
    assert equal(second.state_dict(), whole.state_dict())


def test_the_state_dict_says_when_masks_were_chosen():
    model = net()
    train(model, batches(EVERY + 2))
    state = model.state_dict()
    assert int(state["fc.weight_mask_age"]) == 2
    assert [name for name in state if name.endswith("_mask")] == ["conv.weight_mask", "fc.weight_mask"]


def test_a_dense_checkpoint_fills_the_masks_and_says_so():
    model, dense = net(), {name: 2 * each.flip(0) for name, each in latent(net()).items()}
    train(model, batches(1))
    with pytest.warns(UserWarning, match="the checkpoint is dense: stored masks were chosen anew"):
        model.load_state_dict(dense)
    assert equal(ow.masks(model), {name: mask_by_trying(dense[name]) for name in ow.masks(model)})
    assert int(model.state_dict()["fc.weight_mask_age"]) == 0


def test_copies_go_on_alone():
    model, data = net(), batches(6)
    train(model, data[:2])
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    before = copy.deepcopy(model.state_dict())
    train(twins[0], data)
    assert equal(model.state_dict(), before)
    assert equal(twins[1].state_dict(), before)


def test_an_average_has_the_masks_of_the_model():
    model = net()
    average = AveragedModel(model)
    train(model, batches(EVERY))
    average.update_parameters(model)
    assert equal(ow.masks(average), ow.masks(model))
    ow.verify(average)


def test_finalize_and_the_file_keep_what_the_forward_used(tmp_path):
    model, x = net(), batches(1)[0]
    train(model, batches(5))
    y = model(x)
    ow.save(model, tmp_path / "net.safetensors")
    other = net()
    other.load_state_dict({name: -each for name, each in latent(other).items()} | {}, strict=False)
    ow.load(tmp_path / "net.safetensors", into=other)
    assert torch.equal(other(x), y)
    ow.verify(other)
    assert torch.equal(ow.finalize(model)(x), y)
    assert type(model.fc) is nn.Linear
    assert set(model.state_dict()) == {"conv.weight", "fc.weight", "fc.bias"}


def test_a_file_of_ordinary_masks_is_refused(tmp_path):
    ow.save(net(ow.SRSTE()), tmp_path / "net.safetensors")
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"conv\.weight is 2:4 along its reduction axis but not along its output axis"):
        ow.load(tmp_path / "net.safetensors", into=model)
    assert equal(model.state_dict(), before)


# --- ways to train -------------------------------------------------------------------------------------------------


def test_compiled_training_is_eager_training():
    eager, model, data = net(), net(), batches(7)
    train(eager, data)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    train(model, data, forward=torch.compile(model, backend=backend, fullgraph=True))
    assert close(latent(model), latent(eager))
    assert len(graphs) == 1  # refreshing the masks compiles nothing anew


@pytest.mark.parametrize(("parts", "scale"), [(2, 1.0), (1, 1024.0), (2, 1024.0)])
def test_accumulation_and_a_loss_scale_change_nothing(parts, scale):
    plain, model, data = net(), net(), batches(7)
    train(plain, data)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    ow.attach(optimizer, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    for x in data:
        optimizer.zero_grad()
        for part in x.chunk(parts):
            scaler.scale((model(part) - TARGET).square().mean() / parts).backward()
        scaler.step(optimizer)
        scaler.update()
    assert close(latent(model), latent(plain))
    assert equal(ow.masks(model), ow.masks(plain))


def test_a_skipped_step_does_not_age_the_masks():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    ow.attach(optimizer, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(model(batches(1)[0]).mean() * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert int(model.state_dict()["fc.weight_mask_age"]) == 0


def on_one_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    data = [x.chunk(2)[rank] for x in batches(7)]
    replicated, sharded = net(), fully_shard(net())
    train(replicated, data, forward=DistributedDataParallel(replicated))
    train(sharded, data)
    found = [{name: full_tensor(each) for name, each in model.state_dict().items()} for model in (replicated, sharded)]
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_two_ranks_have_the_masks_and_weights_of_one(tmp_path):
    mp.spawn(on_one_rank, (str(tmp_path),), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    alone = net()
    train(alone, batches(7))
    expected = {name: each.double() for name, each in alone.state_dict().items()}
    for first, second in zip(one, two, strict=True):  # DDP, and FSDP2, which cuts the tiles of fc apart
        assert equal(first, second)
        assert close({name: each.double() for name, each in first.items()}, expected)


# --- which weights -------------------------------------------------------------------------------------------------


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 8, 4))
        self.odd = nn.Parameter(torch.randn(4, 8, 4))


def test_the_axes_of_each_kind_of_layer():
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(8, 12),
            "grouped": nn.Conv2d(16, 8, 3, groups=2),
            "turned": nn.ConvTranspose2d(8, 8, 2, groups=2),
            "narrow": nn.ConvTranspose2d(8, 4, 2, groups=2),
            "attention": nn.MultiheadAttention(8, 2),
            "rnn": nn.GRU(8, 4),
            "experts": Experts(),
        }
    )
    report = ow.sparsify(model, "2:4", ow.TransposableSRSTE(), axis={"experts.up": 1, "experts.odd": 0})
    output_axes = dict(model.__dict__["_openwork_record"].output_axes)
    assert output_axes.pop("grouped.weight") == Axis(0, blocks=2)
    assert output_axes.pop("turned.weight") == Axis(1)
    assert output_axes.pop("experts.up") == Axis(2)
    assert set(output_axes.values()) == {Axis(0)}
    assert report.skipped == {
        "narrow.weight": "output axis has 2 weights, not a multiple of 4",
        "experts.odd": "no known output axis: its reduction axis is dim 0, none of the last two",
    }
    ow.verify(model)


def test_axes_that_4_does_not_divide():
    model = nn.Sequential(nn.Linear(8, 10), nn.Linear(10, 8))
    with pytest.raises(ValueError, match=r"0\.weight: output axis has 10 weights, not a multiple of 4"):
        ow.sparsify(model, "2:4", METHOD)
    with pytest.raises(ValueError, match=r"0.weight \(10, 8\): output axis has 10 weights"):
        ow.sparsify(model, "2:4", METHOD, remainder="error")
    report = ow.sparsify(model, "2:4", METHOD, remainder="pad")
    assert [row.kept for row in report.rows] == [int(mask.sum()) for mask in ow.masks(model).values()]
    ow.verify(model)
    with pytest.raises(ValueError, match="axis='kernel' groups the flattened weight, which has no output axis"):
        ow.sparsify(nn.Linear(8, 8), "2:4", METHOD, axis="kernel")


def test_other_patterns_are_exact_too():
    model = nn.Linear(32, 16)
    ow.sparsify(model, "3:8", METHOD)
    mask = ow.masks(model)["weight"]
    for axis in (Axis(1), Axis(0)):
        assert (kept_per_group(mask, ow.Pattern(3, 8), axis) == 3).all()


def test_refresh_every_is_a_number_of_steps():
    for wrong in (0, -1, 2.5):
        with pytest.raises(ValueError, match="refresh_every="):
            ow.TransposableSRSTE(refresh_every=wrong)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(16, 12, 3, groups=2),
        nn.Conv1d(20, 10, 3, groups=2),
        nn.ConvTranspose2d(12, 16, 3, groups=2),
        nn.ConvTranspose1d(10, 20, 3, groups=2),
    ],
    ids=repr,
)
def test_padded_groups_of_a_convolution_are_sparse_along_both_axes(conv):
    model = nn.Sequential(copy.deepcopy(conv))
    report = ow.sparsify(model, "2:4", METHOD, remainder="pad")
    assert report.rows[0].kept == int(ow.masks(model)["0.weight"].sum())
    assert ow.verify(model).sparse == {"0.weight": PATTERN}
    ow.verify(ow.finalize(model), pattern=ow.Selection(PATTERN, remainder="pad", transposable=True))
