"""Refuse what joins scores, or attention weights, and may act only far beyond the lengths that are looked at.

A factor per position or per length (``1 + log(floor(p / 8192) + 1)``, log-n attention) is one up to some length, and so
is what a selection of the largest scores does while there are fewer of them than it takes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from mla_compile.passes.evaluate import GraphEvaluator
from mla_compile.passes.layout import Sizes
from mla_compile.passes.mismatch import MismatchError
from mla_compile.passes.trace import SHAPE_ONLY, upstream
from mla_compile.program import Role
from mla_compile.site import RejectCode

__all__ = ["refuse_far_changes"]

_aten = torch.ops.aten
_ADDS = frozenset(
    {
        _aten.add.Tensor,
        _aten.add.Scalar,
        _aten.sub.Tensor,
        _aten.sub.Scalar,
        _aten.rsub.Scalar,
        _aten.where.self,
        _aten.where.ScalarOther,
        _aten.where.ScalarSelf,
        _aten.masked_fill.Scalar,
        _aten.masked_fill.Tensor,
        _aten.cat.default,
        _aten.maximum.default,
        _aten.minimum.default,
        _aten.max.other,
        _aten.min.other,
    }
)
"""What these do to scores shows in what is added to scores of zero."""
_MOVES = frozenset(
    {
        _aten.view.default,
        _aten._unsafe_view.default,
        _aten.reshape.default,
        _aten.expand.default,
        _aten.unsqueeze.default,
        _aten.squeeze.dim,
        _aten.slice.Tensor,
        _aten.select.int,
        _aten.permute.default,
        _aten.transpose.int,
        _aten.repeat.default,
        _aten.unflatten.int,
        _aten.flatten.using_ints,
        _aten.split_with_sizes.default,
        _aten.clone.default,
        _aten.contiguous.default,
        _aten.detach.default,
        _aten.alias.default,
    }
)
"""Sizes among the arguments of these are shapes."""
_SELECTS = frozenset(
    {"sort", "argsort", "msort", "topk", "kthvalue", "median", "nanmedian", "quantile", "mode", "aminmax"}
)
_EXTREMES = frozenset({"max", "amax", "min", "amin"})
_CASTS = frozenset(
    {"_to_copy", "to", "type_as", "float", "double", "half", "bitwise_not", "logical_not", "tril", "triu"}
)


def refuse_far_changes(evaluator: GraphEvaluator, sizes: Sizes, start: Node, end: Node, *, weights: bool) -> None:
    """Look at what joins the way from one node to another.

    Args:
        evaluator: Reads tables.
        sizes: The layer's sizes.
        start: The product of queries and keys, or the softmax.
        end: What the softmax reads, or what the product with the values reads.
        weights: Whether these are attention weights, which nothing may be added to either.

    Raises:
        MismatchError: Something that depends on the position or the length does more than hide and add, or scores are
            compared with one another.
    """
    if sizes.fixed or start is end:
        return
    behind = upstream([end], lambda n: n is start)
    way = {start}
    node: Node
    for node in start.graph.nodes:  # in order: inputs come first
        if node in behind and any(i in way for i in node.all_input_nodes):
            way.add(node)
    for node in sorted(way - {start}, key=lambda n: n.name):
        _refuse_selection(node, way)
        target: Any = node.target
        if target in _MOVES or (target in _ADDS and not weights):
            continue
        for joined in node.all_input_nodes:
            if joined not in way and _tells_length(sizes, joined) and not _is_flag(evaluator, joined, given=weights):
                raise MismatchError(
                    RejectCode.SCORES,
                    f"{'attention weights' if weights else 'scores'} are changed by something computed from positions"
                    f" or from the length, at '{node.name}'",
                )


def _refuse_selection(node: Node, way: set[Node]) -> None:
    name = _operator(node)
    if name in _EXTREMES and not _compares(node, way):
        name = "" if _only_subtracted(node) else "sort"
    if name in _SELECTS:
        raise MismatchError(
            RejectCode.SCORES, f"scores are compared with one another, as top-k attention does, at '{node.name}'"
        )


def _compares(node: Node, way: set[Node]) -> bool:
    """Whether a maximum is of two tensors, entry by entry, and not over keys."""
    target: Any = node.target
    return getattr(target, "_overloadname", "") == "other" and any(i not in way for i in node.all_input_nodes)


def _only_subtracted(node: Node) -> bool:
    """Whether nothing but a difference, which a softmax does not see, or one entry of a pair, reads a node."""
    return all(
        _only_subtracted(user) if _operator(user) == "getitem" or user.target in _MOVES else _operator(user) == "sub"
        for user in node.users
    )


def _operator(node: Node) -> str:
    """An operator's name without its overload."""
    target: Any = node.target
    return str(getattr(target, "_opname", None) or getattr(target, "__name__", target))


def _tells_length(sizes: Sizes, node: Node) -> bool:
    """Whether a node's value depends on how many tokens there are."""
    known = {sizes.length, sizes.keys}

    def symbolic(size: Any) -> bool:  # noqa: ANN401 - int or symbolic size
        expression = getattr(getattr(size, "node", None), "expr", None)
        return bool(getattr(expression, "free_symbols", set()) & known)

    def told(found: Node) -> bool:
        value = found.meta.get("val")
        return any(map(symbolic, value.shape)) if isinstance(value, Tensor) else symbolic(value)

    def shape_only(found: Node) -> bool:
        return found.target in SHAPE_ONLY and not told(found)

    return any(map(told, upstream([node], shape_only)))


def _is_flag(evaluator: GraphEvaluator, node: Node, *, given: bool) -> bool:
    """Whether a node says yes or no, as a truth value or a number made of one, or is an input that does (``given``)."""
    value, inputs = node.meta.get("val"), evaluator.program.user_inputs
    if node.op == "placeholder" and node.name in inputs:
        return inputs[node.name][0] == Role.MASK
    if isinstance(value, Tensor) and value.dtype == torch.bool and not given:
        return True
    if node.name in evaluator.constants and not given:
        table = evaluator.constant(node)
        return bool(((table == 0) | (table == 1)).all())
    sources = [i for i in node.all_input_nodes if isinstance(i.meta.get("val"), Tensor)]
    if not sources:
        return not given and _operator(node) in ("ones", "zeros")
    return (node.target in _MOVES or _operator(node) in _CASTS) and _is_flag(evaluator, sources[0], given=given)
