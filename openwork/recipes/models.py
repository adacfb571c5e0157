"""Models by name: the small ResNets of this package, then torchvision's, then timm's."""

from __future__ import annotations

import difflib
import importlib.util

from torch import Tensor, nn

from openwork.recipes.resnet_cifar import DEPTHS, WIDTH, ResNet, depth_and_stem
from openwork.utils.torchvision_compat import ensure_torchvision

_OWN = [f"resnet{depth}" for depth in DEPTHS]


def build_model(name: str, *, classes: int, channels: int, dropout: float = 0.0, width: int = 0) -> nn.Module:
    """The named model for images of `channels` channels, with its initial weights from torch's current seed.

    Plain names are looked up here (resnet8, resnet20, ...), in torchvision (resnet18, ...), then in timm; `timm/NAME`
    only in timm.
    """
    if (family := depth_and_stem(name)) is not None:
        depth, stem_stride = family
        return ResNet(depth, classes, channels, width or WIDTH, dropout=dropout, stem_stride=stem_stride)
    if given := [option for option, value in (("dropout", dropout), ("width", width)) if value]:
        raise ValueError(f"model {name!r} takes no {given[0]}; it is an option of {', '.join(_OWN)}")
    if name in _torchvision_names():
        from torchvision.models import get_model

        net = get_model(name, weights=None, num_classes=classes)
        if channels == 1:
            net.register_forward_pre_hook(_grey_to_colour)
        return net
    if (short := name.removeprefix("timm/")) in _timm_names():
        import timm

        return timm.create_model(short, pretrained=False, num_classes=classes, in_chans=channels)
    raise ValueError(f"unknown model {name!r}{_suggestion(short)}")


def _grey_to_colour(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].expand(-1, 3, -1, -1), *inputs[1:])


def allow_torchvision() -> bool:
    """Whether torchvision is installed; if so it imports from now on. Call it before importing lightning or timm."""
    if importlib.util.find_spec("torchvision") is None:
        return False
    ensure_torchvision()
    return True


def _torchvision_names() -> list[str]:
    if not allow_torchvision():
        return []
    from torchvision import models

    return models.list_models(module=models)


def _timm_names() -> list[str]:
    if not allow_torchvision() or importlib.util.find_spec("timm") is None:
        return []
    import timm

    return timm.list_models()


def _suggestion(name: str) -> str:
    close = difflib.get_close_matches(name, [*_OWN, *_torchvision_names(), *_timm_names()], n=5)
    missing = [package for package in ("torchvision", "timm") if importlib.util.find_spec(package) is None]
    hint = f"; close names: {', '.join(dict.fromkeys(close))}" if close else f"; this package has {', '.join(_OWN)}"
    return hint + (f" (not installed, so not searched: {', '.join(missing)})" if missing else "")
