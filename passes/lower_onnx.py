"""Lower a rewritten graph to ONNX: standard operators, and one ``LatentAttention`` node per layer with a body."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir
import torch
from onnx_ir.passes.common import InlinePass
from torch import Tensor, fx
from torch.export import Dim, ExportedProgram

from mla_compile.passes.insert_latent import INPUT_NAMES
from mla_compile.quiet import quiet_exporter
from mla_compile.runtime.onnx_function import DOMAIN, OP_TYPE, VERSION, latent_attention_function

__all__ = ["EXTERNAL_DATA_BYTES", "export_rewritten", "lower_to_onnx"]

EXTERNAL_DATA_BYTES = 1_500_000_000
"""Weights above this go to a data file beside the model: a protobuf file cannot exceed 2 GB."""
METADATA_KEY = "mla_compile"
_BATCH, _NEW, _PAST = 2, 3, 5


def export_rewritten(
    module: fx.GraphModule, rows: Sequence[int], dtype: torch.dtype = torch.float32
) -> ExportedProgram:
    """Export the rewritten graph with dynamic batch, new length and past length.

    Args:
        module: From :func:`~mla_compile.passes.insert_latent.insert_latent`.
        rows: Cache row length per layer.
        dtype: Type of the caches.

    Returns:
        The exported program; symbols and guards are torch's own.
    """
    ids = torch.zeros(_BATCH, _NEW, dtype=torch.long)
    example = (
        ids,
        torch.ones(_BATCH, _PAST + _NEW, dtype=torch.long),
        torch.arange(_PAST, _PAST + _NEW).expand(_BATCH, _NEW).contiguous(),
        *(torch.zeros(_BATCH, _PAST, row, dtype=dtype) for row in rows),
    )
    shapes = tuple({0: Dim.AUTO, 1: Dim.AUTO} for _ in example)
    with torch.no_grad(), quiet_exporter():
        return torch.export.export(module, example, dynamic_shapes=shapes, strict=False)


def lower_to_onnx(
    module: fx.GraphModule,
    rows: Sequence[int],
    path: Path,
    *,
    opset: int,
    inline: bool,
    metadata: Mapping[str, object],
) -> None:
    """Write the rewritten graph as an ONNX file.

    Args:
        module: The rewritten graph.
        rows: Cache row length per layer.
        path: File to write; weights above 1.5 GB go to ``<path>.data``.
        opset: Standard operator set, 23 or later.
        inline: Replace every ``LatentAttention`` node by its body.
        metadata: JSON-able facts stored in the model's metadata under ``mla_compile``.
    """
    exported = export_rewritten(_with_symbolic_nodes(module), rows)
    layers = len(rows)
    batch, new, past, total = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"
    with quiet_exporter():
        program = torch.onnx.export(
            exported,
            (),
            input_names=[*INPUT_NAMES, *(f"past_key_values.{i}.latent" for i in range(layers))],
            output_names=["logits", *(f"present.{i}.latent" for i in range(layers))],
            opset_version=opset,
            dynamo=True,
            verbose=False,
            optimize=True,
        )
    model = program.model  # type: ignore[union-attr]
    _name_dimensions(
        model, {**{"input_ids": (batch, new), "position_ids": (batch, new)}, "attention_mask": (batch, total)}
    )
    _name_dimensions(model, {f"past_key_values.{i}.latent": (batch, past) for i in range(layers)})
    _name_dimensions(model, {"logits": (batch, new)} | {f"present.{i}.latent": (batch, total) for i in range(layers)})
    function = ir.serde.deserialize_function(latent_attention_function(opset))
    model.functions[function.identifier()] = function
    model.opset_imports[DOMAIN] = VERSION
    if inline:
        InlinePass()(model)
        del model.opset_imports[DOMAIN]
    model.producer_name = "mla-compile"
    model.graph.name = "latent_attention_model"
    model.metadata_props[METADATA_KEY] = json.dumps(metadata, sort_keys=True)
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    ir.save(model, path, external_data=f"{path.name}.data" if size > EXTERNAL_DATA_BYTES else None)


def _with_symbolic_nodes(module: fx.GraphModule) -> fx.GraphModule:
    """Copy the graph with every latent-attention call replaced by a symbolic ONNX node; weights are shared."""
    replaced = copy.copy(module)
    replaced.graph = copy.deepcopy(module.graph)
    for node in replaced.graph.nodes:
        if node.target is torch.ops.mla.latent_attention.default:
            node.target = _symbolic_latent_attention
    replaced.recompile()
    return replaced


def _symbolic_latent_attention(
    query: Tensor,
    row: Tensor,
    past: Tensor,
    attention_mask: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_up: Tensor,
    value_up: Tensor,
    scale: float,
    window: int,
) -> Sequence[Tensor]:
    batch, new, heads, _ = query.shape
    return torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{OP_TYPE}",
        (query, row, past, attention_mask, cos, sin, key_up, value_up),
        {
            "num_heads": heads,
            "rope_groups": cos.shape[2],
            "rope_dim": 2 * cos.shape[3],
            "latent_rank": key_up.shape[2],
            "scale": scale,
            "window": window,
        },
        dtypes=(query.dtype, row.dtype),
        shapes=((batch, new, heads, value_up.shape[2]), (batch, past.shape[1] + new, row.shape[2])),
        version=VERSION,
    )


def _name_dimensions(model: ir.Model, names: Mapping[str, tuple[str, str]]) -> None:
    """Give inputs and outputs the dimension names users know."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        dimensions = names.get(value.name or "")
        if dimensions is not None and value.shape is not None:
            value.shape = ir.Shape([*dimensions, *value.shape.dims[2:]])
