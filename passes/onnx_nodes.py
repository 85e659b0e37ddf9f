"""Our nodes in an ONNX model: what each has, the function it calls, and other caches than rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx
import onnx_ir as ir

from mla_compile.errors import RefusedError
from mla_compile.passes.split_cache import split_caches
from mla_compile.runtime.onnx_cache import BLOCKS, ROOM
from mla_compile.runtime.onnx_function import attention_function
from mla_compile.runtime.onnx_halves import half_width
from mla_compile.runtime.onnx_paged import BLOCK, MICROSOFT, paged_function, paged_problem
from mla_compile.runtime.onnx_variant import CACHED, DOMAIN, VERSION, Variant

__all__ = ["add_functions", "halve_caches", "name_function", "node_variant", "page_caches"]


def add_functions(model: ir.Model, opset: int) -> None:
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
        chunked="chunked" in node.attributes,
        coded_up="coded_up" in node.attributes,
    )


def name_function(model: ir.Model, node: ir.Node, function: onnx.FunctionProto) -> None:
    """Give a node of ours the function it calls."""
    made = ir.serde.deserialize_function(function)
    node.op_type = made.name
    model.functions.setdefault(made.identifier(), made)
    model.opset_imports[DOMAIN] = VERSION


def halve_caches(model: ir.Model, rows: Sequence[int], static: bool) -> None:
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


def page_caches(model: ir.Model, opset: int) -> None:
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
