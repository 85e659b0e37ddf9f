"""What a latent's numbers are stored as in fewer bits, and what the codes stand for, in plain torch."""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor

__all__ = ["Codes", "decode", "encode"]

_MIDDLE = 8
"""The nibble of zero."""


class Codes(StrEnum):
    """How a number of a latent is stored, beside one float32 scale per token: ``number = code * scale``.

    The scale is the token's largest number over the largest code. There is one per token and not several for groups of
    channels, which gained little of what int4 costs: ``benchmarks/cache_codes.md``.

    Attributes:
        INT8: Integers from -127 to 127.
        FP8: ``float8_e4m3fn``, of three bits of fraction, up to 448.
        INT4: Integers from -7 to 7, two to a byte: the low nibble of byte ``j`` is 8 more than column ``j``, the high
            nibble 8 more than column ``ceil(r / 2) + j``. Both halves of a row are whole blocks of columns to a kernel.
    """

    INT8 = "int8"
    FP8 = "fp8"
    INT4 = "int4"

    @classmethod
    def _missing_(cls, value: object) -> Codes:
        raise ValueError(f"Latents cannot be stored as {value!r}. Pass {', '.join(cls)}, or None for plain numbers.")

    @property
    def dtype(self) -> torch.dtype:
        """Type of the memory."""
        return {Codes.INT8: torch.int8, Codes.FP8: torch.float8_e4m3fn, Codes.INT4: torch.uint8}[self]

    @property
    def largest(self) -> int:
        """What the largest number of a token is stored as."""
        return {Codes.INT8: 127, Codes.FP8: 448, Codes.INT4: 7}[self]

    @property
    def halves(self) -> int:
        """Numbers of a byte."""
        return 2 if self is Codes.INT4 else 1

    def stored(self, rank: int) -> int:
        """Bytes of a latent of so many numbers."""
        return -(-rank // self.halves)

    @classmethod
    def of(cls, dtype: torch.dtype) -> Codes | None:
        """The codes whose memory is of this type; None for a type of numbers."""
        return next((codes for codes in cls if codes.dtype == dtype), None)


def encode(latent: Tensor, codes: Codes) -> tuple[Tensor, Tensor]:
    """Round latents to codes.

    Args:
        latent: ``[..., r]``.
        codes: Which.

    Returns:
        Memory ``[..., codes.stored(r)]``, and float32 scales ``[...]``, 0 for a latent of zeros.
    """
    exact = latent.float()
    scale = exact.abs().amax(-1) / codes.largest
    steps = exact / scale.where(scale > 0, 1)[..., None]
    if codes is Codes.FP8:
        return steps.to(codes.dtype), scale
    steps = steps.round()
    if codes is Codes.INT8:
        return steps.to(codes.dtype), scale
    nibbles = (steps + _MIDDLE).to(torch.uint8)
    low, high = nibbles.split([codes.stored(latent.shape[-1]), latent.shape[-1] // 2], -1)
    high = torch.nn.functional.pad(high, (0, low.shape[-1] - high.shape[-1]))
    return low | (high << 4), scale


def decode(stored: Tensor, scale: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
    """What codes stand for.

    Args:
        stored: ``[..., codes.stored(rank)]``, whose type says which codes they are.
        scale: ``[...]``.
        rank: ``r``.
        dtype: Of the result.

    Returns:
        Latents ``[..., r]``, multiplied in float32 or wider and then rounded once.
    """
    exact = torch.promote_types(dtype, torch.float32)
    if Codes.of(stored.dtype) is Codes.INT4:
        numbers = torch.cat([stored & 15, stored >> 4], -1)[..., :rank].to(exact) - _MIDDLE
    else:
        numbers = stored.to(exact)
    return (numbers * scale[..., None].to(exact)).to(dtype)
