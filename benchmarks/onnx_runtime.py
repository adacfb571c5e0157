"""Measure ONNX Runtime with our kernels beside what else runs a network on a CPU: docs/deploy/onnxruntime.md.

    python benchmarks/onnx_runtime.py prepare          # files, once: minutes, on a machine as busy as you like
    python benchmarks/onnx_runtime.py run --name xeon  # about a minute a row, on a quiet machine
    python benchmarks/onnx_runtime_table.py            # pip install onnxruntime openvino onnx onnxscript transformers

A row is a network, a pattern and a precision. Each way to run it is a process of its own, and they take turns. Rows are
kept in benchmarks/results/onnxruntime-NAME.csv as they are done, and `run` goes on where it was stopped; a row that
fails is told, and left out. The trained network is that of docs/pretrained.md: `--packages` and `--pruned` are
`--packages` and `--out` of benchmarks/pretrained/sentences.py. It has no file at 1:8: there it is the one at 1:4,
pruned by magnitude once more.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from onnx_runtime_start import IN_ONNX_RUNTIME, IN_TORCH, first_output
from onnx_runtime_table import DENSE, DEPLOYED, NETWORKS, OURS, PATTERNS, PRECISIONS, RESULTS
from torch import Tensor, nn

import openwork as ow
from openwork.bench.measure import quantile
from openwork.bench.models import BertLayers
from openwork.engines.case import Case, Prepared, Refused, write_module, write_program
from openwork.engines.worker import Worker, in_rounds, medians
from openwork.export import to_onnx
from openwork.inference.fold import fold_batch_norm
from openwork.utils.hardware import cpu_model
from openwork.utils.torchvision_compat import prepare_torchvision

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks" / "pretrained"))  # of this process and of its workers
ROUNDS = 7


@dataclass(frozen=True)
class Row:
    network: str
    pattern: str
    precision: str

    def __str__(self) -> str:
        return f"{self.network} {self.pattern} {self.precision}"


ROWS = [
    Row(network, pattern, precision)
    for pattern in PATTERNS
    for precision in PRECISIONS
    for network in ("bert", "resnet50", "minilm")
]


# --- networks --------------------------------------------------------------------------------------------------------


def dense_of(network: str, asked: argparse.Namespace) -> tuple[nn.Module, Any]:
    """The dense network and what it is given."""
    prepare_torchvision()
    torch.manual_seed(0)
    if network == "bert":
        return BertLayers().eval(), torch.randn(1, 128, 768)
    if network == "resnet50":
        from torchvision.models import resnet50

        return resnet50().eval(), torch.randn(1, 3, 224, 224)
    from sentences import Encoder

    tokens = torch.randint(1000, 20000, (16, 32))
    example: dict[str, Tensor] = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return Encoder(asked.packages).eval(), example


def sparse_of(network: str, pattern: str, asked: argparse.Namespace) -> nn.Module:
    """The network at a pattern: as trained where there is such a file, else pruned by magnitude."""
    model = dense_of(network, asked)[0]
    if network == "minilm":
        trained = {"2:4": "2of4-sparsegpt-seed0"}.get(pattern, "1of4-long-seed0")
        model = ow.load(asked.pruned / f"{trained}.safetensors", model).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # which layers do not take the pattern
        ow.project(model, selection(network, pattern))
    return model


def selection(network: str, pattern: str) -> ow.Selection:
    return ow.Selection(pattern, exclude=["transformer.embeddings*"] if network == "minilm" else [])


# --- files -----------------------------------------------------------------------------------------------------------


def folder_of(row: Row, asked: argparse.Namespace) -> Path:
    return asked.folder / row.network / row.pattern.replace(":", "of")


def file_of(folder: Path, precision: str) -> Path:
    """The sparse network for ONNX Runtime; in int8 from layer to layer."""
    return folder / ("int8-network.onnx" if precision == "int8" else f"{precision}.onnx")


def prepare(row: Row, asked: argparse.Namespace) -> None:
    """Write the files of a row, as far as they are not there: the dense network for the engines of others, the sparse
    one as a module, and for ONNX Runtime with our operators."""
    dense, sparse = asked.folder / row.network, folder_of(row, asked)
    sparse.mkdir(parents=True, exist_ok=True)
    if not (dense / "done").exists():
        model, example = dense_of(row.network, asked)
        fold_batch_norm(model, example)
        write_module(dense, model, example)
        write_program(dense, model, example)
        Worker("openwork.engines.onnx_files:write_onnx", Case(dense, "int8", asked.threads)).close()
        (dense / "done").touch()
    file = file_of(sparse, row.precision)
    if not file.exists():
        model, example = sparse_of(row.network, row.pattern, asked), dense_of(row.network, asked)[1]
        write_module(sparse, model, example)
        given = list(example.values()) if isinstance(example, Mapping) else [example]
        torch.save(given, sparse / "inputs.pt")
        options: dict[str, Any] = {"operators": "openwork", "pattern": selection(row.network, row.pattern)}
        options |= {"calibrate": [example]} if row.precision == "int8" else {}  # as `deployed` does
        done = to_onnx(model, example, file, weight_dtype=getattr(torch, row.precision), **options)
        print(f"{row}: {file.name} {done.nbytes / 1e6:.1f} MB, difference {done.difference}", flush=True)


def ours(case: Case) -> Prepared:
    """ONNX Runtime with our operators: what a worker calls."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = case.threads
    options.register_custom_ops_library(ow.onnxruntime_library())
    file = str(file_of(case.folder, case.precision))
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    feed = dict(zip((each.name for each in session.get_inputs()), case.inputs(), strict=True))
    return Prepared({"": lambda: session.run(None, feed)}, f"ONNX Runtime {onnxruntime.__version__}")


def first_outputs(row: Row, asked: argparse.Namespace) -> dict[str, float]:
    """Seconds from the start of a process to its first output."""
    import numpy as np

    dense, sparse = asked.folder / row.network, folder_of(row, asked)
    np.savez(sparse / "inputs.npz", **{str(i): x.numpy() for i, x in enumerate(torch.load(sparse / "inputs.pt"))})
    threads, inputs = str(asked.threads), str(sparse / "inputs.npz")
    file = dense / ("int8.onnx" if row.precision == "int8" else "model.onnx")
    commands = {
        OURS: [IN_ONNX_RUNTIME, str(file_of(sparse, row.precision)), inputs, threads, ow.onnxruntime_library()],
        DENSE[0]: [IN_ONNX_RUNTIME, str(file), inputs, threads],
        DEPLOYED: [IN_TORCH, str(sparse / "deployed.pt"), threads],
    }
    return {way: first_output(f"{row}, {way}", words, 1 if way == DEPLOYED else 3) for way, words in commands.items()}


# --- a row -----------------------------------------------------------------------------------------------------------


def prepare_all(asked: argparse.Namespace) -> None:
    for row in ROWS:
        if row.network in asked.networks:
            attempt(row, prepare, asked)


def attempt(row: Row, do: Callable[[Row, argparse.Namespace], Any], asked: argparse.Namespace) -> Any:
    """What `do` gives; None where it fails, which is told: the other rows are as good as before."""
    try:
        return do(row, asked)
    except Exception as error:
        print(f"{row}: {type(error).__name__}: {error}", flush=True)
        return None


def measured(row: Row, asked: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One line of the file for each way to run the row."""
    dense, sparse, threads = asked.folder / row.network, folder_of(row, asked), asked.threads
    options = {"pattern": row.pattern, "compiled": True, "keep": True}
    cases = {
        OURS: (f"{Path(__file__).stem}:ours", Case(sparse, row.precision, threads)),
        DENSE[0]: ("openwork.engines.onnx_engines:onnxruntime", Case(dense, row.precision, threads)),
        DENSE[1]: ("openwork.engines.onnx_engines:openvino", Case(dense, row.precision, threads)),
        DEPLOYED: ("openwork.bench.deployed:deployed", Case(sparse, row.precision, threads, options)),
    }
    with ExitStack() as stack:
        started = {way: _worker(f"{row}, {way}", *each, stack) for way, each in cases.items()}
        workers = {way: worker for way, worker in started.items() if worker}
        calls = {way: "compiled" if way == DEPLOYED else "" for way in workers}
        turns: dict[str, Callable[[float], list[float]]] = {
            way: partial(worker.turn, calls[way]) for way, worker in workers.items()
        }
        times = in_rounds(turns, asked.seconds, ROUNDS)
        middle = medians(times)
        fastest = min((way for way in DENSE if way in middle), key=lambda way: middle[way])
        first = first_outputs(row, asked)
        for way, worker in workers.items():
            runs = [1e3 * run for each in times[way] for run in each]
            ratios = [quantile(a, 0.5) / quantile(b, 0.5) for a, b in zip(times[fastest], times[way], strict=True)]
            yield {
                **vars(row),
                "way": way,
                **{f"p{p}_ms": f"{quantile(runs, p / 100):.3f}" for p in (20, 50, 80)},
                **{f"ratio_p{p}": f"{quantile(ratios, p / 100):.3f}" for p in (20, 50, 80)},
                "difference": f"{worker.difference[calls[way]]:.2g}",
                "file_bytes": _bytes(way, row, asked),
                "first_s": f"{first.get(way, float('nan')):.2f}",
                "threads": threads,
                "software": worker.version + (f", torch {torch.__version__}" if way == DEPLOYED else ""),
                "note": "ow.deploy returned dense" if worker.about.get("returned") == "dense" else "",
                "machine": cpu_model(),
                "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            }


def _worker(what: str, target: str, case: Case, stack: ExitStack) -> Worker | None:
    try:
        return stack.enter_context(Worker(target, case, 900))
    except Refused as refusal:
        print(f"{what}: {refusal}", flush=True)
        return None


def _bytes(way: str, row: Row, asked: argparse.Namespace) -> int:
    files = {
        OURS: file_of(folder_of(row, asked), row.precision),
        DENSE[0]: asked.folder / row.network / ("int8.onnx" if row.precision == "int8" else "model.onnx"),
    }
    return files[way].stat().st_size if way in files else 0


def run(asked: argparse.Namespace) -> None:
    """Measure what the file does not have yet, and keep it row by row."""
    target, start = RESULTS / f"onnxruntime-{asked.name}.csv", time.monotonic()
    lines = list(csv.DictReader(target.open(newline=""))) if target.exists() else []
    known = {(line["network"], line["pattern"], line["precision"]) for line in lines}
    for row in ROWS:
        spent = (time.monotonic() - start) / 60
        if (row.network, row.pattern, row.precision) in known or row.network not in asked.networks:
            continue
        if spent > asked.minutes:
            print(f"left for the next run after {spent:.0f} minutes: {row}", flush=True)
            continue
        print(f"{spent:.1f} minutes: {row}", flush=True)
        lines += attempt(row, lambda row, asked: [prepare(row, asked), *measured(row, asked)][1:], asked) or []
        if not lines:
            continue
        with target.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for command, do in (("prepare", prepare_all), ("run", run)):
        parsing = commands.add_parser(command)
        parsing.set_defaults(do=do)
        add = parsing.add_argument
        add("--folder", type=Path, default=ROOT / "build" / "onnx_runtime", help="where the files are kept")
        add("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
        add("--packages", type=Path, default=Path("packages"), help="of the trained network")
        add("--pruned", type=Path, default=Path("out"), help="its pruned files")
        add("--threads", type=int, default=1)
        if command == "run":
            add("--name", required=True, help="of the machine, in the name of the file")
            add("--minutes", type=float, default=20.0, help="after which no row begins")
            add("--seconds", type=float, default=4.0, help="for each way to run a row")
    asked = parser.parse_args(words)
    torch.set_num_threads(asked.threads)
    asked.do(asked)


if __name__ == "__main__":
    main()
