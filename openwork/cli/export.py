"""The command `openwork export`: a model in the form that other software loads."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from openwork import export as to
from openwork.cli.calibrate import FORMS as FORMS_OF_CALIBRATION
from openwork.cli.calibrate import batches
from openwork.cli.source import FORMS as FORMS_OF_SOURCE
from openwork.cli.source import Source, add_arguments, open_model
from openwork.export.check import TENSORRT_SPARSE, MatMul
from openwork.export.linear import LinearAs
from openwork.export.operators import OPERATORS
from openwork.export.outputs import exportable
from openwork.files.checkpoint import load_state_dict
from openwork.files.container import write_tensors
from openwork.files.hub import is_address
from openwork.files.model_state import tensors_by_name
from openwork.training.selection import Selection
from openwork.utils.counted import counted
from openwork.utils.deployed import DEPLOYED
from openwork.utils.example import tensors_of
from openwork.utils.table import aligned
from openwork.utils.torch_private import tree_map, tree_map_only

FORMS = ("onnx", "onnxruntime", "torch", "aot", "huggingface", "dense")
_ONNX = ("opset", "input_names", "output_names", "linear", "weight_dtype", "calibrate")
_SAMPLES = 128  # to calibrate with
_BY_SUFFIX = {".onnx": "onnx", ".pt2": "torch", ".safetensors": "dense", "": "huggingface"}

_ABOUT = """\
Write a trained network in the form that other software loads.

--to dense needs the weights alone, all others the model around them. --to onnxruntime writes ONNX with operators of
openwork and compressed weights, which ONNX Runtime runs with the library that openwork brings.

"""


def export(words: Sequence[str]) -> int:
    """Runs the command; returns the exit status."""
    asked = _parser().parse_args(words)
    form = asked.to or _BY_SUFFIX.get(Path(asked.out).suffix, "")
    if (
        form
        and form not in ("onnx", "onnxruntime")
        and (given := [name for name in _ONNX if getattr(asked, name) is not None])
    ):
        raise ValueError(f"--{given[0].replace('_', '-')} is for ONNX, and {asked.out} becomes {form}; leave it out")
    if not form:
        raise ValueError(f"--out {asked.out} does not say the form by its suffix; add --to {{{','.join(FORMS)}}}")
    if form == "dense" and not asked.model and not _names_a_model(asked.source):
        _write_dense(load_state_dict(asked.source), asked.out)
        return 0
    source = open_model(asked.source, model=asked.model, shapes=asked.input, needs_input=form != "dense")
    selection = _selection(source, asked.pattern, asked.exclude)
    if form == "dense":
        _write_dense(_dense_tensors(source.model), asked.out)
    else:
        print(_written(form, source, selection, asked))
    return 0


def _names_a_model(source: str) -> bool:
    path = Path(source)
    return any((path / name).exists() for name in ("config.yaml", "config.json")) or (
        not path.exists() and not is_address(source) and (":" in source or not ("/" in source or path.suffix))
    )


def _selection(source: Source, pattern: str | None, exclude: Sequence[str]) -> Selection | None:
    if source.selection is not None or source.is_sparsified:
        source.check_recorded(pattern, exclude)
    return Selection(pattern, exclude=exclude) if pattern or exclude else source.selection


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "openwork export",
        description=f"{_ABOUT}{FORMS_OF_SOURCE}\n{FORMS_OF_CALIBRATION}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", metavar="SOURCE")
    add("--out", required=True, help="file, or folder for huggingface")
    add("--to", choices=FORMS, help="default: by the suffix of --out (.onnx, .pt2, .safetensors, none)")
    add_arguments(parser)
    add("--pattern", metavar="N:M", help="of weights that record none (default: the tightest that each has)")
    add("--exclude", nargs="+", default=(), metavar="GLOB", help="weights that are dense")
    add("--dynamic-batch", action="store_true", help="let the first dim of the input vary")
    onnx = parser.add_argument_group("for ONNX").add_argument
    onnx("--opset", type=int, metavar="VERSION", help="of ONNX's operators")
    onnx("--input-names", nargs="+", metavar="NAME", help="what the file calls its inputs, in order")
    onnx("--output-names", nargs="+", metavar="NAME", help="what the file calls its outputs, in order")
    onnx("--weight-dtype", choices=["float32", "int8"], help="of compressed weights, with --to onnxruntime (float32)")
    onnx("--calibrate", nargs="*", metavar="FILE", help="with int8: real data, so that layers hand int8 on to layers")
    onnx("--linear", choices=get_args(LinearAs), help="operator of linear layers on more than two dims (MatMul)")
    return parser


def _written(form: str, source: Source, selection: Selection | None, asked: argparse.Namespace) -> str:
    """Write the form; what to tell about it."""
    out = asked.out
    if form == "huggingface":
        return to.to_huggingface(source.model, out, pattern=selection, method=source.method)
    example, shapes = _of_any_size(source.example) if asked.dynamic_batch else (source.example, None)
    if form in ("onnx", "onnxruntime"):
        options = {name: getattr(asked, name) for name in _ONNX if getattr(asked, name) is not None}
        options["weight_dtype"] = torch.int8 if asked.weight_dtype == "int8" else torch.float32
        options["operators"] = "openwork" if form == "onnxruntime" else "standard"
        if asked.calibrate is not None:
            options["calibrate"] = _calibration(source, asked.calibrate)
        done = to.to_onnx(source.model, example, out, pattern=selection, dynamic_shapes=shapes, **options)
        lines = matmul_table(done.matmuls)
        lines += done.network.lines() if done.network else []
        lines.append(f"{out}: valid ONNX; {_compared('ONNX Runtime', done.difference)}")
        return "\n".join([*lines, *(_how_to_load(out, done.nbytes) if form == "onnxruntime" else [])])
    write = to.to_torch_export if form == "torch" else to.to_aot_inductor
    return f"{out}: {_compared('it', write(source.model, example, out, dynamic_shapes=shapes))}"


def _calibration(source: Source, named: Sequence[str]) -> list[Any]:
    """Batches in the shape of the example, which is what a graph is for."""
    first = tensors_of(source.example)[0]
    tokens = first.shape[1] if first.ndim > 1 else 1
    return batches(source, named, samples=_SAMPLES, tokens=tokens, batch=len(first), seed=0)


def _how_to_load(out: str, nbytes: int) -> list[str]:
    return [
        f"{nbytes / 1e6:.1f} MB; it needs a library, a file that may be copied to where there is no openwork:",
        "  options = onnxruntime.SessionOptions()",
        "  options.register_custom_ops_library(openwork.onnxruntime_library())",
        f"  session = onnxruntime.InferenceSession({out!r}, options)",
    ]


def _of_any_size(example: Any) -> tuple[Any, Any]:
    """The inputs with two samples, since torch.export takes sizes 0 and 1 for constants, and which dims vary: the
    first of each tensor."""
    inputs = example if isinstance(example, tuple | Mapping) else (example,)
    doubled = tree_map_only(Tensor, lambda value: torch.cat([value, value]) if len(value) == 1 else value, inputs)
    return doubled, tree_map(lambda value: {0: torch.export.Dim.DYNAMIC} if isinstance(value, Tensor) else None, inputs)


def _compared(what: str, difference: float | None) -> str:
    if difference is None:
        return "its outputs were not compared: onnxruntime is not installed"
    return f"{what} gives the model's outputs (largest difference {difference:.1e} of the largest output)"


def matmul_table(matmuls: Sequence[MatMul]) -> list[str]:
    """A table of the matmuls of an ONNX file; a pattern that the file does not record is marked "(inferred)"."""
    rows = [_cells(matmul) for matmul in matmuls]
    lines = aligned(("weight", "shape", "dtype", "operator", "pattern", "density"), rows)
    other = [each.name for each in matmuls if each.pattern and each.op not in (*TENSORRT_SPARSE, *OPERATORS)]
    if other:
        lines.append(f"not MatMul, Gemm or Conv, so TensorRT takes no sparse tactic: {', '.join(other)}")
    return lines


def _cells(matmul: MatMul) -> tuple[str, ...]:
    shape = "x".join(map(str, matmul.shape))
    pattern = str(matmul.pattern or "dense") + " (inferred)" * (matmul.pattern is not None and not matmul.recorded)
    return matmul.name, shape, matmul.dtype, matmul.op, pattern, f"{matmul.density:.3f}"


def _dense_tensors(model: nn.Module) -> Mapping[str, Tensor]:
    """By name; of a sparsified model what it multiplies by, not what it trains."""
    deployed = any(hasattr(module, DEPLOYED) for module in model.modules())
    return model.state_dict() if deployed else tensors_by_name(exportable(model))


def _write_dense(state: Mapping[str, Tensor], out: str) -> None:
    """Write an ordinary safetensors file, tied tensors under each of their names."""
    write_tensors(out, state, {"format": "pt"})
    print(f"{out}: {counted(len(state), 'dense tensor')}, zeros and all, for any safetensors reader")
