"""How a layer's budget becomes rope components and a latent rank, and how layers share what is left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from mla_compile.config import CompileConfig
from mla_compile.deepseek import rope_table
from mla_compile.passes.layers import MeasuredLayer
from mla_compile.passes.search import Shares, global_ranks
from mla_compile.plan import latent_budget, liked_ranks, shared_rope_plan

__all__ = ["LayerSizes", "same_ranks", "shared_ranks", "split_budget"]


@dataclass(frozen=True)
class LayerSizes:
    """Rope components of a layer, how many of them carry their own frequency only, and the latent's rank."""

    components: int
    own: int
    rank: int


def split_budget(layer: MeasuredLayer, config: CompileConfig, shares: Shares) -> LayerSizes:
    """Split a layer's budget; the rank is below 1 where there is no room.

    A rank that nobody asked for is one that kernels like, and rope gets what that leaves. Where the layout allows one
    length of the rope key only, it is that one.
    """
    site, even = layer.site, config.layout == "deepseek"
    budget = latent_budget(site, config)
    most = budget if even else layer.pairs  # some frequencies of an even table may carry nothing
    if config.rope_dims is not None:
        components = config.rope_dims // 2
    elif config.kv_rank is not None:
        components = site.qk_dim // 2
    else:
        components = max(1, round(shares.rope * budget / 2))
    fixed = config.rope_dims is not None
    if even and rope_table(site, 2 * components) is None:
        components, fixed = site.rope.rotary_dim // 2, True
    components = min(components, most)
    if config.kv_rank is not None:
        rank = config.kv_rank
    else:
        room = budget - 2 * components
        rank = max(liked_ranks(room), default=room)
        exact_rank = shared_rope_plan(site, layer.width, components, room).exact_rank
        if room >= exact_rank:
            rank = exact_rank
        elif not fixed:
            components = min((budget - rank) // 2, most)
    rank = shared_rope_plan(site, layer.width, components, rank).kv_rank
    return LayerSizes(components, round(shares.own * components), rank)


def same_ranks(sizes: Sequence[LayerSizes]) -> tuple[LayerSizes, ...]:
    """The smallest rank of all layers in every layer."""
    return tuple(replace(s, rank=min(other.rank for other in sizes)) for s in sizes)


def shared_ranks(
    layers: Sequence[MeasuredLayer], config: CompileConfig, sizes: Sequence[LayerSizes], losses: Sequence[Tensor]
) -> tuple[LayerSizes, ...]:
    """The same cache, its latent entries shared among layers by what they are worth.

    Args:
        layers: The layers.
        config: What the user asked for.
        sizes: Their sizes, of which only ranks change; none to less than a third.
        losses: Per layer, what leaving out each latent entry costs, falling.
    """
    total = sum(latent_budget(layer.site, config) - 2 * s.components for layer, s in zip(layers, sizes, strict=True))
    ladders = [
        sorted(r for r in {*liked_ranks(len(loss)), s.rank, len(loss)} if r >= max(1, s.rank // 3))
        for s, loss in zip(sizes, losses, strict=True)
    ]
    ranks = global_ranks(losses, total, ladders)
    return tuple(replace(s, rank=rank) for s, rank in zip(sizes, ranks, strict=True))
