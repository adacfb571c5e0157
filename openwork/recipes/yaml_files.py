"""YAML of configurations: 2:4 is a pattern, 2e-4 a number, and a file can neither unfold nor nest without end."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from openwork.utils import atomic

_MOST_BYTES = 1_000_000  # of a text
_MOST_NODES = 10_000  # with every alias written out


class _Loader(yaml.SafeLoader):
    """YAML in which 2:4 is a pattern (YAML 1.1 reads 124, base sixty) and 2e-4 a number."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag.rsplit(":", 1)[1] not in ("int", "float", "timestamp")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?\d+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?$"), list("-+.0123456789")
)


def load_yaml(text: str) -> Any:
    """What a text of YAML holds: plain values only. Raises yaml.YAMLError, also where it is too large or too deep."""
    if len(text) > _MOST_BYTES:
        raise yaml.YAMLError(f"the text has {len(text)} characters; a configuration has at most {_MOST_BYTES}")
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {})
        return loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deep") from None
    except ValueError as error:  # of a constructor, such as of an int of very many digits
        raise yaml.YAMLError(str(error)) from error
    finally:
        loader.dispose()


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """How many nodes a node has with every alias in it written out."""
    if id(node) in known:
        if not known[id(node)]:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: an alias stands inside what it names")
        return known[id(node)]
    known[id(node)] = 0  # begun
    count = 1 + sum(_count(child, known) for child in _children(node))
    if count > _MOST_NODES:
        raise yaml.YAMLError(
            f"line {node.start_mark.line + 1}: its aliases unfold to more than {_MOST_NODES} values; write them out"
        )
    known[id(node)] = count
    return count


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        yield from node.value
    elif isinstance(node, yaml.MappingNode):
        for pair in node.value:
            yield from pair


def read_yaml(path: Path, advice: str) -> dict[str, Any]:
    """The fields in a YAML file; ValueError names the file, what was found, and gives the advice."""
    try:
        values = load_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML ({' '.join(str(error).split())}); {advice}") from error
    if not isinstance(values, dict) or not values or not all(isinstance(name, str) for name in values):
        found = "nothing" if values is None else type(values).__name__ if not isinstance(values, dict) else "other keys"
        raise ValueError(f"{path} holds {found}; needed are names of fields with their values; {advice}")
    return values


def write_yaml(path: Path, values: dict[str, Any]) -> None:
    """Write fields to a file, whole or not at all, and make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(path, yaml.safe_dump(values, sort_keys=False))
