"""OpenVINO and ONNX Runtime, on the ONNX file of a network: shapes fixed to the example's, which suits both best."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from openwork.engines.case import Case, Prepared, Refused, first_line
from openwork.engines.engine import ENGINES
from openwork.engines.onnx_files import write_onnx


def openvino(case: Case) -> Prepared:
    """OpenVINO for latency, one stream. The precision is set, else it takes bfloat16 by itself where a processor has
    it; int8 is the quantized file, and what is not quantized in it float32."""
    import openvino as library

    core = library.Core()
    if case.precision == "bfloat16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise Refused("OpenVINO has no bfloat16 on this processor")
    settings = {
        "INFERENCE_NUM_THREADS": case.threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16" if case.precision == "bfloat16" else "f32",
    }
    request = core.compile_model(str(_file(case)), "CPU", settings).create_infer_request()
    feed = dict(enumerate(case.inputs()))
    return Prepared({"": lambda: list(request.infer(feed).values())}, f"OpenVINO {version('openvino')}")


def onnxruntime(case: Case) -> Prepared:
    """ONNX Runtime on its own CPU kernels, with all of its rewriting of the graph."""
    import onnxruntime as library

    options = library.SessionOptions()
    options.intra_op_num_threads = case.threads
    session = library.InferenceSession(str(_file(case)), options, providers=["CPUExecutionProvider"])
    feed = dict(zip((each.name for each in session.get_inputs()), case.inputs(), strict=True))
    return Prepared({"": lambda: session.run(None, feed)}, f"ONNX Runtime {version('onnxruntime')}")


def installed(case: Case) -> Prepared:
    """Both, as far as they are installed, in one process: by name and precision, which is float32 where an engine lacks
    the one asked for. `about["left out"]` has the others, and why. Writes the ONNX file first."""
    write_onnx(case)
    calls, versions, left_out = {}, [], {}
    for engine in (each for each in ENGINES if each.reads_onnx):
        if reason := engine.missing():
            left_out[engine.name] = reason
            continue
        function = {"OpenVINO": openvino, "ONNX Runtime": onnxruntime}[engine.name]
        for precision in dict.fromkeys((case.precision, "float32")):
            if precision not in engine.precisions:
                continue
            try:
                made = function(Case(case.folder, precision, case.threads))
            except Exception as error:  # a network that an engine does not read is no fault of deploying
                left_out[engine.name] = str(error) if isinstance(error, Refused) else first_line(error)
                continue
            calls[f"{made.version}, {precision}"] = made.calls[""]
            versions.append(made.version)
            left_out.pop(engine.name, None)
            break
    return Prepared(calls, ", ".join(versions), {"left out": left_out})


def _file(case: Case) -> Path:
    file = case.folder / ("int8.onnx" if case.precision == "int8" else "model.onnx")
    if not file.exists():
        reason: Any = case.folder / f"{file.name}.refused"
        raise Refused(reason.read_text() if reason.exists() else f"there is no {file.name}")
    return file
