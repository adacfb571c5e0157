"""The Triton kernels in Triton's interpreter, on CPU tensors. `tests/kernels/test_triton.py` runs this folder in a
process of its own, because Triton decides when it is imported whether it interprets."""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
