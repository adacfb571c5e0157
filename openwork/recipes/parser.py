"""Command line and configuration files to dataclasses, by jsonargparse."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import jsonargparse
import yaml

from openwork.recipes.config import DEPENDENT, CompareConfig, Config, default_of
from openwork.recipes.method_flags import names_of, option_flags
from openwork.recipes.yaml_files import load_yaml, read_yaml

T = TypeVar("T", Config, CompareConfig)


def build_parser(cls: type[T], prog: str, about: str) -> jsonargparse.ArgumentParser:
    """One flag per field and per option of a method, with help and default; `--config FILE` fills them from YAML."""
    jsonargparse.set_loader("openwork", load_yaml, exceptions=(yaml.YAMLError,))
    parser = jsonargparse.ArgumentParser(prog=prog, description=about, parser_mode="openwork", exit_on_error=True)
    parser.add_argument("--config", action="config", help="YAML file with any of these fields; flags override it")
    parser.add_argument("--task", default=cls.task, help=argparse.SUPPRESS)  # as the config.yaml of a run has it
    hints = get_type_hints(cls)
    for field in fields(cls):
        kind, text, default = hints[field.name], field.metadata["help"], default_of(field)
        if field.name == "method_options":
            many: dict[str, Any] = {"nargs": "*"} if issubclass(cls, CompareConfig) else {}
            for name, (type_, about_it) in option_flags().items():
                parser.add_argument(f"--{name}", type=type_, default=None, help=about_it, **many)
        elif kind is bool and not default:
            parser.add_argument(f"--{field.name}", action="store_true", help=text)
        elif get_origin(kind) is list:
            parser.add_argument(f"--{field.name}", type=get_args(kind)[0], nargs="*", default=default, help=text)
        else:
            parser.add_argument(f"--{field.name}", type=kind, default=default, help=text)
    return parser


def parse(cls: type[T], argv: Sequence[str], prog: str, about: str) -> T:
    """Defaults, then the preset, then --config, then flags."""
    parser, words = build_parser(cls, prog, about), [_normal(word) for word in argv]
    names = [field.name for field in fields(cls) if field.name != "method_options"]
    for file in _config_files(words):  # here, since jsonargparse does not say which file is wrong
        read_yaml(file, "correct it; --help lists the fields")
    values = parser.parse_args(words)
    preset = cls.presets.get(values.preset, {})
    if preset:
        parser.set_defaults({name: value for name, value in preset.items() if name in names and name not in DEPENDENT})
        values = parser.parse_args(words)
    if values.task != cls.task:
        raise ValueError(f"this is a configuration of the task {values.task}, not of {cls.task}: {prog} cannot use it")
    given = {name: values[name] for name in option_flags() if values[name] is not None}
    return cls(**{name: values[name] for name in names}, method_options={**_preset_options(values, preset), **given})


def _preset_options(values: Any, preset: dict[str, Any]) -> dict[str, Any]:
    """The options in a preset that a chosen method has; those of other methods do not matter here."""
    known = {name for method in values.get("methods") or [values.get("method")] for name in names_of(method)}
    options = {name: value for name, value in preset.items() if name in known}
    return {name: [value] for name, value in options.items()} if "methods" in values else options


def _config_files(words: Sequence[str]) -> Iterator[Path]:
    for word, following in zip(words, [*words, ""][1:], strict=True):
        if word == "--config" or word.startswith("--config="):
            path = Path(following if word == "--config" else word.partition("=")[2])
            if not path.is_file():
                raise FileNotFoundError(f"--config {path}: there is no such file")
            yield path


def _normal(word: str) -> str:
    """--batch-size is --batch_size; -2e-4 is -0.0002, which argparse takes for a number and not for a flag."""
    if re.fullmatch(r"-\d*\.?\d+[eE][-+]?\d+", word):
        return f"{float(word):.15f}".rstrip("0")
    name, equals, value = word.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if name.startswith("--") else word
