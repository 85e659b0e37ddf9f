"""Ways to choose latent weights: what they are given, what they return, and their names.

A method sees the whole model at once, because what one layer may keep is a question of what the others need.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from mla_compile.config import CompileConfig
from mla_compile.errors import UsageError
from mla_compile.passes.calibrate import PairNorms, pair_norms
from mla_compile.passes.factorise import LatentWeights, factorise_mha2mla
from mla_compile.passes.insert_latent import LatentGraph, insert_latent
from mla_compile.passes.weights import SiteWeights, input_width, read_site
from mla_compile.plan import LatentPlan, plan_layers
from mla_compile.program import Program
from mla_compile.site import AttentionSite, Rejection

__all__ = ["Choice", "Method", "Task", "Track", "mha2mla", "nothing_left_out"]

_Item = TypeVar("_Item")
BATCH = 4
"""Windows per pass over calibration text."""


class Track(Protocol):
    """Shows progress of a loop: its name, its items, and how many there are."""

    def __call__(self, name: str, items: Iterable[_Item], total: int | None = None) -> Generator[_Item]:
        """Yield the items."""
        ...


@dataclass(frozen=True)
class Task:
    """A model to convert.

    Attributes:
        program: The original.
        sites: The layers to convert.
        kept: Its other attention layers.
        config: What the user asked for.
        windows: Calibration text ``[windows, length]``, or None.
        track: Shows progress.
    """

    program: Program
    sites: tuple[AttentionSite, ...]
    kept: tuple[Rejection, ...]
    config: CompileConfig
    windows: Tensor | None
    track: Track

    @property
    def widths(self) -> list[int]:
        """Input width of every site's projections."""
        return [input_width(self.program, site) for site in self.sites]

    def read(self) -> list[SiteWeights]:
        """Weights of every site."""
        return [read_site(self.program, site) for site in self.sites]

    def rewrite(self, weights: Sequence[LatentWeights]) -> LatentGraph:
        """The converted model with some weights."""
        return insert_latent(self.program, self.sites, weights, torch.float32, self.kept)

    def require_windows(self) -> Tensor:
        """Calibration text.

        Raises:
            UsageError: There is none.
        """
        if self.windows is None:
            raise UsageError(
                f"The method '{self.config.method}' chooses by what the model does on text, and none was given.",
                "Give some with --calibration FILE, or use --method mha2mla, which can do without.",
            )
        return self.windows


@dataclass(frozen=True)
class Choice:
    """What a method chose.

    Attributes:
        plans: Shape of every site's cache.
        weights: Latent weights of every site.
        notes: What the user should know.
    """

    plans: tuple[LatentPlan, ...]
    weights: tuple[LatentWeights, ...]
    notes: tuple[str, ...] = ()


class Method(Protocol):
    """A way to choose latent weights."""

    def __call__(self, task: Task) -> Choice:
        """Choose sizes and weights of every site."""
        ...


def mha2mla(task: Task) -> Choice:
    """Partial RoPE by pair norms and weight-only SVD (MHA2MLA, arXiv 2502.14837)."""
    plans = plan_layers(task.sites, task.widths, task.config)
    norms: Sequence[PairNorms | None] = [None] * len(task.sites)
    if task.config.selection == "2-norm" and any(p.rope_dims for p in plans):
        windows = task.require_windows()
        batches = -(-len(windows) // 8)
        norms = pair_norms(task.program, task.sites, windows, progress=lambda b: task.track("calibrate", b, batches))
    weights = [
        factorise_mha2mla(site, read_site(task.program, site), plan, task.config, norm)
        for site, plan, norm in task.track("factorise", zip(task.sites, plans, norms, strict=True), len(plans))
    ]
    return Choice(plans, tuple(weights))


def nothing_left_out(task: Task) -> Choice:
    """Every rotation and the full rank: what comes out computes what the original does."""
    config = task.config.model_copy(update={"exact": True, "selection": "uniform", "rope_dims": None})
    config = config.model_copy(update={"cache_ratio": None, "kv_rank": None})
    plans = plan_layers(task.sites, task.widths, config)
    weights = [
        factorise_mha2mla(site, read_site(task.program, site), plan, config, None)
        for site, plan in task.track("factorise", zip(task.sites, plans, strict=True), len(plans))
    ]
    return Choice(plans, tuple(weights))
