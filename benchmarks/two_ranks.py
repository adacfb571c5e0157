"""What sparse training costs when processes share it: `torchrun --nproc-per-node 2 benchmarks/two_ranks.py`.

Dense and SR-STE 2:4, under DDP and FSDP2 (each layer and the model), on CPUs with gloo. Rounds alternate between the
four, so that what disturbs the machine disturbs all. Printed: milliseconds of a step (median and quartiles), the ratio
to dense, and the megabytes that autograd keeps between forward and backward, with and without activation checkpointing.
"""

import argparse
import statistics
import time
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import openwork as ow


class Net(nn.Module):
    """Residual MLPs, as in a transformer, on rows of `width`."""

    def __init__(self, width: int, depth: int, checkpointed: bool = False):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(depth)
        )
        self.checkpointed = checkpointed

    def forward(self, x):
        for layer in self.layers:
            x = x + (checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x))
        return x


def shard(net: nn.Module) -> nn.Module:
    for layer in net.layers:
        fully_shard(layer)
    return fully_shard(net)


class Run:
    """One of the four: `step()` trains on a batch."""

    def __init__(self, make, wrap, sparse: bool, x: torch.Tensor):
        torch.manual_seed(0)
        net = make()
        if sparse:
            ow.sparsify(net, "2:4", ow.SRSTE())
        self.model, self.x, self.times = wrap(net), x, []
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        if sparse:
            ow.attach(self.optimizer, self.model)

    def step(self) -> None:
        dist.barrier()
        start = time.perf_counter()
        self.model(self.x).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.times.append(time.perf_counter() - start)

    def kept(self) -> float:
        """Megabytes of storages that autograd keeps after the forward pass."""
        storages = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = self.model(self.x)
        kept = sum(each.nbytes() for each in storages.values()) / 1e6
        out.sum().backward()
        self.optimizer.zero_grad()
        return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--rows", type=int, default=1024, help="rows of a batch, for each process")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    x = torch.randn(options.rows, options.width)
    make = partial(Net, options.width, options.depth)
    runs = {
        (name, sparse): Run(make, wrap, sparse, x)
        for name, wrap in {"DDP": DistributedDataParallel, "FSDP2": shard}.items()
        for sparse in (False, True)
    }
    for _ in range(options.rounds + 2):
        for each in runs.values():
            each.step()
    kept = {key: each.kept() for key, each in runs.items()}
    kept[("FSDP2, checkpointed", True)] = Run(partial(make, True), shard, True, x).kept()
    if dist.get_rank() == 0:
        weights = sum(p.numel() for p in make().parameters())
        print(
            f"{weights / 1e6:.1f} M weights, {dist.get_world_size()} processes of 1 thread, torch {torch.__version__}"
        )
        for (name, sparse), each in runs.items():
            low, middle, high = statistics.quantiles([1e3 * t for t in each.times[2:]], n=4)
            pairs = zip(each.times[2:], runs[(name, False)].times[2:], strict=True)
            ratio = statistics.median(a / b for a, b in pairs)
            kind = "sr-ste" if sparse else "dense"
            print(f"{name:6s} {kind:7s} {middle:7.1f} ms ({low:.1f} to {high:.1f}), {ratio:.2f} of dense")
        for (name, sparse), size in kept.items():
            print(f"{name} {'sr-ste' if sparse else 'dense'}: {size:.1f} MB kept for the backward pass")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
