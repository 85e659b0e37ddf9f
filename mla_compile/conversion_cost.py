"""What a conversion without text takes: operations, bytes read and written, memory and time. Pure arithmetic on shapes.

Rates are those of one core of a server CPU with AVX-512, in float64: a layer is factorised by one thread, so that the
result is the same everywhere. ``eigh`` costs as much time as so many operations of products as stand below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mla_compile.config import CompileConfig
from mla_compile.plan import LatentPlan
from mla_compile.site import AttentionSite

__all__ = ["ConversionCost", "conversion_cost"]

_OPERATIONS = 45e9
"""Per second, of products of large matrices."""
_EIGH, _QR = 13, 8 / 3
"""Operations per cube of the size: by time for the first, by count for the second with its orthogonal factor."""
_DISK = 0.2e9
"""Bytes per second of an ordinary disk, for what is read and written once."""
_BASE = 10**9
"""Bytes of memory that libraries and graphs take."""
_MATRICES = 3
"""Square matrices of the smaller side that ``eigh`` has at a time, its input and result included."""


@dataclass(frozen=True, slots=True)
class ConversionCost:
    """What a conversion takes, estimated.

    Attributes:
        operations: Multiplications and additions of all factorisations.
        weight_bytes: Bytes of the original's weights, which are read, mapped from their files.
        written_bytes: Bytes of the result.
        memory_bytes: Memory that cannot be dropped: the largest layer's factorisation, and the libraries. Running the
            model to verify it takes its activations besides.
        seconds: Factorising by one core, and reading and writing once each; verification comes on top.
    """

    operations: float
    weight_bytes: int
    written_bytes: int
    memory_bytes: int
    seconds: float


def conversion_cost(
    sites: Sequence[AttentionSite],
    plans: Sequence[LatentPlan],
    widths: Sequence[int],
    config: CompileConfig,
    parameters: int,
    itemsize: int,
) -> ConversionCost:
    """Estimate a conversion by the method mha2mla.

    Args:
        sites: The layers.
        plans: Shape of each one's latent.
        widths: Input width of each one's projections.
        config: Settings.
        parameters: Numbers in all weights of the model.
        itemsize: Bytes of each, before and after.
    """
    operations, largest, written = 0.0, 0, parameters
    for site, plan, width in zip(sites, plans, widths, strict=True):
        keys = site.kv_heads * (site.qk_dim - plan.rope_dims)
        for rows in (keys + site.value_rows,) if config.svd == "joint" else (keys, site.value_rows):
            operations += _operations(rows, width, plan.kv_rank)
        old = width * (site.heads * site.qk_dim + site.elements_per_token)
        row = plan.kv_rank + plan.rope_groups * plan.rope_dims
        new = width * (site.heads * site.qk_dim + row) + plan.kv_rank * (keys + site.value_rows)
        written += new - old
        smaller = min(keys + site.value_rows, width)
        # The original's heads, queries and keys in their new order, and what is factorised or the new layer twice.
        numbers = old + width * (site.heads + site.kv_heads) * site.qk_dim
        numbers += max((keys + site.value_rows) * width + _MATRICES * smaller**2, 2 * new)
        largest = max(largest, 8 * numbers)
    read, wrote = parameters * itemsize, written * itemsize
    seconds = operations / _OPERATIONS + (read + wrote) / _DISK
    return ConversionCost(operations, read, wrote, largest + _BASE, seconds)


def _operations(rows: int, width: int, rank: int) -> float:
    """Of one truncated factorisation: the Gram matrix, its eigenvectors, the other factor."""
    smaller = min(rows, width)
    if rank >= smaller:
        return 2 * _QR * smaller**3 + 2 * rows * width * smaller
    orthogonal = 2 * _QR * width * rank**2 if rows < width else 0
    return 2 * rows * width * smaller + _EIGH * smaller**3 + 2 * rows * width * rank + orthogonal
