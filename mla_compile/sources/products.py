"""Products with a weight that are written as a tensordot, or as a convolution of one position, are spelled as such.

Passes look for ``linear``, ``matmul`` and ``einsum``. A tensordot is an einsum under another name, and a convolution
whose kernel is one position long is a linear layer for channels that stand before the positions. Both hold whatever is
multiplied, so nothing is asked about that here.
"""

from __future__ import annotations

import string
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, Node

__all__ = ["has_other_products", "spell_products", "transposed"]

_aten = torch.ops.aten
_TENSORDOT = _aten.tensordot.default
_CONVOLUTIONS = frozenset({_aten.conv1d.default, _aten.conv1d.padding, _aten.convolution.default})


def has_other_products(exported: ExportedProgram) -> bool:
    """Whether a product is written as a tensordot, or as a convolution of one position."""
    return any(_is_product(node) for node in exported.graph.nodes)


def spell_products(exported: ExportedProgram) -> None:
    """Write them as ``linear``, ``matmul`` or ``einsum``, which they are.

    Args:
        exported: The graph, which is changed.
    """
    graph = exported.graph
    upright: dict[Node, Node] = {}
    for node in [n for n in graph.nodes if _is_product(n)]:
        with graph.inserting_before(node):
            new = _contracted(graph, node) if node.target is _TENSORDOT else _linear(graph, node, upright)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    graph.eliminate_dead_code()
    exported.graph_module.recompile()


def _is_product(node: Node) -> bool:
    if node.target is _TENSORDOT:
        return _is_contraction(node)
    return node.target in _CONVOLUTIONS and _is_pointwise(node)


def _is_contraction(node: Node) -> bool:
    """Whether sizes agree: torch sums an axis by itself where the other operand's has one entry."""
    first, second, own, other = _operands(node)
    left, right = (operand.meta["val"].shape for operand in (first, second))
    pairs = [(left[i], right[j]) for i, j in zip(own, other, strict=True)]
    return all(isinstance(a, int) and isinstance(b, int) and a == b for a, b in pairs)


def _operands(node: Node) -> tuple[Node, Node, list[int], list[int]]:
    """Factors of a tensordot, and which axes of each are summed, counted from the front."""
    given = _arguments(node)
    first, second = given["self"], given["other"]
    own, other = (
        [axis % operand.meta["val"].dim() for axis in axes]
        for operand, axes in ((first, given["dims_self"]), (second, given["dims_other"]))
    )
    return first, second, own, other


def _arguments(node: Node) -> dict[str, Any]:
    """What an operator was given, by name."""
    target: Any = node.target
    names = [argument.name for argument in target._schema.arguments]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _contracted(graph: Graph, node: Node) -> Node:
    first, second, own, other = _operands(node)
    rank, second_rank = first.meta["val"].dim(), second.meta["val"].dim()
    if own == [rank - 1] and second_rank == 2:
        target = _aten.linear.default if other == [1] else _aten.matmul.default
        return _made(graph, node, node.meta["val"], target, first, second)
    letters = iter(string.ascii_letters)
    left = [next(letters) for _ in range(rank)]
    shared = dict(zip(other, own, strict=True))
    right = [left[shared[i]] if i in shared else next(letters) for i in range(second_rank)]
    kept = [c for c in (*left, *right) if (c in left) != (c in right)]
    equation = f"{''.join(left)},{''.join(right)}->{''.join(kept)}"
    return _made(graph, node, node.meta["val"], _aten.einsum.default, equation, [first, second])


def _is_pointwise(node: Node) -> bool:
    """Whether a convolution looks at one position at a time, and at all channels of it.

    How far apart the entries of a kernel are does not matter where there is one.
    """
    given = _arguments(node)
    weight, padding = given["weight"].meta["val"], given.get("padding", 0)
    return (
        weight.dim() == 3
        and given["input"].meta["val"].dim() == 3
        and weight.shape[2] == 1
        and given.get("groups", 1) == 1
        and not given.get("transposed", False)
        and _all(given.get("stride", 1), 1)
        and (isinstance(padding, str) or _all(padding, 0))  # by any name, a single position needs none
        and _all(given.get("output_padding", 0), 0)
    )


def _all(given: Any, number: int) -> bool:  # noqa: ANN401 - an operator's argument: a number, or one per axis
    return all(n == number for n in (given if isinstance(given, list | tuple) else [given]))


def _linear(graph: Graph, node: Node, upright: dict[Node, Node]) -> Node:
    """A convolution as a linear layer between two transpositions.

    Args:
        graph: Where it is.
        node: The convolution of ``[batch, channels, length]``.
        upright: Activations, and what they are with channels last, so that layers that read one still read one.
    """
    arguments = _arguments(node)
    given, weight, bias = arguments["input"], arguments["weight"], arguments.get("bias")
    if given not in upright:
        turned = transposed(given)
        if turned is None:
            turned = _made(graph, node, given.meta["val"].transpose(1, 2), _aten.transpose.int, given, 1, 2)
        upright[given] = turned
    matrix = _made(graph, node, weight.meta["val"].squeeze(2), _aten.squeeze.dim, weight, 2)
    value = node.meta["val"].transpose(1, 2).contiguous()
    linear = _made(graph, node, value, _aten.linear.default, upright[given], matrix, *([] if bias is None else [bias]))
    return _made(graph, node, value.transpose(1, 2), _aten.transpose.int, linear, 1, 2)


def transposed(node: Node) -> Node | None:
    """What a node is with its last two axes exchanged, if it is made so."""
    arguments: Any = node.args
    last = node.meta["val"].dim() if node.op == "call_function" else 0
    if node.target is _aten.transpose.int and {a % last for a in arguments[1:]} == {last - 2, last - 1}:
        return arguments[0]  # type: ignore[no-any-return]
    order = [*range(last - 2), last - 1, last - 2]
    if node.target is _aten.permute.default and [a % last for a in arguments[1]] == order:
        return arguments[0]  # type: ignore[no-any-return]
    return None


def _made(graph: Graph, place: Node, value: torch.Tensor, target: Any, *arguments: Any) -> Node:  # noqa: ANN401
    """A node with a value, that belongs where another one does."""
    new = graph.call_function(target, arguments)
    new.meta.update(place.meta)
    new.meta["val"] = value
    return new
