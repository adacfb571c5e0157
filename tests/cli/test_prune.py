"""`openwork prune`: what it calibrates with, what it writes, and what it says of bad input."""

from __future__ import annotations

import json
import math
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

import openwork as ow
from openwork.cli.main import main
from openwork.cli.source import open_model
from openwork.utils.torchvision_compat import prepare_torchvision

TEXT = "To be, or not to be, that is the question: Whether 'tis nobler in the mind to suffer. " * 60


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with arrays, text, and a module `made` with what makes a network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "made", types.SimpleNamespace(network=network))
    np.save("x.npy", np.random.default_rng(0).standard_normal((300, 16), np.float32))
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


@pytest.fixture
def llama(folder):
    """A folder as transformers writes it: a tiny language model with a tokenizer."""
    prepare_torchvision()
    hf = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    own = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="?"))
    own.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    own.train_from_iterator([TEXT], tokenizers.trainers.BpeTrainer(vocab_size=60, special_tokens=["?"]))
    hf.PreTrainedTokenizerFast(tokenizer_object=own, unk_token="?").save_pretrained("llama")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=own.get_vocab_size(), num_key_value_heads=2, **sizes)).eval()
    model.save_pretrained("llama")
    return model


ARRAYS = ["prune", "made:network", "--calibrate", "x.npy", "--solver", "sparsegpt"]


def test_a_factory_is_pruned_on_an_array(folder, capsys):
    assert main([*ARRAYS, "--out", "out", "--beside", "magnitude", "--samples", "200", "--batch", "64"]) == 0
    values = json.loads((folder / "out" / "prune.json").read_text())
    assert list(values["solvers"]) == ["sparsegpt", "magnitude"]
    assert [layer["samples"] for layer in values["solvers"]["sparsegpt"]] == [200, 200]
    errors = {name: sum(layer["error"] for layer in layers) for name, layers in values["solvers"].items()}
    assert errors["sparsegpt"] < errors["magnitude"]
    model = ow.load("out/model.openwork.safetensors", into=network())
    ow.verify(model, pattern="2:4")
    page = (folder / "out" / "report.html").read_text()
    assert page.count('class="run"') == 2
    assert all(f"<td>{name}</td>" in page for name in ("sparsegpt", "magnitude", "2.weight"))
    assert "report: " in capsys.readouterr().out
    assert not (folder / "out" / "layers").exists()


def test_the_same_seed_draws_the_same_samples(folder):
    for out, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert main([*ARRAYS, "--out", out, "--seed", seed, "--samples", "64"]) == 0
    a, b, c = (ow.load_state_dict(f"{out}/model.openwork.safetensors")["0.weight"] for out in "abc")
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_a_language_model_is_pruned_on_text_and_scored(llama, folder, capsys):
    words = ["prune", "llama", "--calibrate", "text.txt", "--tokens", "32", "--samples", "16", "--validate", "text.txt"]
    assert main([*words, "--exclude", "lm_head", "--out", "out", "--solver", "refit"]) == 0
    told = capsys.readouterr().out
    values = json.loads((folder / "out" / "prune.json").read_text())
    assert {layer["samples"] for layer in values["solvers"]["refit"]} == {512}
    before, after = (values["scores"][when]["perplexity"] for when in ("before", "after"))
    assert f"perplexity: {before:.4g} before, {after:.4g} after" in told
    assert before == pytest.approx(llama.config.vocab_size, rel=0.2), "random weights know nothing"
    opened = open_model("out")  # weights, configuration and tokenizer stand by themselves
    ow.verify(opened.model, pattern=ow.Selection("2:4", exclude=["lm_head", "model.embed_tokens"]))
    assert opened.tokenizer()("to be")["input_ids"]


@pytest.fixture
def gguf(folder):
    """A file as llama.cpp reads it: a tiny language model with a vocabulary of letters."""
    module, draw = pytest.importorskip("gguf"), np.random.default_rng(0)
    writer = module.GGUFWriter("tiny.gguf", "llama")
    sizes = {"context_length": 64, "embedding_length": 32, "block_count": 1, "feed_forward_length": 64}
    sizes |= {"head_count": 2, "head_count_kv": 2, "layer_norm_rms_eps": 1e-5, "rope_dimension_count": 16}
    for name, value in sizes.items():
        getattr(writer, f"add_{name}")(value)
    letters = [*"abcdefghijklmnopqrstuvwxyz", *"ABCDEFGHIJK", "ab"]
    writer.add_vocab_size(40)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", *letters])
    writer.add_token_types([3, 3, *[1] * 38])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    block = {"attn_norm": (32,), "ffn_norm": (32,), "ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
    block |= dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (32, 32))
    shapes = {"token_embd": (40, 32), "output_norm": (32,), "output": (40, 32)}
    for name, shape in (shapes | {f"blk.0.{name}": shape for name, shape in block.items()}).items():
        writer.add_tensor(f"{name}.weight", draw.standard_normal(shape, np.float32))
    for step in ("header_to_file", "kv_data_to_file", "tensors_to_file"):
        getattr(writer, f"write_{step}")()
    writer.close()


def test_a_gguf_file_is_pruned_with_its_own_tokenizer(gguf, folder):
    (folder / "letters.txt").write_text("abcabdefABCDKbacab" * 40)
    words = ["prune", "tiny.gguf", "--calibrate", "letters.txt", "--tokens", "16", "--exclude", "lm_head"]
    assert main([*words, "--out", "out", "--solver", "sparsegpt", "--samples", "8"]) == 0
    layers = json.loads((folder / "out" / "prune.json").read_text())["solvers"]["sparsegpt"]
    assert [layer["samples"] for layer in layers] == [128] * 7
    opened = open_model("out")
    ow.verify(opened.model, pattern=ow.Selection("2:4", exclude=["lm_head", "model.embed_tokens"]))
    assert opened.tokenizer().decode(opened.tokenizer()("cabd")["input_ids"]) == "cabd"


def test_perplexity_is_that_of_the_loss(llama, folder):
    from openwork.cli.calibrate import perplexity, token_ids

    source = open_model("llama")
    windows = token_ids(source, [folder / "text.txt"]).split(32)[:-1]
    losses = [float(llama(input_ids=ids[None], labels=ids[None]).loss.detach()) for ids in windows if len(ids) == 32]
    assert perplexity(source, [folder / "text.txt"], 32) == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)


def test_a_run_is_pruned_on_its_own_samples(folder, capsys):
    flags = ["--epochs", "1", "--limit", "200", "--limit_val", "50", "--out", "run"]
    assert main(["train", "classification", *flags, "--method", "dense"]) == 0
    capsys.readouterr()
    assert main(["prune", "run", "--out", "out", "--solver", "sparsegpt", "--samples", "40"]) == 0
    told = capsys.readouterr().out
    assert "val_accuracy: " in told
    accuracy = json.loads((folder / "run" / "result.json").read_text())["val_accuracy"]
    values = json.loads((folder / "out" / "prune.json").read_text())
    assert values["scores"]["before"]["val_accuracy"] == pytest.approx(accuracy)


def test_a_run_whose_network_takes_two_arguments_is_pruned(folder):
    flags = ["--epochs", "1", "--limit", "60", "--limit_val", "20", "--batch_size", "20", "--out", "run"]
    assert main(["train", "translation", *flags, "--method", "dense"]) == 0
    assert main(["prune", "run", "--out", "out", "--solver", "magnitude", "--samples", "20"]) == 0
    layers = json.loads((folder / "out" / "prune.json").read_text())["solvers"]["magnitude"]
    assert layers
    assert all(layer["samples"] > 20 and layer["note"] == "" for layer in layers)


def test_arrays_are_cast_to_the_dtype_of_the_network(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "half", types.SimpleNamespace(network=lambda: network().bfloat16()))
    np.save("x64.npy", np.random.default_rng(0).standard_normal((64, 16)))
    assert main(["prune", "half:network", "--calibrate", "x64.npy", "--solver", "sparsegpt", "--out", "out"]) == 0
    assert ow.load_state_dict("out/model.openwork.safetensors")["0.weight"].dtype == torch.bfloat16


def test_images_are_made_what_the_network_takes(folder):
    image = pytest.importorskip("PIL.Image")
    draw = np.random.default_rng(0)
    (folder / "photos").mkdir()
    for i in range(3):
        image.fromarray(draw.integers(0, 255, (40, 60, 3), np.uint8)).save(folder / "photos" / f"{i}.png")
    words = ["prune", "resnet18", "--input", "1x3x32x32", "--calibrate", "photos", "--solver", "magnitude"]
    assert main([*words, "--out", "out", "--batch", "2"]) == 0
    layers = json.loads((folder / "out" / "prune.json").read_text())["solvers"]["magnitude"]
    assert layers[-1]["samples"] == 3


def test_a_budget_gives_each_layer_its_pattern(folder, capsys):
    words = [word for word in ARRAYS if word not in ("--solver", "sparsegpt")]
    assert main([*words, "--out", "out", "--budget", "0.6", "--of", "macs"]) == 0
    told = capsys.readouterr().out
    assert "macs: 0.5" in told or "macs: 0.6" in told
    assert main([*words, "--out", "other", "--budget", "0.6", "--pattern", "2:4"]) == 2


def test_a_stopped_command_goes_on(folder, monkeypatch, capsys):
    from openwork.pruning.sparsegpt import SparseGPT

    whole, count = SparseGPT.solve, []

    def stopping(self, *given):
        count.append(1)
        if len(count) == 2:
            raise RuntimeError("stopped here")
        return whole(self, *given)

    assert main([*ARRAYS, "--out", "whole"]) == 0
    monkeypatch.setattr(SparseGPT, "solve", stopping)
    assert main([*ARRAYS, "--out", "out"]) == 2
    assert main([*ARRAYS, "--out", "out"]) == 2
    assert "out is not empty; choose another --out, or add --resume" in capsys.readouterr().err
    assert main([*ARRAYS, "--out", "out", "--resume"]) == 0
    assert len(count) == 3, "the first layer is not pruned again"
    a, b = (ow.load_state_dict(f"{out}/model.openwork.safetensors") for out in ("whole", "out"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert main([*ARRAYS, "--out", "out", "--resume"]) == 2
    assert "out holds a pruned network already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["prune", "made:network", "--out", "out"], "has no training samples of its own: add --calibrate FILE"),
        ([*ARRAYS[:2], "--calibrate", "gone.txt", "--out", "out"], "--calibrate gone.txt: there is no such file"),
        ([*ARRAYS[:2], "--calibrate", "text.txt", "--out", "out"], "made:network has no tokenizer"),
        ([*ARRAYS, "--validate", "text.txt", "--out", "out"], "made:network is no causal language model"),
        (
            [*ARRAYS[:2], "--calibrate", "named.npz", "--out", "out"],
            "--calibrate: missing a required argument: 'input'",
        ),
        ([*ARRAYS[:2], "--calibrate", "number.npz", "--out", "out"], "needed arrays with equally many samples"),
        ([*ARRAYS[:2], "--calibrate", "two.npz", "--out", "out"], "needed arrays with equally many samples"),
    ],
)
def test_bad_input_is_told_in_a_line(folder, capsys, words, what):
    np.savez("two.npz", a=np.zeros((3, 16), np.float32), b=np.zeros((4, 16), np.float32))
    np.savez("named.npz", x=np.zeros((3, 16), np.float32))
    np.savez("number.npz", input=np.zeros((3, 16), np.float32), scale=np.float32(2))
    assert main(words) == 2
    assert what in capsys.readouterr().err
    assert not (folder / "out").exists()
