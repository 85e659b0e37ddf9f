"""What the user is told of a conversion: the sizes that were chosen, warnings, and the quality gate."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from mla_compile.config import CompileConfig
from mla_compile.errors import QualityGateError, UsageError
from mla_compile.passes.retype import NARROW, type_name
from mla_compile.plan import LatentPlan, clamped
from mla_compile.program import Program
from mla_compile.report import LayerError, Quality
from mla_compile.site import AttentionSite, Rejection, reasons

__all__ = ["costly_layers", "log_sizes", "require_quality", "require_smaller", "rounded_slopes", "warnings_of"]

_log = logging.getLogger(__name__)
_MUCH_WORSE = 2.0
"""Perplexity ratio from which the user is warned."""
_HURT = 0.1
"""Loss of one layer by itself from which it is named, in nats per token: a tenth more perplexity."""
_NAMED = 3
"""Layers named, at most."""


def log_sizes(plans: Sequence[LatentPlan]) -> None:
    """Log what was decided for each layer."""
    for p in plans:
        _log.info(
            "%s: a latent of %d numbers (%d lose nothing) and %d x %d rotating channels, %d numbers per token of %d.",
            *(p.path, p.kv_rank, p.exact_rank, p.rope_groups, p.rope_dims, p.elements_after, p.elements_before),
        )


def warnings_of(
    plans: Sequence[LatentPlan], kept: Sequence[Rejection], quality: Quality | None, config: CompileConfig
) -> tuple[str, ...]:
    """What a user should look at: layers left as they are, sizes that were not kept, and much lost."""
    found = []
    if kept:
        found.append(f"{len(kept)} attention layers were not converted and keep an ordinary cache ({reasons(kept)})")
    found += clamped(plans, config)
    grown = [p.path for p in plans if p.elements_after >= p.elements_before]
    if grown and not config.exact:
        what = "grows" if any(p.elements_after > p.elements_before for p in plans) else "does not shrink"
        found.append(f"the cache of {len(grown)} layers {what} at this setting: take the original, or a smaller one")
    if quality is not None and not quality.held_out:
        found.append("the text is too short to hold any back: perplexity was measured on the calibration text itself")
    if quality is not None and quality.ratio > _MUCH_WORSE:
        found.append(
            f"perplexity grows {quality.ratio:.1f} times; keep more cache with --cache-ratio, or "
            "spend it differently with --rope-dims"
        )
    return tuple(found)


def require_smaller(
    plans: Sequence[LatentPlan], config: CompileConfig, before: torch.dtype, after: torch.dtype
) -> None:
    """Refuse a conversion that makes no cache smaller, unless something else is asked for.

    That is a result that equals the original, a cache of a narrower type, or the layout of another model.

    Args:
        plans: Shape of every layer's latent.
        config: What the user asked for.
        before: Type of the original's cache.
        after: Type of the result's.

    Raises:
        UsageError: No layer's cache shrinks.
    """
    narrower = config.cache_type == "int8" or after.itemsize < before.itemsize
    if config.exact or narrower or config.layout == "deepseek" or not plans:
        return
    if all(p.elements_after >= p.elements_before for p in plans):
        what = "grows" if any(p.elements_after > p.elements_before for p in plans) else "does not shrink"
        raise UsageError(
            f"The cache of all {len(plans)} layers {what} at this setting.",
            "Take the original, or a smaller --cache-ratio, --kv-rank or --rope-dims.",
        )


def rounded_slopes(program: Program, sites: Sequence[AttentionSite]) -> tuple[str, ...]:
    """Say so where a float32 model computes slopes in fewer bits (Falcon's ALiBi): they are exact in the conversion."""
    if program.dtype in NARROW or not any(site.slopes for site in sites):
        return ()
    values = (node.meta.get("val") for node in program.exported.graph.nodes)
    narrow = {value.dtype for value in values if isinstance(value, Tensor) and value.dtype in NARROW}
    return tuple(
        f"the original computes slopes in {type_name(dtype)}, which counts distances exactly up to "
        f"{round(2 / torch.finfo(dtype).eps)} tokens; the conversion computes them in float32, and differs beyond"
        for dtype in narrow
    )


def costly_layers(plans: Sequence[LatentPlan], errors: Sequence[LayerError]) -> tuple[str, ...]:
    """Name the layers that cost much by themselves, the worst first."""
    worst = sorted(
        ((e.loss or 0.0, plan.path) for plan, e in zip(plans, errors, strict=False) if (e.loss or 0.0) > _HURT),
        reverse=True,
    )
    if not worst:
        return ()
    named = ", ".join(f"{path} ({loss:.2f})" for loss, path in worst[:_NAMED])
    more = f" and {len(worst) - _NAMED} more" if len(worst) > _NAMED else ""
    return (f"layers that cost more than {_HURT:g} nats per token each, by themselves: {named}{more}",)


def require_quality(quality: Quality | None, limit: float | None) -> None:
    """Refuse a conversion that loses more than the user allows.

    Raises:
        QualityGateError: Perplexity grows by more than the limit.
    """
    if quality is not None and limit is not None and not quality.ratio <= limit:
        raise QualityGateError(
            f"Perplexity grows {quality.ratio:.3f} times ({quality.original:.3f} to {quality.converted:.3f}), above "
            f"the limit of {limit:g}.",
            "Raise --cache-ratio or --max-ppl-ratio.",
        )
