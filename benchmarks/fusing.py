"""The most that fusing more could save: the method's term into optimizers, GELU into a product. One line for each case.

    python benchmarks/fusing.py [THREADS]

Both are upper bounds. A fused optimizer would at best make the whole cost of `ow.attach` disappear. A fused GELU saves
one pass through memory, of which ReLU, which does little else, is the measure; the arithmetic of GELU stays.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import openwork as ow
from openwork.bench.models import EncoderBlock
from openwork.inference.layers import PackedLinear
from openwork.layouts import Gemm
from openwork.utils.torchvision_compat import ensure_torchvision

OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD with momentum, fused": lambda p: torch.optim.SGD(p, 1e-3, momentum=0.9, weight_decay=1e-4, fused=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, 1e-4, fused=True),
}


def milliseconds(variants: Mapping[str, Callable[[], object]], rounds: int = 15) -> dict[str, float]:
    """Medians. They take turns."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, each in variants.items():
            start = time.perf_counter()
            each()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(each[1:]) for name, each in times.items()}


def optimizers(name: str, make: Callable[[], nn.Module], x: Tensor) -> None:
    """A step of the optimizer with and without the method, beside the passes through the network."""
    for kind, build in OPTIMIZERS.items():
        plain, sparse = make(), make()
        ow.sparsify(sparse, "2:4", ow.SRSTE())
        steps = {"plain": build(plain.parameters()), "attached": build(sparse.parameters())}
        ow.attach(steps["attached"], sparse)

        def passes(model: nn.Module = sparse) -> None:
            model(x).square().mean().backward()

        passes(plain)
        through = milliseconds({"passes": passes}, rounds=2)["passes"]
        found = milliseconds({which: each.step for which, each in steps.items()})
        extra = found["attached"] - found["plain"]
        print(
            f"{name}, {kind}: step {found['plain']:.1f} ms, attached {found['attached']:.1f} ms, passes {through:.0f} "
            f"ms: at most {extra / (through + found['attached']):.1%} to save"
        )


def gelu(tokens: int, pattern: str) -> None:
    """The feed-forward part of BERT-base, deployed."""
    up, down = nn.Linear(768, 3072), nn.Linear(3072, 768)
    ow.project(nn.ModuleList([up, down]), pattern)
    first, second = (PackedLinear(each, ow.Pattern.parse(pattern), Gemm, torch.float32) for each in (up, down))
    x = torch.randn(tokens, 768)
    wide = first(x)
    whole: dict[str, Callable[[], object]] = {"all": lambda: second(F.gelu(first(x)))}
    found = milliseconds(whole | {"gelu": lambda: F.gelu(wide), "relu": lambda: F.relu(wide)})
    print(
        f"768 x 3072 x 768 at {pattern}, {tokens} tokens: {found['all']:.1f} ms, of which GELU {found['gelu']:.2f} ms; "
        f"ReLU would take {found['relu']:.2f} ms: at most {found['relu'] / found['all']:.1%} to save"
    )


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else torch.get_num_threads())
    torch.manual_seed(0)
    resnet18 = ensure_torchvision().models.resnet18
    optimizers("ResNet-18, 128 x 32x32", lambda: resnet18(weights=None), torch.randn(128, 3, 32, 32))
    optimizers("a block of GPT-2 small, 8 x 128 tokens", lambda: EncoderBlock(768, 12), torch.randn(8, 128, 768))
    with torch.inference_mode():
        for pattern in ("2:4", "1:8"):
            for tokens in (128, 1024):
                gelu(tokens, pattern)
