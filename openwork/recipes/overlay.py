"""Images with boxes and masks over them, as inline SVG: pixels are data: URIs, colours come from the style sheet."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

_COLORS = 8  # in the style sheet
_LONGEST = 320  # pixels of an image in the page
# The style sheet's dark theme: masks are pixels, which a style sheet cannot colour, and lie on photographs.
_TINTS = ("7ba6ff", "ff9f45", "4cc38a", "e879c6", "e5c04b", "4cc9e6", "ff6d70", "a996ff")
_OPACITY = 120  # of 255


@dataclass(frozen=True)
class Marked:
    """One object: x, y, width, height in pixels of the image, the number of its colour, what stands at its corner, its
    mask."""

    box: Sequence[float]
    kind: int
    text: str
    mask: np.ndarray | None = None  # (H, W)


def overlay(image_HW3: np.ndarray, objects: Sequence[Marked] = (), *, label: str = "") -> str:
    """The image with its objects marked, each class in a colour of its own. `label` says what it shows."""
    height, width, _ = image_HW3.shape
    names = label or ", ".join(each.text for each in objects if each.text) or f"{len(objects)} objects"
    parts = [_layer(_jpeg(image_HW3), width, height)]
    if any(each.mask is not None for each in objects):
        parts.append(_layer(_mask_png(objects, height, width), width, height))
    parts += [_box(each, max(width, height)) for each in objects]
    box = f'viewBox="0 0 {width} {height}"'
    return f'<svg class="photo" {box} role="img" aria-label="{escape(names)}">{"".join(parts)}</svg>'


def _layer(uri: str, width: int, height: int) -> str:
    return f'<image href="{uri}" width="{width}" height="{height}" preserveAspectRatio="none"/>'


def _box(each: Marked, side: int) -> str:
    """A rectangle and its text, in sizes that do not depend on the image's pixels."""
    x, y, width, height = each.box
    size = side / 28
    place = f'x="{x + size / 5:.1f}" y="{y + size:.1f}" font-size="{size:.1f}" stroke-width="{size / 6:.1f}"'
    text = f"<text {place}>{escape(each.text)}</text>" if each.text else ""
    frame = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" stroke-width="{side / 160:.2f}"'
    return f'<g class="c{each.kind % _COLORS}"><rect {frame}/>{text}</g>'


def _jpeg(image_HW3: np.ndarray) -> str:
    from PIL import Image

    image, file = Image.fromarray(image_HW3), io.BytesIO()
    image.thumbnail((_LONGEST, _LONGEST))
    image.save(file, "JPEG", quality=80)
    return _uri("jpeg", file)


def _mask_png(objects: Sequence[Marked], height: int, width: int) -> str:
    """A transparent image in which each mask has the colour of its object."""
    from PIL import Image

    index_HW = np.zeros((height, width), np.uint8)
    for each in objects:
        if each.mask is not None:
            index_HW[each.mask > 0] = each.kind % _COLORS + 1
    image, file = Image.fromarray(index_HW, "P"), io.BytesIO()
    image.putpalette(b"\0\0\0" + bytes.fromhex("".join(_TINTS)))
    image.thumbnail((_LONGEST, _LONGEST), Image.Resampling.NEAREST)
    image.save(file, "PNG", transparency=bytes([0] + [_OPACITY] * _COLORS))
    return _uri("png", file)


def _uri(kind: str, file: io.BytesIO) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
