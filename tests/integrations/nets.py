"""A small transformer and a small residual network, with the dim that each sparse weight is summed over."""

import torch
from plain_loop import DECAY
from torch import nn
from torch.nn.functional import cross_entropy

import openwork as ow

BATCH = 8


class Transformer(nn.Module):
    """(B, 7, 16) -> (B, 4): torch's own encoder layer, whose attention reads weights without calling modules."""

    shape = (7, 16)
    dims = {
        f"layers.{i}.{part}weight": 1 for i in range(2) for part in ("self_attn.in_proj_", "linear1.", "linear2.")
    } | {f"layers.{i}.self_attn.out_proj.weight": 1 for i in range(2)}

    def __init__(self, dropout=0.0):
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.TransformerEncoderLayer(16, 2, 32, dropout, batch_first=True) for _ in range(2))
        )
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.layers(x).mean(1))


class ResNet(nn.Module):
    """(B, 4, 6, 6) -> (B, 4). Group norm: batches may be cut into micro-batches."""

    shape = (4, 6, 6)
    dims = dict.fromkeys(("stem.weight", "one.weight", "two.weight"), 1)

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(4, 16, 3, padding=1), nn.GroupNorm(2, 16)
        self.one, self.two = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        return self.head((x + self.two(self.one(x).relu())).mean((2, 3)))


def made(kind, **more):
    torch.manual_seed(0)
    return kind(**more)


def sparse(kind, method=ow.SRSTE(DECAY), **more):  # noqa: B008
    model = made(kind, **more)
    ow.sparsify(model, "2:4", method, exclude=["head"])
    return model


def samples(kind, count):
    """Inputs and classes, the same for everyone."""
    draw = torch.Generator().manual_seed(1)
    return torch.randn(count, *kind.shape, generator=draw), torch.randint(4, (count,), generator=draw)


def batches(kind, steps):
    x, y = samples(kind, steps * BATCH)
    return list(zip(x.split(BATCH), y.split(BATCH), strict=True))


def loss_of(call, batch):
    return cross_entropy(call(batch[0]), batch[1])


def shapes(kind):
    """For `Gemms`."""
    return [(weight.shape, kind.dims[name]) for name, weight in made(kind).named_parameters() if name in kind.dims]
