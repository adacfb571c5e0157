"""Methods as flags: any that `openwork.methods.METHODS` lists, the fields of its dataclass being its own flags. The
field `schedule` is the flag `mask_schedule`, since `schedule` is that of the learning rate; it may be absent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any, get_type_hints

from openwork.methods import METHODS, Dense
from openwork.recipes.mask_schedules import FORM, parse_schedule

DENSE = Dense.name
MASK_SCHEDULE = "mask_schedule"
_FIELD = "schedule"


def check_methods(names: Iterable[str]) -> None:
    if unknown := [name for name in names if name not in METHODS]:
        raise ValueError(f"method {', '.join(map(repr, unknown))} is not known; use one of {', '.join(METHODS)}")


def defaults_of(method: str) -> dict[str, Any]:
    """The options of a method with their defaults (None where it has none); none of an unknown method. Without
    `mask_schedule`."""
    listed = [field for field in fields(METHODS[method]) if field.name != _FIELD] if method in METHODS else []
    return {field.name: None if field.default is MISSING else field.default for field in listed}


def names_of(method: str) -> list[str]:
    """The names of all options of a method; none of an unknown one."""
    listed = fields(METHODS[method]) if method in METHODS else ()
    return [*defaults_of(method), *[MASK_SCHEDULE for field in listed if field.name == _FIELD]]


def options_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options in a stored configuration."""
    return {name: config[name] for name in names_of(config["method"]) if name in config}


def check_options(options: Iterable[str], methods: Iterable[str]) -> None:
    known = dict.fromkeys(name for method in methods for name in names_of(method))
    if unknown := [name for name in options if name not in known]:
        has = f"has {', '.join(f'--{name}' for name in known)}" if known else "has none"
        raise ValueError(f"--{unknown[0]} is no option of {', '.join(methods)}, which {has}")


def option_flags() -> dict[str, tuple[type, str]]:
    """Every option of any method: its type, and a help text with the methods and their defaults."""
    types: dict[str, type] = {}
    texts: dict[str, list[str]] = {}
    for method, cls in METHODS.items():
        hints = get_type_hints(cls)
        for name, value in defaults_of(method).items():
            types.setdefault(name, hints[name])
            texts.setdefault(name, []).append(f"{method} (default: {value})")
    flags = {name: (kind, f"option of {', '.join(texts[name])}") for name, kind in types.items()}
    scheduled = ", ".join(method for method in METHODS if MASK_SCHEDULE in names_of(method))
    return {**flags, MASK_SCHEDULE: (str, f"option of {scheduled}: {FORM}")}


def build_method(name: str, options: Mapping[str, Any]) -> Any:
    given = dict(options)
    schedule = {_FIELD: parse_schedule(given.pop(MASK_SCHEDULE))} if MASK_SCHEDULE in given else {}
    return METHODS[name](**given, **schedule)


def ends_sparse(config: Mapping[str, Any]) -> bool:
    """Whether the network of a stored configuration is N:M in the end."""
    sparse: bool = build_method(config["method"], options_of(config)).ends_sparse
    return sparse


def is_sparse(method: str) -> bool:
    """Whether a method leaves N:M weights; dense training only observes the mask that it would have."""
    return METHODS[method].sparse


def starts_trained(method: str) -> bool:
    """Whether a method prunes once, and so wants trained weights: ASP."""
    return METHODS[method].prunes_trained


def budget_of(method: str) -> int:
    """How many trainings a method takes, counting that of the weights it starts from."""
    return 2 if starts_trained(method) else 1


def mask_steps(config: Mapping[str, Any]) -> int:
    """After how many steps a mask is chosen anew and changes at once; 0 where it may change in every step."""
    return build_method(config["method"], options_of(config)).schedule.refresh_every or 0


def rank_of(method: str) -> int:
    """Place in tables and charts: that of the registry."""
    return [*METHODS].index(method)


def label_of(config: Mapping[str, Any]) -> str:
    """What tells a run's method apart: "dense", "ste 2:4", "sr-ste 2:4 decay=0.0002"."""
    pattern = [] if config["method"] == DENSE else [config["pattern"]]
    return " ".join([config["method"], *pattern, *option_texts(options_of(config))])


def option_texts(options: Mapping[str, Any]) -> list[str]:
    """What a label says of options; nothing of those that are off."""
    said = {name: f"{value:g}" if isinstance(value, float) else value for name, value in options.items()}
    return [f"{name}={value}" for name, value in said.items() if value is not False]
