"""Run the original model on text and look at its attention layers: inputs, heads, and what the loss asks of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mla_compile.passes.layerwise import Layerwise, Resources
from mla_compile.passes.layout import Layout, Sizes, per_token, token_axes
from mla_compile.passes.offset_rotation import turn_by_phases
from mla_compile.passes.operands import norm_scale, normalised
from mla_compile.passes.retype import widened
from mla_compile.passes.segments import Mark
from mla_compile.passes.turned import turn_back
from mla_compile.program import Program
from mla_compile.runtime.masks import score_mask
from mla_compile.site import AttentionSite, Projection

__all__ = [
    "AttentionRun",
    "SiteActivations",
    "SiteRun",
    "attend_site",
    "output_run",
    "per_head",
    "site_heads",
]


@dataclass(frozen=True)
class SiteActivations:
    """One layer on one batch; float32, heads in the site's order, behind their norms and gains, not rotated.

    Attributes:
        source: ``[B, S, width]`` what keys and values are projected from.
        query: ``[B, S, H, D]``.
        key: ``[B, S, n, D]``.
        value: ``[B, S, n', Dv]``; ``n'`` may be another divisor of ``H`` than ``n``.
        gradient: ``[B, S, H, Dv]`` derivative of the summed loss by the layer's attention outputs, or None.
        key_scale: ``[B, S, m]`` inverse norms that the keys were multiplied with: one for each of them or one for all,
            or none (``m`` is 0) where they have no norm.
    """

    source: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    gradient: Tensor | None
    key_scale: Tensor


class SiteRun:
    """The original model on batches of text, as its attention sites see it.

    Args:
        program: The original model.
        sites: Its attention sites.
        shape: Batch and length of the batches, the last of which may be smaller.
        gradients: Whether to run backward too, from the sum of the next tokens' losses (empirical Fisher).
        resources: What the run may take.

    Attributes:
        layerwise: The run of the graph.
    """

    def __init__(
        self,
        program: Program,
        sites: Sequence[AttentionSite],
        shape: tuple[int, int],
        *,
        gradients: bool,
        resources: Resources | None = None,
    ) -> None:
        nodes, sizes = {n.name: n for n in program.exported.graph.nodes}, Sizes.of(program)
        self._program, self._sites, self._gradients = program, tuple(sites), gradients
        watched = [_watched(site) for site in sites]
        self._axes = {
            name: token_axes(sizes, nodes[name].meta["val"].shape) for names in watched for name in names[:-1]
        }
        wanted = [*dict.fromkeys(name for names in watched for name in names)]
        self.layerwise = Layerwise(
            widened(program.flat_module()),
            program.tokens,
            [*wanted, program.logits] if gradients else wanted,
            self.marks(sites),
            shape,
            resources or Resources(),
            follow=[site.output for site in sites] if gradients else (),
            loss=_next_token_loss if gradients else None,
        )

    @staticmethod
    def marks(sites: Sequence[AttentionSite]) -> list[Mark]:
        """Where the graph may be cut: between sites, each with all that is looked at of it."""
        return [Mark(site.output, _watched(site)) for site in sites]

    @property
    def widths(self) -> list[int]:
        """Width of the input of every site's keys and values."""
        nodes = {n.name: n for n in self._program.exported.graph.nodes}
        shapes = [(self._axes[s.key.origin], nodes[s.key.origin].meta["val"].shape) for s in self._sites]
        return [math.prod(d for axis, d in zip(*pair, strict=True) if axis == "d") for pair in shapes]

    def steps(self, batches: int) -> int:
        """How many steps :meth:`run` takes for so many batches."""
        return self.layerwise.steps(batches)

    def run(
        self,
        batches: Sequence[Tensor],
        progress: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
        tell: Callable[[str], None] | None = None,
    ) -> Iterator[tuple[int, int, SiteActivations]]:
        """Look at every site on every batch: batch by batch for each site, in whatever order of sites.

        Args:
            batches: Token ids ``[B, S]``.
            progress: Wraps the batches of all steps to show progress.
            tell: Is told in a few words which segment begins, where there are several.

        Yields:
            Number of the batch, number of the site, and what it does.
        """
        for seen in self.layerwise.run(batches, self._program.inputs, progress, tell):
            shape = batches[seen.batch].shape
            for number, site in enumerate(self._sites):
                if site.output in seen.values:
                    values = {
                        name: per_token(self._axes[name], seen.values[name], *shape) for name in _watched(site)[:-1]
                    }
                    gradient = seen.gradients[site.output] if self._gradients else None
                    with torch.device(self.layerwise.device):  # constants of the site's
                        found = _of_site(site, values, gradient, len(batches[seen.batch]))
                    yield seen.batch, number, found


def output_run(
    program: Program, sites: Sequence[AttentionSite], shape: tuple[int, int], resources: Resources | None = None
) -> Layerwise:
    """The original model up to the attention outputs of its sites, forward only; see :func:`site_heads`.

    Args:
        program: The original model.
        sites: Its attention sites.
        shape: Batch and length of the batches.
        resources: What the run may take.
    """
    outputs = [site.output for site in sites]
    marks = [Mark(name, (name,)) for name in outputs]
    return Layerwise(widened(program.flat_module()), program.tokens, outputs, marks, shape, resources or Resources())


def _watched(site: AttentionSite) -> tuple[str, ...]:
    """What is looked at of a site, its output last."""
    operands = (_printed(p) for p in (site.query, site.key, site.value))
    return (*dict.fromkeys((site.key.origin, *operands)), site.output)


def _printed(projection: Projection) -> str:
    return projection.activation or projection.node


def _next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    scored = logits[:, :-1].float()
    return F.cross_entropy(scored.reshape(-1, scored.shape[-1]), ids[:, 1:].reshape(-1), reduction="sum")


def site_heads(site: AttentionSite, output: Tensor, batch: int) -> Tensor:
    """A layer's attention output, or something in its place, as ``[B, S, H, Dv]`` in the site's order."""
    heads = Layout(site.output_axes).arrange(output, "bshd", batch)
    return heads if site.order is None else heads[:, :, list(site.order)]


def _of_site(site: AttentionSite, seen: Mapping[str, Tensor], gradient: Tensor | None, batch: int) -> SiteActivations:
    query, key, value = (normalised(p, seen[_printed(p)].double()) for p in (site.query, site.key, site.value))
    if site.query.turned is not None:
        query = turn_back(query, site.rope)
    query = turn_by_phases(query, site.rope)
    scale = norm_scale(site.key, seen[_printed(site.key)].double())
    return SiteActivations(
        source=seen[site.key.origin].float(),
        query=query.float(),
        key=key.float(),
        value=value.float(),
        gradient=None if gradient is None else site_heads(site, gradient, batch).float(),
        key_scale=key.new_zeros(*key.shape[:2], 0).float() if scale is None else scale.float(),
    )


@dataclass(frozen=True)
class AttentionRun:
    """What attention did on one batch.

    Attributes:
        weights: ``[B, H, S, S]`` attention weights; without a sink's share they may sum to less than one.
        output: ``[B, S, H, Dv]``.
        slope: ``[B, H, S, S]`` derivative of the logits by ``q . k`` times the scale: below 1 where a soft-cap bends.
    """

    weights: Tensor
    output: Tensor
    slope: Tensor | None


def attend_site(site: AttentionSite, query: Tensor, key: Tensor, value: Tensor) -> AttentionRun:
    """Attend as a site does, from position 0.

    Args:
        site: The layer.
        query: ``[B, S, H, D]``, not rotated.
        key: ``[B, S, n, D]``, not rotated.
        value: ``[B, S, n', Dv]``.
    """
    query, key = rotate(site, query).transpose(1, 2), per_head(site, rotate(site, key))
    weights, slope = site_weights(site, query @ key.mT * site.scale)
    output = weights @ per_head(site, value)
    return AttentionRun(weights, output.transpose(1, 2), slope)


def per_head(site: AttentionSite, groups: Tensor) -> Tensor:
    """Keys or values ``[B, S, groups, D]`` of every query head, ``[B, H, S, D]``."""
    return groups.transpose(1, 2).repeat_interleave(site.heads // groups.shape[2], 1)


def rotate(site: AttentionSite, heads: Tensor) -> Tensor:
    """Rotate ``[B, S, H, D]`` by the site's RoPE, from position 0."""
    if not site.rope.pairs:
        return heads
    first, second = torch.tensor(site.rope.pairs).unbind(1)
    places = torch.arange(heads.shape[1], dtype=torch.float64)
    angle = torch.outer(places, torch.tensor(site.rope.inv_freq, dtype=torch.float64))[:, None]
    cos, sin = angle.cos().to(heads.dtype), angle.sin().to(heads.dtype)
    turned = heads.clone()
    turned[..., first] = heads[..., first] * cos - heads[..., second] * sin
    turned[..., second] = heads[..., second] * cos + heads[..., first] * sin
    return turned


def site_weights(site: AttentionSite, scores: Tensor) -> tuple[Tensor, Tensor | None]:
    """Attention weights ``[B, H, S, S]`` of scaled scores, and the soft-cap's slope where there is one."""
    length, cap, slope = scores.shape[-1], site.softcap, None
    if cap:
        bent = (scores / cap).tanh()
        scores, slope = cap * bent, 1 - bent.square()
    ones = torch.ones(1, length, dtype=torch.long)
    slopes = None if site.slopes is None else torch.tensor(site.slopes)
    mask = score_mask(ones, length, site.mask.window or 0, slopes, scores.dtype, site.mask.chunked)
    scores = scores + mask if mask.is_floating_point() else scores.masked_fill(~mask, -math.inf)
    if site.scores.sinks is not None:
        column = torch.tensor(site.scores.sinks, dtype=scores.dtype).reshape(1, -1, 1, 1)
        scores = torch.cat([scores, column.expand(len(scores), -1, length, 1)], -1)
    return scores.softmax(-1)[..., :length], slope
