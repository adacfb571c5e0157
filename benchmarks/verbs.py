"""What happens around the products, at the speed of memory: `ow.sparsify`, `verify`, `save`, `load` and `deploy`, each
over what plain torch and safetensors do with the same weights.

    python benchmarks/verbs.py [--verbs sparsify verify save load deploy] [--rounds 9] [--pattern 2:4] [--folder DIR]

134 M float32 weights: 8 linear layers of 4096 x 4096; and layers of a transformer 1024 wide. Both sides of a ratio take
turns in one process; the time of each is the 20th percentile of all rounds. Files are
written to `--folder` and read from the page cache; the default is memory, which leaves the disk out. `ow.save` flushes
its file to the disk before it renames it, and safetensors does not: the baseline is safetensors followed by the same
flush, and a row of its own is without. Peaks are of the process, by Linux: how far the most that it held while the
verb ran lies above what it held before, in units of the weights.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import openwork as ow
from openwork.utils.atomic import sync

Turn = Callable[[], object]


def linears() -> nn.Module:
    return nn.Sequential(*[nn.Linear(4096, 4096, bias=False) for _ in range(8)])


def transformer(width: int = 1024) -> nn.Module:
    layer = [
        nn.Linear(width, 3 * width),
        nn.Linear(width, width),
        nn.Linear(width, 4 * width),
        nn.Linear(4 * width, width),
    ]
    layers = [copy.deepcopy(nn.ModuleList([*layer, nn.LayerNorm(width)])) for _ in range(10)]
    return nn.Sequential(nn.Embedding(8192, width), *layers)


MODELS = {"linears": linears, "transformer": transformer}


def bytes_of(model: nn.Module) -> int:
    return sum(each.nbytes for each in model.parameters())


def clone(model: nn.Module) -> Turn:
    """The measure of the first two rows: fresh memory with the same weights in it."""
    return lambda: [each.detach().clone() for each in model.parameters()]


def lowest(seconds: list[float]) -> float:
    return sorted(seconds)[len(seconds) // 5]


def take_turns(turns: dict[str, Turn], rounds: int, before: Turn = lambda: None) -> dict[str, float]:
    """Seconds of each; `before` runs untimed ahead of each."""
    times: dict[str, list[float]] = {name: [] for name in turns}
    for round_ in range(rounds + 1):
        for name, turn in turns.items():
            before()
            start = time.process_time()
            kept = turn()
            times[name].append(time.process_time() - start)
            del kept
        if not round_:
            times = {name: [] for name in turns}
    return {name: lowest(each) for name, each in times.items()}


def peak_of(turn: Turn) -> int:
    """Bytes that the process held at most during a call, above what it held before: Linux alone says that."""
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is held now
    before = held("VmRSS")
    turn()
    return held("VmHWM") - before


def held(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def shell(model: nn.Module) -> nn.Module:
    """New modules around the same parameters: `sparsify` changes modules, and leaves the values alone."""
    return copy.deepcopy(model, {id(each): each for each in model.parameters()})


def projected(model: nn.Module, pattern: str) -> nn.Module:
    """The same, with zeros of the pattern in memory of its own."""
    model = copy.deepcopy(model)
    ow.project(model, pattern)
    return model


def sparsify(model: nn.Module, args: argparse.Namespace) -> dict[str, Turn]:
    return {"baseline": clone(model), "ow.sparsify": lambda: ow.sparsify(shell(model), args.pattern)}


def verify(model: nn.Module, args: argparse.Namespace) -> dict[str, Turn]:
    sparse, plain = shell(model), projected(model, args.pattern)
    ow.sparsify(sparse, args.pattern)
    return {
        "baseline": clone(model),
        "ow.verify, sparsified": lambda: ow.verify(sparse),
        "ow.verify, plain": lambda: ow.verify(plain, pattern=args.pattern),
    }


def save(model: nn.Module, args: argparse.Namespace) -> dict[str, Turn]:
    sparse, plain = shell(model), projected(model, args.pattern)
    ow.sparsify(sparse, args.pattern)
    dense, ours = args.folder / "dense.safetensors", args.folder / "sparse.safetensors"

    def flushed() -> None:
        save_file(model.state_dict(), dense)
        sync(dense)

    return {
        "baseline": flushed,
        "safetensors, not flushed": lambda: save_file(model.state_dict(), dense),
        "ow.save, sparsified": lambda: ow.save(sparse, ours),
        "ow.save, plain": lambda: ow.save(plain, ours, pattern=args.pattern),
    }


def load(model: nn.Module, args: argparse.Namespace) -> dict[str, Turn]:
    plain = projected(model, args.pattern)
    dense, ours = args.folder / "dense.safetensors", args.folder / "sparse.safetensors"
    save_file(plain.state_dict(), dense)
    ow.save(plain, ours, pattern=args.pattern)
    sparse = copy.deepcopy(plain)
    ow.sparsify(sparse, args.pattern)
    return {
        "baseline": lambda: plain.load_state_dict(load_file(dense)),
        "ow.load": lambda: ow.load(ours, into=plain),
        "ow.load, sparsified": lambda: ow.load(ours, into=sparse),
    }


def deploy(model: nn.Module, args: argparse.Namespace) -> dict[str, Turn]:
    del model
    layers = nn.Sequential(*[nn.Linear(args.width, args.width, bias=False) for _ in range(16)])
    ow.project(layers, args.pattern)
    x = torch.randn(128, args.width)

    def forward() -> None:
        with torch.inference_mode():
            layers(x)

    return {"baseline": forward, "ow.deploy": lambda: ow.deploy(layers, x, pattern=args.pattern)}


VERBS = {"sparsify": sparsify, "verify": verify, "save": save, "load": load, "deploy": deploy}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verbs", nargs="+", default=list(VERBS), choices=VERBS)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="of a file system; /dev/shm is memory")
    parser.add_argument("--width", type=int, default=4096, help="of the 16 equal layers that are deployed")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    print(
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, {ow.kernels.status()}, files in {args.folder}"
    )
    print("| model | verb | ms | over the baseline | peak above before, in weights |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        args.folder = Path(folder)
        for verb in args.verbs:
            for name in args.models if verb != "deploy" else ["16 equal layers"]:
                report(name, verb, args)


def report(name: str, verb: str, args: argparse.Namespace) -> None:
    model = MODELS[name]() if name in MODELS else nn.Identity()
    turns = VERBS[verb](model, args)
    weights = bytes_of(model) or 16 * args.width**2 * 4
    times = take_turns(turns, args.rounds if verb != "deploy" else 1)
    for what, seconds in times.items():
        peak = peak_of(turns[what]) / weights
        ratio = seconds / times["baseline"]
        label = f"{verb}: {what}" if what == "baseline" else what
        print(f"| {name} | {label} | {seconds * 1e3:.0f} | {ratio:.2f} | {peak:.2f} |", flush=True)


if __name__ == "__main__":
    main()
