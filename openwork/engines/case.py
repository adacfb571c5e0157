"""What an engine is given: a network and an example as files in a folder, which a process of its own can read."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openwork.utils.example import arguments, mapped, quiet, run
from openwork.utils.torch_private import tree_leaves
from openwork.utils.torchvision_compat import prepare_torchvision

PRECISIONS = ("float32", "bfloat16", "int8")
"""Each rounds more than the one before."""


class Refused(Exception):
    """An engine does not take this case; the message says why in one line."""


@dataclass(frozen=True)
class Case:
    """One network in one precision, on so many threads. The files of `folder` hold it in float32: `model.pt` as a
    module, `program.pt2` as a program of torch.export, and what `onnx_files` makes of that. `options` are for what is
    no engine of others."""

    folder: Path
    precision: str = "float32"
    threads: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """All of it in one line."""
        return json.dumps({**vars(self), "folder": str(self.folder), "options": dict(self.options)})

    @staticmethod
    def of_json(text: str) -> Case:
        """The case that `to_json` wrote."""
        fields = json.loads(text)
        return Case(Path(fields.pop("folder")), **fields)

    def model(self) -> tuple[nn.Module, Any]:
        """The module and its example, both in bfloat16 where that is the precision."""
        prepare_torchvision()  # a model of it may be what is read
        model, example = torch.load(self.folder / "model.pt", weights_only=False)
        return (
            (model.bfloat16(), in_dtype(example, torch.bfloat16)) if self.precision == "bfloat16" else (model, example)
        )

    def inputs(self) -> list[Any]:
        """The example's tensors as arrays, in the order in which the program takes them."""
        return [tensor.numpy() for tensor in torch.load(self.folder / "inputs.pt")]

    def expected(self) -> list[Tensor]:
        """What the network gives for the example, in torch's float32."""
        found: list[Tensor] = torch.load(self.folder / "expected.pt")
        return found


@dataclass(frozen=True)
class Prepared:
    """What is ready to run: calls by name, each of which gives the network's outputs; which software it is; what there
    is to tell of it, as JSON takes it."""

    calls: Mapping[str, Callable[[], Any]]
    version: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)


def write_module(folder: Path, model: nn.Module, example: Any) -> None:
    """Write `model.pt` and `expected.pt`. The class of the model has to be importable where they are read."""
    torch.save((model, example), folder / "model.pt")
    with quiet(model):
        torch.save(floats(run(model, example)), folder / "expected.pt")


def write_program(folder: Path, model: nn.Module, example: Any, calibration: Sequence[Any] = ()) -> None:
    """Write `program.pt2`, which needs no class, with `inputs.pt`, `expected.pt` and, of more examples, by which int8
    scales are chosen, `calibration.pt` (default: the example alone). Raises Refused where torch.export fails."""
    args, kwargs = arguments(model, example)
    with quiet(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about its own trees
        try:
            program = torch.export.export(model, args, kwargs)
            torch.export.save(program, folder / "program.pt2")
        except Exception as error:  # whatever a model does that cannot be traced
            raise Refused(f"torch.export does not take the network ({first_line(error)})") from error
        torch.save(floats(run(model, example)), folder / "expected.pt")
    given = [_tensors(arguments(model, each)) for each in (example, *calibration)]
    torch.save(given[0], folder / "inputs.pt")
    torch.save(given[1:] or given, folder / "calibration.pt")


def _tensors(given: Any) -> list[Tensor]:
    return [leaf.detach().clone() for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]


def in_dtype(example: Any, dtype: torch.dtype) -> Any:
    """The example with its floating tensors in a dtype.

    >>> in_dtype((torch.ones(1), torch.tensor(2)), torch.bfloat16)
    (tensor([1.], dtype=torch.bfloat16), tensor(2))
    """
    return mapped(example, lambda each: each.to(dtype) if each.is_floating_point() else each)


def floats(outputs: Any) -> list[Tensor]:
    """The floating outputs in float32, of tensors or arrays, in order.

    >>> floats({"a": torch.ones(1, dtype=torch.bfloat16), "b": torch.tensor(2)})
    [tensor([1.])]
    """
    found = [torch.as_tensor(leaf) for leaf in tree_leaves(outputs) if hasattr(leaf, "dtype")]
    return [each.detach().float() for each in found if each.is_floating_point()]


def first_line(error: BaseException, most: int = 160) -> str:
    """What kind of error, and the beginning of what it says.

    >>> first_line(ValueError("one", 2))
    "ValueError: ('one', 2)"
    """
    said = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {said}"[:most].removesuffix(": ")
