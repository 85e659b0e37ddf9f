"""Write complex numbers as pairs of real ones: few operators of ONNX know the former.

Rotations are written with complex numbers by many models (Su et al. 2021, eq. 34: channel pairs times ``exp(i p f)``).
Those of converted layers are gone, but queries that are read as the attention product reads them bring theirs along.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.fx import Node

__all__ = ["write_pairs"]

_aten = torch.ops.aten
_AS_REAL = _aten.view_as_real.default

_Form = Callable[[fx.Graph, Node, Mapping[Node, Node]], Node]
"""Makes a node with a last axis ``[real, imaginary]`` in place of a complex one, from those that were made already."""


def write_pairs(exported: ExportedProgram) -> None:
    """Replace complex numbers in a graph, if all of what is done to them is known; else it is left as it is.

    Args:
        exported: Changed in place.
    """
    graph = exported.graph
    complex_nodes = [n for n in graph.nodes if _is_complex(n)]
    users = {user for n in complex_nodes for user in n.users}
    if any(n.target not in _FORMS for n in complex_nodes) or any(
        n.target not in _FORMS and n.target is not _AS_REAL for n in users
    ):
        return
    pairs: dict[Node, Node] = {}
    for node in complex_nodes:
        with graph.inserting_before(node):
            pairs[node] = _FORMS[node.target](graph, node, pairs)
    for node in [n for n in users if n.target is _AS_REAL]:
        node.replace_all_uses_with(pairs[node.args[0]])
    graph.eliminate_dead_code()
    exported.graph_module.recompile()


def _is_complex(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_complex()


def _joined(graph: fx.Graph, real: Node, imaginary: Node) -> Node:
    return graph.call_function(_aten.stack.default, ([real, imaginary], -1))


def _parts(graph: fx.Graph, pair: Node) -> tuple[Node, Node]:
    real, imaginary = (graph.call_function(_aten.select.int, (pair, -1, i)) for i in (0, 1))
    return real, imaginary


def _of_pair(graph: fx.Graph, node: Node, pairs: Mapping[Node, Node]) -> Node:
    return node.args[0]  # type: ignore[return-value]


def _of_parts(graph: fx.Graph, node: Node, pairs: Mapping[Node, Node]) -> Node:
    real, imaginary = node.args
    return _joined(graph, real, imaginary)  # type: ignore[arg-type]


def _of_angle(graph: fx.Graph, node: Node, pairs: Mapping[Node, Node]) -> Node:
    size, angle = node.args
    turned = [graph.call_function(f, (angle,)) for f in (_aten.cos.default, _aten.sin.default)]
    return _joined(graph, *(graph.call_function(_aten.mul.Tensor, (size, x)) for x in turned))


def _product(graph: fx.Graph, node: Node, pairs: Mapping[Node, Node]) -> Node:
    def times(a: Any, b: Any) -> Node:  # noqa: ANN401 - nodes or numbers
        return graph.call_function(_aten.mul.Tensor, (a, b))

    given: list[Any] = list(node.args[:2])
    known = [pairs[a] for a in given if a in pairs]
    if len(known) == 2:
        (a, b), (c, d) = (_parts(graph, pair) for pair in known)
        real = graph.call_function(_aten.sub.Tensor, (times(a, c), times(b, d)))
        return _joined(graph, real, graph.call_function(_aten.add.Tensor, (times(a, d), times(b, c))))
    (other,) = (a for a in given if a not in pairs)
    if isinstance(other, Node) and isinstance(other.meta["val"], Tensor) and other.meta["val"].dim():
        other = graph.call_function(_aten.unsqueeze.default, (other, -1))
    return times(known[0], other)


def _along_axis(graph: fx.Graph, node: Node, pairs: Mapping[Node, Node]) -> Node:
    """What happens to one axis, counted from the front as there is another one behind the last."""
    source, axis, *rest = node.args if len(node.args) > 1 else (*node.args, 0)
    ranks = len(source.meta["val"].shape) + (node.target is _aten.unsqueeze.default)  # type: ignore[union-attr]
    return graph.call_function(node.target, (pairs[source], int(axis) % ranks, *rest))  # type: ignore[arg-type, index]


def _to_shape(graph: fx.Graph, node: Node, pairs: Mapping[Node, Node]) -> Node:
    source, shape, *rest = node.args
    return graph.call_function(node.target, (pairs[source], [*shape, 2], *rest))  # type: ignore[arg-type, index, misc]


def _as_it_is(graph: fx.Graph, node: Node, pairs: Mapping[Node, Node]) -> Node:
    return graph.call_function(node.target, (pairs[node.args[0]],))  # type: ignore[arg-type, index]


_FORMS: Mapping[Any, _Form] = {
    _aten.view_as_complex.default: _of_pair,
    _aten.complex.default: _of_parts,
    _aten.polar.default: _of_angle,
    _aten.mul.Tensor: _product,
    _aten.mul.Scalar: _product,
    _aten.unsqueeze.default: _along_axis,
    _aten.slice.Tensor: _along_axis,
    _aten.select.int: _along_axis,
    _aten.view.default: _to_shape,
    _aten.reshape.default: _to_shape,
    _aten.expand.default: _to_shape,
    _aten.neg.default: _as_it_is,
    _aten.clone.default: _as_it_is,
    _aten.contiguous.default: _as_it_is,
}
"""By operator of a complex result, its form."""
