"""Pairs of frames with their flow: made from photos (`scenes`), or read by torchvision from the usual data sets."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from openwork.recipes.data import Data, held_out, readable, spaced
from openwork.recipes.data_files import DataFolder, check_declared_size
from openwork.recipes.draws import sample_seed
from openwork.recipes.images import ImageFiles
from openwork.recipes.scenes import BACKGROUND, render, scene
from openwork.utils.counted import counted
from openwork.utils.torchvision_compat import ensure_torchvision

ensure_torchvision()
from torchvision.datasets import FlyingChairs, FlyingThings3D, KittiFlow, Sintel  # noqa: E402
from torchvision.datasets.folder import IMG_EXTENSIONS  # noqa: E402
from torchvision.transforms import v2  # noqa: E402

_TRAIN, _VAL = range(2)  # streams of scenes
_SMALLEST = 128  # pixels: RAFT's correlation pyramid needs them
_HELD_OUT = 5  # of Sintel's scenes and KITTI's pairs, which have no other validation part, every so many-th
_UNKNOWN = 1e9  # Middlebury: larger components mean unknown

LAYOUTS = {
    "flyingchairs": "FlyingChairs/data/00001_img1.ppm, ..., and FlyingChairs/FlyingChairs_train_val.txt",
    "flyingthings3d": "FlyingThings3D/frames_cleanpass and FlyingThings3D/optical_flow, each with TRAIN and TEST",
    "sintel": "Sintel/training/clean, Sintel/training/final and Sintel/training/flow",
    "kitti": "KittiFlow/training/image_2 and KittiFlow/training/flow_occ",
}


class Pairs(NamedTuple):
    """A batch. Frames (B, 3, H, W) in [-1, 1]; flow (B, 2, H, W) in pixels, x before y; known (B, H, W) bool."""

    first: Tensor
    second: Tensor
    flow: Tensor
    known: Tensor


# Scenes


@dataclass(frozen=True)
class Scenes(Dataset[Pairs]):
    """Scenes made when they are used: new ones in every epoch, for validation always the same, of other photos."""

    photos: Sequence[Tensor]
    size: tuple[int, int]  # height, width
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: Any) -> Pairs:
        numbers = (_VAL, 0, 0, key) if isinstance(key, int) else (_TRAIN, *key)
        first, second, flow = render(scene(self.photos, np.random.default_rng(numbers), *self.size), *self.size)
        return Pairs(first * 2 - 1, second * 2 - 1, flow, torch.ones(self.size, dtype=torch.bool))


def sample_photos() -> list[Tensor]:
    """scikit-learn's two photos, 427 x 640 (a temple, a flower), (3, H, W) in [0, 1]."""
    from sklearn.datasets import load_sample_images

    return [_unit(image) for image in load_sample_images().images]


def photos_of(root: DataFolder, skip_bad: bool) -> tuple[list[Tensor], int]:
    """The photos of a folder, sorted by name, and how many could not be read and were left out."""
    paths = [str(path) for path in sorted(root.path.iterdir()) if path.suffix.lower() in IMG_EXTENSIONS]
    if not paths:
        raise FileNotFoundError(f"photos: no images ({', '.join(IMG_EXTENSIONS)}) in {root.path}")
    files = ImageFiles([(path, 0) for path in paths], np.array, root)
    indices = readable(files) if skip_bad else range(len(paths))
    return [_unit(np.asarray(files[index][0])) for index in indices], len(paths) - len(indices)


def scenes_of(
    photos: Sequence[Tensor],
    size: tuple[int, int],
    train: int,
    val: int,
    workers: int = 0,
    skipped: int = 0,
    hold_out: int = 0,
) -> Data:
    """Scenes of photos: the last fifth of them is for validation, of fewer than five the right third of each.
    `hold_out`: so many photos of the others, evenly spaced, are those for validation."""
    if len(photos) >= 5:
        cut = -(len(photos) // 5)
        parts = held_out(photos[:cut], hold_out) if hold_out else [photos[:cut], photos[cut:]]
    elif hold_out:
        raise ValueError(
            f"hold_out is {hold_out}, and it needs five photos, of which there are {len(photos)}: --data photos=DIR"
        )
    else:
        parts = [[p[:, :, : p.shape[2] * 2 // 3] for p in photos], [p[:, :, p.shape[2] * 2 // 3 :] for p in photos]]
    needed = [round(side * BACKGROUND) for side in size]
    large = [[p for p in part if p.shape[1] >= needed[0] and p.shape[2] >= needed[1]] for part in parts]
    if not all(large):
        raise ValueError(
            f"scenes of {size[1]} x {size[0]} pixels need photos, or parts of photos, of {needed[1]} x {needed[0]} "
            "for training and for validation; make --size smaller or give larger photos (--data photos=DIR)"
        )
    return Data(Scenes(large[0], size, train), Scenes(large[1], size, val), workers=workers, skipped=skipped)


def _unit(image: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(image, np.float32)).permute(2, 0, 1).contiguous() / 255


# Files


@dataclass(frozen=True)
class FlowFiles(Dataset[Pairs]):
    """Some samples of one of torchvision's data sets: crops of `size` for training, without it whole frames."""

    source: Any
    indices: Sequence[int]
    folder: DataFolder
    size: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: Any) -> Pairs:
        index = self.indices[key if isinstance(key, int) else key[2]]
        pair = read_pair(self.source, index, self.folder)
        if self.size is None or isinstance(key, int):
            return pair
        with sample_seed(*key):
            return augmented(pair, self.size, files_of(self.source, index)[0])


def files_of(source: Any, index: int) -> tuple[str, str, str]:
    """First frame, second frame, flow."""
    return (*source._image_list[index], source._flow_list[index])


def read_pair(source: Any, index: int, folder: DataFolder) -> Pairs:
    """One sample, whole; ValueError names its files where one cannot be read or has another size."""
    files = ", ".join(files_of(source, index))
    remedy = "repair or remove them, or add --skip_bad to leave such samples out"
    try:
        for file in files_of(source, index):
            folder.check(file)
            check_declared_size(file)
        first, second, flow, *valid = source[index]
    except Exception as error:  # torchvision's readers raise what they meet
        raise ValueError(f"{files}: one of these cannot be read ({error}); {remedy}") from error
    if not first.size == second.size == flow.shape[:0:-1]:
        sizes = f"{first.size}, {second.size} and {flow.shape[:0:-1]}"
        raise ValueError(f"{files} have {sizes} pixels, and must have the same; {remedy}")
    known = (np.abs(flow) < _UNKNOWN).all(axis=0)  # NaN is unknown too
    known = known & valid[0] if valid else known
    frames = [_unit(np.asarray(frame)) * 2 - 1 for frame in (first, second)]
    return Pairs(frames[0], frames[1], torch.from_numpy(np.where(known, flow, np.float32(0))), torch.from_numpy(known))


def flow_files(
    name: str,
    root: DataFolder,
    size: tuple[int, int],
    *,
    workers: int,
    skip_bad: bool,
    limit: int,
    limit_val: int,
    hold_out: int = 0,
) -> Data:
    """Training and validation samples, as the data set divides them or by every fifth. `skip_bad` reads every one once
    and leaves out those that cannot be. `hold_out`: so many training samples, evenly spaced, are those for validation.
    """
    folder = root.path
    try:
        parts = _OPENERS[name](folder)
    except (OSError, IndexError) as error:
        raise FileNotFoundError(f"{name}: {folder} must hold {LAYOUTS[name]} ({error})") from error
    if hold_out:
        source, indices = parts[0]
        parts = [(source, part) for part in held_out(indices, hold_out)]
    sets = []
    for (source, indices), most, crop in zip(parts, (limit, limit_val), (size, None), strict=True):
        check_pairs(source)
        if not indices:
            raise FileNotFoundError(f"{name}: {folder} lacks samples for training or validation: {LAYOUTS[name]}")
        sets.append(FlowFiles(source, spaced(indices, most), root, crop))
    skipped = 0
    if skip_bad:
        good = [replace(part, indices=[part.indices[i] for i in readable(part, workers)]) for part in sets]
        skipped, sets = sum(map(len, sets)) - sum(map(len, good)), good
    return Data(sets[0], sets[1], padded, workers, skipped)


def check_pairs(source: Any) -> None:
    """torchvision puts frames and flows together by their order: a missing file would shift all that follow it."""
    if len(source._image_list) != len(source._flow_list):
        pairs = counted(len(source._image_list), "pair of frames", "pairs of frames")
        raise ValueError(f"{source.root}: {pairs} for {counted(len(source._flow_list), 'flow')}")
    for index in range(len(source)):
        first, second, flow = (int(re.findall(r"\d+", Path(file).stem)[0]) for file in files_of(source, index))
        if first != flow or abs(second - first) > 1:
            raise ValueError(f"{', '.join(files_of(source, index))} are no sample: before them a file is missing")


Part = tuple[Any, Sequence[int]]


def _divided(cls: Any, splits: Sequence[str]) -> Callable[[Path], list[Part]]:
    return lambda folder: [(part, range(len(part))) for part in (cls(folder, split) for split in splits)]


def _chairs(folder: Path) -> list[Part]:
    parts = _divided(FlyingChairs, ("train", "val"))(folder)
    flows, marks = (sorted(folder.glob(f"FlyingChairs/{name}")) for name in ("data/*_flow.flo", "*_train_val.txt"))
    if (count := len(marks[0].read_text().split())) != len(flows):
        entries = counted(count, "entry", "entries")
        raise ValueError(
            f"{marks[0]} must hold a 1 or 2 for each pair: it has {entries} for {counted(len(flows), 'flow')}"
        )
    return parts


def _sintel(folder: Path) -> list[Part]:
    source = Sintel(folder, pass_name="both")
    order = sorted(range(len(source)), key=lambda i: source._image_list[i])  # it lists folders as they come
    names = sorted({Path(flow).parent.name for flow in source._flow_list})
    held_out = names[_HELD_OUT - 1 :: _HELD_OUT]
    is_val = [Path(source._flow_list[i]).parent.name in held_out for i in order]
    return [(source, [i for i, val in zip(order, is_val, strict=True) if val == part]) for part in (False, True)]


def _kitti(folder: Path) -> list[Part]:
    source = KittiFlow(folder)
    indices = range(len(source))
    return [(source, [i for i in indices if (i % _HELD_OUT == _HELD_OUT - 1) == part]) for part in (False, True)]


_OPENERS = {
    "flyingchairs": _chairs,
    "flyingthings3d": _divided(FlyingThings3D, ("train", "test")),
    "sintel": _sintel,
    "kitti": _kitti,
}


def augmented(pair: Pairs, size: tuple[int, int], name: object = "the frames") -> Pairs:
    """A training crop: scaled (where all flow is known), cut out, mirrored, brightness and contrast changed.

    RAFT's augmentation (its core/utils/augmentor.py) without stretching, hue, and erased patches. Draws come from
    torch's generator.
    """
    zoom, down, right, sideways, upside = torch.rand(5).tolist()
    if bool(pair.known.all()):
        pair = scaled(pair, size, 2 ** (1.1 * zoom - 0.1))
    height, width = pair.known.shape
    if height < size[0] or width < size[1]:
        raise ValueError(f"{name}: {width} x {height} pixels, smaller than --size {size[0]} {size[1]}; make it smaller")
    top, left = int(down * (height - size[0] + 1)), int(right * (width - size[1] + 1))
    pair = Pairs(*(part[..., top : top + size[0], left : left + size[1]] for part in pair))
    for axis, mirror in ((-1, sideways < 0.5), (-2, upside < 0.1)):
        pair = mirrored(pair, axis) if mirror else pair
    light = v2.ColorJitter(brightness=0.4, contrast=0.4)(torch.stack([pair.first, pair.second]) / 2 + 0.5) * 2 - 1
    return pair._replace(first=light[0], second=light[1])


def scaled(pair: Pairs, size: tuple[int, int], factor: float) -> Pairs:
    """The pair at `factor` times its size, or as much as a crop of `size` needs; the flow's length goes with it."""
    height, width = pair.known.shape
    factor = max(factor, size[0] / height, size[1] / width)
    to = max(size[0], round(height * factor)), max(size[1], round(width * factor))
    first, second, flow = (F.interpolate(part[None], to, mode="bilinear", align_corners=False)[0] for part in pair[:3])
    flow = flow * torch.tensor([to[1] / width, to[0] / height])[:, None, None]
    return Pairs(first, second, flow, torch.ones(to, dtype=torch.bool))


def mirrored(pair: Pairs, axis: int) -> Pairs:
    """The pair mirrored along its last (-1) or last but one (-2) axis; that component of the flow changes its sign."""
    sign = torch.tensor([-1.0, 1.0] if axis == -1 else [1.0, -1.0])[:, None, None]
    pair = Pairs(*(part.flip(axis) for part in pair))
    return pair._replace(flow=pair.flow * sign)


def padded(samples: Sequence[Pairs]) -> Pairs:
    """Samples as one batch: each grown to the right and downwards to a common size that divides by 8, at least 128.

    Frames repeat their edge, as RAFT does for its evaluation; there the flow counts as unknown.
    """
    height, width = (max(_SMALLEST, *(-(-pair.known.shape[i] // 8) * 8 for pair in samples)) for i in (0, 1))

    def grown(part: Tensor, mode: str) -> Tensor:
        rim = 0, width - part.shape[-1], 0, height - part.shape[-2]
        return F.pad(part[None], rim, mode=mode)[0]

    modes = ("replicate", "replicate", "constant", "constant")
    rows = [[grown(part, mode) for part, mode in zip(pair, modes, strict=True)] for pair in samples]
    return Pairs(*map(torch.stack, zip(*rows, strict=True)))
