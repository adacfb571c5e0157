"""The command `openwork verify`: whether files and models are as sparse as they, or you, say."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

from openwork.cli.inspect import file_table
from openwork.cli.source import FORMS, add_arguments, check_finished, open_model
from openwork.files.checkpoint import check
from openwork.files.hub import is_address, local
from openwork.files.plain import opened_plain, plain_files
from openwork.files.reader import FILE, opened
from openwork.files.weight_patterns import WeightPattern, weight_patterns
from openwork.nm.pattern import Pattern
from openwork.training.selection import Selection
from openwork.utils.counted import counted
from openwork.utils.table import aligned

_ABOUT = f"""\
Check a file or a model, as sparse as it says; exit status 0 where all holds.

  a compressed file or a folder with one: reads all of it and checks every group of every weight; with --pattern holds
    every weight to it besides
  any other safetensors file, or a Hugging Face folder (with an index, too): which N:M its weights keep and along which
    axis, read one weight at a time; with --pattern the exit status is 1 if a weight does not keep it
  an ONNX file: every GEMM and convolution by a constant, quantized or not, held to what the file records, or to
    --pattern; a dense one that nothing declares, or an unknown operator with a constant, is status 1 or 2
  a model (package.module:factory, or what else is named below, together with --input): every product of a weight, a
    buffer or another constant; a dense one that nothing declares is status 2

{FORMS}"""


def verify(words: Sequence[str]) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        "openwork verify", description=_ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("--pattern", metavar="N:M", help="hold weights to it; by default to what the source records")
    parser.add_argument("--include", nargs="+", default=(), metavar="GLOB", help="only these weights (of files)")
    parser.add_argument("--exclude", nargs="+", default=(), metavar="GLOB", help="weights that --pattern leaves alone")
    parser.add_argument(
        "--allow-dense",
        nargs="+",
        default=(),
        metavar="GLOB",
        help="weights, buffers and modules whose products may be dense though nothing says so (models, ONNX)",
    )
    add_arguments(parser)
    asked = parser.parse_args(words)
    pattern = Pattern.parse(asked.pattern) if asked.pattern else None
    if asked.source.endswith(".onnx"):
        with local(asked.source) if is_address(asked.source) else nullcontext(asked.source) as path:
            return _verify_onnx(os.fspath(path), pattern, asked.exclude, asked.allow_dense)
    is_factory = ":" in asked.source and not is_address(asked.source) and not Path(asked.source).exists()
    if asked.input or asked.model or is_factory:
        return _verify_model(asked, pattern)
    with local(asked.source) as path:
        return _verify_weights(Path(path), pattern, asked.include, asked.exclude)


def _verify_weights(path: Path, pattern: Pattern | None, include: Sequence[str], exclude: Sequence[str]) -> int:
    """The compressed file, the ordinary ones, or both where a folder has both."""
    check_finished(path)
    has_compressed = path.is_dir() and (path / FILE).exists()
    plain = plain_files(path)
    status = 0
    if has_compressed or not plain:
        entries = check(path)
        print("the file is intact: every group holds what it records")
        if pattern or include or exclude:
            with opened(path) as contents:
                weights = weight_patterns(contents, pattern, include, exclude)
            status = _report(weights, pattern, {entry.name: entry.pattern for entry in entries})
        else:
            print(file_table(entries))
    if plain:
        with opened_plain(path) as contents:
            weights = weight_patterns(contents, pattern, include, exclude)
        status = max(status, _report(weights, pattern))
    return status


def _report(
    weights: Sequence[WeightPattern], pattern: Pattern | None, recorded: Mapping[str, Pattern | None] | None = None
) -> int:
    """Print how each weight is, and what a compressed file `recorded` of those that are not; the exit status."""
    weights = sorted(weights, key=lambda weight: not weight.axes)  # the sparse ones first
    print("\n".join(aligned(("weight", "shape", "dtype", "pattern", "along"), [_cells(weight) for weight in weights])))
    keeping = [weight for weight in weights if weight.axes]
    counts = Counter(f"{weight.pattern} along {' and '.join(weight.axes)}" for weight in keeping)
    listed = "".join(f"; {text}: {count}" for text, count in counts.most_common())
    is_one = len(keeping) == 1
    holds = f"{'is' if is_one else 'are'} {pattern}" if pattern else f"{'has' if is_one else 'have'} a pattern"
    print(f"{len(keeping)} of {counted(len(weights), 'weight')} {holds}{listed}")
    if not pattern:
        return 0
    dense = [weight.name for weight in weights if not weight.axes and weight.divisible]
    skipped = [weight.name for weight in weights if not weight.axes and not weight.divisible]
    if skipped:
        print(f"not held to {pattern}, which does not divide them: {', '.join(skipped)}")
    if dense:
        print(f"not {pattern}: {', '.join(name + _recorded(name, recorded or {}) for name in dense)}")
        return 1
    print(f"verified: {pattern}" if keeping else f"no weight can be {pattern}")
    return 0 if keeping else 1


def _recorded(name: str, recorded: Mapping[str, Pattern | None]) -> str:
    if name not in recorded:
        return ""
    pattern, module = recorded[name], name.rpartition(".")[0] or name
    return f" (recorded as {pattern})" if pattern else f" (recorded as dense; --exclude {module})"


def _cells(weight: WeightPattern) -> tuple[str, ...]:
    shape, dtype = "x".join(map(str, weight.shape)), str(weight.dtype).removeprefix("torch.")
    pattern = str(weight.pattern) if weight.axes else "-"
    return weight.name, shape, dtype, pattern, ", ".join(weight.axes) or weight.problem


def _verify_model(asked: argparse.Namespace, pattern: Pattern | None) -> int:
    from openwork.training.verify import verify as verify_model

    source = open_model(asked.source, model=asked.model, shapes=asked.input)
    selection: Selection | None = Selection(pattern, exclude=asked.exclude)
    if source.is_sparsified or (source.selection is not None and not pattern):
        source.check_recorded(asked.pattern, asked.exclude)
        selection = source.selection
    print(verify_model(source.model, source.example, pattern=selection, allow_dense=asked.allow_dense))
    return 0


def _verify_onnx(file: str, pattern: Pattern | None, exclude: Sequence[str], allow_dense: Sequence[str]) -> int:
    from openwork.cli.export import matmul_table
    from openwork.export.check import check_onnx

    matmuls = check_onnx(file, Selection(pattern, exclude=exclude), allow_dense=allow_dense)
    print("\n".join(matmul_table(matmuls)))
    if not matmuls:
        print("nothing verified: the file has no matmul or convolution by a constant")
        return 1
    held = sum(matmul.recorded for matmul in matmuls)
    print(
        f"verified: {held} of {counted(len(matmuls), 'matmul')} held to what was {'asked' if pattern else 'recorded'}"
    )
    dense = [f"{each.name} ({each.reason})" for each in matmuls if not each.recorded and each.reason]
    if dense:
        print(f"not held, and dense or denser: {', '.join(dense)}")
    if 0 < held < len(matmuls) and any(each.pattern and not each.recorded for each in matmuls) and not pattern:
        print("(inferred): from the weights; the file records none (the exporter renames those of LSTM, GRU, RNN)")
    if not held:
        print("the file records nothing, so the patterns above are inferred from the weights: give --pattern N:M")
    undeclared = [each.name for each in matmuls if not each.pattern and not each.reason]
    if undeclared:
        print(f"dense, and nothing says that they may be (--allow-dense): {', '.join(undeclared)}")
    return 1 if undeclared else 0
