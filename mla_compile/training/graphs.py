"""Graphs that training runs: with attention outputs as results or given, and with activations computed twice."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.fx import Node
from torch.fx.passes.split_module import split_module
from torch.utils.checkpoint import checkpoint

from mla_compile.errors import RefusedError
from mla_compile.passes.insert_latent import erase_dead
from mla_compile.passes.recognise import recognise
from mla_compile.passes.trace import PRODUCTS
from mla_compile.program import Program

__all__ = ["latent_nodes", "matched", "output_products", "recomputed", "with_attention_outputs"]

_LATENT = torch.ops.mla.latent_attention.default


def latent_nodes(graph: fx.Graph) -> list[Node]:
    """Attention outputs of every converted layer, in order."""
    return [n for n in graph.nodes if n.target is operator.getitem and n.args[1] == 0 and n.args[0].target is _LATENT]


def output_products(outputs: Iterable[Node]) -> list[Node]:
    """The output projections that attention outputs go into.

    Raises:
        RefusedError: Attention outputs are used in another way.
    """
    found = []
    for output in outputs:
        node = output
        while node.target not in PRODUCTS:
            if len(node.users) != 1:
                raise RefusedError(
                    f"The attention outputs at '{output.name}' do not go into one output projection.",
                    "Train --train latent or all, without matching attention outputs.",
                )
            (node,) = node.users
        found.append(node)
    return found


def with_attention_outputs(program: Program) -> fx.GraphModule:
    """The original with the output projections of its attention layers as its only results.

    Raises:
        RefusedError: Some attention is not understood, or its outputs go somewhere else.
    """
    module = program.flat_module()
    nodes = {n.name: n for n in module.graph.nodes}
    sites = recognise(program).sites
    return _ending_in(module, output_products(nodes[site.output] for site in sites))


def matched(module: fx.GraphModule) -> fx.GraphModule:
    """A converted graph in which every layer is given what the original's attention layers before it returned.

    Its inputs are those of the graph and one tensor per converted layer; its results are the output projections. No
    layer sees the error of another, nothing behind the last of them runs, and parameters are shared with the graph.

    Raises:
        RefusedError: Attention outputs do not go into one projection.
    """
    graph = copy.deepcopy(module.graph)
    module = fx.GraphModule(module, graph)
    products = output_products(latent_nodes(graph))
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    for number, product in enumerate(products):
        with graph.inserting_after(last):
            last = graph.placeholder(f"attended_{number}")
        product.replace_all_uses_with(last)
    return _ending_in(module, products)


def _ending_in(module: fx.GraphModule, results: Sequence[Node]) -> fx.GraphModule:
    graph = module.graph
    output = next(n for n in graph.nodes if n.op == "output")
    output.args = (tuple(results),)
    erase_dead(graph)
    return fx.GraphModule(module, graph)


def recomputed(module: fx.GraphModule) -> fx.GraphModule:
    """The same graph, cut behind every attention layer, in pieces that keep their inputs only.

    Parameters are shared with the graph and keep their names.
    """
    attentions = {n.args[0] for n in latent_nodes(module.graph)}
    pieces, piece = {}, 0
    for node in module.graph.nodes:
        pieces[node] = piece
        piece += node in attentions
    split = split_module(module, module, pieces.__getitem__)
    for name, part in [*split.named_children()]:
        if isinstance(part, fx.GraphModule):
            split.add_submodule(name, _Recomputed(part))
    return split


class _Recomputed(nn.Module):
    """Keeps the inputs of a piece, and computes it again for its gradient."""

    def __init__(self, piece: fx.GraphModule) -> None:
        super().__init__()
        self.piece = piece

    def forward(self, *inputs: Any) -> Any:  # noqa: ANN401 - tensors and sizes
        return checkpoint(self.piece, *inputs, use_reentrant=False, preserve_rng_state=False)
