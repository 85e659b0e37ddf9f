"""What is computed from single numbers is folded; weights, random numbers and the module itself are left alone."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from mla_compile.passes.fold import fold_numbers

aten = torch.ops.aten


class Constants(nn.Module):
    """Holds two buffers without axes and one with, and a parameter without axes."""

    def __init__(self) -> None:
        super().__init__()
        for name, value in (("share", 0.95), ("mean", 0.5)):
            self.register_buffer(name, torch.tensor(value))
        self.register_buffer("row", torch.arange(3.0))
        self.gain = nn.Parameter(torch.tensor(2.0))


def graph_of(build) -> fx.GraphModule:
    """A module of one input whose output is ``build(graph, input)``."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(build(graph, x))
    return fx.GraphModule(Constants(), graph)


def folded(module: fx.GraphModule) -> fx.GraphModule:
    copy = fx.Graph()
    copy.output(copy.graph_copy(module.graph, {}))
    fold_numbers(module, copy)
    copy.lint()
    return fx.GraphModule(module, copy)


def targets(module: fx.GraphModule) -> set[object]:
    return {n.target for n in module.graph.nodes if n.op == "call_function"}


def test_a_chain_of_numbers_becomes_one_number() -> None:
    def build(graph: fx.Graph, x: fx.Node) -> fx.Node:
        doubled = graph.call_function(aten.mul.Tensor, (graph.get_attr("share"), 2))
        centred = graph.call_function(aten.sub.Tensor, (doubled, 1))
        return graph.call_function(aten.mul.Tensor, (x, graph.call_function(aten.erfinv.default, (centred,))))

    module, x = graph_of(build), torch.randn(4)
    got = folded(module)
    assert targets(got) == {aten.mul.Tensor, aten.scalar_tensor.default}
    assert aten.erfinv.default in targets(module)
    torch.testing.assert_close(got(x), module(x), rtol=0, atol=0)


def test_tensors_with_axes_weights_and_random_numbers_stay() -> None:
    def build(graph: fx.Graph, x: fx.Node) -> fx.Node:
        for value in (
            graph.call_function(aten.exp.default, (graph.get_attr("row"),)),
            graph.call_function(aten.exp.default, (graph.get_attr("gain"),)),
            graph.call_function(aten.bernoulli.default, (graph.get_attr("mean"),)),
        ):
            x = graph.call_function(aten.mul.Tensor, (x, value))
        return x

    got = folded(graph_of(build))
    assert targets(got) == {aten.exp.default, aten.bernoulli.default, aten.mul.Tensor}


def test_integers_keep_their_type() -> None:
    def build(graph: fx.Graph, x: fx.Node) -> fx.Node:
        number = graph.call_function(aten._to_copy.default, (graph.get_attr("share"),), {"dtype": torch.int64})
        return graph.call_function(aten.add.Tensor, (x, number))

    result: Tensor = folded(graph_of(build))(torch.tensor([1, 2]))
    assert result.dtype == torch.int64
    assert result.tolist() == [1, 2]
