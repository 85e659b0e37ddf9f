"""Name what is added to scores: which keys it hides, and what it says of distances."""

from __future__ import annotations

import torch
from torch import Tensor

from mla_compile.passes.mismatch import MismatchError
from mla_compile.passes.probe import exceeds
from mla_compile.site import Mask, RejectCode

__all__ = ["MASKED", "agrees", "hides", "slopes_agree", "visible"]

MASKED = -9e3
"""Additive mask values below this mean 'not visible'; -10000 is the smallest in use."""


def hides(logits: Tensor) -> Tensor:
    """Which logits are so low that their key is hidden."""
    return logits < MASKED


def visible(added: Tensor) -> tuple[tuple[float, ...] | None, Mask]:
    """Name what is added to scores ``[B, H, S, T]``: a mask, and slopes if there are any.

    Raises:
        MismatchError: Something else is added.
    """
    mask = _classify(added)
    if not mask.causal:
        if exceeds(added, 1e-6):
            raise MismatchError(
                RejectCode.SCORES,
                "a bias that differs between places (a relative position bias) is added to the scores",
            )
        return None, mask
    length = added.shape[-1]
    distance = (torch.arange(length)[:, None] - torch.arange(length)[None]).double()
    bias = torch.where(added < MASKED, 0.0, added)
    slopes = -bias[0, :, 1, 0]
    # ALiBi tables are often float32 (or their ramp is), so a slope is held to that precision.
    expected = torch.where(added < MASKED, 0.0, -slopes[None, :, None, None] * distance)
    if exceeds(bias - expected, 1e-6 * max(1.0, float(expected.abs().max()))):
        raise MismatchError(RejectCode.SCORES, "a bias is added to the scores that is not linear in the distance")
    if not exceeds(bias, 1e-6):
        return None, mask
    return tuple(slopes.tolist()), mask


def agrees(added: Tensor, positions: Tensor, slopes: tuple[float, ...] | None, mask: Mask) -> bool:
    """Whether what is added to scores ``[B, H, S, S]`` of tokens at given positions is a causal mask, and slopes."""
    seen = _seen(positions, mask)
    return torch.equal(added >= MASKED, seen.expand(added.shape)) and slopes_agree(added, positions, slopes)


def _seen(positions: Tensor, mask: Mask) -> Tensor:
    """Which keys tokens at given positions see with a causal mask, ``[S, S]``."""
    distance = positions[:, None] - positions
    seen = distance >= 0
    if mask.window is None:
        return seen
    if mask.chunked:
        chunk = torch.div(positions, mask.window, rounding_mode="floor")
        return seen & (chunk[:, None] == chunk)
    return seen & (distance < mask.window)


def slopes_agree(added: Tensor, positions: Tensor, slopes: tuple[float, ...] | None) -> bool:
    """Whether what is added to scores that are seen is what slopes say."""
    distance, seen = positions[:, None] - positions, added >= MASKED
    slope = torch.tensor([0.0] if slopes is None else slopes, dtype=torch.float64)[None, :, None, None]
    expected = torch.where(seen, -slope * distance, 0.0)
    error = (torch.where(seen, added, 0.0) - expected).abs()
    # Slopes are made in float32 by many, and were read at a distance of one.
    return bool((error <= 1e-5 * expected.abs().clamp(min=1.0)).all())


def _classify(added: Tensor) -> Mask:
    """Name the visibility pattern of an additive mask ``[B, H, S, T]``."""
    visible = added >= MASKED
    if (visible != visible[:1, :1]).any():
        raise MismatchError(RejectCode.MASK, "the mask differs between heads or sequences")
    distance = torch.arange(visible.shape[-2])[:, None] - torch.arange(visible.shape[-1])[None]
    pattern = visible[0, 0]
    if torch.equal(pattern, distance >= 0):
        return Mask()
    window = int(pattern[-1].sum())
    if torch.equal(pattern, (distance >= 0) & (distance < window)):
        return Mask(window)
    if pattern.all():
        return Mask(causal=False)
    chunks = Mask(max(int(pattern[:, 0].sum()), 1), chunked=True)
    if pattern.shape[0] == pattern.shape[1] and torch.equal(pattern, _seen(torch.arange(len(pattern)), chunks)):
        return chunks
    raise MismatchError(
        RejectCode.MASK, "the mask is neither causal, also within a sliding window or a chunk, nor open to all"
    )
