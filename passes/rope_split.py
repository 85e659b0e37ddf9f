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

from mla_compile.passes.lanczos import leading_vectors
from mla_compile.passes.statistics import key_weighting
from mla_compile.passes.weights import SiteWeights
from mla_compile.site import SAME_FREQUENCY, AttentionSite
from mla_compile.site_statistics import SiteStatistics

__all__ = ["RopeSplit", "RotaryChannels", "real_split", "rotary_channels", "split_rope"]

_USABLE = 1e-6
"""Channels whose root of worth is smaller than this, relative to the largest, take no part in a component."""
_BATCH = 8
"""Targets that are tried side by side: one pass over the moment serves them all."""
_ROUGH, _FINE = 1e-3, 1e-10
"""Residuals of eigenvectors that are compared, and of the one that is used; eigenvalues' errors are their squares."""
_NOISE = 0.1
"""What is added to the eigenvectors that a search starts from: without it what has become of them is all it sees."""


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
        kept_at: ``[H, P, T]`` complex, ``b[h, l, m]``: the same for pair ``l`` that rotates at target ``m``.
        frequencies: ``[P]`` radians per position.
        targets: ``[T]`` radians per position that components may rotate at; the pairs' own unless others are aimed at.
        distance: ``[H, L]``, share of what a head's logits are worth at every distance; sums to 1.
    """

    moment: Tensor
    energy: Tensor
    kept_still: Tensor
    kept_at: Tensor
    frequencies: Tensor
    targets: Tensor
    distance: Tensor

    def aimed_at(self, targets: Tensor) -> RotaryChannels:
        """The same for components that rotate at other frequencies ``[T]``."""
        kept_at = _expected_turn(self.distance, self.frequencies[:, None] - targets)
        return replace(self, targets=targets, kept_at=kept_at)

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
        own: Whether each component carries pairs of its own frequency only.
    """

    inv_freq: Tensor
    key_rope: Tensor
    key_rest: Tensor
    query_rope: Tensor
    query_rest: Tensor
    loss: float
    own: tuple[bool, ...]


def rotary_channels(site: AttentionSite, weights: SiteWeights, statistics: SiteStatistics) -> RotaryChannels:
    """Bring keys, queries and distances into complex form."""
    first, second = torch.tensor(site.rope.pairs, dtype=torch.long).reshape(-1, 2).unbind(1)
    real, imaginary = (weights.key.weight[:, part].flatten(0, 1) for part in (first, second))
    bias = torch.complex(weights.key.bias[:, first], weights.key.bias[:, second]).flatten()
    factors, mean, inputs = key_weighting(site, statistics)
    middle = torch.complex(real @ mean, imaginary @ mean)
    moment = _complex_moment(real, imaginary, inputs)
    moment = moment + torch.outer(middle, bias.conj()) + torch.outer(bias, (middle + bias).conj())
    factors = factors.repeat_interleave(site.heads // site.kv_heads)
    squares = statistics.query.diagonal(dim1=1, dim2=2) * factors[:, None]
    frequencies = torch.tensor(site.rope.inv_freq, dtype=torch.float64)
    return RotaryChannels(
        moment=moment,
        # A logit's error is the real part of a product of complex numbers, half of whose square is lost; half again is
        # the second-order term of the loss.
        energy=(squares[:, first] + squares[:, second]) * site.scale**2 / 4,
        kept_still=_expected_turn(statistics.distance, frequencies),
        kept_at=_expected_turn(statistics.distance, frequencies[:, None] - frequencies),
        frequencies=frequencies,
        targets=frequencies,
        distance=statistics.distance,
    )


def _complex_moment(real: Tensor, imaginary: Tensor, inputs: Tensor) -> Tensor:
    """``E z z^H`` of ``z = (A + i B) x``, by products of real matrices: half of what complex ones take."""
    count, both = len(real), torch.cat([real, imaginary])
    squares = (both @ inputs) @ both.mT
    top, bottom = squares[:count], squares[count:]
    return torch.complex(top[:, :count] + bottom[:, count:], bottom[:, :count] - top[:, count:])


def _expected_turn(distance: Tensor, frequencies: Tensor) -> Tensor:
    """``E exp(-i D f)`` over every head's distances ``[H, L]``, for frequencies of any shape behind the heads."""
    places = torch.arange(distance.shape[1], dtype=torch.float64)
    turned = torch.polar(torch.ones(()).double(), -places[:, None] * frequencies.flatten())
    kept: Tensor = (distance.to(turned.dtype) @ turned).unflatten(1, frequencies.shape)
    return kept


def split_rope(site: AttentionSite, found: RotaryChannels, components: int, own: int, once: bool = False) -> RopeSplit:
    """Choose components greedily, each the best for what the earlier ones left.

    Args:
        site: The layer.
        found: Its rotary channels.
        components: How many complex components rotate, at most ``N``.
        own: How many of them carry pairs of their own frequency only; the others may take along pairs of other
            frequencies that would be lost.
        once: Every target frequency gets exactly one of the ``components``, which are as many and in their order; one
            that nothing gains from carries nothing.
    """
    group, count = site.heads // site.kv_heads, len(found.moment)
    components = components if once else min(components, count)
    still = 1 - found.kept_still.abs().square()
    moved = 1 - found.kept_at.abs().square()
    worth = _per_channel(found.energy[:, :, None] * (still[:, :, None] - moved).clamp(min=0), group)
    price = _per_channel(found.energy[:, :, None] * moved, group)

    chosen = _own_components(found, worth, 1 if once else count, min(own, components) if worth.any() else components)
    moment, loss = found.moment, 0.0
    encoders = decoders = moment[:0]
    if chosen:
        encoders, decoders = torch.stack([c.encoder for c in chosen]), torch.stack([c.decoder for c in chosen])
        moment, _, _ = _removed(moment, encoders, decoders.mT)
    riders = _Riders(worth.sqrt(), moment)
    while len(chosen) < components and (rider := riders.best(moment, {c.target for c in chosen} if once else set())):
        moment, reach, held = _removed(moment, rider.encoder[None], rider.decoder[:, None])
        riders.removed(rider.decoder, reach[:, 0])
        loss += float((price[:, rider.target] * rider.decoder.abs().square()).sum() * held.real)
        # The component is a combination of what is left, so that nothing is carried twice.
        own_encoder = rider.encoder - (decoders @ rider.encoder) @ encoders
        chosen.append(replace(rider, encoder=own_encoder))
        encoders, decoders = torch.cat([encoders, own_encoder[None]]), torch.cat([decoders, rider.decoder[None]])
    rest = torch.eye(count, dtype=moment.dtype) - decoders.mT @ encoders
    loss += float((_per_channel(found.energy * still, group) * moment.diagonal().real).sum())
    idle = {*range(components)} - {c.target for c in chosen} if once else [0] * (components - len(chosen))
    chosen += [_Component(t, *torch.zeros(2, count, dtype=moment.dtype)) for t in idle]
    if once:
        chosen.sort(key=lambda c: c.target)
    return real_split(
        site, found, [c.encoder for c in chosen], [c.decoder for c in chosen], [c.target for c in chosen], rest, loss
    )


def _per_channel(per_head: Tensor, group: int) -> Tensor:
    """Sum over the query heads of a group: ``[H, P, ...]`` to ``[N, ...]``."""
    grouped: Tensor = per_head.unflatten(0, (-1, group)).sum(1).flatten(0, 1)
    return grouped


@dataclass(frozen=True)
class _Component:
    """The target frequency a component rotates at, and ``[N]`` complex maps from key channels to it and back."""

    target: int
    encoder: Tensor
    decoder: Tensor


def _component(target: int, scale: Tensor, vector: Tensor) -> _Component:
    """A component from an eigenvector of the moment between ``scale``, the roots of what channels are worth."""
    inverse = torch.where(scale > _USABLE * scale.max(), 1 / scale.clamp(min=1e-300), 0.0)
    return _Component(target, vector.conj() * scale, vector * inverse)


def _removed(moment: Tensor, encoders: Tensor, decoders: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(1 - D E) M (1 - D E)^H = M - D R^H - R D^H`` for encoders ``E`` and decoders ``D``; ``R``; and ``E M E^H``."""
    reach = moment @ encoders.mH
    held = encoders @ reach
    reach = reach - decoders @ held / 2
    left, right = torch.cat([decoders, reach], 1), torch.cat([reach, decoders], 1)
    return torch.addmm(moment, left, right.mH, alpha=-1), reach, held


def _own_components(found: RotaryChannels, worth: Tensor, each: int, most: int) -> list[_Component]:
    """The ``most`` components of their own frequency that are worth most, at most ``each`` of every target.

    What one frequency's components hold leaves the moment among another frequency's channels as it is, so that the
    greedy order is that of all frequencies' eigenvalues.
    """
    pairs = len(found.frequencies)
    same = _alike(found)
    ranked: list[tuple[float, int, Tensor, Tensor, Tensor]] = []
    for target in range(len(found.targets)):
        at = (same[:, target] & ~same[:, :target].any(1)).nonzero()[:, 0]
        rows = (torch.arange(0, len(found.moment), pairs)[:, None] + at).flatten()
        scale = worth[rows, target].sqrt()
        seen = bool(scale.any())
        scale = scale if seen else torch.ones_like(scale)  # where nobody looks, all is alike
        values, vectors = torch.linalg.eigh(scale[:, None] * found.moment[rows][:, rows] * scale)
        best = list(zip(values.tolist(), vectors.T, strict=True))[::-1][:each]
        ranked += [(value * seen, target, rows, scale, vector) for value, vector in best]
    found_components = []
    for _, target, rows, scale, vector in sorted(ranked, key=lambda x: -x[0])[:most]:
        scales, vectors = torch.zeros(len(worth), dtype=scale.dtype), torch.zeros(len(worth), dtype=vector.dtype)
        scales[rows], vectors[rows] = scale, vector
        found_components.append(_component(target, scales, vectors))
    return found_components


def _alike(found: RotaryChannels) -> Tensor:
    """Whether a target is a pair's own frequency, ``[P, T]``."""
    return (found.frequencies[:, None] - found.targets).abs() <= SAME_FREQUENCY * found.targets


class _Riders:
    """Finds the target whose leading component is worth most, remembering where earlier searches ended.

    Args:
        scale: ``[N, T]``, roots of what channels are worth at every target.
        moment: ``[N, N]``, at the beginning.
    """

    def __init__(self, scale: Tensor, moment: Tensor) -> None:
        self._scale = scale.T.contiguous()
        generator = torch.Generator("cpu").manual_seed(0)  # the same numbers on every device
        noise = torch.randn(2, *self._scale.shape, generator=generator, dtype=scale.dtype, device="cpu").to(
            scale.device
        )
        self._noise = torch.nn.functional.normalize(torch.complex(*noise), dim=1) * _NOISE
        self._vectors = torch.zeros_like(self._noise)
        squares = self._scale.square()
        # No eigenvalue exceeds the root of the sum of their squares.
        self._ceilings = (squares @ moment.abs().square() * squares).sum(1).clamp(min=0).sqrt()

    def best(self, moment: Tensor, closed: set[int]) -> _Component | None:
        """The component that holds most of what is left, of no ``closed`` target; None where none is worth anything."""
        ceilings = self._ceilings.clone()
        ceilings[[*closed]] = 0
        floor, found = 0.0, None
        while batch := [t for t in ceilings.topk(min(_BATCH, len(ceilings))).indices.tolist() if ceilings[t] > floor]:
            start = self._vectors[batch] + self._noise[batch]
            values, self._vectors[batch] = leading_vectors(moment, self._scale[batch], start, _ROUGH)
            ceilings[batch], self._ceilings[batch] = 0.0, (1 + _ROUGH) * values.clamp(min=0)
            if float(values.max()) > floor:
                floor, found = float(values.max()), batch[int(values.argmax())]
        if found is None:
            return None
        _, vectors = leading_vectors(moment, self._scale[[found]], self._vectors[[found]], _FINE)
        self._vectors[found] = vectors[0]
        return _component(found, self._scale[found], vectors[0])

    def removed(self, decoder: Tensor, reach: Tensor) -> None:
        """Take note that the moment has become ``M - d r^H - r d^H``: by how much an eigenvalue may have risen."""
        squares = self._scale.square()
        a, b = squares @ decoder.abs().square(), squares @ reach.abs().square()
        ab = squares.to(reach.dtype) @ (decoder.conj() * reach)
        self._ceilings += (a * b - ab.imag.square()).clamp(min=0).sqrt() - ab.real


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
        targets: Which of the targets each component rotates at.
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
    # conj(q') = conj(q) . decoder b, hence q' = q . conj(decoder b)
    places = torch.tensor(targets, dtype=torch.long)
    decoder = torch.stack([*decoders]) if count else encoder
    of_heads = decoder.unflatten(1, (kv_heads, pairs)).transpose(0, 1).repeat_interleave(group, 0)
    folded = (of_heads * found.kept_at[:, :, places].mT).conj()
    query_rope[:, :count, first], query_rope[:, :count, second] = folded.real, -folded.imag
    query_rope[:, count:, first], query_rope[:, count:, second] = folded.imag, folded.real
    still = found.kept_still.conj()
    query_rest[:, first, first], query_rest[:, second, second] = still.real, still.real
    query_rest[:, first, second], query_rest[:, second, first] = -still.imag, still.imag
    return RopeSplit(
        inv_freq=found.targets[places],
        key_rope=key_rope,
        key_rest=key_rest,
        query_rope=query_rope,
        query_rest=query_rest,
        loss=loss,
        own=tuple((~(decoder.unflatten(1, (kv_heads, pairs)).any(1) & ~_alike(found)[:, places].T).any(1)).tolist()),
    )
