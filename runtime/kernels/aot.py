"""Ahead-of-time compilation of the kernels: no GPU, no driver, no launch; a specification becomes PTX and a cubin.

Who launches a cubin passes :attr:`Compiled.parameters` in order and then two pointers to scratch memory, for which 0
will do, and raises the kernel's limit of dynamic shared memory first where it needs more than 48 KiB.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mla_compile.errors import UsageError
from mla_compile.runtime.kernels.append import append_kernel
from mla_compile.runtime.kernels.codes import Codes
from mla_compile.runtime.kernels.decode import combine_kernel, decode_kernel
from mla_compile.runtime.kernels.schedule import (
    DecodeSpec,
    Tiles,
    append_constants,
    choose_tiles,
    combine_constants,
)

__all__ = [
    "ARCHITECTURES",
    "Compiled",
    "assembler",
    "compile_append",
    "compile_combine",
    "compile_decode",
    "compile_kernel",
]

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
"""A100; RTX 30; RTX 40 and L40; H100 and H200; B200; RTX 50."""
_PTX = 87
"""ISA 8.7, of CUDA 12.8, which knows all these. Triton would stamp its own assembler's, and older drivers refuse it."""
_TYPES = {
    "lengths": "*i32",
    "page_table": "*i32",
    "token_scales": "*fp32",
    "sinks": "*fp32",
    "slopes": "*fp32",
    "lse": "*fp32",
    "partial": "*fp32",
    "partial_lse": "*fp32",
    "cos": "*fp32",
    "sin": "*fp32",
    "scale": "fp32",
    "softcap": "fp32",
}
_BYTES = {Codes.INT8: "*i8", Codes.FP8: "*u8", Codes.INT4: "*u8"}
_ALIGNED = ("latent_page", "latent_row", "rest_page", "rest_row")
"""Strides that are multiples of 16 numbers, as :meth:`LatentCache.empty` allots rows and so pages; pointers are such
multiples of bytes, for which ranks are multiples of 16 where what is behind latents lies in the same memory."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """A kernel for one architecture.

    Attributes:
        name: Entry point.
        architecture: Compute capability, as 90 for 9.0.
        ptx: Assembly, for drivers that know its ISA version.
        cubin: Machine code.
        parameters: Name and type of every parameter.
        warps: Groups of 32 threads of a block.
        shared_bytes: Dynamic shared memory of a block.
        registers: Of a thread.
        spilled_bytes: What a thread stores to memory for want of registers.
    """

    name: str
    architecture: int
    ptx: str
    cubin: bytes
    parameters: tuple[tuple[str, str], ...]
    warps: int
    shared_bytes: int
    registers: int
    spilled_bytes: int


def compile_decode(
    spec: DecodeSpec,
    architecture: int,
    dtype: str,
    *,
    tiles: Tiles | None = None,
    sinks: bool = False,
    slopes: bool = False,
    one_split: bool = False,
) -> Compiled:
    """Compile the decode kernel.

    Args:
        spec: What for.
        architecture: Compute capability.
        dtype: Triton's name for the type of queries and rows: ``fp16``, ``bf16`` or ``fp32``.
        tiles: What one program works on; chosen by default.
        sinks: Whether there are sinks and one split; those of several splits are the combination's.
        slopes: Whether there are slopes.
        one_split: Whether the result itself is written, and not parts of it.
    """
    tiles = tiles or choose_tiles(spec, architecture)
    types = dict.fromkeys(("q_latent", "q_rope", "rest", "latent", "output"), f"*{dtype}")
    types |= {"latent": _BYTES[spec.codes]} if spec.codes else {}
    types |= {} if one_split else {"output": "*fp32"}
    given = {"page_table": spec.page > 0, "token_scales": spec.codes is not None, "sinks": sinks, "slopes": slopes}
    constants = spec.constants(tiles) | {name: None for name, present in given.items() if not present}
    return compile_kernel(decode_kernel, types, constants, architecture, tiles.warps, tiles.stages)


def compile_combine(rank: int, splits: int, architecture: int, dtype: str, *, sinks: bool = False) -> Compiled:
    """Compile the kernel that combines up to so many splits."""
    constants: dict[str, object] = {**combine_constants(rank, splits)}
    constants |= {} if sinks else {"sinks": None}
    return compile_kernel(combine_kernel, {"output": f"*{dtype}"}, constants, architecture, 4, 1)


def compile_append(spec: DecodeSpec, architecture: int, dtype: str) -> Compiled:
    """Compile the kernel that appends rows to the cache which a decode kernel of this specification reads."""
    types = dict.fromkeys(("row", "latent", "rest"), f"*{dtype}") | (
        {"latent": _BYTES[spec.codes]} if spec.codes else {}
    )
    given = {"page_table": spec.page > 0, "token_scales": spec.codes is not None}
    constants: dict[str, object] = {**append_constants(spec.layout, spec.page, spec.codes)}
    constants |= {name: None for name, present in given.items() if not present}
    return compile_kernel(append_kernel, types, constants, architecture, 4, 1)


def compile_kernel(
    kernel: Any,  # noqa: ANN401 - Triton has no types
    types: Mapping[str, str],
    constants: dict[str, object],
    architecture: int,
    warps: int,
    stages: int,
) -> Compiled:
    """Compile any kernel whose parameters have the names of those of the kernels here.

    Args:
        kernel: A function of Triton.
        types: Types by name; of the others, those that these names always have, or else 32-bit integers.
        constants: Compile-time arguments by name.
        architecture: Compute capability, as 90 for 9.0.
        warps: Groups of 32 threads of a block.
        stages: Depth of the load pipeline.
    """
    known = {**dict.fromkeys(kernel.arg_names, "i32"), **_TYPES, **types, **dict.fromkeys(constants, "constexpr")}
    signature = {name: known[name] for name in kernel.arg_names}
    aligned = (n for n in kernel.arg_names if signature[n].startswith("*") or n in _ALIGNED)
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    options = {"num_warps": warps, "num_stages": stages, "ptx_version": _PTX}
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options)
    ptx = compiled.asm["ptx"]
    cubin, registers, spilled = _assemble(ptx, architecture)
    parameters = tuple((name, kind) for name, kind in signature.items() if kind != "constexpr")
    return Compiled(
        compiled.metadata.name,
        architecture,
        ptx,
        cubin,
        parameters,
        warps,
        compiled.metadata.shared,
        registers,
        spilled,
    )


def assembler(architecture: int) -> str:
    """Triton's assembler for a compute capability.

    Raises:
        UsageError: It is not there.
    """
    tools = triton.knobs.nvidia
    try:
        path: str = (tools.ptxas_blackwell if architecture >= 100 else tools.ptxas).path
    except RuntimeError as error:
        raise UsageError(
            "Triton's assembler, ptxas, was not found.", "Install Triton's own wheel: pip install 'mla-compile[cuda]'."
        ) from error
    return path


def _assemble(ptx: str, architecture: int) -> tuple[bytes, int, int]:
    """Machine code, registers and spilled bytes, by Triton's assembler, which tells the last two only to who asks."""
    name = re.search(r"\.target (\w+)", ptx)
    assert name is not None
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        command = [assembler(architecture), "-v", f"--gpu-name={name[1]}", str(source), "-o", str(target)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        used, spilled = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
        assert used is not None
        assert spilled is not None
        return target.read_bytes(), int(used[1]), int(spilled[1])
