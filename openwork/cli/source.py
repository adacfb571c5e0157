"""One way to name a model on the command line, and an example of its input."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from openwork.files.checkpoint import describe, load
from openwork.files.download import shown
from openwork.files.header import read_header
from openwork.files.hub import is_address
from openwork.files.reader import open_files
from openwork.files.strict_json import read_json
from openwork.nm.pattern import Pattern
from openwork.training.parametrize import unwrap
from openwork.training.record import sparsity_records
from openwork.training.selection import Remainder, Selection
from openwork.utils.example import Call
from openwork.utils.torch_private import tree_map_only

FORMS = """\
SOURCE names a model:
  package.module:factory  a function or class that makes it, with --input (its code is run, as by any import)
  a run directory         of openwork train, which knows the model, an input and the patterns
  a Hugging Face folder   config.json of transformers and *.safetensors; --input, if the configuration does not say it;
                          hf://NAME fetches one from the Hub
  a .gguf file            of a language model that transformers reads, its weights made float32
  a compressed file       of ow.save, or what else ow.load reads (a folder, an http(s) address, a name on the Hugging
                          Face Hub), with --model package.module:factory and --input
  a name alone            a model of torchvision with random weights, such as resnet50, at 3x224x224; or encoder,
                          that of BERT-base and ViT-B at 197 tokens; or bert, 6 layers of BERT-base at 128

--input gives the shape of each argument, with 'x' between sizes, a dtype other than float32 after ':', and a name
before '=' for keyword arguments: 1x3x224x224, or ids=1x128:int64 mask=1x128:bool. Its numbers are random.
"""
_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
_TOKENS = 128  # of an example for a language model


@dataclass(frozen=True)
class Source:
    """A model in eval mode, an example of its input, and what is known of its sparsity: the `selection` that it is held
    to, None where nobody says. `random` weights were never trained. `run`: the directory of a run; `pretrained`: what
    transformers' from_pretrained loads the rest of the model by, such as its tokenizer."""

    name: str
    model: nn.Module
    example: Any
    selection: Selection | None = None
    method: str = ""
    random: bool = False
    run: str = ""
    pretrained: Mapping[str, Any] = field(default_factory=dict)

    def tokenizer(self) -> Any:
        """The tokenizer that belongs to the model. Raises ValueError where there is none."""
        if not self.pretrained:
            raise ValueError(
                f"{self.name} has no tokenizer; needed a Hugging Face folder, a name on the Hub or a GGUF file"
            )
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(**self.pretrained)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{self.name} has no tokenizer that transformers reads: {error}") from error

    def processor(self) -> Callable[[Sequence[Any]], Any] | None:
        """What makes an input of images; None where nothing belongs to the model."""
        if not self.pretrained:
            return None
        from transformers import AutoImageProcessor

        try:
            made = AutoImageProcessor.from_pretrained(**self.pretrained)
        except (OSError, ValueError):
            return None
        return lambda images: dict(made(images, return_tensors="pt"))

    def save_beside(self, folder: Path) -> None:
        """Write what belongs to the model besides: its tokenizer or image processor."""
        if not self.pretrained:
            return
        from transformers import AutoImageProcessor, AutoTokenizer

        for cls in (AutoTokenizer, AutoImageProcessor):
            with contextlib.suppress(OSError, ValueError, KeyError):
                cls.from_pretrained(**self.pretrained).save_pretrained(folder)

    @property
    def is_sparsified(self) -> bool:
        """Whether the model itself records its patterns, so that no other can be asked of it."""
        return bool(sparsity_records(unwrap(self.model)))

    def check_recorded(self, pattern: str | None, exclude: Sequence[str]) -> None:
        """Raises ValueError where patterns are asked of a source that records its own."""
        if pattern or exclude:
            raise ValueError(f"{self.name} records its patterns: leave --pattern and --exclude out")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """SOURCE's --model and --input."""
    parser.add_argument(
        "--model", default="", metavar="MODULE:FACTORY", help="what makes the model of a compressed file"
    )
    parser.add_argument("--input", nargs="+", default=(), metavar="SHAPE", help="of each argument, such as 1x3x224x224")


def open_model(source: str, *, model: str = "", shapes: Sequence[str] = (), needs_input: bool = True) -> Source:
    """The model that SOURCE names; its example may be None where no input is needed. Raises ValueError that says what
    was found and which forms there are."""
    path = Path(source)
    if (path / "config.yaml").exists():
        opened = _of_run(path, shapes)
    elif (path / "config.json").exists() and not model:
        opened = _of_transformers(path, shapes)
    elif source.startswith("hf://") and not model:
        opened = _of_hub(source, shapes)
    elif path.suffix == ".gguf" and path.exists():
        opened = _of_gguf(path, shapes)
    elif ":" in source and not path.exists() and not is_address(source):
        opened = Source(source, make(source, "SOURCE"), _example(source, shapes, needs_input))
    elif model:
        opened = _of_file(source, model, _example(source, shapes, needs_input))
    elif path.exists() or "/" in source or path.suffix:
        raise _unknown(source)
    else:
        opened = _by_name(source)
    opened.model.eval()
    if shapes:
        check_takes(opened.model, opened.example, "--input")
    return opened


def check_takes(model: nn.Module, example: Any, what: str) -> None:
    """Raises ValueError where `what` names arguments that the model does not have, or too few or many."""
    takes = inspect.signature(model.forward)
    if isinstance(example, Mapping):
        call = Call(kwargs=example)
    elif not isinstance(example, Call):
        call = Call(example if isinstance(example, tuple) else (example,))
    else:
        call = example
    try:
        takes.bind(*call.args, **call.kwargs)
    except TypeError as error:
        raise ValueError(f"{what}: {error}; {type(model).__name__}.forward takes {takes}") from error


def with_batch(example: Any, batch: int) -> Any:
    """The first sample of each tensor of an example, `batch` times.

    Raises ValueError where that is none.

    >>> with_batch({"x": torch.tensor([[1.0], [2.0]])}, 3)["x"].tolist()
    [[1.0], [1.0], [1.0]]
    """
    if batch < 1:
        raise ValueError(f"a batch of {batch} samples; needed at least 1")
    return tree_map_only(Tensor, lambda tensor: torch.cat([tensor[:1]] * batch), example)


def example_of(shapes: Sequence[str]) -> Any:
    """Random numbers of the shapes that --input gives: one tensor, a tuple of them, or a mapping where they have names.

    >>> example_of(["2x3"]).shape, example_of(["a=1x2:int64"])["a"].dtype
    (torch.Size([2, 3]), torch.int64)
    """
    generator = torch.Generator().manual_seed(0)
    named = [(name, _random(text, generator)) for name, text in (_split_name(shape) for shape in shapes)]
    names = [name for name, _ in named if name]
    if names and len(names) < len(named):
        raise ValueError(f"--input {' '.join(shapes)}: needed names for all of them, or for none")
    if names:
        return dict(named)
    return named[0][1] if len(named) == 1 else tuple(tensor for _, tensor in named)


def _split_name(text: str) -> tuple[str, str]:
    name, _, shape = text.rpartition("=")
    return name, shape


def _random(text: str, generator: torch.Generator) -> Tensor:
    match = re.fullmatch(r"(\d+(?:x\d+)*)(?::(\w+))?", text)
    if not match or (match[2] or "float32") not in _DTYPES:
        raise ValueError(
            f"--input {text}: needed sizes with 'x' between them, such as 1x3x224x224, and perhaps one of "
            f"{', '.join(_DTYPES)} after ':'"
        )
    sizes, dtype = [int(size) for size in match[1].split("x")], getattr(torch, match[2] or "float32")
    if dtype.is_floating_point:
        return torch.randn(sizes, generator=generator).to(dtype)
    if dtype == torch.bool:
        return torch.ones(sizes, dtype=dtype)
    return torch.randint(2, sizes, generator=generator).to(dtype)


def make(name: str, what: str = "--model") -> nn.Module:
    """What package.module:factory makes; modules of the current folder are found."""
    module, _, function = name.partition(":")
    if not (module and function):
        raise ValueError(f"{what} {name}: needed package.module:factory")
    with _current_folder():
        torch.manual_seed(0)
        try:
            factory: Callable[[], Any] = getattr(importlib.import_module(module), function)
            model = factory()
        except (ImportError, AttributeError, TypeError) as error:  # TypeError: it needs arguments
            raise ValueError(f"{what} {name}: {error}; needed a function or class that takes no argument") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{what} {name} gives a {type(model).__name__}; needed an nn.Module")
    return model.eval()


@contextlib.contextmanager
def _current_folder() -> Iterator[None]:
    """Modules of the current folder can be imported."""
    sys.path.insert(0, os.getcwd())
    try:
        yield
    finally:
        sys.path.remove(os.getcwd())


def _example(source: str, shapes: Sequence[str], needed: bool) -> Any:
    if not shapes:
        if not needed:
            return None
        raise ValueError(f"{shown(source)} does not say what its input is: add --input SHAPE, such as 1x3x224x224")
    return example_of(shapes)


def check_finished(folder: Path) -> None:
    """Raises FileNotFoundError for a run of `openwork train` that has no network yet."""
    if (folder / "config.yaml").exists() and not (folder / "model.safetensors").exists():
        raise FileNotFoundError(
            f"{folder} is a run that did not finish: it has no model.safetensors yet; "
            f"openwork train TASK --config {folder / 'config.yaml'} --resume goes on with it"
        )


def _of_run(folder: Path, shapes: Sequence[str]) -> Source:
    from openwork.recipes.trained import load_run

    check_finished(folder)
    net, example, config, _ = load_run(folder)
    selection = None
    if config.method != "dense":
        selection = Selection(config.pattern, exclude=config.exclude, remainder=cast(Remainder, config.remainder))
    example = example_of(shapes) if shapes else example
    return Source(str(folder), net, example, selection, config.method, run=str(folder))


def _of_file(source: str, factory: str, example: Any) -> Source:
    model = load(source, into=make(factory))
    patterns: dict[str, str | Pattern] = {
        entry.name: entry.pattern for entry in describe(source) if entry.pattern and not entry.alias_of
    }
    return Source(shown(source), model, example, Selection(patterns) if patterns else None)


def _of_transformers(folder: Path, shapes: Sequence[str]) -> Source:
    """The class that the configuration names, with the weights and in the dtype that are stored. Nothing is fetched."""
    from openwork.utils.torchvision_compat import prepare_torchvision

    prepare_torchvision()
    import transformers

    config = read_json(folder / "config.json")
    if "model_type" not in config:
        raise ValueError(f"{folder / 'config.json'} has no model_type: it is no configuration of transformers")
    name = next(iter(config.get("architectures") or []), "")
    cls = getattr(transformers, name, None) or transformers.AutoModel
    model = cls.from_pretrained(folder, local_files_only=True, dtype="auto", use_safetensors=True).eval()
    return _pretrained(model, str(folder), shapes, pretrained_model_name_or_path=folder, local_files_only=True)


def _of_hub(source: str, shapes: Sequence[str]) -> Source:
    """The class that the configuration of a model on the Hub names, with its weights: they are fetched."""
    from openwork.utils.torchvision_compat import prepare_torchvision

    prepare_torchvision()
    import transformers

    name = source.removeprefix("hf://")
    config = transformers.AutoConfig.from_pretrained(name)
    cls = getattr(transformers, next(iter(config.architectures or []), ""), None) or transformers.AutoModel
    model = cls.from_pretrained(name, dtype="auto", use_safetensors=True).eval()
    return _pretrained(model, source, shapes, pretrained_model_name_or_path=name)


def _of_gguf(file: Path, shapes: Sequence[str]) -> Source:
    """A language model; what its weights are rounded to stays, as float32."""
    from openwork.utils.torchvision_compat import prepare_torchvision

    prepare_torchvision()
    import transformers

    place: dict[str, Any] = {
        "pretrained_model_name_or_path": file.parent,
        "gguf_file": file.name,
        "local_files_only": True,
    }
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32).eval()
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        raise ValueError(
            f"{file} is a GGUF file that transformers does not read as a language model ({error}); give the Hugging "
            "Face folder that it was made of, or a file of ow.save"
        ) from error
    if getattr(model, "hf_quantizer", None) is not None:  # the weights are plain by now, so that they can be saved
        model.hf_quantizer, model.is_quantized = None, False
        del model.config.quantization_config
    return _pretrained(model, str(file), shapes, **place)


def _pretrained(model: Any, name: str, shapes: Sequence[str], **place: Any) -> Source:
    model.config.use_cache = False
    return Source(name, model, example_of(shapes) if shapes else _example_for(model), pretrained=place)


def _example_for(model: Any) -> Mapping[str, Tensor]:
    """An input made from a model's configuration: tokens or pixels."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    text = config.get_text_config()
    if model.main_input_name == "input_ids" and hasattr(text, "vocab_size"):
        tokens = min(_TOKENS, getattr(text, "max_position_embeddings", _TOKENS))
        ids = torch.randint(text.vocab_size, (1, tokens), generator=generator)
        return {"input_ids": ids} | ({"decoder_input_ids": ids} if config.is_encoder_decoder else {})
    if model.main_input_name == "pixel_values" and isinstance(getattr(config, "image_size", None), int):
        shape = (1, getattr(config, "num_channels", 3), config.image_size, config.image_size)
        return {"pixel_values": torch.randn(shape, generator=generator).to(model.dtype)}
    raise ValueError(f"the configuration of {type(model).__name__} does not say what its input is: add --input SHAPE")


def _by_name(name: str) -> Source:
    torch.manual_seed(0)
    if name == "encoder":
        from openwork.bench import models

        return Source(name, models.Encoder(), torch.randn(1, 197, 768), random=True)
    if name == "bert":
        from openwork.bench import models

        return Source(name, models.BertLayers(), torch.randn(1, 128, 768), random=True)
    from openwork.utils.torchvision_compat import ensure_torchvision

    known = ensure_torchvision().models
    try:
        model = known.get_model(name, weights=None)
    except ValueError as error:
        raise ValueError(f"{name} is no file or folder here, and no model of torchvision: {error}; {_HELP}") from error
    return Source(name, model, torch.randn(1, 3, 224, 224), random=True)


_HELP = "--help lists what names a model"


def _unknown(source: str) -> ValueError:
    path = Path(source)
    if path.is_dir():
        names = ", ".join(sorted(file.name for file in path.iterdir())[:5]) or "nothing"
        return ValueError(
            f"{source} is a folder with {names}; needed a run's config.yaml, transformers' config.json, or --model "
            f"MODULE:FACTORY for a compressed file in it; {_HELP}"
        )
    if not is_address(source) and not path.exists():
        meant = f"; weights on the Hugging Face Hub are named hf://{source}" if source.count("/") == 1 else ""
        return ValueError(f"there is no {source}{meant}; {_HELP}")
    if path.exists():
        with open_files(path, [path]) as (file,):
            read_header(file)  # says what else the file is
    return ValueError(f"{shown(source)} is weights and no model: add --model MODULE:FACTORY and --input SHAPE; {_HELP}")
