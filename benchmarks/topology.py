"""How decay times the summed learning rate sets the effect of SR-STE on the topology.

    python benchmarks/topology.py [--seeds 0 1 2] [--json FILE]

A 64-128-128-10 network on scikit-learn's digits, 2:4 on its two hidden layers, SGD with momentum, cosine learning
rate. Runs of different length and learning rate are given decays with the same *cumulative decay* c, decay times the
sum of the learning rate over all steps: what shrinks a weight that is pruned throughout to exp(-c) of itself, were
there no gradient. Printed for each: SAD since the start and the flip rate per step (mean of the last quarter of the
run), as shares of the weights, and accuracy.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import openwork as ow

CUMULATIVE_DECAYS = (-0.5, 0.0, 0.5, 2.0, 8.0)
RUNS = ((500, 0.1), (2000, 0.1), (2000, 0.025))  # steps, peak learning rate


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    data = load_digits()
    x, y = torch.tensor(data.data / 16.0, dtype=torch.float32), torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order[360:]], y[order[360:]], x[order[:360]], y[order[:360]]


def train(method: ow.Method, steps: int, lr: float, seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    x, y, x_test, y_test = digits()
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    ow.sparsify(model, "2:4", method, exclude=["4"])
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    topology = ow.Topology(every=max(1, steps // 100))
    ow.attach(optimizer, model, topology=topology)
    for _ in range(steps):
        pick = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[pick]), y[pick]).backward()
        optimizer.step()
        schedule.step()
    late = topology.records[-len(topology.records) // 4 :]
    with torch.no_grad():
        accuracy = (model(x_test).argmax(1) == y_test).float().mean().item()
    weights = topology.records[-1]["weights"]
    flip_rate = statistics.fmean(record["sad_step"] for record in late) / weights
    return {"sad_start": topology.records[-1]["sad_start"] / weights, "flip_rate": flip_rate, "accuracy": accuracy}


def summed_rate(steps: int, lr: float) -> float:
    return sum(lr * (1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps))


def row(name: str, method: ow.Method, steps: int, lr: float, seeds: list[int]) -> dict[str, Any]:
    runs = [train(method, steps, lr, seed) for seed in seeds]
    line: dict[str, Any] = {"run": name, "steps": steps, "lr": lr, "decay": getattr(method, "decay", None)}
    for key in runs[0]:
        values = [run[key] for run in runs]
        line[key] = [statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0]
    shares = " ".join(f"{key} {100 * line[key][0]:7.3f} ± {100 * line[key][1]:.3f} %" for key in runs[0])
    decay = "-" if line["decay"] is None else f"{line['decay']:.2g}"
    print(f"{steps:5} steps, lr {lr:<6} {name:12} decay {decay:8} {shares}", flush=True)
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for steps, lr in RUNS:
        rows.append(row("dense", ow.Dense(), steps, lr, args.seeds))
        for total in CUMULATIVE_DECAYS:
            method = ow.SRSTE(total / summed_rate(steps, lr)) if total else ow.STE()
            rows.append(row(f"cumulative decay {total:g}" if total else "ste", method, steps, lr, args.seeds))
    if args.json:
        args.json.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
