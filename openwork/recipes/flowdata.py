"""Pairs of frames with their flow: made from photos (`scenes`), or read from the files of the usual data sets."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from openwork.recipes.batches import loaded
from openwork.recipes.draws import uniform
from openwork.recipes.flowfiles import bad, read_flow
from openwork.recipes.imagefolder import open_image, readable
from openwork.recipes.scenes import BACKGROUND, render, scene

_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm"}
_TRAIN, _VAL = range(2)  # streams of scenes
_SMALLEST = 128  # pixels: RAFT's correlation pyramid needs them


class Pairs(NamedTuple):
    """A batch. Frames (B, 3, H, W) in [-1, 1]; flow (B, 2, H, W) in pixels, x before y; known (B, H, W) bool."""

    first: Tensor
    second: Tensor
    flow: Tensor
    known: Tensor


def stacked(samples: Sequence[Pairs]) -> Pairs:
    return Pairs(*map(torch.stack, zip(*samples, strict=True)))


# Scenes


@dataclass(frozen=True)
class _SceneMaker(Dataset[Pairs]):
    photos: Sequence[Tensor]
    size: tuple[int, int]
    key: tuple[int, int, int]  # stream, seed, epoch

    def __getitem__(self, index: int) -> Pairs:
        layers = scene(self.photos, np.random.default_rng((*self.key, index)), *self.size)
        first, second, flow = render(layers, *self.size)
        return Pairs(first * 2 - 1, second * 2 - 1, flow, torch.ones(self.size, dtype=torch.bool))


@dataclass(frozen=True)
class Scenes:
    """Scenes made when they are used: new ones in every epoch, for validation always the same, of other photos.

    `workers` processes make them; with 0 the training process does.
    """

    train_photos: Sequence[Tensor]
    val_photos: Sequence[Tensor]
    size: tuple[int, int]  # height, width
    train_count: int
    val_count: int
    workers: int = 0
    skipped: int = 0

    def train_batches(self, batches: Sequence[np.ndarray], seed: int, epoch: int) -> Iterator[Pairs]:
        return loaded(_SceneMaker(self.train_photos, self.size, (_TRAIN, seed, epoch)), batches, self.workers, stacked)

    def val_batches(self, batches: Sequence[np.ndarray]) -> Iterator[Pairs]:
        return loaded(_SceneMaker(self.val_photos, self.size, (_VAL, 0, 0)), batches, self.workers, stacked)


def sample_photos() -> list[Tensor]:
    """scikit-learn's two photos, 427 x 640 (a temple, a flower), (3, H, W) in [0, 1]."""
    from sklearn.datasets import load_sample_images

    return [_unit(image) for image in load_sample_images().images]


def photos_of(folder: Path, skip_bad: bool) -> tuple[list[Tensor], int]:
    """The photos of a folder, sorted by name, and how many could not be read and were left out."""
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)
    if not paths:
        raise FileNotFoundError(f"photos: no images ({', '.join(sorted(_SUFFIXES))}) in {folder}")
    kept = [path for path in paths if readable(path)] if skip_bad else paths
    return [_unit(np.asarray(open_image(path))) for path in kept], len(paths) - len(kept)


def scenes_of(photos: Sequence[Tensor], size: tuple[int, int], train: int, val: int) -> Scenes:
    """Scenes of photos: the last fifth of them is for validation, of fewer than five the right third of each."""
    if len(photos) >= 5:
        cut = -(len(photos) // 5)
        parts = [photos[:cut], photos[cut:]]
    else:
        parts = [[p[:, :, : p.shape[2] * 2 // 3] for p in photos], [p[:, :, p.shape[2] * 2 // 3 :] for p in photos]]
    needed = [round(side * BACKGROUND) for side in size]
    large = [[p for p in part if p.shape[1] >= needed[0] and p.shape[2] >= needed[1]] for part in parts]
    if not all(large):
        raise ValueError(
            f"scenes of {size[1]} x {size[0]} pixels need photos, or parts of photos, of {needed[1]} x {needed[0]} "
            "for training and for validation; make --size smaller or give larger photos (--data photos=DIR)"
        )
    return Scenes(large[0], large[1], size, train, val)


def _unit(image: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(image, np.float32)).permute(2, 0, 1).contiguous() / 255


# Files


class PairPath(NamedTuple):
    """Files of one sample; `invalid` marks pixels without flow, where the data set has such a file."""

    first: Path
    second: Path
    flow: Path
    invalid: Path | None = None


def read_pair(path: PairPath) -> Pairs:
    """One sample, whole; ValueError names the file that cannot be read or has another size than the first frame."""
    images = [open_image(each) for each in path[:2]]
    flow, known = read_flow(path.flow)
    if path.invalid is not None:
        with_flow = np.asarray(open_image(path.invalid).convert("L")) == 0
        _demand_size(path, path.invalid, with_flow.shape[::-1], images[0].size)
        known = known & with_flow
    for each, size in ((path.second, images[1].size), (path.flow, flow.shape[:0:-1])):
        _demand_size(path, each, size, images[0].size)
    first, second = (_unit(np.asarray(image)) * 2 - 1 for image in images)
    return Pairs(first, second, torch.from_numpy(flow), torch.from_numpy(known))


def _demand_size(path: PairPath, other: Path, found: Sequence[int], needed: Sequence[int]) -> None:
    if tuple(found) != tuple(needed):
        raise bad(other, f"{found[0]} x {found[1]} pixels, but {path.first} has {needed[0]} x {needed[1]}")


def augmented(pair: Pairs, size: tuple[int, int], draws: np.ndarray, name: object = "the frames") -> Pairs:
    """A training crop: scaled (where all flow is known), cut out, mirrored, brightness and contrast changed.

    RAFT's augmentation (its core/utils/augmentor.py) without stretching, hue, and erased patches. Draws (8,).
    """
    zoom, down, right, sideways, upside, *light = draws
    if bool(pair.known.all()):
        pair = scaled(pair, size, 2 ** (1.1 * zoom - 0.1))
    height, width = pair.known.shape
    if height < size[0] or width < size[1]:
        raise ValueError(f"{name}: {width} x {height} pixels, smaller than --size {size[0]} {size[1]}; make it smaller")
    top, left = int(down * (height - size[0] + 1)), int(right * (width - size[1] + 1))
    pair = Pairs(*(each[..., top : top + size[0], left : left + size[1]] for each in pair))
    for axis, mirror in ((-1, sideways < 0.5), (-2, upside < 0.1)):
        pair = mirrored(pair, axis) if mirror else pair
    gain, contrast = 0.6 + 0.8 * light[0], 0.6 + 0.8 * light[1]
    return pair._replace(**{part: _lit(getattr(pair, part), gain, contrast) for part in ("first", "second")})


def scaled(pair: Pairs, size: tuple[int, int], factor: float) -> Pairs:
    """The pair at `factor` times its size, or as much as a crop of `size` needs; the flow's length goes with it."""
    height, width = pair.known.shape
    factor = max(factor, size[0] / height, size[1] / width)
    to = max(size[0], round(height * factor)), max(size[1], round(width * factor))
    first, second, flow = (F.interpolate(each[None], to, mode="bilinear", align_corners=False)[0] for each in pair[:3])
    flow = flow * torch.tensor([to[1] / width, to[0] / height])[:, None, None]
    return Pairs(first, second, flow, torch.ones(to, dtype=torch.bool))


def mirrored(pair: Pairs, axis: int) -> Pairs:
    """The pair mirrored along its last (-1) or last but one (-2) axis; that component of the flow changes its sign."""
    sign = torch.tensor([-1.0, 1.0] if axis == -1 else [1.0, -1.0])[:, None, None]
    pair = Pairs(*(each.flip(axis) for each in pair))
    return pair._replace(flow=pair.flow * sign)


def _lit(frame: Tensor, gain: float, contrast: float) -> Tensor:
    """Brightness, then contrast about the mean, of a frame in [-1, 1]."""
    frame = (frame + 1) * gain
    mean = frame.mean()
    return ((frame - mean) * contrast + mean).clamp(0, 2) - 1


def padded(samples: Sequence[Pairs]) -> Pairs:
    """Samples as one batch: each grown to the right and downwards to a common size that divides by 8, at least 128.

    Frames repeat their edge, as RAFT does for its evaluation; there the flow counts as unknown.
    """
    sides = [max(_SMALLEST, *(-(-pair.known.shape[i] // 8) * 8 for pair in samples)) for i in (0, 1)]
    return stacked([_padded(pair, *sides) for pair in samples])


def _padded(pair: Pairs, height: int, width: int) -> Pairs:
    rim = 0, width - pair.known.shape[1], 0, height - pair.known.shape[0]
    first, second = (F.pad(each[None], rim, mode="replicate")[0] for each in (pair.first, pair.second))
    return Pairs(first, second, F.pad(pair.flow, rim), F.pad(pair.known, rim))


@dataclass(frozen=True)
class _Reader(Dataset[Pairs]):
    paths: Sequence[PairPath]
    size: tuple[int, int]
    seed: int = 0
    epoch: int | None = None  # None: validation

    def __getitem__(self, index: int) -> Pairs:
        pair = read_pair(self.paths[index])
        if self.epoch is None:
            return pair
        draws = uniform(self.seed, self.epoch, np.array([index]), 8)[0]
        return augmented(pair, self.size, draws, self.paths[index].first)


@dataclass(frozen=True)
class _Checker(Dataset[bool]):
    paths: Sequence[PairPath]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> bool:
        try:
            read_pair(self.paths[index])
        except (ValueError, OSError):
            return False
        return True


@dataclass(frozen=True)
class PairFiles:
    """Training and validation samples, read when they are used, in `workers` processes."""

    train_paths: Sequence[PairPath]
    val_paths: Sequence[PairPath]
    size: tuple[int, int]
    workers: int
    skipped: int = 0

    @property
    def train_count(self) -> int:
        return len(self.train_paths)

    @property
    def val_count(self) -> int:
        return len(self.val_paths)

    def train_batches(self, batches: Sequence[np.ndarray], seed: int, epoch: int) -> Iterator[Pairs]:
        return loaded(_Reader(self.train_paths, self.size, seed, epoch), batches, self.workers, stacked)

    def val_batches(self, batches: Sequence[np.ndarray]) -> Iterator[Pairs]:
        return loaded(_Reader(self.val_paths, self.size), batches, self.workers, padded)


def files_of(
    train: Sequence[PairPath], val: Sequence[PairPath], size: tuple[int, int], workers: int, skip_bad: bool
) -> PairFiles:
    """Samples from files. `skip_bad` reads every one once and leaves out those that cannot be."""
    kept = [_readable(paths, workers) if skip_bad else paths for paths in (train, val)]
    return PairFiles(kept[0], kept[1], size, workers, len(train) + len(val) - len(kept[0]) - len(kept[1]))


def _readable(paths: Sequence[PairPath], workers: int) -> list[PairPath]:
    checks = DataLoader(_Checker(paths), batch_size=8, num_workers=workers, collate_fn=list)
    return [path for path, good in zip(paths, (each for batch in checks for each in batch), strict=True) if good]


# The layouts of the data sets

CHAIRS = "data/00001_img1.ppm, 00001_img2.ppm, 00001_flow.flo, ... and FlyingChairs_train_val.txt (1: train, 2: test)"
THINGS = (
    "frames_cleanpass/TRAIN/A/0000/left/0006.png, ... and "
    "optical_flow/TRAIN/A/0000/into_future/left/OpticalFlowIntoFuture_0006_L.pfm, ...; the same in TEST"
)
SINTEL = "training/clean/SCENE/frame_0001.png, ..., training/final and training/flow/SCENE/frame_0001.flo, ..."
KITTI = "training/image_2/000000_10.png, 000000_11.png, ... and training/flow_occ/000000_10.png, ..."


def flying_chairs(folder: Path) -> tuple[list[PairPath], list[PairPath]]:
    """FlyingChairs: 22,232 pairs for training and 640 for validation, as its list says."""
    names = ("FlyingChairs_train_val.txt", "chairs_split.txt")
    lists = [folder / name for name in names if (folder / name).exists()]
    flows = sorted((folder / "data").glob("*_flow.flo"))
    if not lists or not flows:
        raise FileNotFoundError(f"flyingchairs: {folder} must hold {CHAIRS}")
    marks = lists[0].read_text().split()
    if len(marks) != len(flows) or set(marks) - {"1", "2"}:
        raise ValueError(
            f"{lists[0]} must hold a 1 or a 2 for each pair: it has {len(marks)} entries "
            f"({', '.join(sorted(set(marks))[:5])}) for {len(flows)} flows in {folder / 'data'}"
        )
    pairs = [PairPath(_beside(flow, "img1.ppm"), _beside(flow, "img2.ppm"), flow) for flow in flows]
    train, val = ([pair for pair, mark in zip(pairs, marks, strict=True) if mark == part] for part in "12")
    return _demand_both("flyingchairs", folder, CHAIRS, train, val)


def _beside(flow: Path, part: str) -> Path:
    return flow.with_name(flow.name.replace("flow.flo", part))


def flying_things(folder: Path) -> tuple[list[PairPath], list[PairPath]]:
    """FlyingThings3D: left camera, clean pass, flow into the future and the past; TRAIN and TEST."""
    parts = [
        [
            _things_pair(folder, flow, step)
            for when, step in (("into_future", 1), ("into_past", -1))
            for flow in sorted(folder.glob(f"optical_flow/{part}/*/*/{when}/left/*.pfm"))
        ]
        for part in ("TRAIN", "TEST")
    ]
    train, val = ([pair for pair in pairs if pair is not None] for pairs in parts)
    return _demand_both("flyingthings3d", folder, THINGS, train, val)


def _things_pair(folder: Path, flow: Path, step: int) -> PairPath | None:
    """The frames that a flow is between; None at the end of a sequence, which has a flow and no next frame."""
    number = re.search(r"_(\d+)_L$", flow.stem)
    if number is None:
        raise ValueError(f"{flow}: needed a name like OpticalFlowIntoFuture_0006_L.pfm; rename or remove it")
    here, there = number[1], f"{int(number[1]) + step:04d}"
    frames = folder / "frames_cleanpass" / flow.relative_to(folder / "optical_flow").parents[2] / "left"
    at_end = not flow.with_name(flow.name.replace(f"_{here}_L", f"_{there}_L")).exists()
    if at_end and not (frames / f"{there}.png").exists():
        return None
    return PairPath(frames / f"{here}.png", frames / f"{there}.png", flow)


def sintel(folder: Path, held_out: int = 5) -> tuple[list[PairPath], list[PairPath]]:
    """Sintel, passes clean and final. It has no flow for its test part, so every fifth scene is for validation."""
    scenes = sorted(path.name for path in (folder / "training" / "flow").glob("*") if path.is_dir())
    pairs: tuple[list[PairPath], list[PairPath]] = [], []
    for number, name in enumerate(scenes):
        for passed in ("clean", "final"):
            pairs[number % held_out == held_out - 1].extend(_sintel_scene(folder / "training", passed, name))
    return _demand_both("sintel", folder, SINTEL, *pairs)


def _sintel_scene(training: Path, passed: str, name: str) -> list[PairPath]:
    if not (training / passed / name).is_dir():
        return []
    found = []
    for flow in sorted((training / "flow" / name).glob("frame_*.flo")):
        second = f"frame_{int(flow.stem[-4:]) + 1:04d}.png"
        frames = training / passed / name
        invalid = training / "invalid" / name / f"{flow.stem}.png"
        found.append(
            PairPath(frames / f"{flow.stem}.png", frames / second, flow, invalid if invalid.exists() else None)
        )
    return found


def kitti(folder: Path, held_out: int = 5) -> tuple[list[PairPath], list[PairPath]]:
    """KITTI 2015 (image_2) or 2012 (colored_0): sparse flow. Every fifth of the training pairs is for validation."""
    training = folder / "training"
    frames = next((training / name for name in ("image_2", "colored_0") if (training / name).is_dir()), training)
    flows = sorted((training / "flow_occ").glob("*_10.png"))
    pairs = [PairPath(frames / flow.name, frames / flow.name.replace("_10", "_11"), flow) for flow in flows]
    train = [pair for number, pair in enumerate(pairs) if number % held_out != held_out - 1]
    return _demand_both("kitti", folder, KITTI, train, pairs[held_out - 1 :: held_out])


def _demand_both(
    name: str, folder: Path, layout: str, train: list[PairPath], val: list[PairPath]
) -> tuple[list[PairPath], list[PairPath]]:
    if not train or not val:
        raise FileNotFoundError(
            f"{name}: {len(train)} pairs for training and {len(val)} for validation found in {folder}; it must hold "
            f"{layout}"
        )
    return train, val
