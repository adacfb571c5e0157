"""Pre-train decoders on the bytes of a text, dense, with SR-STE and with transposable masks, from the same seeds.

    python benchmarks/pretraining.py --text FILE                              # a small network, for a CPU
    python benchmarks/pretraining.py --text FILE --size gpt2 --steps 3000     # of GPT-2 small's size, for a GPU
    python benchmarks/pretraining.py --page build/pretraining.json            # writes the page; needs matplotlib

The page is docs/transposable.md. The last tenth of the text is held out: its loss, in nats a byte, is what methods are
compared by. On a GPU a fourth method, "accelerated", is the transposable one on sparse tensor cores (`ow.accelerate`).
"decoupled", which is run when it is named, is SR-STE with its decay beside AdamW's moments (docs/methods.md).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import openwork as ow
from openwork.bench.measure import today
from openwork.bench.models import EncoderBlock
from openwork.utils.hardware import cpu_model

sys.path.insert(0, str(Path(__file__).parent))
from figures import save
from gpu_tables import between

PAGE = Path(__file__).parent.parent / "docs" / "transposable.md"
METHODS = ("dense", "SR-STE", "transposable", "accelerated", "decoupled")


@dataclass(frozen=True)
class Size:
    """Of a network and its batches: `batch` windows of `tokens` bytes."""

    width: int
    heads: int
    blocks: int
    tokens: int
    batch: int


SIZES = {
    "tiny": Size(width=32, heads=2, blocks=2, tokens=16, batch=2),
    "small": Size(width=128, heads=4, blocks=4, tokens=128, batch=16),
    "gpt2": Size(width=768, heads=12, blocks=12, tokens=1024, batch=16),
}


class Gpt(nn.Module):
    """A decoder of GPT-2's shape with a tied output layer: tokens (B, T) -> logits (B, T, words)."""

    def __init__(self, size: Size, words: int):
        super().__init__()
        self.words, self.places = nn.Embedding(words, size.width), nn.Embedding(size.tokens, size.width)
        self.blocks = nn.ModuleList(EncoderBlock(size.width, size.heads, causal=True) for _ in range(size.blocks))
        self.norm, self.head = nn.LayerNorm(size.width), nn.Linear(size.width, words, bias=False)
        self.head.weight = self.words.weight
        for each in self.parameters():
            if each.ndim == 2:
                nn.init.normal_(each, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


@dataclass(frozen=True)
class Recipe:
    """Of one run. `refresh_every`: steps between choices of transposable masks."""

    size: str
    steps: int
    lr: float
    decay: float
    refresh_every: int

    def rate(self, step: int) -> float:
        """Warm-up over a twentieth of the steps, then half a cosine down to a tenth."""
        warm = max(1, self.steps // 20)
        if step < warm:
            return self.lr * (step + 1) / warm
        return self.lr * (0.55 + 0.45 * math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))


def prepared(
    model: nn.Module,
    how: str,
    exclude: Sequence[str],
    topology: ow.Topology | None = None,
    decay: float = 2e-4,
    refresh_every: int = 40,
    **options: Any,
) -> torch.optim.Optimizer:
    """The optimizer of a model that is made sparse at 2:4 as `how` says, on a GPU on sparse tensor cores if asked."""
    on_gpu = next(model.parameters()).is_cuda
    if how != "dense":
        along_one_axis = how in ("SR-STE", "decoupled")
        method = (
            ow.SRSTE(decay, decoupled=how == "decoupled")
            if along_one_axis
            else ow.TransposableSRSTE(decay, refresh_every)
        )
        ow.sparsify(model, "2:4", method, exclude=exclude)
    optimizer = torch.optim.AdamW(model.parameters(), fused=on_gpu, **options)
    if how != "dense":
        ow.attach(optimizer, model, topology=topology)
    if how == "accelerated" and on_gpu:
        ow.accelerate(model)
    return optimizer


class Text:
    """Bytes of a text, the last tenth held out."""

    def __init__(self, path: Path, size: Size):
        self.bytes = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).long()
        self.size = size
        self.kept = len(self.bytes) - len(self.bytes) // 10
        if len(self.bytes) // 10 <= size.tokens:
            raise SystemExit(
                f"{path} has {len(self.bytes)} bytes; needed more than {10 * size.tokens}: a tenth is held out"
            )

    def batches(self, steps: int, seed: int) -> Iterator[Tensor]:
        """Windows (batch, tokens + 1) from random places of what is trained on."""
        order = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            starts = torch.randint(self.kept - self.size.tokens, (self.size.batch,), generator=order)
            yield torch.stack([self.bytes[at : at + self.size.tokens + 1] for at in starts.tolist()])

    def held_out(self) -> Iterator[Tensor]:
        """All of what is held out, in windows that do not overlap but for the byte that starts the next."""
        windows = self.bytes[self.kept :].unfold(0, self.size.tokens + 1, self.size.tokens)
        yield from windows.split(self.size.batch)


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def loss_of(model: Any, windows: Tensor, device: torch.device) -> Tensor:
    windows = windows.to(device)
    with autocast(device):
        return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: Any, text: Text, device: torch.device) -> float:
    counted = [(float(loss_of(model, windows, device)), len(windows)) for windows in text.held_out()]
    return sum(loss * count for loss, count in counted) / sum(count for _, count in counted)


def trained(text: Text, how: str, recipe: Recipe, seed: int, device: torch.device) -> dict[str, Any]:
    """One run: losses of the training batches, and of the held-out text at every tenth of the steps."""
    torch.manual_seed(seed)
    model = Gpt(SIZES[recipe.size], 256).to(device)
    topology = ow.Topology(every=max(1, recipe.steps // 20))
    optimizer = prepared(
        model, how, ["head"], topology, recipe.decay, recipe.refresh_every,
        lr=recipe.lr, weight_decay=0.1, betas=(0.9, 0.95),
    )  # fmt: skip
    run = torch.compile(model) if device.type == "cuda" else model
    losses: list[Tensor] = []
    held_out: list[tuple[int, float]] = []
    for step, windows in enumerate(text.batches(recipe.steps, seed)):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        optimizer.zero_grad()
        loss = loss_of(run, windows, device)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if (step + 1) % max(1, recipe.steps // 10) == 0:
            held_out.append((step + 1, held_out_loss(model, text, device)))
    result: dict[str, Any] = {"method": how, "seed": seed, "held_out": held_out}
    result["loss"] = torch.stack(losses).float().tolist()
    if topology.records:
        result["sad"] = topology.records[-1]["sad_start"] / topology.records[-1]["weights"]
    if how != "dense":
        ow.verify(model)
        ow.finalize(model)
    result["final"] = held_out_loss(model, text, device)
    return result


# --- the page --------------------------------------------------------------------------------------------------------


def table(document: dict[str, Any]) -> str:
    """Held-out loss of the finalized networks."""
    finals = {how: {run["seed"]: run["final"] for run in runs} for how, runs in by_method(document).items()}
    lines = ["| method | held-out loss, nats a byte | delta vs dense | SAD, % of weights |", "|---|---|---|---|"]
    for how, runs in by_method(document).items():
        values = list(finals[how].values())
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        apart = [value - finals["dense"][seed] for seed, value in finals[how].items() if seed in finals["dense"]]
        off = "-" if how == "dense" else " ".join(f"{each:+.3f}" for each in apart)
        moved = [run["sad"] for run in runs if "sad" in run]
        sad = f"{100 * statistics.mean(moved):.1f}" if moved else "-"
        lines.append(f"| {how} | {statistics.mean(values):.3f}{spread} | {off} | {sad} |")
    return "\n".join(lines)


def by_method(document: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for run in document["runs"]:
        found.setdefault(run["method"], []).append(run)
    return found


def plot(document: dict[str, Any], path: Path) -> None:
    """Curves of the held-out loss, means over the seeds."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.2))
    for how, runs in by_method(document).items():
        steps = [step for step, _ in runs[0]["held_out"]]
        values = [statistics.mean(run["held_out"][i][1] for run in runs) for i in range(len(steps))]
        axes.plot(steps, values, label=how, linewidth=1.2)
    axes.set(xlabel="step", ylabel="held-out loss, nats a byte")
    axes.legend(frameon=False)
    figure.tight_layout()
    save(figure, path)
    plt.close(figure)


def write_page(source: Path, page: Path = PAGE) -> None:
    document = json.loads(source.read_text(encoding="utf-8"))
    recipe, on = document["recipe"], document["machine"]
    chart = page.with_name(f"pretraining-{recipe['size']}.svg")
    plot(document, chart)
    seeds = " ".join(str(run["seed"]) for run in by_method(document)["dense"])
    masks = f"decay {recipe['decay']:g}, transposable masks every {recipe['refresh_every']} steps"
    about = (
        f"{on['device']}, torch {on['torch']}, {document['date']}. {recipe['steps']} steps, learning rate "
        f"{recipe['lr']:g}, {masks}; seeds {seeds}."
    )
    text = f"\n{about}\n\n{table(document)}\n\n![Held-out loss over steps]({chart.name})\n\n"
    mark = f"<!-- pretraining {recipe['size']} -->\n"
    page.write_text(between(page.read_text(encoding="utf-8"), mark, text, page), encoding="utf-8")


# --- the command -----------------------------------------------------------------------------------------------------


def where(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--text", type=Path, help="read as bytes; a megabyte or more")
    add("--size", choices=SIZES, default="small", help="default: small")
    add("--steps", type=int, default=2000)
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--methods", nargs="+", choices=METHODS, help="default: the first three, on a GPU four")
    add("--lr", type=float, default=1e-3)
    add("--decay", type=float, default=2e-4, help="of SR-STE's term")
    add("--refresh_every", type=int, default=40, help="steps between choices of transposable masks")
    add("--out", type=Path, default=Path("build/pretraining.json"), help="written after each run")
    add("--page", type=Path, metavar="JSON", help="write table and curves of docs/transposable.md, and stop")
    asked = parser.parse_args(words)
    if not asked.page and not asked.text:
        parser.error("--text FILE is needed, or --page JSON")
    return asked


def main(words: Sequence[str] | None = None) -> int:
    asked = arguments(words)
    if asked.page:
        write_page(asked.page)
        return 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    text = Text(asked.text, SIZES[asked.size])
    recipe = Recipe(asked.size, asked.steps, asked.lr, asked.decay, asked.refresh_every)
    document: dict[str, Any] = {"recipe": asdict(recipe), "machine": where(device), "date": today(), "runs": []}
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    for seed in asked.seeds:
        for how in asked.methods or METHODS[: 4 if device.type == "cuda" else 3]:
            document["runs"].append(trained(text, how, recipe, seed, device))
            asked.out.write_text(json.dumps(document), encoding="utf-8")
            print(f"seed {seed}, {how}: held-out loss {document['runs'][-1]['final']:.4f}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
