"""Read queries, keys and values: their projections, which rows feed which channel, what normalises and turns them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from mla_compile.passes.einsum import einsum_parts
from mla_compile.passes.late import require_same_far
from mla_compile.passes.mismatch import MismatchError
from mla_compile.passes.norm import FoundNorm, describe_norm, linear_again, nodes_between
from mla_compile.passes.offset_rotation import OffsetRows, probe_offset_rows, with_phases
from mla_compile.passes.probe import Operand, mixes_positions, probe_linear, probe_rope, probe_rows
from mla_compile.passes.trace import DataFlow, ProjectionNode, projections_behind, read_projection, upstream
from mla_compile.passes.turned import Unscaled, as_read, gains_turn, scaled_by_place
from mla_compile.site import Norm, Projection, RejectCode, Rope

__all__ = [
    "MOVES",
    "ReadOperand",
    "norm_scale",
    "normalised",
    "projection_of",
    "read_operand",
    "read_query",
    "require_matrix",
    "root",
    "with_gains",
]

_aten = torch.ops.aten
_RESHAPES = frozenset(
    {_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default, _aten.clone.default, _aten.alias.default}
)


MOVES = _RESHAPES | {
    _aten.expand.default,
    _aten.unsqueeze.default,
    _aten.squeeze.dim,
    _aten.slice.Tensor,
    _aten.permute.default,
    _aten.transpose.int,
    _aten.repeat.default,
    _aten.repeat_interleave.self_int,
}
"""Operators that only move entries of their first argument, or repeat them."""
_NARROW = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class ReadOperand:
    """A described operand and its rotation; heads repeated for grouped queries are still repeated.

    Attributes:
        projection: The description.
        rope: The rotation; nothing for queries that are turned back, whose rotation is the keys'.
        behind: ``[heads][head_dim]`` gains of keys behind their rotation that do not commute with it, or None.
    """

    projection: Projection
    rope: Rope
    behind: tuple[tuple[float, ...], ...] | None = None


def read_operand(
    operand: Operand, flow: DataFlow, generator: torch.Generator, known: Rope | None = None
) -> ReadOperand:
    """Describe queries, keys or values.

    Args:
        operand: The operand; its base is not looked at.
        flow: Data flow of the graph.
        generator: Source of random probes.
        known: The rotation, if it is known from a layer of the same kind; it is not measured then.

    Raises:
        MismatchError: The operand is something other than a projection, normed, re-arranged and rotated.
    """
    try:
        found = read_projection(flow, operand.node, operand.role)
    except MismatchError as mismatch:
        if mixes_positions(operand, [p.node for p in projections_behind(flow, operand.node)]):
            reason = f"{mismatch.reason}, and at one position depends on other positions"
            raise MismatchError(RejectCode.POSITION_MIXING, reason) from mismatch
        raise
    operand = replace(operand, base=found.node)
    require_matrix(found, flow, operand)
    try:
        probe_linear(operand, generator)
    except MismatchError as mismatch:
        if mismatch.code != RejectCode.NONLINEAR:
            raise
        return _read_behind_norm(operand, found, flow, generator, known)
    if operand.role == "query" and scaled_by_place(operand, flow):
        raise MismatchError(RejectCode.ROPE, "the query is scaled by position")
    read = _rows(operand, generator)
    rope = _rotation(operand, read, flow, known)
    if known is None:
        require_same_far(operand, flow)
    return ReadOperand(projection_of(found, flow, read.rows, read.gain, read.offset), rope)


def _read_behind_norm(
    operand: Operand, found: ProjectionNode, flow: DataFlow, generator: torch.Generator, known: Rope | None
) -> ReadOperand:
    later, turned = linear_again(operand, flow, generator)
    if turned:
        return _read_norm_behind_rotation(operand, later, found, flow, generator, known)
    if operand.role == "query" and scaled_by_place(later, flow):
        raise MismatchError(RejectCode.ROPE, "the query is scaled by position")
    read = _rows(later, generator)
    rows, gain, offset = read.rows, read.gain, read.offset
    rope = _rotation(later, read, flow, known)
    if known is None:
        require_same_far(operand, flow)
    try:
        norm = describe_norm(operand, later, flow, generator)
    except MismatchError:
        if operand.role != "query":
            raise
        norm = None  # queries are not cached: whatever is done to them at their own position is done anew
    if operand.role == "query":
        projection = projection_of(found, flow, rows, gain, offset)
        described = None if norm is None else Norm(norm.kind, norm.groups(), norm.eps)
        return ReadOperand(replace(projection, norm=described, activation=later.base.name), rope)
    assert norm is not None
    total = gain * norm.gain[rows]
    shift = gain * norm.offset[rows] + offset
    projection = projection_of(found, flow, norm.rows[rows], total, shift)
    return ReadOperand(replace(projection, norm=_head_norm(norm, rows, operand.role)), rope)


def _read_norm_behind_rotation(
    operand: Operand,
    later: Operand,
    found: ProjectionNode,
    flow: DataFlow,
    generator: torch.Generator,
    known: Rope | None,
) -> ReadOperand:
    """Describe keys whose norm stands behind their rotation as keys with a norm in front of it."""
    reason = f"something non-linear stands behind the rotation of the {operand.role}"
    if operand.role != "key":
        raise MismatchError(RejectCode.NONLINEAR, reason)
    # At position 0 nothing is rotated: there, what stands behind the rotation is what would stand in front of it.
    entries, gain, offset = probe_rows(later, generator)
    try:
        norm = describe_norm(operand, later, flow, generator)
    except MismatchError as mismatch:
        raise MismatchError(
            RejectCode.NONLINEAR, f"{reason}: no RMS or L2 norm of channels that are at rest at position 0"
        ) from mismatch
    rows, total, shift = norm.rows[entries], gain * norm.gain[entries], gain * norm.offset[entries] + offset
    if norm.kind != "rms" or shift.any():
        raise MismatchError(RejectCode.NONLINEAR, f"{reason}: a norm that shifts channels")
    described = _head_norm(norm, entries, operand.role)
    unscaled = Unscaled(**vars(operand), norm=described, gain=total)
    try:
        probe_linear(unscaled, generator)
    except MismatchError as mismatch:
        raise MismatchError(RejectCode.NONLINEAR, f"{reason}: a norm that changes with position") from mismatch
    ones = torch.ones_like(total)
    rope = _rotation(unscaled, OffsetRows(rows, ones, torch.zeros_like(total), {}), flow, known)
    if known is None:
        require_same_far(operand, flow)
    commute = gains_turn(total, rope)
    projection = replace(
        projection_of(found, flow, rows, total if commute else ones, torch.zeros_like(total)), norm=described
    )
    return ReadOperand(projection, rope, None if commute else _tuples(total))


def read_query(
    operand: Operand, flow: DataFlow, generator: torch.Generator, known: Rope | None, turned: bool
) -> ReadOperand:
    """Describe queries by their projection, or else by what the attention product reads.

    Args:
        operand: The queries; their base is not looked at.
        flow: Data flow of the graph.
        generator: Source of random probes.
        known: The rotation, if it is known from a layer of the same kind.
        turned: Whether to look at what the product reads only.

    Raises:
        MismatchError: They mix positions, or are arranged in a way this version does not read.
    """
    if turned:
        return _read_turned(operand, flow, generator)
    try:
        return read_operand(operand, flow, generator, known)
    except MismatchError as mismatch:
        if mismatch.code == RejectCode.POSITION_MIXING:
            raise
        try:
            return _read_turned(operand, flow, generator)
        except MismatchError:
            raise mismatch from None


def _read_turned(operand: Operand, flow: DataFlow, generator: torch.Generator) -> ReadOperand:
    """Describe queries by what the attention product reads, whatever was done to them before.

    Raises:
        MismatchError: They are arranged in a way this version does not read.
    """
    read = as_read(operand, MOVES)
    rows, gain, offset = probe_rows(read, generator)
    if offset.any():
        raise MismatchError(RejectCode.ROW_MAP, "something is added to the query behind its rotation")
    name = read.base.name
    try:
        projections = [read_projection(flow, operand.node, operand.role)]
    except MismatchError:
        projections = []
    node, source, weight = name, name, f"<{name}>"
    for found in projections:
        node, source, weight = found.node.name, found.source.name, flow.parameter_name(found.weight)
    projection = Projection(
        node, source, weight, None, _tuples(rows), _tuples(torch.ones_like(gain)), activation=name, turned=_tuples(gain)
    )
    return ReadOperand(projection, Rope())


def with_gains(query: ReadOperand, gains: Sequence[Sequence[float]]) -> ReadOperand:
    """Multiply queries that are turned back by the gains their keys have behind the rotation, ``[key heads][D]``."""
    turned = query.projection.turned or ()
    group = len(turned) // len(gains)
    total = tuple(tuple(a * b for a, b in zip(head, gains[h // group], strict=True)) for h, head in enumerate(turned))
    return replace(query, projection=replace(query.projection, turned=total))


def _rows(operand: Operand, generator: torch.Generator) -> OffsetRows:
    """Find what feeds the channels at position 0, whether they are at rest there or turned already.

    Raises:
        MismatchError: They are no re-arrangement of projection outputs, turned in pairs or not.
    """
    try:
        return OffsetRows(*probe_rows(operand, generator), {})
    except MismatchError:
        found = probe_offset_rows(operand)
        if found is None:
            raise
        return found


def _rotation(operand: Operand, read: OffsetRows, flow: DataFlow, known: Rope | None) -> Rope:
    """Measure how channels rotate; where a rounded table is behind what is no rotation, that is the reason.

    Args:
        operand: Queries, keys or values.
        read: What feeds their channels.
        flow: Data flow of the graph.
        known: Pairs and frequencies, if they are known from a layer of the same kind.
    """
    if known is not None:
        return with_phases(known, read.phases, operand.role)
    try:
        return probe_rope(operand, read.rows, read.gain)
    except MismatchError as mismatch:
        between = nodes_between(operand, operand.node, flow)
        starts = [i for n in between if n is not operand.base for i in n.all_input_nodes if i not in flow.hidden]
        for node in upstream(starts, lambda n: n in flow.hidden):
            value = node.meta.get("val")
            if node.op == "placeholder" and isinstance(value, Tensor) and value.dim() > 1 and value.dtype in _NARROW:
                dtype = str(value.dtype).removeprefix("torch.")
                raise MismatchError(
                    RejectCode.ROPE,
                    f"the {operand.role} rotates by the table '{node.name}', which is rounded to {dtype}",
                ) from mismatch
        raise


def _head_norm(norm: FoundNorm, rows: Tensor, role: str) -> Norm:
    """The norm with one group per head, or one for all.

    Raises:
        MismatchError: A head's channels are normalised in several groups, or several heads share one of many groups.
    """
    groups = norm.groups()
    if len(groups) == 1:
        return Norm(norm.kind, groups, norm.eps)
    owner = torch.div(rows, norm.size, rounding_mode="floor")
    if (owner != owner[:, :1]).any():
        raise MismatchError(RejectCode.NONLINEAR, f"the channels of a {role} head are normalised in several groups")
    return Norm(norm.kind, tuple(groups[int(i)] for i in owner[:, 0]), norm.eps)


def root(node: Node) -> Node:
    """The activation behind pure re-shapes."""
    while node.op == "call_function" and node.target in _RESHAPES:
        node = node.args[0]  # type: ignore[assignment]
    return node


def require_matrix(found: ProjectionNode, flow: DataFlow, operand: Operand) -> None:
    """Refuse products whose weight is not one matrix from the activation's width to all outputs.

    A weight of more axes is one matrix per head, which side by side are one, where all heads read the same activation.

    Args:
        found: The product.
        flow: Data flow of the graph.
        operand: What is read of it, with the product as its base.

    Raises:
        MismatchError: It has another form.
    """
    node, weight, width = found.node, found.weight.meta["val"].shape, operand.width
    if node.target is _aten.einsum.default:
        _require_einsum(found, width)
        return
    if node.target not in (_aten.linear.default, _aten.matmul.default, _aten.mm.default, _aten.addmm.default):
        raise MismatchError(RejectCode.PROJECTION, f"projections by '{node.target}' are not read by this version")
    if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("beta", 1) != 1:
        raise MismatchError(RejectCode.PROJECTION, f"the product '{node.name}' has factors of its own")
    outputs = weight[0] if node.target is _aten.linear.default or found.left else weight[-1]
    per_head = len(weight) > 2 and node.target is _aten.matmul.default and not found.left
    if not (_is_one_of_heads(found, operand) if per_head else len(weight) == 2 and outputs == width):
        raise MismatchError(
            RejectCode.PROJECTION, f"the weight of '{node.name}' is {tuple(weight)}, not one matrix for all heads"
        )
    if found.bias is not None and (found.bias not in flow.static or found.bias.meta["val"].numel() != width):
        raise MismatchError(RejectCode.PROJECTION, f"what is added in '{node.name}' is not one bias per output")


def _is_one_of_heads(found: ProjectionNode, operand: Operand) -> bool:
    """Whether the axes of a product's entries per token are the weight's, in its order, and none is the source's."""
    shape = found.weight.meta["val"].shape
    own = [int(n) for n in (*shape[:-2], shape[-1]) if n != 1]
    return [n for n in operand.entries if n != 1] == own and replace(operand, base=found.source).width == shape[-2]


def _require_einsum(found: ProjectionNode, width: int) -> None:
    arguments: Any = found.node.args
    parts, output = einsum_parts(str(arguments[0]))
    if len(parts) == 2 and "." not in "".join(parts):
        hidden, weight = parts if arguments[1][0] is found.source else parts[::-1]
        summed = set(hidden) & set(weight)
        shape = dict(zip(weight, found.weight.meta["val"].shape, strict=True))
        own = [c for c in weight if c not in summed]
        if (
            len(summed) == 1
            and hidden[-1] in summed
            and not summed & set(output)
            and set(output) == (set(hidden) | set(weight)) - summed
            and math.prod(int(shape[c]) for c in own) == width
        ):
            return
    raise MismatchError(RejectCode.PROJECTION, f"the einsum '{arguments[0]}' of '{found.node.name}' is not one matrix")


def projection_of(found: ProjectionNode, flow: DataFlow, rows: Tensor, gain: Tensor, offset: Tensor) -> Projection:
    """A projection node by what is read of it: rows, gains and offsets ``[H, D]``."""
    return Projection(
        node=found.node.name,
        source=found.source.name,
        weight=flow.parameter_name(found.weight),
        bias=None if found.bias is None else flow.parameter_name(found.bias),
        rows=_tuples(rows),
        gain=_tuples(gain),
        offset=_tuples(offset) if offset.abs().max() > 1e-12 else None,
    )


def _tuples(values: Tensor) -> tuple[tuple[Any, ...], ...]:
    return tuple(tuple(row) for row in values.tolist())


def normalised(projection: Projection, outputs: Tensor) -> Tensor:
    """Heads ``[B, S, H, D]``, not rotated, from projection outputs ``[B, S, N]``, as the description says.

    For a projection with an ``activation``, ``outputs`` are that activation's entries; queries that are ``turned`` are
    still so.
    """
    heads = outputs[..., torch.tensor(projection.rows)]
    scale = norm_scale(projection, outputs)
    if scale is not None:
        assert projection.norm is not None
        heads = (heads - _centre(projection.norm, outputs)) * scale[..., None]
    heads = heads * torch.tensor(projection.turned or projection.gain, dtype=torch.float64)
    return heads if projection.offset is None else heads + torch.tensor(projection.offset, dtype=torch.float64)


def norm_scale(projection: Projection, outputs: Tensor) -> Tensor | None:
    """What a projection's norm multiplies its groups with: ``[B, S, groups]`` inverse norms from outputs ``[B, S, N]``.

    None where there is no norm between projection and heads, or an activation holds what stands behind it.
    """
    norm = projection.norm
    if norm is None or projection.activation is not None:
        return None
    groups = outputs[..., torch.tensor(norm.groups)] - _centre(norm, outputs)
    return (groups.square().mean(-1) + norm.eps).rsqrt()


def _centre(norm: Norm, outputs: Tensor) -> Tensor | float:
    """What a norm subtracts from its groups: their means ``[B, S, groups, 1]``, or nothing."""
    return outputs[..., torch.tensor(norm.groups)].mean(-1, keepdim=True) if norm.kind == "layer" else 0.0
