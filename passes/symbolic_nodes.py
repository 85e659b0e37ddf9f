"""Calls of our operators become symbolic ONNX nodes, before torch's exporter sees the graph."""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from mla_compile.passes.fold import fold_numbers
from mla_compile.runtime.masks import kept_rows
from mla_compile.runtime.onnx_quantised import SCALES
from mla_compile.runtime.onnx_variant import CACHED, DOMAIN, LATENT, VERSION

__all__ = ["with_symbolic_nodes"]


def with_symbolic_nodes(module: fx.GraphModule, static: bool, quantised: bool) -> fx.GraphModule:
    """Copy the graph with every call of our operators replaced by a symbolic ONNX node; weights are shared.

    Scales of a quantised cache become further inputs, behind all others, and outputs.
    """
    replaced = copy.copy(module)
    replaced.graph = copy.deepcopy(module.graph)
    fold_numbers(module, replaced.graph)
    for node in replaced.graph.nodes:
        symbolic = _SYMBOLIC.get(node.target)
        if symbolic is not None:
            node.target, node.kwargs = symbolic, {**node.kwargs, "static": static}
    if quantised:
        _add_scales(replaced.graph)
    replaced.recompile()
    return replaced


def _add_scales(graph: fx.Graph) -> None:
    """Give every latent node the scales of its cache, in the order of the caches."""
    caches = [node for node in graph.nodes if node.op == "placeholder"]
    nodes = [node for node in graph.nodes if node.target is _symbolic_latent_attention]
    last, outputs = caches[-1], graph.output_node()
    scales = []
    for node in sorted(nodes, key=lambda node: caches.index(node.args[2])):
        with graph.inserting_after(last):
            last = graph.placeholder(f"{node.args[2].name}_scale")
        node.kwargs = {**node.kwargs, "past_scale": last}
        with graph.inserting_before(outputs):
            scales.append(graph.call_function(operator.getitem, (node, 2)))
    results: Any = outputs.args[0]
    outputs.args = ((*results, *scales),)


def _symbolic_latent_attention(
    query: Tensor,
    row: Tensor,
    past: Tensor,
    attention_mask: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_up: Tensor,
    value_up: Tensor,
    sinks: Tensor | None,
    slopes: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    value_scales: int = 0,
    causal: bool = True,
    scaled_rope: bool = False,
    chunked: bool = False,
    *,
    static: bool,
    past_scale: Tensor | None = None,
) -> Sequence[Tensor]:
    groups, rope_dim, rank = cos.shape[2], 2 * cos.shape[3], key_up.shape[2]
    key_scales = row.shape[2] - rank - groups * rope_dim - value_scales
    return _symbolic_node(
        LATENT,
        (query, row, past, attention_mask, cos, sin, key_up, value_up),
        {
            "num_heads": query.shape[2],
            "rope_groups": groups,
            "rope_dim": rope_dim,
            "latent_rank": rank,
            "scale": scale,
            **({"key_scales": key_scales} if key_scales else {}),
            **({"value_scales": value_scales} if value_scales else {}),
            **({} if causal else {"bidirectional": 1}),
            **({"scaled_rope": 1} if scaled_rope else {}),
            **({"chunked": 1} if chunked else {}),
        },
        sinks,
        slopes,
        window,
        softcap,
        value_up.shape[2],
        static,
        past_scale,
        key_scales + value_scales,
    )


def _symbolic_cached_attention(
    query: Tensor,
    row: Tensor,
    past: Tensor,
    attention_mask: Tensor,
    sinks: Tensor | None,
    slopes: Tensor | None,
    kv_heads: int,
    scale: float,
    window: int,
    softcap: float,
    chunked: bool = False,
    *,
    static: bool,
) -> Sequence[Tensor]:
    return _symbolic_node(
        CACHED,
        (query, row, past, attention_mask),
        {
            "num_heads": query.shape[2],
            "kv_heads": kv_heads,
            "scale": scale,
            **({"chunked": 1} if chunked else {}),
        },
        sinks,
        slopes,
        window,
        softcap,
        row.shape[2] // kv_heads - query.shape[3],
        static,
    )


_SYMBOLIC = {
    torch.ops.mla.latent_attention.default: _symbolic_latent_attention,
    torch.ops.mla.cached_attention.default: _symbolic_cached_attention,
}


def _symbolic_node(
    op_type: str,
    inputs: tuple[Tensor, ...],
    attributes: Mapping[str, int | float],
    sinks: Tensor | None,
    slopes: Tensor | None,
    window: int,
    softcap: float,
    v_dim: int,
    static: bool,
    past_scale: Tensor | None = None,
    norms: int = 0,
) -> Sequence[Tensor]:
    """A node with the inputs and attributes of what it has: see :class:`~mla_compile.runtime.onnx_variant.Variant`."""
    query, row, past, *_ = inputs
    batch, new, heads, _ = query.shape
    kept = past.shape[1] if static else kept_rows(past.shape[1] + row.shape[1], window)
    optional = {"has_sinks": sinks, "has_slopes": slopes, "quantised": past_scale}
    flags = {name: 1 for name, value in optional.items() if value is not None} | ({"static": 1} if static else {})
    numbers = {name: value for name, value in (("softcap", softcap), ("window", window)) if value}
    cached = [(past.dtype, row.shape[2])]
    if past_scale is not None:
        cached = [(past.dtype, row.shape[2] - norms), (past_scale.dtype, SCALES + norms)]
    return torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{op_type}",
        (*inputs, *(value for value in optional.values() if value is not None)),
        {**attributes, **numbers, **flags},
        dtypes=(query.dtype, *(dtype for dtype, _ in cached)),
        shapes=((batch, new, heads, v_dim), *((batch, kept, width) for _, width in cached)),
        version=VERSION,
    )
