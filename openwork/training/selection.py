"""What a user says of which weights are N:M."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from openwork.nm.pattern import Pattern

AxisChoice = Literal["input", "kernel"] | Mapping[str, int]
PatternChoice = str | Pattern | Mapping[str, str | Pattern]
Remainder = Literal["skip", "pad", "error"]


@dataclass(frozen=True)
class Selection:
    """Which weights of a model are N:M, at which pattern, along which axis. `"2:4"` alone is the short form.

    `pattern`: "2:4" for all, or a mapping from globs to patterns, the first match deciding; weights that none matches
    stay dense. None, where a finished model is read, stands for the tightest pattern that each weight has. `exclude`:
    globs of weights or modules. `axis`: "input" groups along the reduction axis; "kernel" is the flat grouping of the
    published results; a mapping from globs to dims names the axis of weights that are not known. `remainder`: what to
    do where M does not divide the axis: "skip" the weight, "pad" the last group, or "error". `transposable`: N:M along
    the output axis as well.

    >>> Selection("2:4", exclude=["head"])
    Selection(pattern=Pattern(n=2, m=4), exclude=('head',), axis='input', remainder='skip', transposable=False)
    """

    pattern: PatternChoice | None = None
    exclude: Sequence[str] = field(default=(), kw_only=True)
    axis: AxisChoice = field(default="input", kw_only=True)
    remainder: Remainder = field(default="skip", kw_only=True)
    transposable: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.remainder not in ("skip", "pad", "error"):
            raise ValueError(f"remainder={self.remainder!r}; needed 'skip', 'pad' or 'error'")
        if isinstance(self.exclude, str):
            raise TypeError(
                f"exclude={self.exclude!r} is one string; needed a list of globs, such as [{self.exclude!r}]"
            )
        if self.axis not in ("input", "kernel") and not isinstance(self.axis, Mapping):
            raise ValueError(f"axis={self.axis!r}; needed 'input', 'kernel' or a mapping from globs to dims")
        if self.transposable and self.pattern is None:
            raise ValueError("transposable=True needs a pattern: what a weight is along two axes is not inferred")
        object.__setattr__(self, "exclude", tuple(self.exclude))
        if isinstance(self.pattern, Mapping):
            object.__setattr__(self, "pattern", {glob: Pattern.parse(text) for glob, text in self.pattern.items()})
        elif self.pattern is not None:
            object.__setattr__(self, "pattern", Pattern.parse(self.pattern))

    @classmethod
    def of(cls, choice: Selection | PatternChoice | None) -> Selection:
        """What was chosen, from its short form or as it is."""
        return choice if isinstance(choice, cls) else cls(choice)  # type: ignore[arg-type]

    @property
    def patterns(self) -> Mapping[str, Pattern]:
        """Glob -> pattern; empty where patterns are to be inferred."""
        if isinstance(self.pattern, Mapping):
            return self.pattern  # type: ignore[return-value]
        return {} if self.pattern is None else {"*": self.pattern}  # type: ignore[dict-item]

    def pattern_of(self, name: str) -> Pattern | None:
        """The pattern of a weight by its name alone; None where it is excluded or no glob names it.

        >>> Selection({"fc": "1:4"}).pattern_of("fc.weight"), Selection("2:4", exclude=["fc"]).pattern_of("fc.weight")
        (Pattern(n=1, m=4), None)
        """
        if any(matches(glob, name) for glob in self.exclude):
            return None
        return next((pattern for glob, pattern in self.patterns.items() if matches(glob, name)), None)


def matches(glob: str, name: str) -> bool:
    """Whether a glob names the weight, its module, or any module around it.

    >>> matches("layer4", "layer4.0.conv1.weight"), matches("*.conv1", "layer4.0.conv1.weight")
    (True, True)
    >>> matches("fc", "fc2.weight")
    False
    """
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:i]), glob) for i in range(1, len(parts) + 1))
