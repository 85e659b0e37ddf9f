"""Quickly deployable plugins: registered in TensorRT's real registry, and asked what TensorRT would ask them."""

from __future__ import annotations

import importlib
import math
import os
import re
import struct
import sys
from dataclasses import replace

import onnx
import pytest

from mla_compile.errors import UsageError
from mla_compile.runtime.kernels.cache import RowLayout
from mla_compile.runtime.tensorrt.functions import APPEND, COMBINE, NAMESPACE, PARTIAL, function, variants

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import stand_in

from mla_compile.runtime.tensorrt.kernels import Partial, launchable
from mla_compile.runtime.tensorrt.plugins import register

ARCHITECTURE = 90
BATCH, NEW, HEADS, RANK, GROUPS, ROPE, ROOM, SPLITS = 5, 2, 9, 48, 3, 8, 1000, 6
WIDTH = RANK + GROUPS * ROPE
SCALES = ("key_scales", "value_scales")


@pytest.fixture(scope="module")
def trt():
    """The stand-in, with the plugins registered; ``tensorrt`` is missing again afterwards."""
    lean = stand_in.install()
    register(ARCHITECTURE)
    yield lean
    for name in [n for n in sys.modules if n == "tensorrt" or n.startswith("tensorrt.")]:
        del sys.modules[name]


def attributes(op_type, given):
    """Of a plugin: those of the node, but for those that name the plugin."""
    assert {*function(op_type).attribute} == {*given, "plugin_namespace", "plugin_version"}
    return given


PLAIN = {"softcap": 0.0, "window": 0, "chunked": 0, "key_scales": 0, "value_scales": 0, "scaled_rope": 0}


def ask_partial(trt, dtype=None, new_known=True, name=PARTIAL, slopes=(), **features):
    dtype = dtype or trt.bfloat16
    free, known = (BATCH, False), (NEW, new_known)
    inputs = [
        (dtype, [free, known, (HEADS, True), (RANK, True)]),
        (dtype, [free, known, (HEADS, True), (ROPE, True)]),
        (dtype, [free, (1, True), (ROOM, True), (WIDTH + sum(features.get(s, 0) for s in SCALES), True)]),
        (trt.int32, [free]),
        *((trt.float32, [(HEADS, True)]) for _ in slopes),
    ]
    own = attributes(PARTIAL, {"rope_groups": GROUPS, "scale": 0.3, **PLAIN, **features, "splits": SPLITS})
    return stand_in.build(f"{NAMESPACE}::{name}", inputs, own)


def parameters(launch):
    """Widths of the kernel's parameters, in order."""
    entry = re.search(rf"\.entry {launch.name}\((.*?)\n\)", launch.ptx, re.DOTALL)[1]
    return re.findall(r"\.param \.u(\d+)", entry)


@pytest.mark.parametrize(("op_type", "variant"), [*variants()])
def test_is_registered_under_the_name_the_file_asks_for(trt, op_type, variant):
    asked = function(op_type, variant)
    creator = trt.get_plugin_registry().get_creator(asked.name, "1", NAMESPACE)
    assert creator is not None
    fields = {field.name for field in creator.field_names}
    assert fields == {*asked.attribute} - {"plugin_namespace", "plugin_version"}
    definition = importlib.import_module("tensorrt.plugin._lib").QDP_REGISTRY[f"{NAMESPACE}::{asked.name}"]
    assert len(definition.input_tensor_names) == len(asked.input)
    assert definition.num_outputs == len(asked.output)


@pytest.mark.parametrize("new_known", [True, False], ids=["one length", "any length"])
def test_partial(trt, new_known):
    outputs, combinations, launches = ask_partial(trt, new_known=new_known)
    assert outputs == [
        ((BATCH, NEW, HEADS, SPLITS, RANK), trt.float32, False),
        ((BATCH, NEW, HEADS, SPLITS), trt.float32, False),
    ]
    assert {tuple(t.name for t in c.types) for c in combinations} == {
        (kind, kind, kind, "INT32", "FLOAT", "FLOAT") for kind in ("FLOAT", "HALF", "BF16")
    }
    assert len(launches) > 1  # something to choose among
    for launch in launches.values():
        rows_per_block = 16 if launch.grid[0] == 2 else 32  # 18 rows
        assert launch.grid == (-(-NEW * HEADS // rows_per_block), SPLITS, BATCH)
        assert launch.block[0] % 32 == 0
        assert launch.block[1:] == (1, 1)
        assert launch.shared_bytes <= 48 * 1024
        assert launch.integers == (ROOM, NEW, HEADS)
        # Four inputs, three integers, two outputs.
        assert parameters(launch) == ["64"] * 4 + ["32"] * 3 + ["64"] * 2
        assert re.search(r"^\.version 8\.7$", launch.ptx, re.MULTILINE)


def test_scale_is_a_constant_of_the_kernel(trt):
    """There is no parameter for it; powers are those of 2, so it is divided by ln 2."""
    _, _, launches = ask_partial(trt)
    bits = struct.pack(">f", 0.3 / math.log(2)).hex().upper()
    assert all(f"0f{bits}" in launch.ptx for launch in launches.values())


def test_combine(trt):
    free = (BATCH, False)
    inputs = [
        (trt.float32, [free, (NEW, False), (HEADS, True), (SPLITS, True), (RANK, True)]),
        (trt.float32, [free, (NEW, False), (HEADS, True), (SPLITS, True)]),
    ]
    own = attributes(COMBINE, {"to": onnx.TensorProto.BFLOAT16})
    outputs, combinations, launches = stand_in.build(f"{NAMESPACE}::{COMBINE}", inputs, own)
    assert outputs == [((BATCH, NEW, HEADS, RANK), trt.bfloat16, False)]
    assert [tuple(t.name for t in c.types) for c in combinations] == [("FLOAT", "FLOAT", "BF16")]
    (launch,) = launches.values()
    assert launch.grid == (BATCH * NEW * HEADS, 1, 1)  # a block's columns hold the rank
    assert launch.integers == (HEADS,)
    assert parameters(launch) == ["64"] * 2 + ["32"] + ["64"]


def test_combine_with_sinks(trt):
    free = (BATCH, False)
    shape = [free, (NEW, False), (HEADS, True), (SPLITS, True)]
    inputs = [(trt.float32, [*shape, (RANK, True)]), (trt.float32, shape), (trt.float32, [(HEADS, True)])]
    own = attributes(COMBINE, {"to": onnx.TensorProto.FLOAT})
    outputs, combinations, launches = stand_in.build(f"{NAMESPACE}::{COMBINE}_sinks", inputs, own)
    assert outputs == [((BATCH, NEW, HEADS, RANK), trt.float32, False)]
    assert [tuple(t.name for t in c.types) for c in combinations] == [("FLOAT",) * 4]
    assert parameters(launches[1]) == ["64"] * 3 + ["32"] + ["64"]


def test_features_of_a_layer_are_their_own_kernels(trt):
    """Scales widen the rows, slopes are one more input, and the cap is a constant of the kernel."""
    features = {"softcap": 30.0, "key_scales": GROUPS, "value_scales": HEADS}
    name = f"{PARTIAL}_key_scales_softcap_slopes_value_scales"
    _, combinations, launches = ask_partial(trt, name=name, slopes=("slopes",), **features)
    kinds = {tuple(t.name for t in c.types) for c in combinations}
    assert kinds == {(kind, kind, kind, "INT32", *("FLOAT",) * 3) for kind in ("FLOAT", "HALF", "BF16")}
    bits = struct.pack(">f", 30.0).hex().upper()
    for launch in launches.values():
        assert parameters(launch) == ["64"] * 5 + ["32"] * 3 + ["64"] * 2
        assert f"0f{bits}" in launch.ptx


def test_chunks_are_their_own_kernels(trt):
    """Their length is a constant, as a window's is; the name says that it does not slide."""
    _, _, launches = ask_partial(trt, name=f"{PARTIAL}_chunked", window=20, chunked=1)
    layout, settings = RowLayout(RANK, GROUPS, ROPE), {"window": 20, "chunked": True}
    made = Partial(layout, HEADS, NEW, "bf16", 0.3, SPLITS, **settings)
    assert len(launches) == len(made.tactics(ARCHITECTURE)) > 1
    for tactic, launch in launches.items():
        assert launch.ptx == launchable(made, ARCHITECTURE, tactic).ptx
        assert launch.ptx != launchable(replace(made, chunked=False), ARCHITECTURE, tactic).ptx


def test_append_writes_into_the_cache_it_is_given(trt):
    free, new = (BATCH, False), (NEW, False)
    turns = (trt.float32, [free, new, (GROUPS, True), (ROPE // 2, True)])
    cache = (trt.float16, [free, (1, True), (ROOM, True), (WIDTH, True)])
    inputs = [(trt.float16, [free, new, (WIDTH, True)]), turns, turns, cache, (trt.int32, [free])]
    own = attributes(APPEND, {"latent_rank": RANK})
    outputs, combinations, launches = stand_in.build(f"{NAMESPACE}::{APPEND}", inputs, own)
    assert outputs == [((BATCH, 1, ROOM, WIDTH), trt.float16, True)]
    assert {tuple(t.name for t in c.types) for c in combinations} == {
        (kind, "FLOAT", "FLOAT", kind, "INT32", kind) for kind in ("FLOAT", "HALF", "BF16")
    }
    (launch,) = launches.values()
    assert launch.grid == (NEW, BATCH, 1)
    assert launch.integers == (ROOM, NEW)
    assert parameters(launch) == ["64"] * 5 + ["32"] * 2 + ["64"]


def test_sizes_that_are_not_known_are_refused(trt):
    inputs = [
        (trt.float32, [(BATCH, False)] * 4 + [(RANK, False)]),
        (trt.float32, [(BATCH, False)] * 4),
    ]
    with pytest.raises(ValueError, match="are unknown in a network"):
        stand_in.build(f"{NAMESPACE}::{COMBINE}", inputs, {"to": onnx.TensorProto.FLOAT})


def test_other_architectures_are_refused():
    with pytest.raises(UsageError, match=r"no kernels for compute capability 7\.5\. Use a GPU of one of 8\.0, 8\.6"):
        register(75)


def test_without_tensorrt_there_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(UsageError, match=r"TensorRT cannot be imported .* pip install 'mla-compile\[tensorrt\]'"):
        register(ARCHITECTURE)
