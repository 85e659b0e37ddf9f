"""Read a site's projection weights from the program, as the dense per-head matrices the maths is written in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mla_compile.passes.evaluate import GraphEvaluator
from mla_compile.program import Program
from mla_compile.site import AttentionSite, Projection

__all__ = ["HeadWeights", "SiteWeights", "input_width", "read_site"]

_aten = torch.ops.aten


@dataclass(frozen=True)
class HeadWeights:
    """One operand's projection per head, in float64: ``heads = weight @ x + bias``.

    Attributes:
        weight: ``[heads, head_dim, width]``.
        bias: ``[heads, head_dim]``; zeros when there is none.
    """

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class SiteWeights:
    """Queries, keys and values of one attention site, gains folded in."""

    query: HeadWeights
    key: HeadWeights
    value: HeadWeights


def read_site(program: Program, site: AttentionSite) -> SiteWeights:
    """Read and arrange the weights of one site.

    Args:
        program: The program that holds them.
        site: The recognised site.

    Returns:
        Per-head float64 weights, un-rotated, in the site's channel order.
    """
    evaluator = GraphEvaluator(program)
    return SiteWeights(*(_read(evaluator, p) for p in (site.query, site.key, site.value)))


def input_width(program: Program, site: AttentionSite) -> int:
    """Width of the activation a site's projections read; needs shapes only."""
    nodes = {n.name: n for n in program.exported.graph.nodes}
    return int(nodes[site.key.source].meta["val"].shape[-1])


def _read(evaluator: GraphEvaluator, projection: Projection) -> HeadWeights:
    node = evaluator.nodes[projection.node]
    linear = node.target is _aten.linear.default
    place = 2 if node.target is _aten.addmm.default else 1
    (weight,) = evaluator.run([node.args[place]], {}, {})  # type: ignore[list-item]
    matrix = weight if linear else weight.transpose(-1, -2)
    rows, gain = torch.tensor(projection.rows), torch.tensor(projection.gain, dtype=torch.float64)
    bias = torch.zeros_like(gain)
    if projection.bias is not None:
        added = node.args[2] if linear else node.args[0]
        (values,) = evaluator.run([added], {}, {})  # type: ignore[list-item]
        bias = values.reshape(-1)[rows] * gain
    if projection.offset is not None:
        bias = bias + torch.tensor(projection.offset, dtype=torch.float64)
    return HeadWeights(matrix[rows] * gain[..., None], bias)
