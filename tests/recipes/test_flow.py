"""Optical flow: data sets, loss and score by hand, the SR-STE term of reused weights, and runs end to end."""

import copy
import dataclasses
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from flowbytes import flo, pfm
from miniatures import flying_chairs as chairs
from miniatures import frame, put
from PIL import Image
from torch.func import functional_call

import openwork as ow
from openwork.cli.main import main
from openwork.recipes import flow_data
from openwork.recipes.flow import TASK, build_raft, coloured, errors_of, freeze_batch_norm, sequence_loss
from openwork.recipes.flow import FlowConfig as Config
from openwork.recipes.flow_data import Pairs, augmented, mirrored, padded, scaled
from openwork.recipes.parser import parse
from openwork.recipes.recipe import prepare, train
from openwork.recipes.rundir import read_lines
from openwork.recipes.trained import read_run
from openwork.recipes.weights import read_weights

# --- data sets in their own layouts ------------------------------------------------------------------------------

WIDE = np.zeros((2, 130, 136), np.float32)


def things(folder):
    folder = folder / "FlyingThings3D"
    for part in ("TRAIN", "TEST"):
        for number in (6, 7, 8):
            frame(folder / f"frames_cleanpass/{part}/A/0000/left/{number:04d}.png")
            for when, name in (("into_future", "Future"), ("into_past", "Past")):
                where = folder / f"optical_flow/{part}/A/0000/{when}/left"
                put(where / f"OpticalFlowInto{name}_{number:04d}_L.pfm", pfm(WIDE + number))


def sintel(folder):
    folder = folder / "Sintel"
    for scene in "abcde":
        for number in (1, 2, 3):
            for part in ("clean", "final"):
                frame(folder / f"training/{part}/{scene}/frame_{number:04d}.png")
            if number < 3:
                put(folder / f"training/flow/{scene}/frame_{number:04d}.flo", flo(WIDE))


def kitti(folder, pairs=6):
    folder = folder / "KittiFlow"
    for i in range(pairs):
        for name in (f"image_2/{i:06d}_10.png", f"image_2/{i:06d}_11.png", f"flow_occ/{i:06d}_10.png"):
            frame(folder / "training" / name)


@pytest.fixture
def decoded(monkeypatch):
    """KITTI's 16 bits, as torchvision's own decoder gives them: it is missing where torch and torchvision do not match,
    and Pillow gives 8. A quarter of the pixels is known, with flow (1.5, 1.5)."""
    pixels = torch.full((3, 130, 136), 2**15 + 96, dtype=torch.uint16)
    pixels[2] = (torch.arange(130 * 136).reshape(130, 136) % 4 == 0).to(torch.uint16)
    monkeypatch.setattr("torchvision.datasets._optical_flow.decode_png", lambda _: pixels)
    monkeypatch.setattr("torchvision.datasets._optical_flow.read_file", Path)


def loaded(source, folder, **flags):
    return TASK.load_data(Config(data=f"{source}={folder}", workers=0, **flags))


def names(files, chosen):
    return [tuple(Path(name).name for name in flow_data.files_of(files.source, files.indices[i])) for i in chosen]


@pytest.mark.usefixtures("decoded")
@pytest.mark.parametrize(
    ("source", "make", "train", "val"),
    [
        ("flyingchairs", chairs, 2, 1),
        ("flyingthings3d", things, 4, 4),
        ("sintel", sintel, 16, 4),
        ("kitti", kitti, 5, 1),
    ],
)
def test_data_sets_are_read_in_their_own_layout(tmp_path, source, make, train, val):
    make(tmp_path)
    data = loaded(source, tmp_path)
    assert (data.train_count, data.val_count, data.skipped) == (train, val, 0)
    (batch,) = data.train_batches([np.array([0, 1])], 0, 0)
    assert [tuple(part.shape) for part in batch] == [
        (2, 3, 128, 128),
        (2, 3, 128, 128),
        (2, 2, 128, 128),
        (2, 128, 128),
    ]
    (batch,) = data.val_batches([np.array([0])])
    assert batch.first.shape == (1, 3, 136, 136)  # padded to a multiple of 8
    assert not batch.known[:, 130:].any()
    assert batch.known[:, :130].float().mean() == (0.25 if source == "kitti" else 1.0)


def test_the_frames_of_a_pair_are_those_its_flow_is_between(tmp_path):
    for make in (chairs, things, sintel, kitti):
        make(tmp_path)
    assert names(loaded("flyingchairs", tmp_path).val, [0]) == [("00002_img1.ppm", "00002_img2.ppm", "00002_flow.flo")]
    assert names(loaded("flyingthings3d", tmp_path).train, range(4)) == [
        ("0006.png", "0007.png", "OpticalFlowIntoFuture_0006_L.pfm"),
        ("0007.png", "0008.png", "OpticalFlowIntoFuture_0007_L.pfm"),
        ("0007.png", "0006.png", "OpticalFlowIntoPast_0007_L.pfm"),
        ("0008.png", "0007.png", "OpticalFlowIntoPast_0008_L.pfm"),
    ]
    pairs = [(f"frame_000{i}.png", f"frame_000{i + 1}.png", f"frame_000{i}.flo") for i in (1, 2)]
    assert names(loaded("sintel", tmp_path).val, range(4)) == pairs * 2
    assert names(loaded("kitti", tmp_path).val, [0]) == [("000004_10.png", "000004_11.png", "000004_10.png")]
    flow = loaded("flyingthings3d", tmp_path).train.source[0][2]
    assert (flow == 6).all()


@pytest.mark.parametrize("source", ["flyingchairs", "flyingthings3d", "sintel", "kitti", "photos"])
def test_an_empty_folder_is_told_what_it_must_hold(tmp_path, source):
    with pytest.raises(FileNotFoundError, match=f"^{source}: .*{re.escape(str(tmp_path))}"):
        loaded(source, tmp_path)


def test_a_list_of_another_length_than_the_pairs_is_refused(tmp_path):
    chairs(tmp_path)
    put(tmp_path / "FlyingChairs/FlyingChairs_train_val.txt", b"1\n2\n")
    with pytest.raises(FileNotFoundError, match=r"flyingchairs: .*must hold FlyingChairs/data"):
        loaded("flyingchairs", tmp_path)
    put(tmp_path / "FlyingChairs/FlyingChairs_train_val.txt", b"1\n2\n1\n1\n")
    with pytest.raises(ValueError, match=r"FlyingChairs_train_val.txt .* it has 4 entries for 3 flows"):
        loaded("flyingchairs", tmp_path)


def test_a_missing_file_does_not_shift_those_after_it(tmp_path):
    """torchvision puts files together by their order."""
    chairs(tmp_path, 5)
    (tmp_path / "FlyingChairs/data/00003_flow.flo").unlink()
    put(tmp_path / "FlyingChairs/FlyingChairs_train_val.txt", b"1\n2\n1\n1\n")
    with pytest.raises(ValueError, match=r"00003_img1.ppm.*00004_flow.flo are no sample"):
        loaded("flyingchairs", tmp_path)
    sintel(tmp_path)
    (tmp_path / "Sintel/training/clean/b/frame_0002.png").unlink()
    with pytest.raises(ValueError, match="19 pairs of frames for 20 flows"):
        loaded("sintel", tmp_path)


def test_bad_samples_are_named_or_left_out_and_counted(tmp_path):
    chairs(tmp_path, 6)
    folder = tmp_path / "FlyingChairs/data"
    frame(folder / "00003_img2.ppm", width=100)
    put(folder / "00004_flow.flo", flo(WIDE[:, :3, :4]))
    put(folder / "00005_flow.flo", b"PIEH")
    put(folder / "00006_img1.ppm", b"P6\n")
    data = loaded("flyingchairs", tmp_path)
    for number in (3, 4, 5, 6):
        message = f"0000{number}_img1.ppm, .*0000{number}_flow.flo(: one of these cannot be read| have .* pixels)"
        with pytest.raises(ValueError, match=message + ".*--skip_bad"):
            data.train[0, 0, number - 2]
    data = loaded("flyingchairs", tmp_path, skip_bad=True)
    assert (data.train_count, data.val_count, data.skipped) == (1, 1, 4)


def test_flow_that_is_marked_unknown_is(tmp_path):
    chairs(tmp_path)
    marked = WIDE.copy()
    marked[1, 2, 3], marked[0, 0, 1] = 1e10, np.nan
    put(tmp_path / "FlyingChairs/data/00002_flow.flo", flo(marked))
    pair = loaded("flyingchairs", tmp_path).val[0]
    assert (~pair.known).nonzero().tolist() == [[0, 1], [2, 3]]
    assert pair.flow.isfinite().all()


@pytest.mark.usefixtures("decoded")
def test_frames_smaller_than_the_crop_are_refused_where_they_cannot_be_scaled(tmp_path):
    kitti(tmp_path)
    with pytest.raises(ValueError, match=r"000000_10\.png: 136 x 130 pixels, smaller than --size 136 136"):
        loaded("kitti", tmp_path, size=[136, 136]).train[0, 0, 0]


def test_photos_that_are_bad_or_small_are_told(tmp_path):
    for i in range(5):
        frame(tmp_path / f"{i}.png", 200, 200)
    put(tmp_path / "5.jpg", b"no image")
    with pytest.raises(ValueError, match=r"5.jpg cannot be decoded"):
        loaded("photos", tmp_path)
    data = loaded("photos", tmp_path, skip_bad=True)
    assert (len(data.train.photos), len(data.val.photos), data.skipped) == (4, 1, 1)
    with pytest.raises(ValueError, match="need photos, or parts of photos, of 204 x 192"):
        loaded("photos", tmp_path, skip_bad=True, size=[128, 136])


@pytest.mark.usefixtures("decoded")
def test_training_samples_can_be_held_out_to_choose_options_by(tmp_path):
    kitti(tmp_path / "pairs")
    usual, data = (loaded("kitti", tmp_path / "pairs", hold_out=count) for count in (0, 2))
    assert sorted([*data.train.indices, *data.val.indices]) == [*usual.train.indices]
    assert len(data.val.indices) == 2
    for i in range(6):
        Image.new("RGB", (200, 200), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
    usual, data = (loaded("photos", tmp_path, hold_out=count) for count in (0, 2))
    kept = {photo.sum().item() for photo in data.train.photos}
    held = {photo.sum().item() for photo in data.val.photos}
    assert (len(kept), len(held)) == (3, 2)
    assert kept | held == {photo.sum().item() for photo in usual.train.photos}
    with pytest.raises(ValueError, match="hold_out is 1, and it needs five photos, of which there are 2"):
        TASK.load_data(Config(hold_out=1))


# --- augmentation ------------------------------------------------------------------------------------------------


def marked_pair(height=40, width=48):
    """Frames whose colour is their own place, moved by (2, -1): every flow vector can be checked from the frames."""
    y, x = torch.meshgrid(torch.arange(height).float(), torch.arange(width).float(), indexing="ij")
    first = torch.stack([x, y, x * 0]) / 300
    second = torch.stack([x - 2, y + 1, x * 0]) / 300
    return Pairs(first, second, torch.stack([x * 0 + 2, y * 0 - 1]), torch.ones(height, width, dtype=torch.bool))


def off_by(pair):
    """How far frame 2 at x + flow(x) is from frame 1 at x, in the middle of the frame; whole pixels of flow."""
    worst = 0.0
    for y, x in ((15, 16), (20, 20), (17, 22)):
        u, v = (int(c) for c in pair.flow[:, y, x].round())
        worst = max(worst, float((pair.second[:, y + v, x + u] - pair.first[:, y, x]).abs().max()))
    return worst


def test_mirroring_and_scaling_take_the_flow_along():
    pair = marked_pair()
    assert off_by(pair) < 1e-6
    assert off_by(mirrored(pair, -1)) < 1e-6
    assert off_by(mirrored(pair, -2)) < 1e-6
    double = scaled(pair, (40, 48), 2.0)
    assert double.first.shape == (3, 80, 96)
    assert double.flow[:, 3, 3].tolist() == [4.0, -2.0]
    assert off_by(double) < 1e-6
    assert scaled(pair, (40, 56), 0.5).first.shape == (3, 47, 56)  # no smaller than the crop


def test_a_crop_is_the_same_part_of_everything(monkeypatch):
    monkeypatch.setattr(flow_data.v2, "ColorJitter", lambda **_: lambda frames: frames)
    pair = marked_pair(200, 240)
    sparse = pair._replace(known=pair.first[0] > 0.3)  # sparse flow is not scaled
    seen = set()
    for _ in range(40):
        out = augmented(sparse, (128, 128))
        assert off_by(out) < 1e-6
        assert torch.equal(out.known, out.first[0] > 0.3)
        seen.add(tuple(out.flow[:, 0, 0].tolist()))
    assert {(2.0, -1.0), (-2.0, -1.0)} <= seen  # mirrored, or not
    dense = [augmented(pair, (128, 128)) for _ in range(20)]
    assert len({round(float(out.flow[0].abs().mean()), 3) for out in dense}) > 10  # scaled


def test_samples_of_several_sizes_make_one_batch():
    batch = padded([marked_pair(129, 200), marked_pair(140, 136)])
    assert batch.first.shape == (2, 3, 144, 200)
    assert batch.known.sum((1, 2)).tolist() == [129 * 200, 140 * 136]
    assert torch.equal(batch.first[0, :, 129:], batch.first[0, :, 128:129].expand(3, 15, 200))


# --- loss and score ----------------------------------------------------------------------------------------------


def by_hand():
    """Two samples of 2 x 2 pixels; the second one has one unknown pixel."""
    truth = torch.zeros(2, 2, 2, 2)
    truth[0, :, 0, 0] = torch.tensor([3.0, 4.0])
    guess = torch.zeros(2, 2, 2, 2)
    guess[0, :, 0, 1] = torch.tensor([0.0, 2.0])
    guess[1, :, 1, 1] = torch.tensor([6.0, 8.0])
    guess[1, :, 0, 0] = 100.0
    known = torch.ones(2, 2, 2, dtype=torch.bool)
    known[1, 0, 0] = False
    return Pairs(torch.zeros(2, 3, 2, 2), torch.zeros(2, 3, 2, 2), truth, known), guess


def test_the_score_is_the_mean_over_all_known_pixels():
    pairs, guess = by_hand()  # errors 5, 2, 0, 0 and 10, 0, 0
    assert [record.tolist() for record in errors_of(guess, pairs)] == [[4, 7, 2, 1, 0], [3, 10, 1, 1, 1]]
    score = TASK.compute_metrics(errors_of(guess, pairs), None)
    assert score == pytest.approx(
        {"val_epe": 17 / 7, "val_over_1px": 3 / 7, "val_over_3px": 2 / 7, "val_over_5px": 1 / 7}
    )
    nothing = pairs._replace(known=torch.zeros(2, 2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="no pixel with known flow"):
        TASK.compute_metrics(errors_of(guess, nothing), None)


def test_the_loss_weights_later_updates_more():
    pairs, guess = by_hand()
    of_guess, of_zero = (3 + 4 + 2 + 6 + 8) / 16, (3 + 4) / 16  # L1; the unknown pixel counts as zero
    loss = sequence_loss([guess, torch.zeros_like(guess), guess], pairs, gamma=0.5)
    assert float(loss) == pytest.approx(0.25 * of_guess + 0.5 * of_zero + of_guess)
    far = pairs._replace(flow=pairs.flow + 400.0)
    assert float(sequence_loss([guess], far, gamma=0.5)) == 0


def test_colours_of_prediction_and_truth_share_one_scale():
    truth = torch.zeros(1, 2, 4, 4)
    truth[0, 0, 0, 0] = 8.0
    flow = torch.zeros(1, 2, 4, 4)
    flow[0, 0, 1, 1], flow[0, 0, 2, 2], flow[0, 0, 3, 3] = 8.0, 80.0, 4.0
    true_colours, colours = coloured(truth, flow)
    assert (colours[1, 1] == true_colours[0, 0]).all()
    assert (colours[2, 2] == true_colours[0, 0]).all()  # cut to the scale's end
    assert (colours[3, 3] != true_colours[0, 0]).any()
    assert (colours[0, 0] == 255).all()  # no motion is white


# --- the network -------------------------------------------------------------------------------------------------


def kept(weight, pattern):
    """At most n of m along the input channels, the largest, equal ones at the lower index: obvious and slow."""
    n, m = pattern
    mask = torch.zeros_like(weight, dtype=torch.bool)
    for start in range(0, weight.shape[1], m):
        part = weight[:, start : start + m].abs()
        best = part.argsort(dim=1, descending=True, stable=True)[:, :n]
        mask[:, start : start + m].scatter_(1, best, True)
    return mask


@pytest.mark.parametrize("updates", [1, 3])
def test_the_term_counts_once_however_often_the_update_block_is_used(updates):
    """One step of SGD, as the equations say: w <- w - lr (dL/dw~ + decay w where pruned).

    The published code adds the term in each backward pass through a weight: `updates` times in the update block.
    """
    decay, rate = 0.5, 0.1
    torch.manual_seed(1)
    net = build_raft("raft_small", updates, updates, 0.8, frozen=False)
    plain = copy.deepcopy(net)
    (pairs,) = TASK.load_data(Config()).train_batches([np.array([0])], 0, 0)

    masks = {name: kept(p.detach(), (2, 4)) for name, p in plain.named_parameters() if p.dim() == 4}
    values = {name: p.detach() * masks.get(name, 1.0) for name, p in plain.named_parameters()}
    for value in values.values():
        value.requires_grad_()
    sequence_loss(functional_call(plain, values, (pairs.first, pairs.second)), pairs, 0.8).backward()
    expected = {
        name: p.detach() - rate * (values[name].grad + decay * ~mask * p.detach())
        for name, p in plain.named_parameters()
        if (mask := masks.get(name)) is not None
    }

    report = ow.sparsify(net, "2:4", ow.SRSTE(decay=decay), remainder="pad")
    optimizer = torch.optim.SGD(net.parameters(), lr=rate)
    ow.attach(optimizer, net)
    TASK.loss(net, pairs).backward()
    optimizer.step()
    assert set(report.sparse) == set(masks)
    after = dict(net.named_parameters())
    pruned = 0
    for name, weight in expected.items():
        now = next(p for key, p in after.items() if plain_name(key) == name)
        assert torch.allclose(now, weight, rtol=1e-4, atol=1e-6), name
        pruned += int((~masks[name]).sum())
    assert pruned > 400_000


def plain_name(name):
    return re.sub(r"parametrizations\.(\w+)\.original", r"\1", name)


def test_what_is_left_dense_is_reported_with_its_reason():
    _, _, report = prepare(TASK, Config(remainder="skip"))
    gru = {f"update_block.recurrent_block.convgru1.conv{gate}.weight" for gate in "zrq"}
    stems = {f"{part}_encoder.convnormrelu.0.weight" for part in ("feature", "context")}
    assert set(report.skipped) == {*gru, *stems, "update_block.motion_encoder.convflow1.0.weight"}
    assert all("not a multiple of 4" in reason for reason in report.skipped.values())
    _, _, report = prepare(TASK, Config(pattern="1:16"))
    assert not report.skipped


def test_the_paper_s_preset_is_what_its_authors_ran():
    config = parse(Config, ["--preset", "paper", "--data", "flyingchairs=DIR"], "openwork train flow", "")
    assert (config.model, config.size, config.updates, config.clip) == ("raft_large", [368, 496], 12, 1.0)
    assert 22_232 // config.batch_size * config.epochs == 200_088  # steps
    _, _, report = prepare(TASK, dataclasses.replace(config, data="scenes", size=[128, 128], val_updates=1))
    assert not report.skipped
    assert "mask_predictor.conv.weight" in report.sparse


def test_frozen_batch_normalization_is_what_it_was():
    net = build_raft("raft_large", 1, 1, 0.8, frozen=False)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_()
            module.running_var.uniform_(0.5, 2)
    image = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        before = net.context_encoder.eval()(image)
        names = set(net.state_dict())
        frozen = freeze_batch_norm(net).context_encoder.train()
        assert torch.allclose(frozen(image), before, atol=1e-4)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in frozen.modules())
    assert names - set(net.state_dict()) == {name for name in names if name.endswith("num_batches_tracked")}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"size": [120, 128]}, r"size is \[120, 128\]; RAFT needs"),
        ({"size": [128]}, "a height and a width"),
        ({"model": "raft_huge"}, "model 'raft_huge' is not known; use one of raft_small, raft_large"),
        ({"updates": 0}, "updates is 0"),
    ],
)
def test_flags_are_checked(flags, message):
    with pytest.raises(ValueError, match=message):
        Config(**flags)


# --- runs --------------------------------------------------------------------------------------------------------

SMALL = {
    "batch_size": 2,
    "updates": 2,
    "val_updates": 2,
    "epochs": 2,
    "lr": 1e-3,
    "workers": 0,
    "topology_every": 4,
    "log_every": 1,
    "checkpoint_every": 7,
    "progress": False,
    "threads": 1,
}


def falling(folder):
    """26 pairs, two for validation, whose frames fall by 8 pixels: what a network learns in a few steps."""
    flow = np.zeros((2, 136, 136), np.float32)
    flow[1] = 8
    flow[:, 0, 0] = 1e10  # not known everywhere, so that it is not scaled
    draw = np.random.default_rng(0)
    root = folder / "FlyingChairs"
    (root / "data").mkdir(parents=True)
    for i in range(1, 27):
        photo = np.array(Image.fromarray(draw.integers(0, 256, (24, 24, 3), np.uint8)).resize((136, 144)))
        for name, rows in (("img1", photo[8:]), ("img2", photo[:-8])):
            Image.fromarray(rows).save(root / f"data/{i:05d}_{name}.ppm")
        put(root / f"data/{i:05d}_flow.flo", flo(flow))
    put(root / "FlyingChairs_train_val.txt", b"1\n" * 24 + b"2\n" * 2)
    return f"flyingchairs={folder}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flow")
    data = falling(folder)
    return folder / "run", train(Config(**SMALL, data=data, out=str(folder / "run")))


def test_the_loss_falls(trained):
    out, _ = trained
    assert len([r for r in read_lines(out / "metrics.jsonl") if "train_loss" in r]) == 24
    task, config = read_run(out)
    data, net, _ = prepare(task, config)
    (batch,) = data.val_batches([np.arange(2)])  # not mirrored, so the same before and after
    with torch.no_grad():
        before = task.loss(net, batch)
        ow.finalize(net)
        net.load_state_dict(read_weights(out / "model.safetensors"))
        assert task.loss(net, batch) < 0.6 * before


def test_every_mask_is_exact_and_the_saved_network_scores_what_the_result_says(trained):
    out, result = trained
    task, config = read_run(out)
    data, net, report = prepare(task, config)
    ow.finalize(net)
    net.load_state_dict(read_weights(out / "model.safetensors"))
    for name in report.sparse:
        weight = net.get_parameter(name).detach()
        assert torch.equal(weight, weight * kept(weight, (2, 4))), name
    assert not report.skipped
    with torch.no_grad():
        (batch,) = data.val_batches([np.arange(2)])
        score = task.compute_metrics(task.predictions(net.eval(), batch), data)
    assert score == pytest.approx({key: result[key] for key in score}, rel=1e-5)


def test_the_report_shows_frames_and_flow_and_loads_nothing(trained):
    page = (trained[0] / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 2 * 5
    assert len(page) < 500_000
    bare = re.sub(r"data:image/\w+;base64,[\s\w+/=]+", "DATA", page).replace("</", "<")
    assert not re.search(r"https?:|//|<script|<link|<img src=\"(?!DATA)|@import|url\((?!#)", bare)
    for expected in ("Validation sample 1", "true flow, up to", "predicted flow", "Validation end-point error, px"):
        assert expected in page


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The tensor attributes self.corr_block:UserWarning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
def test_a_run_is_exported(trained, tmp_path, capsys):
    assert main(["export", str(trained[0]), "--out", str(tmp_path / "net.onnx")]) == 0
    assert "ONNX Runtime gives the model's outputs" in capsys.readouterr().out
    assert main(["export", str(trained[0]), "--out", str(tmp_path / "net.pt2"), "--dynamic-batch"]) == 0
    three = torch.rand(3, 3, 128, 128)
    assert torch.export.load(tmp_path / "net.pt2").module()(three, three)[-1].shape == (3, 2, 128, 128)


@pytest.mark.slow
def test_a_killed_run_ends_as_one_that_was_not(trained, tmp_path):
    script = Path(__file__).with_name("run_and_kill.py")
    config = {**SMALL, "data": trained[1]["config"]["data"], "out": str(tmp_path / "run")}

    def run(kill_after, **more):
        command = [sys.executable, script, "flow", json.dumps(config | more), str(kill_after)]
        return subprocess.run(command, check=False).returncode

    assert run(18) == -signal.SIGKILL  # in the second epoch; the last checkpoint is before step 15
    assert run(0, resume=True) == 0
    for name in ("metrics.jsonl", "topology.jsonl"):
        assert (tmp_path / "run" / name).read_text() == (trained[0] / name).read_text()
    a, b = read_weights(tmp_path / "run/model.safetensors"), read_weights(trained[0] / "model.safetensors")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_scenes_of_real_photos(openwork_data):
    data = loaded("photos", openwork_data / "kodak")
    assert (len(data.train.photos), len(data.val.photos)) == (20, 4)
    (batch,) = data.val_batches([np.array([0])])
    assert batch.first.shape == (1, 3, 128, 128)
