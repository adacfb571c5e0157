"""Experts of transformers' mixtures: each is pruned on its own tokens, whatever loop multiplies them."""

from __future__ import annotations

import pytest
import torch

import openwork as ow
from openwork.utils.torchvision_compat import prepare_torchvision

prepare_torchvision()
hf = pytest.importorskip("transformers", "5", reason="experts are parameters since transformers 5")

SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, "num_experts_per_tok": 2}
SMALL |= {"num_local_experts": 4, "intermediate_size": 8}


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])
def test_experts_see_their_own_tokens_in_each_of_their_loops(kind: str) -> None:
    pruned, batch = {}, {"input_ids": torch.randint(64, (8, 32), generator=torch.Generator().manual_seed(0))}
    for loop in ("eager", "batched_mm", "grouped_mm"):
        torch.manual_seed(0)
        head = {"head_dim": 8} if kind == "GptOss" else {}
        config = getattr(hf, f"{kind}Config")(**SMALL, **head, experts_implementation=loop)
        model = getattr(hf, f"{kind}ForCausalLM")(config).eval()
        report = ow.prune(model, "2:4", [batch], solver=ow.SparseGPT())
        assert model.config._experts_implementation == loop
        experts = [layer for layer in report.layers if "experts" in layer.name]
        assert len(experts) == 4
        assert all(layer.note == "" and layer.error < layer.masked for layer in experts)
        assert all(50 < layer.samples < 128 for layer in experts), "of 512 pairs of token and expert, not all"
        pruned[loop] = [layer.error for layer in report.layers]
    assert pruned["batched_mm"] == pytest.approx(pruned["eager"], rel=1e-3)
    assert pruned["grouped_mm"] == pytest.approx(pruned["eager"], rel=1e-3)
