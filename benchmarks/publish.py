"""Put the network of a finished run into models/: compressed, with what it needs to be built, and a card.

    python benchmarks/publish.py runs/protocol-detection/final/sr-ste-2of4-0.002-seed0 models/detection-2of4

The weights become bfloat16 where that changes the score by less than half of the spread over the seeds, which comes
from the results of the task in benchmarks/results. The data that the run was trained on must be there.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from results_page import SAME_LENGTH, markdown, stored, without_folders
from torch import nn

import openwork as ow
from openwork.recipes.method_flags import label_of, option_texts
from openwork.recipes.rundir import RunDir, write_text
from openwork.recipes.summary import SummaryRow
from openwork.recipes.task import Metric
from openwork.recipes.trained import build_trained, read_run, scores
from openwork.recipes.yaml_files import write_yaml

SOURCES = {  # where the data comes from, and its licence
    "fashion-mnist": "Fashion-MNIST (github.com/zalandoresearch/fashion-mnist), MIT licence",
    "bccd": "BCCD, photos of blood cells (github.com/Shenggan/BCCD_Dataset), MIT licence",
    "dsb2018": "nuclei of the 2018 Data Science Bowl with corrected masks (github.com/lopuhin), CC0",
    "photos": "pairs of frames made from the 24 photos of the Kodak true colour suite, released for unrestricted usage",
    "tatoeba": "pairs of sentences of Tatoeba.org, CC BY 2.0 FR",
}


def publish(run: Path, out: Path) -> str:
    """Writes the folder; returns the card."""
    task, config = read_run(run)
    data, metric = task.load_data(config), task.metrics[0]
    row, dense = rows_of(task.name, RunDir(run).read_config())
    out.mkdir(parents=True, exist_ok=True)
    RunDir(out).write_network(task.network_facts(data))
    task.save_artifacts(data, out)
    values = without_folders({"config": RunDir(run).read_config()})["config"]
    write_yaml(RunDir(out).config, values | {"init": "", "out": f"models/{out.name}"})

    net = build_trained(task, config, data, run)
    exact = scores(task, config, net, data)[metric.key]
    selection = ow.Selection(config.pattern, exclude=config.exclude, remainder=config.remainder)
    for dtype in (torch.bfloat16, torch.float32):
        ow.save(narrowed(build_trained(task, config, data, run), dtype), RunDir(out).model, pattern=selection)
        score = scores(task, config, build_trained(task, config, data, out), data)[metric.key]
        if abs(score - exact) < (row.std or 0) / 2:
            break
    once = {value.data_ptr(): value.numel() for value in net.state_dict().values()}  # tied weights
    size = RunDir(out).model.stat().st_size, 4 * sum(once.values())
    card = card_of(out, values, metric, {"stored": score, "trained": exact}, dtype, size, (row, dense))
    write_text(out / "README.md", card)
    return card


def narrowed(net: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The network with its matrices and kernels in `dtype`; biases and normalization stay as they are."""
    for parameter in net.parameters():
        if parameter.dim() > 1:
            parameter.data = parameter.data.to(dtype)
    return net


def rows_of(task: str, config: dict[str, Any]) -> tuple[SummaryRow, SummaryRow]:
    """The stored rows of this method with its options, and of dense."""
    rows = [SummaryRow(**row) for document in stored(task, SAME_LENGTH) for row in document["rows"]]
    labels = {" ".join([row.method, row.pattern, *option_texts(row.options)]): row for row in rows}
    label = label_of(config)
    if label not in labels:
        raise SystemExit(f"benchmarks/results has no row {label} of {task}; it has {', '.join(labels)}")
    return labels[label], labels["dense -"]


def card_of(
    out: Path,
    config: dict[str, Any],
    metric: Metric,
    score: dict[str, float],
    dtype: torch.dtype,
    size: tuple[int, int],
    rows: tuple[SummaryRow, SummaryRow],
) -> str:
    row, dense = rows
    source = config["data"].partition("=")[0]

    def over_seeds(each: SummaryRow) -> str:
        return f"{metric.text(each.scores[metric.key])} ± {metric.text(each.std)} ({len(each.seeds)} seeds)"

    facts = {
        "data": SOURCES[source],
        "network": config["model"],
        "method": f"{config['method']} {' '.join(option_texts(row.options))}, {row.steps} steps, seed {config['seed']}",
        f"{metric.heading} of this file": metric.text(score["stored"]),
        "as trained, in float32": metric.text(score["trained"]),
        "the same runs over seeds": over_seeds(row),
        "dense networks, as many steps": over_seeds(dense),
        "size": f"{size[0] / 1e6:.2f} MB ({str(dtype).removeprefix('torch.')})",
        "size of the dense network in float32": f"{size[1] / 1e6:.2f} MB",
    }
    return "\n".join(
        [
            f"# {out.name}\n",
            f"A network for {config['task']}, {config['pattern']} from scratch. `ow.load_state_dict` reads it,",
            f'`load_run("models/{out.name}")` of `openwork.recipes.trained` builds the network too.\n',
            *markdown(["", ""], [[key, value] for key, value in facts.items()]),
            "\n```",
            f"openwork evaluate models/{out.name} --data {source}=DIR",
            f"openwork train {config['task']} --config models/{out.name}/config.yaml --data {source}=DIR --out DIR",
            "```\n",
        ]
    )


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path, help="models/NAME")
    asked = parser.parse_args(words)
    print(publish(asked.run, asked.out))


if __name__ == "__main__":
    main()
