"""Compiled without a GPU for every family of architectures: no spill, and the shared memory that was foretold."""

from __future__ import annotations

import os
import re

import pytest

from mla_compile.runtime.kernels import Codes, RowLayout
from mla_compile.runtime.kernels.schedule import DecodeSpec, choose_tiles, shared_bytes

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from mla_compile.runtime.kernels import aot

# Small: a compilation takes seconds, and longer the wider the rows are. All shapes are in benchmarks/kernels_aot.md.
CASES = {
    80: (DecodeSpec(RowLayout(96, 3, 8), 9, page=64), "fp16"),
    86: (DecodeSpec(RowLayout(64, 1, 32), 8, page=64, codes=Codes.FP8), "fp16"),
    89: (DecodeSpec(RowLayout(64, 1, 32), 8, page=64, codes=Codes.INT8), "fp16"),
    90: (DecodeSpec(RowLayout(96, 3, 8, key_scales=3), 9, new=2, page=64, windowed=True, capped=True), "bf16"),
    100: (DecodeSpec(RowLayout(96, 3, 8), 9, codes=Codes.INT4), "bf16"),
    120: (DecodeSpec(RowLayout(96, 3, 8), 9, page=64), "bf16"),
}


@pytest.mark.parametrize("architecture", CASES)
def test_decode_spills_nothing(architecture):
    spec, dtype = CASES[architecture]
    found = aot.compile_decode(spec, architecture, dtype)
    assert found.spilled_bytes == 0
    assert 0 < found.registers <= 255
    assert found.cubin.startswith(b"\x7fELF")
    assert re.search(rf"\.target sm_{architecture}", found.ptx)
    # What fits is decided before anything is compiled.
    assert 0.8 < found.shared_bytes / shared_bytes(spec, choose_tiles(spec, architecture)) <= 1


def test_what_the_interpreter_takes_compiles_too():
    """Functions that return one type or another are no matter to it; the compiler refuses them."""
    layout = RowLayout(32, 1, 8, key_scales=1, value_scales=1, scaled_rope=True)
    spec = DecodeSpec(layout, 4, new=2, page=64, codes=Codes.INT8)
    assert aot.compile_decode(spec, 90, "fp16", sinks=True, slopes=True, one_split=True).spilled_bytes == 0


def test_chunks_spill_nothing():
    spec = DecodeSpec(RowLayout(96, 3, 8), 9, new=2, windowed=True, chunked=True)
    assert aot.compile_decode(spec, 90, "bf16").spilled_bytes == 0


def test_ptx_is_of_an_isa_that_drivers_know():
    found = aot.compile_combine(96, 7, 90, "bf16")
    assert re.search(r"^\.version 8\.7$", found.ptx, re.MULTILINE)
    assert f".entry {found.name}(" in found.ptx
    # What a launch passes: these, and two pointers to scratch memory that Triton adds.
    entry = found.ptx[found.ptx.index(".entry") :]
    assert entry[: entry.index("\n)")].count(".param") == len(found.parameters) + 2
    assert [name for name, _ in found.parameters] == ["partial", "partial_lse", "output", "lse", "heads", "splits"]


@pytest.mark.parametrize("codes", Codes)
def test_append_spills_nothing(codes):
    spec = DecodeSpec(RowLayout(96, 3, 8, key_scales=3), 9, page=64, codes=codes)
    assert aot.compile_append(spec, 90, "bf16").spilled_bytes == 0
