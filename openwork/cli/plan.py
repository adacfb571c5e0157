"""The command `openwork plan`: which layers of a model are faster sparse here."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from openwork.cli.source import FORMS, Source, add_arguments, open_model, with_batch
from openwork.inference.deploy import plan as plan_of
from openwork.training.selection import Selection
from openwork.training.sparsify import project
from openwork.utils.torch_private import tree_map_only

_ABOUT = f"""\
Time every layer of a model on this hardware, dense and sparse, and print what ow.deploy would choose.

A run directory and a compressed file are timed at the patterns that they record; other weights are first projected to
--pattern, the largest N of every M.

{FORMS}"""


def plan(words: Sequence[str]) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        "openwork plan", description=_ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", metavar="SOURCE")
    add_arguments(parser)
    add("--pattern", metavar="N:M", help="of weights that record none (default: 2:4)")
    add("--exclude", nargs="+", default=(), metavar="GLOB", help="weights that --pattern leaves dense")
    add("--batch", type=int, help="samples of the example (default: as many as it has)")
    dtypes = ["float32", "bfloat16", "float16", "int8", "float8_e4m3fn"]
    add("--weight-dtype", choices=dtypes, help="of the sparse weights (default: the model's own; bfloat16 on a GPU)")
    add("--device", default="cpu", help="cpu or cuda")
    add("--threads", type=int, default=torch.get_num_threads())
    asked = parser.parse_args(words)
    if torch.device(asked.device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {asked.device}: torch {torch.__version__} sees no GPU here")
    torch.set_num_threads(asked.threads)
    source = open_model(asked.source, model=asked.model, shapes=asked.input)
    model, example = source.model, source.example
    selection = _projected(source, asked.pattern, asked.exclude)
    if asked.batch is not None:
        example = with_batch(example, asked.batch)
    if asked.device != "cpu":
        model, example = model.to(asked.device, torch.bfloat16), _on(example, asked.device)
    weight_dtype = getattr(torch, asked.weight_dtype) if asked.weight_dtype else None
    print(plan_of(model, example, pattern=selection, weight_dtype=weight_dtype))
    return 0


def _on(example: Any, device: str) -> Any:
    """The example on a device, its floating tensors in bfloat16."""

    def moved(tensor: Tensor) -> Tensor:
        return tensor.to(device, torch.bfloat16) if tensor.is_floating_point() else tensor.to(device)

    return tree_map_only(Tensor, moved, example)


def _projected(source: Source, pattern: str | None, exclude: Sequence[str]) -> Selection | None:
    """What the model is held to; weights without a recorded pattern are projected to the one that was asked for."""
    if source.selection is not None or source.is_sparsified:
        source.check_recorded(pattern, exclude)
        return source.selection
    project(source.model, pattern or "2:4", exclude=exclude)
    return Selection(pattern or "2:4", exclude=exclude)
