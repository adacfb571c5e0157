"""The safetensors container: its header read strictly, its tensors one by one, and a file written whole or not at all.

The reader stands next to safetensors' own because it reports what lies in a file without mapping it (a mapped file
that someone shortens kills the process), and refuses what that one lets pass: names given twice, fields that nobody
defined. A test holds that it accepts nothing that safetensors refuses.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import BinaryIO

import torch
from torch import Tensor

from openwork.files.header import Layout, Stored, laid_out, sealed
from openwork.kernels.cpu.checksum import crc32
from openwork.utils.atomic import atomic_file
from openwork.utils.checksum import as_text, pieces


def read_tensor(file: BinaryIO, stored: Stored, seen: Callable[[Tensor, int], object] | None = None) -> Tensor:
    """One tensor, in memory of its own on the CPU. `seen` is called with the tensor and how many bytes of it are there,
    each time there are more, while these are in the cache. Raises ValueError where the file is damaged, as far as it
    shows."""
    # Not numpy's memory, which asks for large pages: in a virtual machine these took up to five times as long to get.
    memory = torch.empty(stored.stop - stored.start, dtype=torch.uint8)
    tensor, buffer = memory.view(stored.dtype).reshape(stored.shape), memory.numpy()
    found = read = 0
    file.seek(stored.start)
    for piece in pieces(buffer.data):
        if file.readinto(piece) != len(piece):  # type: ignore[attr-defined]
            raise ValueError("the file became shorter while it was read")
        if stored.crc32 is not None:
            found = crc32(piece, found)
        read += len(piece)
        if seen is not None:
            seen(tensor, read)
    if stored.crc32 not in (None, found):
        raise ValueError(
            f"its bytes have the CRC-32 {as_text(found)} and should have {as_text(stored.crc32)}: the file is damaged, "
            "or was written while it was read; copy or make it anew"
        )
    if stored.dtype == torch.bool and buffer.size and buffer.max() > 1:
        raise ValueError("a boolean is neither 0 nor 1: the file is damaged")
    return tensor


def write(
    path: str | os.PathLike[str],
    layout: Mapping[str, Layout],
    contents: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file atomically: whatever happens at whatever moment, `path` is the old file or the new one.

    `layout` says dtype and shape of each tensor, so that the header is known before the first is made; `contents` gives
    them one at a time, in any order. A process that is killed leaves a hidden file that ends in `.part` beside `path`,
    which may be deleted. The bytes are those of safetensors' own writer, with checksums in the metadata.
    """
    stored, header = laid_out(layout, metadata)
    with atomic_file(path) as part, open(part, "wb") as file:
        file.truncate(max((tensor.stop for tensor in stored.values()), default=len(header)))
        checksums = dict.fromkeys(stored, 0)
        missing = dict(stored)
        for name, tensor in contents:
            checksums[name] = _put(file, tensor, missing.pop(name))
        if missing:
            raise RuntimeError(f"no content was given for {', '.join(missing)}")
        file.seek(0)
        file.write(sealed(header, list(checksums.values())))


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """`write` what is in memory already, each tensor under its name."""
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write(path, layout, tensors.items(), metadata)


def _put(file: BinaryIO, tensor: Tensor, stored: Stored) -> int:
    """Write a tensor where it belongs; the checksum of what was written."""
    if (tensor.dtype, tuple(tensor.shape)) != (stored.dtype, stored.shape):
        raise RuntimeError(f"laid out as {stored}, found {tensor.dtype} {tuple(tensor.shape)}")
    checksum = 0
    if tensor.numel():
        plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        file.seek(stored.start)
        for piece in pieces(plain.reshape(-1).view(torch.uint8).numpy().data):
            file.write(piece)
            checksum = crc32(piece, checksum)
    return checksum
