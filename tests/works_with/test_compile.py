"""Compilation, each with the test of `harness.py`, and with as many graphs as the dense model has, never more."""

from collections import Counter
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from works_with.harness import FOR_THE_PAGE, Scenario, check, nets_of, run
from works_with.nets import ResNet, Transformer, batches, loss_of, made


class Watching:
    """A backend that runs what torch traced, forward and backward, watched by `gemms`, and counts the graphs."""

    def __init__(self, gemms):
        self.gemms, self.graphs = gemms, Counter()
        self.backend = aot_autograd(
            fw_compiler=partial(self._compile, "forward"), bw_compiler=partial(self._compile, "backward")
        )

    def _compile(self, which, graph, _):
        self.graphs[which] += 1

        def run_graph(*args):
            with self.gemms:
                return graph(*args)

        return make_boxed_func(run_graph)


def whole_model(model, backend):
    return torch.compile(model, backend=backend, fullgraph=True)


def each_block(model, backend):
    for block in model.layers if isinstance(model, Transformer) else (model.one, model.two):
        block.compile(backend=backend, fullgraph=True)
    return model


def compiled(kind, compile_it, **more):
    """The result of a scenario to compile, and what was compiled for it, in all and for the dense model."""
    watching, dense = [], Watching(nullcontext())
    call = compile_it(made(kind), dense.backend)
    for batch in batches(kind, 2):
        loss_of(call, batch).backward()

    def wrap(model, gemms):
        torch._dynamo.reset()
        watching.append(Watching(gemms))
        return compile_it(model, watching[-1].backend)

    torch._dynamo.reset()
    result = run(Scenario(wrap=wrap, watched_inside=True, **more), kind)
    return result, [each.graphs for each in watching], dense.graphs


@pytest.fixture
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh")
def test_the_whole_model_is_one_graph_compiled_once(row):
    """20 steps, and no recompilation in any."""
    results, scenario = {}, Scenario(resumes=FOR_THE_PAGE)
    for kind in nets_of(Scenario()):
        results[kind], graphs, dense = compiled(kind, whole_model, resumes=scenario.resumes)
        assert dense == {"forward": 1, "backward": 1}
        assert graphs == [dense] * (1 + scenario.resumes)
    check(row, "Compilation", "`torch.compile(model, fullgraph=True)`: one graph, compiled once", scenario, results)


@pytest.mark.usefixtures("fresh")
def test_equal_blocks_are_compiled_once(row):
    result, graphs, dense = compiled(Transformer, each_block)
    assert graphs == [dense, dense]
    check(
        row, "Compilation", "each block compiled (regional): as many graphs as dense", Scenario(), {Transformer: result}
    )


def compiled_step(training, batch):
    """A compiled function that computes the loss and calls backward."""
    if not hasattr(training, "compiled"):
        model = training.model
        training.compiled = torch.compile(lambda *each: loss_of(model, each).backward(), backend=model.backend)
    training.compiled(*batch)
    training.update()


@pytest.mark.usefixtures("fresh")
def test_loss_and_backward_in_one_compiled_function(row):
    def remember(model, backend):
        model.backend = backend
        return model

    result, graphs, _ = compiled(ResNet, remember, step=compiled_step)
    assert graphs == [{"forward": 1, "backward": 1}] * 2
    check(row, "Compilation", "loss and `backward()` in one compiled function", Scenario(), {ResNet: result})


@pytest.mark.slow
@pytest.mark.for_the_page
@pytest.mark.usefixtures("fresh")
def test_with_the_default_backend(row):
    """Inductor's code is not watched: its products are in it."""
    scenario = Scenario(wrap=lambda model, _: torch.compile(model, fullgraph=True), watched_inside=True, resumes=False)
    result = run(scenario, ResNet)
    assert result.seen == 0
    assert result.difference < scenario.tolerance
    what = "`torch.compile(model)` with its default backend, inductor"
    row("Compilation", what, difference={"ResNet": result.difference}, tolerance=scenario.tolerance)
