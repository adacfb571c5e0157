"""A folder for the Hugging Face Hub: any library loads it, the compressed file agrees, the card says what is in it."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import openwork as ow
from openwork.export import to_huggingface


def test_a_plain_module(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), *(nn.Linear(8, 8, bias=False) for _ in range(3)))
    model[3].weight = model[2].weight
    patterns = {"0": "2:4", "1": "1:8"}
    ow.project(model, patterns)
    card = to_huggingface(model, tmp_path / "out", pattern=patterns, method="sr-ste")
    dense = load_file(tmp_path / "out" / "model.safetensors")
    assert set(dense) == {"0.weight", "0.bias", "1.weight", "2.weight"}
    assert all(torch.equal(each, model.state_dict()[name]) for name, each in dense.items())
    loaded = ow.load_state_dict(tmp_path / "out")
    assert all(torch.equal(each, loaded[name]) for name, each in model.state_dict().items())
    for part in ("2:4 in 1 weight, 1:8 in 1 weight", "| method | sr-ste |", "| 0.3125 |"):
        assert part in card
    file = (32 * 4 + 8) + (8 * 4 + 3) + (64 + 8) * 4  # 0.weight with its 16 groups, 1.weight with 8; 2.weight, 0.bias
    assert f"{file} bytes of {(3 * 64 + 8) * 4}" in card


def test_the_card_is_replaced_and_the_rest_of_it_stays(tmp_path):
    model = nn.Linear(8, 8)
    ow.project(model, "2:4")
    (tmp_path / "README.md").write_text("# My model\n\nWords.\n", encoding="utf-8")
    to_huggingface(model, tmp_path, pattern="2:4", method="first")
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert text.startswith("# My model\n\nWords.\n\n<!-- openwork: begin -->\n## N:M sparsity")
    (tmp_path / "README.md").write_text(text + "\nMore words.\n", encoding="utf-8")
    card = to_huggingface(model, tmp_path, pattern="2:4", method="second")
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert text == f"# My model\n\nWords.\n\n{card}More words.\n"
    assert "first" not in text


def test_a_model_of_transformers_in_training(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=8, vocab_size=32)
    model = transformers.GPT2LMHeadModel(config)
    ow.sparsify(model, {"*.h.*": "2:4"}, ow.SRSTE())
    card = to_huggingface(model, tmp_path)
    assert "| method | sr-ste |" in card
    assert ow.masks(model)
    tokens = torch.tensor([[3, 1, 2]])
    expected = model.eval()(tokens).logits
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(tokens).logits, expected)
    ow.verify(loaded, pattern={"*.h.*": "2:4"})
    again = ow.load(tmp_path, into=transformers.GPT2LMHeadModel(config)).eval()
    assert torch.equal(again(tokens).logits, expected)
