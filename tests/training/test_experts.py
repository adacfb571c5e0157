"""Mixture-of-experts models of transformers: their experts are bare parameters, in several orders and several loops."""

import copy

import pytest
import torch
from torch import nn

import openwork as ow
from openwork.nm.groups import Axis
from openwork.training.select import decide
from openwork.utils.torchvision_compat import ensure_torchvision

ensure_torchvision()
hf = pytest.importorskip("transformers", "5", reason="experts are parameters since transformers 5")

SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL |= {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, "num_experts_per_tok": 2}
IDS = {"input_ids": torch.tensor([[3, 4, 5, 6, 7]])}
RANKS = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
DEEP = {"n_routed_experts": 4, "moe_intermediate_size": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 0}

# Model, its sizes, the dim along which experts are summed, their names, the router.
MODELS = {
    "Mixtral": ({"num_local_experts": 4, "intermediate_size": 8}, 2, "mlp.gate.weight"),
    "Qwen3Moe": ({"num_experts": 4, "moe_intermediate_size": 8, "head_dim": 8}, 2, "mlp.gate.weight"),
    "GptOss": ({"num_local_experts": 4, "intermediate_size": 8, "head_dim": 8}, 1, "mlp.router.weight"),
    "DeepseekV3": ({"intermediate_size": 8, **DEEP, **RANKS}, 2, "mlp.gate.weight"),
}


def made(kind, implementation="grouped_mm"):
    torch.manual_seed(0)
    config = getattr(hf, f"{kind}Config")(**SMALL, **MODELS[kind][0], experts_implementation=implementation)
    return getattr(hf, f"{kind}ForCausalLM")(config).eval()


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("kind", MODELS)
def test_experts_and_routers_are_seen(kind, implementation):
    _, dim, router = MODELS[kind]
    found = {each.name: each for each in decide(made(kind, implementation), ow.Selection("2:4"), example=IDS)}
    axes = {
        name.removeprefix("model.layers.0."): each.axis for name, each in found.items() if each.seen and each.pattern
    }
    experts = {f"mlp.experts.{name}": Axis(dim) for name in ("gate_up_proj", "down_proj")}
    assert axes == {router: Axis(1), **experts}
    unseen = {name: each.reason for name, each in found.items() if each.seen and not each.pattern}
    assert all("bias" in name and "not multiplied in the example" in reason for name, reason in unseen.items())


def test_one_token_is_enough():
    model = made("Mixtral", "eager")
    report = ow.sparsify(model, "2:4", example={"input_ids": torch.tensor([[3]])})  # two experts of four
    assert "model.layers.0.mlp.experts.down_proj" in report.sparse
    experts = model.model.layers[0].mlp.experts.down_proj
    assert ((experts != 0).unflatten(2, (2, 4)).sum(3) == 2).all()


@pytest.mark.parametrize("kind", MODELS)
def test_one_shot_pruning_reaches_each_expert(kind):
    model = made(kind)
    report = ow.prune(model, "2:4", [{"input_ids": torch.arange(48).view(2, 24)}], exclude=["lm_head"])
    experts = [layer for layer in report.layers if ".experts." in layer.name]
    assert len(experts) == 2
    assert all(layer.error < layer.masked for layer in experts)
    assert ow.verify(model, IDS, pattern=ow.Selection("2:4", exclude=["lm_head"])).sparse.keys() == report.errors.keys()


def test_where_torch_has_no_grouped_product():
    class Fallback(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.Parameter(torch.randn(2, 16, 8))

        def forward(self, x):
            ends = torch.tensor([1, len(x)], dtype=torch.int32)
            return torch.ops.transformers.grouped_mm_fallback(x, self.experts.mT, ends)

    model, x = Fallback(), torch.randn(3, 8)
    report = ow.sparsify(model, "2:4", example=x)
    assert report.sparse == {"experts": ow.Pattern(2, 4)}
    assert (report.macs_dense, report.macs_sparse) == (3 * 16 * 8, 3 * 16 * 4)
    assert ow.verify(model, x).products.sparse == 1


@pytest.mark.filterwarnings("ignore:sparse is not faster")  # such a small model
@pytest.mark.parametrize("kind", ["Qwen3Moe", "GptOss"])
def test_from_training_to_a_deployed_model(row, kind, tmp_path):
    model = made(kind)
    report = ow.sparsify(model, "2:4", ow.SRSTE(), exclude=["lm_head"], example=IDS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ow.attach(optimizer, model)
    for _ in range(2):
        model(**IDS, labels=IDS["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not ow.verify(model, IDS).products.allowed
    ow.save(model, tmp_path / "net.safetensors")
    plain = ow.finalize(copy.deepcopy(model))
    selection = ow.Selection("2:4", exclude=["lm_head"])
    assert ow.verify(plain, IDS, pattern=selection).sparse == report.sparse
    loaded = made(kind)
    ow.load(tmp_path / "net.safetensors", into=loaded)
    expected = model(**IDS).logits
    assert torch.equal(loaded(**IDS).logits, expected)
    fast = ow.deploy(loaded, IDS, pattern=selection)
    difference = float((fast(**IDS).logits - expected).abs().max())
    assert difference < 1e-5
    what = f"transformers' {kind}, its experts by `example=`: trained, saved, loaded, deployed"
    row("Experts", what, difference={"logits": difference}, tolerance=1e-5, packages=("transformers",))
