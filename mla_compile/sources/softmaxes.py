"""Softmaxes that are written out, as exponentials over their sum, are spelled as the operator that passes look for.

Softmax does not see what is added to all numbers of a row, so a maximum that is taken away first is left out; and it is
linear behind the exponentials, so that dividing by their sum may wait until values were multiplied with them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

__all__ = ["has_other_softmaxes", "spell_softmaxes"]

_aten = torch.ops.aten
_COPIES = frozenset({_aten.clone.default, _aten.alias.default, _aten.detach.default, _aten.expand.default})
_LOG_SOFTMAX = frozenset({_aten._log_softmax.default, _aten.log_softmax.int})
_PRODUCTS = frozenset({_aten.matmul.default, _aten.bmm.default})
"""Products that leave the first operand's last axis but one where it is."""


@dataclass(frozen=True)
class _Softmax:
    """A softmax that was found: what takes its place.

    Attributes:
        node: The node that is the softmax, or the exponentials that become it.
        logits: What the exponentials are of.
        hidden: Masks of what was set to zero behind the exponentials, with the operator's other arguments.
        axis: The axis it goes along, counted from the end: negative.
        quotient: The product with values that is divided by the sum, where ``node`` are the exponentials in it.
    """

    node: Node
    logits: Node
    hidden: tuple[Node, ...]
    axis: int
    quotient: Node | None = None


def has_other_softmaxes(exported: ExportedProgram) -> bool:
    """Whether exponentials are divided by their sum, or are of a logarithm of a softmax."""
    return any(True for _ in _found(exported))


def spell_softmaxes(exported: ExportedProgram) -> None:
    """Write exponentials over their sum as a softmax, which they are.

    Args:
        exported: The graph, which is changed.
    """
    graph = exported.graph
    for found in [*_found(exported)]:
        node, logits = found.node, _without_shift(found.logits, found.axis)
        with graph.inserting_before(node):
            for mask in found.hidden:
                logits = _like(graph.call_function(_aten.masked_fill.Scalar, (logits, mask, -math.inf)), logits, node)
            kind = {} if logits.meta["val"].dtype == node.meta["val"].dtype else {"dtype": node.meta["val"].dtype}
            softmax = _like(graph.call_function(_aten.softmax.int, (logits, found.axis), kind), node, node)
        if found.quotient is None:
            node.replace_all_uses_with(softmax)
        else:
            product: Any = found.quotient.args[0]
            product.replace_input_with(node, softmax)
            found.quotient.replace_all_uses_with(product)
    graph.eliminate_dead_code()
    exported.graph_module.recompile()


def _like(new: Node, value: Node, place: Node) -> Node:
    """Give a node the value of another, and say that it belongs where a third one does."""
    new.meta.update(place.meta)
    new.meta["val"] = value.meta["val"]
    return new


def _found(exported: ExportedProgram) -> Iterator[_Softmax]:
    for node in exported.graph.nodes:
        if node.target is _aten.exp.default:
            entry: Any = node.args[0]
            arguments: Any = entry.args
            if entry.target in _LOG_SOFTMAX:
                yield _Softmax(node, arguments[0], (), _from_end(arguments[1], entry))
            elif entry.target is _aten.sub.Tensor and _is_logsumexp(arguments[1], arguments[0]):
                yield _Softmax(node, arguments[0], (), _from_end(arguments[1].args[1][0], entry))
            continue
        divided = _quotient(node)
        if divided is None:
            continue
        numerator, denominator = divided
        summed = _sum(denominator)
        if summed is None:
            continue
        exponentials, axis = summed
        whole = _exponentials(exponentials)
        if whole is None:
            continue
        logits, hidden = whole
        if numerator is exponentials:
            yield _Softmax(node, logits, hidden, axis)
        elif (
            axis == -1
            and numerator.target in _PRODUCTS
            and numerator.args[0] is exponentials
            and len(numerator.users) == 1
            and len(numerator.meta["val"].shape) == len(denominator.meta["val"].shape)
        ):
            yield _Softmax(exponentials, logits, hidden, axis, quotient=node)


def _quotient(node: Node) -> tuple[Node, Node] | None:
    """Numerator and denominator of ``a / b`` or ``a * (1 / b)``."""
    arguments: Any = node.args
    if node.target is _aten.div.Tensor and all(isinstance(a, Node) for a in arguments):
        return arguments[0], arguments[1]
    if node.target is _aten.mul.Tensor:
        for a, b in (arguments, arguments[::-1]):
            if isinstance(a, Node) and isinstance(b, Node) and b.target is _aten.reciprocal.default:
                return a, b.args[0]  # type: ignore[return-value]
    return None


def _sum(node: Node) -> tuple[Node, int] | None:
    """What is summed along one axis, which stays with a length of 1, and the axis, counted from the end."""
    while node.target in _COPIES:
        node = node.args[0]  # type: ignore[assignment]
    arguments: Any = node.args
    if node.target is _aten.unsqueeze.default and not _keeps(arguments[0]):
        found = _summed(arguments[0])
        place = _from_end(arguments[1], node)
        return found if found is not None and found[1] == place else None
    return _summed(node) if _keeps(node) else None


def _summed(node: Node) -> tuple[Node, int] | None:
    arguments: Any = node.args
    if node.target is not _aten.sum.dim_IntList or len(arguments[1] or ()) != 1:
        return None
    if node.meta["val"].dtype != arguments[0].meta["val"].dtype:
        return None
    return arguments[0], _from_end(arguments[1][0], arguments[0])


def _keeps(node: Node) -> bool:
    """Whether a reduction keeps the axis that it reduces."""
    return node.target is _aten.sum.dim_IntList and len(node.args) > 2 and bool(node.args[2])


def _exponentials(node: Node) -> tuple[Node, tuple[Node, ...]] | None:
    """What a node is the exponentials of, and masks of what was set to zero behind them."""
    hidden: list[Node] = []
    arguments: Any = node.args
    while node.target is _aten.masked_fill.Scalar and arguments[2] == 0:
        hidden.append(arguments[1])
        node = arguments[0]
        arguments = node.args
    return (arguments[0], tuple(hidden)) if node.target is _aten.exp.default else None


def _is_logsumexp(node: Any, of: Node) -> bool:  # noqa: ANN401 - an operator's argument
    return (
        isinstance(node, Node)
        and node.target is _aten.logsumexp.default
        and node.args[0] is of
        and len(node.args[1]) == 1  # type: ignore[arg-type]
        and len(node.args) > 2
        and bool(node.args[2])
    )


def _without_shift(logits: Node, axis: int) -> Node:
    """What is left when what is taken from all numbers of a row is not taken from them."""
    arguments: Any = logits.args
    if logits.target is not _aten.sub.Tensor or not isinstance(arguments[1], Node) or logits.kwargs:
        return logits
    whole, shift = (a.meta["val"] for a in arguments[:2])
    row = shift.dim() < -axis or shift.shape[axis] == 1
    return arguments[0] if row and whole.shape == logits.meta["val"].shape else logits


def _from_end(axis: int, node: Node) -> int:
    value: Tensor = node.meta["val"]
    return axis if axis < 0 else axis - value.dim()
