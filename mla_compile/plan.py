"""Decide how small every layer's cache becomes: pure arithmetic on sites, no weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mla_compile.config import DEFAULT_CACHE_RATIO, CompileConfig
from mla_compile.errors import UsageError
from mla_compile.site import AttentionSite

__all__ = [
    "LatentPlan",
    "cache_budget",
    "cache_elements",
    "clamped",
    "latent_budget",
    "liked_ranks",
    "one_rank",
    "plan_layers",
    "shared_rope_plan",
]

_LIKED_FROM = 128
"""Ranks from here on have two set bits at most."""


@dataclass(frozen=True, slots=True)
class LatentPlan:
    """The shape of one layer's latent cache: one row ``[latent | rope keys]`` per token.

    Attributes:
        site: Index of the attention site.
        path: Module path of the layer.
        rope_groups: Rope keys per token: one per key/value head, or one shared by all.
        rope_dims: Rotating channels of one rope key.
        kv_rank: Length of the latent.
        exact_rank: Smallest latent that loses nothing, with these rope dims.
        elements_before: Numbers a plain KV cache keeps per token.
        key_scales: Inverse norms cached per token for keys that are normalised (QK-norm).
        value_scales: Inverse norms cached per token for values that are normalised.
    """

    site: int
    path: str
    rope_groups: int
    rope_dims: int
    kv_rank: int
    exact_rank: int
    elements_before: int
    key_scales: int = 0
    value_scales: int = 0

    @property
    def elements_after(self) -> int:
        """Numbers one cache row holds."""
        return self.kv_rank + self.rope_groups * self.rope_dims + self.norm_scales

    @property
    def norm_scales(self) -> int:
        """Inverse norms of keys and values in one cache row."""
        return self.key_scales + self.value_scales


def cache_elements(plans: Sequence[LatentPlan]) -> tuple[int, int]:
    """Numbers cached per token over all layers, before and after."""
    return sum(p.elements_before for p in plans), sum(p.elements_after for p in plans)


def cache_budget(site: AttentionSite, config: CompileConfig) -> int:
    """Numbers a layer's cache row may hold at the wanted ratio."""
    ratio = DEFAULT_CACHE_RATIO if config.cache_ratio is None else config.cache_ratio
    return int(ratio * site.elements_per_token + 1e-9)


def latent_budget(site: AttentionSite, config: CompileConfig) -> int:
    """Numbers a layer's cache row may hold beside the scales of norms, with one rope key for all heads."""
    return cache_budget(site, config) - site.key_scales(site.qk_dim) - site.value_scales


def liked_ranks(most: int) -> list[int]:
    """Ranks up to ``most`` that kernels like, from which a rank that nobody asked for is taken.

    A kernel cuts the latent into two tiles whose lengths are powers of two: ranks from 128 on are multiples of 16 with
    at most two set bits, which costs nothing that shows, as rope and other layers get what that leaves. From 64 on they
    are multiples of 4. Coarser steps for smaller ones (two set bits from 64 on, 8 from 32, 4 from 16) cost up to 7 % of
    the growth of perplexity at a quarter of the cache or so, and up to half of a growth of 0.1 %, of models of four
    million parameters.
    """
    return [r for r in range(1, most + 1) if r % _step(r) == 0 and (r < _LIKED_FROM or r.bit_count() <= 2)]


def _step(rank: int) -> int:
    return 16 if rank >= _LIKED_FROM else 4 if rank >= 64 else 1


def one_rank(plans: Sequence[LatentPlan]) -> tuple[LatentPlan, ...]:
    """The same with the smallest rank of all layers in every layer."""
    return tuple(replace(plan, kv_rank=min(p.kv_rank for p in plans)) for plan in plans)


def shared_rope_plan(site: AttentionSite, width: int, components: int, rank: int) -> LatentPlan:
    """The shape of a cache with one rope key for all heads.

    Args:
        site: The layer.
        width: Input width of its projections.
        components: Complex components that rotate.
        rank: Latent entries that were asked for; what is more than the exact rank is cut.
    """
    exact_rank = min(width, site.kv_heads * site.qk_dim + site.value_rows) + int(site.needs_constant(site.qk_dim))
    return LatentPlan(
        site=site.index,
        path=site.path,
        rope_groups=1,
        rope_dims=2 * components,
        kv_rank=min(rank, exact_rank),
        exact_rank=exact_rank,
        elements_before=site.elements_per_token,
        key_scales=site.key_scales(site.qk_dim),
        value_scales=site.value_scales,
    )


def clamped(plans: Sequence[LatentPlan], config: CompileConfig) -> list[str]:
    """Settings that are more than there is to keep."""
    found = []
    for name, asked, kept in (
        ("kv-rank", config.kv_rank, {p.path: p.kv_rank for p in plans}),
        ("rope-dims", config.rope_dims, {p.path: p.rope_dims for p in plans}),
    ):
        fewer = {path: count for path, count in kept.items() if asked is not None and count < asked}
        if fewer:
            path, count = next(iter(fewer.items()))
            found.append(
                f"--{name} {asked} is more than there is in {len(fewer)} of {len(plans)} layers ({path}: {count})"
            )
    return found


def plan_layers(sites: Sequence[AttentionSite], widths: Sequence[int], config: CompileConfig) -> tuple[LatentPlan, ...]:
    """Give every layer its rope dims and rank.

    Args:
        sites: The recognised attention layers.
        widths: Input width of every site's projections.
        config: What the user asked for.

    Returns:
        One plan per site.

    Raises:
        UsageError: The ratio leaves no room for a latent in a layer.
    """
    plans = tuple(_plan(site, width, config) for site, width in zip(sites, widths, strict=True))
    return one_rank(plans) if config.uniform_rank else plans


def _plan(site: AttentionSite, width: int, config: CompileConfig) -> LatentPlan:
    rotary = site.rope.rotary_dim
    if config.exact:
        rope_dims = rotary
    elif config.rope_dims is not None:
        rope_dims = min(config.rope_dims, rotary)
    else:
        rope_dims = min(rotary, max(2, site.qk_dim // 8 // 2 * 2))
    groups = site.kv_heads if rope_dims else 1
    key_rows, value_rows = site.kv_heads * (site.qk_dim - rope_dims), site.value_rows
    exact_rank = (
        min(width, key_rows + value_rows) if config.svd == "joint" else min(width, key_rows) + min(width, value_rows)
    )
    nope = site.qk_dim - rope_dims
    constant, scales = int(site.needs_constant(nope)), site.key_scales(nope) + site.value_scales
    exact_rank += constant
    rope_share = groups * rope_dims + scales
    if config.exact:
        rank = exact_rank
    elif config.kv_rank is not None:
        rank = min(config.kv_rank, exact_rank)  # more would only store zeros
    else:
        budget = cache_budget(site, config)
        if budget - rope_share < 1 + constant:
            least = math.ceil(10_000 * (rope_share + 1 + constant) / site.elements_per_token) / 10_000
            ratio = DEFAULT_CACHE_RATIO if config.cache_ratio is None else config.cache_ratio
            raise UsageError(
                f"A cache ratio of {ratio:g} leaves no room for a latent in {site.path}: it allows {budget} numbers "
                f"per token, and rope keys{' and norms' if scales else ''} take {rope_share}.",
                f"Use --cache-ratio {least:.4f} or more{', or fewer --rope-dims' if rope_share else ''}.",
            )
        rank = min(budget - rope_share, exact_rank)
    return LatentPlan(
        site=site.index,
        path=site.path,
        rope_groups=groups,
        rope_dims=rope_dims,
        kv_rank=rank,
        exact_rank=exact_rank,
        elements_before=site.elements_per_token,
        key_scales=site.key_scales(nope),
        value_scales=site.value_scales,
    )
