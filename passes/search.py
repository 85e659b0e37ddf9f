"""Choose sizes by trying them: how much of a cache row rotates, and how the layers share what is left.

Predicted losses compare components with components and latent entries with latent entries, but components with latent
entries only roughly. A conversion takes a moment, so that the sizes are tried, and measured by how far the converted
model's predictions are from the original's on a part of the calibration text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mla_compile.errors import VerificationError
from mla_compile.passes.converted import converted_logits, original_logits
from mla_compile.passes.layerwise import Resources
from mla_compile.program import Program
from mla_compile.runtime.module import LatentModel
from mla_compile.site import AttentionSite
from mla_compile.text.evaluate import divergence

__all__ = ["Divergence", "Shares", "global_ranks", "require_finite", "search_shares"]

_PROBE_TOKENS = 4096
"""Tokens that conversions are compared on."""
_PROBE_LOGITS = 2**27
"""Logits of the original that are kept for it, at most: half a gigabyte."""
_FRACTIONS = (0.06, 0.1, 0.16, 0.25, 0.35, 0.45, 0.55, 0.65)
"""Shares of the budget that rope may take; the best is refined between its neighbours."""
_OWN = (1.0, 0.875, 0.5)
"""Shares of the components that carry their own frequency only, tried beside the first guess of 0.75."""


@dataclass(frozen=True)
class Shares:
    """How a budget is split, alike in all layers.

    Attributes:
        rope: Share of the budget for rope components.
        own: Share of the components that carry pairs of their own frequency only.
    """

    rope: float
    own: float = 0.75


class Divergence:
    """Measures how far a converted model's predictions are from the original's: KL(original || converted) per token.

    Args:
        program: The original.
        windows: Token ids ``[windows, length]``; as many are used as a probe takes.
        sites: Its attention sites, between which it is cut if it is large.
        resources: What running a model may take.

    Raises:
        VerificationError: What the original predicts is no number.
    """

    def __init__(
        self,
        program: Program,
        windows: Tensor,
        sites: Sequence[AttentionSite] = (),
        resources: Resources | None = None,
    ) -> None:
        length = windows.shape[1]
        count = max(1, min(_PROBE_TOKENS // length, _PROBE_LOGITS // (length * program.vocabulary), len(windows)))
        self._windows, self._resources = windows[:count], resources or Resources()
        logits = original_logits(program, sites, self._windows.split(1), self._resources, wide=True)
        self._expected = [found.float().log_softmax(-1) for found in logits]
        if any(bool(found.isnan().any()) for found in self._expected):
            raise _overflow("original")

    def __call__(self, model: LatentModel) -> float:
        """KL divergence in nats per token; infinite for a model that overflows."""
        total = 0.0
        logits = converted_logits(model, self._windows.split(1), self._resources)
        for found, expected in zip(logits, self._expected, strict=True):
            got = found.float().log_softmax(-1)
            total += float(divergence(expected, got))
        return math.inf if math.isnan(total) else total / self._windows.numel()


def require_finite(loss: float) -> None:
    """Refuse the best that was found where all that was tried overflows.

    Raises:
        VerificationError: It is infinitely far from the original.
    """
    if not math.isfinite(loss):
        raise _overflow("converted")


def _overflow(whose: str) -> VerificationError:
    return VerificationError(
        f"What the {whose} model predicts on the calibration text is no number: something in it overflows.",
        "Convert it in a wider type, with --dtype bfloat16 or float32.",
    )


def search_shares(loss: Callable[[Shares], float]) -> Shares:
    """Find the shares with the least loss: a grid over rope, a refinement, then the share of own frequencies.

    Args:
        loss: What a split costs; infinite where it is not possible.
    """
    tried: dict[Shares, float] = {}

    def cost(shares: Shares) -> float:
        if shares not in tried:
            tried[shares] = loss(shares)
        return tried[shares]

    best = min((Shares(f) for f in _FRACTIONS), key=cost)
    place = _FRACTIONS.index(best.rope)
    for neighbour in (*_FRACTIONS[max(place - 1, 0) : place], *_FRACTIONS[place + 1 : place + 2]):
        cost(Shares((best.rope + neighbour) / 2))
    best = min(tried, key=cost)
    return min((best, *(replace(best, own=own) for own in _OWN)), key=cost)


def global_ranks(losses: Sequence[Tensor], total: int, ladders: Sequence[Sequence[int]]) -> list[int]:
    """Share ``total`` latent entries among layers so that what is left out costs least.

    Args:
        losses: Per layer, what leaving out each entry costs.
        total: Entries of all layers together, at most; the first ranks of all ladders must fit.
        ladders: Per layer, the ranks it may have, rising.
    """
    least = torch.zeros(1, dtype=torch.float64)  # by how many entries the layers so far take
    picks = []
    for loss, ladder in zip(losses, ladders, strict=True):
        left_out = torch.cat([loss.flip(0).cumsum(0).flip(0), loss.new_zeros(1)])
        options = torch.full((len(ladder), total + 1), torch.inf, dtype=torch.float64)
        for option, rank in zip(options, ladder, strict=True):
            reached = least[: max(total + 1 - rank, 0)]
            option[rank : rank + len(reached)] = reached + left_out[rank]
        least, pick = options.min(0)
        picks.append(pick)
    taken, ranks = int(least.argmin()), []
    for pick, ladder in zip(reversed(picks), reversed(ladders), strict=True):
        ranks.append(ladder[int(pick[taken])])
        taken -= ranks[-1]
    return ranks[::-1]
