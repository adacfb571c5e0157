"""A transformer of 12 blocks and a small residual network, with the dim that each sparse weight is summed over."""

from typing import ClassVar

import torch
from integrations.nets import ResNet, loss_of, made, sparse
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

__all__ = [
    "BLOCKS",
    "DIMS",
    "NETS",
    "Block",
    "Feedforward",
    "ResNet",
    "Transformer",
    "batches",
    "loss_of",
    "made",
    "sparse",
]

BLOCKS, WIDTH, HIDDEN, HEADS, BATCH = 12, 16, 32, 2, 8


class Block(nn.Module):
    """Attention and MLP side by side, one product into both and one out of both (as in ViT-22B, arXiv:2302.05442)."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.inner, self.outer = nn.Linear(WIDTH, 3 * WIDTH + HIDDEN), nn.Linear(WIDTH + HIDDEN, WIDTH)

    def forward(self, x):
        qkv, hidden = self.inner(self.norm(x)).split([3 * WIDTH, HIDDEN], -1)
        q, k, v = (each.unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in qkv.chunk(3, -1))
        attended = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.outer(torch.cat([attended, hidden.relu()], -1))


class Transformer(nn.Module):
    """(B, 7, 16) -> (B, 4)."""

    shape = (7, WIDTH)
    dims: ClassVar = {f"layers.{i}.{part}.weight": 1 for i in range(BLOCKS) for part in ("inner", "outer")}

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


class Feedforward(nn.Module):
    """(B, 16) -> (B, 4). Twelve of the MLPs of a usual transformer, for what splits these in two."""

    shape = (WIDTH,)
    dims: ClassVar = {f"layers.{i}.{part}.weight": 1 for i in range(BLOCKS) for part in ("up", "down")}

    def __init__(self):
        super().__init__()
        blocks = [
            {"norm": nn.LayerNorm(WIDTH), "up": nn.Linear(WIDTH, 40), "down": nn.Linear(40, WIDTH)}
            for _ in range(BLOCKS)
        ]
        self.layers = nn.ModuleList(map(nn.ModuleDict, blocks))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x):
        for each in self.layers:
            x = x + each["down"](each["up"](each["norm"](x)).relu())
        return self.head(x)


NETS = (Transformer, ResNet)


def batches(kind, steps):
    draw = torch.Generator().manual_seed(1)
    shape = (steps * BATCH, *kind.shape)
    x, y = torch.randn(shape, generator=draw), torch.randint(4, (steps * BATCH,), generator=draw)
    return list(zip(x.split(BATCH), y.split(BATCH), strict=True))


DIMS = {
    kind: [(weight.shape, kind.dims[n]) for n, weight in kind().named_parameters() if n in kind.dims]
    for kind in (*NETS, Feedforward)
}
