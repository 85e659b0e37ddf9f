"""What was recognised in a graph: attention sites, or the reason a layer is not one.

Plain frozen data. Tensors appear by the name of the parameter or graph node that holds them, never by value, so that a
site can be printed, compared and stored, and so that recognition needs no weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

__all__ = [
    "SAME_FREQUENCY",
    "AttentionSite",
    "Kind",
    "Mask",
    "Norm",
    "NormKind",
    "PlainSite",
    "Projection",
    "RejectCode",
    "Rejection",
    "Rope",
    "Scores",
    "reasons",
]

NormKind = Literal["rms", "layer"]
SAME_FREQUENCY = 1e-5
"""Relative difference of frequencies that are taken to be one: models compute them in float32."""


class RejectCode(StrEnum):
    """Stable codes for why an attention layer is left alone."""

    ANCHOR = "anchor"
    """A softmax that is not fed by exactly one product of two activations, or feeds no product with values."""
    PROJECTION = "projection"
    """Queries, keys or values do not come from exactly one linear projection each."""
    LATENT = "latent"
    """Keys are projected from a latent already (DeepSeek's multi-head latent attention): there is nothing to gain."""
    LAYOUT = "layout"
    """A tensor is arranged in an order this version does not read."""
    POSITION_MIXING = "position-mixing"
    """An operand at one position depends on other positions (convolution, recurrence, cache)."""
    NONLINEAR = "nonlinear"
    """An activation, or a norm over something other than a head or all heads, stands between projection and product."""
    ROW_MAP = "row-map"
    """The operand is not a re-arrangement of projection rows."""
    ROPE = "rope"
    """Position enters queries or keys in a way that is not a rotation of pairs, equal for queries and keys."""
    GROUPING = "grouping"
    """Query heads do not share key/value heads in equal groups."""
    SCORES = "scores"
    """Scores pass through something other than a scale, soft-cap, sinks or ALiBi slopes (T5's relative biases)."""
    MASK = "mask"
    """The mask is neither causal (also within a window or chunk), nor absent (encoders), or depends on the data."""
    CROSS = "cross"
    """Keys and values are not projected from the same activation, or belong to another sequence than queries."""
    VERIFY = "verify"
    """The recovered description does not reproduce the original sub-graph."""
    ORPHAN = "orphan"
    """Attention scores are used by something other than the weighted sum of values."""
    AS_ASKED = "as-asked"
    """It was asked for without conversion."""


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm between a projection and its heads (QK-norm, or of values): ``(y - m) / sqrt(mean((y - m)^2) + eps)``.

    The normalised outputs take the place of ``y`` in :class:`Projection`, so that gains and biases of the norm are that
    projection's gain and offset. An L2 norm is an RMS norm with another gain.

    Attributes:
        kind: ``rms`` (the mean ``m`` is left in place) or ``layer``.
        groups: Projection outputs that are normalised together: one group of all, or one per head.
        eps: What is added to the mean square.
    """

    kind: NormKind
    groups: tuple[tuple[int, ...], ...]
    eps: float

    @property
    def per_head(self) -> bool:
        """Whether every head has a norm of its own."""
        return len(self.groups) > 1

    def __str__(self) -> str:
        return f"{self.kind}({len(self.groups[0])})"


@dataclass(frozen=True, slots=True)
class Projection:
    """How one attention operand is read from a linear projection's output.

    Head ``h``, channel ``j`` of the operand, before any rotation, is ``gain[h][j] * y[rows[h][j]] + offset[h][j]`` with
    ``y = weight @ x + bias`` the projection's output, normalised first if there is a norm. This covers separate, fused
    and interleaved projections alike.

    Attributes:
        node: Graph node that computes ``y``.
        source: Graph node of ``x``.
        weight: Qualified name of the weight parameter.
        bias: Qualified name of the bias parameter, if the projection node adds one.
        rows: ``[heads][head_dim]`` indices into the projection's outputs.
        gain: ``[heads][head_dim]`` factors (softmax scale put on queries, YaRN's attention factor, ...).
        offset: ``[heads][head_dim]`` constants added after the projection node, or None.
        norm: The norm between the projection and the heads, or None.
        activation: Graph node whose entries take the place of ``y`` when something that is not linear, but looks at one
            position only, stands between projection and queries; None when nothing does.
        turned: ``[heads][head_dim]`` factors of queries whose activation holds them as the attention product reads
            them, behind the rotation; times these, and turned back by the keys' rotation, they are the heads. None for
            queries in front of it.
        inner: How ``x`` is read, as one head, from the output of another projection in front of this one (the first of
            two linear layers in a row), where the two are read as one; else None.
    """

    node: str
    source: str
    weight: str
    bias: str | None
    rows: tuple[tuple[int, ...], ...]
    gain: tuple[tuple[float, ...], ...]
    offset: tuple[tuple[float, ...], ...] | None = None
    norm: Norm | None = None
    activation: str | None = None
    turned: tuple[tuple[float, ...], ...] | None = None
    inner: Projection | None = None

    @property
    def origin(self) -> str:
        """Graph node of what this projection and those in front of it read: ``x``, where there are none."""
        return self.source if self.inner is None else self.inner.origin

    @property
    def biased(self) -> bool:
        """Whether outputs have a bias: their own, or one of a projection in front."""
        inner = self.inner
        return self.bias is not None or (inner is not None and (inner.biased or inner.offset is not None))

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of all weights and biases, those of projections in front included."""
        return (self.weight, *filter(None, (self.bias,)), *(() if self.inner is None else self.inner.parameters))

    @property
    def heads(self) -> int:
        """Number of distinct heads this projection feeds."""
        return len(self.rows)

    @property
    def head_dim(self) -> int:
        """Channels per head."""
        return len(self.rows[0])


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding as explicit pairs (RoFormer, Su et al. 2021, eq. 34).

    Pair ``(a, b)`` with frequency ``f`` makes channels ``a`` and ``b`` at position ``p`` the real and imaginary part of
    ``exp(i p f) (x_a + i x_b)``. Half-split, interleaved, partial and non-contiguous layouts are all just pair lists.

    Attributes:
        pairs: Channel pairs inside one head, in order of the first channel.
        inv_freq: Radians per position of every pair.
        phases: Radians by which queries are turned ahead of keys at the same position, per pair, where their positions
            are counted from different numbers; empty where they are not. Weights of queries contain them.
    """

    pairs: tuple[tuple[int, int], ...] = ()
    inv_freq: tuple[float, ...] = ()
    phases: tuple[float, ...] = ()

    @property
    def rotary_dim(self) -> int:
        """Number of channels that rotate."""
        return 2 * len(self.pairs)

    @property
    def layout(self) -> str:
        """The common name of the pair arrangement: none, half, interleaved or custom."""
        if not self.pairs:
            return "none"
        half, base = len(self.pairs), min(min(p) for p in self.pairs)
        if all((a, b) == (base + i, base + i + half) for i, (a, b) in enumerate(self.pairs)):
            return "half"
        if all((a, b) == (base + 2 * i, base + 2 * i + 1) for i, (a, b) in enumerate(self.pairs)):
            return "interleaved"
        return "custom"

    @property
    def theta(self) -> float | None:
        """Base of the table ``theta^(-2i / rotary_dim)`` whose two fastest frequencies are this one's, or None."""
        fastest = sorted(self.inv_freq, reverse=True)[:2]
        if len(fastest) < 2 or not fastest[1]:
            return None
        return float((fastest[0] / fastest[1]) ** (self.rotary_dim / 2))

    @property
    def slowing(self) -> tuple[float, float]:
        """How many times slower frequencies are than that table's, least and most: what context extension did."""
        theta = self.theta
        if theta is None:
            return (1.0, 1.0)
        table = [theta ** (-i / len(self.pairs)) for i in range(len(self.pairs))]
        ratios = [t / f for t, f in zip(table, sorted(self.inv_freq, reverse=True), strict=True) if f]
        return (min(ratios), max(ratios))


class Kind(StrEnum):
    """What an attention layer attends to."""

    CAUSAL = "causal"
    """Earlier tokens of the same sequence."""
    BIDIRECTIONAL = "bidirectional"
    """All tokens of the same sequence."""
    CROSS = "cross"
    """All tokens of another sequence."""


@dataclass(frozen=True, slots=True)
class Mask:
    """Which keys a query may see: all before it, or only the last ``window`` (itself included), or simply all.

    Attributes:
        window: How many keys a query sees at most; None for no limit.
        causal: Whether keys behind the query are hidden.
        chunked: Whether the window does not slide: tokens are in chunks of ``window``, and a query sees its own chunk
            (Llama 4).
    """

    window: int | None = None
    causal: bool = True
    chunked: bool = False

    def __str__(self) -> str:
        if not self.causal:
            return "bidirectional"
        if self.window is None:
            return "causal"
        return f"{'chunked' if self.chunked else 'sliding'}({self.window})"


@dataclass(frozen=True, slots=True)
class Scores:
    """What happens between ``q . k`` and the attention weights.

    ``logit = scale * q . k``, then ``softcap * tanh(logit / softcap)`` if there is a soft-cap, minus
    ``slope * distance`` if there are slopes, then the mask, then the softmax, whose denominator may hold a sink.

    Attributes:
        scale: Factor of ``q . k``.
        mask: Which keys are visible.
        softcap: Bound of the logits (Gemma 2); 0 for none.
        slopes: Slope per query head (ALiBi, Press et al. 2022), or None.
        sinks: One logit per query head that takes weight and has no value (gpt-oss), or None.
        sinks_name: Qualified name of the parameter the sinks come from.
        factors: Factor of ``q . k`` per query head (a temperature), beside the scale, or None. Queries of a described
            layer have them among their gains; those of a layer that keeps an ordinary cache have not.
    """

    scale: float
    mask: Mask = Mask()
    softcap: float = 0.0
    slopes: tuple[float, ...] | None = None
    sinks: tuple[float, ...] | None = None
    sinks_name: str | None = None
    factors: tuple[float, ...] | None = None

    @property
    def own(self) -> bool:
        """Whether they contain numbers of one layer, which others of its kind have not."""
        return self.sinks is not None or self.factors is not None


def _alike(one: float, other: float) -> bool:
    """Whether two factors are one; gains are measured in float32 graphs."""
    return math.isclose(one, other, rel_tol=1e-5)


@dataclass(frozen=True, slots=True)
class AttentionSite:
    """One attention layer whose meaning is known and has been checked against the graph.

    Attributes:
        index: Position among the attention layers of the model, from 0.
        path: Module path of the layer as the author named it, or a generated name.
        query: How queries are read; one entry per query head.
        key: How keys are read; one entry per key/value head.
        value: How values are read; one entry per group of query heads, which may be other groups than the keys'.
        rope: Rotary embedding of queries and keys.
        scores: From ``q . k`` to attention weights.
        output: Graph node holding ``softmax(...) V``.
        output_axes: Names of that node's axes, see :mod:`mla_compile.passes.layout`.
        softmax: Graph node that must die with the rewrite.
        error: Largest relative difference between description and sub-graph on random data.
        order: Which head of the graph each query head is, where heads that share keys do not stand side by side there;
            None where they do.
        cross: Whether keys and values are read from another sequence than queries.
        padding: Placeholder of the padding mask ``[batch, keys]`` that hides keys, where the graph reads one; only for
            layers that are not causal.
    """

    index: int
    path: str
    query: Projection
    key: Projection
    value: Projection
    rope: Rope
    scores: Scores
    output: str
    output_axes: tuple[str, ...]
    softmax: str
    error: float
    order: tuple[int, ...] | None = None
    cross: bool = False
    padding: str | None = None

    @property
    def kind(self) -> Kind:
        """What the layer attends to."""
        if self.cross:
            return Kind.CROSS
        return Kind.CAUSAL if self.mask.causal else Kind.BIDIRECTIONAL

    @property
    def scale(self) -> float:
        """Factor between ``q . k`` and the softmax logits, beyond the gains."""
        return self.scores.scale

    @property
    def logit_scale(self) -> float | None:
        """Factor of ``q . k`` with the gains (softmax scale, YaRN's attention factor); None where channels differ."""
        found = self.logit_scales
        return found[0] if found and all(_alike(f, found[0]) for f in found) else None

    @property
    def logit_scales(self) -> tuple[float, ...] | None:
        """The same per query head (a temperature); None where channels of one head differ."""
        group, found = self.heads // self.kv_heads, []
        for head, gains in enumerate(self.query.turned or self.query.gain):
            first, *others = (self.scale * q * k for q, k in zip(gains, self.key.gain[head // group], strict=True))
            if not all(_alike(other, first) for other in others):
                return None
            found.append(first)
        return tuple(found)

    @property
    def mask(self) -> Mask:
        """Which keys are visible."""
        return self.scores.mask

    @property
    def softcap(self) -> float:
        """Bound of the logits; 0 for none."""
        return self.scores.softcap

    @property
    def sinks(self) -> str | None:
        """Name of the parameter that holds the attention sinks, if there are any."""
        return self.scores.sinks_name

    @property
    def slopes(self) -> tuple[float, ...] | None:
        """ALiBi slopes, if there are any."""
        return self.scores.slopes

    @property
    def key_bias_matters(self) -> bool:
        """Whether a bias of keys that do not rotate changes the result.

        It adds the same to all of a query's logits, which softmax does not see - unless something scales, bends or
        competes with them.
        """
        return self.softcap > 0 or self.scores.sinks is not None or self.key.norm is not None

    @property
    def value_bias_matters(self) -> bool:
        """Whether a bias of the value projection is more than a bias of the output.

        It is where the weights of the values do not sum to one, and where a norm scales it with the values.
        """
        return self.scores.sinks is not None or self.value.norm is not None

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return self.query.heads

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.key.heads

    @property
    def qk_dim(self) -> int:
        """Channels of one query or key head."""
        return self.query.head_dim

    @property
    def v_dim(self) -> int:
        """Channels of one value head."""
        return self.value.head_dim

    @property
    def value_owners(self) -> tuple[int, ...]:
        """Which distinct value head, by first appearance, each entry of ``value`` is."""
        heads = list(zip(self.value.rows, self.value.gain, strict=True))
        distinct = list(dict.fromkeys(heads))
        return tuple(distinct.index(head) for head in heads)

    @property
    def value_rows(self) -> int:
        """Channels of all distinct value heads together."""
        return (max(self.value_owners) + 1) * self.v_dim

    def needs_constant(self, nope_dim: int) -> bool:
        """Whether the latent needs an entry that is always 1, for biases that cannot be moved elsewhere.

        Args:
            nope_dim: Key channels per head that do not rotate.
        """
        inside = self.key.biased or (self.key.offset is not None and self.key.norm is None)
        key = self.key_bias_matters and inside and nope_dim > 0
        value = self.value.biased or (self.value.offset is not None and self.value.norm is None)
        return key or (self.value_bias_matters and value)

    def key_scales(self, nope_dim: int) -> int:
        """Numbers a cache row needs for the keys' norms: none when every channel is cached behind its norm."""
        return len(self.key.norm.groups) if self.key.norm is not None and nope_dim else 0

    @property
    def value_scales(self) -> int:
        """Numbers a cache row needs for the values' norms."""
        return len(self.value.norm.groups) if self.value.norm is not None else 0

    @property
    def elements_per_token(self) -> int:
        """Numbers a plain KV cache keeps per token for this layer."""
        return self.kv_heads * self.qk_dim + self.value_rows


@dataclass(frozen=True, slots=True)
class PlainSite:
    """An attention layer that is not converted but understood well enough to decode with an ordinary cache.

    Attributes:
        query: Graph node of the queries as the attention product reads them (rotated, normed).
        key: Graph node of the keys.
        value: Graph node of the values.
        axes: Names of the axes of query, key, value and output, see :mod:`mla_compile.passes.layout`.
        heads: Query heads.
        kv_heads: Key/value heads.
        qk_dim: Channels of one query or key head.
        v_dim: Channels of one value head.
        scores: From ``q . k`` to attention weights.
        output: Graph node holding ``softmax(...) V``.
        softmax: Graph node that must die with the rewrite.
        repeats: How often every key and value head stands in the graph's key and value (heads repeated for groups).
    """

    query: str
    key: str
    value: str
    axes: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], tuple[str, ...]]
    heads: int
    kv_heads: int
    qk_dim: int
    v_dim: int
    scores: Scores
    output: str
    softmax: str
    repeats: int = 1

    @property
    def elements_per_token(self) -> int:
        """Numbers its cache keeps per token."""
        return self.kv_heads * (self.qk_dim + self.v_dim)


@dataclass(frozen=True, slots=True)
class Rejection:
    """An attention-like sub-graph that is not converted, and why.

    Attributes:
        index: Position among the attention layers of the model, from 0.
        path: Module path of the layer, or a generated name.
        code: Stable reason.
        reason: The reason in words.
        plain: How to run the layer with an ordinary cache beside converted ones; None if that is not understood either.
        site: The layer's description, where it is understood but is no causal self-attention.
    """

    index: int
    path: str
    code: RejectCode
    reason: str
    plain: PlainSite | None = None
    site: AttentionSite | None = None


def reasons(rejections: Iterable[Rejection]) -> str:
    """Which layers are not converted, and why, as a clause."""
    return "; ".join(f"{r.path}: {r.reason} [{r.code.value}]" for r in rejections)
