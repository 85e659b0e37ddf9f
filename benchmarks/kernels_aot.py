"""What the kernels cost in registers and shared memory, per architecture and shape: compiled, not run.

Usage: python benchmarks/kernels_aot.py --json benchmarks/kernels_aot.json --markdown benchmarks/kernels_aot.md
    [--only ARCHITECTURES...] [--shapes NAMES...]

With ``--shapes`` the other shapes' rows in ``--json`` are kept.

No GPU is needed. A spill (a thread that stores to memory for want of registers) would double the traffic of its tile:
the default tiles have none, and the command ends with an error if one appears.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import triton

from mla_compile.runtime.kernels import Codes, RowLayout
from mla_compile.runtime.kernels.aot import (
    ARCHITECTURES,
    Compiled,
    compile_append,
    compile_combine,
    compile_decode,
)
from mla_compile.runtime.kernels.schedule import DecodeSpec, choose_tiles

SHAPES = {
    "512+64": (DecodeSpec(RowLayout(512, 1, 64), 32, page=64), "bf16"),
    "512+64, 4 tokens": (DecodeSpec(RowLayout(512, 1, 64), 32, new=4, page=64), "bf16"),
    "512+64, 128 heads": (DecodeSpec(RowLayout(512, 1, 64), 128, page=64), "bf16"),
    "512+64, contiguous": (DecodeSpec(RowLayout(512, 1, 64), 32), "bf16"),
    "512+64, 2 tokens, window, soft-cap": (
        DecodeSpec(RowLayout(512, 1, 64), 32, new=2, page=64, windowed=True, capped=True),
        "bf16",
    ),
    "512+64, 2 tokens, chunks": (
        DecodeSpec(RowLayout(512, 1, 64), 32, new=2, page=64, windowed=True, chunked=True),
        "bf16",
    ),
    **{
        f"{name} {codes}": (DecodeSpec(layout, heads, page=64, codes=codes), "fp16")
        for name, (layout, heads) in {
            "512+64": (RowLayout(512, 1, 64), 32),
            "128+64": (RowLayout(128, 1, 64), 32),
            "96+3x8": (RowLayout(96, 3, 8), 9),
        }.items()
        for codes in Codes
    },
    "96+3x8 float32": (DecodeSpec(RowLayout(96, 3, 8), 9, page=64, itemsize=4), "fp32"),
    "256+32x8": (DecodeSpec(RowLayout(256, 32, 8), 32, page=64), "bf16"),
    "512+8x16": (DecodeSpec(RowLayout(512, 8, 16), 32, page=64), "bf16"),
    "512+8x16, key scales": (DecodeSpec(RowLayout(512, 8, 16, key_scales=8), 32, page=64), "bf16"),
    "128+64": (DecodeSpec(RowLayout(128, 1, 64), 32, page=64), "bf16"),
    "48+3x8": (DecodeSpec(RowLayout(48, 3, 8), 9, page=64), "bf16"),
    "96+3x8": (DecodeSpec(RowLayout(96, 3, 8), 9, page=64), "bf16"),
    "160+5x8": (DecodeSpec(RowLayout(160, 5, 8), 15, page=64), "bf16"),
}
"""Rank + rope groups x rope channels."""
SPLITS = 32


@dataclass(frozen=True)
class Row:
    """One kernel for one architecture.

    Attributes:
        kernel: decode, combine or append.
        shape: Key of :data:`SHAPES`.
        architecture: Compute capability, as 90 for 9.0.
        rows: Rows of a block; 0 where there is no such thing, like the next two.
        keys: Keys of a tile.
        stages: Depth of the load pipeline.
        warps: Groups of 32 threads.
        registers: Of a thread.
        spilled_bytes: Of a thread.
        shared_bytes: Of a block.
    """

    kernel: str
    shape: str
    architecture: int
    rows: int
    keys: int
    stages: int
    warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int


def measure(architecture: int, shape: str) -> list[Row]:
    """Compile the three kernels of one shape."""
    spec, dtype = SHAPES[shape]
    tiles = choose_tiles(spec, architecture)

    def row(kernel: str, found: Compiled, rows: int = 0, keys: int = 0, stages: int = 0) -> Row:
        costs = found.registers, found.spilled_bytes, found.shared_bytes
        return Row(kernel, shape, architecture, rows, keys, stages, found.warps, *costs)

    return [
        row("decode", compile_decode(spec, architecture, dtype), tiles.rows, tiles.keys, tiles.stages),
        row("combine", compile_combine(spec.layout.rank, SPLITS, architecture, dtype)),
        row("append", compile_append(spec, architecture, dtype)),
    ]


def markdown(rows: list[Row]) -> str:
    """The table, the decode kernel first."""
    lines = [
        "# What the kernels cost",
        "",
        f"Compiled by Triton {triton.__version__} and its assembler, without a GPU; nothing here is a time. Written by "
        "`benchmarks/kernels_aot.py`.",
        "",
        "A shape is rank + rope groups x rope channels; 32 heads, or 9 and 15 for the small ones; pages of 64 tokens "
        "unless contiguous. Rows, keys and stages are of the tile that the kernel chooses for the architecture.",
    ]
    for kernel in ("decode", "combine", "append"):
        lines += ["", f"## {kernel}", ""]
        lines += ["| shape | sm | rows | keys | stages | warps | registers | spilled bytes | shared KiB |"]
        lines += ["|---|---|---|---|---|---|---|---|---|"]
        for row in (r for r in rows if r.kernel == kernel):
            cells = (row.shape, row.architecture, row.rows or "", row.keys or "", row.stages or "", row.warps)
            cells += (row.registers, row.spilled_bytes, f"{row.shared_bytes / 1024:.1f}")
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Compile everything and write both files."""
    parser = argparse.ArgumentParser(description="Registers, spills and shared memory of the compiled kernels.")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--markdown", type=Path, required=True)
    parser.add_argument("--only", nargs="*", type=int, default=ARCHITECTURES, help="architectures, as 90 for 9.0")
    parser.add_argument(
        "--shapes", nargs="*", choices=SHAPES, metavar="NAME", help="of these only, beside --json's rows"
    )
    arguments = parser.parse_args()
    rows = []
    if arguments.shapes:
        stored = json.loads(arguments.json.read_text())
        if stored["triton"] != triton.__version__:
            sys.exit(f"--json is of Triton {stored['triton']}, and this is {triton.__version__}: compile all shapes.")
        rows = [Row(**row) for row in stored["rows"] if row["shape"] in SHAPES and row["shape"] not in arguments.shapes]
    for shape in arguments.shapes or SHAPES:
        for architecture in arguments.only:
            begin = time.monotonic()
            found = measure(architecture, shape)
            rows += found
            print(f"{shape:22} sm_{architecture} {found[0]} {time.monotonic() - begin:.1f} s", flush=True)
    rows.sort(key=lambda row: (list(SHAPES).index(row.shape), row.architecture))
    data = {"triton": triton.__version__, "rows": [asdict(row) for row in rows]}
    arguments.json.write_text(json.dumps(data, indent=1) + "\n")
    arguments.markdown.write_text(markdown(rows))
    if spilled := [row for row in rows if row.spilled_bytes]:
        sys.exit("These spill; choose_tiles must give them smaller tiles:\n" + "\n".join(map(str, spilled)))


if __name__ == "__main__":
    main()
