"""Run a float16 or bfloat16 graph in float32: the same computation without its roundings.

Widening is exact. Every number of a narrow type is a number of float32, so that only what the narrow type would have
rounded comes out differently, and better. The other direction is not: a graph in float32 does not say which of its
steps (norms, softmax, positions) must not be rounded, and is never narrowed here.

Types stand in a graph in two places: in the tensors it reads, and in arguments of operators that convert or create
(``_to_copy``, ``full``, ``softmax`` with a type). All others follow from their inputs.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Node

__all__ = ["NARROW", "attribute", "is_narrow", "type_name", "widened"]

_aten = torch.ops.aten
NARROW = frozenset({torch.float16, torch.bfloat16})
"""Types that have half the bytes of float32."""
_SOFTMAX = frozenset({_aten._softmax.default, _aten._log_softmax.default})
"""Their last argument says that a float16 input has a float32 output."""


def type_name(dtype: torch.dtype) -> str:
    """A type as users write it, such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def is_narrow(module: nn.Module) -> bool:
    """Whether any weight or constant of a module is of a narrow type."""
    return any(value.dtype in NARROW for value in (*module.parameters(), *module.buffers()))


def widened(module: fx.GraphModule, *, stored: bool = False) -> fx.GraphModule:
    """The same computation in float32.

    Weights are shared with ``module`` and made float32 one by one where they are read, so that no more than one of them
    is held twice; gradients reach the weights themselves.

    Args:
        module: A graph of ATen operators and ours. What it is given (a cache) has to be float32 in the result.
        stored: Store the weights as float32 instead, which takes twice the memory and is faster.

    Returns:
        A new module; ``module`` itself, if nothing in it is narrow.
    """
    tensors = {str(n.target): attribute(module, str(n.target)) for n in module.graph.nodes if n.op == "get_attr"}
    narrow = {name for name, value in tensors.items() if isinstance(value, Tensor) and value.dtype in NARROW}
    if not narrow and not any(_names_narrow(n) for n in module.graph.nodes):
        return module
    graph = copy.deepcopy(module.graph)
    for node in [*graph.nodes]:
        if node.op == "call_function":
            node.args, node.kwargs = _wide((node.args, dict(node.kwargs)))
            if node.target in _SOFTMAX:
                node.args = (*node.args[:2], False)
        elif node.op == "get_attr" and node.target in narrow and not stored:
            for user in [*node.users]:
                _widen_for(user, node)
    if stored:
        wide: dict[int, Tensor] = {}  # a weight of two names stays one
        tensors |= {name: wide.setdefault(id(tensors[name]), _float32(tensors[name])) for name in narrow}
    return fx.GraphModule(tensors, graph, class_name=type(module).__name__)


def _widen_for(user: Node, weight: Node) -> None:
    """Give one reader of a weight the weight in float32."""
    with user.graph.inserting_before(user):
        if user.target is not _aten.embedding.default:
            wide = user.graph.call_function(_aten._to_copy.default, (weight,), {"dtype": torch.float32})
            user.replace_input_with(weight, wide)
            return
    with user.graph.inserting_after(user):  # rows are few, and the table is the largest of all weights
        rows = user.graph.call_function(_aten._to_copy.default, (user,), {"dtype": torch.float32})
    user.replace_all_uses_with(rows, delete_user_cb=lambda reader: reader is not rows)


def _float32(value: Tensor) -> Tensor:
    wide = value.detach().float()
    return nn.Parameter(wide, requires_grad=value.requires_grad) if isinstance(value, nn.Parameter) else wide


def _names_narrow(node: Node) -> bool:
    found: list[bool] = []
    torch.fx.node.map_aggregate((node.args, node.kwargs), lambda a: found.append(_is_narrow_type(a)))
    return any(found)


def _wide(arguments: Any) -> Any:  # noqa: ANN401 - operator arguments have any type
    return torch.fx.node.map_aggregate(arguments, lambda a: torch.float32 if _is_narrow_type(a) else a)


def _is_narrow_type(argument: Any) -> bool:  # noqa: ANN401 - operator arguments have any type
    return isinstance(argument, torch.dtype) and argument in NARROW


def attribute(module: nn.Module, path: str) -> Any:  # noqa: ANN401 - parameters, buffers and constants
    """What a module has at a path."""
    return functools.reduce(getattr, path.split("."), module)
