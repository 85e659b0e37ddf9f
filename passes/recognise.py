"""Recognise every attention layer of a program: trace, probe, and believe nothing that was not verified."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from mla_compile.passes.evaluate import GraphEvaluator, example_inputs
from mla_compile.passes.probe import (
    SHORT,
    Operand,
    longest_length,
    probe_linear,
    probe_mask,
    probe_probabilities,
    probe_rope,
    probe_rows,
)
from mla_compile.passes.trace import (
    Anchor,
    DataFlow,
    MismatchError,
    ProjectionNode,
    find_anchors,
    module_path,
    read_projection,
)
from mla_compile.program import Program
from mla_compile.runtime.reference import attention as reference_attention
from mla_compile.site import AttentionSite, Projection, RejectCode, Rejection, Rope

__all__ = ["VERIFY_TOLERANCE", "Recognition", "recognise"]

_aten = torch.ops.aten
VERIFY_TOLERANCE = 1e-6
"""Relative error a description may have against its sub-graph. Both sides are float64; float32 rotation tables inside
the model are the only rounding left, and were observed below 3e-7."""
_VERIFY_LENGTH = 160
"""Longer of the two lengths a description is verified at."""
_RESHAPES = frozenset(
    {_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default, _aten.clone.default, _aten.alias.default}
)


@dataclass(frozen=True)
class Recognition:
    """What was found in a program, in graph order."""

    sites: tuple[AttentionSite, ...]
    rejections: tuple[Rejection, ...]


def recognise(program: Program) -> Recognition:
    """Find every attention layer and describe it, or say why it cannot be described.

    Args:
        program: The exported model; it is not changed.

    Returns:
        Sites whose description reproduced the sub-graph on random data, and rejections with codes and reasons.
    """
    flow = DataFlow(program)
    evaluator = GraphEvaluator(program)
    sites: list[AttentionSite] = []
    rejections: list[Rejection] = []
    for index, found in enumerate(find_anchors(flow, program)):
        node = found.softmax if isinstance(found, Anchor) else found[0]
        path = module_path(node, f"attention_{index}")
        try:
            if not isinstance(found, Anchor):
                raise found[1]
            sites.append(_describe(index, path, found, flow, evaluator))
        except MismatchError as mismatch:
            rejections.append(Rejection(index, path, mismatch.code, mismatch.reason))
        except (RuntimeError, IndexError) as error:  # a table inside the model is shorter than the shortest probe
            reason = f"the layer cannot be evaluated on {SHORT} tokens ({str(error).strip().splitlines()[0][:120]})"
            rejections.append(Rejection(index, path, RejectCode.LAYOUT, reason))
    return Recognition(tuple(sites), tuple(rejections))


def _describe(index: int, path: str, anchor: Anchor, flow: DataFlow, evaluator: GraphEvaluator) -> AttentionSite:
    generator = torch.Generator().manual_seed(index)
    roles = ("query", "key", "value")
    projections = {role: read_projection(flow, getattr(anchor, role), role) for role in roles}
    if len({_root(p.source) for p in projections.values()}) != 1:
        raise MismatchError(RejectCode.CROSS, "queries, keys and values are projected from different activations")
    if (reader := flow.reads_tokens(anchor.output, {p.node for p in projections.values()})) is not None:
        raise MismatchError(RejectCode.MASK, f"attention depends on which tokens were given, at '{reader.name}'")
    described: dict[str, Projection] = {}
    rotations: dict[str, Rope] = {}
    for role in roles:
        operand = Operand(evaluator, anchor, role, projections[role])
        probe_linear(operand, generator)
        rows, gain, offset = probe_rows(operand, generator)
        rotations[role] = probe_rope(operand, rows, gain)
        described[role] = _projection(projections[role], flow, operand.width, rows, gain, offset)
    if rotations["value"].pairs:
        raise MismatchError(RejectCode.ROPE, "values are rotated by position")
    rope = _common_rope(rotations["query"], rotations["key"])
    heads, dim = described["query"].heads, described["query"].head_dim
    key, value = _grouped(described["key"], heads), _grouped(described["value"], heads)
    if key.heads != value.heads:
        raise MismatchError(RejectCode.GROUPING, f"there are {key.heads} key heads but {value.heads} value heads")
    scale, mask = probe_mask(evaluator, flow, anchor, heads, dim)
    probe_probabilities(evaluator, anchor)
    if len(anchor.output.meta["val"].shape) != 4:
        raise MismatchError(RejectCode.LAYOUT, "the attention output is not arranged as [batch, heads, length, dim]")
    site = AttentionSite(
        index=index,
        path=path,
        query=described["query"],
        key=key,
        value=value,
        rope=rope,
        scale=scale,
        mask=mask,
        output=anchor.output.name,
        softmax=anchor.softmax.name,
        error=0.0,
    )
    long = longest_length(evaluator, lambda n: _verify(site, anchor, projections, evaluator, n), _VERIFY_LENGTH)
    error = max(_verify(site, anchor, projections, evaluator, length) for length in (SHORT, long))
    if not error < VERIFY_TOLERANCE:
        raise MismatchError(RejectCode.VERIFY, f"the recovered description is off by {error:.1e} on random inputs")
    return AttentionSite(**{**{f: getattr(site, f) for f in site.__slots__}, "error": error})


def _root(node: Node) -> Node:
    """The activation behind pure re-shapes."""
    while node.op == "call_function" and node.target in _RESHAPES:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _projection(
    found: ProjectionNode, flow: DataFlow, width: int, rows: Tensor, gain: Tensor, offset: Tensor
) -> Projection:
    """Describe a projection, refusing products whose weight is not simply ``[outputs, inputs]`` or its transpose."""
    node, weight = found.node, found.weight.meta["val"].shape
    if node.target not in (_aten.linear.default, _aten.matmul.default, _aten.mm.default, _aten.addmm.default):
        raise MismatchError(RejectCode.PROJECTION, f"projections by '{node.target}' are not read by this version")
    if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("beta", 1) != 1:
        raise MismatchError(RejectCode.PROJECTION, f"the product '{node.name}' has factors of its own")
    outputs = weight[0] if node.target is _aten.linear.default else weight[-1]
    if len(weight) != 2 or outputs != width:
        raise MismatchError(
            RejectCode.PROJECTION, f"the weight of '{node.name}' is {tuple(weight)}, not one matrix for all heads"
        )
    if found.bias is not None and (found.bias not in flow.static or found.bias.meta["val"].numel() != width):
        raise MismatchError(RejectCode.PROJECTION, f"what is added in '{node.name}' is not one bias per output")
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


def _common_rope(query: Rope, key: Rope) -> Rope:
    if query.pairs != key.pairs or any(
        abs(a - b) > 1e-6 * max(a, b) for a, b in zip(query.inv_freq, key.inv_freq, strict=True)
    ):
        raise MismatchError(RejectCode.ROPE, "queries and keys rotate differently")
    return query


def _grouped(projection: Projection, heads: int) -> Projection:
    """Reduce key or value heads repeated for grouped queries to the distinct ones.

    Raises:
        MismatchError: Query head ``h`` does not use head ``h // (heads / distinct)``.
    """
    distinct = list(dict.fromkeys(projection.rows))
    if heads % len(distinct):
        raise MismatchError(RejectCode.GROUPING, f"{heads} query heads over {len(distinct)} key/value heads")
    group = heads // len(distinct)
    if len(projection.rows) not in (heads, len(distinct)) or (
        len(projection.rows) == heads
        and any(distinct.index(rows) != h // group for h, rows in enumerate(projection.rows))
    ):
        raise MismatchError(RejectCode.GROUPING, "query heads are not grouped contiguously over key/value heads")
    first = [projection.rows.index(rows) for rows in distinct]
    return Projection(
        node=projection.node,
        source=projection.source,
        weight=projection.weight,
        bias=projection.bias,
        rows=tuple(projection.rows[i] for i in first),
        gain=tuple(projection.gain[i] for i in first),
        offset=None if projection.offset is None else tuple(projection.offset[i] for i in first),
    )


def _verify(
    site: AttentionSite,
    anchor: Anchor,
    projections: dict[str, ProjectionNode],
    evaluator: GraphEvaluator,
    length: int,
) -> float:
    """Compare the sub-graph with the description on fresh random projections; relative to the largest output."""
    batch, generator = 2, torch.Generator().manual_seed(1000 + site.index)
    overrides: dict[Node, Tensor] = {}
    raw: dict[str, Tensor] = {}
    drawn: dict[Node, Tensor] = {}
    for role, projection in projections.items():
        operand = Operand(evaluator, anchor, role, projection)
        if projection.node not in drawn:
            drawn[projection.node] = torch.randn(batch, length, operand.width, generator=generator, dtype=torch.float64)
            overrides[projection.node] = operand.place(drawn[projection.node])
        raw[role] = _read(getattr(site, role), drawn[projection.node])
    (got,) = evaluator.run([anchor.output], overrides, example_inputs(evaluator.program, batch, length))
    expected = reference_attention(
        raw["query"], raw["key"], raw["value"], site.rope.pairs, site.rope.inv_freq, site.scale, site.mask.window
    ).transpose(1, 2)
    if got.shape != expected.shape:
        raise MismatchError(RejectCode.LAYOUT, f"the attention output is arranged as {tuple(got.shape)}")
    return float((got - expected).abs().max() / expected.abs().max())


def _read(projection: Projection, outputs: Tensor) -> Tensor:
    """Projection outputs ``[B, S, N]`` to un-rotated heads ``[B, S, H, D]``, as the description says."""
    heads = outputs[..., torch.tensor(projection.rows)] * torch.tensor(projection.gain, dtype=torch.float64)
    return heads if projection.offset is None else heads + torch.tensor(projection.offset, dtype=torch.float64)
