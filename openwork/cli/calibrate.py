"""What --calibrate names, as batches for `ow.prune`: texts, images, arrays, or the training samples of a run."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from openwork.cli.source import Source, check_takes
from openwork.utils.example import Call, mapped, quiet, tensors_of

FORMS = """\
--calibrate names what to calibrate with:
  text files              cut into windows of --tokens tokens, by the tokenizer of SOURCE
  images or folders       by the image processor of SOURCE; else at the size of its input, with the mean and spread of
                          ImageNet
  .npy, .npz              arrays, the first dim of which counts samples; of an .npz one for each argument, by its name
  nothing                 training samples, where SOURCE is a run
"""
_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"}


def batches(source: Source, named: Sequence[str], *, samples: int, tokens: int, batch: int, seed: int) -> list[Any]:
    """At most so many samples, drawn by `seed`, in batches, real numbers in the dtype of the model. Raises ValueError
    where the model does not take them."""
    if not named:
        if not source.run:
            raise ValueError(f"{source.name} has no training samples of its own: add --calibrate FILE\n{FORMS}")
        return _of_run(Path(source.run), source.model, samples, batch, seed)
    given = [_in_dtype(source.model, each) for each in _of_files(source, named, samples, tokens, batch, seed)]
    check_takes(source.model, given[0], "--calibrate")
    return given


def _in_dtype(model: nn.Module, batch: Any) -> Any:
    dtype = next((each.dtype for each in model.parameters() if each.is_floating_point()), torch.float32)
    return mapped(batch, lambda each: each.to(dtype) if each.is_floating_point() else each)


def _of_files(source: Source, named: Sequence[str], samples: int, tokens: int, batch: int, seed: int) -> list[Any]:
    paths = [Path(name) for name in named]
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"--calibrate {path}: there is no such file or folder")
    files = sorted(file for path in paths for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())
    kinds = {file.suffix.lower() for file in files}
    draw = np.random.default_rng(seed)
    if kinds & {".npy", ".npz"}:
        return _arrays(files, samples, batch, draw)
    if kinds & _IMAGES:
        images = [file for file in files if file.suffix.lower() in _IMAGES]
        return _images(source, _drawn(images, samples, draw), batch)
    ids = token_ids(source, files)
    windows = _drawn(_windows(ids, tokens), samples, draw)
    return [{"input_ids": torch.stack(some)} for some in _split(windows, batch)]


def token_ids(source: Source, files: Sequence[Path]) -> Tensor:
    """The tokens of text files, one after the other."""
    tokenizer = source.tokenizer()
    text = "\n\n".join(_read(file) for file in files)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False)["input_ids"][0]
    return torch.as_tensor(ids)


def perplexity(source: Source, files: Sequence[Path], tokens: int) -> float:
    """Of a causal language model on text files, in windows of so many tokens that do not overlap."""
    config, generates = getattr(source.model, "config", None), getattr(source.model, "can_generate", bool)
    if not generates() or getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"--validate: {source.name} is no causal language model, which a perplexity is of")
    if tokens < 2:
        raise ValueError(f"--tokens {tokens}: a perplexity needs windows of 2 at least")
    windows = _windows(token_ids(source, files), tokens)
    if not windows:
        raise ValueError(f"{files[0]}: fewer than {tokens} tokens; give more text, or fewer --tokens")
    total = 0.0
    with quiet(source.model):
        for window in windows:
            logits = source.model(input_ids=window[None]).logits[0, :-1]
            total += float(nn.functional.cross_entropy(logits.float(), window[1:], reduction="sum"))
    return math.exp(total / (len(windows) * (tokens - 1)))


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is no text in UTF-8 ({error.reason} at byte {error.start}); convert it first"
        ) from None


def _windows(ids: Tensor, tokens: int) -> list[Tensor]:
    return list(ids[: len(ids) // tokens * tokens].split(tokens)) if len(ids) >= tokens else []


def _drawn(items: Sequence[Any], count: int, draw: np.random.Generator) -> list[Any]:
    """At most `count` of them, in their order."""
    if not items:
        raise ValueError("--calibrate holds no whole sample; give more of it, or fewer --tokens")
    return [items[i] for i in sorted(draw.permutation(len(items))[:count].tolist())]


def _split(items: list[Any], batch: int) -> list[list[Any]]:
    return [items[i : i + batch] for i in range(0, len(items), batch)]


def _arrays(files: Sequence[Path], samples: int, batch: int, draw: np.random.Generator) -> list[Any]:
    named: dict[str, np.ndarray] = {}
    for file in files:
        loaded = np.load(file, allow_pickle=False)
        named |= dict(loaded) if isinstance(loaded, Mapping) else {file.stem: loaded}
    if len({array.shape[:1] for array in named.values()} - {()}) != 1 or not all(each.ndim for each in named.values()):
        found = ", ".join(f"{name} {array.shape}" for name, array in named.items()) or "nothing"
        raise ValueError(f"--calibrate {files[0]}: found {found}; needed arrays with equally many samples")
    chosen = _drawn(range(len(next(iter(named.values())))), samples, draw)
    tensors = {name: torch.from_numpy(array[chosen]) for name, array in named.items()}
    single = len(files) == 1 and files[0].suffix == ".npy"
    parts = [{name: tensor[i : i + batch] for name, tensor in tensors.items()} for i in range(0, len(chosen), batch)]
    return [next(iter(part.values())) for part in parts] if single else parts


def _images(source: Source, files: Sequence[Path], batch: int) -> list[Any]:
    from PIL import Image

    processor = source.processor()
    if processor is None:
        given = tensors_of(source.example)
        if len(given) != 1 or given[0].ndim != 4:
            raise ValueError(f"{source.name} takes no images: its input is {[tuple(each.shape) for each in given]}")
        processor = _resized(*given[0].shape[1:])

    def opened(file: Path) -> Any:
        with Image.open(file) as image:
            return image.convert("RGB")

    return [processor([opened(file) for file in some]) for some in _split(list(files), batch)]


def _resized(channels: int, height: int, width: int) -> Callable[[Sequence[Any]], Tensor]:
    """Images as a network of torchvision takes them: the short side resized, the middle cut out; gray ones where it has
    one channel."""
    if channels not in (1, 3):
        raise ValueError(f"--calibrate holds images, of 1 or 3 channels; the model takes {channels}")
    from PIL import ImageOps

    from openwork.recipes.images import PIXEL_MEAN, PIXEL_STD

    def process(images: Sequence[Any]) -> Tensor:
        arrays = [np.asarray(ImageOps.fit(image, (width, height)), np.float32) / 255 for image in images]
        pixels_NHWC = (np.stack(arrays) - np.array(PIXEL_MEAN, np.float32)) / np.array(PIXEL_STD, np.float32)
        pixels = torch.from_numpy(pixels_NHWC).movedim(-1, 1).contiguous()
        return pixels if channels == 3 else pixels.mean(1, keepdim=True)

    return process


def _of_run(folder: Path, model: nn.Module, samples: int, batch: int, seed: int) -> list[Any]:
    """What the network of a run is called with on training samples, as its loss calls it."""
    from openwork.recipes.trained import read_run

    task, config = read_run(folder)
    data = task.load_data(config)
    drawn = np.random.default_rng(seed).permutation(data.train_count)[:samples]
    calls: list[Any] = []

    def take(_: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append(Call(args, kwargs))
        raise _Taken

    handle = model.register_forward_pre_hook(take, with_kwargs=True)
    try:
        for each in data.train_batches(np.array_split(drawn, math.ceil(len(drawn) / batch)), seed, 0):
            with quiet(model), contextlib.suppress(_Taken):
                task.loss(model, each)
    finally:
        handle.remove()
    return calls


class _Taken(BaseException):
    """The arguments are known: the forward pass is not needed."""
