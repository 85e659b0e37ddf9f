"""Read a site's projection weights from the program, as the dense per-head matrices the maths is written in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node

from mla_compile.passes.einsum import einsum_parts
from mla_compile.passes.evaluate import GraphEvaluator
from mla_compile.passes.offset_rotation import turn_by_phases
from mla_compile.passes.trace import upstream
from mla_compile.program import AnyProgram
from mla_compile.site import AttentionSite, Projection

__all__ = ["HeadWeights", "SiteWeights", "has_numbers", "input_width", "read_site", "stored_numbers"]

_aten = torch.ops.aten


@dataclass(frozen=True)
class HeadWeights:
    """One operand's projection per head, in float64: ``heads = weight @ x + bias``.

    With a norm, ``heads = (weight @ x + bias) * s + shift`` with one number ``s`` per token and group of the norm. For
    queries read from an activation behind a norm, ``x`` is the head's own part of that activation.

    Attributes:
        weight: ``[heads, head_dim, width]``.
        bias: ``[heads, head_dim]``; zeros when there is none.
        shift: ``[heads, head_dim]`` behind the norm; zeros when there is none.
    """

    weight: Tensor
    bias: Tensor
    shift: Tensor


@dataclass(frozen=True)
class SiteWeights:
    """Queries, keys and values of one attention site, gains folded in."""

    query: HeadWeights
    key: HeadWeights
    value: HeadWeights


def read_site(program: AnyProgram, site: AttentionSite) -> SiteWeights:
    """Read and arrange the weights of one site.

    Args:
        program: The program that holds them.
        site: The recognised site.

    Returns:
        Per-head float64 weights, un-rotated, in the site's channel order; those of queries turned by the rotation's
        phases.
    """
    evaluator = GraphEvaluator(program)
    query, key, value = (_read(evaluator, p) for p in (site.query, site.key, site.value))
    turned = HeadWeights(
        turn_by_phases(query.weight.mT, site.rope).mT,
        turn_by_phases(query.bias, site.rope),
        turn_by_phases(query.shift, site.rope),
    )
    return SiteWeights(turned, key, value)


def input_width(program: AnyProgram, site: AttentionSite) -> int:
    """Width of the activation a site's projections read; needs shapes only."""
    nodes = {n.name: n for n in program.exported.graph.nodes}
    return int(nodes[site.key.origin].meta["val"].shape[-1])


def has_numbers(program: AnyProgram) -> bool:
    """Whether a model's weights are there, and not their shapes alone."""
    return not any(isinstance(v, FakeTensor) or v.is_meta for v in program.exported.state_dict.values())


def stored_numbers(program: AnyProgram) -> int:
    """Numbers in all weights of a model; what is tied counts once."""
    return sum({v.data_ptr(): v.numel() for v in program.exported.state_dict.values()}.values())


def _read(evaluator: GraphEvaluator, projection: Projection) -> HeadWeights:
    gain = torch.tensor(projection.gain, dtype=torch.float64)
    zeros = torch.zeros_like(gain)
    offset = zeros if projection.offset is None else torch.tensor(projection.offset, dtype=torch.float64)
    if projection.activation is not None:
        return HeadWeights(torch.diag_embed(gain), offset, zeros)
    matrix, added = _affine(evaluator, projection)
    rows = torch.tensor(projection.rows)
    weight, bias = matrix[rows], added[rows]
    if projection.norm is None:
        return HeadWeights(weight * gain[..., None], bias * gain + offset, zeros)
    if projection.norm.kind == "layer":  # centring is linear
        groups = torch.tensor(projection.norm.groups)
        weight = weight - matrix[groups].mean(1, keepdim=True)
        bias = bias - added[groups].mean(1, keepdim=True)
    return HeadWeights(weight * gain[..., None], bias * gain, offset)


def _affine(evaluator: GraphEvaluator, projection: Projection) -> tuple[Tensor, Tensor]:
    """Matrix ``[outputs, width]`` and bias ``[outputs]`` of a projection node, however the product was written.

    Of projections in a row they are those of all together.
    """
    node = evaluator.nodes[projection.node]
    arguments: Any = node.args
    if node.target is _aten.einsum.default:
        matrix = _einsum_matrix(evaluator, projection)
    else:
        left = node.target in (_aten.matmul.default, _aten.mm.default) and _is_constant(evaluator, arguments[0])
        place = 0 if left else 2 if node.target is _aten.addmm.default else 1
        (weight,) = evaluator.run([arguments[place]], {}, {})
        matrix = weight if left or node.target is _aten.linear.default else weight.transpose(-1, -2)
        matrix = matrix.flatten(0, -2)  # of several heads
    added = matrix.new_zeros(len(matrix))
    if projection.bias is not None:
        (bias,) = evaluator.run([arguments[2] if node.target is _aten.linear.default else arguments[0]], {}, {})
        added = bias.reshape(-1)
    if projection.inner is None:
        return matrix, added
    inner = _read(evaluator, projection.inner)
    return matrix @ inner.weight[0], matrix @ inner.bias[0] + added


def _is_constant(evaluator: GraphEvaluator, node: Node) -> bool:
    """Whether a value is made of weights and constants alone."""
    return all(n.name in evaluator.constants for n in upstream([node]) if n.op == "placeholder")


def _einsum_matrix(evaluator: GraphEvaluator, projection: Projection) -> Tensor:
    """The weight of an einsum with the output's own letters first, in the output's order, then the summed one."""
    arguments: Any = evaluator.nodes[projection.node].args
    parts, output = einsum_parts(str(arguments[0]))
    own = 0 if arguments[1][1].name == projection.source else 1
    (weight,) = evaluator.run([arguments[1][own]], {}, {})
    letters = parts[own]
    kept = [c for c in output if c in letters]
    (summed,) = (c for c in letters if c not in output)
    return weight.permute([letters.index(c) for c in (*kept, summed)]).flatten(0, -2)
