"""An unconverted model as an ONNX file with an ordinary cache, for the converted one to be compared with.

The same rewrite as of a converted model (an explicit cache, positions from an input), with no layer converted, and the
same exporter; only attention is another function, in the form that is asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from mla_compile.errors import RefusedError
from mla_compile.passes.insert_latent import LatentGraph
from mla_compile.passes.lower_onnx import CacheForm, rewritten_to_onnx
from mla_compile.passes.onnx_export import save
from mla_compile.passes.onnx_nodes import name_function, node_variant
from mla_compile.passes.original_attention import (
    MICROSOFT,
    ORIGINAL_OPSET,
    OriginalForm,
    form_problem,
    original_function,
)
from mla_compile.passes.split_cache import split_caches
from mla_compile.runtime.onnx_cache import ROOM

__all__ = ["original_to_onnx", "write_original"]


def original_to_onnx(plain: LatentGraph) -> ir.Model:
    """Translate an unconverted model once, for :func:`write_original` to write in every form.

    Args:
        plain: From :func:`~mla_compile.passes.plain_caches.with_plain_caches`.
    """
    return rewritten_to_onnx(plain.module, plain.rows, opset=ORIGINAL_OPSET, caches=CacheForm(static=True))


def write_original(
    translated: ir.Model,
    path: Path,
    form: OriginalForm,
    *,
    metadata: Mapping[str, object],
    scales: Sequence[tuple[float, float]] = (),
) -> None:
    """Write an unconverted model as an ONNX file with caches that are written in place.

    Caches are ``past_key_values.{i}.key`` and ``.value``, ``[batch, heads, room, channels]``; tokens of all sequences
    are equally many, without padding.

    Args:
        translated: From :func:`original_to_onnx`; it is left as it is.
        path: The ``.onnx`` file.
        form: How layers attend.
        metadata: JSON-able facts stored in the file.
        scales: What a step of a key's and of a value's bytes is worth, per layer, for a form with bytes.

    Raises:
        RefusedError: A layer has no such form.
    """
    model = translated.clone()
    dtype = ir.DataType.INT8 if form == OriginalForm.GROUPED_INT8 else ir.DataType.FLOAT
    for layer, node in enumerate(split_caches(model, _sizes, dtype, (ROOM, ROOM))):
        variant = dataclasses.replace(node_variant(node), static=False)
        (_, qk_dim), (_, v_dim) = _sizes(node)
        problem = form_problem(form, variant, qk_dim, v_dim)
        if problem is not None:
            raise RefusedError(
                f"Attention layer {layer} has no form '{form}' in ONNX Runtime: {problem}.", "Take another form."
            )
        del node.attributes["static"]
        if form == OriginalForm.GROUPED_INT8:
            for name, scale in zip(("key_scale", "value_scale"), scales[layer], strict=True):
                node.attributes.add(ir.AttrFloat32(name, scale))
        name_function(model, node, original_function(form, variant))
    model.opset_imports[MICROSOFT] = 1
    save(model, path, metadata)


def _sizes(node: ir.Node) -> tuple[tuple[int, int], tuple[int, int]]:
    """Heads and channels of a layer's keys and values."""
    query, row = node.inputs[:2]
    assert query is not None
    assert row is not None
    assert query.shape is not None
    assert row.shape is not None
    heads, channels = node.attributes["kv_heads"].as_int(), int(query.shape[3])  # type: ignore[arg-type]
    return (heads, channels), (heads, int(row.shape[2]) // heads - channels)  # type: ignore[arg-type]
