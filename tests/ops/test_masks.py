import operator

import pytest
import torch

from openwork.nm.groups import Axis
from openwork.nm.masks import magnitude_mask as definition
from openwork.nm.pattern import Pattern
from openwork.ops import foreach_mask

CASES = [
    ((16, 8, 3, 3), Pattern(2, 4), Axis(1)),
    ((8, 6), Pattern(1, 4), Axis(1)),  # a short last group
    ((8, 4, 2), Pattern(1, 4), Axis(0, blocks=2)),
    ((4, 6), Pattern(3, 8), Axis(flat=True)),
]


@pytest.mark.parametrize(("shape", "pattern", "axis"), CASES)
def test_the_operator_is_registered_rightly(shape, pattern, axis):
    arguments = ([torch.rand(shape)], pattern.n, pattern.m, [axis.dim, axis.blocks, int(axis.flat)])
    torch.library.opcheck(torch.ops.openwork.foreach_mask.default, arguments)


@pytest.mark.parametrize(("shape", "pattern", "axis"), CASES)
def test_a_compiled_mask_is_the_eager_one_and_one_operator(shape, pattern, axis):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    score = torch.rand(shape).round(decimals=1)  # with ties
    (compiled,) = torch.compile(foreach_mask, fullgraph=True, backend=backend)([score], pattern, [axis])
    assert torch.equal(compiled, definition(score, pattern, axis))
    assert [
        node.target for node in graphs[0].graph.nodes if node.op == "call_function" and node.target != operator.getitem
    ] == [torch.ops.openwork.foreach_mask.default]


def test_channels_last_keeps_its_strides_when_compiled():
    score = torch.rand(8, 8, 3, 3).to(memory_format=torch.channels_last)
    compiled = torch.compile(foreach_mask, fullgraph=True, backend="aot_eager")([score], Pattern(2, 4), [Axis(1)])[0]
    assert compiled.stride() == score.stride()
