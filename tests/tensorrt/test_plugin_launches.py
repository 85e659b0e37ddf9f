"""The launches of ``benchmarks/gpu.py`` in the plugins' name: arguments are what kernels declare."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from mla_compile.runtime.kernels import RowLayout
from mla_compile.runtime.tensorrt.cubins import Decode
from mla_compile.runtime.tensorrt.kernels import Kernel, Partial

FILE = Path(__file__).parents[2] / "benchmarks" / "plugin_launches.py"


@pytest.fixture(scope="module")
def launches():
    spec = importlib.util.spec_from_file_location("plugin_launches", FILE)
    sys.modules["plugin_launches"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def declared(kernel):
    """Kinds of a kernel's own parameters: p a pointer, i an integer, f a float."""
    if not isinstance(kernel, Kernel):
        return "".join("p" if kind.startswith("*") else kind[0] for _, kind in kernel.parameters)
    entry = re.search(rf"\.entry {kernel.name}\((.*?)\n\)", kernel.ptx, re.DOTALL)[1]
    return "".join("p" if bits == "64" else "i" for bits in re.findall(r"\.param \.u(\d+)", entry))


class Recorder:
    def __init__(self):
        self.names = []

    def launch(self, kernel, blocks, arguments, stream):
        kinds = {torch.Tensor: "p", int: "i", float: "f"}
        assert "".join(kinds[type(x)] for x in arguments) == declared(kernel)
        assert all(x > 0 for x in blocks)
        assert stream == 0
        self.names.append(kernel.name)


def test_arguments_are_those_declared(launches, monkeypatch):
    layer = launches.Layer(RowLayout(32, 2, 8, 2, 1), 2, new=3, window=9, softcap=2.0, slopes=True, sinks=True)
    monkeypatch.setattr(launches, "LAYERS", (layer,))
    monkeypatch.setattr(launches, "_DTYPES", {"fp16": torch.float16})
    smallest = Partial.tactics
    monkeypatch.setattr(Partial, "tactics", lambda made, architecture: smallest(made, architecture)[-1:])
    recorder = Recorder()
    found = list(launches.errors(recorder, 90, "cpu"))
    pair = ["partial_entry", "combine_entry"]
    assert recorder.names == ["append_entry", *pair, "decode_entry", "decode_entry", "combine_kernel"]
    # Nothing ran, which is an error: rows as they were, and results of NaN.
    assert found[0][2] > 0.1
    assert all(error != error for _, _, error in found[1:])


def test_chunks_take_the_same_arguments(launches, monkeypatch):
    monkeypatch.setattr(launches, "LAYERS", (launches.Layer(RowLayout(32, 1, 8), 2, window=9, chunked=True),))
    monkeypatch.setattr(launches, "_DTYPES", {"fp16": torch.float16})
    for kind in (Partial, Decode):
        tactics = kind.tactics
        monkeypatch.setattr(kind, "tactics", lambda made, architecture, all=tactics: all(made, architecture)[-1:])
    recorder = Recorder()
    assert len([*launches.errors(recorder, 90, "cpu")]) == 4
    assert len(recorder.names) == 6


def test_the_driver_gets_addresses_of_values(launches, monkeypatch):
    calls = []

    def launched(function, *rest):
        *sizes, stream, pointers, extra = rest
        kinds = (ctypes.c_void_p, ctypes.c_int32, ctypes.c_float)
        values = [k.from_address(p).value for k, p in zip(kinds, pointers, strict=True)]
        calls.append((*(s.value for s in sizes), stream.value, *values, extra))
        return 0

    cuda = SimpleNamespace(
        cuModuleLoadData=lambda module, image: calls.append(image) or 0,
        cuModuleGetFunction=lambda function, module, name: calls.append(name) or 0,
        cuFuncSetAttribute=lambda function, attribute, value: calls.append((attribute, value)) or 0,
        cuLaunchKernel=launched,
    )
    monkeypatch.setattr(launches.ctypes, "CDLL", lambda name: cuda)
    tensor, kernel = torch.zeros(1), Kernel("entry", "assembly", 128, 50_000)
    launches.Driver().launch(kernel, (4, 5, 6), (tensor, -7, 0.5), 99)
    assert calls[:3] == [b"assembly\0", b"entry", (8, 50_000)]
    assert calls[3] == (4, 5, 6, 128, 1, 1, 50_000, 99, tensor.data_ptr(), -7, 0.5, None)
    cuda.cuLaunchKernel = lambda *_: 700
    with pytest.raises(RuntimeError, match="cuLaunchKernel fails with error 700"):
        launches.Driver().launch(kernel, (1, 1, 1), (), 0)
