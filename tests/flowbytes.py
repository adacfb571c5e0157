"""Flow files as bytes, made by hand, to read in tests."""

import struct
import zlib

import numpy as np

U = np.arange(12, dtype=np.float32).reshape(3, 4) - 5.25  # 3 rows of 4 pixels
FLOW = np.stack([U, -2 * U])


def flo(flow=FLOW, magic=None):
    _, height, width = flow.shape
    return (
        (magic or struct.pack("<f", 202021.25))
        + struct.pack("<ii", width, height)
        + flow.transpose(1, 2, 0).astype("<f4").tobytes()
    )


def pfm(flow=FLOW, kind="<f4", head=b"PF"):
    rows = np.concatenate([flow, flow[:1] * 0 + 7]).transpose(1, 2, 0)[::-1]
    scale = b"-1.0" if kind == "<f4" else b"1.0"
    return head + b"\n4 3\n" + scale + b"\n" + rows.astype(kind).tobytes()


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def filtered(rows, filters):
    """PNG's filters applied byte by byte, as the specification words them: (H, bytes of a row) and one number a row."""
    above, out = np.zeros_like(rows[0]), b""
    for row, number in zip(rows, filters, strict=True):
        line = [number]
        for i in range(len(row)):
            a, b, c = (int(row[i - 6]) if i >= 6 else 0), int(above[i]), (int(above[i - 6]) if i >= 6 else 0)
            nearest = min((a, b, c), key=lambda each: abs(a + b - c - each))  # min takes the first of equals
            line.append((int(row[i]) - (0, a, b, (a + b) // 2, nearest)[number]) % 256)
        out, above = out + bytes(line), row
    return out


def png(pixels, filters=None, depth=16):
    height, width, _ = pixels.shape
    rows = np.frombuffer(pixels.astype(">u2").tobytes(), np.uint8).reshape(height, -1)
    data = zlib.compress(filtered(rows, filters or [0] * height))
    head = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    half = len(data) // 2  # image data may come in several parts
    parts = [chunk(b"IHDR", head), chunk(b"IDAT", data[:half]), chunk(b"IDAT", data[half:]), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def kitti(flow=FLOW, known=True, **how):
    known = np.broadcast_to(known, flow.shape[1:])
    return png(np.stack([*(flow * 64 + 32768), known]).transpose(1, 2, 0).round().astype(np.uint16), **how)
