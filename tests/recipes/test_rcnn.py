"""The detectors' network: its ResNet is torchvision's, what is left dense is listed, weights and freezing work."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import openwork as ow
from openwork.recipes import rcnn
from openwork.recipes.config import comparison
from openwork.recipes.detection import TASK, DetectionConfig
from openwork.recipes.parser import parse
from openwork.recipes.segmentation import TASK as SEGMENTATION
from openwork.recipes.segmentation import SegmentationConfig
from openwork.recipes.weights import read_weights


@pytest.mark.parametrize("model", ["resnet18", "resnet50"])
def test_the_body_is_torchvisions_at_its_width(model):
    import torchvision

    expected = torchvision.models.get_model(model, weights=None).eval()
    expected.fc = nn.Identity()
    body = rcnn.resnet_body(model, 64, nn.BatchNorm2d).eval()
    assert list(body.state_dict()) == list(expected.state_dict())
    body.load_state_dict(expected.state_dict())
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(body(image).mean((2, 3)), expected(image))


@pytest.mark.parametrize("model", ["resnet34", "resnet101"])
def test_other_depths_are_built_at_another_width(model):
    with torch.device("meta"):
        body = rcnn.resnet_body(model, 16, nn.BatchNorm2d)
        channels = body(torch.rand(1, 3, 64, 64)).shape[1]
    assert channels == 128 * rcnn.BLOCKS[model][0].expansion
    depth = sum(isinstance(module, nn.Conv2d) and "downsample" not in name for name, module in body.named_modules())
    assert depth + 1 == int(model.removeprefix("resnet"))  # the classifier counts too


def small(cls, **fields):
    return cls(**{"image_size": 64, "max_size": 64, "limit": 8, "limit_val": 4, **fields})


def sparsified(task, config, pattern="2:4"):
    data = task.load_data(config)
    net = task.build(config, data)
    return net, ow.sparsify(net, pattern, ow.STE(), exclude=config.exclude, example=task.example(data))


@pytest.mark.parametrize("pattern", ["2:4", "1:16"])
def test_everything_but_the_first_convolution_of_the_tiny_preset_is_sparse(pattern):
    net, report = sparsified(SEGMENTATION, small(SegmentationConfig), pattern)
    assert report.skipped == {
        "backbone.body.conv1.weight": f"reduction axis has 3 weights, not a multiple of {pattern.partition(':')[2]}"
    }
    assert "roi_heads.mask_predictor.conv5_mask.weight" in report.sparse  # a transposed convolution
    ow.verify(net, SEGMENTATION.example(SEGMENTATION.load_data(small(SegmentationConfig))))
    assert report.macs_sparse < report.macs_dense


def test_a_width_that_m_does_not_divide_is_reported():
    _, report = sparsified(TASK, small(DetectionConfig, head=90))
    assert (
        report.skipped["roi_heads.box_predictor.cls_score.weight"]
        == "reduction axis has 90 weights, not a multiple of 4"
    )


def test_a_head_that_all_levels_share_takes_the_term_once():
    """The pyramid has five levels and the region proposals one head for all: a step takes the term once."""
    config = small(DetectionConfig)
    data = TASK.load_data(config)
    batch = [data.train[0, 0, i] for i in range(2)]
    stepped = {}
    for decay in (0.0, 0.5):
        torch.manual_seed(0)
        net = TASK.build(config, data)
        ow.sparsify(net, "2:4", ow.SRSTE(decay=decay))
        optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
        ow.attach(optimizer, net)
        name = "rpn.head.conv.0.0"
        weight = net.get_submodule(name).parametrizations.weight.original.detach().clone()
        kept = ow.masks(net)[f"{name}.weight"]
        torch.manual_seed(1)
        TASK.loss(net, batch).backward()
        optimizer.step()
        stepped[decay] = net.get_submodule(name).parametrizations.weight.original.detach()
    assert torch.allclose(stepped[0.0] - stepped[0.5], torch.where(kept, 0.0, 0.5 * weight), atol=1e-6)


@pytest.fixture
def classifier(tmp_path):
    import torchvision

    net = torchvision.models.resnet18(num_classes=5)
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    return tmp_path


def test_a_backbone_is_loaded_frozen_and_its_norm_kept(classifier):
    config = small(DetectionConfig, width=64, backbone=str(classifier), trainable_layers=3, frozen_norm=True)
    data = TASK.load_data(config)
    net = TASK.build(config, data)
    weights = read_weights(classifier / "model.safetensors")
    body = net.backbone.body.state_dict()
    assert all(torch.equal(body[name], weights[name]) for name in body)
    trained = {
        name.split(".")[2] for name, p in net.named_parameters() if name.startswith("backbone.body") and p.requires_grad
    }
    assert trained == {"layer2", "layer3", "layer4"}
    assert not any(isinstance(each, nn.BatchNorm2d) for each in net.modules())
    ow.sparsify(net, "2:4", ow.SRSTE())
    ow.attach(TASK.optimizer(config, net), net)  # with weights that it does not train


def test_a_backbone_that_does_not_fit_is_refused(classifier):
    data = TASK.load_data(small(DetectionConfig))
    with pytest.raises(ValueError, match="does not fit; it must hold the ResNet that --model and --width name"):
        TASK.build(small(DetectionConfig, backbone=str(classifier)), data)
    with pytest.raises(FileNotFoundError, match=r"--backbone .*: there is no .*; give a finished run"):
        TASK.build(small(DetectionConfig, backbone=str(classifier / "none")), data)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "resnet19"}, "model 'resnet19' is not known; use one of resnet18"),
        ({"anchors": [8, 16]}, "the pyramid has 5 levels"),
        ({"frozen_norm": True}, "add --backbone"),
        ({"trainable_layers": 2}, "add --backbone"),
        ({"trainable_layers": 6}, "give 0 to 5"),
        ({"max_size": 100, "image_size": 128}, "must be at least image_size, 128"),
    ],
)
def test_flags_that_do_not_fit_together(fields, message):
    for cls in (DetectionConfig, SegmentationConfig):
        with pytest.raises(ValueError, match=message):
            cls(**fields)


@pytest.mark.parametrize("preset", ["paper", "paper-2x"])
def test_the_usual_recipe_builds_torchvisions_network(preset):
    config = parse(SegmentationConfig, ["--preset", preset, "--backbone", "run"], "", "")
    assert config.milestones == ([8, 11] if preset == "paper" else [16, 22])
    compared = parse(comparison(SegmentationConfig), ["--preset", preset, "--backbone", "run"], "", "")
    assert compared.patterns == ["2:4", "2:8"]
    with torch.device("meta"):
        body = rcnn.resnet_body(config.model, config.width, rcnn.FrozenBatchNorm2d)
        sizes = {
            key: getattr(config, key)
            for key in ("fpn_channels", "head", "anchors", "rpn_post_nms_top_n", "rois_per_image", "mask_convs")
        }
        net = rcnn.build_rcnn(body, classes=90, **sizes)
        from torchvision.models.detection import maskrcnn_resnet50_fpn

        expected = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91)
    shapes, wanted = ({n: p.shape for n, p in each.named_parameters() if p.ndim > 1} for each in (net, expected))
    assert shapes == wanted
    assert net.rpn.anchor_generator.sizes == list(expected.rpn.anchor_generator.sizes)
    assert net.rpn.anchor_generator.aspect_ratios == list(expected.rpn.anchor_generator.aspect_ratios)
    assert net.roi_heads.box_roi_pool.output_size == expected.roi_heads.box_roi_pool.output_size
