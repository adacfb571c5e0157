"""The command `openwork bench`: the benchmarks of `openwork.bench`, on models named like everywhere else."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from openwork.bench.command import bench as run
from openwork.cli.source import add_arguments, open_model, with_batch
from openwork.export.outputs import exportable


def bench(words: Sequence[str]) -> int:
    """Runs the command; returns the exit status."""
    return run(words, _build, add_arguments)


def _build(name: str, asked: argparse.Namespace, batch: int) -> tuple[nn.Module, Tensor]:
    source = open_model(name, model=asked.model, shapes=asked.input)
    if not isinstance(source.example, Tensor):
        raise ValueError(f"{name} takes {type(source.example).__name__} of inputs; needed a model of one tensor")
    model = exportable(source.model)  # plain, for the patterns of the benchmark
    if source.example.is_floating_point() and source.random:
        torch.manual_seed(0)
        return model, torch.randn(batch, *source.example.shape[1:])
    return model, with_batch(source.example, batch)
