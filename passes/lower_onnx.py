"""Lower a rewritten graph to ONNX: standard operators, and one ``LatentAttention`` node per layer with a body.

A layer that was not converted has a ``CachedAttention`` node instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import InlinePass
from torch import fx
from torch.export import Dim, ExportedProgram

from mla_compile.errors import RefusedError
from mla_compile.passes.insert_latent import ENCODER_MASK, INPUT_NAMES
from mla_compile.passes.keep_logits import LOGITS_LENGTH, add_logits_to_keep
from mla_compile.passes.lower_encoder import ENCODER_LENGTH
from mla_compile.passes.narrow_onnx import with_float32_logits, without_narrow_einsums
from mla_compile.passes.onnx_export import exported_to_onnx, name_dimensions, save
from mla_compile.passes.onnx_nodes import add_functions, halve_caches, page_caches
from mla_compile.passes.quantise_cache import check_quantisable
from mla_compile.passes.retype import NARROW, type_name
from mla_compile.passes.symbolic_nodes import with_symbolic_nodes
from mla_compile.quiet import quiet_exporter
from mla_compile.runtime.module import cache_dtype, cache_windows
from mla_compile.runtime.onnx_cache import CROSS, PAST, PAST_SCALE, PRESENT, PRESENT_SCALE, ROOM, WINDOW
from mla_compile.runtime.onnx_quantised import SCALES
from mla_compile.runtime.onnx_variant import DOMAIN

__all__ = ["ROWS", "CacheForm", "export_rewritten", "lower_to_onnx", "rewritten_to_onnx"]

_BATCH, _NEW, _PAST, _ENCODED, _ROOM = 2, 3, 5, 7, 11


def export_rewritten(
    module: fx.GraphModule,
    rows: Sequence[int],
    dtype: torch.dtype | None = None,
    *,
    cross: Sequence[int] = (),
    masked: bool = False,
    static: bool = False,
    norms: Sequence[int] | None = None,
) -> ExportedProgram:
    """Export the rewritten graph with dynamic batch, new length and past length.

    Args:
        module: From :func:`~mla_compile.passes.insert_latent.insert_latent`.
        rows: Cache row length per layer.
        dtype: Type of the caches; read from the graph by default.
        cross: Row length per cross attention layer of a decoder.
        masked: Whether the decoder reads a padding mask over them.
        static: Whether the graph's caches have a size of their own.
        norms: How many inverse norms a row ends in, per layer, where caches are codes, with scales as further inputs.

    Returns:
        The exported program; symbols and guards are torch's own.
    """
    ids, dtype = torch.zeros(_BATCH, _NEW, dtype=torch.long), dtype or cache_dtype(module)
    cached = _ROOM if static else _PAST
    example = (
        ids,
        torch.ones(_BATCH, _PAST + _NEW, dtype=torch.long),
        torch.arange(_PAST, _PAST + _NEW).expand(_BATCH, _NEW).contiguous(),
        *_example_caches(rows, norms, cached, dtype),
        *(torch.zeros(_BATCH, _ENCODED, row, dtype=dtype) for row in cross),
        *([torch.ones(_BATCH, _ENCODED, dtype=torch.long)] if masked else []),
    )
    shapes = tuple({0: Dim.AUTO, 1: Dim.AUTO} for _ in example)
    with torch.no_grad(), quiet_exporter():
        exported = torch.export.export(module, example, dynamic_shapes=shapes, strict=False)
    for node in exported.graph.nodes:
        node.meta.pop("from_node", None)  # it has addresses in memory, and would be stored
    return exported


def _example_caches(
    rows: Sequence[int], norms: Sequence[int] | None, tokens: int, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Caches of rows, or of codes and behind them of their scales."""
    if norms is None:
        return [torch.zeros(_BATCH, tokens, row, dtype=dtype) for row in rows]
    codes = [torch.zeros(_BATCH, tokens, row - norm, dtype=torch.uint8) for row, norm in zip(rows, norms, strict=True)]
    return [*codes, *(torch.zeros(_BATCH, tokens, SCALES + norm, dtype=dtype) for norm in norms)]


@dataclass(frozen=True)
class CacheForm:
    """How a file has its caches; by default each as one tensor of rows that grows.

    A growing cache goes in as ``[batch, past, row]`` and comes out as ``[batch, past + new, row]``. Whatever
    the form, ``attention_mask [batch, past + new]`` tells padding from tokens, and its length how many there are.

    Attributes:
        static: Room for as many tokens as the caller likes, going in and coming out: bind one memory to both.
        quantised: Codes ``past_key_values.{i}.latent`` uint8 of latents and rope keys, and scales
            ``past_key_values.{i}.scale [batch, past, 2 + norms]``: two of a token's codes, and behind them the inverse
            norms that rows end in.
        halves: ``past_key_values.{i}.key`` and ``.value``, ``[batch, 1, past, width]`` with one width for all layers,
            as programs expect that know of keys and values only.
        paged: Static, in blocks ``[blocks, 16, 1, row]`` of float16 or bfloat16, of which every sequence has equally
            many; attention is an operator of ONNX Runtime's CUDA provider.
    """

    static: bool = False
    quantised: bool = False
    halves: bool = False
    paged: bool = False

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> CacheForm:
        """Read from the settings of a conversion."""
        layout = settings["cache_layout"]
        paged = layout == "paged"
        static, quantised = settings["cache"] == "static", settings["cache_type"] == "int8"
        return cls(paged or static, quantised, layout == "genai", paged)


ROWS = CacheForm()
"""The default."""


def lower_to_onnx(
    module: fx.GraphModule,
    rows: Sequence[int],
    path: Path,
    *,
    opset: int,
    inline: bool,
    metadata: Mapping[str, object],
    cross: Sequence[int] = (),
    masked: bool = False,
    caches: CacheForm = ROWS,
) -> None:
    """Write the rewritten graph as an ONNX file.

    Args:
        module: The rewritten graph.
        rows: Cache row length per layer.
        path: File to write; weights above 1.5 GB go to ``<path>.data``.
        opset: Standard operator set, 23 or later; 24 or later for a static cache.
        inline: Replace every ``LatentAttention`` and ``CachedAttention`` node by its body.
        metadata: JSON-able facts stored in the model's metadata under ``mla_compile``.
        cross: Row length per cross attention layer of a decoder.
        masked: Whether the decoder reads a padding mask over them.
        caches: How the file has its caches.

    Raises:
        RefusedError: There is no ONNX form of an operator, or a layer's cache has not that form.
    """
    if caches.halves and cache_dtype(module) in NARROW:
        raise RefusedError(
            "A cache in halves is of a float32 model, and this one has half precision.",
            "Convert it with --dtype float32, or leave --cache-layout genai out.",
        )
    model = rewritten_to_onnx(module, rows, opset=opset, cross=cross, masked=masked, caches=caches)
    if caches.halves:
        halve_caches(model, rows, caches.static)
    if caches.paged:
        page_caches(model, opset)
    else:
        add_functions(model, opset)
    if inline:
        InlinePass()(model)
        del model.opset_imports[DOMAIN]
    save(model, path, metadata)


def rewritten_to_onnx(
    module: fx.GraphModule,
    rows: Sequence[int],
    *,
    opset: int,
    cross: Sequence[int] = (),
    masked: bool = False,
    caches: CacheForm = ROWS,
) -> ir.Model:
    """Translate the rewritten graph to a model with one node of ours per layer, and no functions for them yet.

    Arguments and errors are those of :func:`lower_to_onnx`.
    """
    windows = cache_windows(module)
    if caches.static and 1 in windows:
        raise RefusedError(
            f"Layer {windows.index(1)} sees one token only and caches nothing, which a static cache cannot be.",
            "Use a dynamic cache.",
        )
    norms = check_quantisable(module, rows) if caches.quantised else None
    dtype = cache_dtype(module)
    if caches.quantised and dtype in NARROW:
        name = type_name(dtype)
        raise RefusedError(
            f"An int8 cache is of a float32 model, and this one is {name}.",
            "Convert it with --dtype float32, or leave --cache-type int8 out.",
        )
    symbolic = with_symbolic_nodes(module, caches.static, caches.quantised)
    if dtype in NARROW:
        with_float32_logits(symbolic)
    if dtype == torch.bfloat16:
        without_narrow_einsums(symbolic)
    exported = export_rewritten(symbolic, rows, dtype, cross=cross, masked=masked, static=caches.static, norms=norms)
    pairs = [(PAST, PRESENT), *([(PAST_SCALE, PRESENT_SCALE)] if caches.quantised else [])]
    pasts, presents = ([names[i].format(layer) for names in pairs for layer in range(len(rows))] for i in (0, 1))
    batch, new, past, total = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"
    crossed = [CROSS.format(i) for i in range(len(cross))]
    inputs = [*INPUT_NAMES, *pasts, *crossed]
    inputs += [ENCODER_MASK] if masked else []
    model = exported_to_onnx(exported, inputs, ["logits", *presents], opset)
    name_dimensions(
        model, {**{"input_ids": (batch, new), "position_ids": (batch, new)}, "attention_mask": (batch, total)}
    )
    # The rows of a layer with a window stop growing in number, and have a dimension of their own.
    own = [f"{WINDOW}{w}" if w else "" for w in windows] * len(pairs)
    before, after = (ROOM, ROOM) if caches.static else (past, total)
    name_dimensions(model, {name: (batch, f"{before}{w}") for name, w in zip(pasts, own, strict=True)})
    name_dimensions(model, {name: (batch, f"{after}{w}") for name, w in zip(presents, own, strict=True)})
    kept = add_logits_to_keep(model)
    name_dimensions(model, {"logits": (batch, LOGITS_LENGTH if kept else new)})
    name_dimensions(model, dict.fromkeys([*crossed, ENCODER_MASK], (batch, ENCODER_LENGTH)))
    return model
