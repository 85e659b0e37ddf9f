"""Kernels as TensorRT launches them, interpreted on the CPU, against the bodies of their nodes in ONNX Runtime."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper

from mla_compile.runtime.kernels.cache import RowLayout
from mla_compile.runtime.kernels.decode import combine_kernel
from mla_compile.runtime.kernels.schedule import combine_constants
from mla_compile.runtime.onnx_variant import DOMAIN, VERSION, Variant
from mla_compile.runtime.tensorrt.cubins import Decode
from mla_compile.runtime.tensorrt.entries import append_entry, combine_entry, decode_entry, partial_entry
from mla_compile.runtime.tensorrt.functions import APPEND, COMBINE, DECODE, OPSET, PARTIAL, PLUGIN, function
from mla_compile.runtime.tensorrt.kernels import Append, Combine, Partial

ROOM, SPLITS = 90, 3
# Sums of some hundred float32 products in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def body(nodes, inputs, outputs):
    """Run nodes of ``(operator, variant, inputs, outputs, attributes)`` by their bodies."""

    def value(name, x):
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(x.numpy().dtype), list(x.shape))

    made = [helper.make_node(v.named(op), i, o, domain=DOMAIN, **own, **PLUGIN) for op, v, i, o, own in nodes]
    results = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph(made, "nodes", [value(n, x) for n, x in inputs.items()], results)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    functions = [function(op, variant) for op, variant, *_ in nodes]
    model = helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    fed = {name: x.numpy() for name, x in inputs.items()}
    return [torch.from_numpy(np.asarray(y)) for y in session.run(list(outputs), fed)]


def numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


ROWS = RowLayout(48, 3, 8)


@pytest.mark.parametrize(
    ("partial", "new", "sinks"),
    [
        (Partial(ROWS, 9, 1, "fp32", 0.3, SPLITS), 1, False),
        (Partial(ROWS, 9, 0, "fp32", 0.3, SPLITS), 4, False),  # a length that was not known, and one token too
        (Partial(ROWS, 9, 0, "fp32", 0.3, SPLITS), 1, False),
        (Partial(RowLayout(64, 1, 16), 4, 0, "fp32", 0.2, SPLITS, window=20), 3, False),
        (Partial(RowLayout(32), 2, 1, "fp32", 0.2, SPLITS), 1, True),
        (Partial(ROWS, 9, 0, "fp32", 0.3, SPLITS, softcap=2.0, slopes=True), 3, True),
        (Partial(RowLayout(48, 3, 8, 3, 9), 9, 0, "fp32", 0.3, SPLITS), 2, False),
        (Partial(RowLayout(32, 1, 8, 2, scaled_rope=True), 4, 0, "fp32", 0.3, SPLITS, window=9, slopes=True), 2, True),
        (Partial(RowLayout(64, 1, 16), 4, 0, "fp32", 0.2, SPLITS, window=30, chunked=True), 5, False),
        (Partial(RowLayout(64, 1, 16), 4, 1, "fp32", 0.2, SPLITS, window=32, chunked=True), 1, False),
        (Partial(ROWS, 9, 0, "fp32", 0.3, SPLITS, window=2, softcap=2.0, slopes=True, chunked=True), 7, True),
    ],
    ids=[
        "one token",
        "some tokens",
        "one of any number",
        "window",
        "no rope, sinks",
        "softcap, slopes, sinks",
        "scales",
        "scaled rope, window, slopes, sinks",
        "chunks",
        "chunks, one token",
        "softcap, slopes, sinks, chunks",
    ],
)
def test_attention_in_two_parts(partial, new, sinks):
    lengths = torch.tensor([ROOM, 33, 2, 0], dtype=torch.int32)  # more tokens than rows: the first ones are padding
    layout, batch, heads = partial.layout, len(lengths), partial.heads
    rows = numbers(batch, 1, ROOM, layout.rank + layout.rest_width)
    inputs = {
        "q_latent": numbers(batch, new, heads, layout.rank),
        "q_rope": numbers(batch, new, heads, layout.rope_dim),
    }
    inputs |= {"rows": rows, "lengths": lengths} | ({"slopes": numbers(heads).abs() / 8} if partial.slopes else {})
    sink = {"sinks": numbers(heads)} if sinks else {}
    settings = {
        "rope_groups": layout.rope_groups,
        "scale": partial.scale,
        "softcap": partial.softcap,
        "window": partial.window,
        "chunked": int(partial.chunked),
        "key_scales": layout.key_scales,
        "value_scales": layout.value_scales,
        "scaled_rope": int(layout.scaled_rope),
        "splits": SPLITS,
    }
    variant = Variant(
        key_scales=layout.key_scales > 0,
        value_scales=layout.value_scales > 0,
        scaled_rope=layout.scaled_rope,
        softcap=partial.softcap > 0,
        slopes=partial.slopes,
        chunked=partial.chunked,
    )
    nodes = [
        (PARTIAL, variant, [*inputs], ["partial", "lse"], settings),
        (COMBINE, Variant(sinks=sinks), ["partial", "lse", *sink], ["context"], {"to": onnx.TensorProto.FLOAT}),
    ]
    (expected,) = body(nodes, inputs | sink, ["context"])

    unread = torch.arange(ROOM) >= lengths[:, None]
    rows = rows.masked_fill(unread[:, None, :, None], torch.nan)
    tiles = partial.tactics(90)[-1]
    shape = batch, new, heads, SPLITS
    parts, lse = torch.full((*shape, layout.rank), torch.nan), torch.empty(shape)
    partial_entry[-(-new * heads // tiles.rows), SPLITS, batch](
        inputs["q_latent"],
        inputs["q_rope"],
        rows,
        lengths,
        inputs.get("slopes"),
        ROOM,
        new,
        heads,
        parts,
        lse,
        **partial.constants(tiles) | {"LEAST_TILES": 1},
    )
    combine, context = Combine(layout.rank, SPLITS, "fp32", sinks), torch.empty(batch, new, heads, layout.rank)
    grid = batch * new * heads, combine.blocks_per_row
    combine_entry[grid](parts, lse, sink.get("sinks"), heads, context, **combine.constants)
    torch.testing.assert_close(context, expected, **CLOSE)
    assert bool(context.any(-1).any(-1)[:2].all())


@pytest.mark.parametrize(
    ("decode", "new", "window", "splits"),
    [
        (Decode(ROWS, 9, "fp32"), 1, 0, 1),
        (Decode(ROWS, 9, "fp32", sinks=True), 3, 0, 1),
        (Decode(ROWS, 9, "fp32", capped=True, slopes=True, sinks=True), 3, 0, 3),
        (Decode(RowLayout(32, 1, 8, 2, 4, scaled_rope=True), 4, "fp32", windowed=True, sinks=True), 2, 20, 2),
        (Decode(ROWS, 9, "fp32", windowed=True, chunked=True), 5, 30, 1),
        (Decode(ROWS, 9, "fp32", windowed=True, slopes=True, sinks=True, chunked=True), 1, 24, 3),
    ],
    ids=[
        "one split",
        "sinks in one split",
        "softcap, slopes, sinks",
        "scales, window, sinks",
        "chunks",
        "chunks, slopes, sinks",
    ],
)
def test_attention_in_one_node(decode, new, window, splits):
    """As a library's plugin launches it: how many splits is known only then; one writes the result."""
    lengths = torch.tensor([ROOM, 33, 2, 0], dtype=torch.int32)
    layout, batch, heads, rank = decode.layout, len(lengths), decode.heads, decode.layout.rank
    rows = numbers(batch, 1, ROOM, rank + layout.rest_width)
    q_latent, q_rope = numbers(batch, new, heads, rank), numbers(batch, new, heads, layout.rope_dim)
    inputs = {"q_latent": q_latent, "q_rope": q_rope, "rows": rows, "lengths": lengths}
    slopes, sinks = numbers(heads).abs() / 8 if decode.slopes else None, numbers(heads) if decode.sinks else None
    settings = {
        "rope_groups": layout.rope_groups,
        "scale": 0.3,
        "softcap": 2.0 * decode.capped,
        "window": window,
        "chunked": int(decode.chunked),
        "key_scales": layout.key_scales,
        "value_scales": layout.value_scales,
        "scaled_rope": int(layout.scaled_rope),
    }
    variant = Variant(
        key_scales=layout.key_scales > 0,
        value_scales=layout.value_scales > 0,
        scaled_rope=layout.scaled_rope,
        softcap=decode.capped,
        slopes=decode.slopes,
        chunked=decode.chunked,
    )
    sloped = inputs | ({} if slopes is None else {"slopes": slopes})
    sink = {} if sinks is None else {"sinks": sinks}
    both = dataclasses.replace(variant, sinks=decode.sinks)
    assert both.named(DECODE) == decode.name
    own = settings | {"has_slopes": int(decode.slopes), "has_sinks": int(decode.sinks)}
    (expected,) = body([(DECODE, both, [*sloped, *sink], ["context"], own)], sloped | sink, ["context"])
    pair = [
        (PARTIAL, variant, [*sloped], ["partial", "lse"], {**settings, "splits": splits}),
        (COMBINE, Variant(sinks=decode.sinks), ["partial", "lse", *sink], ["context"], {"to": onnx.TensorProto.FLOAT}),
    ]
    torch.testing.assert_close(body(pair, sloped | sink, ["context"])[0], expected, **CLOSE)

    tiles = decode.tactics(90)[0]
    context = torch.full((batch, new, heads, rank), torch.nan)
    parts = context if splits == 1 else torch.full((batch, new, heads, splits, rank), torch.nan)
    lse = torch.empty(batch, new, heads, splits)
    decode_entry[-(-new * heads // tiles.rows), splits, batch](
        *inputs.values(),
        slopes,
        parts,
        lse,
        sinks if splits == 1 else None,
        0.3,
        settings["softcap"],
        *(ROOM, new, heads, window, splits, 1),
        **decode.constants(new, tiles),
    )
    if splits > 1:
        constants = combine_constants(rank, 4)
        grid = batch * new * heads, -(-rank // constants["COLUMNS"])
        combine_kernel[grid](parts, lse, sinks, context, None, heads, splits, **constants)
    torch.testing.assert_close(context, expected, **CLOSE)


@pytest.mark.parametrize(
    "layout", [RowLayout(24, 3, 4), RowLayout(40), RowLayout(24, 1, 8, 3, 2)], ids=["rope", "no rope", "scales"]
)
def test_append(layout):
    lengths, new, append = torch.tensor([ROOM, 2, 40], dtype=torch.int32), 3, Append(layout, "fp32")
    batch, width = len(lengths), layout.rank + layout.rest_width
    row, rows = numbers(batch, new, width), numbers(batch, 1, ROOM, width)
    angle = numbers(batch, new, layout.rope_groups, layout.rope_dim // 2)
    inputs = {"row": row, "cos": angle.cos(), "sin": angle.sin(), "rows": rows.clone(), "lengths": lengths}
    (expected,) = body([(APPEND, Variant(), [*inputs], ["present"], {"latent_rank": layout.rank})], inputs, ["present"])
    append_entry[new, batch](*inputs.values(), ROOM, new, inputs["rows"], **append.constants)
    expected[1, 0, 2] = rows[1, 0, 2]  # behind a sequence shorter than what is new the body writes what nobody reads
    torch.testing.assert_close(inputs["rows"], expected, **CLOSE)
