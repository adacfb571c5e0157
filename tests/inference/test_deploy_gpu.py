"""Deployment on a GPU, as far as a machine without one can test it: what is taken, shapes, padding, states, choices.

cuSPARSELt itself cannot run here. In its place stands a backend in plain torch that keeps its rules: multiples that
shapes must have, one opaque tensor for the packed weight, nothing but two of four kept. CUTLASS's format has converters
in plain torch, so it is the real one.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import io
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

import openwork as ow
from openwork.inference import choose
from openwork.inference.layers import PackedLayer, pack_layer
from openwork.kernels.cuda import algorithm_cache, cusparselt
from openwork.kernels.cuda.cusparselt import BACKENDS, Backend
from openwork.layouts.layout import KINDS, kinds_on
from openwork.nm.groups import Axis
from openwork.nm.masks import apply_mask, magnitude_mask
from openwork.nm.pattern import within_2_4
from openwork.nm.quantize import quantize

deploy = sys.modules["openwork.inference.deploy"]  # the name `openwork.inference.deploy` is the function
SEARCHES: list[tuple[int, int]] = []


def plain_pack(weight: Tensor) -> tuple[Tensor, None]:
    """Values and positions of two of each four, in one tensor of the weight's dtype."""
    assert all(size % unit == 0 for size, unit in zip(weight.shape, PLAIN.units[weight.dtype][:2], strict=True))
    keep = magnitude_mask(weight.float().abs(), ow.Pattern(2, 4), Axis(1))
    index = (torch.arange(weight.shape[1]) % 4).expand_as(keep)[keep]
    return torch.cat([weight.float()[keep], index.float()]).to(weight.dtype), None


def plain_weight(packed: Tensor, outputs: int) -> Tensor:
    values, index = packed.double().chunk(2)
    dense = torch.zeros(outputs, len(values) // outputs // 2, 4, dtype=torch.float64)
    return dense.scatter_(2, index.long().view(outputs, -1, 2), values.view(outputs, -1, 2)).flatten(1)


def plain_product(x: Tensor, packed: Tensor, _: None, bias: Any, outputs: int, algorithm: int, out: Any) -> Tensor:
    assert x.is_contiguous()
    assert len(x) % 8 == 0
    y = F.linear(x.double(), plain_weight(packed, outputs), None if bias is None else bias.double())
    return y.to(out)


SEARCHED = (7, 2, 1)


def plain_search(x: Tensor, packed: Tensor, *_: Any) -> cusparselt.Algorithm:
    SEARCHES.append((len(x), x.shape[1]))
    return SEARCHED


PLAIN = Backend(
    BACKENDS["cusparselt"].units, plain_pack, plain_product, plain_search, lambda _: "", lambda: "plain torch"
)


def cutlass_product(x: Tensor, packed: Tensor, meta: Tensor, bias: Any, outputs: int, _: int, out: Any) -> Tensor:
    weight = sparse_semi_structured_to_dense_cutlass(packed, meta)
    return F.linear(x.double(), weight.double(), None if bias is None else bias.double()).to(out)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: Any, tmp_path: Path) -> None:
    """CPU tensors take the kernels of a GPU, and the file of algorithms is a new one."""
    real = BACKENDS["cutlass"]
    cutlass = dataclasses.replace(real, product=cutlass_product, missing=lambda _: "")
    monkeypatch.setattr(cusparselt, "BACKENDS", {"cusparselt": PLAIN, "cutlass": cutlass})
    for module in (choose, deploy):
        monkeypatch.setattr(module, "kinds_on", lambda device_type: kinds_on("cuda"))
    monkeypatch.setenv("OPENWORK_CACHE", str(tmp_path))
    SEARCHES.clear()


def sparse(layer: Any, pattern: str = "2:4", dtype: torch.dtype = torch.bfloat16) -> Any:
    layer = layer.to(dtype).eval().requires_grad_(False)
    axis = Axis(1)
    keep = magnitude_mask(layer.weight.abs(), ow.Pattern.parse(pattern), axis)
    layer.weight.data = apply_mask(layer.weight.data, keep)
    return layer


def packed(layer: Any, kind: str = "cusparselt", weight_dtype: torch.dtype = torch.bfloat16) -> Any:
    return pack_layer(layer, ow.Pattern(2, 4), KINDS[kind], weight_dtype)


def close(found: Tensor, expected: Tensor, tolerance: float = 0.02) -> bool:
    error = (found.double() - expected.double()).norm()
    return found.shape == expected.shape and bool(error <= tolerance * expected.double().norm())


# --- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cusparselt", "cutlass", "skinny_gather", "skinny_expand"])
@pytest.mark.parametrize(("inputs", "outputs", "bias"), [(64, 32, True), (52, 17, True), (128, 40, False)])
@pytest.mark.parametrize("rows", [(1,), (3, 5), (16,), ()])
def test_a_linear_layer(kind: Any, inputs: int, outputs: int, bias: bool, rows: Any) -> None:
    layer = sparse(nn.Linear(inputs, outputs, bias=bias))
    made = packed(layer, kind)
    x = torch.randn(*rows, inputs).bfloat16()
    assert close(made(x), layer(x))
    assert torch.equal(made.weight, layer.weight)
    made.relu = True
    assert close(made(x), layer(x).relu())


CONVS = {
    "one pixel": nn.Conv2d(8, 16, 1),
    "one pixel, in steps": nn.Conv2d(8, 20, 1, stride=2, bias=False),
    "three": nn.Conv2d(8, 16, 3, padding=1),
    "three, in steps": nn.Conv2d(12, 16, 3, stride=2, padding=(1, 0), dilation=(1, 2)),
    "six channels": nn.Conv2d(6, 16, 3, padding="same"),
    "one dim": nn.Conv1d(8, 16, 3, padding=1),
}


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("last", [False, True])
def test_a_convolution(name: str, last: bool) -> None:
    conv = sparse(copy.deepcopy(CONVS[name]))
    made = packed(conv)
    x = torch.randn(2, conv.in_channels, *([9] * len(conv.kernel_size))).bfloat16()
    x = x.to(memory_format=torch.channels_last) if last and x.ndim == 4 else x
    assert close(made(x), conv(x))
    assert close(made(x[0]), conv(x[0]))
    assert torch.equal(made.weight, conv.weight)


def test_one_pixel_of_images_with_channels_last_is_not_copied() -> None:
    made = packed(sparse(nn.Conv2d(16, 16, 1)))
    x = torch.randn(2, 16, 5, 5).bfloat16().to(memory_format=torch.channels_last)
    assert made.packed._rows(x, made.form.conv).data_ptr() == x.data_ptr()
    assert made(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("weight_dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantized(weight_dtype: torch.dtype) -> None:
    layer = sparse(nn.Linear(96, 40))
    made, x = packed(layer, weight_dtype=weight_dtype), torch.randn(5, 96).bfloat16()
    assert close(made(x), layer(x), 0.02 if weight_dtype == torch.int8 else 0.06)
    assert close(made.weight, layer.weight, 0.02 if weight_dtype == torch.int8 else 0.04)
    assert torch.equal(made.weight == 0, layer.weight == 0)


def test_float32_is_stored_in_bfloat16_where_asked() -> None:
    layer = sparse(nn.Linear(64, 32), dtype=torch.float32)
    made, x = packed(layer), torch.randn(4, 64)
    assert made(x).dtype == torch.float32
    assert close(made(x), layer(x))


def test_a_library_that_packs_wrongly_is_found(monkeypatch: Any) -> None:
    wrong = dataclasses.replace(PLAIN, pack=lambda weight: plain_pack(weight.flip(1)))
    monkeypatch.setattr(cusparselt, "BACKENDS", {"cusparselt": wrong})
    with pytest.raises(RuntimeError, match=r"plain torch packs \d+ of 2048 weights \(32, 64\) wrongly"):
        packed(sparse(nn.Linear(64, 32)))


# --- what is kept ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cusparselt", "cutlass", "skinny_gather"])
def test_states_hold_the_dense_weight_and_nothing_packed(kind: Any) -> None:
    layer = sparse(nn.Linear(64, 32))
    made = packed(layer, kind)
    state = made.state_dict()
    assert list(state) == ["weight", "bias"]
    assert all(torch.equal(state[name], each) for name, each in layer.state_dict().items())
    other = sparse(nn.Linear(64, 32))
    made.load_state_dict(other.state_dict())
    x = torch.randn(4, 64).bfloat16()
    assert close(made(x), other(x))


def test_a_state_that_is_not_sparse_is_refused() -> None:
    made = packed(sparse(nn.Linear(64, 32)))
    with pytest.raises((ValueError, RuntimeError), match=r"groups hold more than 2 of 4 .*: sparse tensor cores"):
        made.load_state_dict(nn.Linear(64, 32).state_dict())


@pytest.mark.parametrize("how", ["pickle", "torch.save", "deepcopy"])
def test_copies_pack_again(how: str, monkeypatch: Any) -> None:
    made = packed(sparse(nn.Linear(64, 32)))
    x = torch.randn(4, 64).bfloat16()
    made.search(x)
    packs = []
    counting = dataclasses.replace(PLAIN, pack=lambda weight: packs.append(1) or plain_pack(weight))
    if how == "deepcopy":
        monkeypatch.setattr(cusparselt, "BACKENDS", {"cusparselt": counting})
        again = copy.deepcopy(made)
    else:
        data = pickle.dumps(made) if how == "pickle" else _saved(made)
        assert made.packed.__getstate__()["_buffers"].keys() == {"scales", "kernel_bias"}
        monkeypatch.setattr(cusparselt, "BACKENDS", {"cusparselt": counting})
        again = pickle.loads(data) if how == "pickle" else torch.load(io.BytesIO(data), weights_only=False)
    assert packs == [1]
    assert torch.equal(again(x), made(x))
    assert again.packed.algorithms == {4: SEARCHED}


def _saved(made: nn.Module) -> bytes:
    file = io.BytesIO()
    torch.save(made, file)
    return file.getvalue()


def test_moves_and_casts_are_refused() -> None:
    made = packed(sparse(nn.Linear(64, 32)))
    for move in (lambda: made.to(torch.float16), lambda: made.to("meta")):
        with pytest.raises(
            TypeError, match=r"packed for cpu in torch.bfloat16: convert or move the model, then deploy"
        ):
            move()
    assert made.to("cpu") is made


# --- what is taken ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "weight_dtype", "reason"),
    [
        ("2:4", torch.bfloat16, ""),
        ("1:4", torch.bfloat16, ""),
        ("1:2", torch.bfloat16, ""),
        ("4:8", torch.bfloat16, "groups hold more than 2 of 4 (the worst 4): sparse tensor cores multiply 2:4"),
        ("2:4", torch.float32, "no sparse product of torch.float32"),
    ],
)
def test_what_sparse_tensor_cores_take(pattern: str, weight_dtype: torch.dtype, reason: str) -> None:
    weight = sparse(nn.Linear(64, 32), pattern).weight
    found = cusparselt.backend_refusal("cusparselt", weight_dtype, weight.device) or cusparselt.weight_refusal(weight)
    assert reason in found if reason else found == ""


def test_numbers_that_are_not_finite_are_not_packed() -> None:
    weight = sparse(nn.Linear(64, 32)).weight
    weight[0, int(weight[0].abs().argmax())] = torch.nan
    assert "not finite" in cusparselt.weight_refusal(weight)


def test_the_real_backends_are_missing_here() -> None:
    for backend in BACKENDS.values():
        assert backend.missing(torch.device("cpu"))


# --- the plan --------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act = nn.Conv2d(4, 16, 3, padding=1), nn.ReLU()
        self.mix, self.grouped = nn.Conv2d(16, 32, 1), nn.Conv2d(32, 32, 3, groups=2, padding=1)
        self.first, self.last = nn.Linear(32, 64), nn.Linear(64, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.mix(self.act(self.stem(x)))).mean((2, 3))
        return self.last(self.first(x).relu())


def net(pattern: str = "2:4") -> nn.Module:
    torch.manual_seed(0)
    made = Net().eval()
    ow.project(made, pattern, exclude=["stem"] if pattern == "4:8" else [])
    return made.bfloat16().requires_grad_(False)


def clock(monkeypatch: Any, **times: float) -> None:
    """Every variant takes a second, but for those named."""
    monkeypatch.setattr(choose, "clock", lambda _: lambda variants: {n: times.get(n, 1.0) for n in variants})
    whole = {"sparse": 0.5}
    monkeypatch.setattr(deploy, "fastest", lambda variants, seconds: {n: whole.get(n, 1.0) for n in variants})


def test_a_plan_takes_what_was_fastest(monkeypatch: Any) -> None:
    clock(monkeypatch, cusparselt=0.5, cutlass=0.6, skinny_gather=0.4)
    plan = ow.plan(net(), torch.randn(2, 4, 8, 8).bfloat16(), pattern="2:4")
    kinds = {each.name: (each.kind, each.reason) for each in plan.layers}
    assert kinds["stem.weight"] == ("cusparselt", "")
    assert kinds["mix.weight"] == ("cusparselt", "")
    assert kinds["first.weight"] == ("skinny_gather", "")
    assert kinds["grouped.weight"] == (
        None,
        "skinny GEMM is for linear layers; a convolution in 2 groups: sparse tensor cores multiply one matrix",
    )
    assert plan.weight_dtype == torch.bfloat16


def test_cutlass_only_where_it_wins(monkeypatch: Any) -> None:
    clock(monkeypatch, cusparselt=0.5, cutlass=0.3)
    plan = ow.plan(net(), torch.randn(2, 4, 8, 8).bfloat16(), pattern="2:4")
    assert plan.chosen["first.weight"] == "cutlass"


def test_dense_stays_where_it_wins(monkeypatch: Any) -> None:
    clock(monkeypatch, cusparselt=0.98, cutlass=2.0)
    plan = ow.plan(net(), torch.randn(2, 4, 8, 8).bfloat16(), pattern="2:4")
    assert plan.chosen == {}
    assert {each.reason for each in plan.layers if each.name != "grouped.weight"} == {"dense is faster"}


def test_other_patterns_have_the_kernels_for_few_rows(monkeypatch: Any) -> None:
    clock(monkeypatch, skinny_expand=0.5)
    plan = ow.plan(net("4:8"), torch.randn(2, 4, 8, 8).bfloat16(), pattern=ow.Selection("4:8", exclude=["stem"]))
    assert plan.chosen == {"first.weight": "skinny_expand", "last.weight": "skinny_expand"}
    (mix,) = [each for each in plan.layers if each.name == "mix.weight"]
    assert "4:8 is not within 2:4, which sparse tensor cores multiply" in mix.reason


def test_an_operator_that_fails_leaves_the_layer_dense(monkeypatch: Any) -> None:
    def fails(*_: Any) -> Tensor:
        raise RuntimeError("CUDA error: operation not supported")

    broken = dataclasses.replace(PLAIN, product=fails)
    monkeypatch.setattr(cusparselt, "BACKENDS", {"cusparselt": broken})
    clock(monkeypatch)
    monkeypatch.setattr(choose, "kinds_on", lambda _: [KINDS["cusparselt"]])
    plan = ow.plan(net(), torch.randn(2, 4, 8, 8).bfloat16(), pattern="2:4")
    assert plan.chosen == {}
    assert "cusparselt: CUDA error: operation not supported" in {each.reason for each in plan.layers}


@pytest.mark.parametrize("error", [TypeError, IndexError, AssertionError, ValueError])
def test_an_error_that_is_no_refusal_of_a_library_is_ours(error: type[Exception], monkeypatch: Any) -> None:
    def fails(*_: Any) -> Tensor:
        raise error("a bug of ours")

    monkeypatch.setattr(cusparselt, "BACKENDS", {"cusparselt": dataclasses.replace(PLAIN, product=fails)})
    monkeypatch.setattr(choose, "kinds_on", lambda _: [KINDS["cusparselt"]])
    clock(monkeypatch)
    with pytest.raises(error, match="a bug of ours"):
        ow.plan(net(), torch.randn(2, 4, 8, 8).bfloat16(), pattern="2:4")


def test_a_deployed_model_is_the_model(monkeypatch: Any) -> None:
    clock(monkeypatch, cusparselt=0.5)
    model, x = net(), torch.randn(2, 4, 8, 8).bfloat16()
    fast = ow.deploy(model, x, pattern="2:4")
    layers = [each for each in fast.modules() if isinstance(each, PackedLayer)]
    assert len(layers) == 4
    assert fast.stem.relu
    assert close(fast(x), model(x), 0.03)
    assert all(torch.equal(a, b) for a, b in zip(fast.state_dict().values(), model.state_dict().values(), strict=True))
    assert list(fast.state_dict()) == list(model.state_dict())
    with pytest.raises(ValueError, match="deployed"):
        ow.save(fast, "never.safetensors", pattern="2:4")


def test_what_is_deployed_runs_the_algorithms_that_were_timed(monkeypatch: Any) -> None:
    clock(monkeypatch, cusparselt=0.5)
    used = []

    def product(*arguments: Any) -> Tensor:
        used.append(arguments[-2])
        return plain_product(*arguments)

    monkeypatch.setitem(cusparselt.BACKENDS, "cusparselt", dataclasses.replace(PLAIN, product=product))  # type: ignore[arg-type]
    x = torch.randn(2, 4, 8, 8).bfloat16()
    fast = ow.deploy(net(), x, pattern="2:4")
    used.clear()
    fast(x)
    assert used == [SEARCHED] * 4
    assert [each.algorithms for each in fast.deployment.layers if each.kind] == [{128: SEARCHED}] * 2 + [
        {2: SEARCHED}
    ] * 2


def test_a_dense_model_that_was_returned_says_so(monkeypatch: Any) -> None:
    clock(monkeypatch, cusparselt=0.5)
    monkeypatch.setattr(deploy, "fastest", lambda variants, seconds: dict.fromkeys(variants, 1.0))
    with pytest.warns(UserWarning, match="sparse is not faster than dense here"):
        fast = ow.deploy(net(), torch.randn(2, 4, 8, 8).bfloat16(), pattern="2:4")
    assert fast.deployment.returned == "dense"
    assert fast.deployment.chosen == {}
    assert "returned: dense" in str(fast.deployment)
    assert not any(isinstance(each, PackedLayer) for each in fast.modules())


def test_an_algorithm_that_the_library_refuses_is_replaced_by_its_own_choice(monkeypatch: Any) -> None:
    def picky(*arguments: Any) -> Tensor:
        if arguments[-2] != cusparselt.DEFAULT:
            raise RuntimeError("CUSPARSE_STATUS_NOT_SUPPORTED")
        return plain_product(*arguments)

    monkeypatch.setitem(cusparselt.BACKENDS, "cusparselt", dataclasses.replace(PLAIN, product=picky))  # type: ignore[arg-type]
    layer, x = sparse(nn.Linear(64, 32)), torch.randn(4, 64).bfloat16()
    made = packed(layer)
    made.search(x)
    with pytest.warns(UserWarning, match=r"refuses algorithm \[7, 2, 1\] for \(8, 64\) by 32 outputs.*NOT_SUPPORTED"):
        assert close(made(x), layer(x))


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.int8])
def test_a_new_state_is_packed_where_the_old_one_was(weight_dtype: torch.dtype) -> None:
    """A captured graph goes on reading there."""
    made, other = (packed(sparse(nn.Linear(64, 32)), weight_dtype=weight_dtype) for _ in range(2))
    before = {name: each.data_ptr() for name, each in made.named_buffers()}
    made.load_state_dict(other.state_dict())
    assert {name: each.data_ptr() for name, each in made.named_buffers()} == before
    x = torch.randn(4, 64).bfloat16()
    assert close(made(x), other(x))


def test_training_through_a_deployed_layer_is_refused() -> None:
    x = torch.randn(2, 8, 5, 5).bfloat16().requires_grad_()
    made = packed(sparse(nn.Conv2d(8, 16, 1)))
    with pytest.raises(RuntimeError, match="PackedConv2d is for inference, and its input requires grad"):
        made(x)
    with torch.no_grad():
        made(x)


def test_a_pickled_layer_that_comes_back_without_a_gpu_says_what_to_do(monkeypatch: Any) -> None:
    data = pickle.dumps(packed(sparse(nn.Linear(64, 32))))
    monkeypatch.setattr(cusparselt, "BACKENDS", BACKENDS)
    with pytest.raises(RuntimeError, match=r"comes back on cpu: .*Load it onto a GPU.*save its state dict"):
        pickle.loads(data)


def test_the_operator_compiles(monkeypatch: Any) -> None:
    layer = sparse(nn.Linear(64, 32))
    made, x = packed(layer), torch.randn(4, 64).bfloat16()
    made.search(x)
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), made(x))


@pytest.mark.parametrize("name", ["semi_structured_linear", "skinny_gather_linear"])
def test_fake_kernels_fit(name: str) -> None:
    kind = "cutlass" if name.startswith("semi") else "skinny_gather"
    made = packed(sparse(nn.Linear(64, 32)), kind)
    x = torch.randn(8, 64).bfloat16()
    layout = made.packed
    if kind == "cutlass":
        arguments = (x, layout.values, layout.meta, layout.kernel_bias, kind, 32, [0, 1, -1], torch.bfloat16)
    else:
        arguments = (x, layout.tensors(), layout.kernel_bias, layout.integers, False)
    torch.library.opcheck(getattr(torch.ops.openwork, name).default, arguments)


def test_what_cannot_be_stored_or_captured_is_refused(monkeypatch: Any) -> None:
    clock(monkeypatch, cusparselt=0.5)
    model, x = net(), torch.randn(2, 4, 8, 8).bfloat16()
    with pytest.raises(ValueError, match=r"weight_dtype=torch.float32; needed one of torch.float16"):
        ow.deploy(model, x, pattern="2:4", weight_dtype=torch.float32)
    with pytest.raises(ValueError, match=r"timed_as='graph' for a model on cpu; needed one on a GPU"):
        ow.deploy(model, x, pattern="2:4", timed_as="graph")


# --- algorithms ------------------------------------------------------------------------------------------------------


def test_algorithms_are_searched_once_for_each_shape(tmp_path: Path) -> None:
    layer = sparse(nn.Linear(64, 32))
    for _ in range(2):
        made = packed(layer)
        made.search(torch.randn(3, 64).bfloat16())
        made.search(torch.randn(2, 50, 64).bfloat16())
    assert SEARCHES == [(8, 64), (104, 64)]
    assert made.packed.algorithms == {3: SEARCHED, 100: SEARCHED}
    made.packed.algorithms = {3: (5, 1, -1), 100: (6, 1, -1)}
    assert [made.packed.algorithm_for(rows)[0] for rows in (1, 3, 40, 60, 1000)] == [5, 5, 5, 6, 6]
    (of_machine,) = json.loads((tmp_path / "openwork" / "algorithms.json").read_text()).values()
    kept = "torch.bfloat16 to torch.bfloat16, bias"
    assert of_machine == {f"32x64x8 {kept}": [*SEARCHED], f"32x64x104 {kept}": [*SEARCHED]}


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"a": {"b": "c", "d": -1, "e": [1, 2], "f": [1, true, 0], "g": [-1, 1, 0]}}']
)
def test_a_damaged_file_of_algorithms_is_searched_again(tmp_path: Path, text: str) -> None:
    file = tmp_path / "openwork" / "algorithms.json"
    file.parent.mkdir()
    file.write_text(text)
    made = packed(sparse(nn.Linear(64, 32)))
    if "a" in text:
        made.search(torch.randn(3, 64).bfloat16())
    else:
        with pytest.warns(UserWarning, match="algorithms are searched again"):
            made.search(torch.randn(3, 64).bfloat16())
    assert SEARCHES == [(8, 64)]
    assert len(list(file.parent.iterdir())) == 1


def test_without_a_home_algorithms_are_kept_nowhere(monkeypatch: Any) -> None:
    for name in ("OPENWORK_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def homeless(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    made = packed(sparse(nn.Linear(64, 32)))
    made.search(torch.randn(3, 64).bfloat16())
    assert made.packed.algorithms == {3: SEARCHED}


def test_the_version_is_that_of_the_installed_library(monkeypatch: Any) -> None:
    found = {"nvidia-cusparselt-cu12": "0.8.0.4"}

    def version(package: str) -> str:
        if package not in found:
            raise importlib.metadata.PackageNotFoundError(package)
        return found[package]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: 702)
    for expected, slow in (("0.8.0.4", True), ("0.8.1.1", False), ("0.7.2", False)):
        found = {"nvidia-cusparselt-cu12": expected} if expected.count(".") == 3 else {}
        cusparselt._lt_number.cache_clear()
        assert BACKENDS["cusparselt"].version() == f"cuSPARSELt {expected}"
        assert ("install nvidia-cusparselt 0.8.1" in cusparselt.version_warning(torch.device("cuda"))) is slow
    cusparselt._lt_number.cache_clear()


def test_a_folder_that_cannot_be_written_is_said(monkeypatch: Any, tmp_path: Path) -> None:
    (tmp_path / "openwork").write_text("a file")
    with pytest.warns(UserWarning, match="cannot be written"):
        algorithm_cache.add(algorithm_cache.file_of_user(), "m", "k", SEARCHED)


def test_the_fp8_scale_reaches_the_largest_number() -> None:
    made, scales = quantize(torch.tensor([[1.0, -0.5], [0.0, 0.0]]), torch.float8_e4m3fn)
    assert made.float().tolist() == [[448.0, -224.0], [0.0, 0.0]]
    assert torch.allclose(scales[0], torch.tensor(1 / 448))


def test_which_patterns_are_within_2_4() -> None:
    """Every four neighbours of the fullest weight, where groups of M and of four lie in every way to each other."""
    for m in range(1, 13):
        for n in range(1, m + 1):
            fours = [[at // m for at in range(start, start + 4)] for start in range(0, 4 * m, 4)]
            most = max(sum(min(n, four.count(group)) for group in set(four)) for four in fours)
            assert within_2_4(ow.Pattern(n, m)) == (most <= 2), (n, m)


@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.float32])
def test_a_weight_that_overflows_where_it_is_kept_is_not_finite(weight_dtype: torch.dtype) -> None:
    layer = nn.Linear(8, 4).requires_grad_(False)
    layer.weight[0, 0] = 1e6
    ow.project(layer, "2:4")
    request: Any = choose.request_of(layer, "weight", ow.Pattern(2, 4), weight_dtype, [torch.randn(2, 8)])
    assert request.finite == (weight_dtype == torch.float32)
