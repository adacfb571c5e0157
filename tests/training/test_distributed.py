"""Two ranks that each see half of every batch train like one process that sees all of it: DDP, and FSDP2.

The ranks are real processes, started once for all tests; they leave what they found in a file each.
"""

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from plain_loop import (
    DECAY,
    LR,
    MOMENTUM,
    SPARSE,
    WEIGHT_DECAY,
    Net,
    batches,
    distance,
    keep_by_sorting,
    plain_loop,
    sgd,
)
from sharing import filled_once
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

import openwork as ow

RANKS, STEPS, CLIP = 2, 5, 0.2
WAYS = (
    "ddp",
    "ddp, clipped, 2 micro-batches",
    "ddp, fused, scaler",
    "ddp, detached",
    "fsdp2",
    "ddp, decoupled, fused, scaler",
    "fsdp2, decoupled",
)

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


def built(decoupled=False):
    torch.manual_seed(0)
    model = Net().double()
    ow.sparsify(model, "2:4", ow.SRSTE(decay=DECAY, decoupled=decoupled))
    return model


def optimizer_of(model, **options):
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, **options)


def train(way, rank):
    """The weights at the end, and the masks after each step."""
    inner = built("decoupled" in way)
    model = fully_shard(inner) if "fsdp2" in way else DistributedDataParallel(inner)
    optimizer = optimizer_of(model, fused="fused" in way)
    handle = ow.attach(optimizer, model)
    if "detached" in way:
        handle.detach()
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0, enabled="scaler" in way)
    masks = []
    for x, y in batches(STEPS):
        parts = 2 if "micro" in way else 1
        pieces = list(zip(x.chunk(RANKS)[rank].chunk(parts), y.chunk(RANKS)[rank].chunk(parts), strict=True))
        for last, (x_part, y_part) in enumerate(pieces, 1 - parts):
            with nullcontext() if last == 0 else model.no_sync():
                scaler.scale((model(x_part) - y_part).square().mean() / parts).backward()
        if "clipped" in way:
            clip_grad_norm_(model.parameters(), CLIP)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        masks.append({name: whole(mask).clone() for name, mask in ow.masks(model).items()})
    assert handle.steps == (0 if "detached" in way else STEPS)
    return {name: whole(tensor).clone() for name, tensor in inner.state_dict().items()}, masks


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def term_in_bfloat16(rank):
    """The weight, and what a step added to its gradient, where the forward saw bfloat16, and so other masks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8, bias=False))
    nn.init.uniform_(model[0].weight, 1.0, 1.1)
    ow.sparsify(model, "2:4", ow.SRSTE(decay=DECAY))
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    ow.attach(optimizer, model)
    model(torch.randn(4, 64)).sum().backward()
    (weight,) = optimizer.param_groups[0]["params"]
    own, before, seen = weight.grad, whole(weight.grad).clone(), []
    optimizer.register_step_pre_hook(lambda *_: seen.append(whole(weight.grad).clone()))
    optimizer.step()
    assert weight.grad is own
    assert torch.equal(whole(own), before)
    return whole(weight).detach().clone(), seen[0] - before


def one_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    torch.save({way: train(way, rank) for way in WAYS} | {"bfloat16": term_in_bfloat16(rank)}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = filled_once(tmp_path_factory, "ranks", lambda folder: mp.spawn(one_rank, (folder,), nprocs=RANKS))
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def reference(way, **options):
    options = {"clip": CLIP if "clipped" in way else None, "decoupled": "decoupled" in way} | options
    return plain_loop(built().state_dict(), batches(STEPS), sgd, **options)


@pytest.mark.parametrize("way", [way for way in WAYS if "detached" not in way])
def test_two_ranks_take_the_steps_of_one_process(row, ranks, way):
    for rank in ranks:
        assert distance(rank[way][0], reference(way)) < 1e-12
    what = {"ddp": "DDP", "ddp, fused, scaler": "DDP, fused SGD, `GradScaler`", "fsdp2": "FSDP2"}.get(
        way, f"DDP{way[3:]}"
    )
    difference = {"three layers in float64": distance(ranks[0][way][0], reference(way))}
    row("Two processes", f"{what}: also the same masks on both at every step", difference=difference, tolerance=1e-12)


@pytest.mark.parametrize("way", WAYS)
def test_both_ranks_have_the_same_masks_after_each_step(ranks, way):
    for one, other in zip(ranks[0][way][1], ranks[1][way][1], strict=True):
        assert one.keys() == set(SPARSE)
        assert all(torch.equal(one[name], other[name]) for name in SPARSE)
    end, masks = ranks[0][way]
    assert all(torch.equal(masks[-1][name], keep_by_sorting(end[name])) for name in SPARSE)


def test_a_term_lost_or_added_by_each_rank_would_be_seen(ranks):
    lost = ranks[0]["ddp, detached"][0]
    assert distance(lost, reference("ddp", decay=0.0)) < 1e-12
    for wrong in (lost, reference("ddp", decay=RANKS * DECAY), reference("ddp", decay=DECAY / RANKS)):
        assert distance(wrong, reference("ddp")) > 1e-2


def test_the_term_has_the_mask_that_a_bfloat16_forward_saw(ranks):
    weight, added = ranks[0]["bfloat16"]
    pruned, pruned_in_single = ~keep_by_sorting(weight.bfloat16()), ~keep_by_sorting(weight)
    assert int((pruned ^ pruned_in_single).sum()) > 20
    torch.testing.assert_close(added, DECAY * weight.where(pruned, 0.0), rtol=0, atol=1e-5)
