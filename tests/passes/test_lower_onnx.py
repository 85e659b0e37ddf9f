"""The ONNX file: its interface as documented, its nodes, and the same numbers in ONNX Runtime."""

from __future__ import annotations

import json

import models
import numpy as np
import onnx
import pytest
import torch
from conversion import convert, difference
from torch import nn

from mla_compile.errors import RefusedError
from mla_compile.passes import onnx_export
from mla_compile.passes.lower_onnx import export_rewritten, lower_to_onnx
from mla_compile.passes.onnx_export import METADATA_KEY
from mla_compile.runtime import ops  # noqa: F401 - registers the operators
from mla_compile.runtime.module import LatentModel
from mla_compile.runtime.onnx_checksum import CHECKSUM_KEY
from mla_compile.runtime.onnx_session import OnnxDecoder
from mla_compile.runtime.onnx_variant import CACHED, DOMAIN, LATENT, VERSION, Variant

# Both runtimes compute in float32, in another order and with other kernels: 1e-6 was observed.
LOGITS = 1e-4
LENGTH = 14
METADATA = {"format": 1, "layers": [{"rank": 7}], "source": "a model"}
# What differs for the exporter: grouped keys, a window, no rope but a table of positions, biases.
NAMES = ("llama-gqa", "mistral-window", "nanogpt", "complex-llama", "llama-attention-bias")
FIRST = NAMES[0]


class EveryFeature(nn.Module):
    """Layers that need four variants of two functions; two need the same one, and one has no rope at all."""

    HEADS, HEAD_DIM, WIDTH = 4, 6, 10
    # Per layer: rank, rope channels per head (one group), key scales, and the operator's last arguments.
    LATENT = (
        {"rank": 5, "rope": 4, "scales": 2, "sinks": True, "window": 3},
        {"rank": 6, "rope": 2},
        {"rank": 3, "rope": 0, "scales": 1, "slopes": True, "softcap": 2.0},
        {"rank": 4, "rope": 2},
    )
    CACHED = ({"kv_heads": 2, "sinks": True, "slopes": True, "softcap": 1.5, "window": 4}, {"kv_heads": 4})

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def weight(*shape):
            return nn.Parameter(torch.randn(shape, generator=generator) / shape[-1] ** 0.5)

        self.embedding = weight(models.VOCABULARY, self.WIDTH)
        self.query, self.row, self.key_up, self.value_up, self.output, self.sinks, self.slopes = (
            nn.ParameterList() for _ in range(7)
        )
        for layer in (*self.LATENT, *self.CACHED):
            if layer in self.LATENT:
                width = layer["rank"] + layer["rope"] + layer.get("scales", 0)
                self.key_up.append(weight(2, self.HEAD_DIM - layer["rope"], layer["rank"]))
                self.value_up.append(weight(1, layer["rank"], self.HEAD_DIM))
            else:
                width = layer["kv_heads"] * 2 * self.HEAD_DIM
            self.query.append(weight(self.HEADS * self.HEAD_DIM, self.WIDTH))
            self.row.append(weight(width, self.WIDTH))
            self.output.append(weight(self.WIDTH, self.HEADS * self.HEAD_DIM))
            self.sinks.append(weight(self.HEADS))
            self.slopes.append(weight(self.HEADS))
        self.rows = [row.shape[0] for row in self.row]

    def forward(self, input_ids, attention_mask, position_ids, p0, p1, p2, p3, p4, p5):
        x, past, present = self.embedding[input_ids], (p0, p1, p2, p3, p4, p5), []
        batch, new = input_ids.shape[0], input_ids.shape[1]
        for i, layer in enumerate((*self.LATENT, *self.CACHED)):
            query = (x @ self.query[i].T).reshape(batch, new, self.HEADS, self.HEAD_DIM)
            row = x @ self.row[i].T
            extras = [
                self.sinks[i] if "sinks" in layer else None,
                self.slopes[i] if "slopes" in layer else None,
            ]
            last = [0.4, layer.get("window", 0), layer.get("softcap", 0.0)]
            if i < len(self.LATENT):
                frequency = torch.tensor([0.7**j for j in range(layer["rope"] // 2)])
                angle = position_ids[..., None, None] * frequency
                y, cache = torch.ops.mla.latent_attention.default(
                    query,
                    row,
                    past[i],
                    attention_mask,
                    angle.cos(),
                    angle.sin(),
                    self.key_up[i],
                    self.value_up[i],
                    *extras,
                    *last,
                )
            else:
                y, cache = torch.ops.mla.cached_attention.default(
                    query, row, past[i], attention_mask, *extras, layer["kv_heads"], *last
                )
            present.append(cache)
            x = x + y.flatten(2) @ self.output[i].T
        return x @ self.embedding.T, *present


class Lowered:
    """A converted model, and the file it was lowered to."""

    def __init__(self, captured, path, **settings):
        self.sites, self.path = captured.sites, path
        self.model = convert(captured.program, captured.sites, exact=False, cache_ratio=0.5)
        self.write(path, **settings)

    def write(self, path, *, opset=23, inline=False):
        graph, rows = self.model.graph, self.model.rows
        lower_to_onnx(graph, rows, path, opset=opset, inline=inline, metadata=METADATA)
        return path

    def check_logits(self, path):
        check_logits(self.model, path)


def check_logits(model, path):
    """Whole sequences, token by token, and padding, against the PyTorch module."""
    decoder, ids = OnnxDecoder(path, threads=1), models.tokens(2, LENGTH)
    with torch.no_grad():
        expected = model(ids).logits
    assert difference(torch.from_numpy(decoder.logits(ids.numpy())), expected) <= LOGITS
    cache, parts = decoder.empty_cache(2), []
    for place in range(LENGTH):  # the first step has one token and no past
        mask, position = np.ones((2, place + 1), np.int64), np.full((2, 1), place)
        logits, cache = decoder.step(ids[:, place : place + 1].numpy(), mask, position, cache)
        parts.append(torch.from_numpy(logits))
    assert difference(torch.cat(parts, 1), expected) <= LOGITS
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    position = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model(ids, mask, position).logits
    logits, _ = decoder.step(ids.numpy(), mask.numpy(), position.numpy(), decoder.empty_cache(2))
    assert difference(torch.from_numpy(logits)[mask != 0], expected[mask != 0]) <= LOGITS


@pytest.fixture(scope="module")
def lowered(programs, tmp_path_factory):
    """Converted models by name, lowered at first use."""
    written = {}

    def get(name):
        if name not in written:
            written[name] = Lowered(programs[name], tmp_path_factory.mktemp("onnx") / "model.onnx")
        return written[name]

    return get


def interface(values):
    """Name, element type and dimensions of inputs or outputs."""
    return [
        (
            v.name,
            v.type.tensor_type.elem_type,
            tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim),
        )
        for v in values
    ]


@pytest.mark.parametrize("name", NAMES)
def test_interface_is_the_documented_one(lowered, name):
    case = lowered(name)
    graph = onnx.load(case.path).graph
    whole, number = onnx.TensorProto.INT64, onnx.TensorProto.FLOAT
    batch, new, past, total = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"
    rows = list(enumerate(case.model.rows))
    windows = [site.mask.window for site in case.sites]
    own = [f"_of_window_{w}" if w else "" for w in windows]
    assert interface(graph.input) == [
        ("input_ids", whole, (batch, new)),
        ("attention_mask", whole, (batch, total)),
        ("position_ids", whole, (batch, new)),
        *((f"past_key_values.{i}.latent", number, (batch, f"{past}{own[i]}", row)) for i, row in rows),
        ("logits_to_keep", whole, ()),
    ]
    assert interface(graph.output) == [
        ("logits", number, (batch, "logits_length", models.VOCABULARY)),
        *((f"present.{i}.latent", number, (batch, f"{total}{own[i]}", row)) for i, row in rows),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_one_node_per_layer_and_its_function(lowered, name):
    case = lowered(name)
    onnx.checker.check_model(case.path, full_check=True)
    model = onnx.load(case.path)
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 23, DOMAIN: VERSION}
    names = [Variant(window=bool(site.mask.window)).named(LATENT) for site in case.sites]
    assert sorted((f.domain, f.name) for f in model.functions) == [(DOMAIN, name) for name in sorted({*names})]
    nodes = [n for n in model.graph.node if n.domain]
    assert [(n.domain, n.op_type) for n in nodes] == [(DOMAIN, name) for name in names]
    for node, site, row in zip(nodes, case.sites, case.model.rows, strict=True):
        found = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        window = {"window"} if site.mask.window else set()
        assert found.keys() == {"num_heads", "rope_groups", "rope_dim", "latent_rank", "scale"} | window
        assert found["num_heads"] == site.heads
        assert found.get("window") == site.mask.window
        assert found["scale"] == pytest.approx(site.scale, rel=1e-6)  # an attribute is a float32
        assert found["latent_rank"] + found["rope_groups"] * found["rope_dim"] == row
        assert found["rope_groups"] == (site.kv_heads if found["rope_dim"] else 1)


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_module(lowered, name):
    lowered(name).check_logits(lowered(name).path)


@pytest.mark.parametrize("opset", [23, 24])
def test_inlined_file_is_standard_and_the_same(lowered, tmp_path, opset):
    case = lowered(FIRST)
    path = case.write(tmp_path / "model.onnx", opset=opset, inline=True)
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path)
    assert not model.functions
    assert {n.domain for n in model.graph.node} <= {""}
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": opset}
    assert interface(model.graph.input) == interface(onnx.load(case.path).graph.input)
    case.check_logits(path)


def test_file_says_who_made_it_and_what_it_is(lowered):
    model = onnx.load(lowered(FIRST).path)
    assert model.producer_name == "mla-compile"
    said = {entry.key: entry.value for entry in model.metadata_props}
    assert said.keys() == {METADATA_KEY, CHECKSUM_KEY}
    assert json.loads(said[METADATA_KEY]) == METADATA
    assert OnnxDecoder(lowered(FIRST).path).metadata == METADATA


def test_every_weight_is_stored_once(lowered):
    """Two layers share one table of rotations, and no layer stores its old projections."""
    case = lowered(FIRST)
    stored = sum(
        onnx.numpy_helper.to_array(t).nbytes
        for t in onnx.load(case.path).graph.initializer
        if t.data_type == onnx.TensorProto.FLOAT and t.dims
    )
    weights = sum(p.nbytes for p in case.model.parameters()) + sum(b.nbytes for b in case.model.buffers())
    constants = 64  # numbers of the graph itself, such as a norm's epsilon
    assert weights <= stored <= weights + constants


def test_large_weights_lie_beside_the_file(lowered, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "EXTERNAL_DATA_BYTES", 1)
    case = lowered(FIRST)
    path = case.write(tmp_path / "model.onnx")
    assert {p.name for p in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    assert path.stat().st_size < case.path.stat().st_size
    case.check_logits(path)


def test_small_weights_lie_within_the_file(lowered):
    assert [p.name for p in lowered(FIRST).path.parent.iterdir()] == ["model.onnx"]


def test_module_is_left_as_it_was(lowered, tmp_path):
    case = lowered(FIRST)
    ids, text = models.tokens(1, 4), str(case.model.graph.graph)
    with torch.no_grad():
        before = case.model(ids).logits
        case.write(tmp_path / "model.onnx")
        assert str(case.model.graph.graph) == text
        assert torch.equal(case.model(ids).logits, before)


@pytest.mark.parametrize(("new", "past"), [(1, 0), (1, 6), (4, 0), (3, 2)])
def test_exported_program_serves_every_step(lowered, new, past):
    model = lowered(FIRST).model
    exported = export_rewritten(model.graph, model.rows).module()
    ids = models.tokens(1, past + new)
    with torch.no_grad():
        cache = model(ids[:, :past]).cache if past else model.empty_cache(1)
        position = torch.arange(past, past + new)[None]
        logits, *_ = exported(ids[:, past:], torch.ones_like(ids), position, *cache)
        expected = model(ids[:, past:], past=cache).logits
    assert torch.equal(logits, expected)


@pytest.fixture(scope="module")
def every_feature():
    graph = EveryFeature()
    exported = export_rewritten(graph, graph.rows)
    return LatentModel(exported.module(), graph.rows)


@pytest.mark.parametrize("inline", [False, True], ids=["functions", "inline"])
def test_every_feature_and_layers_that_are_not_converted(every_feature, tmp_path, inline):
    path = tmp_path / "model.onnx"
    lower_to_onnx(every_feature.graph, every_feature.rows, path, opset=23, inline=inline, metadata=METADATA)
    onnx.checker.check_model(path, full_check=True)
    check_logits(every_feature, path)
    model = onnx.load(path)
    called = [n.op_type for n in model.graph.node if n.domain == DOMAIN]
    if inline:
        assert not called
        assert not model.functions
        return
    assert called == [
        f"{LATENT}_key_scales_window_sinks",
        LATENT,
        f"{LATENT}_key_scales_softcap_slopes",
        LATENT,
        f"{CACHED}_softcap_window_sinks_slopes",
        CACHED,
    ]
    assert {f.name for f in model.functions} == {*called}
    assert len(model.functions) == 5
    shown = {
        a.name: onnx.helper.get_attribute_value(a)
        for n in model.graph.node[:]
        if n.op_type.endswith("key_scales_window_sinks")
        for a in n.attribute
    }
    assert shown.pop("scale") == pytest.approx(0.4)
    assert shown == {
        "num_heads": 4,
        "rope_groups": 1,
        "rope_dim": 4,
        "latent_rank": 5,
        "window": 3,
        "key_scales": 2,
        "has_sinks": 1,
    }


@pytest.mark.parametrize("cause", [None, RefusedError("Layer 3 has no ONNX form.", "Keep it.")])
def test_a_refusal_of_ours_is_not_explained_again(monkeypatch, cause):
    """Torch wraps whatever fails while it exports."""

    def fails(*arguments, **named):
        raise RuntimeError("failed to translate") from cause

    monkeypatch.setattr(torch.onnx, "export", fails)
    with pytest.raises(RefusedError, match="Layer 3" if cause else r"lowered to ONNX: failed to translate\."):
        onnx_export.exported_to_onnx(torch.export.export(torch.nn.ReLU(), (torch.zeros(2),)), [], [], 23)
