"""SR-STE training written out from its equations: what the package's training is compared with. Uses none of it.

    w~ = w where kept, else 0
    g  = dL/dw~ of the whole batch, clipped, + decay * w where pruned
    w  = update(w, g)

or, decoupled:  w = update(w - LR * decay * w where pruned, g) with g without the decay.

Masks are made by sorting each group in Python, the optimizers' updates are their papers' formulas.
"""

import torch
from torch import nn
from torch.nn.functional import conv2d, linear

N, M = 2, 4
DECAY, LR, MOMENTUM, BETAS, EPS, WEIGHT_DECAY = 0.5, 0.03, 0.9, (0.9, 0.99), 1e-8, 0.01
SPARSE = ("conv.weight", "middle.weight", "last.weight")


class Net(nn.Module):
    """(B, 4, 5, 5) -> (B, 4). The weight of `middle` is used `uses` times in one forward."""

    def __init__(self, uses=1):
        super().__init__()
        self.conv, self.middle, self.last = nn.Conv2d(4, 8, 3), nn.Linear(8, 8), nn.Linear(8, 4)
        self.uses = uses

    def forward(self, x):
        h = self.conv(x).tanh().mean((2, 3))
        for _ in range(self.uses):
            h = self.middle(h).tanh()
        return self.last(h)


def plain_net(p, x, uses):
    """`Net` on a dict of parameters."""
    h = conv2d(x, p["conv.weight"], p["conv.bias"]).tanh().mean((2, 3))
    for _ in range(uses):
        h = linear(h, p["middle.weight"], p["middle.bias"]).tanh()
    return linear(h, p["last.weight"], p["last.bias"])


def batches(steps, dtype=torch.float64, size=8):
    """Inputs and targets, the same for everyone."""
    draw = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 4, 5, 5, generator=draw, dtype=torch.float64).to(dtype),
            torch.randn(size, 4, generator=draw, dtype=torch.float64).to(dtype),
        )
        for _ in range(steps)
    ]


def keep_by_sorting(weight, n=N):
    """The n:4 mask along input channels: bool, True is kept. Equal magnitudes keep the lower index."""
    last = weight.movedim(1, -1)
    mask = []
    for group in last.reshape(-1, M).tolist():
        kept = sorted(range(M), key=lambda i: (-abs(group[i]), i))[:n]
        mask.append([i in kept for i in range(M)])
    return torch.tensor(mask).view(last.shape).movedim(-1, 1)


def sgd(w, g, state, t):
    g = g + WEIGHT_DECAY * w
    state["v"] = g if t == 1 else MOMENTUM * state["v"] + g
    return w - LR * state["v"]


def adam(w, g, state, t):
    return w - _adam_direction(g + WEIGHT_DECAY * w, state, t)


def adamw(w, g, state, t):
    return w - LR * WEIGHT_DECAY * w - _adam_direction(g, state, t)


def _adam_direction(g, state, t):
    state["m"] = BETAS[0] * state.get("m", 0) + (1 - BETAS[0]) * g
    state["v"] = BETAS[1] * state.get("v", 0) + (1 - BETAS[1]) * g * g
    m, v = state["m"] / (1 - BETAS[0] ** t), state["v"] / (1 - BETAS[1] ** t)
    return LR * m / (v.sqrt() + EPS)


UPDATES = {"sgd": sgd, "adam": adam, "adamw": adamw}


def plain_loop(start, data, update, *, decay=DECAY, uses=1, clip=None, decoupled=False, schedule=None):
    """The parameters after one step on each batch, from `start`: a dict of tensors by name. `schedule(weight, step)`:
    the mask when so many steps are done, and what pruned weights are multiplied with."""
    weights = {name: w.detach().clone() for name, w in start.items()}
    states = {name: {} for name in weights}
    for t, (x, y) in enumerate(data, 1):
        rules = {name: schedule(weights[name], t - 1) if schedule else (None, 0) for name in SPARSE}
        keep = {name: keep_by_sorting(weights[name]) if mask is None else mask for name, (mask, _) in rules.items()}
        used = {
            name: (w.where(keep[name], rules[name][1] * w) if name in keep else w.clone())
            for name, w in weights.items()
        }
        leaves = [w.requires_grad_() for w in used.values()]
        loss = (plain_net(used, x, uses) - y).square().mean()
        gradients = dict(zip(used, torch.autograd.grad(loss, leaves), strict=True))
        if clip:
            norm = sum(g.square().sum() for g in gradients.values()).sqrt()
            gradients = {name: g * min(1.0, clip / (float(norm) + 1e-6)) for name, g in gradients.items()}
        for name in SPARSE:
            term = decay * weights[name].where(~keep[name], 0 * weights[name])
            if decoupled:
                weights[name] = weights[name] - LR * term
            else:
                gradients[name] = gradients[name] + term
        weights = {name: update(w, gradients[name], states[name], t) for name, w in weights.items()}
    return weights


def distance(a, b):
    """The largest difference of two dicts of tensors; infinite where one of them is not finite."""
    assert a.keys() == b.keys()
    largest = max(float((a[name].double() - b[name].double()).abs().max()) for name in a)
    return largest if largest == largest else float("inf")
