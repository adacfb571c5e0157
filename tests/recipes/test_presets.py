"""Each preset starts on a miniature of its data set, on two processes: killed and resumed, it ends as one that was not.

Of the preset's flags only sizes are others: of the network, the images, the batch, and how often things happen.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from miniatures import coco, flying_chairs, imagenet, wmt14
from safetensors.torch import save_file

from openwork.recipes import TASKS, find
from openwork.recipes.json_files import read_lines
from openwork.recipes.parser import parse
from openwork.recipes.weights import read_weights

ALL = "--devices 2 --accelerator cpu --epochs 1 --warmup 0.5 --checkpoint_every 2 --topology_every 2 --log_every 1"
ALL += " --threads 1 --progress false"
DETECTOR = "--model resnet18 --width 8 --fpn_channels 16 --head 32 --image_size 64 --max_size 96 --workers 0"
DETECTOR += " --batch_size 2 --limit 6 --limit_val 2"
# task, preset: what makes the miniature, its flag, sizes. Three steps.
CASES = {
    ("classification", "paper"): (
        lambda folder: imagenet(folder, train=4, val=1),
        "--data imagefolder=DATA",
        "--model resnet8 --image_size 32 --batch_size 4 --workers 0",
    ),
    ("detection", "paper"): (coco, "--data coco=DATA --backbone BACKBONE", DETECTOR),
    ("segmentation", "paper-2x"): (coco, "--data coco=DATA --backbone BACKBONE", DETECTOR),
    ("flow", "paper"): (
        lambda folder: flying_chairs(folder, pairs=7),
        "--data flyingchairs=DATA",
        "--model raft_small --size 128 128 --updates 1 --val_updates 1 --batch_size 2 --workers 0",
    ),
    ("translation", "paper"): (
        wmt14,
        "--data wmt14=DATA --validation newstest2014",
        "--model transformer-tiny --vocabulary 320 --batch_size 20 --limit 60 --beams 1 --max_length 64",
    ),
}
SIZES = """model width fpn_channels head image_size max_size size updates val_updates vocabulary max_length beams
batch_size epochs warmup milestones workers checkpoint_every topology_every log_every"""
KILLED = 3  # after the last batch, before it is counted; the checkpoint is of step 2


def flags_of(case, folder, strategy):
    make, data, sizes = CASES[case]
    make(folder / "data") if not (folder / "data").exists() else None
    words = f"--preset {case[1]} {data} {sizes} {ALL} --strategy {strategy}".split()
    places = {"DATA": str(folder / "data"), "BACKBONE": str(folder / "backbone.safetensors")}
    for name, place in places.items():
        words = [word.replace(name, place) for word in words]
    return words


def backbone(file):
    """A classifier's weights, as --backbone takes them: the ResNet of the miniature detectors."""
    from openwork.recipes.rcnn import nn, resnet_body

    torch.manual_seed(0)
    save_file(resnet_body("resnet18", 8, nn.BatchNorm2d).state_dict(), file)


def trained(jobs):
    script = Path(__file__).with_name("forked.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, script, json.dumps(jobs)], capture_output=True, text=True, check=False, env=environment
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1]), ran.stderr


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_two_processes_killed_and_resumed_end_as_two_that_were_not(case, tmp_path):
    backbone(tmp_path / "backbone.safetensors")
    jobs = []
    for strategy in ("ddp", "fsdp2"):
        flags = flags_of(case, tmp_path, strategy)
        for name, more, kill in (("whole", [], 0), ("killed", [], KILLED), ("killed", ["--resume"], 0)):
            out = ["--out", str(tmp_path / strategy / name)]
            jobs.append({"task": case[0], "flags": [*flags, *out, *more], "kill": kill})
    codes, told = trained(jobs)
    for number, strategy in enumerate(("ddp", "fsdp2")):
        whole, killed, resumed = codes[3 * number : 3 * number + 3]
        assert (whole, resumed) == ([0, 0], [0, 0]), told
        assert killed[0] != 0
        assert killed[1] == -9
        one, other = (tmp_path / strategy / name for name in ("whole", "killed"))
        for name in ("metrics.jsonl", "topology.jsonl"):
            assert (one / name).read_text() == (other / name).read_text()
        assert [r["step"] for r in read_lines(one / "metrics.jsonl") if "train_loss" in r] == [1, 2, 3]
        a, b = (read_weights(each / "model.safetensors") for each in (one, other))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_every_preset_has_a_miniature():
    """Both of detection and segmentation are the same dict but for the length."""
    kept = {task for task, _ in CASES}
    assert kept == {name for name in TASKS if find(name).config.presets}
    for task in ("detection", "segmentation"):
        once, twice = (find(task).config.presets[name] for name in ("paper", "paper-2x"))
        assert {key for key in once if once[key] != twice[key]} == {"epochs", "milestones"}


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_miniature_changes_sizes_alone(case, tmp_path):
    sizes = set(SIZES.split())
    preset = find(case[0]).config.presets[case[1]]
    config = parse(find(case[0]).config, flags_of(case, tmp_path, "ddp"), "", "")
    for name in preset.keys() - sizes - {"patterns", "decay"}:
        assert getattr(config, name) == preset[name], name
    assert config.method_options["decay"] == preset["decay"]
