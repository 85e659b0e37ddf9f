"""Layers as the methods that choose by text see them: weights, what was measured on the text, rotary channels."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mla_compile.config import DEFAULT_CACHE_RATIO, CompileConfig
from mla_compile.disk.content import content_of
from mla_compile.disk.spill import spilled
from mla_compile.disk.statistics_cache import Recalled, statistics_key
from mla_compile.errors import RefusedError, UsageError
from mla_compile.passes.output_metric import output_metrics
from mla_compile.passes.statistics import collect_statistics
from mla_compile.passes.task import BATCH, Task
from mla_compile.passes.weights import SiteWeights, read_site
from mla_compile.site import AttentionSite
from mla_compile.site_statistics import SiteStatistics

__all__ = [
    "MeasuredLayer",
    "MeasuredModel",
    "input_moments",
    "measure_layers",
    "no_room",
    "require_scalable",
    "rope_is_shifted",
    "settled_by",
]


@dataclass(frozen=True)
class MeasuredLayer:
    """Everything known of a layer before its sizes are chosen.

    Attributes:
        site: The layer.
        original: Reads its weights: of all layers in float64 they take more room than the model.
        measured: What it does on the calibration text.
    """

    site: AttentionSite
    original: Callable[[], SiteWeights]
    measured: SiteStatistics

    def statistics(self) -> SiteStatistics:
        """What is certain of what it does on the calibration text."""
        return certain(self.measured)

    @property
    def width(self) -> int:
        """Input width of its key and value projections."""
        return len(self.measured.mean)

    @property
    def pairs(self) -> int:
        """Rotary pairs of all its key heads."""
        return self.site.kv_heads * len(self.site.rope.pairs)

    @property
    def least_rank(self) -> int:
        """Shortest latent: one entry, and the constant one where biases need it."""
        return 1 + int(self.site.needs_constant(self.site.qk_dim))


@dataclass(frozen=True)
class MeasuredModel:
    """Every layer measured.

    Attributes:
        layers: In the order of the model.
        notes: What the user should know of the measurement.
    """

    layers: tuple[MeasuredLayer, ...]
    notes: tuple[str, ...]


def measure_layers(task: Task) -> MeasuredModel:
    """Measure every layer on the calibration text, as one stage.

    Raises:
        RefusedError: A layer's keys have a shift behind their norm that rotates, or activations are not finite.
        ShareDone: In every process but the first of several, when its share of the text is measured.
    """
    windows = task.require_windows()
    for site in task.sites:
        require_scalable(site, read_site(task.program, site))
    metrics, notes = (None, ()) if task.config.gradients else _metrics(task)
    run = task.site_run(BATCH, gradients=task.config.gradients)
    with task.stages.stage("statistics", task.shared_steps(run, BATCH)) as stage:

        def measure() -> tuple[SiteStatistics, ...]:
            return collect_statistics(
                task.program,
                task.sites,
                windows,
                metrics=metrics,
                batch=BATCH,
                run=run,
                folder=task.folder,
                processes=task.processes,
                progress=stage.each,
                tell=stage.noted,
            )

        found = _measured_once(task, measure)
        stage.note = f"{windows.numel()} tokens, {found.origin}"
    layers = [
        MeasuredLayer(site, functools.partial(read_site, task.program, site), measured)
        for site, measured in zip(task.sites, found.value, strict=True)
    ]
    return MeasuredModel(tuple(layers), (*found.warnings, *notes, *_too_few(layers)))


def input_moments(task: Task, layers: Sequence[MeasuredLayer]) -> tuple[Tensor, ...]:
    """Moments ``[width, width]`` of what every layer is given, if queries are to get a rank by them; else none.

    One layer's at a time is in memory where the task has a folder.
    """
    if task.config.q_rank is None:
        return ()
    found = (layer.statistics() for layer in layers)
    return tuple(
        (known if known is layer.measured else spilled(known, task.folder)).moment
        for known, layer in zip(found, layers, strict=True)
    )


def _measured_once(
    task: Task, measure: Callable[[], tuple[SiteStatistics, ...]]
) -> Recalled[tuple[SiteStatistics, ...]]:
    """Measure, all processes together, unless the first has the statistics already; only the first goes on.

    Raises:
        ShareDone: In every process but the first.
    """
    processes, asked = task.processes, []
    if not processes.first:
        if processes.agreed(False):  # what the first says
            measure()
        processes.leave_unless_first()

    def together() -> tuple[SiteStatistics, ...]:
        asked.append(processes.agreed(True))
        return measure()

    if task.cache is None:
        return Recalled(together(), "computed")
    key = statistics_key(task.program, task.sites, task.require_windows(), gradients=task.config.gradients)
    found = task.cache.recall(key, together)
    if not asked:
        processes.agreed(False)
    return found


def _metrics(task: Task) -> tuple[list[Tensor], tuple[str, ...]]:
    """What errors of outputs cost where no gradient says it: all alike where what comes behind is not understood."""
    found = output_metrics(task.program, task.sites)
    alike = [
        torch.eye(site.v_dim, dtype=torch.float64).expand(site.heads, -1, -1) if metric is None else metric
        for site, metric in zip(task.sites, found, strict=True)
    ]
    unknown = [site.path for site, metric in zip(task.sites, found, strict=True) if metric is None]
    note = f"without gradients, errors of attention outputs count alike in {', '.join(unknown)}: what follows them is "
    return alike, (f"{note}not one linear map",) if unknown else ()


def _too_few(layers: Sequence[MeasuredLayer]) -> tuple[str, ...]:
    widest = max(layers, key=lambda layer: layer.width)
    tokens = widest.measured.tokens
    if tokens >= widest.width:
        return ()
    return (
        f"{tokens} tokens of calibration text are fewer than the {widest.width} inputs of {widest.site.path}, whose "
        "covariance they cannot tell; give more text",
    )


def certain(statistics: SiteStatistics) -> SiteStatistics:
    """Statistics of fewer tokens than inputs with moments shrunk towards a multiple of the identity.

    Directions that no token took are not known to be empty: they get the share of the mean variance that the tokens
    leave open.
    """
    width = len(statistics.mean)
    open_share = max(0.0, 1 - statistics.tokens / width)
    if not open_share:
        return statistics

    def shrunk(moment: Tensor) -> Tensor:
        even = torch.eye(width, dtype=moment.dtype) * moment.diagonal().mean()
        return (1 - open_share) * moment + open_share * even

    key_moment = None if statistics.key_moment is None else shrunk(statistics.key_moment)
    return replace(statistics, moment=shrunk(statistics.moment), key_moment=key_moment)


def no_room(layers: Sequence[MeasuredLayer], components: Sequence[int], config: CompileConfig) -> UsageError:
    """Say in which layer a cache is too small for a latent, and what would do.

    Args:
        layers: The layers.
        components: Complex components that rotate in each, at least.
        config: What the user asked for.
    """
    if config.kv_rank is not None:
        rank, path = max((layer.least_rank, layer.site.path) for layer in layers)
        return UsageError(
            f"--kv-rank {config.kv_rank} leaves no room for a latent beside the constant entry that biases of {path} "
            "need.",
            f"Use --kv-rank {rank} or more.",
        )

    needs = []
    for layer, count in zip(layers, components, strict=True):
        site = layer.site
        needed = 2 * count + layer.least_rank + site.key_scales(site.qk_dim) + site.value_scales
        needs.append((needed / site.elements_per_token, site.path))
    least, path = max(needs)
    ratio = DEFAULT_CACHE_RATIO if config.cache_ratio is None else config.cache_ratio
    ways = [f"--cache-ratio {math.ceil(10_000 * least) / 10_000:.4f} or more"] * (least <= 1)
    ways += ["fewer --rope-dims"] * bool(config.rope_dims)
    return UsageError(
        f"A cache ratio of {ratio:g} leaves no room for a latent in {path}.",
        f"Use {', or '.join(ways or ['--method mha2mla'])}.",
    )


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


def settled_by(task: Task) -> str:
    """A name of all that a search for sizes follows from."""
    key = statistics_key(task.program, task.sites, task.require_windows(), gradients=task.config.gradients)
    return content_of({}, repr((key, task.config, task.kept)))
