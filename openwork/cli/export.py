"""The command `openwork export`: from a run directory or a file to what other software loads."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_only

from openwork import export as to
from openwork.export.products import IN_GEMM, Product
from openwork.files.checkpoint import describe, load
from openwork.files.container import write
from openwork.utils.table import aligned

FORMS = ("onnx", "torch", "aot", "huggingface", "dense")
_BY_ENDING = {".onnx": "onnx", ".pt2": "torch", ".safetensors": "dense", "": "huggingface"}

_ABOUT = """\
Write a trained network in the form that other software loads.

SOURCE is a run directory of `openwork train`, or anything that ow.load reads: a file of ow.save, a folder with one, an
http(s) address, a name on the Hugging Face Hub. All but the form `dense` need the network around the weights: of a run
it is known; otherwise --model names a function or class that makes it. (That code is run, like any that you import.)
"""


@dataclass(frozen=True)
class Finished:
    """A network with its weights, an input for it, and what it is held to."""

    model: nn.Module
    example: Any
    pattern: Any = None
    exclude: Sequence[str] = field(default_factory=tuple)
    method: str = ""


def export(words: Sequence[str]) -> str:
    """Runs the command; returns what to print."""
    asked = _parser().parse_args(words)
    form = asked.to or _BY_ENDING.get(Path(asked.out).suffix, "")
    if not form:
        raise ValueError(f"--out {asked.out} does not say the form by its ending; add --to {{{','.join(FORMS)}}}")
    if form == "dense" and not _is_run(asked.source):
        return write_dense(load(asked.source), asked.out)
    finished = _of_run(Path(asked.source)) if _is_run(asked.source) else _of_file(asked)
    if form == "dense":
        return write_dense(finished.model.state_dict(), asked.out)
    return _written(form, finished, asked.out, asked.dynamic_batch)


def _parser() -> argparse.ArgumentParser:
    add_help = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("openwork export", description=_ABOUT, formatter_class=add_help)
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("--out", required=True, help="file, or folder for huggingface")
    parser.add_argument("--to", choices=FORMS, help="default: by the ending of --out (.onnx, .pt2, .safetensors, none)")
    parser.add_argument("--model", help="what makes the network, such as torchvision.models:resnet50")
    parser.add_argument("--input", default="", help="sizes of an input of random numbers, such as 1,3,224,224")
    parser.add_argument("--dynamic-batch", action="store_true", help="let the first dim of the input vary")
    return parser


def _is_run(source: str) -> bool:
    return (Path(source) / "config.yaml").exists()


def _of_run(folder: Path) -> Finished:
    from openwork.recipes.recipe import load_run

    net, example, config = load_run(folder)
    pattern = None if config.method == "dense" else config.pattern
    return Finished(net, example, pattern, tuple(config.exclude), config.method)


def _of_file(asked: argparse.Namespace) -> Finished:
    from openwork.files.checkpoint import load

    if not asked.model or not asked.input:
        raise ValueError(
            f"{asked.source} holds weights and no network: add --model package.module:function --input SIZES"
        )
    model = load(asked.source, into=_made(asked.model)).eval()
    example = torch.randn(_sizes(asked.input), generator=torch.Generator().manual_seed(0))
    patterns = {each.name: each.pattern for each in describe(asked.source) if each.pattern and not each.alias_of}
    return Finished(model, example, patterns or None)


def _made(name: str) -> nn.Module:
    module, colon, function = name.partition(":")
    if not colon:
        raise ValueError(f"--model {name}: needed package.module:function")
    sys.path.insert(0, os.getcwd())
    try:
        model = getattr(importlib.import_module(module), function)()
    except AttributeError as error:
        raise ValueError(f"--model {name}: {error}") from error
    finally:
        sys.path.remove(os.getcwd())
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model {name} gives a {type(model).__name__}; needed an nn.Module")
    return model


def _sizes(text: str) -> list[int]:
    try:
        return [int(each) for each in text.split(",")]
    except ValueError:
        raise ValueError(f"--input {text}: needed sizes with commas between them, such as 1,3,224,224") from None


def _written(form: str, found: Finished, out: str, dynamic: bool) -> str:
    """Write the form; what to tell about it."""
    if form == "huggingface":
        return to.to_huggingface(found.model, out, pattern=found.pattern, exclude=found.exclude, method=found.method)
    example, shapes = _of_any_size(found.example) if dynamic else (found.example, None)
    if form == "onnx":
        done = to.to_onnx(
            found.model, example, out, pattern=found.pattern, exclude=found.exclude, dynamic_shapes=shapes
        )
        lines = product_lines(done.products)
        return "\n".join([*lines, f"{out}: valid ONNX; {_compared('ONNX Runtime', done.difference)}"])
    write = to.to_torch_export if form == "torch" else to.to_aot_inductor
    return f"{out}: {_compared('it', write(found.model, example, out, dynamic_shapes=shapes))}"


def _of_any_size(example: Any) -> tuple[Any, Any]:
    """The inputs with two samples, since torch.export takes sizes 0 and 1 for constants, and which dims vary: the
    first of each tensor."""
    inputs = example if isinstance(example, tuple | Mapping) else (example,)
    doubled = tree_map_only(Tensor, lambda each: torch.cat([each, each]) if len(each) == 1 else each, inputs)
    return doubled, tree_map(lambda each: {0: torch.export.Dim.DYNAMIC} if isinstance(each, Tensor) else None, inputs)


def _compared(what: str, difference: float | None) -> str:
    if difference is None:
        return "its outputs were not compared: onnxruntime is not installed"
    return f"{what} gives the model's outputs (largest difference {difference:.1e} of the largest output)"


def product_lines(products: Sequence[Product]) -> list[str]:
    """A table of the products of an ONNX file. "(found)" is said of what the file does not promise."""
    rows = [_cells(each) for each in products]
    lines = aligned(("weight", "shape", "dtype", "product", "pattern", "density"), rows)
    other = [each.name for each in products if each.pattern and each.op not in IN_GEMM]
    if other:
        lines.append(f"not Gemm or Conv, so TensorRT takes no sparse tactic: {', '.join(other)}")
    return lines


def _cells(each: Product) -> tuple[str, ...]:
    shape = "x".join(map(str, each.shape))
    pattern = str(each.pattern or "dense") + " (found)" * (each.pattern is not None and not each.promised)
    return each.name, shape, each.dtype, each.op, pattern, f"{each.density:.3f}"


def write_dense(state: Mapping[str, Tensor], out: str) -> str:
    """Write an ordinary safetensors file, tied tensors under each of their names; what to tell about it."""
    layout = {name: (each.dtype, tuple(each.shape)) for name, each in state.items()}
    write(out, layout, state.items(), {"format": "pt"})
    return f"{out}: {len(state)} dense tensors, zeros and all, for any safetensors reader"
