"""Replace what a graph computes from single numbers alone by its value, so that no backend needs a form of it."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Node

from mla_compile.passes.retype import attribute

__all__ = ["fold_numbers"]

_aten = torch.ops.aten


def fold_numbers(module: fx.GraphModule, graph: fx.Graph) -> None:
    """Fold tensors without axes that depend on constants of the model only (a quantile of a fixed share).

    Args:
        module: Holds the constants; parameters are not among them.
        graph: Changed in place.
    """
    known: dict[Node, Any] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            value = attribute(module, str(node.target))
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and not value.dim():
                known[node] = value
        elif _repeatable(node) and node.all_input_nodes and all(i in known for i in node.all_input_nodes):
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = node.target(*args, **kwargs)
    for node, value in known.items():
        if node.op != "call_function" or not isinstance(value, Tensor) or value.dim() or value.is_complex():
            continue
        users = {user for user in node.users if user not in known}
        if users:
            with graph.inserting_after(node):
                number = graph.call_function(_aten.scalar_tensor.default, (value.item(),), {"dtype": value.dtype})
            node.replace_all_uses_with(number, delete_user_cb=users.__contains__)
    graph.eliminate_dead_code()


def _repeatable(node: Node) -> bool:
    """Whether a node computes the same whenever it is run, and nothing else."""
    target: Any = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return node.op == "call_function" and target is operator.getitem
    return torch.Tag.nondeterministic_seeded not in target.tags and not target._schema.is_mutable
