"""Benchmarks of whole models: a forward pass, deployed, beside every dense way to run it."""

from __future__ import annotations

import copy
import importlib
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from openwork.bench.measure import BenchRow, alternating, rows
from openwork.inference.deploy import deploy
from openwork.inference.fold import fold_batch_norm
from openwork.inference.packed_weight import bytes_held
from openwork.inference.plan import Plan
from openwork.nm.pattern import Pattern
from openwork.training.sparsify import project
from openwork.utils.timing import compile_frozen
from openwork.utils.torchvision_compat import prepare_torchvision


class Encoder(nn.Module):
    """The encoder of BERT-base and ViT-B: 12 blocks of width 768 with 12 heads; torch's attention on separate linear
    layers, so that all of its products can be sparse."""

    def __init__(self, width: int = 768, heads: int = 12, blocks: int = 12):
        super().__init__()
        self.blocks = nn.ModuleList(EncoderBlock(width, heads) for _ in range(blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class EncoderBlock(nn.Module):
    """One layer of it, normalized first. `causal`: of a decoder."""

    def __init__(self, width: int, heads: int, causal: bool = False):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, W = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(attended.transpose(1, 2).reshape(B, T, W))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


def forward_passes(
    name: str,
    build: Callable[[int], tuple[nn.Module, torch.Tensor]],
    batches: Sequence[int],
    patterns: Sequence[Pattern],
    weight_dtypes: Sequence[torch.dtype],
    *,
    seconds: float,
    compiled: bool,
    dtype: torch.dtype = torch.float32,
) -> Iterator[BenchRow | Plan]:
    """Rows of a model in `dtype` and batch, all variants taking turns: dense (eager, channels_last, compiled with
    frozen weights; where there are int8 weights, linear layers in torch's int8), deployed with weights in each of
    `weight_dtypes`, and that compiled. `build` gives the model and an example of a batch. Yields the plans of the
    deployed ones as well. Dense int8 is a baseline of int8 alone."""
    for batch in batches:
        torch.compiler.reset()  # some compiled models of one class are too many
        model, x = build(batch)
        model, x = model.to(dtype), x.to(dtype)
        dense = copy.deepcopy(model)
        fold_batch_norm(dense, x)
        variants: dict[str, Callable[[], object]] = {"dense eager": partial(dense, x)}
        if x.ndim == 4:
            last = copy.deepcopy(dense).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            variants["dense channels_last"] = partial(last, x.to(memory_format=torch.channels_last))
        if compiled:
            variants["dense compiled"] = partial(compile_frozen(dense, x), x)
        baselines = list(variants)
        about = {name: ("dense", _short(dtype)) for name in baselines}
        bytes_of = {"dense eager": memory(dense, x)}
        if torch.int8 in weight_dtypes and dtype == torch.float32 and x.ndim == 3:
            variants["dense int8"] = partial(_quantized(dense), x)
            about["dense int8"] = ("dense", "int8")
        for pattern in patterns:
            sparse = copy.deepcopy(model)
            project(sparse, pattern)
            for weight_dtype in weight_dtypes:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    fast = deploy(sparse, x, pattern=pattern, weight_dtype=weight_dtype)
                short = f"deployed {pattern} {_short(weight_dtype)}"
                variants[short], about[short] = partial(fast, x), (str(pattern), _short(weight_dtype))
                if compiled:
                    variants[short + " compiled"] = partial(compile_frozen(fast, x), x)
                    about[short + " compiled"] = about[short]
                bytes_of[short] = memory(fast, x)
                yield fast.deployment  # type: ignore[misc]
        times = alternating(variants, seconds=seconds, flush=False)
        int8 = {name: each for name, each in times.items() if about[name][1] == "int8"}
        others = {name: each for name, each in times.items() if name not in int8}
        yield from rows(name, f"batch {batch}", others, baselines, about, {}, bytes_of)
        if int8:
            against = [*baselines, *(name for name in int8 if name.startswith("dense"))]
            both = rows(name, f"batch {batch}", {**others, **int8}, against, about, {}, bytes_of)
            yield from (row for row in both if row.dtype == "int8")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _quantized(model: nn.Module) -> nn.Module:
    """Linear layers in torch's int8, inputs quantized as they come."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # to be moved to another package, some day
        made: nn.Module = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    return made


def memory(model: nn.Module, example: torch.Tensor) -> tuple[int, int]:
    """Bytes of a model's parameters and buffers, and by how much the peak of a fresh process grew while it loaded the
    model and ran it once."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save((model, example), f"{folder}/model.pt")
        words = [sys.executable, "-m", "openwork.bench.models", f"{folder}/model.pt", str(torch.get_num_threads())]
        words.append(type(model).__module__)
        printed = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    return bytes_held(model), int(printed.split()[-1])


def _grown(file: str, threads: int, module: str) -> int:
    prepare_torchvision()
    importlib.import_module(module)  # of the model's class: code is no part of what grows
    torch.set_num_threads(threads)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
    before = _kilobytes("VmRSS")
    model, example = torch.load(file, weights_only=False, mmap=True)
    with torch.inference_mode():
        model(example)
    return 1024 * (_kilobytes("VmHWM") - before)


def _kilobytes(field: str) -> int:
    """A line of this process's status, which Linux has."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


if __name__ == "__main__":
    print(_grown(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
