"""FSDP2 under torchrun: sparsify, shard, build the optimizer, attach. Masks are made where the weights are.

torchrun --nproc-per-node 2 fsdp2.py
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

import openwork as ow


def network() -> nn.Module:
    torch.manual_seed(0)  # the same weights on every process
    layers = [nn.TransformerEncoderLayer(64, 4, 128, dropout=0, batch_first=True) for _ in range(2)]
    return nn.Sequential(*layers, nn.Linear(64, 16))


def main() -> None:
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank = dist.get_rank()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if torch.cuda.is_available() else "cpu"
    mesh = dist.init_device_mesh(torch.device(device).type, (dist.get_world_size(),))

    model = network().to(device)
    report = ow.sparsify(model, "2:4", ow.SRSTE(decay=2, decoupled=True), exclude=["2"])
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ow.attach(optimizer, model)
    if rank == 0:
        print(report)

    draw = torch.Generator().manual_seed(rank)  # each process has its own share of the data
    for step in range(20):
        x = torch.randn(8, 10, 64, generator=draw).to(device)
        loss = (model(x) - x[..., :16].cumsum(1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and step % 5 == 0:
            print(f"step {step}: loss {loss.item():.3f}")

    ow.verify(model)  # on every process
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        ow.sparsify(whole := network(), "2:4", ow.SRSTE(), exclude=["2"])
        whole.load_state_dict(full)
        ow.save(ow.finalize(whole), "fsdp2.safetensors", pattern=ow.Selection("2:4", exclude=["2"]))
        print(f"saved {len(full)} tensors, {report.summary}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
