"""What goes forward and what comes back through a mask, by every way in which torch differentiates."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from openwork.methods import ASP, STE, Phase
from openwork.methods.autograd import masked
from openwork.methods.autograd import straight_through as fused
from openwork.nm.groups import Axis
from openwork.nm.masks import apply_mask
from openwork.nm.pattern import Pattern

torch.set_num_threads(1)

Pass = Callable[[Tensor, Tensor], Tensor]
PHASE = Phase(Pattern(2, 4), Axis(1))


def straight_through(weight: Tensor, mask: Tensor) -> Tensor:
    return masked(STE(), weight, mask, PHASE, {})


def masked_gradient(weight: Tensor, mask: Tensor) -> Tensor:
    return masked(ASP(), weight, mask, PHASE, {})


BOTH = pytest.mark.parametrize("through", [straight_through, masked_gradient])

KEEP = torch.tensor([[True, False, True, False], [False, True, True, False], [True, True, False, False]])


def weights(dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(KEEP.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def passed(through: Pass, gradient: Tensor) -> Tensor:
    """What reaches the weight of a gradient at the pruned weight: the definition."""
    return gradient if through is straight_through else gradient * KEEP


@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_forward_prunes_and_backward_passes(through: Pass, dtype: torch.dtype) -> None:
    weight, gradient = weights(dtype).requires_grad_(), weights(dtype, seed=1)
    output = through(weight, KEEP)
    output.backward(gradient)
    assert torch.equal(output, apply_mask(weight.detach(), KEEP))
    assert torch.equal(weight.grad, passed(through, gradient))


@BOTH
def test_pruned_infinities_reach_neither_output_nor_gradient(through: Pass) -> None:
    weight = torch.where(KEEP, weights(), torch.inf).requires_grad_()
    (through(weight, KEEP) ** 2).sum().backward()
    assert torch.equal(weight.grad, passed(through, 2 * apply_mask(weight.detach(), KEEP)))


def test_masked_gradient_is_the_derivative_of_prune() -> None:
    weight = weights(torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: masked_gradient(w, KEEP), weight)
    assert torch.autograd.gradgradcheck(lambda w: masked_gradient(w, KEEP) ** 3, weight)


def test_straight_through_is_the_derivative_of_the_identity() -> None:
    weight, factor = weights(torch.float64).requires_grad_(), weights(torch.float64, seed=1)
    (found,) = torch.autograd.grad((straight_through(weight, KEEP) * factor).sum(), weight)
    (identity,) = torch.autograd.grad((weight * factor).sum(), weight)
    assert torch.equal(found, identity)


@BOTH
def test_gradients_of_two_uses_add_up(through: Pass) -> None:
    weight, a, b = weights().requires_grad_(), weights(seed=1), weights(seed=2)
    output = through(weight, KEEP)
    ((output * a).sum() + (output * b).sum()).backward()
    assert torch.equal(weight.grad, passed(through, a + b))


@BOTH
def test_gradients_of_two_backwards_add_up(through: Pass) -> None:
    weight, a = weights().requires_grad_(), weights(seed=1)
    loss = (through(weight, KEEP) * a).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert torch.equal(weight.grad, passed(through, 2 * a))


@BOTH
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_one_masked_weight_serves_several_checkpointed_regions(through: Pass, use_reentrant: bool) -> None:
    weight, x = weights().requires_grad_(), weights(seed=1).requires_grad_()
    masked = through(weight, KEEP)
    (
        checkpoint(torch.mul, masked, x, use_reentrant=use_reentrant)
        + checkpoint(torch.mul, masked, x, use_reentrant=use_reentrant)
    ).sum().backward()
    assert torch.equal(weight.grad, passed(through, 2 * x.detach()))


@BOTH
def test_nothing_is_saved_for_backward(through: Pass) -> None:
    packed: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or x, lambda x: x):
        through(weights().requires_grad_(), KEEP)
    assert packed == []


@BOTH
def test_the_weight_may_change_between_forward_and_backward(through: Pass) -> None:
    weight = weights().requires_grad_()
    output = through(weight, KEEP)
    with torch.no_grad():
        weight.zero_()
    output.backward(torch.ones_like(output))
    assert torch.equal(weight.grad, passed(through, torch.ones_like(output)))


@BOTH
def test_second_derivatives(through: Pass) -> None:
    weight = weights().requires_grad_()
    (first,) = torch.autograd.grad((through(weight, KEEP) ** 3).sum(), weight, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), weight)
    assert torch.equal(second, 6 * apply_mask(weight.detach(), KEEP))  # the first is 3 w~**2, zero at pruned weights


@BOTH
def test_no_gradient_is_tracked_where_none_is_asked_for(through: Pass) -> None:
    assert not through(weights(), KEEP).requires_grad
    with torch.no_grad():
        assert not through(weights().requires_grad_(), KEEP).requires_grad


@BOTH
def test_strides_stay(through: Pass) -> None:
    strided = weights().t().contiguous().t().requires_grad_()
    output = through(strided, KEEP.t().contiguous().t())
    assert output.stride() == strided.stride()
    assert torch.equal(output, through(weights(), KEEP))


# --- function transforms and compilation ------------------------------------------------------------------------


def loss(through: Pass, weight: Tensor, keep: Tensor) -> Tensor:
    return (through(weight, keep) * torch.arange(1.0, 5.0)).sum()


@BOTH
def test_functional_gradient(through: Pass) -> None:
    found = torch.func.grad(lambda w: loss(through, w, KEEP))(weights())
    assert torch.equal(found, passed(through, torch.arange(1.0, 5.0).expand(3, 4)))


@BOTH
def test_vmap_masks_each_row_as_alone(through: Pass) -> None:
    assert torch.equal(torch.vmap(through)(weights(), KEEP), apply_mask(weights(), KEEP))
    shared = torch.vmap(through, in_dims=(0, None))(weights(), KEEP[0])
    assert torch.equal(shared, apply_mask(weights(), KEEP[0].expand(3, 4)))


@BOTH
def test_gradients_per_sample(through: Pass) -> None:
    found = torch.vmap(torch.func.grad(lambda w, k: loss(through, w, k)))(weights(), KEEP)
    assert torch.equal(found, passed(through, torch.arange(1.0, 5.0).expand(3, 4)))


@BOTH
def test_gradient_through_vmap(through: Pass) -> None:
    found = torch.func.grad(lambda w: (torch.vmap(through)(w, KEEP) * torch.arange(1.0, 5.0)).sum())(weights())
    assert torch.equal(found, passed(through, torch.arange(1.0, 5.0).expand(3, 4)))


@BOTH
def test_a_tangent_goes_the_way_of_the_gradient(through: Pass) -> None:
    tangents = torch.arange(1.0, 5.0).expand(3, 4)
    _, found = torch.func.jvp(lambda w: through(w, KEEP), (weights(),), (tangents,))
    assert torch.equal(found, passed(through, tangents))


@BOTH
def test_compiles_in_one_graph(through: Pass) -> None:
    def step(weight: Tensor, keep: Tensor) -> Tensor:
        return loss(through, weight, keep)

    weight = weights().requires_grad_()
    torch.compile(step, fullgraph=True, backend="aot_eager")(weight, KEEP).backward()
    assert torch.equal(weight.grad, passed(through, torch.arange(1.0, 5.0).expand(3, 4)))


# --- the kernel that makes no mask ---------------------------------------------------------------------------------


def fused_loss(weight: Tensor) -> Tensor:
    return (fused([weight], PHASE.pattern, [PHASE.axis])[0] * torch.arange(1.0, 5.0)).sum()


def test_one_pass_is_the_mask_and_straight_through() -> None:
    weight = weights().requires_grad_()
    keep = STE().mask(weight.detach().abs(), PHASE)
    assert torch.equal(fused([weight], PHASE.pattern, [PHASE.axis])[0], straight_through(weights(), keep))
    fused_loss(weight).backward()
    assert torch.equal(weight.grad, torch.arange(1.0, 5.0).expand(3, 4))


def test_one_pass_under_function_transforms() -> None:
    ones = torch.arange(1.0, 5.0).expand(3, 4)
    assert torch.equal(torch.func.grad(fused_loss)(weights()), ones)
    stack = torch.stack([weights(), weights(seed=1)])
    apart = torch.stack([fused([w], PHASE.pattern, [PHASE.axis])[0] for w in stack])
    assert torch.equal(torch.vmap(lambda w: fused([w], PHASE.pattern, [PHASE.axis])[0])(stack), apart)
    assert torch.equal(torch.vmap(torch.func.grad(fused_loss))(stack), torch.stack([ones, ones]))


def test_one_pass_compiles_in_one_graph() -> None:
    weight = weights().requires_grad_()
    torch.compile(fused_loss, fullgraph=True, backend="aot_eager")(weight).backward()
    assert torch.equal(weight.grad, torch.arange(1.0, 5.0).expand(3, 4))


def test_a_forward_looks_at_no_signature(monkeypatch) -> None:
    """It costs more than all else that is done for a small weight beside its kernel."""
    weight = weights().requires_grad_()
    fused([weight], PHASE.pattern, [PHASE.axis])[0].sum().backward()  # what torch imports at first looks at some
    with monkeypatch.context() as patch:
        patch.setattr(inspect, "signature", lambda *_, **__: pytest.fail("torch looked at the signature"))
        (pruned,) = fused([weight], PHASE.pattern, [PHASE.axis])
        pruned.sum().backward()
    torch.testing.assert_close(weight.grad, torch.full_like(weight, 2.0))


def test_transforms_of_inputs_alone_take_plain_weights() -> None:
    """The weight itself is not wrapped then."""
    weight, x = weights(), torch.randn(5, weights().shape[1])
    (pruned,) = fused([weight], PHASE.pattern, [PHASE.axis])
    found = torch.func.vmap(lambda row: fused([weight], PHASE.pattern, [PHASE.axis])[0] @ row)(x)
    torch.testing.assert_close(found, x @ pruned.t())
