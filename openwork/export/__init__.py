"""A finished model in the forms that other software loads. Each form is checked before the file gets its name.

Nothing here is imported by `import openwork`: `from openwork.export import to_onnx`. ONNX needs the extra `export`.
"""

from openwork.export.check import MatMul as MatMul
from openwork.export.check import check_onnx as check_onnx
from openwork.export.huggingface import to_huggingface as to_huggingface
from openwork.export.onnx import to_onnx as to_onnx
from openwork.export.program import to_aot_inductor as to_aot_inductor
from openwork.export.program import to_torch_export as to_torch_export
