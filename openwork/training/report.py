"""The report: every candidate weight, sparse or not and why, with what it costs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from openwork.nm.pattern import Pattern
from openwork.utils.counted import counted
from openwork.utils.table import aligned


@dataclass(frozen=True)
class Row:
    """One candidate weight. `pattern` is None where it was left alone; where it is dense, so or by N = M, `reason` says
    why.

    Units: `weights`, `kept` and `groups` in weights and groups; `weight_bits` bits a weight; `macs` multiply-adds of
    the example (None without one); `retained` is the kept share of the sum of squared weights (None of what is pruned
    already).
    """

    name: str
    shape: tuple[int, ...]
    pattern: Pattern | None
    reason: str
    kept: int
    retained: float | None
    groups: int = 0
    weight_bits: int = 32
    macs_dense: int | None = None

    @property
    def is_sparse(self) -> bool:
        """Whether its pattern prunes: N < M."""
        return self.pattern is not None and not self.pattern.is_dense

    @property
    def weights(self) -> int:
        size = 1
        for length in self.shape:
            size *= length
        return size

    @property
    def density(self) -> float:
        """Share of the weights that are kept, measured on the mask; 1 of a tensor without any."""
        return self.kept / self.weights if self.weights else 1.0

    @property
    def macs_sparse(self) -> int | None:
        """Multiply-adds that are left: in the share of the weights kept."""
        return None if self.macs_dense is None else round(self.macs_dense * self.density)

    @property
    def bytes_dense(self) -> int:
        return self.weights * self.weight_bits // 8

    @property
    def bytes_sparse(self) -> int:
        """Kept values plus the index bits that say where they are."""
        index_bits = self.pattern.index_bits * self.groups if self.pattern else 0
        return (self.kept * self.weight_bits + index_bits + 7) // 8


@dataclass(frozen=True)
class Products:
    """The products of one forward pass that have a weight, a buffer or another constant as an operand; those of data
    with data are not among them. `sparse` and `dense` count them. What may be dense is named with the reason in
    `declared`, and what was found in `allowed`."""

    sparse: int
    dense: int
    declared: Mapping[str, str]
    allowed: Mapping[str, str]

    def lines(self, known: Collection[str] = ()) -> list[str]:
        """The counts, and what is dense other than the `known`."""
        parts = [
            f"{counted(self.sparse + self.dense, 'product')} of weights and other constants",
            f"{self.sparse} sparse",
        ]
        parts += [f"{self.dense} dense"] if self.dense else []
        others = {name: reason for name, reason in self.declared.items() if name not in known}
        lines = ["; ".join(parts), *(f"  dense: {name} ({reason})" for name, reason in others.items())]
        return lines + [
            f"  dense, not accounted for but allowed: {name} ({found})" for name, found in self.allowed.items()
        ]

    def __str__(self) -> str:
        return "\n".join(self.lines())


@dataclass(frozen=True)
class Report:
    """What `sparsify`, `project` and `verify` found, weight by weight. `str()` is a table in plain text.

    `other_parameters` counts what is no candidate (biases, norms); `other_macs` the multiply-adds that no
    candidate weight takes part in, such as attention's. `products` is what `verify` saw multiplied, None where nothing
    was run.

    >>> import torch, openwork as ow
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    >>> report = ow.sparsify(model, "2:4", exclude=["2"], example=torch.randn(1, 8))
    >>> report.sparse, report.skipped, report.macs_sparse
    ({'0.weight': Pattern(n=2, m=4)}, {'2.weight': "excluded by '2'"}, 112)
    """

    rows: tuple[Row, ...]
    title: str
    other_parameters: int = 0
    other_macs: int = 0
    notes: tuple[str, ...] = field(default=())
    products: Products | None = None

    @property
    def sparse(self) -> dict[str, Pattern]:
        """Sparse weights and their patterns."""
        return {row.name: row.pattern for row in self.rows if row.pattern and row.is_sparse}

    @property
    def skipped(self) -> dict[str, str]:
        """Dense weights and the reasons."""
        return {row.name: row.reason for row in self.rows if not row.is_sparse}

    @property
    def parameters_dense(self) -> int:
        return sum(row.weights for row in self.rows) + self.other_parameters

    @property
    def parameters_sparse(self) -> int:
        """Parameters that are left, without index bits (see `Row.bytes_sparse`)."""
        return sum(row.kept for row in self.rows) + self.other_parameters

    @property
    def macs_dense(self) -> int | None:
        """Multiply-adds of the example's forward pass; None when no example was given."""
        return self._total([row.macs_dense for row in self.rows])

    @property
    def macs_sparse(self) -> int | None:
        return self._total([row.macs_sparse for row in self.rows])

    def _total(self, macs: Sequence[int | None]) -> int | None:
        known = [count for count in macs if count is not None]
        return sum(known) + self.other_macs if len(known) == len(macs) else None

    @property
    def summary(self) -> str:
        """One line: how many weights are sparse, what is left of parameters, bytes and MACs."""
        before, after = self.parameters_dense, self.parameters_sparse
        parts = [
            f"{counted(len(self.sparse), 'weight')} sparse, {len(self.skipped)} dense",
            f"parameters {count(before)} -> {count(after)} ({after / before:.1%})",
            f"candidate bytes with index bits {self._share_of_bytes():.1%} of dense",
        ]
        if self.macs_dense and self.macs_sparse is not None:
            share = self.macs_sparse / self.macs_dense
            parts.append(f"MACs {count(self.macs_dense)} -> {count(self.macs_sparse)} ({share:.1%})")
        return "; ".join(parts)

    def _share_of_bytes(self) -> float:
        return sum(row.bytes_sparse for row in self.rows) / max(1, sum(row.bytes_dense for row in self.rows))

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and cells, for printing."""
        has_macs, pruned = self.macs_dense is not None, all(row.retained is None for row in self.rows)
        header = ["weight", "shape", "pattern", "density", *["retained"] * (not pruned), "weights", "bytes"]
        return header + ["MACs"] * has_macs + ["reason"], [_cells(row, has_macs) for row in self.rows]

    def __str__(self) -> str:
        return "\n".join([self.title, *aligned(*self.table()), *self._after_table()])

    def _after_table(self) -> list[str]:
        products = self.products.lines([row.name for row in self.rows]) if self.products else []
        return [self.summary, *products, *self.notes]

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table

        header, lines = self.table()
        table = Table(*header, title=self.title, title_justify="left")
        for cells in lines:
            table.add_row(*cells)
        return Group(table, *self._after_table())


def keeps_all(pattern: Pattern) -> str:
    """The reason why a weight of this pattern is dense; empty where it is sparse."""
    return f"{pattern} keeps every weight" if pattern.is_dense else ""


def count(number: int) -> str:
    """A count for people.

    >>> count(25_557_032), count(512)
    ('25.56M', '512')
    """
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.4g}{unit}"
    return str(number)


def _cells(row: Row, has_macs: bool) -> list[str]:
    def change(before: int, after: int) -> str:
        return count(before) if before == after else f"{count(before)} -> {count(after)}"

    cells = [row.name, "x".join(map(str, row.shape)), str(row.pattern or "dense"), f"{row.density:.3f}"]
    cells += [] if row.retained is None else [f"{row.retained:.3f}"]
    cells += [change(row.weights, row.kept), change(row.bytes_dense, row.bytes_sparse)]
    return cells + [change(row.macs_dense or 0, row.macs_sparse or 0)] * has_macs + [row.reason]
