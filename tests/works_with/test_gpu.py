"""What a GPU needs: steps that never wait for it, CUDA graphs, and optimizers that run on it only.

Without a GPU the first test stands for the others: what asks for a tensor's value cannot be captured.
"""

import pytest
import torch
from plain_loop import distance
from torch.utils._python_dispatch import TorchDispatchMode
from works_with.harness import adamw_of, sgd_of
from works_with.nets import NETS, batches, loss_of, sparse

import openwork as ow
from openwork.kernels.cpu import native

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
VALUES = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "_unique2")


class Waiting(TorchDispatchMode):
    """Collects the operations that give values to Python: on a GPU they wait for it."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func.overloadpacket.__name__ == "index" and any(
            each is not None and each.dtype == torch.bool for each in args[1]
        )
        if by_mask or func.overloadpacket.__name__ in VALUES:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def step(model, optimizer, batch):
    optimizer.zero_grad()
    loss_of(model, batch).backward()
    optimizer.step()


@pytest.mark.parametrize("kind", NETS)
def test_a_step_asks_for_no_value(kind, monkeypatch):
    monkeypatch.setattr(native, "_open", lambda: (None, "GPUs have none"))
    model = sparse(kind)
    (optimizer,) = sgd_of(model)
    handle = ow.attach(optimizer, model, topology=ow.Topology(every=3))
    for batch in batches(kind, 2):
        with Waiting() as waiting:
            step(model, optimizer, batch)
        assert waiting.found == []
    step(model, optimizer, batches(kind, 1)[0])  # the third is recorded, which asks for counts
    assert handle.steps == 3


def test_what_asks_for_a_value_is_found():
    with Waiting() as waiting:
        torch.ones(3)[torch.ones(3) > 0].sum().item()
    assert waiting.found == ["aten.index.Tensor", "aten._local_scalar_dense.default"]


# --- with a GPU --------------------------------------------------------------------------------------------------


def on_gpu(kind, make):
    model = sparse(kind).cuda()
    (optimizer,) = make(model)
    ow.attach(optimizer, model)
    return model, optimizer, [(x.cuda(), y.cuda()) for x, y in batches(kind, 20)]


def capturable(model):
    return [torch.optim.AdamW(model.parameters(), lr=0.03, eps=1e-3, capturable=True)]


OPTIMIZERS = {
    "SGD": sgd_of,
    "capturable AdamW": capturable,
    "fused AdamW": lambda model: adamw_of(model, fused=True),
}


@gpu
@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_captured_step_replays_as_it_runs(kind, name):
    """Forward, backward and the step in one CUDA graph, as torch's notes on CUDA semantics do it."""
    ends = []
    for captured in (False, True):
        model, optimizer, data = on_gpu(kind, OPTIMIZERS[name])
        here = tuple(each.clone() for each in data[0])
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # states and libraries are made outside
            for _ in range(3):
                step(model, optimizer, here)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                step(model, optimizer, here)
        for batch in data:
            for mine, new in zip(here, batch, strict=True):
                mine.copy_(new)
            graph.replay() if captured else step(model, optimizer, here)
        ow.verify(model, here[0])
        ends.append({name: w.cpu() for name, w in model.state_dict().items()})
    assert distance(*ends) < 1e-4


@gpu
@pytest.mark.parametrize("kind", NETS)
def test_a_fused_optimizer_unscales_on_the_gpu(kind):
    """It takes `grad_scale`: scaled by 1024 and not scaled it ends the same, in fp32."""
    ends = []
    for scale in (1.0, 1024.0):
        model, optimizer, data = on_gpu(kind, OPTIMIZERS["fused AdamW"])
        scaler = torch.amp.GradScaler("cuda", init_scale=scale)
        for batch in data:
            optimizer.zero_grad()
            scaler.scale(loss_of(model, batch)).backward()
            scaler.step(optimizer)
            scaler.update()
        ends.append({name: w.cpu() for name, w in model.state_dict().items()})
    assert distance(*ends) < 1e-4
