"""Flow files as bytes, made by hand, to read in tests."""

import struct


def flo(flow):
    """Middlebury's format: a magic number, width, height, then (u, v) by rows."""
    _, height, width = flow.shape
    head = struct.pack("<f", 202021.25) + struct.pack("<ii", width, height)
    return head + flow.transpose(1, 2, 0).astype("<f4").tobytes()


def pfm(flow):
    """A portable float map of three channels, the last unused, rows from the bottom up."""
    _, height, width = flow.shape
    rows = flow[[0, 1, 0]].transpose(1, 2, 0)[::-1]
    return f"PF\n{width} {height}\n-1.0\n".encode() + rows.astype("<f4").tobytes()
