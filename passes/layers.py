"""Layers as the methods that choose by text see them: weights, what was measured on the text, rotary channels."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mla_compile.errors import RefusedError
from mla_compile.passes.rope_split import RotaryChannels, rotary_channels
from mla_compile.passes.statistics import SiteStatistics, collect_statistics
from mla_compile.passes.task import BATCH, Task
from mla_compile.passes.weights import SiteWeights
from mla_compile.site import AttentionSite

__all__ = ["MeasuredLayer", "measure_layers", "require_scalable", "rope_is_shifted"]


@dataclass(frozen=True)
class MeasuredLayer:
    """Everything known of a layer before its sizes are chosen.

    Attributes:
        site: The layer.
        original: Its weights.
        statistics: What it does on the calibration text.
        channels: Its rotary channels.
    """

    site: AttentionSite
    original: SiteWeights
    statistics: SiteStatistics
    channels: RotaryChannels

    @property
    def width(self) -> int:
        """Input width of its key and value projections."""
        return len(self.statistics.mean)

    @property
    def least_rank(self) -> int:
        """Shortest latent: one entry, and the constant one where biases need it."""
        return 1 + int(self.site.needs_constant(self.site.qk_dim))


def measure_layers(task: Task) -> list[MeasuredLayer]:
    """Read every layer's weights and measure it on the calibration text, as one stage.

    Raises:
        RefusedError: A layer's keys have a shift behind their norm that rotates, or activations are not finite.
    """
    windows, originals = task.require_windows(), task.read()
    for site, original in zip(task.sites, originals, strict=True):
        require_scalable(site, original)
    batches = math.ceil(len(windows) / BATCH)
    statistics = collect_statistics(
        task.program, task.sites, windows, batch=BATCH, progress=lambda b: task.stages.each("statistics", b, batches)
    )
    return [
        MeasuredLayer(site, weights, measured, rotary_channels(site, weights, measured))
        for site, weights, measured in zip(task.sites, originals, statistics, strict=True)
    ]


def require_scalable(site: AttentionSite, weights: SiteWeights) -> None:
    """Refuse a layer whose keys cannot be a scale times something linear, which shared components need.

    Raises:
        RefusedError: The keys have a shift behind their norm, and it rotates.
    """
    if rope_is_shifted(site, weights):
        raise RefusedError(
            f"The key norm of {site.path} has a bias, which rotates with the keys: one rope key for all heads cannot "
            "carry it.",
            "Use --method mha2mla, which keeps rope keys behind their norms.",
        )


def rope_is_shifted(site: AttentionSite, weights: SiteWeights) -> bool:
    """Whether keys have a shift behind their norm that rotates; another is the same for all logits of a query."""
    rotating = sorted({channel for pair in site.rope.pairs for channel in pair})
    return bool(weights.key.shift[:, rotating].any())
