"""The language models of language.py on this machine: as deployed by Openwork, and the dense one on what others would
take, in turns, on the same threads."""

from __future__ import annotations

import copy
import functools
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import openwork as ow
from openwork.utils.timing import take_turns

sys.path.insert(0, str(Path(__file__).parent))
from engines import dense_engines, spread

Call = Callable[[], Tensor]


class NextToken(nn.Module):
    """The logits of the token that follows: (B, T) -> (B, words)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids, use_cache=False, logits_to_keep=1).logits
        return logits[:, -1]


def generation(dense: nn.Module, sparse: nn.Module, prompt: Tensor, tokens: int) -> dict[str, Any]:
    """Tokens a second of `generate()`, greedy, at batch 1, of the dense and the sparse network in float32, bfloat16 and
    int8; how many of the tokens that the same network says in float32 it says, up to the first other one."""
    models, about = {}, {}
    for name, network in (("dense", dense), ("2:4", sparse)):
        models[f"{name} float32"] = network
        models[f"{name} bfloat16"] = copy.deepcopy(network).bfloat16()
    models["dense int8"] = _int8(dense)
    one = {"input_ids": prompt[:, :1]}
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        said = f"2:4 {str(dtype).partition('.')[2]}, ow.deploy"
        start = models["2:4 bfloat16"] if dtype == torch.bfloat16 else sparse
        models[said], about[said] = _deployed(start, one, dtype)
    calls = {said: functools.partial(_generate, model, prompt, tokens) for said, model in models.items()}
    found = _timed(calls)
    said_by = {said: call()[0, prompt.shape[1] :].tolist() for said, call in calls.items()}
    for said, row in found.items():
        reference = said_by[f"{said.partition(' ')[0]} float32"]
        agree = [a == b for a, b in zip(said_by[said], reference, strict=True)]
        row |= {"tokens_per_second": tokens / row["seconds"], "as_in_float32": [*agree, False].index(False)}
        row |= about.get(said, {})
    return found


def prompts(dense: nn.Module, sparse: nn.Module, batch: Tensor) -> dict[str, Any]:
    """Seconds of a forward pass over prompts (B, T), the logits of the next token alone; the largest difference from
    the same network's in torch, float32, as a share of the largest logit."""
    example = {"input_ids": batch}
    networks = {"dense": NextToken(dense).eval(), "2:4": NextToken(sparse).eval()}
    calls: dict[str, Call] = {f"{name}: torch": functools.partial(model, **example) for name, model in networks.items()}
    engines = dense_engines(networks["dense"], example)
    calls |= {name: lambda call=call: torch.from_numpy(call()) for name, call in engines.items()}  # type: ignore[misc]
    about = {}
    for dtype in (torch.float32, torch.int8):
        said = f"2:4: ow.deploy, {str(dtype).partition('.')[2]}"
        model, about[said] = _deployed(networks["2:4"], example, dtype)
        calls[said] = functools.partial(model, **example)
    found = _timed(calls)
    with torch.inference_mode():
        for said, row in found.items():
            expected = calls[f"{said.partition(':')[0]}: torch" if said[0] == "d" else "2:4: torch"]()
            row["difference"] = float((calls[said]() - expected).abs().max() / expected.abs().max())
            row |= about.get(said, {})
    return found


def _timed(calls: Mapping[str, Call]) -> dict[str, dict[str, Any]]:
    with torch.inference_mode():
        times = take_turns(calls, 8.0 * len(calls), least=5, most=40)
    found = {}
    for said, seconds in times.items():
        median, fifths = spread(seconds)
        found[said] = {"seconds": median, **fifths}
    return found


def _generate(model: nn.Module, prompt: Tensor, tokens: int) -> Tensor:
    made: Tensor = model.generate(  # type: ignore[operator]
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return made


def _deployed(model: nn.Module, example: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
    """What `deploy` returns, and how its layers are multiplied."""
    with warnings.catch_warnings(record=True):  # that dense won is in the plan
        deployed: Any = ow.deploy(copy.deepcopy(model), dict(example), weight_dtype=dtype, engine_seconds=0)
    plan = deployed.deployment
    return deployed, {
        "returned": plan.returned,
        "layers": dict(Counter(layer.kind or "dense" for layer in plan.layers)),
    }


def _int8(model: nn.Module) -> nn.Module:
    """torch's dynamic quantization of every linear layer, the head included."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: nn.Module = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, torch.qint8)
    return made
