"""Files of a data set that may be a stranger's: they lie in its folder, are plain files, and decode to what fits."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Pillow decides by content, and would also start Ghostscript for an EPS. (MPO comes with JPEG.)
_FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
_FLO_HEADER = 12  # bytes: magic, width, height


@dataclass(frozen=True)
class DataFolder:
    """The folder of a data set. Links in it may lead out of it only where `follow_links`."""

    path: Path
    follow_links: bool = False

    def check(self, path: Path | str, within: Path | None = None) -> None:
        """ValueError unless a path is that of a plain file in the folder. Names stay in `within`, a folder in it."""
        place = within or self.path
        if not _is_below(os.path.normpath(path), os.path.normpath(place)):
            raise ValueError(f"{path} leaves the folder {place}; the names of a data set must stay in it")
        if not self.follow_links and not _is_below(target := os.path.realpath(path), os.path.realpath(self.path)):
            raise ValueError(
                f"{path} is a link out of the folder {self.path}, to {target}; put the file itself there, or add "
                "--follow_links if the links are yours"
            )
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError(f"{path} is not a plain file; remove it")


def _is_below(path: str, folder: str) -> bool:
    return os.path.commonpath([os.path.abspath(path), os.path.abspath(folder)]) == os.path.abspath(folder)


@contextmanager
def opened_image(path: Path | str) -> Iterator[Any]:
    """The image in a file, a PIL image of which only the header is read. Raises what Pillow raises, and where the
    header claims more pixels than `PIL.Image.MAX_IMAGE_PIXELS` (89 million, unless you change it)."""
    from PIL import Image

    Image.init()  # else it knows a few formats only
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path, formats=_FORMATS) as file:
            yield file


def check_image_size(width: int, height: int) -> None:
    """ValueError where an image has more pixels than Pillow takes."""
    from PIL import Image

    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(
            f"{width} x {height} pixels are more than the {Image.MAX_IMAGE_PIXELS} that an image may have "
            "(PIL.Image.MAX_IMAGE_PIXELS); make it smaller"
        )


def check_declared_size(path: str) -> None:
    """An error where the header of a frame or a flow claims more than its reader should make room for."""
    if path.endswith(".flo"):
        with open(path, "rb") as file:
            header = file.read(_FLO_HEADER)
        width, height = (int.from_bytes(header[at : at + 4], "little", signed=True) for at in (4, 8))
        if min(width, height) < 1 or os.path.getsize(path) != _FLO_HEADER + 8 * width * height:
            raise ValueError(f"{path} says {width} x {height} pixels, which its {os.path.getsize(path)} bytes are not")
    elif not path.endswith(".pfm"):  # whose reader takes what the file has
        with opened_image(path):
            pass
