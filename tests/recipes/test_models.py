import pytest
import torch

from openwork.recipes.models import build_model


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "timm/resnet18", "resnet10t"])
def test_models_of_every_source_take_grey_images(name):
    net = build_model(name, classes=7, channels=1).eval()
    assert net(torch.zeros(2, 1, 32, 32)).shape == (2, 7)


def test_resnet20_is_the_papers():
    net = build_model("resnet20", classes=10, channels=3)
    convolutions = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convolutions) == 19
    weights = sum(p.numel() for p in net.parameters())
    shortcuts = 16 * 32 + 32 * 64 + 2 * (32 + 64)  # convolutions and their batch norms: option B
    assert weights == 269_722 + shortcuts  # 0.27 M: table 6 of arXiv:1512.03385


def test_the_seed_decides_the_weights():
    def weight(seed):
        torch.manual_seed(seed)
        return build_model("resnet8", classes=10, channels=1).conv1.weight

    assert torch.equal(weight(0), weight(0))
    assert not torch.equal(weight(0), weight(1))


def test_an_unknown_name_gets_close_ones():
    with pytest.raises(ValueError, match=r"unknown model 'resnet19'; close names: .*resnet18"):
        build_model("resnet19", classes=10, channels=3)


@pytest.mark.parametrize("option", ["dropout", "width"])
def test_an_option_is_refused_where_it_would_do_nothing(option):
    with pytest.raises(ValueError, match=f"takes no {option}"):
        build_model("resnet18", classes=10, channels=3, **{option: 1})


def test_width_is_that_of_the_first_stage():
    narrow, usual = (build_model("resnet8", classes=10, channels=1, width=width) for width in (4, 0))
    assert [net.fc.in_features for net in (narrow, usual)] == [16, 64]
    assert narrow.conv1.out_channels == 4
