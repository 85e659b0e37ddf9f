"""TransMLA (arXiv 2502.07864): RoRoPE with FreqFold, and a principal component analysis of balanced keys and values.

Kept as published, as a method to compare with: real rotations instead of complex ones, blocks of neighbouring
frequencies that share principal components whatever the distances, components spread evenly over the frequencies, and a
latent of activations balanced by their norms. Queries and biases are placed exactly.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, repeat

import torch

from mla_compile.config import CompileConfig
from mla_compile.deepseek import deepseek_shape, require_expressible, require_table, rope_table
from mla_compile.devices import on_device
from mla_compile.errors import UsageError
from mla_compile.latent_weights import LatentWeights
from mla_compile.passes.fisher import JointFactors, assemble, from_rows, joint_rows
from mla_compile.passes.layers import MeasuredLayer, input_moments, measure_layers, no_room, settled_by
from mla_compile.passes.parallel import parallel_map
from mla_compile.passes.principal import principal_components
from mla_compile.passes.rope_split import RopeSplit, RotaryChannels, real_split, rotary_channels, split_rope
from mla_compile.passes.search import Divergence, require_finite
from mla_compile.passes.statistics import key_weighting
from mla_compile.passes.task import Choice, Task, unpredicted
from mla_compile.passes.weights import SiteWeights
from mla_compile.plan import LatentPlan, latent_budget, one_rank, shared_rope_plan
from mla_compile.site import AttentionSite
from mla_compile.site_statistics import SiteStatistics

__all__ = ["balanced_factors", "fold_frequencies", "transmla"]


def fold_frequencies(site: AttentionSite, found: RotaryChannels, components: int, fold: int) -> RopeSplit:
    """Keep the leading principal components of every block of frequencies (TransMLA section 4, RoRoPE and FreqFold).

    Args:
        site: The layer; its ``P`` pairs are ranked from the highest frequency.
        found: Its rotary channels; only their covariance is used.
        components: How many complex components rotate; a divisor of ``P``.
        fold: Frequencies per block, a multiple of ``P / components`` and a divisor of ``P``.
    """
    pairs, kv_heads = len(site.rope.pairs), site.kv_heads
    every = pairs // components
    ranked = sorted(range(pairs), key=lambda i: -site.rope.inv_freq[i])
    encoders, targets = [], []
    for start in range(0, pairs, fold):
        members = ranked[start : start + fold]
        rows = torch.tensor([g * pairs + pair for pair in members for g in range(kv_heads)])
        _, vectors = torch.linalg.eigh(found.moment[rows][:, rows].real)
        for place in range(fold // every):
            encoder = torch.zeros(len(found.moment), dtype=found.moment.dtype)
            encoder[rows] = vectors[:, -1 - place].to(encoder.dtype)
            encoders.append(encoder)
            targets.append(ranked[start + place * every])
    basis = torch.stack(encoders)
    rest = torch.eye(len(found.moment), dtype=basis.dtype) - basis.mH @ basis
    return real_split(site, found.unfolded(), encoders, encoders, targets, rest, loss=math.nan)


def balanced_factors(
    site: AttentionSite, weights: SiteWeights, statistics: SiteStatistics, split: RopeSplit
) -> JointFactors:
    """Principal components of ``[K_rest / b; V]``, ``b`` making both equally long (TransMLA section 4, BKV).

    The paper's keys have no norms. Where they do, heads and tokens count as their norms weigh them, as in
    :func:`~mla_compile.passes.fisher.joint_factors`.
    """
    rows = joint_rows(site, weights, split)
    keys = site.kv_heads * site.qk_dim
    factors, _, of_keys = key_weighting(site, statistics)
    scale = torch.ones(len(rows), dtype=torch.float64)
    scale[:keys] = factors.sqrt().repeat_interleave(site.qk_dim)
    scaled = rows * scale[:, None]
    lengths = torch.cat([(x @ m * x).sum(1) for x, m in ((scaled[:keys], of_keys), (scaled[keys:], statistics.moment))])
    lengths = lengths.clamp(min=0).sqrt()
    balance = float(lengths[:keys].mean() / lengths[keys:].mean())
    scale[:keys] /= balance if balance > 0 else 1.0
    scaled = rows * scale[:, None]
    values, vectors, down = principal_components(scaled, (statistics.moment + of_keys) / 2)
    return from_rows(site, values, vectors / scale[:, None], down, torch.zeros_like(statistics.mean))


def transmla(task: Task) -> Choice:
    """Convert by TransMLA, with the rope dims and the FreqFold that fit the calibration text best.

    Raises:
        UsageError: There is no calibration text, or no rope dims fit.
        RefusedError: A layer's keys have a shift behind their norm that rotates, or the layout has no place for it.
    """
    even = task.config.layout == "deepseek"
    if even:
        require_expressible(task.sites, task.kept)
        require_table(task.sites[0], task.config.rope_dims)
    measured = measure_layers(task)
    layers = measured.layers
    divergence = Divergence(task.program, task.require_windows(), task.sites, task.resources)
    tries = None if task.store is None else task.store.journal(settled_by(task))
    checks = chain([True], repeat(False))  # the first of what is tried
    best: _Try | None = None
    least, collapses = math.inf, _collapses(layers, task.config)
    if not collapses:
        channels = ", ".join(str(2 * pairs) for pairs in _pairs(layers))
        raise UsageError(
            f"--rope-dims {task.config.rope_dims} does not divide the rotating channels of every head ({channels}) by "
            "one number.",
            "Give a divisor, or leave --rope-dims out.",
        )
    with task.stages.stage("sizes") as tried:
        for collapse in collapses:
            smallest = math.inf
            fold = collapse
            while all(pairs % fold == 0 for pairs in _pairs(layers) or [1]):  # double it while that helps
                plans = tuple(_plan(layer, task.config, collapse) for layer in layers)
                if even and rope_table(task.sites[0], plans[0].rope_dims) is None:
                    break
                if even or task.config.uniform_rank:
                    plans = one_rank(plans)
                if any(p.kv_rank < layer.least_rank for layer, p in zip(layers, plans, strict=True)):
                    break
                tried()
                this = _Try(task, layers, plans, fold)
                measure = functools.partial(this.cost, divergence, checks)
                cost = measure() if tries is None else tries.recall(this.name, measure)
                if best is None or cost < least:
                    best, least = this, cost
                if cost >= smallest:
                    break
                smallest, fold = cost, 2 * fold
    if best is None:
        fewest = [len(layer.site.rope.pairs) // max(collapses) for layer in layers]
        raise no_room(layers, fewest, task.config)
    require_finite(least)
    shape = deepseek_shape(task.sites[0], best.plans[0].rope_dims, best.plans[0].kv_rank) if even else None
    forecasts, moments = unpredicted(best.weights, own=best.fold == 1), input_moments(task, layers)
    return Choice(best.plans, best.weights, forecasts, shape, measured.notes, moments=moments)


@dataclass(frozen=True)
class _Try:
    """Sizes that are tried.

    Attributes:
        task: The model.
        layers: Its layers.
        plans: Shape of every layer's cache.
        fold: Frequencies per block.
    """

    task: Task
    layers: Sequence[MeasuredLayer]
    plans: tuple[LatentPlan, ...]
    fold: int

    @property
    def name(self) -> str:
        """What tells it from others of the same search."""
        return repr((self.plans, self.fold))

    @functools.cached_property
    def weights(self) -> tuple[LatentWeights, ...]:
        """Latent weights of every layer; made when they are needed, which those of an earlier process are not."""
        layers, device = [*zip(self.layers, self.plans, strict=True)], self.task.resources.device
        made = parallel_map(lambda layer: _weights(*layer, self.fold, device), layers, self.task.jobs)
        return tuple(map(self.task.held, made))

    def cost(self, divergence: Divergence, checks: Iterator[bool]) -> float:
        """How far the converted model is from the original; the next of ``checks`` says whether it is checked."""
        return divergence(self.task.rewrite(self.weights, check=next(checks)))


def _weights(layer: MeasuredLayer, plan: LatentPlan, fold: int, device: str) -> LatentWeights:
    """A layer's latent weights, computed on a device."""

    def make(original: SiteWeights, statistics: SiteStatistics) -> LatentWeights:
        channels = rotary_channels(layer.site, original, statistics)
        if plan.rope_dims:
            split = fold_frequencies(layer.site, channels, plan.rope_dims // 2, fold)
        else:
            split = split_rope(layer.site, channels.unfolded(), 0, 0)
        factors = balanced_factors(layer.site, original, statistics, split)
        worth = factors.loss.clamp(min=0)
        worth = torch.cat([worth[: layer.least_rank - 1], worth])  # a constant entry is as needed as any
        return replace(assemble(layer.site, original, split, factors, plan.kv_rank), worth=worth)

    return on_device(device, make, layer.original(), layer.statistics())


def _collapses(layers: Sequence[MeasuredLayer], config: CompileConfig) -> list[int]:
    """By how much a head's rotating channels may be divided, to be the shared rope head."""
    if not (rotating := _pairs(layers)):
        return [1]
    most = math.gcd(*rotating)
    divisors = [c for c in range(1, most + 1) if most % c == 0]
    if config.rope_dims is None:
        return divisors
    return [c for c in divisors if all(2 * pairs == c * config.rope_dims for pairs in rotating)]


def _pairs(layers: Sequence[MeasuredLayer]) -> list[int]:
    """How many pairs of channels rotate in a head, of the layers that have some; every number once."""
    return sorted({len(layer.site.rope.pairs) for layer in layers} - {0})


def _plan(layer: MeasuredLayer, config: CompileConfig, collapse: int) -> LatentPlan:
    site = layer.site
    components = len(site.rope.pairs) // collapse
    rank = config.kv_rank if config.kv_rank is not None else latent_budget(site, config) - 2 * components
    return shared_rope_plan(site, layer.width, components, rank)
