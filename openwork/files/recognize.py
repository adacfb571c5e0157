"""What a file is that is no safetensors file, from its first bytes, and what to do with it."""

from __future__ import annotations

import re
import zipfile
from typing import BinaryIO

_LOAD = (
    "torch.load(path, weights_only=True) reads it; load that into the model, and ow.save writes this format "
    "(safetensors.torch.save_file a dense one)"
)
_SAVE = "save the weights with ow.save, save_pretrained or safetensors.torch.save_file"
_FETCH = "fetch it again from where it came"
_UNPACK = "unpack it first"

# How the file begins -> what it is, what to do.
_BEGINNINGS: tuple[tuple[bytes, str, str], ...] = (
    (rb"version https://git-lfs", "a pointer of Git LFS and not the file it stands for", "git lfs pull fetches that"),
    (rb"GGUF|ggjt|ggml|lmgg|tjgg", "a GGUF or GGML file of llama.cpp", _SAVE),
    (rb"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes", _SAVE),
    (rb"\x93NUMPY", "an array of NumPy (.npy)", "numpy.load reads it; " + _SAVE),
    (rb"\x80[\x02-\x05][\x8a\x95}\](cq]", "a pickle, as older torch.save writes", _LOAD),
    (rb"PK\x05\x06", "an empty zip archive", _FETCH),
    (rb"\x1f\x8b", "a gzip archive", _UNPACK),
    (rb"\x28\xb5\x2f\xfd", "a Zstandard archive", _UNPACK),
    (rb"\xfd7zXZ\0", "an xz archive", _UNPACK),
    (rb"BZh[1-9]1AY", "a bzip2 archive", _UNPACK),
    (rb"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", _UNPACK),
    (rb".{257}ustar", "a tar archive", _UNPACK),
    (rb".{4}TFL3", "a model of TensorFlow Lite", _SAVE),
    (rb"ftrt|ptrt", "an engine of TensorRT", _SAVE),
    (rb"\x89PNG|\xff\xd8\xff|GIF8|%PDF", "an image or a PDF", _FETCH),
    (rb"\x7fELF|MZ", "a program or library", _FETCH),
    (
        rb"(?i)(?:\xef\xbb\xbf)?\s*<(?:!doctype html|html|head|body|!--)",
        "a page in HTML, perhaps an error or log-in page",
        _FETCH,
    ),
    (rb"(?:\xef\xbb\xbf)?\s*<\?xml", "an XML file, such as the description of an OpenVINO model", _SAVE),
    # Protocol buffers name nothing: the version of ONNX, then its producer, or the length of the next text.
    (
        rb"\x08[\x01-\x14](?:\x12|\x1a|\x22|\x2a|\x32|\x3a|\x42)",
        "an ONNX model",
        "openwork verify FILE.onnx checks it; " + _SAVE,
    ),
)


def not_safetensors(file: BinaryIO, problem: str) -> str:
    """An error about a file without a header of safetensors: what it is, or the `problem` of what may have one."""
    what, to_do = recognized(file)
    file.seek(0)
    begins = file.read(9)
    if begins[8:] == b"{":
        return f"the header: {problem}; {_FETCH}"
    if not what:
        what, to_do = f"of no format that is known here, and begins with {begins[:8].hex(' ')}", _FETCH
        what += " (a header that does not begin with '{', or was cut short)"
    return f"it is {what}; needed a safetensors file: {to_do}"


def recognized(file: BinaryIO) -> tuple[str, str]:
    """What a file is, and what to do with it; nothing where that is not known, or it could be a safetensors file."""
    file.seek(0)
    begins = file.read(512)
    if not begins.strip(b"\0"):
        what = f"nothing but zeros, at least {len(begins)} of them" if begins else "empty"
        return f"{what} (cut short, or never written)", _FETCH
    if begins.startswith(b"PK\x03\x04"):
        return _zip(file)
    for beginning, what, to_do in _BEGINNINGS:
        if re.match(beginning, begins, re.DOTALL):
            return what, to_do
    return _text(begins)


def _zip(file: BinaryIO) -> tuple[str, str]:
    """What a zip archive is, by the names of its members."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = [info.filename for info in archive.infolist()[:10_000]]
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError):
        return "a zip archive, as torch.save and NumPy write, that was cut short or is damaged", _FETCH
    ends = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in ends:
        return "a TorchScript model", f"torch.jit.load(path).state_dict() has its weights; {_SAVE}"
    if "archive_format" in ends or "serialized_exported_program.json" in ends:
        return "a program of torch.export or AOTInductor", f"torch.export.load reads it; {_SAVE}"
    if "data.pkl" in ends:
        return "a checkpoint of torch.save, which is a pickle", _LOAD
    if names and all(name.endswith(".npy") for name in names):
        return "an archive of NumPy (.npz)", f"numpy.load reads it; {_SAVE}"
    if "model.weights.h5" in ends:
        return "a model of Keras", _SAVE
    return f"a zip archive with {', '.join(names[:3]) or 'nothing'}", _UNPACK


def _text(begins: bytes) -> tuple[str, str]:
    """What a text file is; nothing where it is none."""
    try:
        text = begins.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if error.start < len(begins) - 4:  # not merely cut within a letter
            return "", ""
        text = begins[: error.start].decode("utf-8-sig")
    if not all(letter.isprintable() or letter in "\t\r\n" for letter in text):
        return "", ""
    if re.match(r"\s*[{\[]", text):
        if '"weight_map"' in text or re.search(r'"metadata"\s*:\s*\{\s*"total_', text):
            return "the index of a model in several files", "name the folder, which is read with its index"
        return f"a JSON file that begins with {text.strip()[:40]!r}", "name the weights, *.safetensors, or the folder"
    return f"a text file that begins with {text.strip()[:40]!r}", _FETCH
