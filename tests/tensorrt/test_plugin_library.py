"""The library of C++ plugins: built with g++, and driven through its whole life without TensorRT and without a GPU.

A harness asks what TensorRT would ask; CUDA's driver is a stand-in that prints what is launched. What should be is what
the Python of the kernels' schedule says.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from mla_compile.cli import main
from mla_compile.runtime.kernels.cache import RowLayout
from mla_compile.runtime.kernels.schedule import Tiles, choose_splits, choose_tiles, combine_constants
from mla_compile.runtime.onnx_variant import DOMAIN, VERSION, Variant
from mla_compile.runtime.tensorrt.functions import APPEND, DECODE, OPSET, PLUGIN, function

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from mla_compile.runtime.kernels import aot
from mla_compile.runtime.tensorrt import source
from mla_compile.runtime.tensorrt.cubins import SPLITS, Combination, Decode
from mla_compile.runtime.tensorrt.kernels import Append
from mla_compile.runtime.tensorrt.nodes import read_nodes
from mla_compile.runtime.tensorrt.source import kernel_tables

HERE = Path(__file__).parent
HEADERS = HERE / "headers"
ARCHITECTURE, PROCESSORS = 90, 132
HEADS, RANK, GROUPS, ROPE = 9, 32, 2, 8
WIDTH = RANK + GROUPS * ROPE
LAYOUT = RowLayout(RANK, GROUPS, ROPE)
KIND = Decode(LAYOUT, HEADS, "bf16")
SINKS = Decode(LAYOUT, HEADS, "bf16", slopes=True, sinks=True)
CHUNKS = Decode(LAYOUT, HEADS, "bf16", windowed=True, chunked=True)
ATTRIBUTES = {"rope_groups": GROUPS, "softcap": 0.0, "chunked": 0, "key_scales": 0, "value_scales": 0, "scaled_rope": 0}
# Quickly compiled; the first needs more than 48 KiB of shared memory, which a launch may have only if it asks for it.
TACTICS = Tiles((32,), 16, 16, 256, 4, 3), Tiles((32,), 16, 16, 16, 4, 2)
SCALE = 0.25
FLOAT, INT32, BF16 = 0, 3, 7
"""Of nvinfer1::DataType."""
OUTPUT, WORKSPACE, STREAM = 1 << 20, 1 << 21, 7
INPUTS = [4096 * i for i in range(1, 7)]


def tactics(kind):
    """Fewer for the kinds that are there for their two inputs and for their chunks."""
    return TACTICS[1:] if kind.sinks or kind.chunked else TACTICS


def write_nodes(path, dtype=TensorProto.BFLOAT16, *, windows=(0,), heads=HEADS, sinks=False, chunk=0, decodes=True):
    """A file whose graph is nodes alone."""
    shapes = {
        "row": (dtype, ["B", "S", WIDTH]),
        "cos": (TensorProto.FLOAT, ["B", "S", GROUPS, ROPE // 2]),
        "sin": (TensorProto.FLOAT, ["B", "S", GROUPS, ROPE // 2]),
        "cache": (dtype, ["B", 1, "T", WIDTH]),
        "lengths": (TensorProto.INT32, ["B"]),
        "q_latent": (dtype, ["B", "S", heads, RANK]),
        "q_rope": (dtype, ["B", "S", heads, ROPE]),
        "slopes": (TensorProto.FLOAT, [heads]),
        "sinks": (TensorProto.FLOAT, [heads]),
    }
    made = [(APPEND, Variant(), ["row", "cos", "sin", "cache", "lengths"], ["kept"], {"latent_rank": RANK})]
    queries = ["q_latent", "q_rope", "kept", "lengths"]
    for i, window in enumerate(windows if decodes else ()):
        own = {**ATTRIBUTES, "scale": SCALE, "window": window, "has_slopes": 0, "has_sinks": 0}
        made.append((DECODE, Variant(), queries, [f"context{i}"], own))
        if sinks:
            own = own | {"has_slopes": 1, "has_sinks": 1}
            variant = Variant(slopes=True, sinks=True)
            made.append((DECODE, variant, [*queries, "slopes", "sinks"], [f"sink_context{i}"], own))
        if chunk:
            own = own | {"window": chunk, "chunked": 1, "has_slopes": 0, "has_sinks": 0}
            made.append((DECODE, Variant(chunked=True), queries, [f"chunk_context{i}"], own))
    graph = helper.make_graph(
        [helper.make_node(v.named(op), i, o, domain=DOMAIN, **own, **PLUGIN) for op, v, i, o, own in made],
        "nodes",
        [helper.make_tensor_value_info(name, *shape) for name, shape in shapes.items()],
        [helper.make_tensor_value_info(o, dtype, None) for *_, (o,), _ in made],
    )
    functions = [function(op, variant) for op, variant in dict.fromkeys((op, v) for op, v, *_ in made)]
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    onnx.save(helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=10), path)
    return path


def build(files, out, *more):
    command = ["build-plugin", *map(str, files), "--tensorrt-include", str(HEADERS), "--out", str(out), "--quiet"]
    return main([*command, "--architecture", str(ARCHITECTURE), *more])


COMPILED = []


def remembering(compile):
    """The same, but every kernel is compiled once, and known thereafter."""

    @functools.cache
    def compile_once(*arguments, **more):
        COMPILED.append(compile(*arguments, **more))
        return COMPILED[-1]

    return compile_once


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A library, a harness, and the stand-in for the driver; kernels are compiled once, and only two tactics."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    folder = tmp_path_factory.mktemp("library")
    with pytest.MonkeyPatch.context() as patched:
        for kind in (Decode, Combination, Append):
            patched.setattr(kind, "compile", remembering(kind.compile))
        patched.setattr(Decode, "tactics", lambda self, architecture: tactics(self))
        assert build([write_nodes(folder / "nodes.onnx", sinks=True, chunk=30)], folder / "libmla_plugin.so") == 0
        for source, options, target in (
            ("stub_cuda.cpp", ("-shared", "-fPIC"), "libcuda.so.1"),
            ("harness.cpp", (), "harness"),
        ):
            command = ["g++", "-std=c++17", *options, f"-isystem{HEADERS}", str(HERE / "cpp" / source)]
            subprocess.run([*command, "-o", str(folder / target), "-ldl"], check=True)
        yield folder


def letters(compiled):
    """Types of a kernel's parameters, as the stand-in takes them."""
    return "".join("p" if kind.startswith("*") else {"i32": "i", "fp32": "f"}[kind] for _, kind in compiled.parameters)


def drive(folder, *scenarios, library="libmla_plugin.so", **stub):
    """What the harness and the driver print for each scenario and afterwards, and what is said on standard error."""
    parameters = " ".join(f"{digest(x.cubin)}={letters(x)}" for x in COMPILED)
    device = {"STUB_ARCHITECTURE": str(ARCHITECTURE), "STUB_PROCESSORS": str(PROCESSORS), "STUB_PARAMETERS": parameters}
    environment = os.environ | {"LD_LIBRARY_PATH": str(folder)} | device | stub
    lines = "".join(" ".join(map(str, scenario)) + "\n" for scenario in scenarios)
    command = [folder / "harness", folder / library]
    done = subprocess.run(command, input=lines, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    ends = [i + 1 for i, event in enumerate(events) if event["event"] == "end"]
    assert len(ends) == len(scenarios)
    lives = [events[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    return SimpleNamespace(lives=lives, after=events[ends[-1] :], said=done.stderr)


def decode(new, tactic, splits, kind=KIND):
    """The kernel that attends, as Python compiles it."""
    several = choose_tiles(KIND.spec(2), ARCHITECTURE)
    tiles = tactics(kind)[tactic - 1] if new == 1 else several
    return kind.compile(min(new, 2), tiles, ARCHITECTURE, direct=splits == 1)


def padded(splits):
    return min(s for s in SPLITS if s >= splits)


@functools.cache
def digest(cubin):
    """FNV-1a, as the stand-in computes it."""
    found = 0xCBF29CE484222325
    for byte in cubin:
        found = (found ^ byte) * 0x100000001B3 % 2**64
    return found


def attend(batch=2, new=1, room=4096, tactic=1, *, kind=KIND, heads=HEADS, window=0, aligned=1):
    return kind.name, BF16, batch, new, room, heads, RANK, ROPE, GROUPS, SCALE, window, tactic, aligned


def append(batch=2, new=3, room=128, *, in_place=1, aligned=1):
    return APPEND, BF16, batch, new, room, RANK, GROUPS, ROPE, in_place, aligned


def only(events, kind):
    return [event for event in events if event["event"] == kind]


def launched(compiled, grid, arguments):
    """A launch, as the stand-in prints it."""
    return {
        "event": "launch",
        "name": compiled.name,
        "digest": digest(compiled.cubin),
        "grid": [*grid],
        "block": [32 * compiled.warps, 1, 1],
        "shared": compiled.shared_bytes,
        "stream": STREAM,
        "arguments": arguments,
    }


def expected_attention(batch, new, room, tactic, kind=KIND, window=0):
    """Launches of one step, and bytes of workspace that they use."""
    rows = new * HEADS
    spec = KIND.spec(new)
    tiles = tactics(kind)[tactic - 1] if new == 1 else choose_tiles(KIND.spec(2), ARCHITECTURE)
    blocks = -(-rows // tiles.rows)
    splits = choose_splits(batch, blocks, rows, room, PROCESSORS)
    parts = 0 if splits == 1 else 4 * batch * rows * splits * RANK
    output, lse = OUTPUT if splits == 1 else WORKSPACE, WORKSPACE + -(-parts // 16) * 16
    slopes, sinks = [INPUTS[4]] * kind.slopes, [INPUTS[5]] * kind.sinks
    numbers = SCALE, 0, room, new, HEADS, window, splits, spec.least_tiles(tiles)
    first = launched(
        decode(new, tactic, splits, kind),
        (blocks, splits, batch),
        [*INPUTS[:4], *slopes, output, lse, *(sinks if splits == 1 else []), *numbers],
    )
    used = lse - WORKSPACE + 4 * batch * rows * splits
    if splits == 1:
        return [first], used
    columns = combine_constants(RANK, padded(splits))["COLUMNS"]
    combination = kind.combination.compile(padded(splits), ARCHITECTURE)
    grid = batch * rows, -(-RANK // columns), 1
    return [first, launched(combination, grid, [output, lse, *sinks, OUTPUT, HEADS, splits])], used


def test_life_of_attention(built):
    life = drive(built, attend()).lives[0]
    creator, build, shape, formats, configured, fields = life[:6]
    assert creator["kind"] == "PLUGIN CREATOR_V3ONE"
    assert (creator["namespace"], creator["version"], creator["attributes"]) == (DOMAIN, "1", len(ATTRIBUTES) + 4)
    assert (build["outputs"], build["type"], build["aliased"]) == (1, BF16, -1)
    assert shape["axes"] == [1, 2, 3, 4]  # those of the folded queries
    assert formats["types"] == [[BF16], [BF16], [BF16], [INT32], [BF16]]
    assert configured["tactics"] == [1, 2]
    given = {"scale": SCALE, "window": 0, "has_slopes": 0, "has_sinks": 0}
    assert fields == {"event": "fields", **ATTRIBUTES, **given}
    assert life[-1]["done"]


@pytest.mark.parametrize("room", [100, 4096], ids=["one split", "several"])
def test_slopes_and_sinks_are_two_more_inputs(built, room):
    """Sinks count once: in the only split, or where splits are combined."""
    (life,) = drive(built, attend(room=room, kind=SINKS)).lives
    assert only(life, "formats")[0]["types"] == [[BF16], [BF16], [BF16], [INT32], [FLOAT], [FLOAT], [BF16]]
    assert only(life, "launch") == expected_attention(2, 1, room, 1, SINKS)[0]


@pytest.mark.parametrize("new", [1, 3])
def test_chunks_are_a_window_that_other_kernels_take(built, new):
    """Of any length: it is a parameter, as a window's is."""
    lives = drive(built, *(attend(new=new, kind=CHUNKS, window=length) for length in (30, 8192))).lives
    for life, length in zip(lives, (30, 8192), strict=True):
        assert only(life, "fields")[0] | {"window": length, "chunked": 1} == only(life, "fields")[0]
        assert only(life, "launch") == expected_attention(2, new, 4096, 1, CHUNKS, length)[0]


def test_launches_are_those_of_the_schedule(built):
    """Prompts and steps, of few and many sequences, to short and long caches; splits of every padded size, and one."""
    shapes = [
        (batch, new, room, tactic)
        for batch in (1, 3, 40)
        for new, tactic in ((1, 1), (1, 2), (2, 1), (50, 1))
        for room in (100, 1000, 5000, 100_000)
    ]
    splits = set()
    for shape, life in zip(shapes, drive(built, *(attend(*s) for s in shapes)).lives, strict=True):
        launches, used = expected_attention(*shape)
        assert only(life, "launch") == launches
        (configured,) = only(life, "configured")
        assert used <= configured["workspace"]
        splits.add(padded(launches[0]["grid"][1]) if len(launches) > 1 else 1)
    assert splits >= {1, *SPLITS}


def test_nothing_but_launches_happens_while_an_engine_runs(built):
    """What a CUDA graph captures: neither loading nor waiting."""
    for life in drive(built, attend(), append(), append(in_place=0)).lives:
        begin = next(i for i, event in enumerate(life) if event["event"] == "enqueue")
        assert {event["event"] for event in life[begin + 1 :]} <= {"launch", "copy", "end"}
        assert all(event["stream"] == STREAM for event in life[begin + 1 : -1])


def test_layers_share_kernels_and_leave_none_behind(built):
    run = drive(built, attend(), append(), attend(), append(), attend(room=100))
    loads = [event["digest"] for life in run.lives for event in only(life, "load")]
    # Parts, their combination, appending; and a result in one split.
    assert len(loads) == len({*loads}) == 4
    assert run.after == [{"event": "unload"}] * 4


def test_life_of_appending(built):
    life = drive(built, append()).lives[0]
    creator, build, shape, formats, configured, fields = life[:6]
    assert (creator["namespace"], creator["version"], creator["attributes"]) == (DOMAIN, "1", 1)
    assert (build["outputs"], build["type"], build["aliased"]) == (1, BF16, 3)
    assert shape["axes"] == [31, 32, 33, 34]  # the cache's
    assert formats["types"] == [[BF16], [FLOAT], [FLOAT], [BF16], [INT32], [BF16]]
    assert (configured["workspace"], configured["tactics"]) == (0, [])
    assert fields == {"event": "fields", "latent_rank": RANK}
    compiled = Append(LAYOUT, "bf16").compile(ARCHITECTURE)
    assert life[-2:] == [
        launched(compiled, (3, 2, 1), [*INPUTS[:5], 128, 3, INPUTS[3]]),
        {"event": "end", "done": True},
    ]


def test_a_cache_that_is_not_written_in_place_is_copied_first(built):
    """TensorRT gives the output memory of its own unless a preview feature is on."""
    copy, launch = drive(built, append(in_place=0)).lives[0][-3:-1]
    assert copy == {"event": "copy", "to": OUTPUT, "from": INPUTS[3], "bytes": 2 * 128 * WIDTH * 2, "stream": STREAM}
    assert launch["arguments"][-1] == OUTPUT


def test_much_shared_memory_is_asked_for(built):
    """Where a kernel needs more than 48 KiB, and only there."""
    kernels = {digest(k.cubin): k.shared_bytes for k in (decode(1, 1, 9), decode(1, 2, 9))}
    assert min(kernels.values()) < 48 * 1024 < max(kernels.values())
    for life in drive(built, attend(tactic=1), attend(tactic=2)).lives:
        needed = kernels[only(life, "load")[0]["digest"]]
        allowed = [{"event": "allow", "attribute": 8, "value": needed}] if needed > 48 * 1024 else []
        assert only(life, "allow") == allowed


@pytest.mark.parametrize(
    ("scenario", "stub", "sentence"),
    [
        (
            attend(),
            {"STUB_ARCHITECTURE": "75"},
            "no LatentAttentionDecode kernel for bfloat16 .* compute capability 7.5",
        ),
        (attend(heads=4), {}, "no LatentAttentionDecode kernel for bfloat16 queries of 4 heads, rank 32"),
        (
            attend(window=20),
            {},
            "no LatentAttentionDecode kernel for .* 9 heads, rank 32, 2 rope keys of 8, .* in a window",
        ),
        (
            attend(kind=CHUNKS, heads=4, window=20),
            {},
            "no LatentAttentionDecode_chunked kernel for bfloat16 queries of 4 heads, .* in chunks",
        ),
        (
            append(),
            {"STUB_ARCHITECTURE": "80"},
            "no LatentAppend kernel for bfloat16 rows of rank 32 .* capability 8.0",
        ),
        (attend(aligned=0), {}, "a tensor of LatentAttentionDecode is not aligned to 16 bytes"),
        (append(aligned=0), {}, "a tensor of LatentAppend is not aligned to 16 bytes"),
        (attend(), {"STUB_FAILING": "cuCtxGetDevice"}, "cuCtxGetDevice failed with CUDA error 999"),
        (attend(), {"STUB_FAILING": "cuModuleLoadData"}, "cuModuleLoadData failed"),
        (attend(), {"STUB_FAILING": "cuLaunchKernel"}, "cuLaunchKernel failed"),
        (append(in_place=0), {"STUB_FAILING": "cuMemcpyDtoDAsync_v2"}, "cuMemcpyDtoDAsync failed"),
    ],
)
def test_what_goes_wrong_is_said_and_reported_to_tensorrt(built, scenario, stub, sentence):
    (life,) = drive(built, scenario, **stub).lives
    assert not life[-1]["done"]
    messages = [event["message"] for event in only(life, "log") if event["severity"] == 1]
    assert re.search(f"^mla_compile: .*{sentence}", "\n".join(messages)), life


def test_without_a_logger_it_speaks_to_standard_error_and_lives_on(registering):
    """It says so while it is opened, where it finds no TensorRT to register with."""
    run = drive(registering.parent, attend(), library=registering.name)
    assert re.fullmatch("mla_compile: no TensorRT 11, for which this plugin library was built, is loaded.*\n", run.said)
    assert run.lives[0][-1]["done"]


@pytest.fixture(scope="module")
def registering(built):
    """A library that registers itself when it is opened."""
    path = built / "libmla_registering.so"
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert build([built / "nodes.onnx"], path, "--self-registering", "--json") == 0
    (built / "said.json").write_text(said.getvalue())
    return path


def test_json_is_one_object_and_nothing_else(registering):
    said = json.loads((registering.parent / "said.json").read_text())
    assert said == {"library": str(registering), "self_registering": True}


@pytest.fixture(scope="module")
def lean():
    """TensorRT's own registry, called by its Python."""
    return pytest.importorskip("tensorrt_lean", reason="TensorRT's registry is not installed: .[tensorrt-test]")


def test_the_real_registry_loads_it(built, lean):
    """The interfaces are TensorRT's: its registry and bindings call the plugin."""
    registry = lean.get_plugin_registry()
    assert registry.load_library(str(built / "libmla_plugin.so"))
    creators = {name: registry.get_creator(name, "1", DOMAIN) for name in (APPEND, DECODE, SINKS.name, CHUNKS.name)}
    for name, creator in creators.items():
        fields = {field.name for field in creator.field_names}
        assert fields == {*function(name.split("_")[0]).attribute} - {"plugin_namespace", "plugin_version"}
    kind = lean.PluginFieldType
    numbers = {**ATTRIBUTES, "scale": SCALE, "window": 0, "has_slopes": 0, "has_sinks": 0}
    types = {float: (np.float32, kind.FLOAT32), int: (np.int32, kind.INT32)}
    fields = []
    for name, number in numbers.items():
        dtype, field_type = types[type(number)]
        fields.append(lean.PluginField(name, np.array([number], dtype), field_type))
    given = lean.PluginFieldCollection(fields)
    plugin = creators[DECODE].create_plugin("x", given, lean.TensorRTPhase.BUILD)
    asked = plugin.get_capability_interface(lean.PluginCapabilityType.BUILD)
    core = plugin.get_capability_interface(lean.PluginCapabilityType.CORE)
    assert (core.plugin_name, core.plugin_namespace, core.plugin_version) == (DECODE, DOMAIN, "1")
    assert (asked.interface_info.kind, asked.interface_info.major) == ("PLUGIN_V3ONE_BUILD", 2)
    # The fifth, tenth and eleventh of the functions, and the ninth: their places are right.
    assert (asked.num_outputs, asked.format_combination_limit, asked.metadata_string) == (1, 100, None)
    assert re.fullmatch(rf"[0-9a-f]{{16}}_{GROUPS}_{np.float32(SCALE).view(np.uint32)}(_0){{8}}", asked.timing_cache_id)


REGISTERED = """
import ctypes, sys
import tensorrt_lean

registry = tensorrt_lean.get_plugin_registry()
ctypes.CDLL(sys.argv[1])
print(*(creator.name for creator in registry.all_creators if creator.plugin_namespace == sys.argv[2]))
"""


def test_it_registers_itself_in_the_real_registry(registering, lean):
    """In a process where nothing else has."""
    command = [sys.executable, "-c", REGISTERED, str(registering), DOMAIN]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert sorted(done.stdout.split()) == sorted([APPEND, DECODE, SINKS.name, CHUNKS.name])


def test_kernels_that_serve_two_purposes_are_there_once(monkeypatch):
    """In float32 parts and results are of one type."""
    compiled = []
    monkeypatch.setattr(Decode, "tactics", lambda self, architecture: (choose_tiles(self.spec(1), architecture),))

    def fake(kind):
        def compile(self, *arguments, **more):
            compiled.append((kind, *arguments, *more.items()))
            cubin = repr((self, arguments, more)).encode()
            return SimpleNamespace(name="kernel", cubin=cubin, warps=4, shared_bytes=1024)

        return compile

    for kind in (Decode, Combination, Append):
        monkeypatch.setattr(kind, "compile", fake(kind))
    layout = RowLayout(48, 3, 8)
    nodes = {Decode(layout, 9, "fp32", windowed=True), Append(layout, "fp32")}
    text = kernel_tables(nodes, [80, 90])
    assert len(re.findall(r"kIMAGE_\d+\[\]", text)) == len({*compiled}) == 2 * (2 + len(SPLITS) + 1)
    assert "{80, DataType::kFLOAT, 48, 3, 8, 0, 0, 9, false, true, false, false, false, false, 1, {{16, 16, " in text


def test_times_are_of_one_host_code(tmp_path, monkeypatch):
    """A timing cache knows a build by this name, and the host's code is part of what was timed."""
    names = []
    for text in ("launch", "launch", "launch twice"):
        (tmp_path / "plugin.cpp").write_text(text)
        monkeypatch.setattr(source, "PLUGIN_SOURCE", tmp_path / "plugin.cpp")
        names += re.findall(r'kBUILD_ID\[\] = "(\w{16})"', kernel_tables((), ()))
    assert names[0] == names[1] != names[2]


def test_nodes_of_a_file(tmp_path):
    path = write_nodes(tmp_path / "nodes.onnx", TensorProto.FLOAT16, windows=(0, 30, 40))
    decodes = {Decode(LAYOUT, HEADS, "fp16", windowed=windowed) for windowed in (False, True)}
    assert read_nodes(path) == {Append(LAYOUT, "fp16"), *decodes}
    assert read_nodes(write_nodes(path, sinks=True, chunk=7)) == {Append(LAYOUT, "bf16"), KIND, SINKS, CHUNKS}


def test_nodes_of_a_lowered_model(lowered):
    case = lowered("llama-gqa", splits=None)
    assert {n.layout.rank + n.layout.rest_width for n in read_nodes(case.path)} == {*case.model.rows}


def refused(capsys, code, sentence, *command):
    assert main(["build-plugin", *map(str, command)]) == code
    assert re.search(f"^mla-compile: {sentence}", capsys.readouterr().err)


def test_files_that_it_cannot_be_built_from_are_refused(tmp_path, capsys):
    more = "--tensorrt-include", HEADERS, "--out", tmp_path / "x.so"
    quick = write_nodes(tmp_path / "quick.onnx", decodes=False)
    refused(capsys, 3, f"'{quick}' holds no LatentAttentionDecode nodes, .* --plugin cpp", quick, *more)
    refused(capsys, 2, "There is no file 'absent.onnx'. Write it with: mla-compile tensorrt", "absent.onnx", *more)
    (tmp_path / "text.onnx").write_text("text")
    refused(capsys, 2, "'.*text.onnx' cannot be read as ONNX", tmp_path / "text.onnx", *more)
    unknown = write_nodes(tmp_path / "nodes.onnx", heads="H")
    refused(capsys, 2, "'.*nodes.onnx' does not say what shape or type", unknown, *more)
    assert {path.name for path in tmp_path.iterdir()} == {"quick.onnx", "text.onnx", "nodes.onnx"}


class WithoutAssembler:
    """Settings of a Triton that is not from its wheel."""

    @property
    def ptxas(self):
        raise RuntimeError("Cannot find ptxas")


def test_what_is_missing_is_named(tmp_path, capsys, monkeypatch):
    path, out = write_nodes(tmp_path / "nodes.onnx"), tmp_path / "x.so"
    more = "--tensorrt-include", HEADERS, "--out", out
    refused(capsys, 2, "'x.dll' is not named like a shared library", path, *more[:3], "x.dll")
    refused(
        capsys,
        2,
        "'.*' does not hold NvInferRuntime.h. Give --tensorrt-include",
        path,
        "--tensorrt-include",
        tmp_path,
        *more[2:],
    )
    refused(
        capsys, 2, "'.*' does not hold cuda_runtime_api.h. Give --cuda-include", path, *more, "--cuda-include", tmp_path
    )
    refused(
        capsys,
        2,
        r"There are no kernels for compute capability 7.5. Choose some of 80, 86",
        path,
        *more,
        "--architecture",
        75,
    )
    with monkeypatch.context() as patched:
        patched.setattr("importlib.util.find_spec", lambda name: None)
        refused(capsys, 2, r"Triton, which compiles the kernels, is not installed. Run: pip install", path, *more)
    with monkeypatch.context() as patched:
        patched.setattr(aot, "triton", SimpleNamespace(knobs=SimpleNamespace(nvidia=WithoutAssembler())))
        refused(capsys, 2, "Triton's assembler, ptxas, was not found. Install Triton's own wheel", path, *more)
    with monkeypatch.context() as patched:
        patched.setattr("shutil.which", lambda name: None)
        refused(capsys, 2, r"g\+\+, which compiles the plugins, was not found. Install it", path, *more)
    out.write_text("")
    refused(capsys, 2, "'.*x.so' exists already", path, *more)
    assert {path.name for path in tmp_path.iterdir()} == {"nodes.onnx", "x.so"}


def test_headers_that_do_not_fit_leave_nothing_behind(tmp_path, capsys, monkeypatch):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    monkeypatch.setattr("mla_compile.runtime.tensorrt.source.kernel_tables", lambda nodes, architectures: "")
    (tmp_path / "NvInferRuntime.h").write_text("#error too old\n")
    path, out = write_nodes(tmp_path / "nodes.onnx"), tmp_path / "x.so"
    sentence = r"g\+\+ could not compile the plugins \(.*too old.*\). Use the headers of TensorRT 10.3"
    refused(capsys, 2, sentence, path, "--tensorrt-include", tmp_path, "--out", out)
    assert {path.name for path in tmp_path.iterdir()} == {"nodes.onnx", "NvInferRuntime.h"}
