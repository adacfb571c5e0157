"""Image data sets that fit in memory: scikit-learn's digits, Fashion-MNIST, CIFAR-10. Images stay uint8 until used."""

from __future__ import annotations

import gzip
import pickle
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openwork.recipes.augment import shift_and_flip
from openwork.recipes.draws import uniform

_FASHION = (
    "train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz, t10k-labels-idx1-ubyte.gz"
)


@dataclass(frozen=True)
class Images:
    """Training and validation images, uint8 (n, channels, height, width), and their labels, int64 (n,)."""

    name: str
    train_x: Tensor
    train_y: Tensor
    val_x: Tensor
    val_y: Tensor
    mean: tuple[float, ...]  # of the pixel values as stored, one per channel
    std: tuple[float, ...]
    pad: int  # random shift by up to so many pixels
    flip: bool
    classes: int

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.train_x.shape[1:])

    @property
    def train_count(self) -> int:
        return len(self.train_y)

    @property
    def val_count(self) -> int:
        return len(self.val_y)

    @property
    def skipped(self) -> int:
        return 0

    def limited(self, train: int, val: int) -> Images:
        """The same data with only the first images of each part (0: all)."""
        first, second = train or None, val or None
        return replace(
            self,
            train_x=self.train_x[:first],
            train_y=self.train_y[:first],
            val_x=self.val_x[:second],
            val_y=self.val_y[:second],
        )

    def normalized(self, images: Tensor) -> Tensor:
        mean, std = (torch.tensor(v, dtype=torch.float32).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return (images.float() - mean) / std

    def train_batches(self, batches: Sequence[np.ndarray], seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for indices in batches:
            images = shift_and_flip(self.train_x[indices], uniform(seed, epoch, indices, 3), self.pad, self.flip)
            yield self.normalized(images), self.train_y[indices]

    def val_batches(self, batches: Sequence[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        for indices in batches:
            yield self.normalized(self.val_x[indices]), self.val_y[indices]


def _images(name: str, arrays: Sequence[np.ndarray], pad: int, flip: bool) -> Images:
    train_x, train_y, val_x, val_y = (torch.from_numpy(np.ascontiguousarray(a)) for a in arrays)
    mean = tuple(float(train_x[:, c].double().mean()) for c in range(train_x.shape[1]))
    std = tuple(float(train_x[:, c].double().std()) for c in range(train_x.shape[1]))
    classes = int(train_y.max()) + 1
    return Images(name, train_x, train_y.long(), val_x, val_y.long(), mean, std, pad, flip, classes)


def digits() -> Images:
    """scikit-learn's 1,797 handwritten digits, 8x8, in a fixed stratified split of 1,437 and 360."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    x = data.images.astype(np.uint8)[:, None]
    train_x, val_x, train_y, val_y = train_test_split(
        x, data.target, test_size=360, stratify=data.target, random_state=0
    )
    return _images("digits", (train_x, train_y, val_x, val_y), pad=1, flip=False)


def read_idx(path: Path) -> np.ndarray:
    """A gzipped IDX file of unsigned bytes (the MNIST format: magic 0x000008dd, d sizes, big-endian)."""
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\x00\x00\x08":
        raise ValueError(
            f"{path} is not an IDX file of unsigned bytes: it starts with {raw[:4].hex()}, not 000008; download it anew"
        )
    shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape).copy()


def _require(folder: Path, names: Sequence[str], what: str, needs: str) -> None:
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise FileNotFoundError(f"{what}: {folder} lacks {', '.join(missing)}; the folder must hold {needs}")


def fashion_mnist(folder: Path) -> Images:
    """Fashion-MNIST, 28x28 grey, 60,000 and 10,000 images, from its four .gz files."""
    names = _FASHION.split(", ")
    _require(folder, names, "fashion-mnist", _FASHION)
    train_x, train_y, val_x, val_y = (read_idx(folder / name) for name in names)
    return _images("fashion-mnist", (train_x[:, None], train_y, val_x[:, None], val_y), pad=2, flip=True)


class _PlainUnpickler(pickle.Unpickler):
    """Loads CIFAR's dicts of numpy arrays and nothing else: a pickle can otherwise run any code."""

    _core = "numpy._core" if np.__version__.split(".")[0] != "1" else "numpy.core"

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        if module.split(".")[0] == "numpy" and name in {"_reconstruct", "ndarray", "dtype", "_frombuffer"}:
            return super().find_class(re.sub(r"^numpy\._?core", self._core, module), name)
        raise pickle.UnpicklingError(f"a CIFAR batch needs no {module}.{name}; this file is not one")


def _read_cifar(path: Path) -> tuple[np.ndarray, np.ndarray]:
    if path.suffix == ".bin":
        rows = np.fromfile(path, np.uint8).reshape(-1, 3073)
        return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0]
    with path.open("rb") as file:
        batch = _PlainUnpickler(file, encoding="latin1").load()
    return np.asarray(batch["data"], np.uint8).reshape(-1, 3, 32, 32), np.asarray(batch["labels"])


def cifar10(folder: Path) -> Images:
    """CIFAR-10, 32x32 colour, 50,000 and 10,000 images, from its python or binary batches."""
    for inner in ("cifar-10-batches-py", "cifar-10-batches-bin"):
        folder = folder / inner if (folder / inner).is_dir() else folder
    suffix = ".bin" if (folder / "test_batch.bin").exists() else ""
    names = [f"data_batch_{i}{suffix}" for i in range(1, 6)] + [f"test_batch{suffix}"]
    _require(folder, names, "cifar10", "data_batch_1 to data_batch_5 and test_batch (python or .bin)")
    parts = [_read_cifar(folder / name) for name in names]
    train_x, train_y = (np.concatenate(column) for column in zip(*parts[:-1], strict=True))
    return _images("cifar10", (train_x, train_y, *parts[-1]), pad=4, flip=True)
