"""Readers of optical flow files: .flo (Middlebury, FlyingChairs, Sintel), .pfm (FlyingThings3D), 16-bit .png (KITTI).

Each gives the flow (2, H, W) float32 in pixels, x before y, and where it is known, bool (H, W). A file that is not what
its name says, or not whole, is a ValueError that names it.
"""

from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path

import numpy as np

FLO_MAGIC = b"PIEH"  # the float 202021.25
_UNKNOWN = 1e9  # Middlebury: larger components mean unknown
_REMEDY = "repair or remove it, or add --skip_bad to leave such samples out"


def bad(path: Path, what: str) -> ValueError:
    return ValueError(f"{path}: {what}; {_REMEDY}")


def read_flow(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The flow in a file, by its ending, and where it is known."""
    readers = {".flo": read_flo, ".pfm": read_pfm, ".png": read_kitti}
    return readers[path.suffix](path)


def read_flo(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Middlebury's format: "PIEH", width, height as int32, then (u, v) float32 by rows, little-endian."""
    raw = path.read_bytes()
    if raw[:4] != FLO_MAGIC:
        raise bad(path, f"not a .flo file: it starts with {raw[:4]!r}, not with {FLO_MAGIC!r} (the float 202021.25)")
    if len(raw) < 12:
        raise bad(path, f"truncated: {len(raw)} bytes do not hold the header of 12")
    width, height = struct.unpack("<ii", raw[4:12])
    if width < 1 or height < 1:
        raise bad(path, f"its header says {width} x {height} pixels")
    _demand_length(path, len(raw), 12 + 8 * width * height, f"{width} x {height} pixels")
    flow = np.frombuffer(raw, "<f4", offset=12).reshape(height, width, 2).transpose(2, 0, 1)
    return _known(flow)


def read_pfm(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A portable float map of three channels (u, v, unused), rows from the bottom up.

    A negative scale in its header means little-endian.
    """
    raw = path.read_bytes()
    header = re.match(rb"(P[Ff])\s+(\d+)\s+(\d+)\s+([-+.\deE]+)\n", raw)
    if header is None:
        raise bad(path, f"not a .pfm file: it starts with {raw[:12]!r}, not with PF, width, height and scale")
    if header[1] == b"Pf":
        raise bad(path, "a .pfm file of one channel (Pf); flow has three (PF)")
    width, height = int(header[2]), int(header[3])
    _demand_length(path, len(raw), header.end() + 12 * width * height, f"{width} x {height} pixels of three channels")
    kind = "<f4" if float(header[4]) < 0 else ">f4"
    rows = np.frombuffer(raw, kind, offset=header.end()).reshape(height, width, 3)
    return _known(rows[::-1, :, :2].transpose(2, 0, 1))


def read_kitti(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """KITTI's format: a 16-bit RGB .png of (64 u + 32768, 64 v + 32768, whether it is known)."""
    pixels = read_png16(path)
    known = pixels[:, :, 2] > 0
    flow = (pixels[:, :, :2].astype(np.float32) - 32768) / 64
    return np.where(known, flow.transpose(2, 0, 1), np.float32(0)), known


def _known(flow: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    known = (np.abs(flow) < _UNKNOWN).all(axis=0)  # NaN is unknown too
    return np.where(known, flow, 0).astype(np.float32), known


def _demand_length(path: Path, found: int, needed: int, what: str) -> None:
    if found != needed:
        state = "truncated" if found < needed else "longer than it should be"
        raise bad(path, f"{state}: {found} bytes, but its header says {what}, which takes {needed}")


# Pillow gives the upper 8 of 16 bits of a colour image, so this format is read here (PNG specification, W3C 2003).
_PNG = b"\x89PNG\r\n\x1a\n"
_PIXEL = 6  # bytes: three channels of 16 bits


def read_png16(path: Path) -> np.ndarray:
    """The pixels of a 16-bit RGB .png without interlacing, uint16 (H, W, 3)."""
    raw = path.read_bytes()
    if raw[:8] != _PNG:
        raise bad(path, f"not a .png file: it starts with {raw[:8]!r}")
    chunks = _chunks(path, raw)
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    if (depth, colour, interlaced) != (16, 2, 0):
        raise bad(
            path,
            f"a .png of {depth} bits, colour type {colour}, interlacing {interlaced}; "
            "KITTI's flow has 16 bits, colour type 2 (RGB), no interlacing",
        )
    try:
        data = zlib.decompress(chunks[b"IDAT"])
    except zlib.error as error:
        raise bad(path, f"its image data cannot be decompressed ({error})") from error
    _demand_length(path, len(data), height * (1 + _PIXEL * width), f"{width} x {height} pixels")
    rows = np.frombuffer(data, np.uint8).reshape(height, 1 + _PIXEL * width)
    if rows[:, 0].max() > 4:
        raise bad(path, f"a row has the filter {rows[:, 0].max()}; there are 0 to 4")
    pixels = _unfiltered(rows[:, 1:].reshape(height, width, _PIXEL), rows[:, 0])
    return pixels.view(">u2").astype(np.uint16)


def _chunks(path: Path, raw: bytes) -> dict[bytes, bytes]:
    """The contents of a .png by kind, image data joined. Checksums are checked."""
    found, at = {b"IDAT": b""}, 8
    while at + 12 <= len(raw):
        (length,) = struct.unpack(">I", raw[at : at + 4])
        kind, content, check = raw[at + 4 : at + 8], raw[at + 8 : at + 8 + length], raw[at + 8 + length :][:4]
        if len(content) < length or check != struct.pack(">I", zlib.crc32(kind + content)):
            raise bad(path, f"its part {kind!r} at byte {at} is truncated or damaged")
        found[kind] = found.get(kind, b"") + content
        at += 12 + length
        if kind == b"IEND" and b"IHDR" in found:
            return found
    raise bad(path, f"truncated: {len(raw)} bytes without an end mark")


def _unfiltered(rows: np.ndarray, filters: np.ndarray) -> np.ndarray:
    """Undoes PNG's row filters: (H, W, 6) bytes and (H,) filter numbers -> (H, W, 6).

    A pixel needs its left, upper and upper left neighbours. So the pixels with equal x + y are done at once.
    """
    height, width, depth = rows.shape
    out = np.zeros((height + 1, width + 1, depth), np.int16)  # with a row above and a column to the left of zeros
    for diagonal in range(height + width - 1):
        y = np.arange(max(0, diagonal - width + 1), min(height, diagonal + 1))
        x = diagonal - y
        left, up, corner = out[y + 1, x], out[y, x + 1], out[y, x]
        predicted = np.choose(
            filters[y, None], [np.zeros_like(left), left, up, (left + up) // 2, _paeth(left, up, corner)]
        )
        out[y + 1, x + 1] = (rows[y, x] + predicted) & 0xFF
    return np.ascontiguousarray(out[1:, 1:].astype(np.uint8))


def _paeth(left: np.ndarray, up: np.ndarray, corner: np.ndarray) -> np.ndarray:
    """Of the three neighbours the one nearest to left + up - corner; of equal ones left, then up."""
    guess = left + up - corner
    to_left, to_up, to_corner = (np.abs(guess - each) for each in (left, up, corner))
    best = np.where(to_up <= to_corner, up, corner)
    return np.where((to_left <= to_up) & (to_left <= to_corner), left, best)
