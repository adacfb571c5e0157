"""transformers and lightning import torchvision, which may be broken where it was built for another torch."""

from openwork.utils.torchvision_compat import prepare_torchvision

prepare_torchvision()
