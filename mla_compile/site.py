"""What was recognised in a graph: attention sites, or the reason a layer is not one.

Plain frozen data. Tensors appear by the name of the parameter or graph node that holds them, never by value, so that a
site can be printed, compared and stored, and so that recognition needs no weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["AttentionSite", "Mask", "Projection", "RejectCode", "Rejection", "Rope"]


class RejectCode(StrEnum):
    """Stable codes for why an attention layer is left alone."""

    ANCHOR = "anchor"
    """A softmax that is not fed by exactly one product of two activations, or feeds no product with values."""
    PROJECTION = "projection"
    """Queries, keys or values do not come from exactly one linear projection each."""
    LAYOUT = "layout"
    """A tensor is arranged in an order this version does not read."""
    POSITION_MIXING = "position-mixing"
    """An operand at one position depends on other positions (convolution, recurrence, cache)."""
    NONLINEAR = "nonlinear"
    """Something non-linear (a norm, an activation) stands between a projection and the attention product."""
    ROW_MAP = "row-map"
    """The operand is not a re-arrangement of projection rows."""
    ROPE = "rope"
    """Position enters queries or keys in a way that is not a rotation of pairs, equal for queries and keys."""
    GROUPING = "grouping"
    """Query heads are not assigned to key/value heads in equal contiguous groups."""
    SCORES = "scores"
    """Scores pass through something other than a constant scale (soft-cap, sinks, ALiBi, relative bias)."""
    MASK = "mask"
    """The mask is neither causal nor causal within a sliding window, or depends on the data."""
    CROSS = "cross"
    """Queries, keys and values are not projected from the same activation."""
    VERIFY = "verify"
    """The recovered description does not reproduce the original sub-graph."""
    ORPHAN = "orphan"
    """Attention scores are used by something other than the weighted sum of values."""


@dataclass(frozen=True, slots=True)
class Projection:
    """How one attention operand is read from a linear projection's output.

    Head ``h``, channel ``j`` of the operand, before any rotation, is ``gain[h][j] * y[rows[h][j]] + offset[h][j]`` with
    ``y = weight @ x + bias`` the projection's output. This covers separate, fused and interleaved projections alike.

    Attributes:
        node: Graph node that computes ``y``.
        source: Graph node of ``x``.
        weight: Qualified name of the weight parameter.
        bias: Qualified name of the bias parameter, if the projection node adds one.
        rows: ``[heads][head_dim]`` indices into the projection's outputs.
        gain: ``[heads][head_dim]`` factors (softmax scale put on queries, YaRN's attention factor, ...).
        offset: ``[heads][head_dim]`` constants added after the projection node, or None.
    """

    node: str
    source: str
    weight: str
    bias: str | None
    rows: tuple[tuple[int, ...], ...]
    gain: tuple[tuple[float, ...], ...]
    offset: tuple[tuple[float, ...], ...] | None = None

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
    """

    pairs: tuple[tuple[int, int], ...] = ()
    inv_freq: tuple[float, ...] = ()

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


@dataclass(frozen=True, slots=True)
class Mask:
    """Which keys a query may see: all before it, or only the last ``window`` (itself included)."""

    window: int | None = None

    def __str__(self) -> str:
        return "causal" if self.window is None else f"sliding({self.window})"


@dataclass(frozen=True, slots=True)
class AttentionSite:
    """One attention layer whose meaning is known and has been checked against the graph.

    Attributes:
        index: Position among the attention layers of the model, from 0.
        path: Module path of the layer as the author named it, or a generated name.
        query: How queries are read; one entry per query head.
        key: How keys are read; one entry per key/value head.
        value: How values are read; one entry per key/value head.
        rope: Rotary embedding of queries and keys.
        scale: Factor between ``q . k`` and the softmax logits, beyond the gains.
        mask: Which keys are visible.
        output: Graph node holding ``softmax(...) V``, shaped ``[batch, heads, length, v_dim]``.
        softmax: Graph node that must die with the rewrite.
        error: Largest relative difference between description and sub-graph on random data.
    """

    index: int
    path: str
    query: Projection
    key: Projection
    value: Projection
    rope: Rope
    scale: float
    mask: Mask
    output: str
    softmax: str
    error: float

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
    def elements_per_token(self) -> int:
        """Numbers a plain KV cache keeps per token for this layer."""
        return self.kv_heads * (self.qk_dim + self.v_dim)


@dataclass(frozen=True, slots=True)
class Rejection:
    """An attention-like sub-graph that is not converted, and why.

    Attributes:
        index: Position among the attention layers of the model, from 0.
        path: Module path of the layer, or a generated name.
        code: Stable reason.
        reason: The reason in words.
    """

    index: int
    path: str
    code: RejectCode
    reason: str
