"""The structs that calls of the native library take: mirrors of those in csrc/, whose sizes a test compares."""

from __future__ import annotations

from ctypes import Structure, c_float, c_int32, c_int64, c_uint64, c_void_p


class Groups(Structure):
    """Where the groups of a weight lie in memory: see csrc/kernels.h."""

    _fields_ = (("outer", c_int64), ("length", c_int64), ("inner", c_int64), ("n", c_int32), ("m", c_int32))


class GemmWeight(Structure):
    """The weight of a matmul whose lanes are columns of the input: see csrc/api.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("values", "offsets", "scales", "bias")),
        *((name, c_int32) for name in ("dtype", "n", "m", "tile")),
        *((name, c_int64) for name in ("K", "O")),
    )


class GemmLinear(Structure):
    _fields_ = (
        ("weight", GemmWeight),
        *((name, c_void_p) for name in ("x", "y", "scratch")),
        *((name, c_int64) for name in ("B", "x_stride", "y_stride")),
        ("activation", c_int32),
    )


class GemmConv2d(Structure):
    _fields_ = (
        ("weight", GemmWeight),
        *((name, c_void_p) for name in ("x", "x_scales", "y", "scratch")),
        *((name, c_int64) for name in ("threads", "N", "channels", "H", "W", "outH", "outW")),
        *((name, c_int32) for name in ("groups", "stride_h", "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w")),
        ("kernel_w", c_int32),
        ("activation", c_int32),
    )


class GemvCall(Structure):
    """A matmul whose lanes are outputs: see csrc/kernels.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("values", "indices")),
        *((name, c_int64) for name in ("windows", "blocks")),
        *((name, c_int32) for name in ("window", "slots")),
        ("x", c_void_p),
        ("x_stride", c_int64),
        *((name, c_void_p) for name in ("bias", "y")),
        *((name, c_int64) for name in ("y_stride", "outputs", "batch")),
        ("activation", c_int32),
    )


class Pixels(Structure):
    """Gemv that are the output pixels of images: see csrc/kernels.h."""

    _fields_ = (
        *((name, c_int64) for name in ("channels", "H", "W", "outH", "outW")),
        *((name, c_int32) for name in ("stride_h", "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w")),
        ("kernel_w", c_int32),
    )


class DotProductCall(Structure):
    """A matmul whose lanes are outputs and whose inputs are as short as the weights: see csrc/kernels.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("values", "indices")),
        *((name, c_int64) for name in ("windows", "blocks")),
        ("x", c_void_p),
        *((name, c_int64) for name in ("x_stride", "K")),
        *((name, c_void_p) for name in ("pixels", "packed")),
        ("packed_from", c_int64),
        *((name, c_void_p) for name in ("bias", "scales", "x_scales", "y")),
        *((name, c_int64) for name in ("y_stride", "outputs", "batch")),
        *((name, c_int32) for name in ("steps", "activation")),
        ("requantize", c_void_p),
    )


class Requantize(Structure):
    """How sums of products with bytes become outputs: see csrc/kernels.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("sums", "residual")),
        *((name, c_int32) for name in ("zero", "residual_zero", "y_zero", "residual_is_float", "y_is_float")),
        *((name, c_float) for name in ("residual_scale", "y_inverse")),
    )


class Compressed(Structure):
    """A weight as files hold it: see csrc/kernels.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("weight", "values", "indices")),
        *((name, c_int64) for name in ("rows", "length")),
        *((name, c_int32) for name in ("n", "m", "bytes", "pruned_as")),
    )


class Slots(Structure):
    """The slots of a weight as kernels hold them: see csrc/kernels.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("weight", "values", "offsets")),
        *((name, c_int64) for name in ("rows", "length", "tile")),
        ("counted", c_uint64),
        *((name, c_int32) for name in ("n", "m", "bytes", "step", "even")),
    )
