"""Models by name: the small ResNets of this package, then torchvision's, then timm's."""

from __future__ import annotations

import difflib
import importlib.util

from torch import Tensor, nn

from openwork.recipes.resnet_cifar import ResNet, depth_and_stem
from openwork.utils.torchvision_compat import ensure_torchvision

_OWN = tuple(f"resnet{depth}" for depth in (8, 14, 20, 26, 32, 44, 56, 110))


def _grey_to_colour(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].expand(-1, 3, -1, -1), *inputs[1:])


def build_model(name: str, *, classes: int, channels: int, dropout: float = 0.0) -> nn.Module:
    """The named model for images of `channels` channels, with its initial weights from torch's current seed.

    Plain names are looked up here (resnet8, resnet20, ...), in torchvision (resnet18, ...), then in timm; `timm/NAME`
    only in timm.
    """
    if (found := depth_and_stem(name)) is not None:
        depth, stem_stride = found
        return ResNet(depth, classes, channels, dropout=dropout, stem_stride=stem_stride)
    if dropout:
        raise ValueError(f"model {name!r} takes no dropout; it is an option of {', '.join(_OWN)}")
    if not name.startswith("timm/") and (net := _torchvision(name, classes)) is not None:
        if channels == 1:
            net.register_forward_pre_hook(_grey_to_colour)
        return net
    if (net := _timm(name.removeprefix("timm/"), classes, channels)) is not None:
        return net
    raise ValueError(f"unknown model {name!r}{_suggestion(name)}")


def allow_torchvision() -> bool:
    """Whether torchvision is installed; if so it imports from now on. Call it before importing lightning or timm."""
    if importlib.util.find_spec("torchvision") is None:
        return False
    ensure_torchvision()
    return True


def _torchvision(name: str, classes: int) -> nn.Module | None:
    if name not in _torchvision_names():
        return None
    import torchvision

    return torchvision.models.get_model(name, weights=None, num_classes=classes)


def _timm(name: str, classes: int, channels: int) -> nn.Module | None:
    if name not in _timm_names():
        return None
    import timm

    return timm.create_model(name, pretrained=False, num_classes=classes, in_chans=channels)


def _torchvision_names() -> list[str]:
    if not allow_torchvision():
        return []
    import torchvision

    return torchvision.models.list_models(module=torchvision.models)


def _timm_names() -> list[str]:
    if not allow_torchvision() or importlib.util.find_spec("timm") is None:
        return []
    import timm

    return timm.list_models()


def _suggestion(name: str) -> str:
    known = list(dict.fromkeys([*_OWN, *_torchvision_names(), *_timm_names()]))
    close = difflib.get_close_matches(name.removeprefix("timm/"), known, n=5)
    missing = [package for package in ("torchvision", "timm") if importlib.util.find_spec(package) is None]
    hint = f"; close names: {', '.join(close)}" if close else f"; this package has {', '.join(_OWN)}"
    return hint + (f" (not installed, so not searched: {', '.join(missing)})" if missing else "")
