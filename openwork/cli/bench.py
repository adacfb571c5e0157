"""The command `openwork bench`: the benchmarks of `openwork.bench`, on models named like everywhere else."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from openwork.bench.command import bench as run
from openwork.cli.source import add_arguments, open_model, with_batch
from openwork.export.outputs import exportable

CALIBRATION = 4
"""Batches."""


def bench(words: Sequence[str]) -> int:
    """Runs the command; returns the exit status."""
    return run(words, _build, add_arguments)


def _build(name: str, asked: argparse.Namespace, batch: int) -> tuple[nn.Module, Any, Sequence[Any]]:
    """Inputs of random weights are random, and four more batches calibrate int8; what has a meaning is repeated."""
    source = open_model(name, model=asked.model, shapes=asked.input)
    model = exportable(source.model)  # plain, for the patterns of the benchmark
    example = with_batch(source.example, batch)
    if not (isinstance(example, Tensor) and example.is_floating_point() and source.random):
        return model, example, ()
    torch.manual_seed(0)
    return model, torch.randn(example.shape), [torch.randn(example.shape) for _ in range(CALIBRATION)]
