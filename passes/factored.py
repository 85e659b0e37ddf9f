"""Read keys or values that are projected twice, by linear layers in a row, as the one projection that they are.

A weight that was compressed by a singular value decomposition is two: ``k = B (A x + a) + b``. Keys and values are
cached as one row, which is computed from one activation. Where they are projected from different ones, it is asked what
these are projected from themselves, and ``B A`` takes the place of ``B``.

It is described here, and not written into the graph when that is read: the graph is also what a conversion is compared
and timed with, and ``B A`` as one matrix is slower than the two. Nor is it done where keys and values already share
what they are projected from, however that is made: a latent is narrower than what is in front of it. The matrices are
multiplied in float64, where weights are read (:mod:`mla_compile.passes.weights`).
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Node

from mla_compile.passes.evaluate import GraphEvaluator
from mla_compile.passes.late import require_same_far
from mla_compile.passes.layout import Layout, Sizes, token_axes
from mla_compile.passes.mismatch import MismatchError
from mla_compile.passes.operands import normalised, projection_of, require_matrix, root
from mla_compile.passes.probe import Operand, exceeds, longest_length, probe_linear, probe_rows
from mla_compile.passes.trace import DataFlow, projections_behind, read_projection
from mla_compile.site import Projection, RejectCode

__all__ = ["from_one_activation", "read_from_one"]

_LONG = 8192
"""Length up to which what stands between two projections is followed."""
_EXACT = 1e-9
"""Error above which a float64 evaluation of numbers near one is not rounding."""


def from_one_activation(
    key: Projection, value: Projection, evaluator: GraphEvaluator, flow: DataFlow, sizes: Sizes
) -> tuple[Projection, Projection]:
    """Describe keys and values by what they are projected from in common.

    Args:
        key: The keys as they are projected last.
        value: The values, likewise.
        evaluator: Evaluates the graph.
        flow: Its data flow.
        sizes: The layer's sizes, as keys see them.

    Returns:
        The same, or with the projections in front of theirs, the fewest that are needed.

    Raises:
        MismatchError: They are projected from different activations, of which something else is made than projections.
    """
    keys, missing_key = _way(key, "key", evaluator, flow, sizes) if _apart(key, value, evaluator) else ([key], None)
    values, missing_value = _way(value, "value", evaluator, flow, sizes) if missing_key else ([value], None)
    pairs = itertools.product(enumerate(keys), enumerate(values))
    for (_, k), (_, v) in sorted(pairs, key=lambda pair: pair[0][0] + pair[1][0]):
        if not _apart(k, v, evaluator):
            return k, v
    ends = [root(evaluator.nodes[way[-1].origin]) for way in (keys, values)]
    for role, way, other, mismatch in (("key", keys, ends[1], missing_key), ("value", values, ends[0], missing_value)):
        first = _between(flow, evaluator.nodes[way[-1].origin], other)
        if mismatch is not None and first is not None:
            last = way[-1].inner.weight if way[-1].inner is not None else way[-1].weight
            what = "is not linear" if mismatch.code == RejectCode.NONLINEAR else f"is not read: {mismatch.reason}"
            raise MismatchError(
                mismatch.code, f"the {role} is projected twice ({first}, {last}), and what is done in between {what}"
            )
    raise MismatchError(
        RejectCode.CROSS,
        f"keys and values are projected from different activations, '{ends[0].name}' and '{ends[1].name}'",
    )


def _between(flow: DataFlow, node: Node, other: Node) -> str | None:
    """Weight of the nearest projection that leads from another node to a node, if there is one."""
    for found in projections_behind(flow, node):
        if other in flow.behind(found.source, lambda n: n is other):
            return flow.parameter_name(found.weight)
    return None


def read_from_one(query: Projection, key: Projection, evaluator: GraphEvaluator, flow: DataFlow, sizes: Sizes) -> bool:
    """Whether queries are projected, once or more, from what keys are projected from."""
    if not _apart(query, key, evaluator):
        return True
    return any(not _apart(found, key, evaluator) for found in _way(query, "query", evaluator, flow, sizes)[0])


def _apart(first: Projection, second: Projection, evaluator: GraphEvaluator) -> bool:
    return root(evaluator.nodes[first.origin]) is not root(evaluator.nodes[second.origin])


def _way(
    projection: Projection, role: str, evaluator: GraphEvaluator, flow: DataFlow, sizes: Sizes
) -> tuple[list[Projection], MismatchError]:
    """A projection by what it reads, by what that is projected from, and so on; and why that ends where it does."""
    found = [projection]
    while True:
        try:
            inner = _inner(evaluator.nodes[found[-1].origin], role, evaluator, flow, sizes)
        except MismatchError as mismatch:
            return found, mismatch
        found.append(_behind(found[-1], inner))


def _behind(projection: Projection, inner: Projection) -> Projection:
    return replace(projection, inner=inner if projection.inner is None else _behind(projection.inner, inner))


def _inner(node: Node, role: str, evaluator: GraphEvaluator, flow: DataFlow, sizes: Sizes) -> Projection:
    """Describe an activation as one head of a projection that does not turn.

    Raises:
        MismatchError: It is something else.
    """
    axes = token_axes(sizes, node.meta["val"].shape)
    if axes.count("d") != 1:
        raise MismatchError(RejectCode.LAYOUT, f"'{node.name}' has more than one axis of channels")
    operand = Operand(evaluator, sizes, role, node, node, Layout(axes))
    found = read_projection(flow, node, role)
    operand = replace(operand, base=found.node)
    require_matrix(found, flow, operand)
    generator = torch.Generator().manual_seed(9)
    probe_linear(operand, generator)
    if (reader := flow.reads_tokens(node, {found.node})) is not None:
        raise MismatchError(RejectCode.MASK, f"the {role} depends on which tokens were given, at '{reader.name}'")
    projection = projection_of(found, flow, *probe_rows(operand, generator))
    errors: list[Tensor] = []

    def compare(length: int) -> None:
        drawn = torch.randn(1, length, operand.width, generator=generator, dtype=torch.float64)
        expected = normalised(projection, drawn)
        errors.append((operand(drawn) - expected).abs().max() / expected.abs().max())

    compare(sizes.short)
    longest_length(evaluator, sizes, compare, _LONG)
    if any(exceeds(error, _EXACT) for error in errors):
        raise MismatchError(RejectCode.ROPE, f"position changes what the {role} is projected from, '{node.name}'")
    require_same_far(operand, flow)
    return projection
