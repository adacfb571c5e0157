"""CRC-32 of bytes: finds every changed bit, and every run of changed bits that is no longer than 32."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

DIGITS = 8  # of a checksum as text
_PIECE = 1 << 19  # bytes; what was just read or is about to be written is still in the cache of the CPU


def crc32(data: bytes | bytearray | memoryview, before: int = 0) -> int:
    """The CRC-32 of zlib, gzip and PNG (ISO 3309: polynomial 0x04C11DB7, bits reflected, begun and ended with ones);
    `before` is that of the bytes before these. Other threads of Python run meanwhile.

    >>> as_text(crc32(b"123456789"))
    'cbf43926'
    >>> crc32(b"6789", before=crc32(b"12345")) == crc32(b"123456789")
    True
    """
    return zlib.crc32(data, before)


def as_text(checksum: int) -> str:
    """Eight lower-case hexadecimal digits."""
    return f"{checksum:08x}"


def pieces(data: memoryview) -> Iterator[memoryview]:
    """Bytes in pieces that a cache holds, so that each is read or written and summed while it is there."""
    return (data[start : start + _PIECE] for start in range(0, len(data), _PIECE))
