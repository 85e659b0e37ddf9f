"""Attention layers of random weights and statistics in float64, without a graph around them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from mla_compile.latent_weights import LatentWeights
from mla_compile.passes.weights import HeadWeights, SiteWeights
from mla_compile.runtime import reference
from mla_compile.site import AttentionSite, Mask, Norm, Projection, Rope, Scores
from mla_compile.site_statistics import SiteStatistics

LENGTH = 9


@dataclass(frozen=True)
class Layer:
    """Sizes of one attention layer; every number of it follows from the seed."""

    heads: int = 4
    kv_heads: int = 2
    dim: int = 8
    pairs: int = 4
    v_dim: int = 5
    width: int = 26
    first: int = 0
    interleaved: bool = False
    value_heads: int | None = None
    window: int | None = None
    softcap: float = 0.0
    sinks: bool = False
    key_norm: bool = False
    value_norm: bool = False
    seed: int = 0

    def draw(self, salt: int, *shape: int) -> Tensor:
        """Normal numbers, others for every salt."""
        generator = torch.Generator().manual_seed(1000 * self.seed + salt)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def rope(self) -> Rope:
        a, step = self.first, 2 if self.interleaved else 1
        apart = 1 if self.interleaved else self.pairs
        pairs = tuple((a + step * i, a + step * i + apart) for i in range(self.pairs))
        return Rope(pairs, tuple(0.9 * 0.6**i for i in range(self.pairs)))

    def site(self) -> AttentionSite:
        def projection(heads: int, dim: int, norm: bool = False, shift: Tensor | None = None) -> Projection:
            rows = tuple(tuple(range(h * dim, (h + 1) * dim)) for h in range(heads))
            found = Norm("rms", rows, 1e-3) if norm else None
            offset = None if shift is None else tuple(map(tuple, shift.tolist()))
            return Projection("y", "x", "w", "b", rows, ((1.0,) * dim,) * heads, offset, found)

        sinks = tuple(self.draw(1, self.heads).tolist()) if self.sinks else None
        return AttentionSite(
            index=0,
            path="layer",
            query=projection(self.heads, self.dim),
            key=projection(self.kv_heads, self.dim, self.key_norm),
            value=projection(
                self.value_heads or self.kv_heads,
                self.v_dim,
                self.value_norm,
                self.weights().value.shift if self.value_norm else None,
            ),
            rope=self.rope(),
            scores=Scores(
                0.4, Mask(self.window), softcap=self.softcap, sinks=sinks, sinks_name="sinks" if self.sinks else None
            ),
            output="o",
            output_axes=("b", "s", "h", "d"),
            softmax="s",
            error=0.0,
        )

    def weights(self, biased: bool = True) -> SiteWeights:
        def heads(salt: int, *shape: int, shifted: bool = False) -> HeadWeights:
            bias = self.draw(salt + 1, *shape) * biased
            shift = self.draw(16, *shape) * (biased and shifted)
            return HeadWeights(self.draw(salt, *shape, self.width) / math.sqrt(self.width), bias, shift)

        return SiteWeights(
            heads(10, self.heads, self.dim),
            heads(12, self.kv_heads, self.dim),
            heads(14, self.value_heads or self.kv_heads, self.v_dim, shifted=self.value_norm),
        )

    def statistics(self) -> SiteStatistics:
        """Statistics as they might be: positive definite, and every head with distances of its own."""

        def spread(salt: int, count: int, dim: int) -> Tensor:
            root = self.draw(salt, count, dim, 2 * dim)
            return root @ root.mT / (2 * dim)

        mean = self.draw(20, self.width)
        falling = torch.exp(-0.3 * torch.arange(LENGTH)) * self.draw(23, self.heads, LENGTH).square()
        return SiteStatistics(
            tokens=100,
            mean=mean,
            moment=spread(21, 1, self.width)[0] + torch.outer(mean, mean),
            query=spread(22, self.heads, self.dim),
            distance=falling / falling.sum(1, keepdim=True),
            output=spread(24, self.heads, self.v_dim),
            attended=torch.sigmoid(self.draw(25, self.heads)),
        )

    def inputs(self, length: int = LENGTH) -> Tensor:
        return self.draw(30, 2, length, self.width)

    def operands(self, x: Tensor, biased: bool = True) -> tuple[Tensor, ...]:
        """Queries, keys and values ``[B, S, heads, D]``, not rotated."""
        weights = self.weights(biased)
        query, key, value = (self._linear(x, w) for w in (weights.query, weights.key, weights.value))
        key = key * _inverse_norm(key) if self.key_norm else key
        value = value * _inverse_norm(value) if self.value_norm else value
        return query, key, value + weights.value.shift

    @staticmethod
    def _linear(x: Tensor, weights: HeadWeights) -> Tensor:
        return torch.einsum("bsw,hdw->bshd", x, weights.weight) + weights.bias

    def attend(self, x: Tensor, biased: bool = True) -> Tensor:
        """The layer's attention outputs, as it was before any conversion."""
        site = self.site()
        sinks = None if site.scores.sinks is None else torch.tensor(site.scores.sinks, dtype=torch.float64)
        return reference.attention(
            *self.operands(x, biased),
            site.rope.pairs,
            site.rope.inv_freq,
            site.scale,
            site.mask.window,
            sinks=sinks,
            softcap=site.softcap,
        )

    def attend_latent(self, latent: LatentWeights, x: Tensor) -> Tensor:
        """The same from latent weights."""
        site = self.site()

        def biased(y: Tensor, bias: Tensor | None) -> Tensor:
            return y if bias is None else y + bias

        angle = torch.arange(x.shape[1])[:, None, None] * latent.inv_freq
        row = biased(x @ latent.row.T, latent.row_bias)
        for normed, weights in ((self.key_norm, self.weights().key), (self.value_norm, self.weights().value)):
            if normed:
                row = torch.cat([row, _inverse_norm(self._linear(x, weights)).squeeze(-1)], -1)
        output, _ = reference.latent_attention(
            biased(torch.einsum("bsw,hdw->bshd", x, latent.query), latent.query_bias),
            row,
            x.new_zeros(x.shape[0], 0, row.shape[2]),
            torch.ones(x.shape[:2], dtype=torch.long),
            angle.cos().expand(x.shape[0], -1, -1, -1),
            angle.sin().expand(x.shape[0], -1, -1, -1),
            latent.key_up,
            latent.value_up,
            site.scale,
            site.mask.window,
            sinks=None if site.scores.sinks is None else torch.tensor(site.scores.sinks, dtype=torch.float64),
            softcap=site.softcap,
            value_scales=site.value_scales,
            scaled_rope=latent.scaled_rope,
        )
        return biased(output, latent.output_bias)


def _inverse_norm(heads: Tensor) -> Tensor:
    return (heads.square().mean(-1, keepdim=True) + 1e-3).rsqrt()


LAYERS = {
    "grouped": Layer(),
    "interleaved": Layer(interleaved=True),
    "one key head": Layer(kv_heads=1),
    "key head per query head": Layer(kv_heads=4),
    "partial rotary": Layer(pairs=2, first=3),
    "no rope": Layer(pairs=0),
    "narrow input": Layer(width=7),
}


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    """Layers of any size, with rope or without."""
    kv_heads, dim = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    pairs = draw(st.integers(0, dim // 2))
    return Layer(
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        dim=dim,
        pairs=pairs,
        first=draw(st.integers(0, dim - 2 * pairs)),
        interleaved=draw(st.booleans()),
        v_dim=draw(st.integers(1, 6)),
        width=draw(st.integers(dim * kv_heads, 40)),
        seed=draw(st.integers(0, 2**16)),
    )
