"""Networks that `openwork bench` makes itself, and the memory that a network takes."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from openwork.inference.packed_weight import bytes_held
from openwork.utils.torchvision_compat import prepare_torchvision


class Encoder(nn.Module):
    """The encoder of BERT-base and ViT-B: 12 blocks of width 768 with 12 heads; torch's attention on separate linear
    layers, so that all of its products can be sparse."""

    def __init__(self, width: int = 768, heads: int = 12, blocks: int = 12):
        super().__init__()
        self.blocks = nn.ModuleList(EncoderBlock(width, heads) for _ in range(blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class EncoderBlock(nn.Module):
    """One layer of it, normalized first. `causal`: of a decoder."""

    def __init__(self, width: int, heads: int, causal: bool = False):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, W = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(attended.transpose(1, 2).reshape(B, T, W))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class BertLayers(nn.Module):
    """Layers of BERT-base as transformers makes them: (B, tokens, 768) of embeddings to the same shape."""

    def __init__(self, layers: int = 6):
        super().__init__()
        prepare_torchvision()
        from transformers import BertConfig, BertModel

        options: dict[str, Any] = {"attn_implementation": "eager"}  # which the class does not declare
        config = BertConfig(vocab_size=1000, num_hidden_layers=layers, **options)
        self.bert = BertModel(config, add_pooling_layer=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.bert.encoder(hidden)[0]
        return found


def memory(model: nn.Module, example: torch.Tensor) -> tuple[int, int]:
    """Bytes of a model's parameters and buffers, and by how much the peak of a fresh process grew while it loaded the
    model and ran it once."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save((model, example), f"{folder}/model.pt")
        words = [sys.executable, "-m", "openwork.bench.models", f"{folder}/model.pt", str(torch.get_num_threads())]
        words.append(type(model).__module__)
        printed = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    return bytes_held(model), int(printed.split()[-1])


def _grown(file: str, threads: int, module: str) -> int:
    prepare_torchvision()
    importlib.import_module(module)  # of the model's class: code is no part of what grows
    torch.set_num_threads(threads)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
    before = _kilobytes("VmRSS")
    model, example = torch.load(file, weights_only=False, mmap=True)
    with torch.inference_mode():
        model(example)
    return 1024 * (_kilobytes("VmHWM") - before)


def _kilobytes(field: str) -> int:
    """A line of this process's status, which Linux has."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


if __name__ == "__main__":
    print(_grown(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
