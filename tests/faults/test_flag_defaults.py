"""Every flag given alone works: defaults that depend on others give way, contradictions that were given do not."""

from dataclasses import fields
from typing import get_args, get_type_hints

import pytest

from openwork.recipes import TASKS, find
from openwork.recipes.config import comparison
from openwork.recipes.module import lr_factor
from openwork.recipes.parser import parse

VALUES = {
    "remainder": ["skip", "pad", "error"],
    "epochs": ["1", "2", "1000"],
    "batch_size": ["1", "1000000"],
    "optimizer": ["sgd", "adam", "adamw"],
    "lr": ["0", "1e-9", "10"],
    "momentum": ["0", "0.999"],
    "betas": ["0 0", "0.99 0.9999"],
    "eps": ["1e-12", "1"],
    "weight_decay": ["0", "1"],
    "clip": ["0", "1e-9", "1e9"],
    "warmup": ["0", "1e-3"],
    "schedule": ["cosine", "linear", "steps", "inverse-sqrt", "constant"],
    "milestones": ["0", "0.5 0.9", "1000"],
    "accumulate": ["1", "2", "3", "7", "100"],
    "devices": ["1", "2", "3", "8"],
    "nodes": ["1", "2", "5"],
    "limit": ["0", "1", "3", "1000000"],
    "limit_val": ["0", "1", "1000000"],
    "checkpoint_every": ["1", "1000000"],
    "validate_every": ["1", "1000"],
    "topology_every": ["1", "1000000"],
    "log_every": ["1", "1000000"],
    "preset": [],
    "image_size": ["32", "128", "200", "1000"],
    "max_size": ["32", "127", "1000"],
    "size": ["128 128", "136 1000"],
    "updates": ["1", "32"],
    "vocabulary": ["300", "100000"],
    "max_length": ["8", "1000"],
    "beams": ["1", "16"],
    "anchors": ["1 2 3 4 5"],
    "mask_convs": ["1", "8"],
    "pattern": ["1:1", "2:4", "4:4", "1:16"],
    "method": ["dense", "ste", "sr-ste"],
    "seeds": ["0", "0 1 2 3 4"],
}


def parsed(task, *words, compared=False):
    cls = find(task).config
    return parse(comparison(cls) if compared else cls, words, "openwork", "")


@pytest.mark.parametrize("compared", [False, True], ids=["train", "compare"])
@pytest.mark.parametrize("task", TASKS)
def test_every_flag_alone_at_its_smallest_and_largest_value(task, compared):
    cls = comparison(find(task).config) if compared else find(task).config
    hints = get_type_hints(cls)
    known = [field.name for field in fields(cls) if field.name in VALUES]
    assert len(known) > 20
    for name in known:
        for value in VALUES[name] if name != "preset" else ["", *cls.presets]:  # not every task has one
            item = get_args(hints[name])  # of a list
            given = [item[0](part) for part in value.split()] if item else hints[name](value)
            config = cls(**{name: given})
            assert config.warmup < config.epochs, (name, value)
            assert config.batch_size % (config.accumulate * config.devices * config.nodes) == 0, (name, value)
            assert config.lr is not None, (name, value)
            if name == "limit" and config.limit:
                assert config.batch_size <= config.limit
            if config.schedule != "steps" and name != "milestones":
                assert config.milestones == []


def test_defaults_are_as_they_were_where_nothing_is_in_their_way():
    usual = {name: parsed(name) for name in TASKS}
    assert {name: (c.batch_size, c.lr, c.warmup) for name, c in usual.items()} == {
        "classification": (64, 0.1, 1.0),
        "detection": (4, 0.02, 0.5),
        "flow": (4, 4e-4, 0.25),
        "language": (8, 6e-3, 0.5),
        "segmentation": (4, 0.02, 0.5),
        "translation": (64, 2e-3, 1.5),
    }
    paper = parsed("detection", "--preset", "paper", "--backbone", "x")
    assert (paper.image_size, paper.max_size, paper.milestones, paper.batch_size) == (800, 1333, [8, 11], 16)
    assert parsed("classification", "--epochs", "2").warmup == 1.0


PRESETS = [(name, preset) for name in TASKS for preset in find(name).config.presets]


@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_a_preset_is_what_it_says(name, preset):
    """In `train` and in `compare`, where nothing else is given."""
    run = find(name).config
    for cls in (run, comparison(run)):
        names = {field.name for field in fields(cls)}
        config = parse(cls, ["--preset", preset, *(["--backbone", "x"] if "backbone" in names else [])], "", "")
        for field, value in cls.presets[preset].items():
            if field in names:
                assert getattr(config, field) == value
            elif field == "decay":
                assert config.method_options[field] == (value if cls is run else [value])


def test_they_give_way():
    assert parsed("classification", "--epochs", "1").warmup == 0.5
    assert parsed("classification", "--preset", "paper", "--epochs", "4").warmup == 2
    assert parsed("classification", "--schedule", "steps").milestones == [7.5, 11.25]
    short = parsed("detection", "--preset", "paper", "--backbone", "x", "--epochs", "6")
    assert short.milestones == [4, 5.5]
    assert parsed("classification", "--accumulate", "3").batch_size == 63
    assert parsed("classification", "--devices", "100").batch_size == 100
    assert parsed("classification", "--optimizer", "adam").lr == 1e-3
    assert parsed("classification", "--preset", "paper", "--optimizer", "adamw").lr == 1e-3
    assert parsed("detection", "--image_size", "300").max_size == 600
    assert parsed("detection", "--max_size", "100").image_size == 100


@pytest.mark.parametrize(
    ("task", "words", "message"),
    [
        ("classification", ["--epochs", "1", "--warmup", "1"], "leaves nothing of --epochs 1"),
        ("classification", ["--batch_size", "64", "--accumulate", "3"], "must divide by accumulate x devices x nodes"),
        ("classification", ["--schedule", "steps", "--milestones"], "needs the epochs of its steps"),
        ("detection", ["--image_size", "300", "--max_size", "200"], "max_size is 200; it must be at least image_size"),
    ],
)
def test_contradictions_that_were_given_are_errors(task, words, message):
    with pytest.raises(ValueError, match=message):
        parsed(task, *words)


def test_a_warm_up_of_half_an_epoch_is_one_of_steps():
    assert lr_factor(0, 5, 10) == pytest.approx(0.2)
