"""What a stock DeepSeek-V3 checkpoint can express, decided on sites alone.

All layers have one rank and one rope key for all heads, of one length. It has one component for every frequency of one
table: ``theta^(-2i / rope_dims)``, or the table that the model itself rotates by, whatever its scaling. A row of the
cache is the latent and the rope key; logits are scaled and nothing else. Biases are no obstacle in transformers, where
a query latent with one constant entry carries those of queries, but serving engines do not read them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mla_compile.config import CompileConfig
from mla_compile.errors import RefusedError, UsageError
from mla_compile.plan import latent_budget
from mla_compile.site import SAME_FREQUENCY, AttentionSite, Rejection

__all__ = [
    "FLASHMLA",
    "DeepSeekShape",
    "deepseek_shape",
    "require_expressible",
    "require_table",
    "rope_table",
    "same_frequency",
    "with_preset",
]

FLASHMLA = (512, 64)
"""Latent entries and rotating channels that FlashMLA's kernels are written for."""


@dataclass(frozen=True, slots=True)
class DeepSeekShape:
    """What the configuration of a checkpoint says of all layers.

    Attributes:
        rope_dims: Length of the rope key.
        rope_theta: Base of its frequencies; None where they are scaled, and the model's own rope settings hold.
        kv_rank: Length of the latent.
    """

    rope_dims: int
    rope_theta: float | None
    kv_rank: int


def deepseek_shape(site: AttentionSite, rope_dims: int, kv_rank: int) -> DeepSeekShape:
    """The shape of a conversion whose layers all rotate as ``site`` does."""
    return DeepSeekShape(rope_dims, _theta(site), kv_rank)


def require_expressible(sites: Sequence[AttentionSite], kept: Sequence[Rejection]) -> None:
    """Refuse a model with layers that such a checkpoint has no place for.

    Raises:
        RefusedError: With every such layer and its reason.
    """
    found = [(site.path, _obstacle(site, sites[0])) for site in sites]
    found += [(layer.path, f"it keeps an ordinary cache ({layer.code.value})") for layer in kept]
    reasons = [f"{path}: {reason}" for path, reason in found if reason]
    if reasons:
        raise RefusedError(
            f"A DeepSeek checkpoint has no place for {len(reasons)} of {len(found)} attention layers: "
            f"{'; '.join(reasons)}.",
            "Use --layout free, and another format than deepseek or gguf.",
        )


def require_table(site: AttentionSite, rope_dims: int | None) -> None:
    """Refuse a length of the rope key that was asked for, where there is no such table.

    Raises:
        UsageError: With the length that there is.
    """
    if rope_dims is not None and rope_table(site, rope_dims) is None:
        raise UsageError(
            f"The layout deepseek has no rope key of {rope_dims} channels for this model"
            f"{', whose frequencies are scaled' if rope_dims else ''}.",
            f"Give --rope-dims {site.rope.rotary_dim}, the rotating channels of its heads, or leave it out.",
        )


def rope_table(site: AttentionSite, rope_dims: int) -> tuple[float, ...] | None:
    """Frequencies of a rope key of this length, from the fastest; None where the model's scaling allows no such table.

    Args:
        site: Any layer; all rotate alike.
        rope_dims: Length of the rope key, even.
    """
    if rope_dims == site.rope.rotary_dim:
        return tuple(sorted(site.rope.inv_freq, reverse=True))
    theta = _theta(site)
    return None if theta is None or not rope_dims else _geometric(theta, rope_dims // 2)


def with_preset(config: CompileConfig, site: AttentionSite) -> CompileConfig:
    """The settings of a preset, where the user gave none.

    Args:
        config: What the user asked for.
        site: Any layer; all are alike.

    Raises:
        UsageError: Sizes that were asked for do not fit it.
        RefusedError: The model's frequencies do not fit it.
    """
    if config.preset == "none":
        return config
    rank, dims = FLASHMLA
    rope = config.rope_dims
    if rope is None and rope_table(site, dims) is None:
        rope = site.rope.rotary_dim
    elif rope is None:  # as many as may rotate, and zeros can fill up
        rope = dims if 2 * latent_budget(site, config) >= dims else math.gcd(dims, site.rope.rotary_dim)
    if config.rope_dims is None and dims % rope:
        raise RefusedError(
            f"FlashMLA rotates {dims} channels, and the scaled frequencies of this model take {rope}.",
            "Leave --preset out.",
        )
    if (config.kv_rank or 0) > rank or not rope or dims % rope:
        raise UsageError(
            f"FlashMLA reads {rank} latent entries and {dims} rotating channels, and zeros fill up what is missing.",
            f"Give at most --kv-rank {rank}, and a divisor of {dims} as --rope-dims, or leave them out.",
        )
    sized = config.kv_rank is not None or config.cache_ratio is not None
    return config.model_copy(update={"rope_dims": rope, "kv_rank": config.kv_rank if sized else rank})


def _theta(site: AttentionSite) -> float | None:
    """The base of a layer's frequencies, to six digits; None where they are no unscaled geometric table."""
    own = sorted(site.rope.inv_freq, reverse=True)
    count = len(own)
    if count < 2 or own[-1] <= 0:
        return None
    theta = float(f"{own[-1] ** (-count / (count - 1)):.6g}")
    return theta if _alike(own, _geometric(theta, count)) else None


def _geometric(theta: float, count: int) -> tuple[float, ...]:
    return tuple(theta ** (-i / count) for i in range(count))


def same_frequency(first: float, second: float) -> bool:
    """Whether two frequencies are taken to be one."""
    return abs(first - second) <= SAME_FREQUENCY * second


def _alike(first: Sequence[float], second: Sequence[float]) -> bool:
    return len(first) == len(second) and all(map(same_frequency, first, second))


def _obstacle(site: AttentionSite, first: AttentionSite) -> str | None:
    """Why a layer cannot be expressed beside ``first``, if it cannot."""
    obstacles = {
        "it has a sliding window": site.mask.window is not None,
        "its logits have a soft-cap": site.softcap > 0,
        "it has attention sinks": site.sinks is not None,
        "it has ALiBi slopes": site.slopes is not None,
        "its keys have a norm": site.key.norm is not None,
        "its values have a norm": site.value.norm is not None,
        "its queries are not a linear projection": site.query.norm is not None or site.query.activation is not None,
        "nothing in it rotates": not site.rope.rotary_dim,
        f"its heads are not those of {first.path}": _sizes(site) != _sizes(first),
        f"it does not rotate like {first.path}": not _alike(sorted(site.rope.inv_freq), sorted(first.rope.inv_freq)),
    }
    return next((reason for reason, given in obstacles.items() if given), None)


def _sizes(site: AttentionSite) -> tuple[int, ...]:
    return site.heads, site.kv_heads, site.qk_dim, site.v_dim, site.value_rows
