"""Lower a rewritten graph to ONNX: standard operators, and one ``LatentAttention`` node per layer with a body.

A layer that was not converted has a ``CachedAttention`` node instead.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import InlinePass
from onnxscript.version_converter import convert_version
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from mla_compile.errors import RefusedError
from mla_compile.mapped import Passing
from mla_compile.passes.emit import PER_HEAD
from mla_compile.passes.evaluate import example_inputs
from mla_compile.passes.fold import fold_numbers
from mla_compile.passes.insert_latent import ENCODER_MASK, INPUT_NAMES
from mla_compile.passes.layout import Sizes
from mla_compile.passes.onnx_translations import translations
from mla_compile.passes.quantise_cache import check_quantisable
from mla_compile.passes.retype import NARROW
from mla_compile.passes.split_cache import split_caches
from mla_compile.program import AnyProgram
from mla_compile.quiet import quiet_exporter
from mla_compile.runtime import ops
from mla_compile.runtime.module import cache_dtype, cache_windows
from mla_compile.runtime.onnx_cache import BLOCKS, PAST, PAST_SCALE, PRESENT, PRESENT_SCALE, ROOM, WINDOW
from mla_compile.runtime.onnx_checksum import CHECKSUM_KEY, weights_checksum
from mla_compile.runtime.onnx_function import CACHED, DOMAIN, LATENT, VERSION, Variant, attention_function
from mla_compile.runtime.onnx_halves import half_width
from mla_compile.runtime.onnx_paged import BLOCK, MICROSOFT, paged_function, paged_problem
from mla_compile.runtime.onnx_quantised import SCALES
from mla_compile.runtime.ops import kept_rows

__all__ = [
    "CROSS_NAME",
    "EXTERNAL_DATA_BYTES",
    "EncoderFace",
    "export_encoder",
    "export_rewritten",
    "exported_to_onnx",
    "lower_encoder_to_onnx",
    "lower_to_onnx",
    "name_dimensions",
    "name_function",
    "node_variant",
    "rewritten_to_onnx",
    "save",
    "with_float32_logits",
]

EXTERNAL_DATA_BYTES = 1_500_000_000
"""Weights above this go to a data file beside the model: a protobuf file cannot exceed 2 GB."""
METADATA_KEY = "mla_compile"
CROSS_NAME = "cross.{}.latent"
"""Rows of one cross attention layer: an output of the encoder's file and an input of the decoder's."""
_ENCODER_LENGTH = "encoder_sequence_length"
_EXPORTED = 23
"""The exporter fuses norms for this operator set only; a later one is made from its result."""
_BATCH, _NEW, _PAST, _ENCODED, _ROOM = 2, 3, 5, 7, 11


def export_rewritten(
    module: fx.GraphModule,
    rows: Sequence[int],
    dtype: torch.dtype | None = None,
    *,
    cross: Sequence[int] = (),
    masked: bool = False,
    static: bool = False,
    quantised: bool = False,
) -> ExportedProgram:
    """Export the rewritten graph with dynamic batch, new length and past length.

    Args:
        module: From :func:`~mla_compile.passes.insert_latent.insert_latent`.
        rows: Cache row length per layer.
        dtype: Type of the caches; read from the graph by default.
        cross: Row length per cross attention layer of a decoder.
        masked: Whether the decoder reads a padding mask over them.
        static: Whether the graph's caches have a size of their own.
        quantised: Whether they are codes, with scales as further inputs.

    Returns:
        The exported program; symbols and guards are torch's own.
    """
    ids, dtype = torch.zeros(_BATCH, _NEW, dtype=torch.long), dtype or cache_dtype(module)
    cached = _ROOM if static else _PAST
    example = (
        ids,
        torch.ones(_BATCH, _PAST + _NEW, dtype=torch.long),
        torch.arange(_PAST, _PAST + _NEW).expand(_BATCH, _NEW).contiguous(),
        *(torch.zeros(_BATCH, cached, row, dtype=torch.uint8 if quantised else dtype) for row in rows),
        *(torch.zeros(_BATCH, cached, SCALES, dtype=dtype) for _ in rows if quantised),
        *(torch.zeros(_BATCH, _ENCODED, row, dtype=dtype) for row in cross),
        *([torch.ones(_BATCH, _ENCODED, dtype=torch.long)] if masked else []),
    )
    shapes = tuple({0: Dim.AUTO, 1: Dim.AUTO} for _ in example)
    with torch.no_grad(), quiet_exporter():
        exported = torch.export.export(module, example, dynamic_shapes=shapes, strict=False)
    for node in exported.graph.nodes:
        node.meta.pop("from_node", None)  # it has addresses in memory, and would be stored
    return exported


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
    static: bool = False,
    quantised: bool = False,
    halves: bool = False,
    paged: bool = False,
) -> None:
    """Write the rewritten graph as an ONNX file.

    A growing cache goes in as ``[batch, past, row]`` and comes out as ``[batch, past + new, row]``. A static one has
    room for as many tokens as the caller likes, going in and coming out: bind one memory to both. Padding is told from
    tokens by ``attention_mask [batch, past + new]`` either way, and how many tokens there are by its length.

    A quantised cache is codes ``past_key_values.{i}.latent`` uint8 of the same shape, and two scales per token,
    ``past_key_values.{i}.scale [batch, past, 2]``, of the latent and of the rope keys.

    A cache in halves is ``past_key_values.{i}.key`` and ``.value``, ``[batch, 1, past, width]`` with one width for all
    layers, as programs expect that know of keys and values only.

    Args:
        module: The rewritten graph.
        rows: Cache row length per layer.
        path: File to write; weights above 1.5 GB go to ``<path>.data``.
        opset: Standard operator set, 23 or later; 24 or later for a static cache.
        inline: Replace every ``LatentAttention`` and ``CachedAttention`` node by its body.
        metadata: JSON-able facts stored in the model's metadata under ``mla_compile``.
        cross: Row length per cross attention layer of a decoder.
        masked: Whether the decoder reads a padding mask over them.
        static: Whether caches are static.
        quantised: Whether caches are quantised.
        halves: Whether caches are in halves.
        paged: Whether caches are blocks ``[blocks, 16, 1, row]`` in float16 or bfloat16, and attention an operator of
            ONNX Runtime's CUDA provider; every sequence has equally many blocks.

    Raises:
        RefusedError: There is no ONNX form of an operator, or no static or quantised cache, or cache in halves, for a
            layer.
    """
    if halves and cache_dtype(module) in NARROW:
        raise RefusedError(
            "A cache in halves is of a float32 model, and this one has half precision.",
            "Convert it with --dtype float32, or leave --cache-layout genai out.",
        )
    model = rewritten_to_onnx(module, rows, opset=opset, cross=cross, masked=masked, static=static, quantised=quantised)
    if halves:
        _halve(model, rows, static)
    if paged:
        _page(model, opset)
    else:
        _add_functions(model, opset)
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
    static: bool = False,
    quantised: bool = False,
) -> ir.Model:
    """Translate the rewritten graph to a model with one node of ours per layer, and no functions for them yet.

    Arguments and errors are those of :func:`lower_to_onnx`.
    """
    windows = cache_windows(module)
    if static and 1 in windows:
        raise RefusedError(
            f"Layer {windows.index(1)} sees one token only and caches nothing, which a static cache cannot be.",
            "Use a dynamic cache.",
        )
    if quantised:
        check_quantisable(module, rows)
    dtype = cache_dtype(module)
    if quantised and dtype in NARROW:
        name = str(dtype).removeprefix("torch.")
        raise RefusedError(
            f"An int8 cache is of a float32 model, and this one is {name}.",
            "Convert it with --dtype float32, or leave --cache-type int8 out.",
        )
    symbolic = _with_symbolic_nodes(module, static, quantised)
    if dtype in NARROW:
        with_float32_logits(symbolic)
    if dtype == torch.bfloat16:
        _without_narrow_einsums(symbolic)
    exported = export_rewritten(symbolic, rows, dtype, cross=cross, masked=masked, static=static, quantised=quantised)
    caches = [(PAST, PRESENT), *([(PAST_SCALE, PRESENT_SCALE)] if quantised else [])]
    pasts, presents = ([names[i].format(layer) for names in caches for layer in range(len(rows))] for i in (0, 1))
    batch, new, past, total = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"
    crossed = [CROSS_NAME.format(i) for i in range(len(cross))]
    inputs = [*INPUT_NAMES, *pasts, *crossed]
    inputs += [ENCODER_MASK] if masked else []
    model = exported_to_onnx(exported, inputs, ["logits", *presents], opset)
    name_dimensions(
        model, {**{"input_ids": (batch, new), "position_ids": (batch, new)}, "attention_mask": (batch, total)}
    )
    # The rows of a layer with a window stop growing in number, and have a dimension of their own.
    own = [f"{WINDOW}{w}" if w else "" for w in windows] * len(caches)
    before, after = (ROOM, ROOM) if static else (past, total)
    name_dimensions(model, {name: (batch, f"{before}{w}") for name, w in zip(pasts, own, strict=True)})
    name_dimensions(model, {name: (batch, f"{after}{w}") for name, w in zip(presents, own, strict=True)})
    name_dimensions(model, {"logits": (batch, new)})
    name_dimensions(model, dict.fromkeys([*crossed, ENCODER_MASK], (batch, _ENCODER_LENGTH)))
    return model


def _halve(model: ir.Model, rows: Sequence[int], static: bool) -> None:
    """Give every layer a cache in halves.

    Raises:
        RefusedError: A layer was not converted: its rows are keys and values.
    """
    plain = [node for node in model.graph if node.domain == DOMAIN and node.op_type == CACHED]
    if plain:
        raise RefusedError(
            f"{len(plain)} attention layers were not converted, and a cache in halves needs rows of one length.",
            "Leave --cache-layout genai out.",
        )
    size = (1, half_width(rows))
    tokens = (ROOM, ROOM) if static else ("past_sequence_length", "total_sequence_length")
    for node in split_caches(model, lambda _: (size, size), ir.DataType.FLOAT, tokens):
        node.attributes.add(ir.AttrInt64("halves", 1))


def _page(model: ir.Model, opset: int) -> None:
    """Give every layer a cache of blocks, and the operator that reads one.

    Raises:
        RefusedError: The operator does not compute what a layer does.
    """
    nodes = [node for node in model.graph if node.domain == DOMAIN]
    for layer, node in enumerate(nodes):
        variant = dataclasses.replace(node_variant(node), static=False)
        problem = "it was not converted" if node.op_type == CACHED else paged_problem(variant)
        if problem is not None:
            raise RefusedError(
                f"Attention layer {layer} has no form for the CUDA provider's PagedAttention: {problem}.",
                "Leave --target cuda out: standard operators run on CUDA too, with --provider cuda.",
            )
        past, present = node.inputs[2], node.outputs[1]
        assert past is not None
        assert past.shape is not None
        dtype = ir.DataType.FLOAT16 if past.dtype == ir.DataType.FLOAT else past.dtype
        assert dtype is not None
        for value in (past, present):
            value.type = ir.TensorType(dtype)
            value.shape = ir.Shape([BLOCKS, BLOCK, 1, past.shape[-1]])
        node.attributes.pop("static", None)
        name_function(model, node, paged_function(opset, variant))
    model.opset_imports[MICROSOFT] = 1


@dataclass(frozen=True)
class EncoderFace:
    """What a rewritten encoder takes and returns.

    Attributes:
        program: The original.
        sizes: Of one of its layers, which say what lengths there are.
        inputs: Names of its inputs, in order.
        outputs: Names of its outputs, in order, with their symbolic shapes.
    """

    program: AnyProgram
    sizes: Sizes
    inputs: tuple[str, ...]
    outputs: Mapping[str, Sequence[Any]]

    @classmethod
    def of(cls, program: AnyProgram, sizes: Sizes) -> EncoderFace:
        """Of a whole model."""
        nodes = {n.name: n for n in program.exported.graph.nodes}
        outputs = {name: tuple(nodes[node].meta["val"].shape) for name, node in program.outputs.items()}
        return cls(program, sizes, tuple(program.user_inputs), outputs)

    def dimensions(self, shape: Sequence[Any]) -> list[int | str]:
        """A symbolic shape in the words of users."""
        names = {str(s): "batch_size" for s in (*self.sizes.batches, self.sizes.batch)}
        names |= {str(self.sizes.length): "sequence_length"}
        names |= {str(self.sizes.keys): _ENCODER_LENGTH} if self.sizes.cross else {}
        return [d if isinstance(d, int) else names.get(str(d), f"size_{d}") for d in shape]


def export_encoder(module: nn.Module, face: EncoderFace) -> ExportedProgram:
    """Export a rewritten encoder, dynamic where the original is.

    Args:
        module: From :mod:`~mla_compile.passes.insert_low_rank`.
        face: Its inputs and outputs.
    """
    made = example_inputs(face.program, _BATCH, face.sizes.short, sizes=face.sizes)
    example = tuple(made[name] for name in face.inputs)
    given = [face.program.user_inputs[name][1] for name in face.inputs]
    shapes = tuple({i: Dim.AUTO for i, d in enumerate(value.shape) if not isinstance(d, int)} for value in given)
    with torch.no_grad(), quiet_exporter():
        return torch.export.export(module, example, dynamic_shapes=shapes, strict=False)


def lower_encoder_to_onnx(
    module: fx.GraphModule, face: EncoderFace, path: Path, *, opset: int, metadata: Mapping[str, object]
) -> None:
    """Write a rewritten encoder as an ONNX file of standard operators.

    A whole sequence attends to itself, so keys and values are made from the latent first: attending to the latent
    itself, as a node of ours would, pays only where few queries meet many keys.

    Args:
        module: The rewritten graph.
        face: Its inputs and outputs.
        path: File to write.
        opset: Standard operator set, 23 or later.
        metadata: JSON-able facts stored in the model's metadata under ``mla_compile``.
    """
    unfolded = copy.copy(module)
    unfolded.graph = copy.deepcopy(module.graph)
    for node in unfolded.graph.nodes:
        if node.target is torch.ops.mla.latent_attention.default:
            node.target = _unfolded_attention
    unfolded.recompile()
    model = exported_to_onnx(export_encoder(unfolded, face), face.inputs, list(face.outputs), opset)
    shapes = {name: face.program.user_inputs[name][1].shape for name in face.inputs} | dict(face.outputs)
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = ir.Shape(face.dimensions(shapes[value.name or ""]))
    save(model, path, metadata)


def _unfolded_attention(
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
    value_scales: int,
    causal: bool,
    scaled_rope: bool,
) -> tuple[Tensor, Tensor]:
    """``mla::latent_attention`` of a sequence to itself in standard operators."""
    query, present = ops.rotate_and_append(query, row, past, cos, sin, key_up.shape[2])
    mask = ops.open_keys(attention_mask, query.shape[1]).unsqueeze(1)
    up = (key_up, value_up, cos.shape[2])
    attended = ops.attend_unfolded(query, present, mask, *up, sinks, scale, softcap, value_scales, scaled_rope)
    return attended, present


def exported_to_onnx(exported: ExportedProgram, inputs: Sequence[str], outputs: Sequence[str], opset: int) -> ir.Model:
    """Translate an exported program; inputs and outputs get these names."""
    with _explained(), quiet_exporter():
        program = torch.onnx.export(
            exported,
            (),
            input_names=list(inputs),
            output_names=list(outputs),
            opset_version=_EXPORTED,
            custom_translation_table=dict(translations()),
            dynamo=True,
            verbose=False,
            optimize=True,
        )
    model: ir.Model = program.model  # type: ignore[union-attr]
    convert_version(model, opset)
    return model


def save(model: ir.Model, path: Path, metadata: Mapping[str, object]) -> None:
    """Complete a model with names and metadata, and write it; weights above 1.5 GB go to ``<path>.data``."""
    model.producer_name = "mla-compile"
    model.graph.name = "latent_attention_model"
    model.metadata_props[METADATA_KEY] = json.dumps(metadata, sort_keys=True)
    weights = sorted((name, v.const_value) for name, v in model.graph.initializers.items() if v.const_value is not None)
    passing = Passing()
    model.metadata_props[CHECKSUM_KEY] = weights_checksum((name, passing(weight).tobytes()) for name, weight in weights)
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    beside = f"{path.name}.data" if size > EXTERNAL_DATA_BYTES else None
    ir.save(model, path, external_data=beside, callback=passing.see)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Turn the exporter's report of a failure into a sentence that names the operator at fault."""
    try:
        yield
    except Exception as error:
        chain, current = [], error.__cause__ or error
        while current is not None:
            chain.append(str(current).strip())
            current = current.__cause__  # type: ignore[assignment]
        operators = [m[1] for text in chain if (m := re.search(r"op='([^']+)'", text))]
        reason = f"there is no ONNX form of '{operators[-1]}'" if operators else chain[-1].splitlines()[0][:200]
        raise RefusedError(
            f"The converted model cannot be lowered to ONNX: {reason}.",
            "Write the operation with others in the model, or keep the PyTorch module (a folder as --out).",
        ) from error


def _with_symbolic_nodes(module: fx.GraphModule, static: bool, quantised: bool) -> fx.GraphModule:
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


def with_float32_logits(module: fx.GraphModule) -> None:
    """Let a graph return its first output in float32, whatever it computes in: what samples tokens need not know it."""
    outputs = module.graph.output_node()
    results: Any = outputs.args[0]
    with module.graph.inserting_before(outputs):
        outputs.args = ((_converted(results[0], torch.float32), *results[1:]),)
    module.recompile()


def _without_narrow_einsums(module: fx.GraphModule) -> None:
    """Write ``Einsum``, which bfloat16 does not have in ONNX, otherwise: ours as a product, others in float32."""
    for node in [n for n in module.graph.nodes if n.target is torch.ops.aten.einsum.default]:
        equation, operands = node.args
        if equation == PER_HEAD:
            node.target, node.args = _per_head, tuple(operands)
            continue
        with module.graph.inserting_before(node):
            node.args = (equation, [_converted(operand, torch.float32) for operand in operands])
        with module.graph.inserting_after(node):
            rounded = _converted(node, torch.bfloat16)
        node.replace_all_uses_with(rounded, delete_user_cb=lambda user, own=rounded: user is not own)
    module.recompile()


def _per_head(heads: Tensor, matrices: Tensor) -> Tensor:
    """:data:`PER_HEAD` as one product of matrices per head."""
    products = heads.permute(2, 0, 1, 3) @ matrices.mT.unsqueeze(1)
    return products.permute(1, 2, 0, 3)


def _converted(node: fx.Node, dtype: torch.dtype) -> fx.Node:
    return node.graph.call_function(torch.ops.aten._to_copy.default, (node,), {"dtype": dtype})


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
        },
        sinks,
        slopes,
        window,
        softcap,
        value_up.shape[2],
        static,
        past_scale,
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
    *,
    static: bool,
) -> Sequence[Tensor]:
    return _symbolic_node(
        CACHED,
        (query, row, past, attention_mask),
        {"num_heads": query.shape[2], "kv_heads": kv_heads, "scale": scale},
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
) -> Sequence[Tensor]:
    """A node with the inputs and attributes of what it has: see :class:`Variant`."""
    query, row, past, *_ = inputs
    batch, new, heads, _ = query.shape
    kept = past.shape[1] if static else kept_rows(past.shape[1] + row.shape[1], window)
    optional = {"has_sinks": sinks, "has_slopes": slopes, "quantised": past_scale}
    flags = {name: 1 for name, value in optional.items() if value is not None} | ({"static": 1} if static else {})
    numbers = {name: value for name, value in (("softcap", softcap), ("window", window)) if value}
    cached = [(past.dtype, row.shape[2]), *([] if past_scale is None else [(past_scale.dtype, SCALES)])]
    return torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{op_type}",
        (*inputs, *(value for value in optional.values() if value is not None)),
        {**attributes, **numbers, **flags},
        dtypes=(query.dtype, *(dtype for dtype, _ in cached)),
        shapes=((batch, new, heads, v_dim), *((batch, kept, width) for _, width in cached)),
        version=VERSION,
    )


def _add_functions(model: ir.Model, opset: int) -> None:
    """Give every node of ours its variant's name, and the model the functions that its nodes call."""
    for node in [node for node in model.graph if node.domain == DOMAIN]:
        name_function(model, node, attention_function(node.op_type, opset, node_variant(node)))


def node_variant(node: ir.Node) -> Variant:
    """What a node of ours has."""
    return Variant(
        key_scales="key_scales" in node.attributes,
        softcap="softcap" in node.attributes,
        window="window" in node.attributes,
        sinks="has_sinks" in node.attributes,
        slopes="has_slopes" in node.attributes,
        value_scales="value_scales" in node.attributes,
        bidirectional="bidirectional" in node.attributes,
        scaled_rope="scaled_rope" in node.attributes,
        static="static" in node.attributes,
        quantised="quantised" in node.attributes,
        halves="halves" in node.attributes,
    )


def name_function(model: ir.Model, node: ir.Node, function: onnx.FunctionProto) -> None:
    """Give a node of ours the function it calls."""
    made = ir.serde.deserialize_function(function)
    node.op_type = made.name
    model.functions.setdefault(made.identifier(), made)
    model.opset_imports[DOMAIN] = VERSION


def name_dimensions(model: ir.Model, names: Mapping[str, tuple[str, ...]]) -> None:
    """Give the first two dimensions of inputs and outputs, or the only one, the names users know."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        dimensions = names.get(value.name or "")
        if dimensions is not None and value.shape is not None:
            value.shape = ir.Shape([*dimensions, *value.shape.dims[2:]])
