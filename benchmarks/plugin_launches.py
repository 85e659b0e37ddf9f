"""What the TensorRT plugins launch, launched by CUDA's driver instead: for ``gpu.py``.

The same machine code or assembly, blocks, threads, shared memory and arguments: quickly deployable plugins give
TensorRT assembly whose parameters are inputs, integers and outputs; a library launches cubins itself.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mla_compile.runtime.kernels import LatentCache, RowLayout, append_latent, latent_attention
from mla_compile.runtime.kernels.aot import Compiled
from mla_compile.runtime.kernels.schedule import choose_tiles, combine_constants
from mla_compile.runtime.tensorrt.cubins import SPLITS, Decode
from mla_compile.runtime.tensorrt.kernels import Append, Combine, Kernel, Partial, launchable

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_SHARED_ALWAYS = 48 * 1024
_MAX_DYNAMIC_SHARED = 8
"""``CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES`` of cuda.h."""
_SCRATCH = (0, 0)
"""Pointers to scratch memory that a cubin of Triton's takes behind its own arguments."""

Argument = Tensor | int | float
"""A pointer, a 32-bit integer or a float32."""


class Driver:
    """CUDA's driver, in the context that torch made.

    Args:
        library: Its file.
    """

    def __init__(self, library: str = "libcuda.so.1") -> None:
        self._cuda = ctypes.CDLL(library)

    def launch(
        self, kernel: Kernel | Compiled, blocks: tuple[int, int, int], arguments: Sequence[Argument], stream: int
    ) -> None:
        """Load a kernel and launch it.

        Args:
            kernel: As TensorRT gets it, or as a library holds it.
            blocks: Along three axes.
            arguments: In order, without scratch memory.
            stream: Of CUDA.

        Raises:
            RuntimeError: The driver refuses.
        """
        quick = isinstance(kernel, Kernel)
        image = kernel.ptx.encode() + b"\0" if isinstance(kernel, Kernel) else kernel.cubin
        threads = kernel.threads if isinstance(kernel, Kernel) else 32 * kernel.warps
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(module), image)
        self._call("cuModuleGetFunction", ctypes.byref(function), module, kernel.name.encode())
        if kernel.shared_bytes > _SHARED_ALWAYS:
            self._call("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED, kernel.shared_bytes)
        values = [_value(x) for x in arguments] + [ctypes.c_void_p(x) for x in _SCRATCH if not quick]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        sizes = (*blocks, threads, 1, 1, kernel.shared_bytes)
        self._call("cuLaunchKernel", function, *map(ctypes.c_uint, sizes), ctypes.c_void_p(stream), pointers, None)

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._cuda, name)(*arguments)
        if code:
            raise RuntimeError(f"{name} fails with error {code} of CUDA's driver.")


def _value(argument: Argument) -> ctypes.c_void_p | ctypes.c_int32 | ctypes.c_float:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_int32(argument) if isinstance(argument, int) else ctypes.c_float(argument)


@dataclass(frozen=True)
class Layer:
    """A layer of a converted model, and a step of it.

    Attributes:
        layout: What a row holds.
        heads: ``H``.
        new: ``S``.
        window: How many keys a query sees; 0 for all.
        softcap: Bound of the logits; 0 for none.
        slopes: Whether logits fall with distance.
        sinks: Whether the softmax has a further logit per head.
        chunked: Whether the window does not slide.
    """

    layout: RowLayout
    heads: int
    new: int = 1
    window: int = 0
    softcap: float = 0.0
    slopes: bool = False
    sinks: bool = False
    chunked: bool = False


LAYERS = (
    Layer(RowLayout(512, 1, 64), 32),
    Layer(RowLayout(96, 3, 8), 9),
    Layer(RowLayout(96, 3, 8), 9, new=5),
    Layer(RowLayout(64, 1, 16), 4, new=3, window=200, sinks=True),
    Layer(RowLayout(64, 1, 16), 4, new=3, window=256, chunked=True),
    Layer(RowLayout(128, 8, 16, key_scales=8, value_scales=2), 32, new=2, softcap=5.0, slopes=True, sinks=True),
)
_LENGTHS, _ROOM, _SCALE, _PARTS = (1300, 700, 64, 3, 0), 1500, 2.0, 6


def errors(driver: Driver, architecture: int, device: str = "cuda") -> Iterator[tuple[str, torch.dtype, float]]:
    """Launch everything, and compare with the CPU's form in float64.

    Args:
        driver: What launches.
        architecture: Compute capability, as 90 for 9.0.
        device: Where tensors are.

    Yields:
        What was launched, its type, and the largest error relative to the largest result.
    """
    for layer, dtype in itertools.product(LAYERS, _DTYPES):
        yield from _errors_of(layer, dtype, driver, architecture, device)


def _errors_of(
    layer: Layer, dtype: str, driver: Driver, architecture: int, device: str
) -> Iterator[tuple[str, torch.dtype, float]]:
    kind, layout, batch = _DTYPES[dtype], layer.layout, len(_LENGTHS)
    stream = torch.cuda.current_stream().cuda_stream if device == "cuda" else 0

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(kind)

    lengths = torch.tensor(_LENGTHS, device=device, dtype=torch.int32)
    rows = numbers(batch, 1, _ROOM, layout.rank + layout.rest_width)
    shape = batch, layer.new, layer.heads
    queries = numbers(*shape, layout.rank) / layout.rank**0.5, numbers(*shape, layout.rope_dim) / layout.rope_dim**0.5
    slopes = [torch.rand(layer.heads, device=device) / 8] if layer.slopes else []
    sinks = [torch.randn(layer.heads, device=device)] if layer.sinks else []

    # Rows first, whose oracle is the same on the CPU.
    row = numbers(batch, layer.new, rows.shape[-1])
    angle = torch.randn(batch, layer.new, layout.rope_groups, layout.rope_dim // 2, device=device)
    wanted = rows[:, 0].cpu().clone()
    exact = LatentCache.of_rows(layout, wanted)
    append_latent(row.cpu(), angle.cos().cpu(), angle.sin().cpu(), exact, lengths.cpu())
    scales = layout.key_scales + layout.value_scales
    append = Append(RowLayout(layout.rank, layout.rope_groups, layout.rope_dim, scales), dtype)
    given = (row, angle.cos(), angle.sin(), rows, lengths, _ROOM, layer.new, rows)
    driver.launch(launchable(append, architecture), (layer.new, batch, 1), given, stream)
    yield f"append {layer}", kind, _error(rows[:, 0], wanted)

    there = LatentCache.of_rows(layout, rows[:, 0].cpu().double())
    settings = {"window": layer.window, "softcap": layer.softcap, "scale": _SCALE, "chunked": layer.chunked}
    settings |= {"slopes": slopes[0].cpu() if slopes else None, "sinks": sinks[0].cpu() if sinks else None}
    context, _ = latent_attention(*(q.cpu().double() for q in queries), there, lengths.cpu(), **settings)
    rows = rows.masked_fill(torch.arange(_ROOM, device=device)[:, None] >= lengths[:, None, None, None], torch.nan)

    def empty(*more: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((*shape, *more), torch.nan, device=device, dtype=dtype)

    features = {"window": layer.window, "softcap": layer.softcap, "slopes": layer.slopes, "chunked": layer.chunked}
    partial = Partial(layout, layer.heads, layer.new, dtype, _SCALE, _PARTS, **features)
    combine = Combine(layout.rank, _PARTS, dtype, layer.sinks)
    for tactic, tiles in enumerate(partial.tactics(architecture), 1):
        parts, lse, result = empty(_PARTS, layout.rank), empty(_PARTS), empty(layout.rank, dtype=kind)
        blocks = -(-layer.new * layer.heads // tiles.rows), _PARTS, batch
        given = (*queries, rows, lengths, *slopes, _ROOM, layer.new, layer.heads, parts, lse)
        driver.launch(launchable(partial, architecture, tactic), blocks, given, stream)
        blocks = batch * layer.new * layer.heads, combine.blocks_per_row, 1
        driver.launch(launchable(combine, architecture), blocks, (parts, lse, *sinks, layer.heads, result), stream)
        yield f"quick plugins, tactic {tactic}, {layer}", kind, _error(result, context)

    features = {"windowed": layer.window > 0, "capped": layer.softcap > 0, "chunked": layer.chunked}
    decode = Decode(layout, layer.heads, dtype, **features, slopes=layer.slopes, sinks=layer.sinks)
    compiled_for = 1 if layer.new == 1 else 2
    one_token = compiled_for == 1
    tactics = decode.tactics(architecture) if one_token else (choose_tiles(decode.spec(compiled_for), architecture),)
    for tiles, splits in itertools.product(tactics, (1, _PARTS)):
        result, lse = empty(layout.rank, dtype=kind), empty(splits)
        parts = result if splits == 1 else empty(splits, layout.rank)
        kernel = decode.compile(compiled_for, tiles, architecture, direct=splits == 1)
        own = sinks if splits == 1 else []
        least = decode.spec(layer.new).least_tiles(tiles)
        given = (*queries, rows, lengths, *slopes, parts, lse, *own, _SCALE, layer.softcap)
        integers = (_ROOM, layer.new, layer.heads, layer.window, splits, least)
        blocks = -(-layer.new * layer.heads // tiles.rows), splits, batch
        driver.launch(kernel, blocks, (*given, *integers), stream)
        if splits > 1:
            most = next(n for n in SPLITS if n >= splits)
            columns = combine_constants(layout.rank, most)["COLUMNS"]
            combination = decode.combination.compile(most, architecture)
            blocks = batch * layer.new * layer.heads, -(-layout.rank // columns), 1
            driver.launch(combination, blocks, (parts, lse, *sinks, result, layer.heads, splits), stream)
        yield f"library, {splits} splits, {tiles}, {layer}", kind, _error(result, context)


def _error(got: Tensor, wanted: Tensor) -> float:
    off = (got.cpu().double() - wanted.double()).abs().max()
    return float(off / wanted.double().abs().max().clamp(min=1))
