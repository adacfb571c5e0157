"""`openwork train flow`: two frames into the motion of every pixel between them, by RAFT (Teed & Deng, ECCV 2020)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from openwork.recipes import flow_data
from openwork.recipes.charts import image_uri
from openwork.recipes.config import Config, DataSource, check_choice, data_flag, default, flag, rates, source_of
from openwork.recipes.data import Data
from openwork.recipes.data_files import DataFolder
from openwork.recipes.flow_data import LAYOUTS, Pairs
from openwork.recipes.task import DistillableTask, Metric, View, Visualization
from openwork.utils.counted import counted
from openwork.utils.torchvision_compat import ensure_torchvision

ensure_torchvision()
from torchvision.models.optical_flow import RAFT, raft_large, raft_small  # noqa: E402
from torchvision.ops import FrozenBatchNorm2d  # noqa: E402
from torchvision.utils import flow_to_image  # noqa: E402

_MODELS = {"raft_small": raft_small, "raft_large": raft_large}
_SIDE = 128  # pixels, the least that RAFT's four levels of correlation can be made of
_MAX_FLOW = 400  # pixels: RAFT's loss leaves out longer flow
_OUTLIERS = 1, 3, 5  # pixels
_SHOWN = 3


@dataclass(frozen=True)
class FlowConfig(Config):
    """Defaults: RAFT's usual recipe (AdamW, weight decay 1e-4, gradient clipped to norm 1, a short linear warm-up and
    linear decay to zero, gamma 0.8) on frames of 128 pixels, with half of its updates. Every convolution is sparse, as
    in the paper, those with 2 and 3 input channels by padding.
    """

    task: ClassVar[str] = "flow"
    sources: ClassVar[Sequence[DataSource]] = (
        DataSource("scenes"),
        DataSource("photos", "photos of any kind that Pillow reads; scenes are made of them"),
        *(DataSource(name, layout) for name, layout in LAYOUTS.items()),
    )
    usual: ClassVar[dict[str, Any]] = {
        "batch_size": 4,
        "lr": rates(sgd=1e-2, adam=4e-4, adamw=4e-4),
        "warmup": 0.25,
    }
    # What the SR-STE authors ran for their one result in flow (github.com/aojunzz/NM-sparsity, RAFT/
    # train_flyingchairs_sparse.sh): FlyingChairs, 200k steps of batch 4 for the sparse network, 100k for the dense.
    # 36 epochs of 22,232 pairs are 200,088 steps. Their one-cycle schedule starts at 1/25 of the rate, ours at its
    # first step's share. Biases are on; decay is the 2e-4 that their code has for every task, once per use of a weight.
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {
            "model": "raft_large",
            "pattern": "2:4",
            "patterns": ["2:4"],
            "decay": 2e-4,
            "size": [368, 496],
            "updates": 12,
            "val_updates": 24,
            "gamma": 0.8,
            "epochs": 36,
            "batch_size": 4,
            "optimizer": "adamw",
            "lr": 4e-4,
            "weight_decay": 1e-4,
            "eps": 1e-8,
            "clip": 1.0,
            "warmup": 1.8,
            "schedule": "linear",
            "topology_every": 1000,
            "checkpoint_every": 2000,
            "log_every": 100,
        }
    }

    data: str = data_flag(sources)
    model: str = flag("raft_small", f"one of {', '.join(_MODELS)}")
    remainder: str = default("remainder", "pad")
    size: list[int] = flag([128, 128], "height and width of the training frames")
    updates: int = flag(6, "how often RAFT updates its estimate, in training")
    val_updates: int = flag(6, "the same in validation, and of the exported network")
    gamma: float = flag(0.8, "weight of an update's loss, relative to the next update's")
    scenes: int = flag(240, "scenes in an epoch (scenes, photos); every epoch has new ones")
    val_scenes: int = flag(48, "scenes for validation (scenes, photos)")
    hold_out: int = flag(0, "validate on so many training samples, or photos, left out of training")
    freeze_bn: bool = flag(False, "keep batch normalization as it is (raft_large, all stages but the first)")
    epochs: int = default("epochs", 5)
    optimizer: str = default("optimizer", "adamw")
    weight_decay: float = default("weight_decay", 1e-4)
    clip: float = default("clip", 1.0)
    schedule: str = default("schedule", "linear")
    out: str = default("out", "runs/flow")

    def check(self) -> None:
        check_choice("model", self.model, _MODELS)
        if len(self.size) != 2 or any(side < _SIDE or side % 8 for side in self.size):
            raise ValueError(
                f"size is {self.size}; RAFT needs a height and a width that divide by 8, of {_SIDE} pixels at least"
            )
        for name in ("updates", "val_updates", "scenes", "val_scenes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


class FlowNet(RAFT):
    """torchvision's RAFT under its own names, with its number of updates, in training and else, and gamma."""

    def __init__(self, parts: RAFT, updates: int, val_updates: int, gamma: float) -> None:
        super().__init__(
            feature_encoder=parts.feature_encoder,
            context_encoder=parts.context_encoder,
            corr_block=parts.corr_block,
            update_block=parts.update_block,
            mask_predictor=parts.mask_predictor,
        )
        self.updates, self.val_updates, self.gamma = updates, val_updates, gamma

    def forward(self, first: Tensor, second: Tensor) -> list[Tensor]:
        """Frames (B, 3, H, W) in [-1, 1] -> the flow after each update, (B, 2, H, W) in pixels."""
        return super().forward(first, second, self.updates if self.training else self.val_updates)


def build_raft(name: str, updates: int, val_updates: int, gamma: float, frozen: bool) -> FlowNet:
    net = FlowNet(_MODELS[name](weights=None), updates, val_updates, gamma)
    return freeze_batch_norm(net) if frozen else net


def freeze_batch_norm(net: nn.Module) -> Any:
    """The network with its batch normalizations exchanged, in place, for ones that never change."""
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                frozen = FrozenBatchNorm2d(child.num_features, child.eps)
                frozen.load_state_dict(child.state_dict())
                setattr(module, name, frozen)
    return net


def sequence_loss(flows: Sequence[Tensor], pairs: Pairs, gamma: float) -> Tensor:
    """RAFT's loss: the L1 distance of every update, the last one counting 1, each one before `gamma` times the next.

    The mean is over all pixels and both components; unknown flow, and flow longer than 400 pixels, counts as zero.
    """
    counted = (pairs.known & (pairs.flow.norm(dim=1) < _MAX_FLOW))[:, None]
    losses = torch.stack([(counted * (flow - pairs.flow).abs()).mean() for flow in flows])
    weights = gamma ** torch.arange(len(flows) - 1, -1, -1, device=losses.device)
    return (weights * losses).sum()


def errors_of(flow: Tensor, pairs: Pairs) -> list[np.ndarray]:
    """For each sample: pixels with known flow, the sum of their end-point errors, how many exceed 1, 3, 5 pixels."""
    distance = torch.where(pairs.known, (flow.float() - pairs.flow).norm(dim=1), 0.0).double()
    sums = [pairs.known.sum((1, 2)), distance.sum((1, 2)), *((distance > limit).sum((1, 2)) for limit in _OUTLIERS)]
    return list(torch.stack([total.double() for total in sums], dim=1).cpu().numpy())


class Flow(DistillableTask):
    name = "flow"
    config = FlowConfig
    metrics = (
        Metric("val_epe", "end-point error", "px", higher_is_better=False),
        *(
            Metric(f"val_over_{limit}px", f"> {limit} px", "%", 100, digits=1, higher_is_better=False)
            for limit in _OUTLIERS
        ),
    )
    eval_batch = 8

    def load_data(self, config: FlowConfig) -> Data:
        source, folder = source_of(config)
        size = config.size[0], config.size[1]
        root = DataFolder(folder or Path(), config.follow_links)
        if folder is not None and source in LAYOUTS:
            limits = {"limit": config.limit, "limit_val": config.limit_val, "hold_out": config.hold_out}
            how: dict[str, Any] = {"workers": config.workers, "skip_bad": config.skip_bad, **limits}
            return flow_data.flow_files(source, root, size, **how)
        photos, skipped = flow_data.photos_of(root, config.skip_bad) if folder else (flow_data.sample_photos(), 0)
        counts = config.limit or config.scenes, config.limit_val or config.val_scenes
        # Beside a CPU that trains, more processes would only get in its way.
        workers = config.workers if torch.cuda.is_available() else 0
        return flow_data.scenes_of(photos, size, *counts, workers, skipped, config.hold_out)

    def notes(self, config: FlowConfig, data: Data) -> dict[str, str]:
        held = counted(config.hold_out, "training sample, or photo, that was", "training samples, or photos, that were")
        held = f"of {held} left out of training (--hold_out)"
        return {"validation": held} if config.hold_out else {}

    def build(self, config: FlowConfig, data: Data) -> FlowNet:
        return build_raft(config.model, config.updates, config.val_updates, config.gamma, config.freeze_bn)

    def example(self, data: Data) -> tuple[Tensor, Tensor]:
        # Noise: frames of one colour leave instance normalization nothing but rounding errors to divide by.
        first, second = torch.rand(2, 1, 3, *data.train.size, generator=torch.Generator().manual_seed(0)) * 2 - 1
        return first, second

    def stand_in(self, config: FlowConfig, facts: Mapping[str, Any]) -> Data:
        """No sample: the example is noise."""
        none = flow_data.Scenes((), (config.size[0], config.size[1]), 0)
        return Data(none, none)

    def outputs(self, net: nn.Module, batch: Pairs) -> list[Tensor]:
        return net(batch.first, batch.second)

    def loss_of(self, net: Any, outputs: Sequence[Tensor], batch: Pairs) -> Tensor:
        return sequence_loss(outputs, batch, net.gamma)

    def distance(self, net: Any, outputs: Sequence[Tensor], taught: Sequence[Tensor], batch: Pairs) -> Tensor:
        """The same loss, as if the teacher's last flow were the true one, known everywhere."""
        return sequence_loss(outputs, batch._replace(flow=taught[-1], known=torch.ones_like(batch.known)), net.gamma)

    def predictions(self, net: nn.Module, batch: Pairs) -> list[np.ndarray]:
        return errors_of(net(batch.first, batch.second)[-1], batch)

    def compute_metrics(self, predictions: Sequence[np.ndarray], data: Any) -> dict[str, float]:
        """Means over all pixels of all samples."""
        pixels, *sums = np.sum(predictions, axis=0)
        if not pixels:
            raise ValueError("the validation samples have no pixel with known flow; look at their flow files")
        return {metric.key: float(total / pixels) for metric, total in zip(self.metrics, sums, strict=True)}

    def visualizations(self, config: FlowConfig, net: nn.Module, data: Data) -> list[Visualization]:
        device, samples = next(net.parameters()).device, []
        shown = [np.array([index]) for index in range(min(_SHOWN, data.val_count))]
        for number, pair in enumerate(data.val_batches(shown), start=1):
            with torch.no_grad():
                flow = net(pair.first.to(device), pair.second.to(device))[-1].cpu()
            samples.append(flow_visualization(f"Validation sample {number}", pair, flow))
        return samples


def flow_visualization(name: str, pair: Pairs, flow: Tensor) -> Visualization:
    """One sample: both frames and the true flow; the predicted flow and how far off it is."""
    true_colours, colours = coloured(pair.flow, flow)
    (pixels, total, *_), *_ = errors_of(flow, pair)
    longest = float(torch.where(pair.known, pair.flow.norm(dim=1), 0.0).max())
    distance = torch.where(pair.known, (flow - pair.flow).norm(dim=1), 0.0)[0]
    frames = [((frame[0].permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).byte() for frame in pair[:2]]
    grey = ((distance / _OUTLIERS[-1]).clamp(0, 1) * 255).byte()[:, :, None].repeat(1, 1, 3)
    truth = {"first frame": frames[0].numpy(), "second frame": frames[1].numpy()}
    truth[f"true flow, up to {longest:.1f} px"] = true_colours
    error = f"error, {total / max(pixels, 1):.2f} px in the mean; white is 5 px"
    predicted = {"predicted flow": colours, error: grey.numpy()}
    return Visualization(name, *([View(title, image_uri(p)) for title, p in v.items()] for v in (truth, predicted)))


def coloured(truth: Tensor, flow: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Two flows (1, 2, H, W) in Middlebury's colours, direction as hue and length as saturation, on one scale.

    The scale ends at the longest true flow; predicted flow that is longer is cut to it. (H, W, 3) uint8 each.
    """
    longest = truth.norm(dim=1).max().clamp(min=1e-6)
    cut = flow * (longest / flow.norm(dim=1, keepdim=True).clamp(min=1e-6)).clamp(max=1)
    both = flow_to_image(torch.cat([truth, cut], dim=-1))[0].permute(1, 2, 0).numpy()
    left, right = np.split(both, 2, axis=1)
    return np.ascontiguousarray(left), np.ascontiguousarray(right)


TASK = Flow()
