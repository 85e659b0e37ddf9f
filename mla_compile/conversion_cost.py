"""What a conversion takes: operations, bytes read and written, memory and time. Pure arithmetic on shapes.

Rates are those of one core of a server CPU with AVX-512, in float64: a layer is factorised by one thread, so that the
result is the same everywhere. ``eigh`` costs as much time as so many operations of products as stand below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mla_compile.config import CompileConfig
from mla_compile.plan import LatentPlan
from mla_compile.site import AttentionSite

__all__ = ["ConversionCost", "FisherCost", "conversion_cost"]

_OPERATIONS = 45e9
"""Per second, of products of large matrices."""
_EIGH, _QR = 13, 8 / 3
"""Operations per cube of the size: by time for the first, by count for the second with its orthogonal factor."""
_NARROW_OPERATIONS = 90e9
"""Per second, of products in float32, in which models are run."""
_DISK = 0.2e9
"""Bytes per second of an ordinary disk, for what is read and written once."""
_BASE = 10**9
"""Bytes of memory that libraries and graphs take."""
_MATRICES = 3
"""Square matrices of the smaller side that ``eigh`` has at a time, its input and result included."""
_WINDOW, _BATCH = 512, 4
"""Tokens per window of calibration text where nothing is given, and windows of a pass."""
_KEPT = 2**31
"""Bytes of activations between layers that are kept in memory."""
_PROBE, _PROBE_LOGITS = 4096, 2**27
"""Tokens that tries are compared on, and logits of them, at most."""
_ROW_MATRICES, _SIDES = 7, 5
"""Matrices of its rows of keys and values by themselves, and by its width, that a layer has at a time."""
_TRIES = 14
"""Splits of the cache between rope and latent that are tried, about."""


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
        fisher: What the method fisher takes, which is not that of the figures above.
    """

    operations: float
    weight_bytes: int
    written_bytes: int
    memory_bytes: int
    seconds: float
    fisher: FisherCost


@dataclass(frozen=True, slots=True)
class FisherCost:
    """What statistics on text and the search for sizes take, estimated, of a model that is run layer by layer.

    Attributes:
        tokens: Tokens of calibration text.
        text_operations: Of running the model over them and over the probe that tries are compared on, in float32.
        operations: Of statistics and factorisations, in float64.
        memory_bytes: Memory that cannot be dropped.
        offload_memory_bytes: The same with ``--offload``.
        disk_bytes: Files beside the output while it is made.
        offload_bytes: Files of ``--offload``.
        seconds: By one core, without verification, reading and writing.
    """

    tokens: int
    text_operations: float
    operations: float
    memory_bytes: int
    offload_memory_bytes: int
    disk_bytes: int
    offload_bytes: int
    seconds: float


def conversion_cost(
    sites: Sequence[AttentionSite],
    plans: Sequence[LatentPlan],
    widths: Sequence[int],
    config: CompileConfig,
    parameters: int,
    itemsize: int,
    vocabulary: int,
) -> ConversionCost:
    """Estimate a conversion by the method mha2mla, and what fisher takes.

    Args:
        sites: The layers.
        plans: Shape of each one's latent.
        widths: Input width of each one's projections.
        config: Settings.
        parameters: Numbers in all weights of the model.
        itemsize: Bytes of each, before and after.
        vocabulary: Tokens that the model predicts.
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
    fisher = _fisher(sites, plans, widths, config, parameters, vocabulary)
    return ConversionCost(operations, read, wrote, largest + _BASE, seconds, fisher)


def _operations(rows: int, width: int, rank: int) -> float:
    """Of one truncated factorisation: the Gram matrix, its eigenvectors, the other factor."""
    smaller = min(rows, width)
    if rank >= smaller:
        return 2 * _QR * smaller**3 + 2 * rows * width * smaller
    orthogonal = 2 * _QR * width * rank**2 if rows < width else 0
    return 2 * rows * width * smaller + _EIGH * smaller**3 + 2 * rows * width * rank + orthogonal


def _fisher(
    sites: Sequence[AttentionSite],
    plans: Sequence[LatentPlan],
    widths: Sequence[int],
    config: CompileConfig,
    parameters: int,
    vocabulary: int,
) -> FisherCost:
    """Estimate the method fisher by the sizes that mha2mla has at the same budget.

    Numbers of matrices that are held at a time, and of products, are read off the method; measurements of models of
    two layers agree within a factor of two (``docs/large_models.md``).
    """
    length = config.seq_len or _WINDOW
    tokens = max(1, config.calibration_tokens // length) * length
    probe = min(_PROBE, tokens, _PROBE_LOGITS // vocabulary)
    weights = parameters - vocabulary * max(widths)  # rows of a table are read, and not multiplied
    attended = sum(2 * length * site.heads * (site.qk_dim + site.v_dim) for site in sites)
    forward = 2 * weights + attended
    # Statistics: forward, and once more and backward with gradients; the attention itself once or twice more. Then the
    # original and every try on the probe, and both models on the text for the refit.
    passes = 3 if config.gradients else 1
    running = tokens * (passes * forward + 2 * attended) + (1 + _TRIES) * probe * forward + 2 * tokens * forward
    exact, stored, kept, written, largest = 0.0, 0, 0, 0, 0
    for site, plan, width in zip(sites, plans, widths, strict=True):
        rows = site.kv_heads * site.qk_dim + site.value_rows
        squares = width**2 * (2 if site.key.norm else 1) + site.heads * (site.qk_dim**2 + site.v_dim**2)
        pairs = site.kv_heads * len(site.rope.pairs)
        factors = 4 * rows * width**2 + 4 * rows**2 * width + _EIGH * rows**3 + 4 * _EIGH * pairs**3
        exact += 2 * tokens * squares + _TRIES * factors
        exact += site.heads * (2 * tokens * plan.kv_rank**2 + 2 * plan.kv_rank**3 / 3)
        stored += 8 * squares
        kept += 4 * tokens * width
        new = width * (site.heads * site.qk_dim + plan.elements_after) + site.heads * plan.kv_rank * site.v_dim
        new += site.kv_heads * plan.kv_rank * site.qk_dim
        written += (2 * 8 + 4) * new  # what is chosen, what is refitted, and a try
        old = width * (site.heads * site.qk_dim + site.elements_per_token)
        largest = max(largest, 8 * (2 * old + 2 * squares + _ROW_MATRICES * rows**2 + _SIDES * rows * width))
    layer = weights // max(1, len(sites))
    passed = _BATCH * length
    # A layer's weights and what its backward pass keeps, and the head's logits and their derivatives.
    running_bytes = 4 * (layer + 3 * passed * vocabulary) + 4 * passed * (12 * layer // max(widths))
    logits = 4 * probe * vocabulary
    held = _BASE + max(largest, running_bytes) + logits
    return FisherCost(
        tokens=tokens,
        text_operations=running,
        operations=exact,
        memory_bytes=held + min(kept, _KEPT),
        offload_memory_bytes=held,
        disk_bytes=stored + written,
        offload_bytes=kept,
        seconds=running / _NARROW_OPERATIONS + exact / _OPERATIONS,
    )
