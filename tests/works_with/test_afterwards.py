"""What people do with a model beside training it: average it, adapt it, quantize it, export it."""

import copy
import functools

import pytest
import torch
from plain_loop import distance
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from works_with.harness import STEPS, Scenario, Training, nets_of
from works_with.nets import Transformer, batches, loss_of, made, sparse

import openwork as ow
from openwork.utils.torchvision_compat import ensure_torchvision

KEPT, LAST = 0.9, 5


def trained(kind, after_step=lambda model: None):
    """A sparsified model after 20 steps."""
    training = Training(Scenario(), kind)
    for batch in batches(kind, STEPS):
        training.on(batch)
        after_step(training.model)
    return training.model.eval()


@functools.cache
def _trained_once(kind):
    return ow.finalize(trained(kind))


def sparse_base(kind):
    """A finalized model after 20 steps."""
    return copy.deepcopy(_trained_once(kind))


def example(kind):
    return batches(kind, 1)[0][0]


def loss_on(model, kind):
    """The mean loss over the training batches."""
    with torch.no_grad():
        return sum(loss_of(model, batch).item() for batch in batches(kind, STEPS)) / STEPS


def projected(kind, weights):
    """A plain model of these dense weights, zeroed to 2:4."""
    model = made(kind).eval()
    model.load_state_dict(weights)
    ow.project(model, "2:4", exclude=["head"])
    return model


# --- averages ----------------------------------------------------------------------------------------------------


def averaged_model(model):
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(KEPT)), AveragedModel.update_parameters


def timm_ema(model):
    ensure_torchvision()
    utils = pytest.importorskip("timm.utils")
    return utils.ModelEmaV3(model, decay=KEPT), utils.ModelEmaV3.update


EMAS = {
    "EMA: `torch.optim.swa_utils.AveragedModel`": (averaged_model, ()),
    "EMA: timm's `ModelEmaV3`": (timm_ema, ("timm",)),
}


@pytest.mark.parametrize("name", EMAS)
def test_an_average_is_one_of_dense_weights_and_evaluates_projected(row, name):
    make, packages = EMAS[name]
    differences = {}
    for kind in nets_of(Scenario()):
        seen, averages = [], []

        def follow(model, seen=seen, averages=averages):
            if not averages:
                averages.append(make(model))
            average, update = averages[0]
            update(average, model)
            seen.append({name: w.clone() for name, w in model.state_dict().items()})

        trained(kind, follow)
        wanted = seen[0]
        for weights in seen[1:]:
            wanted = {name: KEPT * w + (1 - KEPT) * weights[name] for name, w in wanted.items()}
        module = averages[0][0].module.eval()
        differences[kind.__name__] = distance(module.state_dict(), wanted)
        assert differences[kind.__name__] < 1e-6
        ow.verify(module, example(kind))
        plain = projected(kind, module.state_dict())
        assert torch.equal(module(example(kind)), plain(example(kind)))
        assert torch.equal(ow.finalize(module)(example(kind)), plain(example(kind)))
    row("Averages", name, difference=differences, tolerance=1e-6, packages=packages)


def test_stochastic_weight_averaging(row):
    differences = {}
    for kind in nets_of(Scenario()):
        seen, averages = [], []

        def follow(model, seen=seen, averages=averages):
            seen.append({name: w.clone() for name, w in model.state_dict().items()})
            if len(seen) > STEPS - LAST:
                averages or averages.append(AveragedModel(model))
                averages[0].update_parameters(model)

        trained(kind, follow)
        (average,) = averages
        update_bn([batch[0] for batch in batches(kind, 2)], average)
        wanted = {name: sum(each[name] for each in seen[-LAST:]) / LAST for name in seen[0]}
        found = average.module.state_dict()
        differences[kind.__name__] = distance(found, wanted)
        assert differences[kind.__name__] < 1e-6
        ow.verify(average, example(kind))
        assert torch.equal(average.module(example(kind)), projected(kind, found)(example(kind)))
    row("Averages", "SWA: `AveragedModel`, `update_bn`", difference=differences, tolerance=1e-6)


# --- LoRA --------------------------------------------------------------------------------------------------------


@pytest.fixture
def peft():
    ensure_torchvision()
    return pytest.importorskip("peft")


def adapted(peft, base, steps=40):
    """A LoRA model on `base`, trained on what the base was trained on."""
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["inner", "outer"]))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for batch in batches(Transformer, STEPS) * (steps // STEPS):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    return model.eval()


def test_lora_on_a_finalized_base_and_what_merging_costs(row, peft):
    """Merged, a network is dense; projected it is sparse again, and loses part of what it learned."""
    base = sparse_base(Transformer)
    losses = {"sparse base": loss_on(base, Transformer)}
    model = adapted(peft, copy.deepcopy(base))
    losses["with LoRA, base still 2:4"] = loss_on(model, Transformer)
    inner = {name.replace(".base_layer", ""): w for name, w in model.base_model.model.state_dict().items()}
    assert all(torch.equal(inner[name], base.state_dict()[name]) for name in Transformer.dims)
    merged = model.merge_and_unload()
    assert abs(loss_on(merged, Transformer) - losses["with LoRA, base still 2:4"]) < 1e-4
    with pytest.raises(ow.NotSparse):
        ow.verify(merged, pattern=ow.Selection("2:4", exclude=["head"]))
    ow.project(merged, "2:4", exclude=["head"])
    ow.verify(merged, example(Transformer), pattern=ow.Selection("2:4", exclude=["head"]))
    losses["merged and projected to 2:4"] = loss_on(merged, Transformer)
    note = "loss of the transformer: " + ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
    row("Adapters", "LoRA on a finalized base, merged, then `ow.project`", note=note, packages=("peft",))


def test_lora_on_a_model_in_training_is_warned_of(row, peft):
    """And this is why: what it learned is added to the dense weights, and pruned with them."""
    model = sparse(Transformer)
    before = loss_on(model, Transformer)
    with pytest.warns(UserWarning, match="LoRA sits on a model that is still sparsified") as caught:
        model = adapted(peft, model)
    adapted_loss = loss_on(model, Transformer)
    assert adapted_loss < before - 0.1
    merged = model.merge_and_unload()
    assert adapted_loss < loss_on(merged, Transformer) < before
    ow.verify(merged)
    row("Adapters", "LoRA on a model that is not finalized", error=str(caught[0].message), packages=("peft",))


# --- quantization ------------------------------------------------------------------------------------------------


def test_int8_weights_of_torchao(row):
    quantization = pytest.importorskip("torchao.quantization")
    model = sparse_base(Transformer)
    before = loss_on(model, Transformer)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert type(model.layers[0].inner.weight) is not torch.nn.Parameter
    report = ow.verify(model, example(Transformer), pattern=ow.Selection("2:4", exclude=["head"]))
    assert report.sparse.keys() == Transformer.dims.keys()
    after = loss_on(model, Transformer)
    assert abs(after - before) < 0.01
    note = f'`ow.verify(model, pattern="2:4")` holds; loss {before:.4f} before, {after:.4f} after'
    row("Quantization", "torchao's `Int8WeightOnlyConfig` on a finalized model", note=note, packages=("torchao",))


def test_int8_weights_of_torchao_that_are_dense_are_found():
    quantization = pytest.importorskip("torchao.quantization")
    model = made(Transformer)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    with pytest.raises(ow.NotSparse, match=r"24 weights are denser"):
        ow.verify(model, pattern=ow.Selection("2:4", exclude=["head"]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_dynamic_quantization_of_torch(row):
    """It replaces the modules, and packs the weights: `verify` sees none. Read back they are 2:4."""
    model = sparse_base(Transformer)
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {torch.nn.Linear}, dtype=torch.qint8)
    assert abs(loss_on(quantized, Transformer) - loss_on(model, Transformer)) < 0.01
    with pytest.raises(ValueError, match="has no weight that can be sparse") as caught:
        ow.verify(quantized, pattern=ow.Selection("2:4", exclude=["head"]))
    for name in Transformer.dims:
        weight = quantized.get_submodule(name.removesuffix(".weight")).weight().dequantize()
        model.get_parameter(name).data = weight
    ow.verify(model, pattern=ow.Selection("2:4", exclude=["head"]))
    what = "torch.ao's `quantize_dynamic` on a finalized model"
    row("Quantization", what, note="read back, the weights are 2:4: `module.weight().dequantize()`")
    row(
        "Quantization",
        "`ow.verify` of a model that `quantize_dynamic` quantized",
        error=" ".join(str(caught.value).split()),
    )


# --- export ------------------------------------------------------------------------------------------------------


def test_export_of_a_finalized_model(row):
    for kind in nets_of(Scenario()):
        model = sparse_base(kind)
        exported = torch.export.export(model, (example(kind),))
        assert torch.equal(exported.module()(example(kind)), model(example(kind)))
        assert list(exported.state_dict) == list(made(kind).state_dict())
        ow.verify(made_of(kind, exported.state_dict), pattern=ow.Selection("2:4", exclude=["head"]))
    row("Export", "`torch.export` of a finalized model")


def made_of(kind, state):
    model = made(kind)
    model.load_state_dict(state)
    return model
