"""Nothing that goes through modules and operators reads or writes memory of others, whatever changes under a call."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import openwork as ow
from openwork.inference.layers import pack_layer
from openwork.kernels.cpu import native
from openwork.layouts.layout import kind_named

STATUS = ow.kernels.status()
needs_library = pytest.mark.skipif(STATUS.isa is None, reason=str(STATUS))
P24 = ow.Pattern(2, 4)
X = torch.randn(130, 64)
IMAGES = torch.randn(2, 8, 6, 6)


def packed(kind: str = "gemm", weight_dtype: torch.dtype = torch.float32, convolves: bool = False) -> Any:
    layer = nn.Conv2d(8, 6, 3) if convolves else nn.Linear(64, 48)
    ow.project(layer, P24)
    return pack_layer(layer.eval().requires_grad_(False), P24, kind_named(kind), weight_dtype)


# --- the instruction set is changed while a layer runs ----------------------------------------------------------------


@needs_library
@pytest.mark.skipif(len(STATUS.available) < 2, reason="needs two instruction sets")
@pytest.mark.parametrize("kind", ["gemm", "gemv", "conv2d", "masks", "pickle", "pack"])
def test_calls_keep_the_instruction_set_that_they_began_with(kind: str) -> None:
    layer = packed("gemv" if kind == "gemv" else "gemm", convolves=kind == "conv2d")
    x = IMAGES if kind == "conv2d" else X
    expected = layer(x)
    weight, dense, data = torch.randn(64, 64), nn.Linear(64, 48), pickle.dumps(layer)
    ow.project(dense, P24)
    pruned = torch.ops.openwork.foreach_prune([weight], 2, 4, [1, 1, 0])[0]
    wrong: list[str] = []
    stop = threading.Event()

    def call() -> tuple[Tensor, Tensor]:
        if kind == "masks":
            return torch.ops.openwork.foreach_prune([weight], 2, 4, [1, 1, 0])[0], pruned
        if kind == "pickle":
            return pickle.loads(data).weight.detach(), layer.weight.detach()
        if kind == "pack":
            return pack_layer(dense, P24, kind_named("gemm"), torch.float32).weight.detach(), dense.weight.detach()
        return layer(x), expected

    def work() -> None:
        with torch.no_grad():
            while not stop.is_set():
                try:
                    found, right = call()
                except RuntimeError as error:
                    if "packed for vectors of another size" not in str(error):
                        wrong.append(str(error))
                    continue
                if not torch.allclose(found, right, atol=1e-4):
                    wrong.append("another result")

    threads = [threading.Thread(target=work) for _ in range(3)]
    for each in threads:
        each.start()
    try:
        for _ in range(40):
            for name in ("scalar", None):
                ow.kernels.use_isa(name)
                stop.wait(0.0005)
    finally:
        stop.set()
        for each in threads:
            each.join()
        ow.kernels.use_isa(STATUS.isa)
    assert not wrong
    assert torch.equal(layer(x), expected)


# --- offsets change where no version counter sees it ------------------------------------------------------------------

WAYS: dict[str, Callable[[Tensor], object]] = {
    "in place": lambda offsets: offsets.fill_(-2),
    "data": lambda offsets: offsets.data.fill_(-2),
    "numpy": lambda offsets: offsets.numpy().fill(-2),
    "dlpack": lambda offsets: torch.from_dlpack(offsets).fill_(-2),
    "storage": lambda offsets: offsets.untyped_storage().fill_(0xFE),
    "one of them": lambda offsets: offsets.data[-5:-4].fill_(-2),
    "aligned": lambda offsets: offsets.data[3:4].fill_(-512),
    "between rows": lambda offsets: offsets.data[3:4].fill_(4),
}


@needs_library
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("convolves", [False, True], ids=["linear", "conv2d"])
@pytest.mark.parametrize("way", WAYS)
def test_damaged_offsets_are_refused_however_they_changed(way: str, convolves: bool, weight_dtype: torch.dtype) -> None:
    layer, x = packed("gemm", weight_dtype, convolves), IMAGES if convolves else X[:5]
    layer(x)
    right = layer.packed.offsets.clone()
    WAYS[way](layer.packed.offsets)
    for _ in range(2):
        with pytest.raises(ValueError, match="offset"):
            layer(x)
    layer.packed.offsets.copy_(right)
    assert layer(x).isfinite().all()


@needs_library
def test_damaged_offsets_in_inference_mode_and_in_copies() -> None:
    with torch.inference_mode():
        layer = packed()
        layer(X)
        layer.packed.offsets.fill_(-2)
        for use in (lambda: layer(X), lambda: copy.copy(layer), lambda: copy.deepcopy(layer), lambda: layer.weight + 1):
            with pytest.raises(ValueError, match="offset"):
                use()


@needs_library
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_whatever_is_in_the_indices_of_gemv_stays_in_the_window(weight_dtype: torch.dtype, isa: str) -> None:
    layer = packed("gemv", weight_dtype)
    for value in (-1, 2**31 - 1, -(2**31)):
        layer.packed.indices.data.fill_(value)
        assert layer(X[:3]).isfinite().all()


# --- tensors without memory, or without the one that they speak of ----------------------------------------------------

OPERANDS = ["input", "values", "offsets", "bias"]


@needs_library
@pytest.mark.parametrize("kind", ["gemm", "gemv"])
@pytest.mark.parametrize("size", [0, 8], ids=["freed", "cut"])
@pytest.mark.parametrize("which", OPERANDS)
def test_memory_that_was_freed(kind: str, which: str, size: int) -> None:
    layer, x = packed(kind), X.clone()
    places = {"input": x, "values": layer.packed.values, "bias": layer.bias, "offsets": [*layer.packed.buffers()][1]}
    places[which].untyped_storage().resize_(size)
    with torch.no_grad(), pytest.raises(ValueError, match="bytes of memory, and needs"):
        layer(x)


@needs_library
@pytest.mark.parametrize("operator", ["mask", "prune", "decay", "decayed gradient", "conv2d"])
def test_memory_that_was_freed_in_other_operators(operator: str) -> None:
    weight, other = torch.randn(8, 8), torch.randn(8, 8)
    ops: Any = torch.ops.openwork
    layer, images = packed(convolves=True), IMAGES.clone()
    {"conv2d": images, "decayed gradient": other}.get(operator, weight).untyped_storage().resize_(0)
    calls: dict[str, Callable[[], object]] = {
        "mask": lambda: ops.foreach_mask([weight], 2, 4, [1, 1, 0]),
        "prune": lambda: ops.foreach_prune([weight], 2, 4, [1, 1, 0]),
        "decay": lambda: ops.foreach_decay([other], [weight], 0.1, 2, 4, [1, 1, 0]),
        "decayed gradient": lambda: ops.foreach_decay([other], [weight], 0.1, 2, 4, [1, 1, 0]),
        "conv2d": lambda: layer(images),
    }
    with torch.no_grad(), pytest.raises(ValueError, match="bytes of memory, and needs"):
        calls[operator]()


def views() -> dict[str, Tensor]:
    """Inputs of 3 x 64 that lie in memory in every way."""
    base, complex_ = torch.randn(3, 64), torch.randn(3, 64, dtype=torch.complex64)
    return {
        "expanded rows": base[:1].expand(3, 64),
        "expanded columns": base[:, :1].expand(3, 64),
        "overlapping": torch.randn(200).as_strided((3, 64), (16, 1)),
        "gaps": torch.randn(3, 128)[:, ::2],
        "flipped": base.flip(1),
        "transposed": torch.randn(64, 3).t(),
        "negative bit": complex_.conj().imag,
        "real part": complex_.real,
        "offset": torch.randn(5, 70)[2:, 6:],
        "at the end of its memory": torch.randn(3 * 64 + 1)[1:].view(3, 64),
    }


@pytest.mark.parametrize("kind", ["gemm", "gemv"])
@pytest.mark.parametrize("form", views())
def test_inputs_that_lie_in_memory_in_every_way(form: str, kind: str) -> None:
    layer, x = packed(kind), views()[form]
    plain = torch.nn.functional.linear(x.resolve_neg().contiguous(), layer.weight.detach(), layer.bias)
    torch.testing.assert_close(layer(x), plain, atol=1e-4, rtol=1e-4)
    expected = torch.ops.openwork.foreach_prune([x.resolve_neg().contiguous()], 2, 4, [1, 1, 0])[0]
    assert torch.equal(torch.ops.openwork.foreach_prune([x], 2, 4, [1, 1, 0])[0], expected)


@pytest.mark.parametrize("kind", ["gemm", "gemv"])
@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.to("meta"),
        lambda x: x.to_sparse(),
        lambda x: x.double(),
        lambda x: x.to(torch.int32),
        lambda x: x.to(torch.complex64),
        lambda x: x.half(),
        lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    ],
)
@pytest.mark.filterwarnings("ignore:torch.ao.quantization:DeprecationWarning", "ignore:.*quantize:UserWarning")
def test_inputs_that_no_kernel_reads_are_refused(make: Callable[[Tensor], Tensor], kind: str) -> None:
    layer = packed(kind)
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        layer(make(X[:3]))
    assert layer(X[:3]).isfinite().all()


def test_under_functorch_and_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    layer = packed()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert layer(mode.from_tensor(X)).shape == (130, 48)
    for function in (torch.func.vmap(layer), lambda x: torch.func.jvp(layer, (x,), (x,))):
        try:
            found = function(X[None])
        except (RuntimeError, ValueError, NotImplementedError):
            continue  # said, and nothing crashed
        found = found[0] if isinstance(found, tuple) else found
        torch.testing.assert_close(found.reshape(130, 48), layer(X), atol=1e-4, rtol=1e-4)


# --- a library that is not whole --------------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("share", [0, 0.002, 0.25, 0.75, 0.999])
def test_a_library_that_was_cut_is_not_loaded(tmp_path: Path, share: float) -> None:
    library = native._FILE.read_bytes()
    part = library[: int(len(library) * share)]
    cut = tmp_path / "cut.so"
    cut.write_bytes(part)
    assert not part or native.damage(part)
    if share == 0.75:  # one process; the others are refused by the same line
        script = (
            "import openwork.kernels.cpu.native as n; from pathlib import Path; "
            f"n._FILE = Path({str(cut)!r}); n._open.cache_clear(); print(n.native_status())"
        )
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False
        )
        assert "no native kernels: cut.so is not as it was built" in done.stdout, done.stderr


@needs_library
def test_a_library_with_a_flipped_bit_is_not_loaded() -> None:
    library = bytearray(native._FILE.read_bytes())
    assert native.damage(bytes(library)) == ""
    library[len(library) // 2] ^= 1
    assert "checksum differs" in native.damage(bytes(library))
