"""Models people train, small and from their configurations: sparsified, trained for two steps, verified, finalized."""

import copy
import re
import warnings
from collections.abc import Mapping

import pytest
import torch
from torch import nn

import openwork as ow
from openwork.utils.torchvision_compat import ensure_torchvision

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
EOS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def images(side=32):
    return torch.randn(2, 3, side, side)


def tokens(length=8):
    return torch.randint(0, 50, (2, length))


def torchvision_models():
    return ensure_torchvision().models


def timm():
    ensure_torchvision()
    return pytest.importorskip("timm")


def transformers():
    ensure_torchvision()
    return pytest.importorskip("transformers")


def resnet50():
    """On 32 pixels its last batch norms see 2 values each: a few steps, dense or sparse, and it gives 1e30."""
    return torchvision_models().resnet50(num_classes=8, width_per_group=8), images(64)


def mobilenet_v2():
    return torchvision_models().mobilenet_v2(num_classes=8, width_mult=0.25), images()


def swin():
    return torchvision_models().SwinTransformer([4, 4], 16, [1, 1], [2, 4], [2, 2], num_classes=8), images()


def torchvision_vit():
    return torchvision_models().VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=8), images()


def timm_vit():
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return timm().create_model("vit_tiny_patch16_224", num_classes=8, **sizes), images()


def convnext():
    return timm().create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 32, 32), num_classes=8), images()


def hf_vit():
    hf = transformers()
    return hf.ViTForImageClassification(hf.ViTConfig(**SMALL, image_size=32, patch_size=8)), {"pixel_values": images()}


def bert():
    hf = transformers()
    config = hf.BertConfig(vocab_size=50, max_position_embeddings=32, **SMALL)
    return hf.BertForMaskedLM(config), {"input_ids": tokens()}


def gpt2():
    hf = transformers()
    config = hf.GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, **EOS)
    return hf.GPT2LMHeadModel(config), {"input_ids": tokens()}


def t5():
    hf = transformers()
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    config = hf.T5Config(vocab_size=50, decoder_start_token_id=0, **sizes, **EOS)
    return hf.T5ForConditionalGeneration(config), {"input_ids": tokens(), "decoder_input_ids": tokens(4)}


def mixtral():
    hf = transformers()
    config = hf.MixtralConfig(vocab_size=50, num_key_value_heads=1, num_local_experts=4, **SMALL, **EOS)
    return hf.MixtralForCausalLM(config), {"input_ids": tokens()}


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.rnn = nn.Embedding(50, 16), nn.LSTM(16, 16, 2, bidirectional=True, batch_first=True)
        self.cell, self.fc = nn.GRUCell(32, 16), nn.Linear(16, 8)

    def forward(self, ids):
        return self.fc(self.cell(self.rnn(self.embed(ids))[0][:, -1]))


def lstm():
    return Tagger(), tokens()


def gan():
    layers = [nn.ConvTranspose2d(16, 32, 4), nn.BatchNorm2d(32), nn.ReLU()]
    layers += [nn.ConvTranspose2d(32, 16, 4, 2, 1, groups=2), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*layers, nn.ConvTranspose2d(16, 3, 4, 2, 1), nn.Tanh()), torch.randn(2, 16, 1, 1)


# Model -> how many weights become sparse, and one weight that stays dense with its reason.
ZOO = {
    resnet50: (53, "conv1.weight", "reduction axis has 3 weights"),
    mobilenet_v2: (35, "features.2.conv.1.0.weight", "depthwise"),
    swin: (10, "features.1.0.attn.relative_position_bias_table", "no known reduction axis"),
    torchvision_vit: (9, "encoder.pos_embedding", "no known reduction axis"),
    timm_vit: (9, "pos_embed", "no known reduction axis"),
    convnext: (12, "stages.0.blocks.0.conv_dw.weight", "depthwise"),
    hf_vit: (13, "vit.embeddings.position_embeddings", "no known reduction axis"),
    bert: (13, "bert.embeddings.word_embeddings.weight", "tied to cls.predictions.decoder.weight"),
    gpt2: (8, "transformer.wte.weight", "tied to lm_head.weight"),
    t5: (32, "shared.weight", "tied to .*encoder.embed_tokens.weight"),
    mixtral: (15, "model.embed_tokens.weight", "embedding"),
    lstm: (11, "embed.weight", "embedding"),
    gan: (3, None, ""),
}


@pytest.fixture(params=ZOO, ids=lambda each: each.__name__)
def case(request):
    """A model in eval mode, an example, the arguments of `sparsify`, and what `ZOO` says of it."""
    model, example = request.param()
    axis = {"*.experts.*": -1} if request.param is mixtral else "input"
    return model.eval(), example, {"axis": axis}, ZOO[request.param]


def output(model, example):
    """The first tensor that the model gives: logits, pictures."""
    out = model(**example) if isinstance(example, Mapping) else model(example)
    return out.logits if hasattr(out, "logits") else out


def train(model, example, steps=2):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    ow.attach(optimizer, model)
    for _ in range(steps):
        optimizer.zero_grad()
        output(model.train(), example).square().mean().backward()
        optimizer.step()
    model.eval()


def test_every_matrix_is_reported_once_as_sparse_or_with_a_reason(case):
    model, example, choices, (sparse, left_alone, reason) = case
    matrices = {id(each): name for name, each in model.named_parameters() if each.ndim >= 2}
    report = ow.sparsify(model, "2:4", example=example, **choices)
    assert sorted(row.name for row in report.rows) == sorted(matrices.values())
    assert len(report.sparse) == sparse
    assert all(report.skipped.values())
    if left_alone:
        assert re.search(reason, report.skipped[left_alone])
    assert report.macs_sparse < report.macs_dense
    assert all(row.macs_dense for row in report.rows if row.pattern)


def test_training_verifying_and_finalizing(case):
    model, example, choices, _ = case
    classes = {name: type(module) for name, module in model.named_modules()}
    parameters = dict(model.named_parameters())
    report = ow.sparsify(model, "2:4", **choices)
    assert ow.verify(model, example).notes == ()
    train(model, example)
    assert ow.verify(model, example).notes == ()
    before = output(model, example)
    assert before.isfinite().all()
    ow.finalize(model)
    assert torch.equal(output(model, example), before)
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert all(each is parameters[name] for name, each in model.named_parameters())
    assert list(dict(model.named_parameters())) == list(parameters)
    assert ow.verify(model, example, pattern=ow.Selection("2:4", **choices)).sparse == report.sparse


def test_checkpoints_load_both_ways(case):
    model, example, choices, _ = case
    dense, names = copy.deepcopy(model), list(model.state_dict())
    ow.sparsify(model, "2:4", **choices)
    assert list(model.state_dict()) == names
    with torch.no_grad():
        for each in dense.parameters():
            each.add_(0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(dense.state_dict(), strict=True)
        other = copy.deepcopy(dense)
        other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(output(other, example), output(dense, example))
    ow.project(other, "2:4", **choices)
    assert torch.equal(output(model, example), output(other, example))


@pytest.mark.parametrize("method", [ow.STE(), ow.ASP()], ids=str)
@pytest.mark.parametrize("make", [bert, gpt2, gan], ids=lambda each: each.__name__)
def test_the_other_methods_train_them_too(make, method):
    model, example = make()
    ow.sparsify(model, "1:4", method)
    train(model, example)
    ow.verify(model, example)
    before = output(model, example)
    assert torch.equal(output(ow.finalize(model), example), before)


def test_the_transposed_linear_layers_of_gpt2_are_grouped_along_their_inputs():
    model, _ = gpt2()
    ow.sparsify(model, "2:4")
    weight = model.transformer.h[0].attn.c_attn.weight
    assert weight.shape == (16, 48)  # inputs first
    assert ((weight != 0).unflatten(0, (4, 4)).sum(1) == 2).all()


def test_save_pretrained_of_a_finalized_model_gives_the_same_logits(tmp_path):
    model, example = gpt2()
    ow.sparsify(model, "2:4")
    train(model, example)
    ow.finalize(model).save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(output(again, example), output(model, example))
    ow.verify(again, example, pattern="2:4")


def test_generation_is_sparse():
    model, example = gpt2()
    ow.sparsify(model.eval(), "2:4")
    twin = ow.finalize(copy.deepcopy(model))
    settings = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**example, **settings), twin.generate(**example, **settings))
