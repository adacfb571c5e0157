"""Images for classification: scikit-learn's digits, Fashion-MNIST and CIFAR-10 in memory, and image folders."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from openwork.recipes.data import Data, check_held_out, held_out, readable, spaced
from openwork.recipes.data_files import DataFolder, opened_image
from openwork.recipes.draws import sample_seed, uniform
from openwork.utils.torchvision_compat import ensure_torchvision

FASHION = "train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz, t10k-labels-idx1-ubyte.gz"
PIXEL_MEAN, PIXEL_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet's, for pixels in [0, 1]


_LONGEST_SIDE, _MOST_CLASSES = 4096, 1_000_000  # of an image that stands in for others
_IDX_MOST = 1 << 28  # bytes; Fashion-MNIST's largest file has 47 million


@dataclass(frozen=True)
class ImageInfo:
    """What a classifier is built for, and the names of the classes where the data tells them."""

    classes: int
    channels: int
    names: Sequence[str] = ()


# In memory


@dataclass(frozen=True)
class PixelSet(Dataset[Any]):
    """Images uint8 (n, C, H, W) and labels int64 (n,), read a batch at a time. Normalized with `mean` and `std` (C,).

    Training images are shifted by up to `pad` pixels and, where `flip`, half of them mirrored.
    """

    images: Tensor
    labels: Tensor
    mean: Sequence[float]
    std: Sequence[float]
    pad: int = 0
    flip: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, keys: Sequence[Any]) -> tuple[Tensor, Tensor]:
        if not keys or isinstance(keys[0], int):  # validation, of which a process may have no sample
            return self._normalized(self.images[keys]), self.labels[keys]
        seed, epoch, _ = keys[0]
        indices = np.array([key[2] for key in keys])
        images = shift_and_flip(self.images[indices], uniform(seed, epoch, indices, 3), self.pad, self.flip)
        return self._normalized(images), self.labels[indices]

    def _normalized(self, images: Tensor) -> Tensor:
        mean, std = (torch.tensor(v, dtype=torch.float32).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return (images.float() - mean) / std


def shift_and_flip(images: Tensor, draws: np.ndarray, pad: int, flip: bool) -> Tensor:
    """Pad with zeros by `pad`, crop back at a drawn place, mirror half of the images if `flip`.

    (B, C, H, W) images and (B, 3) draws (down, right, mirror) -> (B, C, H, W).
    """
    _, _, height, width = images.shape
    down, right = (torch.from_numpy((draws[:, i] * (2 * pad + 1)).astype(np.int64)) for i in (0, 1))
    columns = torch.arange(width).repeat(len(images), 1)
    if flip:
        columns = torch.where(torch.from_numpy(draws[:, 2] < 0.5)[:, None], columns.flip(1), columns)
    rows = torch.arange(height) + down[:, None]
    columns = columns + right[:, None]
    batch = torch.arange(len(images))[:, None, None]
    crops = F.pad(images, (pad,) * 4)[batch, :, rows[:, :, None], columns[:, None, :]]
    return crops.permute(0, 3, 1, 2).contiguous()


def in_memory(
    arrays: Sequence[np.ndarray], pad: int, flip: bool, limit: int, limit_val: int, hold_out: int = 0
) -> Data:
    """Training images and labels, validation images and labels; the first of each part where there is a limit.
    `hold_out`: the last training samples, so many, are those for validation."""
    train_x, train_y, val_x, val_y = (torch.from_numpy(np.ascontiguousarray(a)) for a in arrays)
    if hold_out:
        check_held_out(hold_out, len(train_y))
        kept = len(train_y) - hold_out
        train_x, train_y, val_x, val_y = train_x[:kept], train_y[:kept], train_x[kept:], train_y[kept:]
    channels = range(train_x.shape[1])
    mean = [float(train_x[:, c].double().mean()) for c in channels]
    std = [float(train_x[:, c].double().std()) for c in channels]
    first, second = limit or None, limit_val or None
    train = PixelSet(train_x[:first], train_y.long()[:first], mean, std, pad, flip)
    val = PixelSet(val_x[:second], val_y.long()[:second], mean, std)
    return Data(train, val, _as_it_is, info=ImageInfo(int(train_y.max()) + 1, len(channels)))


def _as_it_is(batch: Any) -> Any:
    return batch


def noise(classes: int, channels: int, size: Sequence[int], names: Sequence[str] = ()) -> Data:
    """One image of noise for each part, (channels, *size), as a stand-in for images that are not there."""
    sides = [channels, *size]
    if len(size) != 2 or min(classes, *sides) < 1 or max(sides) > _LONGEST_SIDE or classes > _MOST_CLASSES:
        raise ValueError(
            f"images of {channels} channels and {list(size)} pixels in {classes} classes; needed is at least 1 of "
            f"each, at most {_LONGEST_SIDE} pixels a side and {_MOST_CLASSES} classes"
        )
    pixels = torch.randint(256, (1, *sides), generator=torch.Generator().manual_seed(0)).byte()
    one = PixelSet(pixels, torch.zeros(1, dtype=torch.long), [127.5] * channels, [73.9] * channels)
    return Data(one, one, _as_it_is, info=ImageInfo(classes, channels, names))


def digits(limit: int = 0, limit_val: int = 0, hold_out: int = 0) -> Data:
    """scikit-learn's 1,797 handwritten digits, 8x8, in a fixed stratified split of 1,437 and 360."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    x = data.images.astype(np.uint8)[:, None]
    train_x, val_x, train_y, val_y = train_test_split(
        x, data.target, test_size=360, stratify=data.target, random_state=0
    )
    return in_memory((train_x, train_y, val_x, val_y), 1, False, limit, limit_val, hold_out)


def read_idx(path: Path) -> np.ndarray:
    """An array of bytes in the IDX format, gzipped (yann.lecun.com/exdb/mnist)."""
    try:
        with gzip.open(path) as file:
            head = file.read(4)
            ndim = head[3] if head[:3] == b"\0\0\x08" else 0
            sizes = file.read(4 * ndim)
            shape = [int.from_bytes(sizes[4 * i : 4 * i + 4], "big") for i in range(ndim)]
            count = math.prod(shape) if len(sizes) == 4 * ndim else 0
            raw = file.read(min(count, _IDX_MOST) + 1) if ndim else b""
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read ({error}); download it again") from error
    if not ndim or len(raw) != count:
        raise ValueError(f"{path} is not an IDX file of bytes, or not all of one; download it again")
    return np.frombuffer(raw, np.uint8).reshape(shape).copy()


def fashion_mnist(
    folder: Path, limit: int = 0, limit_val: int = 0, hold_out: int = 0, *, follow_links: bool = False
) -> Data:
    """Fashion-MNIST, 28x28 grey, 60,000 and 10,000 images, from its four .gz files."""
    paths = [folder / name for name in FASHION.split(", ")]
    if missing := [path.name for path in paths if not path.exists()]:
        raise FileNotFoundError(f"fashion-mnist: {folder} lacks {', '.join(missing)}; the folder must hold {FASHION}")
    for path in paths:
        DataFolder(folder, follow_links).check(path)
    train_x, train_y, val_x, val_y = map(read_idx, paths)
    return in_memory((train_x[:, None], train_y, val_x[:, None], val_y), 2, True, limit, limit_val, hold_out)


def cifar10(folder: Path, limit: int = 0, limit_val: int = 0, hold_out: int = 0) -> Data:
    """CIFAR-10, 32x32 colour, 50,000 and 10,000 images, by torchvision, which knows the files by their checksums."""
    ensure_torchvision()
    from torchvision.datasets import CIFAR10

    try:
        parts = [CIFAR10(folder, train=is_train) for is_train in (True, False)]
    except RuntimeError as error:
        raise FileNotFoundError(
            f"cifar10: {folder} must hold cifar-10-batches-py with data_batch_1 to data_batch_5 and test_batch "
            "as they are published; a file is missing or is another one"
        ) from error
    arrays = [array for part in parts for array in (part.data.transpose(0, 3, 1, 2), np.array(part.targets))]
    return in_memory(arrays, 4, True, limit, limit_val, hold_out)


# In folders


def open_image(path: Path | str) -> Any:
    """The decoded image, a PIL image in RGB; ValueError names the file where it cannot be decoded."""
    try:
        with opened_image(path) as file:
            return file.convert("RGB")
    except Exception as error:  # Pillow raises what it meets, by format
        raise ValueError(
            f"{path} cannot be decoded ({error}); repair or remove it, or add --skip_bad to leave such files out"
        ) from error


@dataclass(frozen=True)
class ImageFiles(Dataset[Any]):
    """Files with their class numbers, decoded and transformed when they are used."""

    files: Sequence[tuple[str, int]]
    transform: Any
    folder: DataFolder

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: Any) -> tuple[Tensor, int]:
        path, label = self.files[key if isinstance(key, int) else key[2]]
        self.folder.check(path)
        if isinstance(key, int):
            return self.transform(open_image(path)), label
        with sample_seed(*key):
            return self.transform(open_image(path)), label


def imagefolder(
    folder: Path,
    size: int,
    workers: int,
    *,
    skip_bad: bool = False,
    limit: int = 0,
    limit_val: int = 0,
    hold_out: int = 0,
    follow_links: bool = False,
) -> Data:
    """DIR/train/CLASS/* and DIR/val/CLASS/*; the classes are the sorted folder names of train.

    Training: random resized crop and mirror; validation: shorter side to 8/7 of `size`, centre crop. `skip_bad` decodes
    every image once and leaves out those that cannot be. `hold_out`: so many training images, evenly spaced, are those
    for validation.
    """
    ensure_torchvision()
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    root = DataFolder(folder, follow_links)
    for part in ("train", "val"):
        if not (folder / part).is_dir():
            raise FileNotFoundError(
                f"imagefolder: {folder}/{part} is missing; needed are {folder}/train/CLASS/*.jpg "
                f"and {folder}/val/CLASS/*.jpg"
            )
    train, val = (ImageFolder(folder / part, allow_empty=True) for part in ("train", "val"))
    if train.classes != val.classes:
        strange = sorted({*train.classes} ^ {*val.classes})
        raise ValueError(f"imagefolder: only one of {folder}/train and {folder}/val has {', '.join(strange[:5])}")
    last = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(PIXEL_MEAN, PIXEL_STD)]
    augment = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *last])
    centre = v2.Compose([v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size), *last])
    parts = held_out(train.samples, hold_out) if hold_out else (train.samples, val.samples)
    sets, skipped = [], 0
    for files, most, transform in zip(parts, (limit, limit_val), (augment, centre), strict=True):
        good = readable(ImageFiles(files, np.array, root), workers) if skip_bad else range(len(files))
        skipped += len(files) - len(good)
        sets.append(ImageFiles(spaced([files[i] for i in good], most), transform, root))
    return Data(
        sets[0], sets[1], workers=workers, skipped=skipped, info=ImageInfo(len(train.classes), 3, train.classes)
    )
