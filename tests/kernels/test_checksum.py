"""CRC-32 by folding: the powers of x that it is made of, and zlib's numbers for bytes of every length and place."""

from __future__ import annotations

import re
import zlib
from pathlib import Path

import numpy as np
import pytest

import openwork as ow
from openwork.kernels.cpu import checksum, native

POLYNOMIAL = 0x1_04C1_1DB7  # docs/format.md
SOURCE = Path(__file__).parents[2] / "csrc" / "checksum.cpp"


def power(exponent: int) -> int:
    """x^exponent modulo the polynomial, bits reflected, shifted by one."""
    rest = 1
    for _ in range(exponent):
        rest <<= 1
        if rest >> 32:
            rest ^= POLYNOMIAL
    return int(f"{rest:032b}"[::-1], 2) << 1


def test_the_powers_are_those_of_the_polynomial() -> None:
    found = re.findall(
        r"_mm_set_epi64x\((0x\w+), (0x\w+)\);  // x\^\((\d+) - 32\), x\^\(\3 \+ 32\)", SOURCE.read_text()
    )
    assert len(found) == 2
    for low, high, distance in found:
        assert int(low, 16) == power(int(distance) - 32)
        assert int(high, 16) == power(int(distance) + 32)


@pytest.mark.parametrize("hidden", [False, True])
def test_it_is_that_of_zlib(hidden: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if hidden:
        monkeypatch.setattr(native, "_open", lambda: (None, "a test hides it"))
    data = np.random.default_rng(0).integers(0, 256, 3000, np.uint8)
    for count in (*range(300), 1023, 2047, 2900):
        part = memoryview(data)[count % 17 :][:count]
        assert checksum.crc32(part) == zlib.crc32(part), count
        assert checksum.crc32(part, before=0x12345678) == zlib.crc32(part, 0x12345678), count
        assert checksum.crc32(bytes(part[count // 3 :]), checksum.crc32(part[: count // 3])) == zlib.crc32(part), count


@pytest.mark.skipif(ow.kernels.status().isa is None, reason=str(ow.kernels.status()))
def test_the_library_answers_where_it_can() -> None:
    lib = native.library()
    if not lib.openwork_has_crc32():
        pytest.skip("this processor has no carry-less multiplication, or none that is used")
    check = np.frombuffer(b"123456789" * 9, np.uint8)
    assert lib.openwork_crc32(check.ctypes.data, check.size, 0) == zlib.crc32(b"123456789" * 9)
