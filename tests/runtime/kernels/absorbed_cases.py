"""Random problems of attention to a latent cache, and their solution by the reference in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from mla_compile.runtime import reference
from mla_compile.runtime.kernels import Codes, LatentCache, RowLayout
from mla_compile.runtime.kernels.codes import encode

SMALL = RowLayout(16, 1, 8)


@dataclass(frozen=True)
class Problem:
    """Sizes and features; what no sequence owns is filled with NaN, or with codes of no number a token has."""

    layout: RowLayout = SMALL
    heads: int = 2
    new: int = 1
    lengths: tuple[int, ...] = (37, 5)
    page: int = 0
    codes: Codes | None = None
    dtype: torch.dtype = torch.float32
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    slopes: bool = False
    causal: bool = True
    chunked: bool = False
    splits: int | None = None
    seed: int = 0

    @cached_property
    def numbers(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def draw(self, *shape: int) -> Tensor:
        """Normal numbers, rounded to the problem's type."""
        return torch.randn(shape, generator=self.numbers, dtype=torch.float64).to(self.dtype)

    def cache(self) -> LatentCache:
        """Random rows in random pages."""
        layout, batch, longest = self.layout, len(self.lengths), max(self.lengths)
        pages = -(-longest // self.page) + 1 if self.page else 0
        blocks, tokens = (batch * pages + 2, self.page) if self.page else (batch, longest + 3)
        table = None
        if self.page:
            order = torch.randperm(blocks, generator=self.numbers)[: batch * pages]
            table = order.to(torch.int32).view(batch, pages)
        kinds = {"dtype": self.dtype, "codes": self.codes, "page_table": table}
        cache = LatentCache.empty(layout, blocks, tokens, **kinds)
        owned = torch.zeros(blocks, tokens, dtype=torch.bool)
        for sequence, length in enumerate(self.lengths):
            place = torch.arange(length)
            block = table[sequence, place // tokens].long() if self.page else sequence
            owned[block, place % tokens] = True
        everywhere = (blocks, tokens)
        cache.rest.copy_(self.draw(*everywhere, layout.rest_width).where(owned[..., None], math.nan))
        latent = self.draw(*everywhere, layout.rank)
        if self.codes:
            codes, scales = encode(latent, self.codes)
            # Of all that bytes can be, 0xFF is furthest from 0 as int4, is no number as fp8, and no code of int8.
            nothing = {Codes.INT8: -128, Codes.FP8: math.nan, Codes.INT4: 255}[self.codes]
            cache.latent.copy_(codes.where(owned[..., None], torch.tensor(nothing).to(codes.dtype)))
            cache.token_scales.copy_(scales.where(owned, math.nan))
        else:
            cache.latent.copy_(latent.where(owned[..., None], math.nan))
        return cache

    def arguments(self) -> dict[str, Any]:
        """Of :func:`mla_compile.runtime.kernels.latent_attention`, the log of the denominators wanted."""
        shape = len(self.lengths), self.new, self.heads
        return {
            "q_latent": self.draw(*shape, self.layout.rank) / math.sqrt(self.layout.rank),
            "q_rope": self.draw(*shape, self.layout.rope_dim) / math.sqrt(max(1, self.layout.rope_dim)),
            "cache": self.cache(),
            "lengths": torch.tensor(self.lengths, dtype=torch.int32),
            "sinks": self.draw(self.heads) if self.sinks else None,
            "slopes": self.draw(self.heads).abs() / 8 if self.slopes else None,
            "scale": 2.0,
            "window": self.window,
            "softcap": self.softcap,
            "causal": self.causal,
            "chunked": self.chunked,
            "return_lse": True,
        }


def numbers_of(stored: Tensor, rank: int) -> Tensor:
    """What is stored of a latent in float64; two numbers of a byte one by one, e4m3 by its definition."""
    if stored.dtype == torch.uint8:
        return torch.tensor([stored[j % len(stored)].item() // 16 ** (j // len(stored)) % 16 - 8 for j in range(rank)])
    if stored.dtype == torch.float8_e4m3fn:
        return torch.tensor([e4m3(byte) for byte in stored.view(torch.uint8).tolist()], dtype=torch.float64)
    return stored.double()


def e4m3(byte: int) -> float:
    """A sign, four bits of an exponent biased by 7, three of a fraction (arXiv 2209.05433, table 1)."""
    sign, exponent, fraction = (-1) ** (byte >> 7), byte >> 3 & 15, byte & 7
    if byte & 127 == 127:
        return math.nan
    return sign * (fraction / 8 * 2**-6 if exponent == 0 else (1 + fraction / 8) * 2 ** (exponent - 7))


def rows_of(cache: LatentCache, sequence: int, length: int) -> Tensor:
    """A sequence's rows as numbers in float64, read one by one."""
    found = []
    for place in range(length):
        block = sequence
        if cache.page_table is not None:
            tokens = cache.latent.shape[1]
            block, place = int(cache.page_table[sequence, place // tokens]), place % tokens
        latent = numbers_of(cache.latent[block, place], cache.layout.rank)
        if cache.token_scales is not None:
            latent = latent * cache.token_scales[block, place].double()
        found.append(torch.cat([latent, cache.rest[block, place].double()]))
    return torch.stack(found) if found else torch.empty(0, cache.layout.rank + cache.layout.rest_width).double()


def expected(
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
    chunked: bool = False,
    return_lse: bool = True,
) -> tuple[Tensor, Tensor]:
    """By the reference: up-projections that are identities, angles of 0, one sequence at a time.

    The denominators are read off a second call. With a further latent number of 1 that no query reads, and one sink
    ``t``, the value of that number becomes ``Z / (Z + exp(t))``.
    """
    layout = cache.layout
    batch, new, heads, rank = q_latent.shape
    context = torch.zeros(batch, new, heads, rank, dtype=torch.float64)
    lse = torch.full((batch, new, heads), -math.inf, dtype=torch.float64)
    up = torch.eye(rank + 1, dtype=torch.float64)[None]
    cos, sin = (x(1, 1, layout.rope_groups, layout.rope_dim // 2) for x in (torch.ones, torch.zeros))
    for sequence, length in enumerate(lengths.tolist()):
        count = min(new, length) if causal else new
        if not length:
            continue
        query = torch.cat([q_latent, q_rope], -1)[sequence : sequence + 1, new - count :]
        rows = rows_of(cache, sequence, length)[None]
        rows = torch.cat([rows[..., :rank], torch.ones(1, length, 1), rows[..., rank:]], -1)
        past = length - count if causal else 0
        mask = torch.ones(1, length, dtype=torch.long)
        common = {"scale": scale, "window": window or None, "softcap": softcap, "causal": causal}
        common |= {"slopes": slopes, "scaled_rope": layout.scaled_rope, "chunked": chunked}

        def attend(rows: Tensor, sinks: Tensor | None, value_scales: int) -> Tensor:
            parts = query, rows[:, past:], rows[:, :past], mask, cos, sin, up[:, :rank], up  # noqa: B023
            found, _ = reference.latent_attention(*parts, sinks=sinks, value_scales=value_scales, **common)  # noqa: B023
            return found[0]

        context[sequence, new - count :] = attend(rows, sinks, layout.value_scales)[..., :rank]
        plain = rows[..., : rows.shape[-1] - layout.value_scales]
        share = attend(plain, torch.full((heads,), THRESHOLD), 0)[..., rank]
        lse[sequence, new - count :] = share.logit() + THRESHOLD
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.double().expand_as(lse))
    return context, lse


THRESHOLD = 20.0
"""``t``: the problems' logits stay below 40, so that shares of 1e-9 remain, which float64 knows to 7 digits."""
RANKS = (16, 24, 40, 48, 64, 80, 96, 100, 128, 160, 192, 256, 320, 384, 512, 576)


@st.composite
def problems(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> Problem:
    """Any sizes and features that are computed."""
    heads = draw(st.sampled_from([1, 2, 3, 6, 8, 9, 16, 32, 128]))
    divisors = st.sampled_from([d for d in range(1, heads + 1) if heads % d == 0])
    rope_dim = draw(st.sampled_from([0, 2, 8, 16, 64]))
    key_scales = draw(st.just(0) | divisors)
    layout = RowLayout(
        rank=draw(st.sampled_from(RANKS) | st.integers(16, 576)),
        rope_groups=draw(divisors.filter(lambda n: n * rope_dim <= 512)),
        rope_dim=rope_dim,
        key_scales=key_scales,
        value_scales=draw(st.just(0) | divisors),
        scaled_rope=key_scales > 0 and draw(st.booleans()),
    )
    causal = draw(st.sampled_from([True, True, True, False]))
    window = draw(st.sampled_from([0, 1, 17])) if causal else 0
    return Problem(
        layout,
        heads,
        new=draw(st.integers(1, max(1, min(64, 128 // heads)))),
        lengths=tuple(
            draw(st.lists(st.integers(0, 140) | st.sampled_from([0, 1]), min_size=1, max_size=3).filter(any))
        ),
        page=draw(st.sampled_from([0, 16, 48, 64])),
        codes=draw(st.sampled_from([None, None, *Codes])),
        dtype=draw(st.sampled_from(dtypes)),
        window=window,
        softcap=draw(st.sampled_from([0.0, 2.0])),
        sinks=draw(st.booleans()),
        slopes=causal and draw(st.booleans()),
        causal=causal,
        chunked=window > 0 and draw(st.booleans()),
        splits=draw(st.sampled_from([None, 1, 2, 5])),
        seed=draw(st.integers(0, 2**16)),
    )


@st.composite
def chunked_problems(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> Problem:
    """Chunks of any size in small caches: shorter and longer than tiles, pages, splits, new tokens and sequences."""
    heads = draw(st.sampled_from([1, 2, 9]))
    return Problem(
        RowLayout(16, draw(st.sampled_from([1, heads])), 8),
        heads,
        new=draw(st.sampled_from([1, 1, 2]) | st.integers(1, 40)),
        lengths=tuple(draw(st.lists(st.integers(0, 140), min_size=1, max_size=3).filter(any))),
        page=draw(st.sampled_from([0, 16, 48])),
        codes=draw(st.sampled_from([None, None, *Codes])),
        dtype=draw(st.sampled_from(dtypes)),
        window=draw(st.integers(1, 20) | st.sampled_from([32, 64]) | st.integers(1, 150)),
        sinks=draw(st.booleans()),
        slopes=draw(st.booleans()),
        chunked=True,
        splits=draw(st.sampled_from([None, 1, 2, 5])),
        seed=draw(st.integers(0, 2**16)),
    )
