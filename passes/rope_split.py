"""Choose what goes on rotating: a few components of all heads' rotary pairs, in one shared head.

A rotary pair of a key is a complex number ``z``, and a logit is ``Re sum conj(q) z exp(-i D f)`` over pairs, ``D``
being the distance and ``f`` the pair's frequency. For pairs of one frequency every linear combination across key heads
rotates alike, so that keeping the leading eigenvectors of their covariance is a principal component analysis in complex
numbers. What is dropped stops rotating; how much that costs depends on how far back the head looks: with
``a = E exp(-i D f)`` folded into the query, ``1 - |a|^2`` of the pair's share is lost. A dropped pair may also ride on
a component that rotates at another frequency ``g``, with ``b = E exp(-i D (f - g))`` folded, at the price
``1 - |b|^2``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mla_compile.passes.statistics import SiteStatistics, key_weighting
from mla_compile.passes.weights import SiteWeights
from mla_compile.site import AttentionSite

__all__ = ["RopeSplit", "RotaryChannels", "real_split", "rotary_channels", "split_rope"]


@dataclass(frozen=True)
class RotaryChannels:
    """The rotary pairs of all key heads as ``N = n * P`` complex channels, and what they are worth.

    Keys are those in front of their norms. What the norms multiply them with is part of the weights of tokens in
    ``moment``, and of heads in ``energy``: see :func:`~mla_compile.passes.statistics.key_weighting`.

    Attributes:
        moment: ``[N, N]`` complex, ``E z z^H``.
        energy: ``[H, P]``, Fisher-weighted ``E |q|^2`` of every query head's pairs, times its key's mean squared scale
            and ``scale^2 / 4``.
        kept_still: ``[H, P]`` complex, ``a``: what is left of a pair on average that does not rotate.
        kept_at: ``[H, P, P]`` complex, ``b[h, l, m]``: the same for pair ``l`` that rotates at frequency ``m``.
        frequencies: ``[P]`` radians per position.
    """

    moment: Tensor
    energy: Tensor
    kept_still: Tensor
    kept_at: Tensor
    frequencies: Tensor

    def unfolded(self) -> RotaryChannels:
        """The same without expected rotations: what does not rotate enters queries as it is."""
        return replace(self, kept_still=torch.ones_like(self.kept_still), kept_at=torch.ones_like(self.kept_at))


@dataclass(frozen=True)
class RopeSplit:
    """Queries and keys of a site as rotating components and a rest that does not rotate.

    Attributes:
        inv_freq: ``[p]`` radians per position of the components.
        key_rope: ``[2p, n * D]``: components ``[real | imaginary]`` from the key channels of all heads.
        key_rest: ``[n * D, n * D]``: what is left of the key channels.
        query_rope: ``[H, 2p, D]``: a query head's part that meets the components.
        query_rest: ``[H, D, D]``: its part that meets the rest of its own key head.
        loss: Expected loss of letting the rest stand still, in nats per token, to second order.
    """

    inv_freq: Tensor
    key_rope: Tensor
    key_rest: Tensor
    query_rope: Tensor
    query_rest: Tensor
    loss: float


def rotary_channels(site: AttentionSite, weights: SiteWeights, statistics: SiteStatistics) -> RotaryChannels:
    """Bring keys, queries and distances into complex form."""
    first, second = torch.tensor(site.rope.pairs, dtype=torch.long).reshape(-1, 2).unbind(1)
    key = weights.key.weight
    channels = torch.complex(key[:, first], key[:, second]).flatten(0, 1)
    bias = torch.complex(weights.key.bias[:, first], weights.key.bias[:, second]).flatten()
    factors, mean, inputs = key_weighting(site, statistics)
    middle = channels @ mean.to(channels.dtype)
    moment = channels @ inputs.to(channels.dtype) @ channels.mH
    moment = moment + torch.outer(middle, bias.conj()) + torch.outer(bias, (middle + bias).conj())
    factors = factors.repeat_interleave(site.heads // site.kv_heads)
    squares = statistics.query.diagonal(dim1=1, dim2=2) * factors[:, None]
    frequencies = torch.tensor(site.rope.inv_freq, dtype=torch.float64)
    places = torch.arange(statistics.distance.shape[1], dtype=torch.float64)

    def expected(differences: Tensor) -> Tensor:
        turned = torch.polar(torch.ones(()).double(), -places[:, None] * differences.flatten())
        kept: Tensor = (statistics.distance.to(turned.dtype) @ turned).unflatten(1, differences.shape)
        return kept

    return RotaryChannels(
        moment=moment,
        # A logit's error is the real part of a product of complex numbers, half of whose square is lost; half again is
        # the second-order term of the loss.
        energy=(squares[:, first] + squares[:, second]) * site.scale**2 / 4,
        kept_still=expected(frequencies),
        kept_at=expected(frequencies[:, None] - frequencies[None]),
        frequencies=frequencies,
    )


def split_rope(site: AttentionSite, found: RotaryChannels, components: int, own: int) -> RopeSplit:
    """Choose components greedily, each the best for what the earlier ones left.

    Args:
        site: The layer.
        found: Its rotary channels.
        components: How many complex components rotate, at most ``N``.
        own: How many of them carry pairs of their own frequency only; the others may take along pairs of other
            frequencies that would be lost.
    """
    heads, pairs = found.energy.shape
    kv_heads = site.kv_heads
    group, count = heads // kv_heads, kv_heads * pairs
    still = 1 - found.kept_still.abs().square()
    moved = 1 - found.kept_at.abs().square()
    gain = (still[:, :, None] - moved).clamp(min=0)
    worth = _per_channel(found.energy[:, :, None] * gain, group)  # [N, P]
    owners = torch.arange(count) % pairs
    worth_own = torch.where(owners[:, None] == torch.arange(pairs), worth, 0.0)
    moment, rest = found.moment, torch.eye(count, dtype=found.moment.dtype)
    encoders, decoders, targets, loss = [], [], [], 0.0
    for step in range(min(components, count)):
        weight, target, vector = _best(moment, worth_own if step < own else worth, step)
        scale = weight.sqrt()
        usable = scale > 1e-6 * scale.max()
        inverse = torch.where(usable, 1 / scale.clamp(min=1e-300), 0.0)
        encoder = vector.conj() * scale
        decoder = vector * inverse
        # The component is a combination of what is left, so that nothing is carried twice.
        encoders.append(encoder @ rest)
        decoders.append(decoder)
        targets.append(target)
        price = _per_channel(found.energy * moved[:, :, target], group)
        kept = (encoder @ moment @ encoder.conj()).real
        loss += float((price * decoder.abs().square()).sum() * kept)
        removal = torch.eye(count, dtype=moment.dtype) - torch.outer(decoder, encoder)
        rest = removal @ rest
        moment = removal @ moment @ removal.mH
    loss += float((_per_channel(found.energy * still, group) * moment.diagonal().real).sum())
    return real_split(site, found, encoders, decoders, targets, rest, loss)


def _per_channel(per_head: Tensor, group: int) -> Tensor:
    """Sum over the query heads of a group: ``[H, P, ...]`` to ``[N, ...]``."""
    grouped: Tensor = per_head.unflatten(0, (-1, group)).sum(1).flatten(0, 1)
    return grouped


def _best(moment: Tensor, worth: Tensor, step: int) -> tuple[Tensor, int, Tensor]:
    """The target frequency whose leading component is worth most; one of them where nothing is worth anything.

    Returns:
        Weights of the channels ``[N]``, the target, and the leading eigenvector ``[N]``.
    """
    best: tuple[float, int, Tensor] | None = None
    for target in range(worth.shape[1]):
        chosen = worth[:, target].nonzero()[:, 0]
        if not len(chosen):
            continue
        scale = worth[chosen, target].sqrt()
        if best is not None and float((scale.square() * moment.diagonal()[chosen].real).sum()) <= best[0]:
            continue  # all of it together would be worth less
        matrix = scale[:, None] * moment[chosen][:, chosen] * scale
        values, vectors = torch.linalg.eigh(matrix)
        if best is None or float(values[-1]) > best[0]:
            vector = torch.zeros(len(worth), dtype=moment.dtype)
            vector[chosen] = vectors[:, -1]
            best = (float(values[-1]), target, vector)
    if best is None:
        place = step % len(worth)
        vector = torch.zeros(len(worth), dtype=moment.dtype)
        vector[place] = 1
        return vector.real, place % worth.shape[1], vector
    return worth[:, best[1]], best[1], best[2]


def real_split(
    site: AttentionSite,
    found: RotaryChannels,
    encoders: Sequence[Tensor],
    decoders: Sequence[Tensor],
    targets: Sequence[int],
    rest: Tensor,
    loss: float,
) -> RopeSplit:
    """Write complex maps of pairs as real maps of channels.

    Args:
        site: The layer.
        found: Its rotary channels, for the expected rotations that are folded into queries.
        encoders: ``[N]`` complex per component, from key channels to the component.
        decoders: ``[N]`` complex per component, from the component back to key channels.
        targets: Which pair's frequency each component rotates at.
        rest: ``[N, N]`` complex, from key channels to what is left of them.
        loss: What the split costs.
    """
    heads, pairs = found.energy.shape
    dim, kv_heads, count = site.qk_dim, site.kv_heads, len(encoders)
    group = heads // kv_heads
    first, second = torch.tensor(site.rope.pairs, dtype=torch.long).reshape(-1, 2).unbind(1)
    offsets = torch.arange(kv_heads)[:, None] * dim
    real_places, imaginary_places = (offsets + first).flatten(), (offsets + second).flatten()

    key_rope = torch.zeros(2 * count, kv_heads * dim, dtype=torch.float64)
    encoder = torch.stack([*encoders]) if count else torch.zeros(0, kv_heads * pairs, dtype=torch.complex128)
    key_rope[:count, real_places], key_rope[:count, imaginary_places] = encoder.real, -encoder.imag
    key_rope[count:, real_places], key_rope[count:, imaginary_places] = encoder.imag, encoder.real

    key_rest = torch.eye(kv_heads * dim, dtype=torch.float64)
    for rows, columns, part in (
        (real_places, real_places, rest.real),
        (real_places, imaginary_places, -rest.imag),
        (imaginary_places, real_places, rest.imag),
        (imaginary_places, imaginary_places, rest.real),
    ):
        key_rest[rows[:, None], columns] = part

    query_rope = torch.zeros(heads, 2 * count, dim, dtype=torch.float64)
    query_rest = torch.eye(dim, dtype=torch.float64).repeat(heads, 1, 1)
    kept_at = found.kept_at
    for head in range(heads):
        own = slice(head // group * pairs, (head // group + 1) * pairs)
        for place, (decoder, target) in enumerate(zip(decoders, targets, strict=True)):
            # conj(q') = conj(q) . decoder b, hence q' = q . conj(decoder b)
            folded = (decoder[own] * kept_at[head, :, target]).conj()
            query_rope[head, place, first], query_rope[head, place, second] = folded.real, -folded.imag
            query_rope[head, count + place, first] = folded.imag
            query_rope[head, count + place, second] = folded.real
        still = found.kept_still[head].conj()
        query_rest[head, first, first], query_rest[head, second, second] = still.real, still.real
        query_rest[head, first, second], query_rest[head, second, first] = -still.imag, still.imag
    return RopeSplit(
        inv_freq=found.frequencies[torch.tensor(targets, dtype=torch.long)],
        key_rope=key_rope,
        key_rest=key_rest,
        query_rope=query_rope,
        query_rest=query_rest,
        loss=loss,
    )
