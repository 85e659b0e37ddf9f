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
from mla_compile.passes.lower_onnx import exported_to_onnx, name_dimensions, save
from mla_compile.quiet import quiet_exporter
from mla_compile.runtime import ops
from mla_compile.runtime.onnx_function import DOMAIN, VERSION
from mla_compile.runtime.tensorrt.functions import APPEND, COMBINE, DECODE, PARTIAL, PLUGIN, function

__all__ = ["SPLITS", "lower_to_tensorrt_onnx"]

SPLITS = 16
"""Pieces that kernels cut a cache into: with 8 sequences of one block of rows they keep an H200's processors busy."""
_LATENT = torch.ops.mla.latent_attention.default
_CACHED = torch.ops.mla.cached_attention.default
_BATCH, _NEW, _ROOM = 2, 3, 11
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
    opset: int,
    metadata: Mapping[str, object],
    splits: int | None = SPLITS,
) -> None:
    """Write the rewritten graph as an ONNX file for TensorRT, which any other runtime runs too.

    Inputs are ``input_ids`` and ``position_ids`` ``[batch, new]``, ``lengths`` ``[batch]`` int32 (rows of every
    sequence, the new tokens' own among them) and caches ``[batch, room, row]``; a new token that would lie before its
    sequence's first row is padding. Outputs are ``logits`` and the caches with the new rows.

    Args:
        module: From :func:`~mla_compile.passes.insert_latent.insert_latent`.
        rows: Cache row length per layer.
        path: File to write; weights above 1.5 GB go to ``<path>.data``.
        opset: Standard operator set, 23 or later.
        metadata: JSON-able facts stored in the model's metadata under ``mla_compile``.
        splits: Pieces that kernels cut a cache into; None for nodes whose plugin chooses that itself.

    Raises:
        RefusedError: A layer is not converted, or has more than latents, rope keys and a window; or something other
            than attention reads the padding mask.
    """
    example = (
        torch.zeros(_BATCH, _NEW, dtype=torch.long),
        torch.full((_BATCH,), _NEW, dtype=torch.int32),
        torch.zeros(_BATCH, _NEW, dtype=torch.long),
        *(torch.zeros(_BATCH, _ROOM, row) for row in rows),
    )
    shapes = tuple(dict.fromkeys(range(min(2, x.dim())), Dim.AUTO) for x in example)
    with torch.no_grad(), quiet_exporter():
        exported = torch.export.export(_with_nodes(module, splits), example, dynamic_shapes=shapes, strict=False)
    layers = range(len(rows))
    inputs = ["input_ids", "lengths", "position_ids", *(f"past_key_values.{i}.latent" for i in layers)]
    outputs = ["logits", *(f"present.{i}.latent" for i in layers)]
    model = exported_to_onnx(exported, inputs, outputs, opset)
    batch, new, room = "batch_size", "sequence_length", "cache_length"
    name_dimensions(
        model, {**dict.fromkeys(("input_ids", "position_ids", "logits"), (batch, new)), "lengths": (batch,)}
    )
    name_dimensions(model, dict.fromkeys((*inputs[3:], *outputs[1:]), (batch, room)))
    _add_functions(model, opset)
    save(model, path, metadata)


def _add_functions(model: ir.Model, opset: int) -> None:
    """Add the functions that the nodes call."""
    called = {node.op_type for node in model.graph if node.domain == DOMAIN}
    for op_type in (x for x in (APPEND, PARTIAL, COMBINE, DECODE) if x in called):
        made = ir.serde.deserialize_function(function(op_type, opset))
        model.functions[made.identifier()] = made
    for node in model.graph:
        if node.op_type == PARTIAL:
            for value in node.outputs:
                value.shape = None  # how many splits there are is for the body or the plugin to say
    model.opset_imports[DOMAIN] = VERSION


def _with_nodes(module: fx.GraphModule, splits: int | None) -> fx.GraphModule:
    """Copy the graph with every call of our operator replaced by nodes for TensorRT; weights are shared."""
    replaced = copy.copy(module)
    replaced.graph = copy.deepcopy(module.graph)
    fold_numbers(module, replaced.graph)
    mask = [n for n in replaced.graph.nodes if n.op == "placeholder"][INPUT_NAMES.index("attention_mask")]
    if any(user.target not in (_LATENT, _CACHED) for user in mask.users):
        raise RefusedError(
            "Something other than attention reads the padding mask, for which a cache of fixed memory has no place.",
            _REMEDY,
        )
    for layer, node in enumerate(n for n in replaced.graph.nodes if n.target in (_LATENT, _CACHED)):
        if node.target is _CACHED:
            raise _refused(layer, "is not converted and keeps an ordinary cache")
        node.target = _attention
        node.kwargs = {**node.kwargs, "layer": layer, "splits": splits}
    replaced.recompile()
    return replaced


def _refused(layer: int, reason: str) -> RefusedError:
    return RefusedError(f"Layer {layer} {reason}, for which there is no TensorRT kernel yet.", _REMEDY)


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
    *_others: object,
    layer: int,
    splits: int | None,
) -> tuple[Tensor, Tensor]:
    """``mla::latent_attention`` with ``lengths`` for a mask and a cache ``[B, T, R]`` of fixed memory."""
    groups, rope_dim, rank = cos.shape[2], 2 * cos.shape[3], key_up.shape[2]
    features = {
        "attention sinks": sinks is not None,
        "slopes (ALiBi)": slopes is not None,
        "a soft-cap": softcap != 0,
        "scales of keys or values (QK-norm)": row.shape[2] != rank + groups * rope_dim,
    }
    for name, present in features.items():
        if present:
            raise _refused(layer, f"has {name}")
    batch, new, heads, head_dim = query.shape
    kept = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{APPEND}",
        (row, cos, sin, cache, lengths),
        {"latent_rank": rank, **PLUGIN},
        dtype=cache.dtype,
        shape=cache.shape,
        version=VERSION,
    )
    rotated, _ = ops.rotate_and_append(query, row, row[:, :0], cos, sin, rank)
    plain, rope_query = rotated.split([head_dim - rope_dim, rope_dim], -1)
    grouped = plain.unflatten(2, (key_up.shape[0], -1))
    latent_query = torch.einsum("bsghd,gdr->bsghr", grouped, key_up).flatten(2, 3)
    context_shape = batch, new, heads, rank
    shared: dict[str, int | float | str] = {"rope_groups": groups, "scale": scale, "window": window, **PLUGIN}
    if splits is None:
        context = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{DECODE}",
            (latent_query, rope_query, kept, lengths),
            {**shared},
            dtype=query.dtype,
            shape=context_shape,
            version=VERSION,
        )
        return _contracted(context, value_up), kept
    partial, lse = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{PARTIAL}",
        (latent_query, rope_query, kept, lengths),
        {**shared, "splits": splits},
        dtypes=(torch.float32, torch.float32),
        shapes=((batch, new, heads, splits, rank), (batch, new, heads, splits)),
        version=VERSION,
    )
    context = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{COMBINE}",
        (partial, lse),
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
