"""The parts of the recipe that tasks share."""

import numpy as np
import pytest
import torch
from PIL import Image

from openwork.cli.main import main
from openwork.recipes import TASKS, find
from openwork.recipes.classification import ClassificationConfig as Config
from openwork.recipes.config import comparison
from openwork.recipes.images import imagefolder
from openwork.recipes.module import TaskModule, lr_factor
from openwork.recipes.rundir import RunDir
from openwork.recipes.task import Metric, build_optimizer, percent


def test_every_task_is_found_and_named():
    for name in TASKS:
        assert find(name).name == find(name).config.task == name
    with pytest.raises(ValueError, match="no task 'clasification'; use one of classification"):
        find("clasification")


def test_a_comparison_has_the_tasks_fields_and_defaults():
    compared = comparison(Config)(dropout=0.1)
    assert (compared.model, compared.dropout, compared.out) == ("resnet8", 0.1, "runs/compare-classification")
    assert not hasattr(compared, "pattern")


SCHEDULES = {
    ("cosine", ()): [0.5, 1, 1, 0.5 * (1 + 2**-0.5), 0.5, 0.5 * (1 - 2**-0.5)],
    ("linear", ()): [0.5, 1, 1, 0.75, 0.5, 0.25],
    ("steps", (3, 5)): [0.5, 1, 1, 0.1, 0.1, 0.01],
    ("inverse-sqrt", ()): [0.5, 1, (2 / 3) ** 0.5, (2 / 4) ** 0.5, (2 / 5) ** 0.5, (2 / 6) ** 0.5],
    ("constant", ()): [0.5, 1, 1, 1, 1, 1],
}


@pytest.mark.parametrize(("schedule", "milestones"), SCHEDULES)
def test_schedules(schedule, milestones):
    """Two steps of warm-up, six in all."""
    factors = [lr_factor(step, 2, 6, schedule, milestones) for step in range(6)]
    assert factors == pytest.approx(SCHEDULES[schedule, milestones])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule": "polynomial"}, "schedule 'polynomial' is not known; use one of cosine"),
        ({"optimizer": "lion"}, "optimizer 'lion' is not known; use one of sgd, adam, adamw"),
        ({"schedule": "steps", "milestones": []}, "--milestones 8 11"),
        ({"clip": -1.0}, "clip is -1.0; it must not be negative"),
        ({"betas": [0.9]}, "Adam takes two"),
    ],
)
def test_bad_values_say_what_to_do(fields, message):
    with pytest.raises(ValueError, match=message):
        Config(**fields)


def test_optimizers_take_their_flags():
    net = torch.nn.Linear(4, 4)
    adam = build_optimizer(Config(optimizer="adamw", lr=0.01, betas=[0.8, 0.9], eps=1e-5, weight_decay=0.3), net)
    assert type(adam) is torch.optim.AdamW
    values = {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-5, "weight_decay": 0.3}
    assert {key: adam.defaults[key] for key in values} == values
    net.bias.requires_grad_(False)
    assert build_optimizer(Config(), net).param_groups[0]["params"] == [net.weight]


def test_metrics_are_shown_in_their_units():
    pixels = Metric("val_epe", "end-point error", "px", digits=3, higher_is_better=False)
    assert pixels.full_text(1.25) == "end-point error 1.250 px"
    assert (pixels.text(None), pixels.text(0.5, "+")) == ("-", "+0.500")
    assert percent("val_accuracy", "accuracy").full_text(0.5) == "accuracy 50.00 %"


def test_a_clipped_step_still_takes_the_whole_term(tmp_path):
    """The term belongs to the weights, not to the loss: clipping the gradient to almost nothing must not shrink it."""
    from openwork.recipes.recipe import fit, prepare

    config = Config(
        limit=64, epochs=1, warmup=0, lr=0.1, momentum=0, weight_decay=0, method_options={"decay": 0.5}, clip=1e-9,
        threads=1, schedule="constant", progress=False, out=str(tmp_path),
    )  # fmt: skip
    task = find("classification")
    data, net, _ = prepare(task, config)
    name, weight = "layer1.0.conv1", net.layer1[0].conv1.parametrizations.weight.original
    before, kept = weight.detach().clone(), net.layer1[0].conv1.weight.detach() != 0
    fit(task, config, data, net, RunDir(tmp_path), ())
    assert torch.allclose(weight[~kept], before[~kept] * (1 - 0.1 * 0.5), atol=1e-7), name
    assert torch.allclose(weight[kept], before[kept], atol=1e-7)


def test_predictions_of_several_processes_come_in_the_order_of_the_samples(monkeypatch):
    """Process r of three has samples r, r + 3, ...; eight samples."""
    module = TaskModule.__new__(TaskModule)
    torch.nn.Module.__init__(module)
    module._trainer = type("Trainer", (), {"world_size": 3})()

    def gather(parts, mine):
        parts[:] = [[0, 3, 6], [1, 4, 7], [2, 5]]

    monkeypatch.setattr("openwork.recipes.module.dist.all_gather_object", gather)
    monkeypatch.setattr(TaskModule, "trainer", property(lambda self: self._trainer))
    module._predictions = []
    assert module._gathered() == list(range(8))


@pytest.fixture
def folder(tmp_path):
    for part in ("train", "val"):
        for label in ("a", "b"):
            (tmp_path / part / label).mkdir(parents=True)
            for i in range(3):
                pixels = np.full((16, 16, 3), 40 * i, np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / label / f"{i}.png")
    (tmp_path / "train" / "b" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\nno image")
    return tmp_path


def test_an_image_that_cannot_be_decoded_is_named(folder):
    data = imagefolder(folder, 16, workers=0)
    with pytest.raises(ValueError, match=r"train/b/1.png cannot be decoded .* --skip_bad"):
        list(data.train_batches([np.arange(6)], 0, 0))


def test_the_error_of_a_loader_process_is_one_line(folder, capsys, tmp_path):
    flags = "--image_size 16 --epochs 1 --warmup 0 --batch_size 6 --workers 1 --model resnet8 --progress false"
    words = ["train", "classification", "--data", f"imagefolder={folder}", *flags.split(), "--out", str(tmp_path / "r")]
    assert main(words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith(f"openwork: {folder}/train/b/1.png cannot be decoded")


def test_images_that_cannot_be_decoded_are_left_out_and_counted(folder, capsys, tmp_path):
    data = imagefolder(folder, 16, workers=0, skip_bad=True)
    assert (data.train_count, data.val_count, data.skipped) == (5, 6, 1)
    ((images, labels),) = data.train_batches([np.arange(5)], 0, 0)
    assert (len(images), labels.tolist()) == (5, [0, 0, 0, 1, 1])
    flags = "--image_size 16 --epochs 1 --warmup 0 --batch_size 5 --workers 0 --model resnet8 --progress false"
    words = ["train", "classification", "--data", f"imagefolder={folder}", "--skip_bad", *flags.split()]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    assert "1 sample could not be read and was left out" in capsys.readouterr().out


def test_the_configuration_of_a_run_is_a_configuration_file(tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text("task: flow\nepochs: 3\n")
    assert main(["train", "classification", "--config", str(config)]) == 2
    assert "a configuration of the task flow, not of classification" in capsys.readouterr().err
