"""What a way to choose latent weights is given, and what it returns.

A method sees the whole model at once, because what one layer may keep is a question of what the others need.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mla_compile.config import CompileConfig
from mla_compile.deepseek import DeepSeekShape
from mla_compile.disk.layer_store import LayerStore, rounded
from mla_compile.disk.spill import spilled
from mla_compile.disk.statistics_cache import StatisticsCache
from mla_compile.latent_weights import LatentWeights
from mla_compile.passes.activations import SiteRun
from mla_compile.passes.insert_latent import insert_latent
from mla_compile.passes.layerwise import Resources
from mla_compile.passes.weights import input_width
from mla_compile.plan import LatentPlan
from mla_compile.program import Program
from mla_compile.progress import Stages
from mla_compile.report import LayerForecast
from mla_compile.runtime.module import LatentModel
from mla_compile.site import AttentionSite, Rejection
from mla_compile.text.processes import Processes

__all__ = ["BATCH", "Choice", "Method", "Task", "left_out", "unpredicted"]

BATCH = 4
"""Windows per pass over calibration text."""
_POINTS = 64
"""Ranks at which a spectrum is kept, about."""


@dataclass(frozen=True)
class Task:
    """A model to convert.

    Attributes:
        program: The original.
        sites: The layers to convert.
        kept: Its other attention layers.
        config: What the user asked for.
        windows: Calibration text ``[windows, length]``, or None.
        stages: Times and shows what runs.
        cache: Where statistics are kept for the next conversion, or None.
        store: Where finished layers are kept, and what is not used at the moment, or None for memory.
        wide: Whether layers are kept there in float32, whatever the type of the result.
        resources: What running the original over text may take.
        processes: Those that share the text.
        jobs: Layers that are factorised at a time.
    """

    program: Program
    sites: tuple[AttentionSite, ...]
    kept: tuple[Rejection, ...]
    config: CompileConfig
    windows: Tensor | None
    stages: Stages = field(default_factory=Stages)
    cache: StatisticsCache | None = None
    store: LayerStore | None = None
    wide: bool = False
    resources: Resources = field(default_factory=Resources)
    processes: Processes = field(default_factory=Processes)
    jobs: int = 1

    @property
    def widths(self) -> list[int]:
        """Input width of every site's projections."""
        return [input_width(self.program, site) for site in self.sites]

    @property
    def folder(self) -> Path | None:
        """Where tensors lie that are not used at the moment; None for memory."""
        return None if self.store is None else self.store.folder

    def held(self, weights: LatentWeights, dtype: torch.dtype = torch.float64) -> LatentWeights:
        """Weights of a layer, mapped from a file where there is a folder, with their matrices in some type."""
        if self.folder is None or weights.query.dtype == dtype != torch.float64:
            return weights
        return spilled(rounded(weights, dtype), self.folder)

    def rewrite(self, weights: Iterable[LatentWeights], *, check: bool = True) -> LatentModel:
        """The converted model with some weights, which are read layer by layer, computing in float32.

        Args:
            weights: Of every site.
            check: Whether it is run in pieces, which finds what cannot be in the graph around the layers: once is
                enough where a search tries many weights.
        """
        return self._model(weights, torch.float32, stored=False, check=check)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the result: what the user chose, else the model's own."""
        chosen = self.config.dtype
        return self.program.dtype if chosen == "auto" else getattr(torch, chosen)

    def result(self, weights: Iterable[LatentWeights]) -> LatentModel:
        """The converted model with some weights, likewise, in its own type."""
        return self._model(weights, self.dtype, stored=True, check=True)

    def _model(self, weights: Iterable[LatentWeights], dtype: torch.dtype, *, stored: bool, check: bool) -> LatentModel:
        held = [self.held(layer, dtype) for layer in weights]
        graph = insert_latent(self.program, self.sites, held, dtype, self.kept, stored=stored, check=check)
        return LatentModel(graph.module, graph.rows)

    def site_run(self, batch: int, *, gradients: bool) -> SiteRun:
        """The original on its text, so many windows at a time."""
        shape = (batch, self.require_windows().shape[1])
        return SiteRun(self.program, self.sites, shape, gradients=gradients, resources=self.resources)

    def shared_steps(self, run: SiteRun, batch: int) -> int:
        """Steps of this process over its share of the text."""
        return run.steps(len(self.processes.share(self.require_windows().split(batch))))

    def require_windows(self) -> Tensor:
        """Calibration text, which the caller of a method that needs it has to give.

        Raises:
            ValueError: It was not given.
        """
        if self.windows is None:
            raise ValueError(f"The method '{self.config.method}' needs calibration text. Pass windows of it.")
        return self.windows


@dataclass(frozen=True)
class Choice:
    """What a method chose.

    Attributes:
        plans: Shape of every site's cache.
        weights: Latent weights of every site.
        forecasts: What rotates in every site, and what the conversion should cost.
        deepseek: What all sites have in common, in the layout ``deepseek``.
        notes: What the user should know.
        balanced: Whether the weights went through :func:`~mla_compile.passes.gauge.balanced` already.
        moments: ``[width, width]`` of every site's inputs, where queries are to get a rank by them; else none.
    """

    plans: tuple[LatentPlan, ...]
    weights: tuple[LatentWeights, ...]
    forecasts: tuple[LayerForecast, ...]
    deepseek: DeepSeekShape | None = None
    notes: tuple[str, ...] = ()
    balanced: bool = False
    moments: tuple[Tensor, ...] = ()


def unpredicted(weights: Sequence[LatentWeights], *, own: bool) -> tuple[LayerForecast, ...]:
    """Forecasts of a method that does not count in units of the loss.

    Args:
        weights: Latent weights of every site.
        own: Whether components carry pairs of their own frequency only.
    """
    found = [(tuple(layer.inv_freq.flatten().tolist()), layer.worth) for layer in weights]
    return tuple(
        LayerForecast(kept, (own,) * len(kept), spectrum=() if worth is None else left_out(worth))
        for kept, worth in found
    )


def left_out(worth: Tensor) -> tuple[tuple[int, float], ...]:
    """Ranks, and the share of all that latents of each leave out.

    Args:
        worth: What every entry is worth, ``[k]``, in the order in which a latent takes them.
    """
    behind = [*worth.flip(0).cumsum(0).flip(0).tolist(), 0.0]
    if not behind[0]:
        return ()
    ranks = sorted({*range(0, len(behind), max(1, len(behind) // _POINTS)), len(behind) - 1})
    return tuple((rank, behind[rank] / behind[0]) for rank in ranks)


class Method(Protocol):
    """A way to choose latent weights."""

    def __call__(self, task: Task) -> Choice:
        """Choose sizes and weights of every site."""
        ...
