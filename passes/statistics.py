"""What factorisation needs to know of a model on text: moments, distances, and how much the loss cares.

One pass forward and backward over the calibration text, accumulated in float64 in memory that does not grow with it.
The empirical Fisher information weighs errors by what they do to the loss: an error ``e`` of the logit of query ``m``
and key ``j`` costs ``(dL/ds_mj e)^2``, an error ``e`` of an attention output ``(dL/do . e)^2``, to second order. Logit
gradients are not stored but computed layer by layer from those of the outputs:
``dL/ds_mj = a_mj dL/do_m . (v_j - o_m)``.

Without gradients a metric ``M`` of outputs (:mod:`~mla_compile.passes.output_metric`) takes the place of
``E (dL/do)(dL/do)^T``, and ``(a_mj |v_j - o_m|_M)^2``, which is what would be expected of gradients with that second
moment, the place of ``(dL/ds_mj)^2``. Losses then have no unit, but can be compared within a model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from mla_compile.devices import on_device
from mla_compile.disk.spill import Shelf, spilled
from mla_compile.errors import RefusedError
from mla_compile.passes.activations import AttentionRun, SiteActivations, SiteRun, attend_site, per_head
from mla_compile.program import Program
from mla_compile.site import AttentionSite
from mla_compile.site_statistics import SiteStatistics
from mla_compile.text.processes import Processes

__all__ = ["SiteSums", "collect_statistics", "key_weighting", "logit_fisher", "logit_spread"]


def key_weighting(site: AttentionSite, statistics: SiteStatistics) -> tuple[Tensor, Tensor, Tensor]:
    """What norms make of the cost of errors of un-normalised keys ``W_g x``.

    An error of ``s_g W_g x`` costs ``E s_g^2 e x x^T e^T``. That moment per key head is written as ``E s_g^2`` of the
    head times one moment for all: how the size of ``s_g`` depends on the token is taken to be alike in all heads.

    Returns:
        ``[n]`` factors of the heads, and mean ``[width]`` and moment ``[width, width]`` in the units of ``statistics``;
        ones, and those of ``statistics``, where keys have no norm.
    """
    squares, mean, moment = statistics.key_squares, statistics.key_mean, statistics.key_moment
    if squares is None or mean is None or moment is None:
        return torch.ones(site.kv_heads, dtype=torch.float64), statistics.mean, statistics.moment
    return squares, mean / squares.mean(), moment / squares.mean()


def collect_statistics(
    program: Program,
    sites: Sequence[AttentionSite],
    windows: Tensor,
    *,
    metrics: Sequence[Tensor] | None = None,
    batch: int = 4,
    run: SiteRun | None = None,
    folder: Path | None = None,
    processes: Processes | None = None,
    progress: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
    tell: Callable[[str], None] | None = None,
) -> tuple[SiteStatistics, ...]:
    """Run the model over text: forward and backward, or forward only where metrics are given.

    Of several processes each runs its share of the batches; all of them get the statistics of all batches.

    Args:
        program: The original model.
        sites: Its attention sites.
        windows: Token ids ``[windows, length]``.
        metrics: What errors of every site's outputs cost, ``[H, Dv, Dv]``; by default the loss's gradients say.
        batch: Windows per pass.
        run: How the model is run, if not as a :class:`~mla_compile.passes.activations.SiteRun` by default.
        folder: Where sums of layers lie while those of another grow, if the model is run layer by layer, and the
            statistics in the end; in memory by default.
        processes: Those that share the batches.
        progress: Wraps the batches of all steps to show progress.
        tell: Is told in a few words which segment begins, where the model is cut.

    Raises:
        RefusedError: A layer's activations or gradients are not finite.
    """
    costs: Sequence[Tensor | None] = [None] * len(sites) if metrics is None else metrics
    run = run or SiteRun(program, sites, (batch, windows.shape[1]), gradients=metrics is None)
    processes = processes or Processes()
    widths, in_turn = run.widths, len(run.layerwise.segments) > 1
    sums = Shelf(
        lambda number: SiteSums.zeros(sites[number], widths[number], windows.shape[1]), folder if in_turn else None
    )
    for _, number, seen in run.run(processes.share(windows.split(batch)), progress, tell):
        of_batch = functools.partial(SiteSums.of_batch, sites[number])
        sums.at(number).add(on_device(run.layerwise.device, of_batch, seen, costs[number]))
    found = tuple(
        spilled(sums.take(number).over(processes).means(site, windows.numel()), folder)
        for number, site in enumerate(sites)  # never two of all
    )
    _require_finite(sites, found)
    return found


def _require_finite(sites: Sequence[AttentionSite], found: Sequence[SiteStatistics]) -> None:
    """Refuse what is not finite, and name the layer where that begins: in the order of the passes."""
    measured = list(zip(sites, found, strict=True))
    forward = [(site, (s.moment, s.attended)) for site, s in measured]
    backward = [(site, (s.output, s.query)) for site, s in reversed(measured)]
    for site, sums in forward + backward:
        if not all(x.isfinite().all() for x in sums):
            raise RefusedError(
                f"Activations or gradients of {site.path} are not finite on the calibration text.",
                "Use other text, or a model in float32.",
            )


@dataclass
class SiteSums:
    """Running sums of one site over text, in float64: what its statistics are means of.

    Sums over parts of a text :meth:`add` up to those over all of it, whichever way it is cut. Additions are in float64
    and rounded, so that another cut agrees to some 1e-15 of the largest number, not to the last bit.
    """

    mean: Tensor
    moment: Tensor
    query: Tensor
    distance: Tensor
    output: Tensor
    attended: Tensor
    value: Tensor
    key_squares: Tensor
    key_moment: Tensor
    key_mean: Tensor

    @classmethod
    def zeros(cls, site: AttentionSite, width: int, length: int) -> SiteSums:
        """Sums over no text, of a site with inputs of some width, in windows of some length."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64)

        heads = site.heads
        return cls(
            mean=zeros(width),
            moment=zeros(width, width),
            query=zeros(heads, site.qk_dim, site.qk_dim),
            distance=zeros(heads, length),
            output=zeros(heads, site.v_dim, site.v_dim),
            attended=zeros(heads),
            value=zeros(site.value.heads),
            key_squares=zeros(site.kv_heads),
            key_moment=zeros(width, width) if site.key.norm else zeros(0),
            key_mean=zeros(width) if site.key.norm else zeros(0),
        )

    def over(self, processes: Processes) -> SiteSums:
        """Sums over the parts of all processes, merged in the order of their numbers."""
        return SiteSums(**{f.name: processes.total(getattr(self, f.name)) for f in fields(self)})

    def add(self, other: SiteSums) -> None:
        """Add sums over more text."""
        for field in fields(self):
            total: Tensor = getattr(self, field.name)
            total += getattr(other, field.name)

    @classmethod
    def of_batch(cls, site: AttentionSite, seen: SiteActivations, metric: Tensor | None) -> SiteSums:
        """Sums over one batch.

        Args:
            site: The layer.
            seen: Its activations.
            metric: What errors of its outputs cost, ``[H, Dv, Dv]``; by default its gradients say.
        """
        attended = attend_site(site, seen.query, seen.key, seen.value)
        source = seen.source.double()
        if metric is None:
            assert seen.gradient is not None
            cost, gradient = logit_fisher(site, seen, attended), seen.gradient.double()
            output = torch.einsum("bshd,bshe->hde", gradient, gradient)
        else:
            cost = logit_spread(site, seen, attended, metric)
            output = metric * source.shape[:2].numel()
        weighted = seen.query * cost.sum(-1).transpose(1, 2)[..., None]
        squares = seen.key_scale.double().square()
        of_keys = squares.mean(-1) if squares.shape[-1] else None
        nothing = source.new_zeros(())
        return cls(
            mean=source.sum((0, 1)),
            moment=torch.einsum("bsd,bse->de", source, source),
            query=torch.einsum("bshd,bshe->hde", weighted.double(), seen.query.double()),
            distance=_by_distance(cost),
            output=output,
            attended=attended.output.double().square().sum((0, 1, 3)),
            value=seen.value.double().square().sum((0, 1, 3)),
            # of one norm for all heads, every head's
            key_squares=nothing if of_keys is None else squares.sum((0, 1)),
            key_moment=nothing if of_keys is None else torch.einsum("bs,bsd,bse->de", of_keys, source, source),
            key_mean=nothing if of_keys is None else torch.einsum("bs,bsd->d", of_keys, source),
        )

    def means(self, site: AttentionSite, tokens: int) -> SiteStatistics:
        """Statistics over so many tokens."""
        return SiteStatistics(
            tokens=tokens,
            mean=self.mean / tokens,
            moment=self.moment / tokens,
            query=self.query / tokens,
            distance=self.distance / self.distance.sum(1, keepdim=True).clamp(min=1e-300),
            output=self.output / tokens,
            attended=self.attended / self.value.repeat_interleave(site.heads // site.value.heads).clamp(min=1e-300),
            key_squares=None if site.key.norm is None else self.key_squares / tokens,
            key_moment=None if site.key.norm is None else self.key_moment / tokens,
            key_mean=None if site.key.norm is None else self.key_mean / tokens,
        )


def logit_fisher(site: AttentionSite, seen: SiteActivations, attended: AttentionRun) -> Tensor:
    """``(dL/ds)^2`` of every scaled logit, ``[B, H, S, S]``; 0 where a query does not look."""
    assert seen.gradient is not None
    gradient = seen.gradient.transpose(1, 2)
    mean = (seen.gradient * attended.output).sum(-1).transpose(1, 2)[..., None]
    along = gradient @ per_head(site, seen.value).mT - mean
    slope = attended.weights * along
    return (slope if attended.slope is None else slope * attended.slope).square()


def logit_spread(site: AttentionSite, seen: SiteActivations, attended: AttentionRun, metric: Tensor) -> Tensor:
    """``(a_mj |v_j - o_m|_M)^2`` of every scaled logit, ``[B, H, S, S]``: how far its value is from the others'.

    Args:
        site: The layer.
        seen: Its activations.
        attended: What it attends to.
        metric: ``[H, Dv, Dv]``, positive semidefinite.
    """
    metric = metric.to(attended.output.dtype)
    value, output = per_head(site, seen.value), attended.output.transpose(1, 2)
    from_value = ((value @ metric) * value).sum(-1)[..., None, :]
    turned = output @ metric
    from_output = (turned * output).sum(-1)[..., None]
    apart = (from_value - 2 * turned @ value.mT + from_output).clamp(min=0)
    slope = attended.weights if attended.slope is None else attended.weights * attended.slope
    return slope.square() * apart


def _by_distance(weights: Tensor) -> Tensor:
    """Sum ``[B, H, S, S]`` along its diagonals: ``[H, S]`` by distance."""
    length = weights.shape[-1]
    total = weights.double().sum(0)
    places = torch.arange(length)
    distance = (places[:, None] - places[None]).clamp(min=0)
    return torch.zeros(len(total), length, dtype=torch.float64).index_add_(1, distance.flatten(), total.flatten(1))
