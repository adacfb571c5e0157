"""A diffusion model (DDPM, Ho et al., arXiv:2006.11239) of points on a spiral, 2:4, with an average of its weights.

python diffusion.py
"""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import openwork as ow

torch.manual_seed(0)
STEPS, BATCH, TIMES = 700, 256, 30
kept = torch.linspace(0.999, 0.7, TIMES).cumprod(0)  # the share of the signal's power at each time


class Denoiser(nn.Module):
    """(B, 2) noisy points and their times (B,) -> the noise in them (B, 2)."""

    def __init__(self, width=128):
        super().__init__()
        self.time = nn.Embedding(TIMES, width)
        self.inputs, self.outputs = nn.Linear(2, width), nn.Linear(width, 2)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

    def forward(self, x, t):
        h = self.inputs(x) + self.time(t)
        for block in self.blocks:
            h = h + block(nn.functional.silu(h))
        return self.outputs(h)


def spiral(count):
    angle = 3 * torch.pi * torch.rand(count, 1).sqrt()
    return angle * torch.cat([angle.cos(), angle.sin()], 1) / 5 + 0.02 * torch.randn(count, 2)


model = Denoiser()
print(ow.sparsify(model, {"blocks": "2:4"}, ow.SRSTE(decay=2, decoupled=True)))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
ow.attach(optimizer, model)
average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.995))

for step in range(STEPS):
    x, t, noise = spiral(BATCH), torch.randint(TIMES, (BATCH,)), torch.randn(BATCH, 2)
    noisy = kept[t].sqrt()[:, None] * x + (1 - kept[t]).sqrt()[:, None] * noise
    loss = (model(noisy, t) - noise).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    average.update_parameters(model)
    if step % 100 == 0:
        print(f"step {step}: loss {loss.item():.3f}")

denoiser = ow.finalize(average.module)  # the average is 2:4 as well
x = torch.randn(1000, 2)
with torch.no_grad():
    for t in reversed(range(TIMES)):  # DDIM, the deterministic sampler
        before, noise = kept[t - 1] if t else torch.tensor(1.0), denoiser(x, torch.full((1000,), t))
        x = before.sqrt() * (x - (1 - kept[t]).sqrt() * noise) / kept[t].sqrt() + (1 - before).sqrt() * noise
print(f"distance of samples to the spiral: {torch.cdist(x, spiral(5000)).min(1).values.mean():.3f}")
print(ow.verify(denoiser, (x[:1], torch.tensor([3])), pattern={"blocks": "2:4"}).products)
ow.save(denoiser, "denoiser.safetensors", pattern={"blocks": "2:4"})
