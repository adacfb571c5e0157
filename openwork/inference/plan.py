"""What was measured of each layer, and what is chosen: the tables of `openwork.plan` and `openwork.deploy`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

import openwork.kernels as kernels
from openwork.kernels.cuda import cusparselt
from openwork.layouts.layout import Algorithm
from openwork.nm.pattern import Pattern
from openwork.utils.counted import counted
from openwork.utils.table import aligned
from openwork.utils.timing import MARGIN

INT8_NETWORK = "int8 network"
"""The name of the model whose activations are int8 from layer to layer, among whole models that are timed."""


@dataclass(frozen=True)
class LayerTiming:
    """One weight of a plan. Times in seconds for one forward of the example, all calls of the layer; `dense` is the
    best of those measured, named by `dense_by`; `kind` names the kernel chosen, None where the layer stays dense, and
    `reason` says why. `algorithms`: by rows of input, the one that the kernel was timed with, where it has several."""

    name: str
    shape: tuple[int, ...]
    pattern: Pattern | None
    inputs: tuple[tuple[int, ...], ...] = ()
    dense: float = 0.0
    dense_by: str = ""
    sparse: float = 0.0
    kind: str | None = None
    reason: str = ""
    algorithms: Mapping[int, Algorithm] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Dense time over sparse time: above 1 where sparse is faster."""
        return self.dense / self.sparse if self.sparse else 0.0


@dataclass(frozen=True)
class OtherEngines:
    """Other software that runs the dense network on this CPU, beside the model that `deploy` returned, in turns:
    `times`, the median seconds of one forward by name, version and precision, and `returned`, that model's in the same
    rounds. `left_out`: why one was not compared, by name."""

    times: Mapping[str, float] = field(default_factory=dict)
    returned: float = 0.0
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def faster(self) -> str:
        """Empty, or the sentence that says which of them is faster than what was returned, by more than noise.

        >>> OtherEngines({"OpenVINO 2026.4, int8": 0.02}, 0.03).faster
        'OpenVINO 2026.4, int8, runs the dense network in 20.00 ms, 1.50 times as fast as what is returned (30.00 ms)'
        >>> OtherEngines({"OpenVINO 2026.4, int8": 0.0298}, 0.03).faster
        ''
        """
        best = min(self.times, key=lambda name: self.times[name], default="")
        if not best or self.times[best] >= MARGIN * self.returned:
            return ""
        ratio = self.returned / self.times[best]
        return (
            f"{best}, runs the dense network in {self.times[best] * 1e3:.2f} ms, {ratio:.2f} times as fast as what is "
            f"returned ({self.returned * 1e3:.2f} ms)"
        )

    def lines(self) -> list[str]:
        """What was compared, and what was not and why."""
        found = [f"dense in {name}: {seconds * 1e3:.2f} ms" for name, seconds in self.times.items()]
        found += [f"what is returned, in turns with that: {self.returned * 1e3:.2f} ms"] if found else []
        found += [f"not compared with {name}: {reason}" for name, reason in self.left_out.items()]
        return [*found, *([self.faster] if self.faster else [])]


@dataclass(frozen=True)
class Int8Network:
    """The network in int8 as a whole, from static scales: what was found. `errors`: by layer, how far the network's
    outputs are off where this layer alone is int8, as a share of their size (root of sums of squares), on the first
    calibration batch; `error`, with all layers that are int8 in the end, and `most_error`, what is allowed. `float32`:
    the layers that stay so, and why. `reason`: why there is no such network; empty where there is one."""

    errors: Mapping[str, float] = field(default_factory=dict)
    error: float = 0.0
    most_error: float = 0.0
    float32: Mapping[str, str] = field(default_factory=dict)
    chosen: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        """What was found, in sentences."""
        if self.reason:
            return [f"no int8 network, {self.reason}"]
        count = len(self.errors) - len(self.float32)
        found = f"int8 network: {count} of {counted(len(self.errors), 'layer')} on bytes"
        lines = [f"{found}, outputs off by {self.error:.2g} of their size on calibration data"]
        return lines + [f"{name} stays float32: {why}" for name, why in self.float32.items()]


@dataclass(frozen=True)
class Plan:
    """What `plan` measured, layer by layer. `str()` is a table. Only `deploy` measures the rest: `whole` are the times
    of whole models in seconds, `returned` names the one that it returned, and `difference` is how far its outputs are
    from those of the model it got, on the example: the largest difference over the largest magnitude. `engines`: how
    long other software takes, None where that was not asked or the model is on a GPU. `network`: what came of
    calibration batches, None where there were none.

    >>> import torch, openwork as ow
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    >>> _ = ow.project(model, "1:4")
    >>> found = ow.plan(model, torch.randn(1, 64), pattern="1:4")
    >>> set(found.chosen) <= {"0.weight"}, found.weight_dtype
    (True, torch.float32)
    """

    layers: tuple[LayerTiming, ...]
    weight_dtype: torch.dtype
    environment: str
    whole: Mapping[str, float] = field(default_factory=dict)
    difference: float | None = None
    returned: str = ""
    engines: OtherEngines | None = None
    network: Int8Network | None = None

    @property
    def chosen(self) -> dict[str, str]:
        """The kernel of each weight that runs sparse: of none where the dense model was returned."""
        if self.network is not None and self.returned.startswith(INT8_NETWORK):
            return dict(self.network.chosen)
        dense = self.returned.startswith("dense")
        return {layer.name: layer.kind for layer in self.layers if layer.kind and not dense}

    def __str__(self) -> str:
        header = ["weight", "shape", "pattern", "inputs", "dense us", "by", "sparse us", "ratio", "choice", "reason"]
        lines = [_cells(layer) for layer in self.layers]
        whole = [f"whole model, {name}: {seconds * 1e3:.2f} ms" for name, seconds in self.whole.items()]
        whole += [f"returned: {self.returned}"] if self.returned else []
        runs = "runs" if len(self.chosen) == 1 else "run"
        share = f"{len(self.chosen)} of {counted(len(self.layers), 'weight')}"
        summary = f"{share} {runs} sparse, stored in {self.weight_dtype}"
        if self.difference is not None:
            whole.append(f"outputs differ from the given model's by {self.difference:.1g} of the largest")
        whole += self.network.lines() if self.network else []
        whole += self.engines.lines() if self.engines else []
        return "\n".join([self.environment, *aligned(header, lines), summary, *whole])


def environment(device: torch.device) -> str:
    """What the times of a plan belong to."""
    if device.type == "cuda":
        warned = cusparselt.version_warning(device)
        return cusparselt.gpu_environment(device) + (f" ({warned})" if warned else "")
    return f"{counted(torch.get_num_threads(), 'thread')}, torch {torch.__version__}, {kernels.status()}"


def _cells(layer: LayerTiming) -> list[str]:
    inputs = " ".join("x".join(map(str, shape)) for shape in layer.inputs)
    times = [f"{layer.dense * 1e6:.0f}", layer.dense_by] if layer.dense else ["-", "-"]
    times += [f"{layer.sparse * 1e6:.0f}", f"{layer.ratio:.2f}"] if layer.sparse else ["-", "-"]
    cells = [layer.name, "x".join(map(str, layer.shape)), str(layer.pattern or "-"), inputs]
    return [*cells, *times, layer.kind or "dense", layer.reason]
