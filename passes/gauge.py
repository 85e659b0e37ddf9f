"""Scales that cancel: which of two matrices whose product counts is large.

A latent entry may be multiplied by any number if its up-projections are divided by it, and so may a rotating component
of a rope key (real and imaginary part alike) if the queries that meet it are. Nothing computes another result, but a
step of training does: an optimiser that moves all numbers alike tears a product whose halves are of very different
size. With both halves of one norm every product is moved in proportion to its size.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mla_compile.latent_weights import LatentWeights

__all__ = ["balanced"]


def balanced(weights: LatentWeights) -> LatentWeights:
    """The same layer with latent entries, and components of rope keys, as large as what they are multiplied with.

    Entries one of whose sides is zero are left alone, and with them the constant entry, whose row is.
    """
    rank = weights.key_up.shape[2]
    groups, half = weights.inv_freq.shape
    heads, head_dim, width = weights.query.shape
    shared, nope = heads // groups, head_dim - 2 * half

    down = weights.row[:rank].square().sum(1)
    up = weights.key_up.square().sum((0, 1)) + weights.value_up.square().sum((0, 2))
    latent = _factors(down, up)
    keys = weights.row[rank:].reshape(groups, 2, half, weights.row.shape[1]).square().sum((1, 3))
    queries = weights.query[:, nope:].reshape(groups, shared, 2, half, width).square().sum((1, 2, 4))
    rope = _factors(keys, queries).repeat(1, 2)

    row = torch.cat([latent, rope.flatten()])
    query = torch.cat([rope.new_ones(heads, nope), 1 / rope.repeat_interleave(shared, 0)], 1)
    return replace(
        weights,
        query=weights.query * query[..., None],
        query_bias=None if weights.query_bias is None else weights.query_bias * query,
        row=weights.row * row[:, None],
        row_bias=None if weights.row_bias is None else weights.row_bias * row,
        key_up=weights.key_up / latent,
        value_up=weights.value_up / latent[:, None],
        rope_shift=None if weights.rope_shift is None else weights.rope_shift * rope,
    )


def _factors(first: Tensor, second: Tensor) -> Tensor:
    """What to multiply the first with, and divide the second by, so that they are alike; from sums of squares."""
    return torch.where((first > 0) & (second > 0), (second / first) ** 0.25, 1.0)
