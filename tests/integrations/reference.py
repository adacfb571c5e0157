"""SR-STE training of any model, written out from its equations, in one process in fp32: what trainers are held to.

Nothing of openwork is used for it. `dims` names the sparse weights, each with the dim that its product sums over.
"""

import torch
from plain_loop import DECAY, M, N
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from openwork.methods import method

STEPS = 20
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward", "linear", "_addmm_activation")


def keep_along(weight, dim):
    """The 2:4 mask along `dim`: bool, True is kept. Equal magnitudes keep the lower index."""
    groups = weight.detach().abs().movedim(dim, -1).unflatten(-1, (-1, M))
    ranks = groups.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return (ranks < N).flatten(-2).movedim(-1, dim)


def plain_steps(
    model, batches, loss_of, dims, update, *, clip=None, decay=DECAY, rho=None, late=("", 1), fixed=False, seen=None
):
    """The parameters of `model` after one step on each batch. `loss_of(call, batch)`: the loss of a whole batch.

    `rho`: the gradient is taken that far uphill (SAM, arXiv:2010.01412). `late`: parameters of that prefix move from
    that step on. `fixed`: the masks of the start stay, and pruned weights get no gradient (ASP); there is no decay.
    `seen`: the dtype that the forward pass gets weights and inputs in, and ranks them in.
    """
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    states = {name: {} for name in weights}
    start = _masks(weights, dims, seen)
    for t, batch in enumerate(batches, 1):
        keep = start if fixed else _masks(weights, dims, seen)
        gradients = _gradients(model, weights, batch, loss_of, keep, seen)
        if rho:
            uphill = {name: w + rho * gradients[name] / _norm(gradients) for name, w in weights.items()}
            gradients = _gradients(model, uphill, batch, loss_of, _masks(uphill, dims))
        if clip:
            gradients = {name: g * min(1.0, clip / (float(_norm(gradients)) + 1e-6)) for name, g in gradients.items()}
        for name in dims:
            pruned = 0.0 if fixed else gradients[name] + decay * weights[name]
            gradients[name] = gradients[name].where(keep[name], pruned)
        moving = {name for name in weights if not name.startswith(late[0]) or t >= late[1]}
        weights = {
            name: update(w, gradients[name], states[name], t) if name in moving else w for name, w in weights.items()
        }
    return weights


def _masks(weights, dims, seen=None):
    return {name: keep_along(weights[name].to(seen), dim) for name, dim in dims.items()}


def _gradients(model, weights, batch, loss_of, keep, seen=None):
    """Of the loss with masked weights, as if nothing had been masked."""
    used = {name: w.where(keep[name], 0 * w) if name in keep else w.clone() for name, w in weights.items()}
    leaves = [w.requires_grad_() for w in used.values()]

    def call(*args, **kwargs):
        args = [each.to(seen) for each in args]
        return functional_call(model, {name: w.to(seen) for name, w in used.items()}, tuple(args), kwargs)

    return dict(zip(used, torch.autograd.grad(loss_of(call, batch), leaves), strict=True))


def _norm(gradients):
    return sum(g.square().sum() for g in gradients.values()).sqrt()


class Gemms(TorchDispatchMode):
    """Counts the operands of every product that have the shape of a sparse weight, and those that are not 2:4.

    Sizes must be such that no activation has such a shape. An operand may lie transposed.
    """

    def __init__(self, shapes):
        super().__init__()
        self.shapes = {torch.Size(shape): dim for shape, dim in shapes}
        self.seen, self.dense = 0, []

    def __enter__(self):
        """Masks are made unwatched: they hold no product, and watching each of their operations takes long."""
        self._made = method.foreach_mask
        method.foreach_mask = self._unwatched
        return super().__enter__()

    def __exit__(self, *raised):
        method.foreach_mask = self._made
        return super().__exit__(*raised)

    def _unwatched(self, *args):
        with _disable_current_modes():
            return self._made(*args)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in PRODUCTS:
            for operand in args:
                if isinstance(operand, torch.Tensor):
                    self._look(operand)
        return func(*args, **(kwargs or {}))

    def _look(self, operand):
        operand = operand.full_tensor() if hasattr(operand, "full_tensor") else operand
        lies = (operand, operand.t()) if operand.ndim == 2 else (operand,)
        known = [(each, self.shapes[each.shape]) for each in lies if each.shape in self.shapes]
        self.seen += bool(known)
        if known and not any(is_sparse(each, dim) for each, dim in known):
            self.dense.append(tuple(operand.shape))


def is_sparse(weight, dim):
    """Whether it is 2:4 along `dim`."""
    return int((weight.movedim(dim, -1) != 0).unflatten(-1, (-1, M)).sum(-1).max()) <= N
