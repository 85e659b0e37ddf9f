"""From tensors to launches of the Triton kernels."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from mla_compile.runtime.kernels.append import append_kernel
from mla_compile.runtime.kernels.cache import LatentCache
from mla_compile.runtime.kernels.codes import Codes
from mla_compile.runtime.kernels.decode import combine_kernel, decode_kernel
from mla_compile.runtime.kernels.schedule import (
    DecodeSpec,
    append_constants,
    choose_splits,
    choose_tiles,
    combine_constants,
)

__all__ = ["append", "attend"]


def attend(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: LatentCache,
    lengths: Tensor,
    sinks: Tensor | None,
    slopes: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    causal: bool,
    chunked: bool,
    return_lse: bool,
    *,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend with the decode kernel, and combine its splits.

    Arguments and results are those of :func:`mla_compile.runtime.kernels.op.latent_attention`; ``splits`` replaces the
    number that :func:`~mla_compile.runtime.kernels.schedule.choose_splits` gives. Nothing waits for the device: sizes
    depend on shapes alone, so a launch can be captured in a CUDA graph.
    """
    batch, new, heads, rank = q_latent.shape
    layout, page = cache.layout, 0 if cache.page_table is None else cache.latent.shape[1]
    processors, architecture = _device(q_latent.device)
    spec = DecodeSpec(
        layout,
        heads,
        new,
        q_latent.itemsize,
        cache.codes,
        page,
        causal,
        window > 0,
        softcap > 0,
        chunked,
    )
    tiles = choose_tiles(spec, architecture)
    blocks = triton.cdiv(spec.rows, tiles.rows)
    least_tiles = 1 if splits else spec.least_tiles(tiles)
    splits = splits or choose_splits(batch, blocks, spec.rows, cache.capacity, processors)
    output = torch.empty_like(q_latent, memory_format=torch.contiguous_format)
    lse = torch.empty(batch, new, heads, dtype=torch.float32, device=q_latent.device)
    sinks, slopes = (None if x is None else x.float().contiguous() for x in (sinks, slopes))
    if splits == 1:
        partial, partial_lse = output, lse
    else:
        partial = torch.empty(*output.shape[:3], splits, rank, dtype=torch.float32, device=q_latent.device)
        partial_lse = torch.empty(*lse.shape, splits, dtype=torch.float32, device=q_latent.device)
    with torch.cuda.device_of(q_latent):  # Triton launches on the current device, whatever it is given
        decode_kernel[blocks, splits, batch](
            q_latent.contiguous(),
            q_rope.contiguous(),
            *_memory(cache, lengths),
            sinks if splits == 1 else None,
            slopes,
            partial,
            partial_lse,
            scale,
            softcap,
            new,
            heads,
            window,
            splits,
            least_tiles,
            **spec.constants(tiles),
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        if splits > 1:
            constants = combine_constants(rank, splits)
            grid = batch * spec.rows, triton.cdiv(rank, constants["COLUMNS"])
            combine_kernel[grid](partial, partial_lse, sinks, output, lse, heads, splits, **constants, num_warps=4)
    return output, lse if return_lse else lse.new_empty(0)


def append(row: Tensor, cos: Tensor, sin: Tensor, cache: LatentCache, lengths: Tensor) -> None:
    """Write new rows; arguments are those of :func:`mla_compile.runtime.kernels.op.append_latent`."""
    batch, new, _ = row.shape
    with torch.cuda.device_of(row):
        append_kernel[new, batch](
            row.contiguous(),
            cos.contiguous(),
            sin.contiguous(),
            *_memory(cache, lengths),
            new,
            **append_constants(cache.layout, 0 if cache.page_table is None else cache.latent.shape[1], cache.codes),
            num_warps=4,
        )


def _memory(cache: LatentCache, lengths: Tensor) -> tuple[Tensor | int | None, ...]:
    """The arguments by which both kernels find a cache's rows."""
    scales, table = cache.token_scales, cache.page_table
    # Kernels count on numbers that follow each other.
    table, lengths = None if table is None else table.contiguous(), lengths.contiguous()
    return (
        # Triton knows no fp8 before compute capability 8.9: kernels read its bytes.
        cache.latent.view(torch.uint8) if cache.codes is Codes.FP8 else cache.latent,
        cache.rest,
        scales,
        table,
        lengths,
        cache.latent.stride(0),
        cache.latent.stride(1),
        cache.rest.stride(0),
        cache.rest.stride(1),
        0 if scales is None else scales.stride(0),
        0 if table is None else table.stride(0),
    )


@functools.cache
def _device(device: torch.device) -> tuple[int, int]:
    """Streaming multiprocessors and compute capability of a device; those of an H200 for Triton's interpreter."""
    if device.type != "cuda":
        return 132, 90
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, 10 * properties.major + properties.minor
