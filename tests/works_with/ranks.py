"""What the processes of `test_ranks.py` do: every distributed combination, and what each found, in a file each."""

from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from plain_loop import DECAY, LR, MOMENTUM, WEIGHT_DECAY
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from works_with.harness import FOR_THE_PAGE, HALF, STEPS, Scenario, Training, nets_of, run, sgd_of, whole
from works_with.nets import Feedforward, ResNet, Transformer, batches

import openwork as ow
from openwork.integrations.tensor_parallel import Colwise, Rowwise

ASP = {"method": ow.ASP(), "reference": {"fixed": True}}


def data_parallel(model, _):
    return DistributedDataParallel(model)


def sharded(model, _, *, layers=True, **options):
    if layers:
        for block in model.layers if hasattr(model, "layers") else (model.one, model.two):
            fully_shard(block, **options)
    return fully_shard(model, **options)


def sharded_and_checkpointed(model, _):
    """Activations and masked weights of each layer are computed again in the backward pass."""
    sharded(model, _)
    if not hasattr(model, "layers"):
        return lambda x: checkpoint(model, x.requires_grad_(), use_reentrant=False)
    for block in model.layers:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return model


def zero(model):
    options = {"lr": LR, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY}
    return [ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, **options)]


def split(model, _):
    """In each block half of the hidden units on each process."""
    plan = {"layers.*.up": Colwise(), "layers.*.down": Rowwise()}
    return parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),)), plan)


one_by_one = partial(sgd_of, foreach=False)  # torch: foreach takes no mixture of tensors and DTensors
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
EACH_LAYER = "FSDP2, each layer and the model"
SCENARIOS = {
    "DDP": Scenario(wrap=data_parallel, resumes=FOR_THE_PAGE),
    "DDP, `ZeroRedundancyOptimizer`": Scenario(wrap=data_parallel, make=zero, resumes=False),
    EACH_LAYER: Scenario(wrap=sharded),
    "FSDP2, `MixedPrecisionPolicy` of bf16, against the equations with weights seen in bf16": Scenario(
        wrap=partial(sharded, mp_policy=BF16), reference={"seen": torch.bfloat16}, tolerance=2e-2, resumes=FOR_THE_PAGE
    ),
    "FSDP2, fixed masks (`ow.ASP`)": Scenario(wrap=sharded, resumes=FOR_THE_PAGE, **ASP),
}
if FOR_THE_PAGE:  # what is little else for masks than the others
    SCENARIOS |= {
        "FSDP2, the whole model at once": Scenario(wrap=partial(sharded, layers=False)),
        "FSDP2, `reshard_after_forward=False`": Scenario(wrap=partial(sharded, reshard_after_forward=False)),
        "FSDP2, activation checkpointing": Scenario(wrap=sharded_and_checkpointed),
    }
SPLIT = {
    "tensor parallel: `Colwise`, `Rowwise` of `openwork.integrations.tensor_parallel`": Scenario(
        wrap=split, make=one_by_one, resumes=FOR_THE_PAGE
    ),
} | ({"tensor parallel, fixed masks (`ow.ASP`)": Scenario(wrap=split, make=one_by_one, **ASP)} if FOR_THE_PAGE else {})


# --- layers whose groups lie along the axis that FSDP2 cuts ------------------------------------------------------


def transposed():
    return nn.ConvTranspose2d(8, 6, 3), torch.randn(2, 8, 4, 4)


def grouped():
    return nn.ConvTranspose2d(24, 6, 3, groups=3), torch.randn(2, 24, 4, 4)  # blocks of 8, cut in the middle of one


def conv1d():
    from openwork.utils.torchvision_compat import ensure_torchvision

    ensure_torchvision()
    from transformers.pytorch_utils import Conv1D

    return Conv1D(8, 12), torch.randn(4, 12)  # two shards of 6, which cut a group


def one_row():
    return nn.Linear(16, 1), torch.randn(4, 16)  # the second process has nothing


CUT = {
    "FSDP2, `ConvTranspose2d`, whose groups lie along the sharded axis": transposed,
    "FSDP2, `ConvTranspose2d` with `groups`": grouped,
    "FSDP2, transformers' `Conv1D`, groups cut by the shards": conv1d,
    "FSDP2, a process without any of a layer's weights": one_row,
}


# --- methods that look at more than a weight, and schedules, on layers that each process has a part of ---------------


def linear():
    return nn.Linear(16, 12), torch.randn(4, 16)


METHODS = {
    "FSDP2, `ow.SSTE`, whose scale is that of the whole weight": ow.SSTE(),
    "FSDP2, `ow.MdGf`": ow.MdGf(8),
    "FSDP2, `ow.SdGf`, from larger groups on": ow.SdGf(8, geometric=True),
    "FSDP2, `ow.Ramp`, whose groups are ranked in the whole weight": ow.SRSTE(DECAY, schedule=ow.Ramp(8)),
    "FSDP2, `ow.DenseWarmup`, transposable masks": ow.TransposableSRSTE(DECAY, 4, schedule=ow.DenseWarmup(6)),
    "FSDP2, `ow.DenseTail`": ow.SRSTE(DECAY, schedule=ow.DenseTail(12)),
    "FSDP2, `ow.MaxQ`": ow.MaxQ(8, decay=DECAY),
    "FSDP2, `ow.STEP`": ow.STEP(15, earliest=3, window=4),
}


def sgd_or_adam(model, method):
    if isinstance(method, ow.STEP):
        return torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.8), eps=1e-2, weight_decay=WEIGHT_DECAY)
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)


def cut(make, method):
    """How far one layer ends from the same layer in one process, after 20 steps; whether its topology is the same."""
    ends = []
    for shard in (True, False):
        torch.manual_seed(0)
        layer, x = make()
        model = nn.Sequential(layer)
        ow.sparsify(model, "2:4", method)
        if shard:
            fully_shard(model)
        optimizer = sgd_or_adam(model, method)
        handle = ow.attach(optimizer, model, topology=ow.Topology(every=5))
        for _ in range(STEPS):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert not handle.unfinished
        if method.ends_sparse and not method.whole:
            ow.verify(model, x)
        ends.append(([whole(p).detach() for p in model.parameters()], handle.topology.records))
    (sharded_end, its_records), (end, records) = ends
    return max(float((a - b).abs().max()) for a, b in zip(sharded_end, end, strict=True)), its_records == records


def masks_held_before_the_step():
    """How many masks of whole layers a process holds for the step. Under FSDP2 they would be those of all layers."""
    counts = []
    for shard in (True, False):
        model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8))
        ow.sparsify(model, "2:4", ow.SRSTE(DECAY))
        if shard:
            fully_shard(model)
        ow.attach(torch.optim.SGD(model.parameters(), lr=LR), model)
        model(torch.randn(4, 16)).sum().backward()
        counts.append(len(model[0].parametrizations.weight[0].cache._masks()))
    return counts


# --- checkpoints of torch.distributed ----------------------------------------------------------------------------


SAVED = Transformer if FOR_THE_PAGE else ResNet


def checkpointed(training):
    model, optimizer = get_state_dict(training.model, training.optimizers)
    return {"model": model, "optimizer": optimizer, "handle": training.handles[0].state_dict()}


def train(training, data):
    for batch in data:
        training.on(batch)
    return training.weights


def save_and_go_on(kind, folder, **ranks):
    """Ten steps, a checkpoint, ten steps more: the weights at the end."""
    training = Training(SCENARIOS[EACH_LAYER], kind, **ranks)
    train(training, batches(kind, STEPS)[:HALF])
    dcp.save(checkpointed(training), checkpoint_id=folder)
    return train(training, batches(kind, STEPS)[HALF:])


def load_and_go_on(kind, folder, scenario, **ranks):
    """The weights at the end, from the checkpoint in the middle, and the steps that were counted."""
    training = Training(scenario, kind, **ranks)
    state = checkpointed(training)
    dcp.load(state, checkpoint_id=folder, no_dist=not ranks)
    model, optimizer = state["model"], state["optimizer"]
    set_state_dict(training.model, training.optimizers, model_state_dict=model, optim_state_dict=optimizer)
    training.handles[0].load_state_dict(state["handle"])
    return train(training, batches(kind, STEPS)[HALF:]), training.handles[0].steps


# --- what is refused ---------------------------------------------------------------------------------------------


def refusals():
    """What the user is told, by what was tried."""
    mesh, found = init_device_mesh("cpu", (dist.get_world_size(),)), {}

    def attempt(what, function):
        try:
            function()
        except (RuntimeError, ValueError) as error:
            found[what] = f"{type(error).__name__}: {error}"

    def sparse_linear(inputs=16):
        model = nn.Sequential(nn.Linear(inputs, 8))
        ow.sparsify(model, "2:4")
        return model

    for style in (ColwiseParallel, RowwiseParallel):
        plan = {"0": style()}
        attempt(
            f"torch's `{style.__name__}` on a sparsified layer",
            lambda plan=plan: parallelize_module(sparse_linear(), mesh, plan),
        )
    attempt("`Rowwise` that cuts groups apart", lambda: parallelize_module(sparse_linear(12), mesh, {"0": Rowwise()}))
    attempt("`ow.sparsify` after `fully_shard`", lambda: ow.sparsify(fully_shard(nn.Linear(16, 8)), "2:4"))
    attempt("`ow.finalize` of a sharded model", lambda: ow.finalize(fully_shard(sparse_linear())))
    attempt("`FullyShardedDataParallel` (FSDP1)", lambda: FSDP1(sparse_linear(), device_id=torch.device("cpu")))
    attempt("an optimizer built before `fully_shard`", lambda: step_of_a_stale_optimizer(sparse_linear()))
    return found


def step_of_a_stale_optimizer(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ow.attach(optimizer, model)
    fully_shard(model)
    model(torch.randn(2, 16)).sum().backward()
    optimizer.step()


# --- the processes -----------------------------------------------------------------------------------------------


def two(rank, folder):
    ranks = {"rank": rank, "ranks": 2}
    found = {
        name: {kind.__name__: run(scenario, kind, **ranks) for kind in nets_of(scenario)}
        for name, scenario in SCENARIOS.items()
    }
    found |= {name: {"Feedforward": run(scenario, Feedforward)} for name, scenario in SPLIT.items()}
    found["cut"] = {name: [cut(make, method) for method in (ow.SRSTE(DECAY), ow.ASP())] for name, make in CUT.items()}
    found["methods"] = {name: cut(linear, method) for name, method in METHODS.items()}
    found["held"] = masks_held_before_the_step()
    found["saved"] = save_and_go_on(SAVED, folder / "checkpoint", **ranks)
    found["refused"] = refusals()
    return found


def four(rank, folder):
    return load_and_go_on(SAVED, folder / "checkpoint", SCENARIOS[EACH_LAYER], rank=rank, ranks=4)


def start(rank, work, ranks, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting{ranks}", rank=rank, world_size=ranks)
    torch.save(work(rank, Path(folder)), Path(folder) / f"{ranks}-{rank}.pt")
    dist.destroy_process_group()
