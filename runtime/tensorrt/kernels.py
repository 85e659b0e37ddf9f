"""From a plugin's sizes to the kernels TensorRT can choose among: assembly, blocks and threads; no TensorRT, no GPU."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, replace

from mla_compile.runtime.kernels.aot import Compiled, compile_kernel
from mla_compile.runtime.kernels.cache import RowLayout
from mla_compile.runtime.kernels.schedule import (
    DecodeSpec,
    Tiles,
    append_constants,
    choose_tiles,
    combine_constants,
    shared_bytes,
)
from mla_compile.runtime.tensorrt.entries import append_entry, combine_entry, partial_entry

__all__ = ["Append", "Combine", "Kernel", "Partial", "launchable", "launchable_ptx"]

_SAFE_SHARED = 48 * 1024
"""Bytes of dynamic shared memory that every launch may have; whether TensorRT asks for more is not documented."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """What TensorRT is given to launch.

    Attributes:
        name: Entry point.
        ptx: Assembly, whose parameters are inputs, 32-bit integers and outputs, and nothing else.
        threads: Of a block.
        shared_bytes: Dynamic shared memory of a block.
    """

    name: str
    ptx: str
    threads: int
    shared_bytes: int


@dataclass(frozen=True, slots=True)
class Partial:
    """One ``LatentAttentionPartial``; axes are named as in :mod:`mla_compile.runtime.tensorrt.functions`.

    Attributes:
        layout: What a row holds.
        heads: ``H``.
        new: ``S``, or 0 if it is not known before an engine runs.
        dtype: Triton's name for the type of queries and rows: ``fp16``, ``bf16`` or ``fp32``.
        scale: Factor of the dot products.
        splits: ``P``.
        window: How many keys a query sees; 0 for all.
        softcap: Bound of the logits; 0 for none.
        slopes: Whether logits fall with distance.
        chunked: Whether the window does not slide (only beside ``window``).
    """

    layout: RowLayout
    heads: int
    new: int
    dtype: str
    scale: float
    splits: int
    window: int = 0
    softcap: float = 0.0
    slopes: bool = False
    chunked: bool = False

    @property
    def spec(self) -> DecodeSpec:
        """What the decode kernel is compiled for."""
        itemsize = 4 if self.dtype == "fp32" else 2
        # Two tokens stand for any number: what is compiled for several computes one too.
        return DecodeSpec(
            self.layout,
            self.heads,
            self.new or 2,
            itemsize,
            windowed=self.window > 0,
            capped=self.softcap > 0,
            chunked=self.chunked,
        )

    def tactics(self, architecture: int) -> tuple[Tiles, ...]:
        """Tiles to choose among by time: all of 48 KiB or less, or where none is so small the schedule's own.

        Args:
            architecture: Compute capability, as 90 for 9.0.

        Raises:
            ValueError: A row is too wide for any tile.
        """
        spec = self.spec
        best = choose_tiles(spec, architecture)
        smaller = (replace(best, rows=16, keys=keys, warps=4, stages=stages) for keys in (32, 16) for stages in (3, 2))
        fitting = [t for t in (best, *smaller) if shared_bytes(spec, t) <= _SAFE_SHARED]
        return tuple(dict.fromkeys(fitting)) or (best,)

    def constants(self, tiles: Tiles) -> dict[str, object]:
        """The kernel's compile-time arguments."""
        made = self.spec.constants(tiles)
        own = {
            "SCALE": self.scale,
            "SOFTCAP": self.softcap,
            "WINDOW": self.window,
            "SPLITS": self.splits,
            "LEAST_TILES": self.spec.least_tiles(tiles),
        }
        return {name: made[name] for name in partial_entry.arg_names if name in made} | own

    def compile(self, tiles: Tiles, architecture: int) -> Compiled:
        """Compile for these tiles."""
        types = dict.fromkeys(("q_latent", "q_rope", "rows"), f"*{self.dtype}")
        constants = self.constants(tiles) | ({} if self.slopes else {"slopes": None})
        return compile_kernel(partial_entry, types, constants, architecture, tiles.warps, tiles.stages)


@dataclass(frozen=True, slots=True)
class Combine:
    """One ``LatentAttentionCombine``.

    Attributes:
        rank: ``r``.
        splits: ``P``.
        dtype: Triton's name for the type of the result.
        sinks: Whether the softmax has a further logit per head.
    """

    rank: int
    splits: int
    dtype: str
    sinks: bool = False

    @property
    def constants(self) -> dict[str, int]:
        """The kernel's compile-time arguments."""
        return combine_constants(self.rank, self.splits) | {"PARTS": self.splits}

    @property
    def blocks_per_row(self) -> int:
        """How many blocks share the columns of a row."""
        return -(-self.rank // self.constants["COLUMNS"])

    def compile(self, architecture: int) -> Compiled:
        """Compile."""
        constants: dict[str, object] = {**self.constants, **({} if self.sinks else {"sinks": None})}
        return compile_kernel(combine_entry, {"output": f"*{self.dtype}"}, constants, architecture, 4, 1)


@dataclass(frozen=True, slots=True)
class Append:
    """One ``LatentAppend``.

    Attributes:
        layout: What a row holds; how many of its scales are keys' is of no account.
        dtype: Triton's name for the type of rows.
    """

    layout: RowLayout
    dtype: str

    @property
    def constants(self) -> dict[str, object]:
        """The kernel's compile-time arguments."""
        made = append_constants(self.layout, 0)
        return {name: made[name] for name in append_entry.arg_names if name in made}

    def compile(self, architecture: int) -> Compiled:
        """Compile."""
        types = dict.fromkeys(("row", "rows", "output"), f"*{self.dtype}")
        return compile_kernel(append_entry, types, {**self.constants}, architecture, 4, 1)


@functools.cache
def launchable(made: Partial | Combine | Append, architecture: int, tactic: int = 1) -> Kernel:
    """Compile a plugin's kernel in the form that TensorRT launches.

    Args:
        made: The plugin's sizes.
        architecture: Compute capability, as 90 for 9.0.
        tactic: Which of a ``Partial``'s tiles, counted from 1.
    """
    if isinstance(made, Partial):
        compiled = made.compile(made.tactics(architecture)[tactic - 1], architecture)
    else:
        compiled = made.compile(architecture)
    ptx = launchable_ptx(compiled.ptx, compiled.name, len(compiled.parameters))
    return Kernel(compiled.name, ptx, 32 * compiled.warps, compiled.shared_bytes)


def launchable_ptx(ptx: str, name: str, parameters: int) -> str:
    """Take from a kernel the parameters that Triton adds to its own: pointers to scratch memory it does not use.

    Args:
        ptx: Assembly.
        name: Entry point.
        parameters: How many are its own.

    Raises:
        ValueError: The kernel has fewer parameters, or uses one that would be taken away.
    """
    entry = re.search(rf"\.entry {re.escape(name)}\((.*?)\n\)", ptx, re.DOTALL)
    declared = [line.strip().rstrip(",") for line in entry[1].strip().splitlines()] if entry else []
    if entry is None or len(declared) < parameters:
        raise ValueError(
            f"{name} has {len(declared)} parameters, not {parameters} or more. Pass the PTX of that kernel."
        )
    body = ptx[entry.end() :]
    for place in range(parameters, len(declared)):
        if re.search(rf"\b{re.escape(name)}_param_{place}\b", body):
            raise ValueError(f"{name} uses scratch memory, which TensorRT does not give. Compile it without.")
    kept = ",\n\t".join(declared[:parameters])
    return f"{ptx[: entry.start(1)]}\n\t{kept}{ptx[entry.end(1) :]}"
