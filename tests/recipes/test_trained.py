"""Trained networks from a run directory of which little is left, with and without the data."""

import json
import re
import shutil

import pytest
import torch
from miniatures import coco, flying_chairs, imagenet, wmt14
from safetensors.torch import save_file

import openwork as ow
from openwork.cli.main import main
from openwork.recipes import find
from openwork.recipes.config import values_of
from openwork.recipes.recipe import train
from openwork.recipes.rundir import RunDir
from openwork.recipes.trained import evaluate, load_run
from openwork.recipes.weights import save_weights

DETECTOR = {"data": "coco=DATA", "image_size": 64, "max_size": 64, "workers": 0, "skip_bad": True}
NARROW = {"width": 64, "backbone": "BACKBONE", "frozen_norm": True, "trainable_layers": 3}
CASES = {
    "classification": (imagenet, {"data": "imagefolder=DATA", "image_size": 32, "workers": 0}),
    "detection": (coco, DETECTOR),
    "segmentation": (coco, DETECTOR | NARROW),
    "flow": (flying_chairs, {"data": "flyingchairs=DATA"}),
    "translation": (
        wmt14,
        {"data": "wmt14=DATA", "validation": "newstest2014", "vocabulary": 320, "languages": ["de", "en"]},
    ),
    "language": (wmt14, {"data": "text=DATA/train.en", "length": 16, "vocabulary": 320}),
}


def reduced(name, data, folder):
    """A run directory with a network that was never trained, as a run would leave it, and only what must be in it."""
    import torchvision

    make, fields = CASES[name]
    task, data = find(name), make(data)
    backbone = folder.with_name("backbone.safetensors")
    save_file(torchvision.models.resnet18().state_dict(), backbone)
    places = {"DATA": str(data), "BACKBONE": str(backbone)}
    placed = {key: re.sub("DATA|BACKBONE", lambda m: places[m[0]], str(value)) for key, value in fields.items()}
    config = task.config(**fields | {key: placed[key] for key in fields.keys() & {"data", "backbone"}}, out=str(folder))
    samples = task.load_data(config)
    net = task.build(config, samples)
    ow.sparsify(net, "2:4", ow.STE(), example=task.example(samples))
    ow.finalize(net)
    run = RunDir(folder)
    run.write_config(values_of(config))
    run.write_network(task.network_facts(samples))
    task.save_artifacts(samples, folder)
    save_weights(net, run.model)
    backbone.unlink()
    return net, samples


def called(net, example):
    """The network runs on its example."""
    with torch.no_grad():
        if isinstance(example, dict):
            return net(**example)
        return net(*example) if isinstance(example, tuple) else net(example)


@pytest.mark.parametrize("name", CASES)
def test_a_network_is_there_without_its_data(name, tmp_path):
    data, folder = tmp_path / "data", tmp_path / "model"
    net, samples = reduced(name, data, folder)
    beside = {"translation": {"vocabulary.json"}, "language": {"vocabulary.json"}, "flow": set()}
    kept = {"config.yaml", "model.safetensors"} | beside.get(name, {"network.json"})
    assert {path.name for path in folder.iterdir()} == kept
    with_data = load_run(folder)
    shutil.rmtree(data)
    found = load_run(folder)
    for each in (with_data, found):
        assert not each.net.training
        state = each.net.state_dict()
        assert state.keys() == net.state_dict().keys()
        assert all(torch.equal(state[key], value) for key, value in net.state_dict().items())
        called(each.net, each.example)
    for field in ("classes", "channels", "names"):
        assert getattr(found.info, field, None) == getattr(samples.info, field, None)
    if name in ("translation", "language"):
        assert found.info.tokenizer.get_vocab() == samples.info.tokenizer.get_vocab()


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A run on images in folders, what is left of it, and its result; its data is moved to DATA/moved."""
    place = tmp_path_factory.mktemp("runs")
    imagenet(place / "images")
    small = {"image_size": 32, "batch_size": 8, "epochs": 1, "progress": False, "threads": 1, "workers": 0}
    config = find("classification").config(**small, data=f"imagefolder={place / 'images'}", out=str(place / "run"))
    result = train(config)
    (place / "images").rename(place / "moved")
    (place / "model").mkdir()
    for name in ("config.yaml", "model.safetensors", "network.json"):
        shutil.copy(place / "run" / name, place / "model")
    return place, result


@pytest.fixture
def model(classifier, tmp_path):
    return shutil.copytree(classifier[0] / "model", tmp_path / "model")


def test_what_is_left_of_a_run_scores_as_the_run_did(classifier, model, capsys):
    place, result = classifier
    assert main(["evaluate", str(model), "--data", f"imagefolder={place / 'moved'}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {key: result[key] for key in found}
    assert main(["evaluate", str(model)]) == 2
    assert f"there is no folder {place / 'images'}" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        evaluate(model, load_run(model).net)


def test_other_classes_are_no_data_for_it(classifier, model, tmp_path, capsys):
    other = shutil.copytree(classifier[0] / "moved", tmp_path / "other")
    for part in ("train", "val"):
        (other / part / "n01443537").rename(other / part / "n99999999")
    assert main(["evaluate", str(model), "--data", f"imagefolder={other}"]) == 2
    error = capsys.readouterr().err
    assert (
        "was trained for the classes n01440764, n01443537, n01484850, and this data has n01440764, n01484850" in error
    )


def test_plan_needs_no_data(model, capsys):
    assert main(["inspect", str(model / "model.safetensors")]) == 0
    assert main(["verify", str(model)]) == 0


def test_a_network_stored_in_bfloat16_is_read_as_float32(model):
    net = load_run(model).net
    save_weights(load_run(model).net.to(torch.bfloat16), model / "model.safetensors")
    again = load_run(model).net.state_dict()
    for name, tensor in net.state_dict().items():
        wanted = tensor.bfloat16().float() if tensor.is_floating_point() else tensor
        assert again[name].dtype == wanted.dtype
        assert torch.equal(again[name], wanted)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no folder"),
        ("[]", r"network.json is not what a run writes .*remove it"),
        ('{"classes": 3}', r"network.json: it lacks channels, size"),
        ('{"classes": 3, "channels": 3, "size": [32, 1000000000]}', "at most 4096 pixels a side"),
        ('{"classes": 4, "channels": 3, "size": [32, 32]}', "does not fit this model"),
    ],
)
def test_without_its_data_a_run_needs_a_sound_network_json(model, text, message):
    (model / "network.json").unlink()
    if text:
        (model / "network.json").write_text(text)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        load_run(model)


def test_a_run_that_started_from_another_is_scored_without_it(classifier, model, capsys):
    place, result = classifier
    text = re.sub("(?m)^(decay|decoupled): .*$", "", (model / "config.yaml").read_text())
    (model / "config.yaml").write_text(text.replace("method: sr-ste", "method: asp").replace("init: ''", "init: gone"))
    assert main(["evaluate", str(model), "--data", f"imagefolder={place / 'moved'}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {key: result[key] for key in found}
