"""Queries through few numbers: the best matrix of a rank, by what errors of logits it makes on the text.

With keys of second moment ``M`` per head and inputs of second moment ``C``, an error ``E`` of a query matrix costs
``tr(M E C E^T)`` of squared logits. The best matrix of rank ``n`` is the truncated singular value decomposition of
``M^(1/2) W C^(1/2)`` (Eckart-Young), read back through the roots. Nothing is lost at the full rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mla_compile.latent_weights import LatentWeights

__all__ = ["full_query_rank", "with_query_rank"]

_LEAST = 1e-6
"""Smallest share of the mean that a direction of the keys counts, so that roots can be turned back."""


def full_query_rank(weights: LatentWeights) -> int:
    """The rank from which on queries lose nothing."""
    heads, head_dim, width = weights.query.shape
    return min(heads * head_dim, width)


def with_query_rank(
    weights: Sequence[LatentWeights], moments: Sequence[Tensor], rank: int
) -> tuple[LatentWeights, ...]:
    """The same layers with query matrices of a rank, all heads of a layer together.

    Args:
        weights: Latent weights of every site.
        moments: ``[width, width]`` of every site's inputs, as its sizes were chosen by.
        rank: Numbers that all queries of a token are made from.
    """
    return tuple(_limited(layer, moment, rank) for layer, moment in zip(weights, moments, strict=True))


def _limited(weights: LatentWeights, moment: Tensor, rank: int) -> LatentWeights:
    """One layer; ``moment`` ``[width, width]`` is that of its inputs."""
    if rank >= full_query_rank(weights):
        return weights
    roots = _key_roots(weights, moment)
    weighted = (roots @ weights.query).flatten(0, 1)
    values, vectors = torch.linalg.eigh(moment)
    inputs = vectors * values.clamp(min=0).sqrt()
    left = torch.linalg.svd(weighted @ inputs, full_matrices=False).U[:, :rank]
    kept = (left @ (left.mT @ weighted)).view_as(weights.query)
    return replace(weights, query=torch.linalg.solve(roots, kept))


def _key_roots(weights: LatentWeights, moment: Tensor) -> Tensor:
    """Roots ``[heads, head_dim, head_dim]`` of the second moments of the keys that every head's queries meet."""
    heads, head_dim, _ = weights.query.shape
    latent = weights.key_up.shape[2]
    groups, half = weights.inv_freq.shape
    cached = weights.row @ moment @ weights.row.mT
    still = weights.key_up @ cached[:latent, :latent] @ weights.key_up.mT
    power = cached.diagonal()[latent:].view(groups, 2, half).mean(1).repeat(1, 2)  # turned to any angle
    found = moment.new_zeros(heads, head_dim, head_dim)
    nope = head_dim - 2 * half
    found[:, :nope, :nope] = still.repeat_interleave(heads // len(still), 0)
    found[:, nope:, nope:] = torch.diag_embed(power.repeat_interleave(heads // groups, 0))
    values, vectors = torch.linalg.eigh(found)
    least = _LEAST * values.mean(1, keepdim=True)
    return torch.matmul(vectors * values.clamp(min=least).sqrt()[:, None], vectors.mT)
