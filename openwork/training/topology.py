"""Watch the topology of a network settle: a recorder of SAD during training, at one bit a weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol
from weakref import ref

from torch import Tensor, nn

from openwork.ops import foreach_pack, foreach_packed_sad

_SPANS = ("start", "last", "step")


class Source(Protocol):
    """What counts the steps: a handle."""

    @property
    def serving(self) -> bool:
        """Whether it still does."""


class Topology:
    """Records SAD every `every` optimizer steps: since the start, since the last record, and over the one step.

    Hand it to `attach`. `records` holds one JSON-ready dict a record:

        {"step": 200, "weights": W, "sad_start": s, "sad_last": s, "sad_step": s,
         "layers": {name: {"weights": w, "sad_start": s, "sad_last": s, "sad_step": s}}}

    SAD is in weights (see `ow.sad`); divided by "weights" it is the flip rate, and `sad_step` / "weights"
    the flip rate. Steps count from 1, and skipped steps (overflow under a loss scale) do not count. With `keep=True`
    the masks of every record are kept, at one bit a weight, and `between` compares any two of them.

    One recorder is for one model and, at a time, one optimizer. Attached again, it goes on counting from `steps`.

    >>> import torch, openwork as ow
    >>> _ = ow.sparsify(model := torch.nn.Linear(8, 4), "2:4")
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> handle = ow.attach(optimizer, model, topology=(topology := ow.Topology(every=1)))
    >>> model(torch.randn(2, 8)).sum().backward()
    >>> optimizer.step()
    >>> topology.records[-1]["step"], topology.records[-1]["weights"], sorted(topology.scalars())
    (1, 32, ['flip_rate/last', 'flip_rate/start', 'flip_rate/step', 'sad/last', 'sad/start', 'sad/step'])
    """

    def __init__(self, every: int = 100, *, keep: bool = False):
        if every < 1:
            raise ValueError(f"every={every}; needed the number of steps between records, 1 or more")
        self.every = every
        self.records: list[dict[str, Any]] = []
        self.snapshots: dict[int, dict[str, Tensor]] = {}
        self.steps = 0
        self._keep = keep
        self._weights: dict[str, int] = {}
        self._model: ref[nn.Module] | None = None
        self._source: ref[Source] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None, "_source": None}  # a copy records something else

    def attach(self, source: Source, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        """Begin, or go on, with the masks of a model, at the steps that a handle counts."""
        other = self._source() if self._source else None
        if other is not None and other is not source and other.serving:
            raise ValueError(
                "this Topology records the steps of another optimizer, which is attached still: call detach() on that "
                "handle first, or use one recorder for each optimizer"
            )
        if self._model and self._model() is not model:
            raise ValueError(f"this Topology recorded another {type(model).__name__}: use one recorder for each model")
        if self.snapshots:
            self._check_begun(masks)
        else:
            self.begin(masks)
        self._model, self._source = ref(model), ref(source)

    def begin(self, masks: Mapping[str, Tensor]) -> None:
        """The masks before the first step. What was recorded before is forgotten, and of which model."""
        self.records, self.steps, self._model = [], 0, None
        self._weights = {name: mask.numel() for name, mask in masks.items()}
        self.snapshots = {0: _packed(masks)} if masks else {}

    def due(self, step: int) -> bool:
        """Whether a record is made after step `step`."""
        return step % self.every == 0

    def record(self, step: int, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Any]:
        """Add a record of the masks before and after step `step`, and return it."""
        self._check_begun(after)
        now, self.steps = _packed(after), step
        last = self.snapshots[max(self.snapshots)]
        others = {"start": self.snapshots[0], "last": last, "step": _packed(before)}
        layers: dict[str, dict[str, int]] = {name: {"weights": self._weights[name]} for name in now}
        for span, bits in others.items():
            for name, count in _sads(bits, now).items():
                layers[name][f"sad_{span}"] = count
        keys = ("weights", *(f"sad_{span}" for span in others))
        totals = {key: sum(layer[key] for layer in layers.values()) for key in keys}
        if not self._keep:
            self.snapshots = {0: self.snapshots[0]}
        elif len(self.snapshots) > 1:  # on a GPU stay the first and the last
            self.snapshots[max(self.snapshots)] = {name: bits.cpu() for name, bits in last.items()}
        self.snapshots[step] = now
        self.records.append({"step": step, **totals, "layers": layers})
        return self.records[-1]

    def between(self, a: int, b: int) -> dict[str, int]:
        """SAD of each weight between the records of two steps (0 is the start), and in total under ""."""
        missing = [step for step in (a, b) if step not in self.snapshots]
        if missing:
            raise ValueError(f"no masks of steps {missing}; there are {sorted(self.snapshots)} (all, with keep=True)")
        sads = _sads(self.snapshots[a], self.snapshots[b])
        return sads | {"": sum(sads.values())}

    def scalars(self) -> dict[str, float]:
        """The last record in total, for a logger: SAD in weights and the flip rate as a share, by span."""
        if not self.records:
            return {}
        last = self.records[-1]
        sads = {f"sad/{span}": float(last[f"sad_{span}"]) for span in _SPANS}
        return sads | {f"flip_rate/{span}": last[f"sad_{span}"] / last["weights"] for span in _SPANS}

    def state_dict(self) -> dict[str, Any]:
        """Everything that an exact resume needs, on the CPU."""
        snapshots = {step: {name: bits.cpu() for name, bits in masks.items()} for step, masks in self.snapshots.items()}
        return {
            "records": list(self.records),
            "snapshots": snapshots,
            "weights": dict(self._weights),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()` of a run of the same model."""
        self.records = list(state["records"])
        self.snapshots = {
            step: {name: bits.cpu() for name, bits in masks.items()}  # a checkpoint may have been loaded to a GPU
            for step, masks in state["snapshots"].items()
        }
        self._weights = dict(state["weights"])
        self.steps, self._model = max(self.snapshots, default=0), None

    def _check_begun(self, masks: Mapping[str, Tensor]) -> None:
        if not self.snapshots:
            raise ValueError("record before begin(masks): `attach` calls it, so hand the recorder to attach")
        changed = sorted(self._weights.keys() ^ masks.keys())
        if changed:
            raise ValueError(f"other weights than at the start, in {changed[:3]}; use one recorder for each model")


def _packed(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The bits of each mask, where the mask is."""
    return dict(_by_device(masks, masks, lambda kept, _: foreach_pack(kept)))


def _sads(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, int]:
    """SAD of each mask of `b` from that of `a`, which may come from a checkpoint and lie elsewhere."""
    return dict(_by_device(a, b, foreach_packed_sad))


def _by_device(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], function: Callable[[list[Tensor], list[Tensor]], list[Any]]
) -> Iterator[tuple[str, Any]]:
    """What `function` makes of all pairs of tensors on one device, by name, in the order of `b`."""
    results: dict[str, Any] = dict.fromkeys(b)
    for device in {mask.device for mask in b.values()}:
        here = {name: mask for name, mask in b.items() if mask.device == device}
        results |= zip(here, function([a[name].to(device) for name in here], list(here.values())), strict=True)
    yield from results.items()
