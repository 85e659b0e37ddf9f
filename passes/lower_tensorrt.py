"""Lower a rewritten graph to ONNX for TensorRT: caches of fixed memory and lengths, no growing caches and no mask.

Attention to a latent is nodes with standard operators around them: ``LatentAppend`` writes the new rows, and
``LatentAttentionPartial`` and ``LatentAttentionCombine``, or ``LatentAttentionDecode`` in place of both, attend
(:mod:`mla_compile.runtime.tensorrt.functions`).
Queries are rotated and folded with ``key_up`` before them, and contexts are multiplied with ``value_up`` behind them,
by operators that TensorRT has kernels for itself.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor, fx
from torch.export import Dim

from mla_compile.errors import RefusedError
from mla_compile.passes.fold import fold_numbers
from mla_compile.passes.insert_latent import INPUT_NAMES
from mla_compile.passes.narrow_onnx import with_float32_logits
from mla_compile.passes.onnx_export import exported_to_onnx, name_dimensions, save
from mla_compile.passes.retype import NARROW
from mla_compile.quiet import quiet_exporter
from mla_compile.runtime import ops  # noqa: F401 - registers the operators
from mla_compile.runtime.attention import rotate_and_append
from mla_compile.runtime.module import cache_dtype
from mla_compile.runtime.onnx_cache import PAST, PRESENT
from mla_compile.runtime.onnx_variant import DOMAIN, VERSION, Variant
from mla_compile.runtime.tensorrt.functions import APPEND, COMBINE, DECODE, OPSET, PARTIAL, PLUGIN, SPLITS, function

__all__ = ["lower_to_tensorrt_onnx"]

_LATENT = torch.ops.mla.latent_attention.default
_CACHED = torch.ops.mla.cached_attention.default
_SIZE = torch.ops.aten.sym_size.int
_BATCH, _NEW, _ROOM = 2, 3, 11
_ROOM_AXIS = 2
"""Of a cache."""
_FEATURES = ("key_scales", "value_scales", "scaled_rope", "softcap", "chunked")
"""Attributes of ``LatentAttentionPartial`` that are features where they are not 0."""
_REMEDY = "Give TensorRT the ordinary ONNX file."
_ONNX_TYPES = {
    torch.float32: int(ir.DataType.FLOAT),
    torch.float16: int(ir.DataType.FLOAT16),
    torch.bfloat16: int(ir.DataType.BFLOAT16),
}


def lower_to_tensorrt_onnx(
    module: fx.GraphModule,
    rows: Sequence[int],
    path: Path,
    *,
    room: int,
    metadata: Mapping[str, object],
    splits: int | None = SPLITS,
) -> None:
    """Write the rewritten graph as an ONNX file for TensorRT, which any other runtime runs too.

    Inputs are ``input_ids`` and ``position_ids`` ``[batch, new]``, ``lengths`` ``[batch]`` int32 (rows of every
    sequence, the new tokens' own among them) and caches ``[batch, 1, room, row]``; a new token that would lie before
    its sequence's first row is padding. Outputs are ``logits`` and the caches with the new rows.

    How many rows a cache has room for is a constant of the file: TensorRT writes in place only where it is.

    Args:
        module: From :func:`~mla_compile.passes.insert_latent.insert_latent`.
        rows: Cache row length per layer.
        path: File to write; weights above 1.5 GB go to ``<path>.data``.
        room: Rows that a cache has room for.
        metadata: JSON-able facts stored in the model's metadata under ``mla_compile``.
        splits: Pieces that kernels cut a cache into; None for nodes whose plugin chooses that itself.

    Raises:
        RefusedError: A layer is not converted, or something other than attention reads the padding mask.
    """
    example = (
        torch.zeros(_BATCH, _NEW, dtype=torch.long),
        torch.full((_BATCH,), _NEW, dtype=torch.int32),
        torch.zeros(_BATCH, _NEW, dtype=torch.long),
        *(torch.zeros(_BATCH, 1, _ROOM, row, dtype=cache_dtype(module)) for row in rows),
    )
    free = ((0, 1), (0,), (0, 1), *((0, 2) for _ in rows))
    shapes = tuple(dict.fromkeys(axes, Dim.AUTO) for axes in free)
    replaced = _with_nodes(module, splits)
    if cache_dtype(module) in NARROW:
        with_float32_logits(replaced)
    with torch.no_grad(), quiet_exporter():
        exported = torch.export.export(replaced, example, dynamic_shapes=shapes, strict=False)
    layers = range(len(rows))
    inputs = ["input_ids", "lengths", "position_ids", *(PAST.format(i) for i in layers)]
    outputs = ["logits", *(PRESENT.format(i) for i in layers)]
    model = exported_to_onnx(exported, inputs, outputs, OPSET)
    batch, new = "batch_size", "sequence_length"
    name_dimensions(
        model, {**dict.fromkeys(("input_ids", "position_ids", "logits"), (batch, new)), "lengths": (batch,)}
    )
    caches = dict(zip((*inputs[3:], *outputs[1:]), (*rows, *rows), strict=True))
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.name in caches:
            value.shape = ir.Shape([batch, 1, room, caches[value.name]])
    _add_functions(model)
    save(model, path, metadata)


def _add_functions(model: ir.Model) -> None:
    """Give every node of ours its variant's name, and the model the functions that its nodes call."""
    for node in model.graph:
        if node.domain != DOMAIN:
            continue
        if node.op_type == PARTIAL:
            for value in node.outputs:
                value.shape = None  # how many splits there are is for the body or the plugin to say
        own = {name: _has(node, name) for name in _FEATURES}
        variant = Variant(
            **own,
            slopes=_has(node, "has_slopes") or (node.op_type == PARTIAL and len(node.inputs) > 4),
            sinks=_has(node, "has_sinks") or (node.op_type == COMBINE and len(node.inputs) > 2),
        )
        made = ir.serde.deserialize_function(function(node.op_type, variant))
        node.op_type = made.name
        model.functions.setdefault(made.identifier(), made)
    model.opset_imports[DOMAIN] = VERSION


def _has(node: ir.Node, attribute: str) -> bool:
    """Whether a node has an attribute that is not 0."""
    return attribute in node.attributes and bool(node.attributes[attribute].value)


def _with_nodes(module: fx.GraphModule, splits: int | None) -> fx.GraphModule:
    """Copy the graph with every call of our operator replaced by nodes for TensorRT; weights are shared."""
    replaced = copy.copy(module)
    replaced.graph = copy.deepcopy(module.graph)
    fold_numbers(module, replaced.graph)
    inputs = [n for n in replaced.graph.nodes if n.op == "placeholder"]
    mask, cache = inputs[INPUT_NAMES.index("attention_mask")], inputs[len(INPUT_NAMES)]
    for size in [user for user in mask.users if user.target is _SIZE and user.args[1] == 1]:
        # How many tokens tables of positions are made for, of which none is beyond the room of a cache.
        size.args = cache, _ROOM_AXIS
    if any(user.target not in (_LATENT, _CACHED) for user in mask.users):
        raise RefusedError(
            "Something other than attention reads the padding mask, for which a cache of fixed memory has no place.",
            _REMEDY,
        )
    for layer, node in enumerate(n for n in replaced.graph.nodes if n.target in (_LATENT, _CACHED)):
        if node.target is _CACHED:
            raise RefusedError(
                f"Layer {layer} is not converted and keeps an ordinary cache, for which there is no kernel yet.",
                _REMEDY,
            )
        node.target = _attention
        node.kwargs = {**node.kwargs, "splits": splits}
    replaced.recompile()
    return replaced


def _attention(
    query: Tensor,
    row: Tensor,
    cache: Tensor,
    lengths: Tensor,
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
    splits: int | None,
) -> tuple[Tensor, Tensor]:
    """``mla::latent_attention`` with ``lengths`` for a mask and a cache ``[B, 1, T, R]`` of fixed memory."""
    groups, rope_dim, rank = cos.shape[2], 2 * cos.shape[3], key_up.shape[2]
    batch, new, heads, head_dim = query.shape
    kept = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{APPEND}",
        (row, cos, sin, cache, lengths),
        {"latent_rank": rank, **PLUGIN},
        dtype=cache.dtype,
        shape=cache.shape,
        version=VERSION,
    )
    rotated, _ = rotate_and_append(query, row, row[:, :0], cos, sin, rank)
    plain, rope_query = rotated.split([head_dim - rope_dim, rope_dim], -1)
    grouped = plain.unflatten(2, (key_up.shape[0], -1))
    latent_query = torch.einsum("bsghd,gdr->bsghr", grouped, key_up).flatten(2, 3)
    context_shape = batch, new, heads, rank
    settings: dict[str, int | float | str] = {
        "rope_groups": groups,
        "scale": scale,
        "softcap": softcap,
        "window": window,
        "chunked": int(chunked),
        "key_scales": row.shape[2] - rank - groups * rope_dim - value_scales,
        "value_scales": value_scales,
        "scaled_rope": int(scaled_rope),
        **PLUGIN,
    }
    inputs = (latent_query, rope_query, kept, lengths, *([] if slopes is None else [slopes.float()]))
    last = () if sinks is None else (sinks.float(),)
    if splits is None:
        context = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{DECODE}",
            (*inputs, *last),
            {**settings, "has_slopes": int(slopes is not None), "has_sinks": int(sinks is not None)},
            dtype=query.dtype,
            shape=context_shape,
            version=VERSION,
        )
        return _contracted(context, value_up), kept
    partial, lse = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{PARTIAL}",
        inputs,
        {**settings, "splits": splits},
        dtypes=(torch.float32, torch.float32),
        shapes=((batch, new, heads, splits, rank), (batch, new, heads, splits)),
        version=VERSION,
    )
    context = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{COMBINE}",
        (partial, lse, *last),
        {"to": _ONNX_TYPES[query.dtype], **PLUGIN},
        dtype=query.dtype,
        shape=context_shape,
        version=VERSION,
    )
    return _contracted(context, value_up), kept


def _contracted(context: Tensor, value_up: Tensor) -> Tensor:
    """Contexts ``[B, S, H, r]`` as values of the heads, ``[B, S, H, d]``."""
    attended = torch.einsum("bsghr,grd->bsghd", context.unflatten(2, (value_up.shape[0], -1)), value_up)
    return attended.flatten(2, 3)
