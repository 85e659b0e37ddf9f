"""The operators on a latent cache: Triton kernels on CUDA, plain torch elsewhere and for gradients."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mla_compile.errors import UsageError
from mla_compile.runtime.gradient import register_gradient
from mla_compile.runtime.kernels import folded
from mla_compile.runtime.kernels.cache import LatentCache, RowLayout
from mla_compile.runtime.kernels.codes import Codes

__all__ = ["append_latent", "latent_attention"]


def latent_attention(
    q_latent: Tensor,
    q_rope: Tensor | None,
    cache: LatentCache,
    lengths: Tensor,
    *,
    scale: float,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    window: int = 0,
    softcap: float = 0.0,
    causal: bool = True,
    chunked: bool = False,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attend to latents themselves: the absorbed form of multi-head latent attention (DeepSeek-V2 section 2.1.2).

    ``B`` sequences, ``S`` query tokens each, ``H`` heads, ``r`` rank. The caller has folded ``key_up`` into
    ``q_latent`` and applies ``value_up`` to the result. Logits, masks and scales are those of
    :func:`mla_compile.runtime.ops.latent_attention`, without padding: sequences differ in length instead.

    Args:
        q_latent: ``[B, S, H, r]``.
        q_rope: ``[B, S, H, rope_dim]``, rotated; None if rows have no rope keys.
        cache: Rows, the query tokens' own among them: see :func:`append_latent`.
        lengths: ``[B]`` int32, how many rows each sequence has, no more than ``cache.capacity``; its last ``S`` are the
            query tokens. What lies behind them is not read.
        scale: Factor between dot products and softmax logits.
        sinks: ``[H]``, a further logit in every softmax that has no value, or None.
        slopes: ``[H]``, what a logit loses per token of distance, or None.
        window: How many tokens a query sees, itself included; 0 for all.
        softcap: Bound of the logits before ``slopes``; 0 for none.
        causal: Whether a query sees no key behind its own.
        chunked: Whether the window does not slide: a query sees the keys of its own chunk of ``window``, counted from
            its sequence's first.
        return_lse: Whether the logarithm of the softmax denominators is wanted, as for merging the results of parts.

    Returns:
        The latents' weighted sums ``[B, S, H, r]``, zero for a query that sees no key (one before its sequence's first
        token, or in a sequence of none), and ``[B, S, H]`` float32 natural logarithms of the denominators, sinks
        included, minus infinity where nothing is seen; empty unless asked for.

    Raises:
        ValueError: Sizes do not fit, ``window`` or ``softcap`` is negative, there is a window or a slope although
            attention is not causal, or ``chunked`` without a window. On a CPU also: a length is above the capacity,
            which on a CUDA device, where nothing waits to read lengths, is not noticed.
        UsageError: The tensors are on a CUDA device and Triton is not installed.
    """
    if q_rope is None:
        q_rope = q_latent.new_empty(*q_latent.shape[:3], 0)
    _check(q_latent, q_rope, cache, lengths, sinks, slopes, window, softcap, causal, chunked)
    sizes, scaled_rope = _sizes(cache.layout)
    settings = (scale, window, softcap, causal, chunked, return_lse)
    context, lse = _attend_latent(
        q_latent, q_rope, *_memory(cache), lengths, sinks, slopes, sizes, scaled_rope, *settings
    )
    return context, lse


def append_latent(row: Tensor, cos: Tensor, sin: Tensor, cache: LatentCache, lengths: Tensor) -> None:
    """Write new tokens' rows into a cache, in place: rope keys rotated, latents as codes if the cache's are.

    Args:
        row: ``[B, S, r + n * rope_dim + m + w]``, rope keys not rotated, as ``[real | imaginary]``.
        cos: ``[B, S, n, rope_dim / 2]`` at the new tokens' positions.
        sin: Like ``cos``.
        cache: Memory for the rows.
        lengths: ``[B]`` int32, how many rows each sequence has then, the new ones among them, and no more than
            ``cache.capacity``. A new token that would lie before a sequence's first row is padding, and is not written.

    Raises:
        ValueError: Sizes do not fit. On a CPU also: a length is above the capacity, which on a CUDA device, where
            nothing waits to read lengths, is not noticed, and writes into memory of others.
        UsageError: The tensors are on a CUDA device and Triton is not installed.
    """
    layout = cache.layout
    batch, new, width = row.shape
    if width != layout.rank + layout.rest_width:
        cached = layout.rank + layout.rest_width
        raise ValueError(f"A new row has {width} numbers, but a cached one {cached}. Pass rows of one width.")
    angles = (batch, new, layout.rope_groups, layout.rope_dim // 2)
    if cos.shape != angles or sin.shape != angles or layout.rope_dim % 2:
        raise ValueError(f"cos has shape {list(cos.shape)} and sin {list(sin.shape)}. Pass {list(angles)}.")
    _check_memory(cache, lengths, batch)
    _append_latent(row, cos, sin, *_memory(cache), lengths, *_sizes(layout))


def _check(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: LatentCache,
    lengths: Tensor,
    sinks: Tensor | None,
    slopes: Tensor | None,
    window: int,
    softcap: float,
    causal: bool,
    chunked: bool,
) -> None:
    """Refuse what neither form computes."""
    layout, heads = cache.layout, q_latent.shape[2]
    if q_latent.shape[3] != layout.rank or q_rope.shape != (*q_latent.shape[:3], layout.rope_dim):
        raise ValueError(
            f"q_latent has shape {list(q_latent.shape)} and q_rope {list(q_rope.shape)}, but rows have a latent of "
            f"{layout.rank} and rope keys of {layout.rope_dim}. Pass queries of these sizes."
        )
    layout.check_heads(heads)
    _check_memory(cache, lengths, len(q_latent))
    kinds = {q_latent.dtype, q_rope.dtype, cache.rest.dtype, cache.latent.dtype} - {codes.dtype for codes in Codes}
    if len(kinds) > 1:
        raise ValueError(f"Queries and rows are of several types: {', '.join(sorted(map(str, kinds)))}. Pass one.")
    if window < 0 or softcap < 0:
        raise ValueError(f"window is {window} and softcap {softcap}. Pass 0 for none, or a positive number.")
    if not causal and (window or slopes is not None):
        raise ValueError("Attention that is not causal has neither a window nor slopes. Pass 0 and None.")
    if chunked and not window:
        raise ValueError("Chunks have no length. Pass it as window, or chunked=False.")
    for name, per_head in (("sinks", sinks), ("slopes", slopes)):
        if per_head is not None and per_head.shape != (heads,):
            raise ValueError(f"{name} has shape {list(per_head.shape)}. Pass one number for each of {heads} heads.")


def _check_memory(cache: LatentCache, lengths: Tensor, batch: int) -> None:
    """Refuse a cache whose parts do not fit each other or the number of sequences."""
    layout, blocks, codes = cache.layout, cache.latent.shape[:2], cache.codes
    width = layout.rank if codes is None else codes.stored(layout.rank)
    expected = {"latent": (*blocks, width), "rest": (*blocks, layout.rest_width), "token_scales": tuple(blocks)}
    for name, shape in expected.items():
        part = getattr(cache, name)
        if part is not None and (part.shape != shape or (part.shape[-1] > 1 and part.stride(-1) != 1)):
            raise ValueError(f"{name} of the cache has shape {list(part.shape)}. Pass {list(shape)}, rows contiguous.")
    if (codes is None) != (cache.token_scales is None):
        kinds = ", ".join(str(kind.dtype) for kind in Codes)
        raise ValueError(
            f"The cache's latents are {cache.latent.dtype}. Pass token scales with latents of {kinds} only."
        )
    sequences = blocks[0] if cache.page_table is None else len(cache.page_table)
    if sequences != batch or lengths.shape != (batch,):
        raise ValueError(
            f"The cache has {sequences} sequences and lengths has shape {list(lengths.shape)}. Pass {batch} of both."
        )
    if cache.page_table is not None and blocks[1] % 16:
        raise ValueError(f"A page has {blocks[1]} tokens. Pass a multiple of 16.")


def _memory(cache: LatentCache) -> tuple[Tensor | None, ...]:
    return cache.latent, cache.rest, cache.token_scales, cache.page_table


def _sizes(layout: RowLayout) -> tuple[list[int], bool]:
    """What an operator is told of a layout."""
    sizes = [layout.rank, layout.rope_groups, layout.rope_dim, layout.key_scales, layout.value_scales]
    return sizes, layout.scaled_rope


def _cache(
    latent: Tensor,
    rest: Tensor,
    token_scales: Tensor | None,
    page_table: Tensor | None,
    sizes: list[int],
    scaled_rope: bool,
) -> LatentCache:
    rank, rope_groups, rope_dim, key_scales, value_scales = sizes
    layout = RowLayout(rank, rope_groups, rope_dim, key_scales, value_scales, scaled_rope)
    return LatentCache(layout, latent, rest, token_scales, page_table)


@functools.cache
def _kernels() -> ModuleType:
    """The launches, of which nothing is imported until a CUDA tensor comes."""
    if importlib.util.find_spec("triton") is None:
        raise UsageError(
            "Attention to a latent cache on a CUDA device needs Triton, which is not installed.",
            "Install it with: pip install 'mla-compile[cuda]'.",
        )
    return importlib.import_module("mla_compile.runtime.kernels.launch")


def _attend_with(attend: Callable[..., tuple[Tensor, Tensor]], arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    q_latent, q_rope, latent, rest, token_scales, page_table, lengths, sinks, slopes, *others = arguments
    sizes, scaled_rope, *settings = others
    cache = _cache(latent, rest, token_scales, page_table, sizes, scaled_rope)
    return attend(q_latent, q_rope, cache, lengths, sinks, slopes, *settings)


def _attend_folded(*arguments: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401 - the operator's, see its schema
    return _attend_with(folded.attend, arguments)


_attend_latent = torch.library.custom_op(
    "mla::attend_latent",
    _attend_folded,
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor q_latent, Tensor q_rope, Tensor latent, Tensor rest, Tensor? token_scales, Tensor? page_table, "
    "Tensor lengths, Tensor? sinks, Tensor? slopes, int[] sizes, bool scaled_rope, float scale, int window, "
    "float softcap, bool causal, bool chunked, bool return_lse) -> (Tensor, Tensor)",
)


@_attend_latent.register_kernel("cuda")
def _(*arguments: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    return _attend_with(_kernels().attend, arguments)


@_attend_latent.register_fake
def _(q_latent: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    wanted = arguments[-1]
    lse = q_latent.new_empty(q_latent.shape[:3] if wanted else 0, dtype=torch.float32)
    return torch.empty_like(q_latent, memory_format=torch.contiguous_format), lse


def _attend_explicitly(*arguments: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    return _attend_with(folded.attend_explicitly, arguments)


register_gradient(_attend_latent, _attend_explicitly, tensors=9)


def _append_with(append: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    row, cos, sin, latent, rest, token_scales, page_table, lengths, sizes, scaled_rope = arguments
    append(row, cos, sin, _cache(latent, rest, token_scales, page_table, sizes, scaled_rope), lengths)


def _append_folded(*arguments: Any) -> None:  # noqa: ANN401 - the operator's, see its schema
    _append_with(folded.append, arguments)


_append_latent = torch.library.custom_op(
    "mla::append_latent",
    _append_folded,
    mutates_args=("latent", "rest", "token_scales"),
    device_types="cpu",
    schema="(Tensor row, Tensor cos, Tensor sin, Tensor(a!) latent, Tensor(b!) rest, Tensor(c!)? token_scales, "
    "Tensor? page_table, Tensor lengths, int[] sizes, bool scaled_rope) -> ()",
)


@_append_latent.register_kernel("cuda")
def _(*arguments: Any) -> None:  # noqa: ANN401
    _append_with(_kernels().append, arguments)


@_append_latent.register_fake
def _(*arguments: Any) -> None:  # noqa: ANN401
    return None
