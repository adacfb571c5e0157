"""State dicts that other libraries write, read back: torch's own really run, the others' names are laid out by hand."""

import copy

import pytest
import torch
from torch import nn
from torch.ao.pruning import WeightNormSparsifier
from torch.nn.utils import parametrizations, prune

import openwork as ow
from openwork.files.foreign import dense_state_dict


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 4))


X = torch.randn(2, 4, 3, 3)


class TwoOfFour(prune.BasePruningMethod):
    """2:4 along dim 1, smallest first."""

    PRUNING_TYPE = "global"

    def compute_mask(self, t, default_mask):
        ranks = t.abs().movedim(1, -1).unflatten(-1, (-1, 4)).argsort(-1).argsort(-1)
        return (ranks >= 2).flatten(-2).movedim(-1, 1).to(default_mask)


def pruned_by_torch():
    """A model that torch.nn.utils.prune made 2:4, trained a little with it."""
    model = net()
    for index in (0, 3):
        TwoOfFour.apply(model[index], "weight")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    return model.eval()


def pruned_by_ao(config=None):
    """A model that torch.ao.pruning made 2:4, not squashed, and its sparsifier."""
    model = net().eval()
    sparsifier = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
    sparsifier.prepare(model, config)
    sparsifier.step()
    return model, sparsifier


def through_a_file(state, folder):
    torch.save(state, folder / "other.pt")
    return torch.load(folder / "other.pt", weights_only=True)


def loaded(weights):
    model = net().eval()
    model.load_state_dict(weights)
    return model


def same(a, b):
    return torch.allclose(a, b, rtol=0, atol=0)


def test_torch_prune(tmp_path):
    theirs = pruned_by_torch()
    weights, masks = dense_state_dict(through_a_file(theirs.state_dict(), tmp_path))
    ours = loaded(weights)
    assert same(ours(X), theirs(X))
    assert masks.keys() == {"0.weight", "3.weight"}
    assert torch.equal(masks["3.weight"], theirs[3].weight_mask.bool())
    assert ow.verify(ours, pattern="2:4").sparse.keys() == masks.keys()


def test_the_masks_of_another_library_train_on_as_fixed_ones(tmp_path):
    """They hold also where magnitude would choose others: ASP's masks are buffers called weight_mask."""
    weights, masks = dense_state_dict(pruned_by_torch().state_dict())
    ours = loaded(weights)
    ow.sparsify(ours, "2:4", ow.ASP())
    moved = {name: mask.unflatten(1, (-1, 4)).roll(1, dims=2).flatten(1, 2) for name, mask in masks.items()}
    dense = {name: torch.ones_like(w) if name in masks else w for name, w in weights.items()}
    ours.load_state_dict(dense | {f"{name}_mask": mask for name, mask in moved.items()})
    assert all(torch.equal(ow.masks(ours)[name], moved[name]) for name in masks)
    assert torch.equal(ours[3].weight, moved["3.weight"].float())


def test_torch_ao_pruning(tmp_path):
    theirs, sparsifier = pruned_by_ao()
    state = through_a_file(theirs.state_dict(), tmp_path)
    assert "3.parametrizations.weight.original" in state
    assert not any("mask" in key for key in state)  # what the second argument is for
    saved = {"state": {name: dict(each) for name, each in sparsifier.state_dict()["state"].items()}}
    weights, masks = dense_state_dict(state, sparsifier=saved)
    assert masks.keys() == {"3.weight"}
    ours = loaded(weights)
    assert same(ours(X), theirs(X))
    assert ow.verify(ours, pattern=ow.Selection("2:4", exclude=["0"])).sparse.keys() == masks.keys()


def test_torch_ao_pruning_of_a_model_that_is_one_layer():
    model = nn.Linear(8, 4)
    sparsifier = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
    sparsifier.prepare(model, [{"tensor_fqn": "weight"}])
    sparsifier.step()
    weights, masks = dense_state_dict(model.state_dict(), sparsifier=sparsifier.state_dict())
    assert torch.equal(weights["weight"], model.weight)
    assert masks["weight"].sum() == 16


def test_lost_masks_are_asked_for():
    theirs, _ = pruned_by_ao()
    with pytest.raises(ValueError, match=r"no mask is stored for 3\.weight.*sparsifier=sparsifier\.state_dict"):
        dense_state_dict(theirs.state_dict())
    weights, masks = dense_state_dict(theirs.state_dict(), sparsifier={"state": {}})
    assert masks == {}
    assert torch.equal(weights["3.weight"], theirs[3].parametrizations.weight.original)


def with_buffers(mask_name, **more):
    """The state dict of a net with a mask as a further buffer of its last layer."""
    model = net()
    mask = ow.topn(model[3].weight.detach().abs(), ow.Pattern(2, 4))
    model[3].register_buffer(mask_name, mask)
    for name, buffer in more.items():
        model[3].register_buffer(name, buffer)
    return model.state_dict(), mask


def test_apex_asp():
    """ASP leaves zeros in the weight; with allow_recompute_mask it stores what it took away."""
    state, mask = with_buffers("__weight_mma_mask", __weight_mma_pruned_p=torch.ones(4, 8))
    weights, masks = dense_state_dict(state)
    assert torch.equal(masks["3.weight"], mask)
    assert torch.equal(weights["3.weight"], state["3.weight"] * mask)
    loaded(weights)


def test_modelopt():
    state, mask = with_buffers("_weight_mask")
    weights, masks = dense_state_dict(state)
    assert torch.equal(masks["3.weight"], mask)
    loaded(weights)


def test_names_of_wrappers_are_taken_off():
    state = {f"module._orig_mod.{name}": each for name, each in pruned_by_torch().state_dict().items()}
    loaded(dense_state_dict(state)[0])


def test_a_mask_of_the_models_own_is_left_alone():
    state, _ = with_buffers("__weight_mma_mask", attention_mask=torch.ones(3))
    assert "3.attention_mask" in dense_state_dict(state)[0]


def test_masks_before_pruning_are_told():
    state, _ = with_buffers("__weight_mma_mask")
    state["3.__weight_mma_mask"] = torch.ones(4, 8, dtype=torch.bool)
    with pytest.warns(UserWarning, match="written before pruning"):
        dense_state_dict(state)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (net().state_dict(), "it is a plain state dict; load it unmodified"),
        ({"epoch": 3, "model": {}}, "'epoch', 'model' hold no tensors: this is a whole checkpoint"),
        (parametrizations.weight_norm(nn.Linear(4, 4)).state_dict(), "not a mask"),
        (nn.utils.spectral_norm(nn.Linear(4, 4)).state_dict(), "not a mask"),
        ({"w_orig": torch.ones(2), "w_mask": torch.ones(3)}, r"w: found a weight of shape \(2,\) for a mask"),
    ],
)
def test_what_is_not_a_masked_state_dict_is_refused(state, message):
    with pytest.raises(ValueError, match=message):
        dense_state_dict(copy.copy(state))
