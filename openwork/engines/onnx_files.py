"""The ONNX files of a case: in float32 by torch's exporter, and in int8 by ONNX Runtime's static quantization."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from openwork.engines.case import Case, Prepared, Refused, first_line

_MOST = 1_500_000_000
"""Bytes of weights: quantizing needs the network in one file, which protobuf limits to 2 GB."""


def write_onnx(case: Case) -> Prepared:
    """Write `model.onnx` of `program.pt2`, and for int8 `int8.onnx`; where that fails, `int8.onnx.refused` says why.
    Raises Refused where the network cannot be written."""
    program = torch.export.load(case.folder / "program.pt2")
    size = sum(each.numel() * each.element_size() for each in program.state_dict.values())
    try:
        torch.onnx.export(program, f=case.folder / "model.onnx", dynamo=True, external_data=size > _MOST, verbose=False)
    except Exception as error:  # operators that the exporter does not know
        raise Refused(f"torch.onnx.export does not take the network ({first_line(error)})") from error
    if case.precision == "int8":
        try:
            _write_int8(case, size)
        except Exception as error:  # the float32 file is good all the same
            reason = str(error) if isinstance(error, Refused) else first_line(error)
            (case.folder / "int8.onnx.refused").write_text(f"int8: {reason}")
    return Prepared({})


def _write_int8(case: Case, size: int) -> None:
    """Weights per output channel, activations by the range that calibration shows, in the form that both engines read
    (QDQ). Additions between convolutions are quantized, so that what flows between them stays int8; between linear
    layers they stay float32, with the normalizations around them."""
    if size > _MOST:
        raise Refused(f"{size / 1e9:.1f} GB of weights do not fit the one file that quantization needs")
    try:
        import onnx
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process
    except ImportError as error:
        raise Refused("quantizing needs ONNX Runtime: pip install onnxruntime") from error
    prepared = case.folder / "prepared.onnx"
    quant_pre_process(str(case.folder / "model.onnx"), str(prepared), skip_symbolic_shape=True)
    graph = onnx.load(str(prepared), load_external_data=False).graph
    kinds = [node.op_type for node in graph.node]
    convolutions, products = kinds.count("Conv"), kinds.count("MatMul") + kinds.count("Gemm")
    quantize_static(
        str(prepared),
        str(case.folder / "int8.onnx"),
        _Calibration([value.name for value in graph.input], torch.load(case.folder / "calibration.pt")),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["Conv", "MatMul", "Gemm", *(["Add"] if convolutions > products else [])],
        extra_options={"MatMulConstBOnly": True},
    )


class _Calibration:
    """ONNX Runtime's CalibrationDataReader, which is told by its method alone."""

    def __init__(self, names: list[str], batches: list[list[torch.Tensor]]):
        feeds = [dict(zip(names, (each.numpy() for each in batch), strict=True)) for batch in batches]
        self.feeds: Iterator[dict[str, Any]] = iter(feeds)

    def get_next(self) -> dict[str, Any] | None:
        return next(self.feeds, None)
