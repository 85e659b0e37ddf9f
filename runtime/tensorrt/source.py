"""Kernels as C++: byte arrays of machine code, and the tables in which ``plugin.cpp`` looks them up."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable
from pathlib import Path

from mla_compile.runtime.kernels.aot import Compiled
from mla_compile.runtime.kernels.schedule import TOKENS_PER_ROW, Tiles, choose_tiles, combine_constants
from mla_compile.runtime.tensorrt.cubins import SPLITS, Combination, Decode
from mla_compile.runtime.tensorrt.functions import NAMESPACE, PLUGIN
from mla_compile.runtime.tensorrt.kernels import Append

__all__ = ["PLUGIN_SOURCE", "TABLES", "kernel_tables"]

PLUGIN_SOURCE = Path(__file__).with_name("plugin.cpp")
"""The plugins, written by hand."""
TABLES = "kernels.inc"
"""What they include."""
_TYPES = {"fp32": "DataType::kFLOAT", "fp16": "DataType::kHALF", "bf16": "DataType::kBF16"}
_LINE = 64
_OCTAL = [f"\\{byte:03o}" for byte in range(256)]


class _Images:
    """Machine code that the tables refer to, each piece once."""

    def __init__(self) -> None:
        self.names: dict[bytes, str] = {}

    def entry(self, made: Compiled) -> str:
        """A kernel as an initialiser of ``Kernel``."""
        name = self.names.setdefault(made.cubin, f"kIMAGE_{len(self.names)}")
        return f'{{{name}, "{made.name}", {32 * made.warps}, {made.shared_bytes}}}'

    def arrays(self) -> str:
        """Their definitions. A string is read by compilers many times faster than a list of numbers."""
        return "\n".join(f"alignas(16) constexpr unsigned char {n}[] =\n{_literal(c)};" for c, n in self.names.items())


def kernel_tables(nodes: Collection[Append | Decode], architectures: Iterable[int]) -> str:
    """Compile all kernels of some nodes, and write them as C++.

    Args:
        nodes: From :func:`mla_compile.runtime.tensorrt.nodes.read_nodes`.
        architectures: Compute capabilities, as 90 for 9.0.

    Raises:
        ValueError: A row is too wide for any tile.
    """
    images = _Images()
    decodes = sorted((n for n in nodes if isinstance(n, Decode)), key=repr)
    appends = sorted((n for n in nodes if isinstance(n, Append)), key=repr)
    combinations = tuple(dict.fromkeys(n.combination for n in decodes))
    decode_rows, combine_rows, append_rows = list[str](), list[str](), list[str]()
    for architecture in architectures:
        decode_rows += (_decode_row(images, node, architecture) for node in decodes)
        combine_rows += (_combine_row(images, c, splits, architecture) for c in combinations for splits in SPLITS)
        append_rows += (_append_row(images, node, architecture) for node in appends)
    names = ", ".join(f'"{name}"' for name in sorted({n.name for n in decodes}))
    # Which is part of how long a node takes: what the kernels are, and how the host launches them.
    build = hashlib.sha256(b"".join((*images.names, PLUGIN_SOURCE.read_bytes()))).hexdigest()[:16]
    return f"""constexpr char kNAMESPACE[] = "{NAMESPACE}";
constexpr char kVERSION[] = "{PLUGIN["plugin_version"]}";
constexpr char kBUILD_ID[] = "{build}";
constexpr int64_t kTOKENS_PER_ROW = {TOKENS_PER_ROW};
constexpr int32_t kMOST_SPLITS = {max(SPLITS)};
constexpr char const* kDECODE_NAMES[] = {{{names}}};
{images.arrays()}
{_table("DecodeKernels kDECODE_KERNELS", decode_rows)}
{_table("CombineKernel kCOMBINE_KERNELS", combine_rows)}
{_table("AppendKernel kAPPEND_KERNELS", append_rows)}
"""


def _decode_row(images: _Images, node: Decode, architecture: int) -> str:
    """A row of ``DecodeKernels``."""
    tactics = [_tiles(images, node, 1, tiles, architecture) for tiles in node.tactics(architecture)]
    several = _tiles(images, node, 2, choose_tiles(node.spec(2), architecture), architecture)
    layout = node.layout
    sizes = f"{layout.rank}, {layout.rope_groups}, {layout.rope_dim}, {layout.key_scales}, {layout.value_scales}"
    features = layout.scaled_rope, node.windowed, node.capped, node.slopes, node.sinks, node.chunked
    kind = f"{node.heads}, {', '.join(str(present).lower() for present in features)}"
    return f"{architecture}, {_TYPES[node.dtype]}, {sizes}, {kind}, {len(tactics)}, {{{', '.join(tactics)}}}, {several}"


def _combine_row(images: _Images, combination: Combination, splits: int, architecture: int) -> str:
    """A row of ``CombineKernel``."""
    kernel = images.entry(combination.compile(splits, architecture))
    columns = combine_constants(combination.rank, splits)["COLUMNS"]
    sinks = str(combination.sinks).lower()
    return f"{architecture}, {_TYPES[combination.dtype]}, {combination.rank}, {sinks}, {splits}, {columns}, {kernel}"


def _append_row(images: _Images, node: Append, architecture: int) -> str:
    """A row of ``AppendKernel``."""
    kernel = images.entry(node.compile(architecture))
    layout = node.layout
    sizes = f"{layout.rank}, {layout.rope_groups}, {layout.rope_dim}, {layout.key_scales + layout.value_scales}"
    return f"{architecture}, {_TYPES[node.dtype]}, {sizes}, {kernel}"


def _tiles(images: _Images, node: Decode, new: int, tiles: Tiles, architecture: int) -> str:
    parts = images.entry(node.compile(new, tiles, architecture, direct=False))
    same = node.dtype == "fp32" and not node.sinks
    result = parts if same else images.entry(node.compile(new, tiles, architecture, direct=True))
    return f"{{{tiles.rows}, {tiles.keys}, {parts}, {result}}}"


def _table(declared: str, rows: list[str]) -> str:
    return f"constexpr {declared}[] = {{\n" + "".join(f"    {{{row}}},\n" for row in rows) + "};"


def _literal(data: bytes) -> str:
    """Bytes as a literal of several lines."""
    pieces = (data[i : i + _LINE] for i in range(0, len(data), _LINE))
    return "\n".join('    "' + "".join(_OCTAL[byte] for byte in piece) + '"' for piece in pieces)
