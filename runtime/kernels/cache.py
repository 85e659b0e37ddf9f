"""Where latents live: the layout of a cache row, and a cache of rows, contiguous or in pages, plain or as codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mla_compile.runtime.kernels.codes import Codes, decode

__all__ = ["LatentCache", "RowLayout"]

_ALIGNMENT = 16
"""Numbers at multiples of which rows begin: at least as many bytes, those of the widest load."""


@dataclass(frozen=True, slots=True)
class RowLayout:
    """What a token's row holds: ``[latent | rope keys | key scales | value scales]``.

    The parts mean what they mean in :func:`mla_compile.runtime.ops.latent_attention`.

    Attributes:
        rank: Numbers of the latent, ``r``.
        rope_groups: Rope keys ``n``, of ``H / n`` heads each; 1 for a shared one.
        rope_dim: Channels of a rope key; 0 for none.
        key_scales: ``m``, of ``H / m`` heads each.
        value_scales: ``w``, of ``H / w`` heads each.
        scaled_rope: Whether key scales multiply the rope product too.
    """

    rank: int
    rope_groups: int = 1
    rope_dim: int = 0
    key_scales: int = 0
    value_scales: int = 0
    scaled_rope: bool = False

    def __post_init__(self) -> None:
        sizes = (self.rope_dim, self.key_scales, self.value_scales)
        if self.rank < 1 or self.rope_groups < 1 or min(sizes) < 0:
            raise ValueError(f"{self} has sizes that no row has. Pass a rank and rope groups of at least 1.")
        if self.scaled_rope and not self.key_scales:
            raise ValueError(
                "Rope keys cannot be scaled by key scales that the rows do not have. Pass scaled_rope=False."
            )

    @property
    def rope_width(self) -> int:
        """Numbers of all rope keys, ``n * rope_dim``."""
        return self.rope_groups * self.rope_dim

    @property
    def rest_width(self) -> int:
        """Numbers after the latent."""
        return self.rope_width + self.key_scales + self.value_scales

    def check_heads(self, heads: int) -> None:
        """Refuse a number of heads that rope groups or scales do not divide.

        Raises:
            ValueError: They do not.
        """
        for name in ("rope_groups", "key_scales", "value_scales"):
            if (count := getattr(self, name)) and heads % count:
                raise ValueError(f"{name} is {count}, which does not divide {heads} heads. Pass a divisor of them.")


@dataclass(frozen=True, slots=True)
class LatentCache:
    """Rows of all sequences, for kernels to read and to append to.

    Attributes:
        layout: What a row holds.
        latent: ``[B, T, r]`` floats, or codes beside ``token_scales`` (of int4 ``[B, T, ceil(r / 2)]`` bytes); with a
            page table ``[pages, tokens, ...]``.
        rest: ``[B, T, n * rope_dim + m + w]`` floats, or the same in pages; rope keys rotated.
        token_scales: ``[B, T]`` float32, what a code of 1 stands for in every token; or None.
        page_table: ``[B, pages of a sequence]`` int32, the pages of every sequence in order; or None.
    """

    layout: RowLayout
    latent: Tensor
    rest: Tensor
    token_scales: Tensor | None = None
    page_table: Tensor | None = None

    @classmethod
    def empty(
        cls,
        layout: RowLayout,
        blocks: int,
        tokens: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        codes: Codes | str | None = None,
        page_table: Tensor | None = None,
    ) -> LatentCache:
        """Memory for rows.

        Args:
            layout: What a row holds.
            blocks: Sequences, or with a page table pages.
            tokens: Tokens of a sequence, or of a page.
            dtype: Of rope keys and scales, and of latents without ``codes``.
            device: Where.
            codes: What latents are stored as, ``int8``, ``fp8`` or ``int4``, with one scale per token; None for numbers
                of type ``dtype``.
            page_table: ``[B, pages of a sequence]``, for a cache in pages.

        Raises:
            ValueError: There are no such codes.
        """
        if codes is None:
            width = layout.rank + layout.rest_width
            rows = torch.empty(blocks, tokens, _aligned(width), dtype=dtype, device=device)
            return cls.of_rows(layout, rows[..., :width], page_table=page_table)
        codes = Codes(codes)
        width = codes.stored(layout.rank)
        return cls(
            layout,
            torch.empty(blocks, tokens, _aligned(width), dtype=codes.dtype, device=device)[..., :width],
            torch.empty(blocks, tokens, _aligned(layout.rest_width), dtype=dtype, device=device)[
                ..., : layout.rest_width
            ],
            torch.empty(blocks, tokens, dtype=torch.float32, device=device),
            page_table,
        )

    @classmethod
    def of_rows(cls, layout: RowLayout, rows: Tensor, *, page_table: Tensor | None = None) -> LatentCache:
        """The cache that reads and writes given rows ``[B or pages, tokens, r + n * rope_dim + m + w]``."""
        latent, rest = rows.split([layout.rank, layout.rest_width], -1)
        return cls(layout, latent, rest, None, page_table)

    @property
    def codes(self) -> Codes | None:
        """What latents are stored as; None for plain numbers."""
        return Codes.of(self.latent.dtype)

    @property
    def capacity(self) -> int:
        """Tokens that one sequence has room for."""
        pages = 1 if self.page_table is None else self.page_table.shape[1]
        return pages * self.latent.shape[1]

    def parts(self, dtype: torch.dtype, tokens: int) -> tuple[Tensor, Tensor]:
        """The first rows of every sequence as plain numbers: latents ``[B, tokens, r]``, and what is behind them.

        Copies only where rows lie in pages or latents are codes.
        """
        latent, rest, token_scales = self.latent, self.rest, self.token_scales
        if self.page_table is not None:
            pages = self.page_table[:, : -(-tokens // latent.shape[1])].long()
            latent, rest = (x[pages].flatten(1, 2) for x in (latent, rest))
            token_scales = None if token_scales is None else token_scales[pages].flatten(1, 2)
        latent, rest = latent[:, :tokens], rest[:, :tokens].to(dtype)
        if token_scales is None:
            return latent.to(dtype), rest
        return decode(latent, token_scales[:, :tokens], self.layout.rank, dtype), rest


def _aligned(width: int) -> int:
    """Numbers of a row whose successor is aligned."""
    return -(-width // _ALIGNMENT) * _ALIGNMENT
