"""Our method: rotating components, latent and sizes chosen by what errors do to the loss (Fisher-weighted MLA).

1. :mod:`~mla_compile.passes.rope_split` picks the components of the keys that go on rotating.
2. What is left of the keys, and the values, are factorised together. The cost of an error is a quadratic form with a
   Kronecker structure - queries (or output gradients) on one side, inputs on the other - so that the best rank-``r``
   factors are a truncated SVD between two square roots, ``L [K_rest; W_V] C^(1/2)``.
3. Both costs are in nats per token: the sizes of rope and latent, and the shares of the layers, follow from them.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import chain, repeat

import torch
from torch import Tensor

from mla_compile.deepseek import deepseek_shape, require_expressible, require_table, rope_table
from mla_compile.devices import on_device
from mla_compile.latent_weights import LatentWeights
from mla_compile.passes.converted import steps_beside
from mla_compile.passes.gauge import balanced
from mla_compile.passes.layers import MeasuredLayer, input_moments, measure_layers, no_room, rope_is_shifted, settled_by
from mla_compile.passes.parallel import parallel_map
from mla_compile.passes.principal import principal_components
from mla_compile.passes.refit import refit_values
from mla_compile.passes.rope_split import RopeSplit, rotary_channels, split_rope
from mla_compile.passes.search import Divergence, Shares, require_finite, search_shares
from mla_compile.passes.sizes import LayerSizes, same_ranks, shared_ranks, split_budget
from mla_compile.passes.statistics import key_weighting
from mla_compile.passes.task import BATCH, Choice, Task, left_out
from mla_compile.passes.weights import SiteWeights
from mla_compile.plan import shared_rope_plan
from mla_compile.report import LayerForecast
from mla_compile.site import AttentionSite
from mla_compile.site_statistics import SiteStatistics

__all__ = ["JointFactors", "assemble", "fisher", "from_rows", "joint_factors", "joint_rows"]

_KEPT = 2**30
"""Bytes of components and factors that are kept for sizes asked for before; the last ones always are."""
_FLOOR = 1e-7
"""Smallest eigenvalue of a metric, relative to its largest: directions nobody looked at cost a little."""


@dataclass(frozen=True)
class JointFactors:
    """Keys that do not rotate, and values, as ``up @ down @ (x - mean)``; the first ``r`` entries are the best ``r``.

    Attributes:
        loss: ``[k]`` what leaving out each latent entry costs, in nats per token, falling.
        key_up: ``[n, D, k]``.
        value_up: ``[value heads, Dv, k]``.
        down: ``[k, width]``; latent entries have unit variance on the calibration text.
        mean: ``[width]``: what is subtracted from inputs; zeros where biases of keys or values cannot be moved.
    """

    loss: Tensor
    key_up: Tensor
    value_up: Tensor
    down: Tensor
    mean: Tensor


def joint_factors(
    site: AttentionSite, weights: SiteWeights, statistics: SiteStatistics, split: RopeSplit, *, centred: bool = True
) -> JointFactors:
    """Factorise the rest of the keys and the values together, in units of the loss.

    Latents are ``centred`` where biases allow it, and so bring biases with them.

    Norms of keys weigh tokens and heads (:func:`~mla_compile.passes.statistics.key_weighting`): a head by its own mean
    squared scale, exactly; tokens, for keys and values alike, halfway between how keys weigh them and how values do.
    One moment for both keeps the factors exact at full rank, and nested. Norms of values weigh nothing.
    """
    rows, kv_heads = joint_rows(site, weights, split), site.kv_heads
    factors, _, of_keys = key_weighting(site, statistics)
    mean, moment = torch.zeros_like(statistics.mean), (statistics.moment + of_keys) / 2
    if centred and not (site.key_bias_matters or site.value_bias_matters):
        mean, moment = statistics.mean, moment - torch.outer(statistics.mean, statistics.mean)

    query = split.query_rest @ statistics.query @ split.query_rest.mT * site.scale**2
    output = statistics.output * statistics.attended[:, None, None]
    owners = torch.tensor(site.value_owners).repeat_interleave(site.heads // len(site.value_owners))
    values_metric = output.new_zeros(int(owners.max()) + 1, *output.shape[1:]).index_add_(0, owners, output)
    keys_metric = query.unflatten(0, (kv_heads, -1)).sum(1) * factors[:, None, None]
    metrics = [_root(keys_metric), _root(values_metric)]
    roots, inverses = ([metrics[0][i], metrics[1][i]] for i in (0, 1))
    values, vectors, seen = principal_components(_per_head(roots, rows), moment)
    values = values.clamp(min=0)
    real = values > 1e-14 * values[0]
    sizes = values.sqrt()
    down = torch.where(real, 1 / sizes.clamp(min=1e-300), 0.0)[:, None] * seen
    return from_rows(site, values / 2, _per_head(inverses, vectors * (sizes * real)), down, mean)


def joint_rows(site: AttentionSite, weights: SiteWeights, split: RopeSplit) -> Tensor:
    """What the latent has to carry: ``[n * D + distinct value heads * Dv, width]``."""
    width = weights.key.weight.shape[-1]
    first = [site.value_owners.index(i) for i in range(max(site.value_owners) + 1)]
    rest = split.key_rest @ weights.key.weight.reshape(-1, width)
    return torch.cat([rest, weights.value.weight[first].reshape(-1, width)])


def from_rows(site: AttentionSite, loss: Tensor, up: Tensor, down: Tensor, mean: Tensor) -> JointFactors:
    """Factors of :func:`joint_rows`, head by head."""
    keys = site.kv_heads * site.qk_dim
    return JointFactors(
        loss=loss,
        key_up=up[:keys].unflatten(0, (site.kv_heads, -1)),
        value_up=up[keys:].unflatten(0, (-1, site.v_dim))[torch.tensor(site.value_owners)],
        down=down,
        mean=mean,
    )


def _per_head(matrices: Sequence[Tensor], rows: Tensor) -> Tensor:
    """Multiply the rows of every head with its own matrix.

    Args:
        matrices: ``[heads, D, D]`` of keys, and the same of values.
        rows: ``[all heads' D, k]``, one head after another.
    """
    parts = rows.split([m.shape[0] * m.shape[1] for m in matrices])
    return torch.cat(
        [(m @ part.unflatten(0, m.shape[:2])).flatten(0, 1) for m, part in zip(matrices, parts, strict=True)]
    )


def _root(metrics: Tensor) -> tuple[Tensor, Tensor]:
    """Square roots of ``[n, D, D]`` metrics and their inverses."""
    values, vectors = torch.linalg.eigh((metrics + metrics.mT) / 2)
    values = values.clamp(min=_FLOOR * float(values.max()) or 1.0)  # where nobody looks, all is alike
    roots = [(vectors * values[:, None] ** power) @ vectors.mT for power in (0.5, -0.5)]
    return roots[0], roots[1]


def assemble(
    site: AttentionSite, weights: SiteWeights, split: RopeSplit, factors: JointFactors, rank: int
) -> LatentWeights:
    """Put rope components and the first ``rank`` latent entries into a layer's weights.

    Sizes are :func:`~mla_compile.passes.gauge.balanced`, for training. Biases are placed as
    :mod:`~mla_compile.passes.factorise` explains; the constant latent entry, where there is one,
    is the last of the ``rank``. Components are made from keys in front of their norms, and scaled with whole logits.

    Raises:
        ValueError: There are components, but the keys have a shift behind their norm: see
            :func:`~mla_compile.passes.layers.require_scalable`.
    """
    if split.inv_freq.numel() and rope_is_shifted(site, weights):
        raise ValueError(
            f"Keys of {site.path} have a shift behind their norm, which no shared component can carry. "
            "Pass a split without components."
        )
    constant = int(site.needs_constant(site.qk_dim))
    count, rank = 2 * len(split.inv_freq), rank - constant
    query_map = torch.cat([split.query_rest, split.query_rope], 1)
    key_weight, key_bias = weights.key.weight.flatten(0, 1), weights.key.bias.flatten()
    down, key_up, value_up = factors.down[:rank], factors.key_up[..., :rank], factors.value_up[..., :rank]
    latent_bias = -down @ factors.mean
    if constant:
        key_column = (split.key_rest @ key_bias).unflatten(0, key_up.shape[:2]) * site.key_bias_matters
        key_up = torch.cat([key_up, key_column[..., None]], -1)
        value_up = torch.cat([value_up, weights.value.bias[..., None] * site.value_bias_matters], -1)
        down = torch.cat([down, down.new_zeros(1, down.shape[1])])
        latent_bias = torch.cat([latent_bias, latent_bias.new_ones(1)])
    outside = weights.value.weight @ factors.mean + weights.value.bias * (not site.value_bias_matters)
    outside = (outside + weights.value.shift).repeat_interleave(site.heads // site.value.heads, 0)
    row_bias = torch.cat([latent_bias, split.key_rope @ key_bias])
    query_bias = torch.einsum("hed,hd->he", query_map, weights.query.bias)
    assembled = LatentWeights(
        query=query_map @ weights.query.weight,
        query_bias=query_bias if query_bias.any() else None,
        row=torch.cat([down, split.key_rope @ key_weight]),
        row_bias=row_bias if row_bias.any() else None,
        key_up=key_up.contiguous(),
        value_up=value_up.mT.contiguous(),
        output_bias=outside if outside.any() else None,
        inv_freq=split.inv_freq[None] if count else torch.zeros(1, 0, dtype=torch.float64),
        scaled_rope=bool(count) and site.key.norm is not None,
    )
    return balanced(assembled)


def fisher(task: Task) -> Choice:
    """Choose components, ranks and weights by what errors do to the loss.

    Raises:
        UsageError: There is no calibration text, or the sizes that were asked for do not fit.
        RefusedError: A layer's keys have a shift behind their norm that rotates, or the layout has no place for it.
    """
    config, even = task.config, task.config.layout == "deepseek"
    if even:
        require_expressible(task.sites, task.kept)
        require_table(task.sites[0], config.rope_dims)
    windows = task.require_windows()
    measured = measure_layers(task)
    layers = measured.layers
    divergence = Divergence(task.program, windows, task.sites, task.resources)

    parts = _Parts(layers, even, task.resources.device)
    settled = None if task.store is None else settled_by(task)
    tries = None if task.store is None else task.store.journal(settled)
    checks = chain([True], repeat(False))  # the first of what is tried

    def finished(index: int, s: LayerSizes) -> LatentWeights:
        if task.store is None:
            return parts.weights(index, s)
        return task.store.recall((settled, index, s), {}, torch.float64, lambda: parts.weights(index, s))

    def at(shares: Shares) -> tuple[LayerSizes, ...]:
        sizes = tuple(split_budget(layer, config, shares) for layer in layers)
        return same_ranks(sizes) if even or config.uniform_rank else sizes

    def costs(sizes: Sequence[LayerSizes]) -> list[Tensor]:
        """What every latent entry of every layer is worth; a constant one comes first, and as much as any."""
        found = [parts.worth(index, s).spectrum for index, s in enumerate(sizes)]
        return [torch.cat([loss[: layer.least_rank - 1], loss]) for layer, loss in zip(layers, found, strict=True)]

    with task.stages.stage("sizes") as advance:

        @functools.cache
        def loss(sizes: tuple[LayerSizes, ...]) -> float:
            if any(s.rank < layer.least_rank for layer, s in zip(layers, sizes, strict=True)):
                return math.inf
            advance()

            def measure() -> float:
                weights = parallel_map(lambda one: parts.weights(*one), [*enumerate(sizes)], task.jobs)
                return divergence(task.rewrite(weights, check=next(checks)))

            return measure() if tries is None else tries.recall(repr(sizes), measure)

        sizes = at(search_shares(lambda shares: loss(at(shares))))
        if any(s.rank < layer.least_rank for layer, s in zip(layers, sizes, strict=True)):
            fewest = [split_budget(layer, config, Shares(0.0)).components for layer in layers]
            raise no_room(layers, fewest, config)
        require_finite(loss(sizes))
        if config.kv_rank is None and len(layers) > 1 and not (even or config.uniform_rank):
            sizes = min(sizes, shared_ranks(layers, config, sizes, costs(sizes)), key=loss)
    weights = tuple(parallel_map(lambda one: finished(*one), [*enumerate(sizes)], task.jobs))
    weights = _refitted(task, weights, divergence)
    plans = tuple(
        shared_rope_plan(layer.site, layer.width, s.components, s.rank) for layer, s in zip(layers, sizes, strict=True)
    )
    splits = [parts.worth(index, s) for index, s in enumerate(sizes)]
    forecasts = tuple(
        LayerForecast(
            split.inv_freq,
            split.own,
            # without gradients losses have no unit
            split.loss + float(cost[s.rank :].sum()) if config.gradients else None,
            left_out(cost),
        )
        for split, cost, s in zip(splits, costs(sizes), sizes, strict=True)
    )
    shape = deepseek_shape(task.sites[0], plans[0].rope_dims, plans[0].kv_rank) if even else None
    done = not config.polish_steps
    if done:  # as whoever takes the choice would, but layer by layer
        weights = tuple(task.held(balanced(layer)) for layer in weights)
    return Choice(plans, weights, forecasts, shape, measured.notes, balanced=done, moments=input_moments(task, layers))


def _refitted(task: Task, weights: tuple[LatentWeights, ...], divergence: Divergence) -> tuple[LatentWeights, ...]:
    """Weights with values refitted to the original's outputs, where that brings the model closer."""
    windows, model = task.require_windows(), task.rewrite(weights, check=False)
    steps = steps_beside(task.program, task.sites, windows.split(BATCH), task.resources)
    with task.stages.stage("refit", steps) as stage:
        refitted = refit_values(
            task.program,
            task.sites,
            weights,
            model,
            windows,
            resources=task.resources,
            folder=task.folder,
            progress=stage.each,
        )
    return refitted if divergence(task.rewrite(refitted, check=False)) < divergence(model) else weights


@dataclass(frozen=True)
class _Worth:
    """What is known of a layer at some sizes, of any rank.

    Attributes:
        inv_freq: Radians per position of its components.
        own: Whether each component carries pairs of its own frequency only.
        loss: Expected loss of letting the rest stand still, in nats per token.
        spectrum: ``[k]`` what leaving out each latent entry costs, falling.
    """

    inv_freq: tuple[float, ...]
    own: tuple[bool, ...]
    loss: float
    spectrum: Tensor


class _Parts:
    """Components and factors of layers at the sizes that a search asks for.

    Factors of the sizes asked for last are kept while they take little room, and made anew when they are asked for
    again; what they are worth is small, and always kept. Several threads may ask, each for another layer.
    """

    def __init__(self, layers: Sequence[MeasuredLayer], even: bool, device: str) -> None:
        self._layers, self._even, self._device = layers, even, device
        self._made: dict[tuple[int, int, int], tuple[RopeSplit, JointFactors]] = {}
        self._worth: dict[tuple[int, int, int], _Worth] = {}
        self._lock = threading.Lock()

    def worth(self, index: int, sizes: LayerSizes) -> _Worth:
        """What is known of a layer at some sizes."""
        key = (index, sizes.components, sizes.own)
        if key not in self._worth:
            self._factors(key, self._layers[index].original())
        return self._worth[key]

    def weights(self, index: int, sizes: LayerSizes) -> LatentWeights:
        """Latent weights of a layer of some sizes."""
        layer = self._layers[index]
        original = layer.original()
        split, factors = self._factors((index, sizes.components, sizes.own), original)
        return assemble(layer.site, original, split, factors, sizes.rank)

    def _factors(self, key: tuple[int, int, int], original: SiteWeights) -> tuple[RopeSplit, JointFactors]:
        with self._lock:
            if key in self._made:
                return self._made[key]
        split, factors = made = self._make(*key, original)
        with self._lock:
            self._worth[key] = _Worth(tuple(split.inv_freq.tolist()), split.own, split.loss, factors.loss)
            while self._made and sum(map(_nbytes, [made, *self._made.values()])) > _KEPT:
                del self._made[next(iter(self._made))]
            self._made[key] = made
        return made

    def _make(self, index: int, components: int, own: int, original: SiteWeights) -> tuple[RopeSplit, JointFactors]:
        layer = self._layers[index]

        def make(original: SiteWeights, statistics: SiteStatistics) -> tuple[RopeSplit, JointFactors]:
            found = rotary_channels(layer.site, original, statistics)
            table = rope_table(layer.site, 2 * components) if self._even else None
            if table is not None:
                found = found.aimed_at(torch.tensor(table, dtype=torch.float64))
            split = split_rope(layer.site, found, components, own, once=self._even)
            # Serving engines read no biases from such a checkpoint.
            return split, joint_factors(layer.site, original, statistics, split, centred=not self._even)

        return on_device(self._device, make, original, layer.statistics())


def _nbytes(made: tuple[RopeSplit, JointFactors]) -> int:
    values = (getattr(part, f.name) for part in made for f in fields(part))
    return sum(value.nbytes for value in values if isinstance(value, Tensor))
