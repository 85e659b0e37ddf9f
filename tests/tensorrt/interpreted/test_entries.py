"""Kernels as TensorRT launches them, interpreted on the CPU, against the bodies of their nodes in ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper

from mla_compile.runtime.kernels.decode import combine_kernel
from mla_compile.runtime.kernels.schedule import combine_constants
from mla_compile.runtime.onnx_function import DOMAIN, VERSION
from mla_compile.runtime.tensorrt.cubins import Decode
from mla_compile.runtime.tensorrt.entries import append_entry, combine_entry, decode_entry, partial_entry
from mla_compile.runtime.tensorrt.functions import APPEND, COMBINE, DECODE, PARTIAL, PLUGIN, function
from mla_compile.runtime.tensorrt.kernels import Append, Combine, Partial

ROOM, SPLITS = 90, 3
# Sums of some hundred float32 products in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def body(nodes, inputs, outputs):
    """Run nodes of ``(operator, inputs, outputs, attributes)`` by their bodies."""

    def value(name, x):
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(x.numpy().dtype), list(x.shape))

    made = [helper.make_node(op, i, o, domain=DOMAIN, **attributes, **PLUGIN) for op, i, o, attributes in nodes]
    results = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph(made, "nodes", [value(n, x) for n, x in inputs.items()], results)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, VERSION)]
    functions = [function(op, 23) for op, *_ in nodes]
    model = helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    fed = {name: x.numpy() for name, x in inputs.items()}
    return [torch.from_numpy(np.asarray(y)) for y in session.run(list(outputs), fed)]


def numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(
    ("partial", "new"),
    [
        (Partial(48, 3, 8, 9, 1, "fp32", 0.3, 0, SPLITS), 1),
        (Partial(48, 3, 8, 9, 0, "fp32", 0.3, 0, SPLITS), 4),  # a length that was not known, and one token too
        (Partial(48, 3, 8, 9, 0, "fp32", 0.3, 0, SPLITS), 1),
        (Partial(64, 1, 16, 4, 0, "fp32", 0.2, 20, SPLITS), 3),
        (Partial(32, 1, 0, 2, 1, "fp32", 0.2, 0, SPLITS), 1),
    ],
    ids=["one token", "some tokens", "one of any number", "window", "no rope"],
)
def test_attention_in_two_parts(partial, new):
    lengths = torch.tensor([ROOM, 33, 2, 0], dtype=torch.int32)  # more tokens than rows: the first ones are padding
    batch, heads, rank, width = len(lengths), partial.heads, partial.rank, partial.rope_groups * partial.rope_dim
    rows = numbers(batch, ROOM, rank + width)
    q_latent, q_rope = numbers(batch, new, heads, rank), numbers(batch, new, heads, partial.rope_dim)
    inputs = {"q_latent": q_latent, "q_rope": q_rope, "rows": rows, "lengths": lengths}
    settings = {"rope_groups": partial.rope_groups, "scale": partial.scale, "window": partial.window, "splits": SPLITS}
    nodes = [
        (PARTIAL, [*inputs], ["partial", "lse"], settings),
        (COMBINE, ["partial", "lse"], ["context"], {"to": onnx.TensorProto.FLOAT}),
    ]
    (expected,) = body(nodes, inputs, ["context"])

    unread = torch.arange(ROOM) >= lengths[:, None]
    rows = rows.masked_fill(unread[..., None], torch.nan)
    tiles = partial.tactics(90)[-1]
    parts, lse = torch.full((batch, new, heads, SPLITS, rank), torch.nan), torch.empty(batch, new, heads, SPLITS)
    blocks = -(-new * heads // tiles.rows), SPLITS, batch
    partial_entry[blocks](
        q_latent, q_rope, rows, lengths, ROOM, new, heads, parts, lse, **partial.constants(tiles) | {"LEAST_TILES": 1}
    )
    combine, context = Combine(rank, SPLITS, "fp32"), torch.empty(batch, new, heads, rank)
    combine_entry[batch * new * heads, combine.blocks_per_row](parts, lse, context, **combine.constants)
    torch.testing.assert_close(context, expected, **CLOSE)
    assert bool(context.any(-1).any(-1)[:2].all())


@pytest.mark.parametrize(("new", "window", "splits"), [(1, 0, 1), (3, 0, 2), (2, 20, 3)])
def test_attention_in_one_node(new, window, splits):
    """As a library's plugin launches it: how many splits is known only then; one writes the result."""
    decode, lengths = Decode(48, 3, 8, 9, window > 0, "fp32"), torch.tensor([ROOM, 33, 2, 0], dtype=torch.int32)
    batch, heads, rank = len(lengths), decode.heads, decode.rank
    rows = numbers(batch, ROOM, rank + decode.rope_groups * decode.rope_dim)
    q_latent, q_rope = numbers(batch, new, heads, rank), numbers(batch, new, heads, decode.rope_dim)
    inputs = {"q_latent": q_latent, "q_rope": q_rope, "rows": rows, "lengths": lengths}
    settings = {"rope_groups": decode.rope_groups, "scale": 0.3, "window": window}
    (expected,) = body([(DECODE, [*inputs], ["context"], settings)], inputs, ["context"])
    pair = [
        (PARTIAL, [*inputs], ["partial", "lse"], {**settings, "splits": splits}),
        (COMBINE, ["partial", "lse"], ["context"], {"to": onnx.TensorProto.FLOAT}),
    ]
    torch.testing.assert_close(body(pair, inputs, ["context"])[0], expected, **CLOSE)

    tiles = decode.tactics(90)[0]
    context = torch.full((batch, new, heads, rank), torch.nan)
    parts = context if splits == 1 else torch.full((batch, new, heads, splits, rank), torch.nan)
    lse = torch.empty(batch, new, heads, splits)
    blocks = -(-new * heads // tiles.rows), splits, batch
    sizes = ROOM, new, heads, window, splits, 1
    decode_entry[blocks](q_latent, q_rope, rows, lengths, parts, lse, 0.3, *sizes, **decode.constants(new, tiles))
    if splits > 1:
        constants = combine_constants(rank, 4)
        grid = batch * new * heads, -(-rank // constants["COLUMNS"])
        combine_kernel[grid](parts, lse, None, context, None, heads, splits, **constants)
    torch.testing.assert_close(context, expected, **CLOSE)


@pytest.mark.parametrize("append", [Append(24, 3, 4, "fp32"), Append(40, 1, 0, "fp32")], ids=["rope", "no rope"])
def test_append(append):
    lengths, new = torch.tensor([ROOM, 2, 40], dtype=torch.int32), 3
    batch, width = len(lengths), append.rank + append.rope_groups * append.rope_dim
    row, rows = numbers(batch, new, width), numbers(batch, ROOM, width)
    angle = numbers(batch, new, append.rope_groups, append.rope_dim // 2)
    inputs = {"row": row, "cos": angle.cos(), "sin": angle.sin(), "rows": rows, "lengths": lengths}
    (expected,) = body([(APPEND, [*inputs], ["present"], {"latent_rank": append.rank})], inputs, ["present"])
    append_entry[new, batch](*inputs.values(), ROOM, new, rows, **append.constants)
    torch.testing.assert_close(rows, expected, **CLOSE)
