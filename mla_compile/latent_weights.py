"""What a converted layer multiplies with: made by every method, kept on disk, and inserted into the graph."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mla_compile.site import AttentionSite

__all__ = ["LatentWeights"]


@dataclass(frozen=True)
class LatentWeights:
    """Everything one latent-attention layer multiplies with; float64, cast when inserted.

    Channels of a query head are ordered ``[not rotating | rotating]``, rotating ones as ``[real | imaginary]``.

    Attributes:
        query: ``[heads, nope_dim + rope_dim, width]``.
        query_bias: ``[heads, nope_dim + rope_dim]``, or None.
        row: ``[kv_rank + rope_groups * rope_dim, width]``: what a token writes to the cache, before rotation.
        row_bias: ``[kv_rank + rope_groups * rope_dim]``, or None; zero on the latent.
        key_up: ``[kv_heads, nope_dim, kv_rank]``: latent to non-rotating key channels.
        value_up: ``[value heads, kv_rank, v_dim]``: latent to values.
        output_bias: ``[heads, v_dim]`` added to attention outputs, or None.
        inv_freq: ``[rope_groups, rope_dim / 2]`` radians per position.
        rope_shift: ``[rope_groups, rope_dim]`` added to the rope keys behind their norm, or None.
        scaled_rope: Whether rope keys are cached in front of the norms of the keys they are made from, whose scales
            then multiply whole logits. Nothing can be added behind the norms, so that ``rope_shift`` is None.
        worth: ``[k]`` what every entry that a latent could have is worth, those it has first, in a unit of the method;
            nothing multiplies with it, reports draw it. None where nobody knows.
    """

    query: Tensor
    query_bias: Tensor | None
    row: Tensor
    row_bias: Tensor | None
    key_up: Tensor
    value_up: Tensor
    output_bias: Tensor | None
    inv_freq: Tensor
    rope_shift: Tensor | None = None
    scaled_rope: bool = False
    worth: Tensor | None = None

    def __post_init__(self) -> None:
        """Refuse a shift that would be scaled with the rope keys."""
        if self.scaled_rope and self.rope_shift is not None:
            raise ValueError(
                "Rope keys in front of their norms have no shift behind them. Pass either scaled_rope or rope_shift."
            )

    def row_width(self, site: AttentionSite) -> int:
        """Numbers in one cache row: latent, rope keys, and the scales of keys and values where they have norms."""
        scaled = site.qk_dim if self.scaled_rope else self.key_up.shape[1]
        return self.row.shape[0] + site.key_scales(scaled) + site.value_scales
