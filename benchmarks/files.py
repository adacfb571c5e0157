"""Sizes and load times of compressed files, beside dense safetensors and the same zipped.

    python benchmarks/files.py [--models resnet50 vit_b gpt2] [--patterns 2:4 1:4 1:16] [--rounds 5]

Weights are random, projected to the pattern: only zip's size depends on values, and hardly, because the bits of weights
look random. Files lie in the page cache when they are loaded, so that the times are those of reading and unpacking, not
of a disk. Formats take turns within a round; medians, quartiles in brackets.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

import openwork as ow
from openwork.files.checkpoint import describe
from openwork.files.container import write_tensors
from openwork.utils.torchvision_compat import ensure_torchvision

ensure_torchvision()


def resnet50() -> nn.Module:
    from torchvision.models import resnet50 as make

    return make()


def vit_b() -> nn.Module:
    from torchvision.models import vit_b_16

    return vit_b_16()


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config())


MODELS: dict[str, Callable[[], nn.Module]] = {"resnet50": resnet50, "vit_b": vit_b, "gpt2": gpt2}


def unzipped(path: Path) -> dict[str, torch.Tensor]:
    with zipfile.ZipFile(path) as file:
        file.extractall(path.parent / "unzipped")
    return load_file(path.parent / "unzipped" / "dense.safetensors")


def written(model: nn.Module, pattern: str, folder: Path) -> tuple[Path, Path, Path]:
    files = folder / "net.safetensors", folder / "dense.safetensors", folder / "dense.zip"
    ow.save(model, files[0], pattern=pattern)
    state = ow.load_state_dict(files[0])
    first = {id(each): name for name, each in reversed(state.items())}.values()  # tied tensors once, as in the file
    write_tensors(str(files[1]), {name: each for name, each in state.items() if name in first}, {"format": "pt"})
    with zipfile.ZipFile(files[2], "w", zipfile.ZIP_DEFLATED) as file:
        file.write(files[1], files[1].name)
    return files


def bound(path: Path) -> float:
    """Bytes of the dense tensors, the kept values, and min(N * ceil(log2 M), M) bits a group."""
    size = 0.0
    for each in describe(path):
        if each.pattern is None or each.alias_of:
            size += each.bytes
            continue
        slots = each.density * torch.Size(each.shape).numel()
        size += slots * each.dtype.itemsize + slots / each.pattern.n * each.pattern.index_bits / 8
    return size


def seconds(loads: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in loads}
    for _ in range(rounds):
        for name, load in loads.items():
            start = time.perf_counter()
            load()
            found[name].append(time.perf_counter() - start)
    return found


def median(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return f"{middle:.2f} s [{low:.2f}, {high:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--patterns", nargs="+", default=["2:4", "1:4", "1:16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    warnings.filterwarnings("ignore")
    header = ["model", "pattern", "dense MB", "zip MB", "file MB", "of dense", "over the bound"]
    header += ["load dense", "load zip", "load file"]
    print("| " + " | ".join(header) + " |")
    print("|---" * len(header) + "|")
    for name in asked.models:
        for pattern in asked.patterns:
            torch.manual_seed(0)
            model = MODELS[name]()
            ow.project(model, pattern)
            with tempfile.TemporaryDirectory() as folder:
                files = written(model, pattern, Path(folder))
                file, dense, zipped = (each.stat().st_size for each in files)
                least = bound(files[0])
                loads: dict[str, Callable[[], object]] = {
                    "dense": lambda files=files, model=model: model.load_state_dict(load_file(files[1]), strict=False),
                    "zip": lambda files=files, model=model: model.load_state_dict(unzipped(files[2]), strict=False),
                    "file": lambda files=files, model=model: ow.load(files[0], into=model),
                }
                times = {key: median(each) for key, each in seconds(loads, asked.rounds).items()}
            cells = [f"{each / 1e6:.1f}" for each in (dense, zipped, file)]
            cells += [f"{file / dense:.3f}", f"{file / least - 1:.3%}"]
            print("| " + " | ".join([name, pattern, *cells, *times.values()]) + " |", flush=True)


if __name__ == "__main__":
    main()
