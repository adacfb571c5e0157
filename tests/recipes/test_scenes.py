"""The flow of generated scenes is exact: what stands at x in frame 1 stands at x + flow(x) in frame 2."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from openwork.recipes.flow_data import sample_photos, scenes_of
from openwork.recipes.scenes import Outline, SceneLayer, frame_points, moved, render, scene

SHIFT = np.array([[1.0, 0, 3], [0, 1, -2], [0, 0, 1]])
DISK = Outline((20.0, 12.0), 6.0)


def photo(seed=0, side=80):
    return torch.rand(3, side, side, generator=torch.Generator().manual_seed(seed))


def sampled(image, points):
    scale = torch.tensor([2 / (image.shape[2] - 1), 2 / (image.shape[1] - 1)])[:, None, None]
    grid = (points * scale - 1).permute(1, 2, 0)[None]
    return F.grid_sample(image[None], grid, align_corners=True)[0]


def test_a_shifted_background_is_the_photo_shifted():
    first, second, flow = render([SceneLayer(photo(), (10.0, 15.0), SHIFT)], 24, 32)
    assert torch.allclose(first, photo()[:, 15:39, 10:42], atol=1e-5)
    assert torch.allclose(second[:, :-2, 3:], first[:, 2:, :-3], atol=1e-5)
    assert torch.allclose(flow, torch.tensor([3.0, -2.0])[:, None, None].expand(2, 24, 32), atol=1e-5)


def test_the_frontmost_object_gives_the_flow_and_the_colour():
    turned = np.array([[0.0, -1, 32], [1, 0, -8], [0, 0, 1]])  # a quarter turn about the disk's centre
    first, second, flow = render(
        [SceneLayer(photo(), (0.0, 0.0), np.eye(3)), SceneLayer(photo(1), (9.0, 9.0), turned, DISK)], 24, 32
    )
    points = frame_points(24, 32)
    away = torch.hypot(points[0] - 20, points[1] - 12)
    assert torch.equal(flow[:, away > 7], torch.zeros(2, int((away > 7).sum())))
    assert torch.allclose(flow[:, away < 5], (moved(points, turned) - points)[:, away < 5])
    assert flow[:, 12, 23].tolist() == [-3.0, 3.0]  # from three to the right of the centre to three below it
    assert torch.allclose(first[:, 12, 23], photo(1)[:, 21, 32], atol=1e-5)
    assert torch.allclose(second[:, 15, 20], first[:, 12, 23], atol=1e-5)
    assert torch.allclose(first[:, away > 7], photo()[:, :24, :32][:, away > 7], atol=1e-5)


def test_an_outline_is_as_large_as_its_waves_say():
    wavy = Outline((0.0, 0.0), 10.0, [0.0, 0.5], [0.0, math.pi])  # 10 (1 - cos(2 angle) / 2)
    inside = wavy.alpha(torch.tensor([[[4.0, 6.0, 0.0, 0.0, 5.0]], [[0.0, 0.0, 14.0, 16.0, 0.0]]]))
    assert inside.tolist() == [[1.0, 0.0, 1.0, 0.0, 0.5]]


def test_frame_2_at_the_flow_is_frame_1_but_where_it_is_covered():
    """Photos are smooth here, so that sampling twice loses little; what is covered or at an edge differs much."""
    smooth = [F.interpolate(photo(i, 12)[None], size=(200, 200), mode="bicubic")[0] for i in range(3)]
    for index in range(5):
        layers = scene(smooth, np.random.default_rng(index), 128, 128)
        first, second, flow = render(layers, 128, 128)
        to = frame_points(128, 128) + flow
        off = (sampled(second, to) - first).abs().amax(0)[((to >= 0) & (to <= 127)).all(0)]
        assert len(layers) in range(4, 8)
        assert off.median() < 0.005
        assert (off < 0.02).float().mean() > 0.7
        assert 0.5 < flow.norm(dim=0).mean() < 20


def test_scenes_are_functions_of_seed_epoch_and_index():
    data = scenes_of(sample_photos(), (128, 128), 12, 4)
    whole = list(data.train_batches([np.array([0, 1]), np.array([5, 3])], seed=3, epoch=2))
    (again,) = data.train_batches([np.array([3])], seed=3, epoch=2)
    assert all(torch.equal(a[1], b[0]) for a, b in zip(whole[1], again, strict=True))
    for seed, epoch in ((4, 2), (3, 1), (2, 3)):
        (other,) = data.train_batches([np.array([3])], seed, epoch)
        assert not torch.equal(other.flow, again.flow)
    assert torch.equal(data.val[1].first, data.val[1].first)
    assert whole[0].first.shape == (2, 3, 128, 128)
    assert whole[0].first.amin() >= -1
    assert whole[0].first.amax() <= 1
    assert whole[0].known.all()


def test_validation_uses_other_photos_or_other_parts_of_them():
    two = [torch.full((3, 200, 600), 0.2), torch.full((3, 200, 600), 0.2)]
    for each in two:
        each[:, :, 400:] = 0.9
    data = scenes_of(two, (128, 128), 1, 1)
    (train,), (val,) = data.train_batches([np.array([0])], 0, 0), data.val_batches([np.array([0])])
    assert torch.allclose(train.first, torch.tensor(-0.6))
    assert torch.allclose(val.first, torch.tensor(0.8))
    seven = [torch.full((3, 200, 200), 0.1 * i) for i in range(7)]
    data = scenes_of(seven, (128, 128), 1, 1)
    assert [round(float(p.mean()), 1) for p in data.train.photos] == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    assert [round(float(p.mean()), 1) for p in data.val.photos] == [0.6]
