"""Images in class folders, ImageNet's layout: DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from openwork.recipes.augment import crop_box
from openwork.recipes.batches import loaded
from openwork.recipes.draws import uniform

_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm"}
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, for pixels in [0, 1]
_DRAWS = 22 + 1  # ten attempts at a crop, its place, the mirror


def _pixels(image: Any) -> Tensor:
    array = torch.from_numpy(np.asarray(image, np.uint8).copy()).permute(2, 0, 1).float() / 255
    return (array - torch.tensor(_MEAN).view(3, 1, 1)) / torch.tensor(_STD).view(3, 1, 1)


def open_image(path: Path) -> Any:
    """The decoded image, a PIL image in RGB; ValueError names the file where it cannot be decoded."""
    from PIL import Image

    try:
        with Image.open(path) as file:
            return file.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:  # PIL raises all three, by format
        raise ValueError(
            f"{path} cannot be decoded ({error}); repair or remove it, or add --skip_bad to leave such files out"
        ) from error


def readable(path: Path) -> bool:
    try:
        open_image(path)
    except ValueError:
        return False
    return True


def train_image(path: Path, size: int, draws: np.ndarray) -> Tensor:
    """One augmented training image: random resized crop and mirror, drawn from `draws` (23,)."""
    from PIL import Image

    image = open_image(path)
    box = crop_box(image.width, image.height, draws[:-1])
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return _pixels(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draws[-1] < 0.5 else image)


def val_image(path: Path, size: int) -> Tensor:
    """One validation image: shorter side to 8/7 of `size` (256 for 224), centre crop."""
    from PIL import Image

    image = open_image(path)
    scale = round(size * 256 / 224) / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    return _pixels(image.crop((left, top, left + size, top + size)))


@dataclass(frozen=True)
class _Reader(Dataset[tuple[Tensor, int]]):
    files: Sequence[tuple[Path, int]]
    size: int
    seed: int = 0
    epoch: int | None = None  # None: validation

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.files[index]
        if self.epoch is None:
            return val_image(path, self.size), label
        return train_image(path, self.size, uniform(self.seed, self.epoch, np.array([index]), _DRAWS)[0]), label


@dataclass(frozen=True)
class ImageFolder:
    """Training and validation files with their class numbers; decoded in `workers` processes when used."""

    name: str
    train_files: Sequence[tuple[Path, int]]
    val_files: Sequence[tuple[Path, int]]
    classes: int
    size: int
    workers: int
    skipped: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return 3, self.size, self.size

    @property
    def train_count(self) -> int:
        return len(self.train_files)

    @property
    def val_count(self) -> int:
        return len(self.val_files)

    def limited(self, train: int, val: int) -> ImageFolder:
        """The same data with only so many images of each part, evenly spaced (0: all)."""
        return replace(self, train_files=_spaced(self.train_files, train), val_files=_spaced(self.val_files, val))

    def train_batches(self, batches: Sequence[np.ndarray], seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        return loaded(_Reader(self.train_files, self.size, seed, epoch), batches, self.workers)

    def val_batches(self, batches: Sequence[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        return loaded(_Reader(self.val_files, self.size), batches, self.workers)


def _spaced(files: Sequence[tuple[Path, int]], count: int) -> Sequence[tuple[Path, int]]:
    step = max(1, len(files) // count) if count else 1
    return files[::step][: count or None]


def _files(folder: Path, names: Sequence[str]) -> list[tuple[Path, int]]:
    numbers = {name: number for number, name in enumerate(names)}
    found = [
        (path, numbers[name])
        for name in names
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in _SUFFIXES
    ]
    if not found:
        raise FileNotFoundError(f"imagefolder: no images ({', '.join(sorted(_SUFFIXES))}) in {folder}/CLASS/")
    return found


def imagefolder(folder: Path, size: int, workers: int, skip_bad: bool = False) -> ImageFolder:
    """Reads DIR/train/CLASS/* and DIR/val/CLASS/*; the classes are the sorted folder names of train.

    `skip_bad` decodes every image once and leaves out those that cannot be.
    """
    for part in ("train", "val"):
        if not (folder / part).is_dir():
            raise FileNotFoundError(
                f"imagefolder: {folder}/{part} is missing; needed are {folder}/train/CLASS/*.jpg "
                f"and {folder}/val/CLASS/*.jpg"
            )
    names = sorted(path.name for path in (folder / "train").iterdir() if path.is_dir())
    strange = sorted({p.name for p in (folder / "val").iterdir() if p.is_dir()} - set(names))
    if strange:
        raise ValueError(
            f"imagefolder: {folder}/val has classes that train lacks: {', '.join(strange[:5])}; "
            "remove them or add them to train"
        )
    train, val = _files(folder / "train", names), _files(folder / "val", names)
    found = len(train) + len(val)
    if skip_bad:
        train, val = ([each for each in files if readable(each[0])] for files in (train, val))
    skipped = found - len(train) - len(val)
    return ImageFolder("imagefolder", train, val, len(names), size, workers, skipped)
