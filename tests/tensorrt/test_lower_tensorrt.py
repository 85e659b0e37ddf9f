"""The file for TensorRT: the same numbers as the module in ONNX Runtime, and accepted by a TensorRT parser."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import NamedTuple

import models
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conversion import difference
from families import huggingface, tokens

import mla_compile
from mla_compile.errors import RefusedError
from mla_compile.passes.lower_tensorrt import lower_to_tensorrt_onnx
from mla_compile.runtime.module import LatentModel
from mla_compile.runtime.onnx_variant import DOMAIN, VERSION, Variant
from mla_compile.runtime.tensorrt.functions import APPEND, COMBINE, DECODE, NAMESPACE, OPSET, PARTIAL

# Grouped keys; a window, whose cache keeps all rows here, and chunks likewise; no rope.
NAMES = ("llama-gqa", "mistral-window", "chunks", "nanogpt")
# Both compute in float32 in another order: 1e-6 was observed.
LOGITS = 1e-4
LENGTH, ROOM = 14, 32


class Case(NamedTuple):
    """A file and the module it was made of."""

    path: Path
    model: LatentModel


class Session:
    """Steps with caches of fixed memory."""

    def __init__(self, path: Path, rows, batch: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
        self.caches = {
            f"past_key_values.{i}.latent": np.zeros((batch, 1, ROOM, row), np.float32) for i, row in enumerate(rows)
        }

    def step(self, ids, lengths, positions) -> torch.Tensor:
        fed = {"input_ids": ids.numpy(), "lengths": np.asarray(lengths, np.int32), "position_ids": positions.numpy()}
        known = {i.name for i in self._session.get_inputs()}  # a model that reads no positions has no input for them
        logits, *presents = self._session.run(None, {n: x for n, x in (fed | self.caches).items() if n in known})
        self.caches = dict(zip(self.caches, presents, strict=True))
        return torch.from_numpy(logits)


def in_steps(case, ids, sizes):
    session, done, parts = Session(case.path, case.model.rows, len(ids)), 0, []
    for part in ids.split(sizes, 1):
        new = part.shape[1]
        positions = torch.arange(done, done + new).expand(len(ids), new)
        done += new
        parts.append(session.step(part, [done] * len(ids), positions))
    return torch.cat(parts, 1), session


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sizes", [(LENGTH,), (5, 1, 3, 1, 4)], ids=["at once", "in chunks"])
def test_logits_are_those_of_the_module(lowered, name, sizes):
    case, ids = lowered(name), models.tokens(2, LENGTH)
    with torch.no_grad():
        expected = case.model(ids).logits
    logits, _ = in_steps(case, ids, sizes)
    assert difference(logits, expected) <= LOGITS


@pytest.mark.parametrize("name", ["llama-gqa", "chunks"])
def test_sequences_of_different_lengths_share_a_batch(lowered, name):
    """Prompts are padded on the left, and the padding is not cached: a sequence's rows, and chunks, begin at 0."""
    case, ids = lowered(name), models.tokens(2, LENGTH)
    lengths, steps = torch.tensor([LENGTH, 9]), 3
    prompt = ids.clone()
    prompt[1, LENGTH - 9 :] = ids[1, :9]
    more = models.tokens(2, LENGTH + steps)[:, LENGTH:]
    session = Session(case.path, case.model.rows, 2)
    positions = (torch.arange(LENGTH) - (LENGTH - lengths)[:, None]).clamp(min=0)
    got = [session.step(prompt, lengths, positions)]
    for i in range(steps):
        lengths = lengths + 1
        got.append(session.step(more[:, i : i + 1], lengths, lengths[:, None] - 1))
    got = torch.cat(got, 1)
    with torch.no_grad():
        first = case.model(torch.cat([ids[:1], more[:1]], 1)).logits
        second = case.model(torch.cat([ids[1:, :9], more[1:]], 1)).logits
    assert difference(got[:1], first) <= LOGITS
    assert difference(got[1:, LENGTH - 9 :], second) <= LOGITS
    # Behind what a prompt takes nothing was written.
    assert all(not cache[1, 0, max(LENGTH, 9 + steps) :].any() for cache in session.caches.values())


@pytest.mark.parametrize("name", NAMES)
def test_nodes_ask_for_plugins_and_carry_bodies(lowered, name):
    case = lowered(name)
    onnx.checker.check_model(case.path, full_check=True)
    assert {entry.domain: entry.version for entry in case.proto.opset_import} == {"": OPSET, DOMAIN: VERSION}
    partial = Variant(chunked=name == "chunks").named(PARTIAL)
    assert sorted(f.name for f in case.proto.functions) == sorted([APPEND, partial, COMBINE])
    nodes = [n for n in case.proto.graph.node if n.domain]
    assert [n.op_type for n in nodes] == [APPEND, partial, COMBINE] * len(case.model.rows)
    for node in nodes:
        found = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert found["plugin_namespace"] == NAMESPACE.encode()
        assert found["plugin_version"] == b"1"


@pytest.mark.parametrize("name", NAMES)
def test_nodes_for_a_library_of_plugins(lowered, name):
    """Attention is one node instead of two, and computes the same."""
    case, ids = lowered(name, splits=None), models.tokens(2, LENGTH)
    onnx.checker.check_model(case.path, full_check=True)
    decode = Variant(chunked=name == "chunks").named(DECODE)
    assert [n.op_type for n in case.proto.graph.node if n.domain] == [APPEND, decode] * len(case.model.rows)
    assert sorted(f.name for f in case.proto.functions) == sorted([APPEND, decode])
    with torch.no_grad():
        expected = case.model(ids).logits
    logits, _ = in_steps(case, ids, (5, 1, 3, 1, 4))
    assert difference(logits, expected) <= LOGITS


@pytest.mark.parametrize("name", NAMES)
def test_interface(lowered, name):
    graph = lowered(name).proto.graph
    shapes = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*graph.input, *graph.output)
    }
    batch, new = "batch_size", "sequence_length"
    caches = {
        f"{kind}.{i}.latent": [batch, 1, ROOM, row]
        for i, row in enumerate(lowered(name).model.rows)
        for kind in ("past_key_values", "present")
    }
    assert shapes == {
        "input_ids": [batch, new],
        "lengths": [batch],
        "position_ids": [batch, new],
        "logits": [batch, new, models.VOCABULARY],
        **caches,
    }


def extents(tensor):
    """Least, usual and largest shape of an input."""
    free = {0: (1, 2, 4), 1: (1, 3, 16)}
    return [
        tuple(free[axis][i] if extent < 0 else extent for axis, extent in enumerate(tensor.shape)) for i in range(3)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_tensorrt_parser_and_builder_take_the_bodies(lowered, parser, name):
    """No plugin is registered, so every node becomes its body; batch and new length stay free."""
    case = lowered(name)
    network = parser.parse(case.path)
    assert [network.get_input(i).name for i in range(3)] == ["input_ids", "lengths", "position_ids"]
    assert tuple(network.get_input(0).shape) == (-1, -1)
    shapes = [tuple(network.get_output(i).shape) for i in range(network.num_outputs)]
    assert shapes == [(-1, -1, models.VOCABULARY), *((-1, 1, ROOM, row) for row in case.model.rows)]
    kinds = [network.get_layer(i).type.name for i in range(network.num_layers)]
    assert kinds.count("KV_CACHE_UPDATE") == len(case.model.rows)
    assert parser.build(network, extents) > 0


def with_scales(row, count):
    """The same rows with scales behind them, any numbers around 1."""
    return torch.cat([row, 1 + row[..., :count].tanh() / 2], -1)


def altered(model, key_scales=0, value_scales=0, scaled_rope=False, softcap=0.0, sinks=False, slopes=False, chunk=0):
    """A converted model whose layers have these features too: another model, of which nothing is known but its code."""
    module = copy.copy(model.graph)
    module.graph = copy.deepcopy(model.graph.graph)
    numbers = torch.randn(2, models.HEADS, generator=torch.Generator().manual_seed(3))
    module.sinks, module.slopes = (torch.nn.Parameter(x) for x in (numbers[0], numbers[1].abs() / 8))
    for node in [n for n in module.graph.nodes if n.target is torch.ops.mla.latent_attention.default]:
        with module.graph.inserting_before(node):
            row = module.graph.call_function(with_scales, (node.args[1], key_scales + value_scales))
            given = {8: sinks and "sinks", 9: slopes and "slopes"}
            extra = {at: module.graph.get_attr(name) if name else None for at, name in given.items()}
        masked = {11: chunk, 14: True, 16: chunk > 0}
        settled = {1: row, 12: softcap, 13: value_scales, 15: scaled_rope, **masked, **extra}
        node.args = tuple((dict(enumerate(node.args)) | settled)[i] for i in range(17))
    module.recompile()
    return LatentModel(module, [row + key_scales + value_scales for row in model.rows])


@pytest.mark.parametrize(
    "features",
    [
        {"key_scales": models.HEADS},
        {"key_scales": 2, "value_scales": 1, "scaled_rope": True},
        {"value_scales": 4, "sinks": True, "softcap": 3.0},
        {"key_scales": 1, "value_scales": 2, "softcap": 4.0, "sinks": True, "slopes": True},
        {"chunk": 4},
        {"chunk": 1, "sinks": True, "slopes": True},
    ],
    ids=lambda features: "-".join(features),
)
def test_features_are_those_of_the_operator(lowered, parser, tmp_path, features):
    model, ids = altered(lowered("llama-gqa").model, **features), models.tokens(2, LENGTH)
    path = tmp_path / "model.onnx"
    lower_to_tensorrt_onnx(model.graph, model.rows, path, room=ROOM, metadata={})
    onnx.checker.check_model(path, full_check=True)
    with torch.no_grad():
        expected = model(ids).logits
        plain = lowered("llama-gqa").model(ids).logits
    assert difference(plain, expected) > 10 * LOGITS  # the feature does something
    logits, _ = in_steps(Case(path, model), ids, (5, 1, 3, 1, 4))
    assert difference(logits, expected) <= LOGITS
    assert parser.build(parser.parse(path), extents) > 0


def test_a_library_takes_all_features_in_one_node(lowered, tmp_path):
    features = {"key_scales": 2, "value_scales": 1, "scaled_rope": True, "softcap": 4.0, "sinks": True, "slopes": True}
    features |= {"chunk": 6}
    model, ids = altered(lowered("llama-gqa").model, **features), models.tokens(2, LENGTH)
    path = tmp_path / "model.onnx"
    lower_to_tensorrt_onnx(model.graph, model.rows, path, room=ROOM, metadata={}, splits=None)
    onnx.checker.check_model(path, full_check=True)
    with torch.no_grad():
        expected = model(ids).logits
    logits, _ = in_steps(Case(path, model), ids, (5, 1, 3, 1, 4))
    assert difference(logits, expected) <= LOGITS


def test_layers_with_an_ordinary_cache_are_refused(lowered, tmp_path):
    model = altered(lowered("llama-gqa").model)
    last = [n for n in model.graph.graph.nodes if n.target is torch.ops.mla.latent_attention.default][-1]
    last.target = torch.ops.mla.cached_attention.default
    with pytest.raises(RefusedError, match=r"Layer 1 is not converted.* Give TensorRT the ordinary ONNX file"):
        lower_to_tensorrt_onnx(model.graph, model.rows, tmp_path / "model.onnx", room=ROOM, metadata={})
    assert not [*tmp_path.iterdir()]


def test_tables_of_positions_are_made_for_the_room(parser, tmp_path):
    """Of Llama 4, whose layers with chunks alternate with ones whose queries grow with their position."""
    model, ids = mla_compile.compile(huggingface.CONVERTIBLE["llama4"].build(), exact=True).module, tokens(2, LENGTH)
    path = tmp_path / "model.onnx"
    lower_to_tensorrt_onnx(model.graph, model.rows, path, room=ROOM, metadata={})
    with torch.no_grad():
        expected = model(ids).logits
    logits, _ = in_steps(Case(path, model), ids, (5, 1, 3, 1, 4))
    assert difference(logits, expected) <= LOGITS
    assert parser.build(parser.parse(path), extents) > 0


def test_what_else_reads_the_padding_mask_is_refused(lowered, tmp_path):
    model = altered(lowered("llama-gqa").model)
    mask, last = (next(n for n in model.graph.graph.nodes if n.name == name) for name in ("attention_mask", "output"))
    with model.graph.graph.inserting_before(last):
        count = model.graph.graph.call_function(torch.ops.aten.sum.default, (mask,))
        logits, *caches = last.args[0]
        last.args = ([model.graph.graph.call_function(torch.ops.aten.add.Tensor, (logits, count)), *caches],)
    with pytest.raises(RefusedError, match=r"other than attention reads the padding mask.* Give TensorRT the ordinary"):
        lower_to_tensorrt_onnx(model.graph, model.rows, tmp_path / "model.onnx", room=ROOM, metadata={})
    assert not [*tmp_path.iterdir()]
