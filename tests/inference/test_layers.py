"""Layers with packed weights: what they compute, and that they are saved, loaded, copied and sent like dense ones.

float32 and bfloat16 weights: an output errs by no more than (terms + 2) * 2^-24 * sum of |products| (one rounding a
multiply-add), as tests/kernels/test_products.py has it for the operators.
"""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing import get_context

import openwork as ow
from openwork.inference.geometry import symmetric_padding
from openwork.inference.layers import pack_layer
from openwork.kernels.cpu import native
from openwork.layouts.dot_product import step_refusal
from openwork.layouts.layout import kind_named
from openwork.utils.deployed import check_not_deployed

STATUS = ow.kernels.status()
WEIGHT_DTYPES = [torch.float32, torch.bfloat16, torch.int8]
P24 = ow.Pattern(2, 4)


@pytest.fixture(params=STATUS.available or [None])
def isa(request: pytest.FixtureRequest) -> Iterator[str | None]:
    """Every instruction set of this machine; the references where there is no library."""
    if request.param is None:
        yield None
        return
    yield ow.kernels.use_isa(request.param)
    ow.kernels.use_isa(STATUS.isa)


def projected(layer: nn.Module, pattern: ow.Pattern = P24) -> nn.Module:
    ow.project(layer, pattern)
    return layer.eval().requires_grad_(False)


def hf_conv1d(outputs: int, inputs: int) -> nn.Module:
    layer = pytest.importorskip("transformers.pytorch_utils").Conv1D(outputs, inputs)
    nn.init.normal_(layer.bias)
    return layer


LINEAR = {
    "linear": (lambda: nn.Linear(24, 10), P24, (5, 24)),
    "three dims": (lambda: nn.Linear(24, 10), P24, (2, 5, 24)),
    "one row": (lambda: nn.Linear(32, 16), ow.Pattern(1, 8), (32,)),
    "no bias": (lambda: nn.Linear(32, 16, bias=False), ow.Pattern(1, 16), (7, 32)),
    "Hugging Face's Conv1D": (lambda: hf_conv1d(10, 24), P24, (5, 24)),
    "a group size without a permutation": (lambda: nn.Linear(21, 6), ow.Pattern(3, 7), (4, 21)),
}
CONV = {
    "conv1d": (lambda: nn.Conv1d(8, 6, 3, padding=2), (2, 8, 11)),
    "conv1d, one signal": (lambda: nn.Conv1d(8, 6, 3, stride=2), (8, 11)),
    "conv1d, grouped and dilated": (lambda: nn.Conv1d(16, 8, 3, dilation=2, groups=2, bias=False), (2, 16, 11)),
    "conv2d": (lambda: nn.Conv2d(8, 6, 3, padding=1), (2, 8, 7, 9)),
    "one image": (lambda: nn.Conv2d(8, 6, 3, padding=(0, 2)), (8, 7, 9)),
    "grouped": (lambda: nn.Conv2d(16, 8, (3, 1), groups=4, bias=False), (2, 16, 7, 9)),
    "dilated and strided": (lambda: nn.Conv2d(8, 6, 3, stride=(2, 1), dilation=(1, 2), padding="valid"), (2, 8, 7, 9)),
    "same": (lambda: nn.Conv2d(8, 6, (3, 5), padding="same"), (2, 8, 7, 9)),
    "1x1": (lambda: nn.Conv2d(8, 6, 1), (3, 8, 5, 5)),
}


def kinds(layer: nn.Module, pattern: ow.Pattern, weight_dtype: torch.dtype = torch.float32) -> list[str]:
    """Those of float32 layers; int8's dot products also on instruction sets without them, where they are slow."""
    fits = not step_refusal(weight_dtype, pattern, ow.kernels.vectors().lanes)
    found = ["gemm", *["gemv"] * (layer.weight.ndim == 2 and pattern.m in (2, 4, 8, 16, 32))]
    return [*found, *["dot_product"] * (fits and weight_dtype == torch.int8 and getattr(layer, "groups", 1) == 1)]


def deployed(layer: nn.Module, pattern: ow.Pattern, kind: str, weight_dtype: torch.dtype) -> nn.Module:
    return pack_layer(layer, pattern, kind_named(kind), weight_dtype)


def check(layer: nn.Module, made: nn.Module, x: Tensor, weight_dtype: torch.dtype) -> None:
    """made(x) is layer(x) with the weight that `made` says it has, as far as its arithmetic can tell."""
    exact, size = copy.deepcopy(layer).double(), copy.deepcopy(layer).double()
    for each, change in ((exact, lambda t: t), (size, torch.abs)):
        each.weight.data = change(made.weight.double())
        if each.bias is not None:
            each.bias.data = change(each.bias.data)
    y, terms = made(x), layer.weight[0].numel() if layer.weight.ndim > 2 else max(layer.weight.shape)
    bound = 2.0**-24 * (terms + 2) * size(x.double().abs())
    if weight_dtype == torch.int8:  # inputs are rounded to whole numbers, of which the largest is 127
        bound = 1.01 * size(torch.full_like(x, float(x.abs().max())).double()) / 254
    assert y.dtype == x.dtype
    assert y.shape == layer(x).shape
    assert bool(((y - exact(x.double())).abs() <= bound).all())


@pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("name", LINEAR)
def test_linear_layers(name, weight_dtype, isa):
    make, pattern, shape = LINEAR[name]
    layer = projected(make(), pattern)
    for kind in kinds(layer if isinstance(layer, nn.Linear) else nn.Linear(4, 4), pattern, weight_dtype):
        made = deployed(layer, pattern, kind, weight_dtype)
        check(layer, made, torch.randn(shape), weight_dtype)


@pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("name", CONV)
def test_convolutions(name, weight_dtype, isa):
    make, shape = CONV[name]
    layer = projected(make())
    x = torch.randn(shape)
    for kind in kinds(layer, P24, weight_dtype):
        made = deployed(layer, P24, kind, weight_dtype)
        check(layer, made, x, weight_dtype)
        if x.ndim == 4:
            last = made(x.to(memory_format=torch.channels_last))
            assert torch.equal(last, made(x))
            assert last.is_contiguous(memory_format=torch.channels_last)


def test_channels_that_the_pattern_does_not_divide(isa):
    layer = nn.Conv2d(6, 4, 3, padding=1).eval().requires_grad_(False)
    layer.weight[:, 1::2] = 0  # 2:4 as far as groups go, the last of 2
    check(layer, deployed(layer, P24, "gemm", torch.float32), torch.randn(2, 6, 5, 5), torch.float32)
    layer = nn.Linear(10, 4).eval().requires_grad_(False)
    layer.weight[:, 1::2] = 0
    for kind in ("gemm", "gemv"):
        check(layer, deployed(layer, P24, kind, torch.float32), torch.randn(3, 10), torch.float32)


@pytest.mark.parametrize("kind", ["gemm", "dot_product"])
def test_an_input_with_other_channels_is_refused(kind, isa):
    """Also where both numbers are the same rounded up to M."""
    made = deployed(projected(nn.Conv2d(8, 4, 3)), P24, kind, torch.int8)
    for channels in (4, 7, 12):
        with pytest.raises(ValueError, match=rf"has {channels} channels; needed 8"):
            made(torch.randn(2, channels, 5, 5))


@pytest.mark.parametrize("kind", ["gemm", "gemv"])
def test_relu_is_applied(kind, isa):
    layer = projected(nn.Linear(16, 8))
    made, x = deployed(layer, P24, kind, torch.float32), torch.randn(5, 16)
    before = made(x)
    made.relu = True
    assert torch.equal(made(x), before.relu())
    assert (before < 0).any()


def test_inputs_by_keyword_and_in_bfloat16():
    layer = projected(nn.Linear(16, 8)).bfloat16()
    made, x = deployed(layer, P24, "gemm", torch.float32), torch.randn(5, 16).bfloat16()
    torch.testing.assert_close(made(input=x), layer(input=x), atol=0.02, rtol=0.02)
    assert made.weight.dtype == made(x).dtype == torch.bfloat16
    assert torch.equal(made.weight, layer.weight)


BFLOAT16 = {
    "linear": (lambda: nn.Linear(72, 40), (5, 72)),
    "three dims": (lambda: nn.Linear(24, 10), (2, 5, 24)),
    "one row": (lambda: nn.Linear(32, 16, bias=False), (32,)),
    "Hugging Face's Conv1D": (lambda: hf_conv1d(10, 24), (5, 24)),
    "conv1d": (lambda: nn.Conv1d(8, 6, 3, padding=2), (2, 8, 11)),
    "conv2d": (lambda: nn.Conv2d(8, 20, (3, 1), stride=(1, 2), padding=1, dilation=(2, 1)), (2, 8, 9, 7)),
    "one image": (lambda: nn.Conv2d(40, 6, 1), (40, 7, 9)),
}


@pytest.mark.parametrize("name", BFLOAT16)
def test_layers_in_bfloat16_round_once_more_than_float32(name, isa):
    """Products of bfloat16 numbers, summed in float32: the layer's output but for the last of its 8 bits."""
    make, shape = BFLOAT16[name]
    layer, x = projected(make()).bfloat16(), torch.randn(shape).bfloat16()
    made = deployed(layer, P24, "dot_product", torch.bfloat16)
    exact, size = copy.deepcopy(layer).double(), copy.deepcopy(layer).double()
    for each in size.parameters():
        each.data.abs_()
    y, expected = made(x), exact(x.double())
    bound = 256 * 2.0**-23 * size(x.double().abs()) + 2.0**-8 * expected.abs()
    assert y.dtype == torch.bfloat16
    assert bool(((y - expected).abs() <= bound).all())
    assert torch.equal(made.weight, layer.weight)
    for copied in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        torch.testing.assert_close(copied(x), y)
    made.relu = True
    assert torch.equal(made(x), y.relu())


# --- saved, loaded, copied, sent --------------------------------------------------------------------------------------


def models() -> dict[str, tuple[nn.Module, Tensor, nn.Module]]:
    """Layer, input and deployed layer of every kind."""
    found = {}
    for name, layer, x in (
        ("linear", nn.Linear(24, 10), torch.randn(3, 24)),
        ("no bias", nn.Linear(24, 10, bias=False), torch.randn(3, 24)),
        ("conv1d", nn.Conv1d(8, 6, 3), torch.randn(2, 8, 9)),
        ("conv2d", nn.Conv2d(8, 8, 3, groups=2), torch.randn(2, 8, 7, 7)),
    ):
        projected(layer)
        for weight_dtype in WEIGHT_DTYPES:
            for kind in kinds(layer, P24, weight_dtype):
                found[f"{name}, {kind}, {weight_dtype}"] = (layer, x, deployed(layer, P24, kind, weight_dtype))
    return found


NAMES = list(models())


@pytest.mark.parametrize("name", NAMES)
def test_the_state_dict_is_that_of_the_layer(name):
    layer, x, made = models()[name]
    state = made.state_dict()
    assert {k: (v.shape, v.dtype) for k, v in state.items()} == {
        k: (v.shape, v.dtype) for k, v in layer.state_dict().items()
    }
    assert list(state) == list(layer.state_dict())
    exact = made.weight_dtype == torch.float32
    torch.testing.assert_close(state["weight"], layer.weight, rtol=0 if exact else 0.01, atol=0 if exact else 0.01)
    layer.load_state_dict(state)  # and the plain layer computes the same, but for rounding of int8 inputs
    torch.testing.assert_close(layer(x), made(x), atol=0.05 if made.weight_dtype == torch.int8 else 1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_state_dict_is_loaded(name):
    layer, x, made = models()[name]
    target = copy.deepcopy(made)
    other = copy.deepcopy(layer)
    nn.init.normal_(other.weight)
    ow.project(other, P24)
    assert not target.load_state_dict(other.state_dict()).missing_keys
    assert torch.equal(target(x), deployed(other, P24, made.kind, made.weight_dtype)(x))
    assert not torch.equal(target(x), made(x))


def test_states_that_do_not_fit_are_refused():
    layer = projected(nn.Linear(24, 10))
    made = deployed(layer, P24, "gemm", torch.float32)
    x, before = torch.randn(3, 24), None
    before = made(x)
    dense = nn.Linear(24, 10).state_dict()
    for state, message in (
        (dense, r"weight: the weight \(10, 24\) is not 2:4: 60 of 60 groups hold more than .*; deploy the model"),
        ({**dense, "weight": torch.zeros(10, 20)}, r"weight is \(10, 20\); the layer that was deployed has \(10, 24\)"),
        ({"bias": dense["bias"]}, 'Missing key.s. in state_dict: "weight"'),
        ({**layer.state_dict(), "extra": dense["bias"]}, 'Unexpected key.s. in state_dict: "extra"'),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            copy.deepcopy(made).load_state_dict(state)
    assert torch.equal(made(x), before)
    net = nn.Sequential(made)
    with pytest.raises(RuntimeError, match=r"0\.weight is \(10, 20\); the layer"):
        net.load_state_dict({"0.weight": torch.zeros(10, 20), "0.bias": dense["bias"]})


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_pickles(name):
    _, x, made = models()[name]
    made.relu = True
    for copied in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(copied(x), made(x))
        assert list(copied.state_dict()) == list(made.state_dict())  # the hooks are those of the copy
        assert torch.equal(copied.state_dict()["weight"], made.weight)
    copied.load_state_dict({k: torch.zeros_like(v) for k, v in made.state_dict().items()})
    assert not copied(x).any()
    assert made(x).any()


@pytest.mark.parametrize("name", NAMES)
def test_pickles_are_packed_anew_for_another_instruction_set(name):
    """To the numbers that were packed: int8 ones are not quantized a second time."""
    if len(STATUS.available) < 2:
        pytest.skip("needs two instruction sets")
    layer, x, made = models()[name]
    if made.weight_dtype == torch.int8:
        half, x = copy.deepcopy(layer).bfloat16(), x.bfloat16()
        made = deployed(half, P24, made.kind, torch.int8)  # its dtype has fewer digits than int8 numbers with a scale
    numbers, y, data = made.packed.unpack(), made(x), pickle.dumps(made)
    try:
        ow.kernels.use_isa("scalar")
        if made.kind == "dot_product":  # there is no kernel, and the reference takes any
            torch.testing.assert_close(made(x), y, atol=1e-6, rtol=1e-6)
        else:
            with pytest.raises(RuntimeError, match="packed for vectors of another size"):
                made(x)
        there = pickle.loads(data)
        torch.testing.assert_close(there(x), y, atol=1e-6, rtol=1e-6)
        assert torch.equal(there.packed.unpack(), numbers)
        back = pickle.dumps(there)
    finally:
        ow.kernels.use_isa(STATUS.isa)
    assert torch.equal(pickle.loads(back)(x), y)


READS = """
import sys, torch, openwork
for model, x, y in torch.load(sys.argv[1], weights_only=False):
    torch.testing.assert_close(model(x), y, atol=1e-5, rtol=1e-5)
print(openwork.kernels.status().isa)
"""


def test_files_are_read_by_a_process_with_other_instructions(tmp_path):
    saved = [(made, x, made(x)) for _, x, made in models().values()]
    torch.save(saved, tmp_path / "models.pt")
    words = [sys.executable, "-c", READS, str(tmp_path / "models.pt")]
    there = STATUS.available[-1] if STATUS.available else "none"
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OPENWORK_ISA": there}, check=False)
    assert done.stdout.strip() == (there if STATUS.isa else "None"), done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_pickles_are_read_where_there_is_no_library(name, monkeypatch):
    _, x, made = models()[name]
    y, data = made(x), pickle.dumps(made)
    monkeypatch.setattr(native, "_open", lambda: (None, "a test hides it"))
    torch.testing.assert_close(pickle.loads(data)(x), y, atol=1e-5, rtol=1e-5)


def _answer(model, x, queue):
    torch.set_num_threads(1)
    with torch.inference_mode():
        queue.put(model(x).numpy())


def test_a_spawned_process_runs_it():
    """It gets the model through shared memory."""
    model = nn.Sequential(deployed(projected(nn.Linear(24, 16)), P24, "gemm", torch.float32), nn.ReLU(),
                          deployed(projected(nn.Linear(16, 8)), P24, "gemv", torch.bfloat16))  # fmt: skip
    x, context = torch.randn(3, 24), get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_answer, args=(model, x, queue))
    process.start()
    found = torch.from_numpy(queue.get(timeout=120))
    process.join(60)
    assert process.exitcode == 0
    assert torch.equal(found, model(x))


# --- what is refused --------------------------------------------------------------------------------------------------


def test_moves_and_casts():
    made = deployed(projected(nn.Linear(8, 4)), P24, "gemm", torch.float32)
    assert made.to("cpu") is made.float() is made.eval() is made
    for move in (lambda: made.double(), lambda: made.to("meta")):
        with pytest.raises(TypeError, match=r"^PackedLinear is packed for cpu in torch\.float32: conv"):
            move()
    assert made(torch.zeros(1, 8)).dtype == torch.float32


def test_gradients_are_refused_and_say_what_to_do():
    made = deployed(projected(nn.Linear(8, 4)), P24, "gemm", torch.float32)
    x = torch.randn(2, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"PackedLinear is for inference, and its input requires grad: call "):
        made(x)
    with torch.no_grad():
        made(x)
    with torch.inference_mode():
        made(x)
    conv = deployed(projected(nn.Conv2d(4, 4, 1)), P24, "gemm", torch.float32)
    with pytest.raises(RuntimeError, match="PackedConv2d is for inference"):
        conv(torch.randn(1, 4, 2, 2, requires_grad=True))


def test_a_weight_that_is_not_of_the_pattern():
    with pytest.raises(
        ValueError, match=r"the weight \(4, 8\) is not 2:4: 8 of 8 groups hold more than 2 of 4 .the worst 4"
    ):
        deployed(nn.Linear(8, 4), P24, "gemm", torch.float32)


def test_verbs_that_need_the_weights_refuse_deployed_models(tmp_path):
    net = nn.Sequential(deployed(projected(nn.Linear(8, 4)), P24, "gemm", torch.float32))
    expected = r"1 layer is deployed \(0, \.\.\.\), their weights packed for this hardware; do it with the model"
    for verb in (
        lambda: ow.sparsify(net, "2:4"),
        lambda: ow.verify(net, pattern="2:4"),
        lambda: ow.project(net, "2:4"),
        lambda: ow.deploy(net, torch.zeros(1, 8), pattern="2:4"),
        lambda: ow.save(net, tmp_path / "net.safetensors", pattern="2:4"),
    ):
        with pytest.raises(ValueError, match=expected):
            verb()
    check_not_deployed(nn.Linear(8, 4), "nothing")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"padding": 1, "padding_mode": "circular"}, "padding_mode='circular': kernels pad with zeros"),
        ({"padding": "same", "kernel_size": (3, 4)}, r"padding='same' of a kernel \(3, 4\) pads one side more than"),
        ({"padding": "valid"}, [0, 0]),
        ({"padding": (1, 2)}, [1, 2]),
        ({"padding": "same", "dilation": (1, 2)}, [1, 2]),
        ({"padding": "same", "kernel_size": (3, 2), "dilation": (1, 2)}, [1, 1]),
    ],
)
def test_padding(options, expected):
    conv = nn.Conv2d(4, 4, **{"kernel_size": 3, **options})
    if isinstance(expected, list):
        assert symmetric_padding(conv) == expected
        return
    with pytest.raises(ValueError, match=expected):
        symmetric_padding(conv)


def test_the_text_says_what_it_is():
    made = deployed(projected(nn.Linear(8, 4)), P24, "gemv", torch.bfloat16)
    assert repr(made) == "PackedLinear(2:4, (4, 8), torch.bfloat16, gemv)"
