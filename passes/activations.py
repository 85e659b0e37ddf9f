"""Run the original model on text and look at its attention layers: inputs, heads, and what the loss asks of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from mla_compile.errors import RefusedError
from mla_compile.passes.layout import Layout, Sizes, per_token, token_axes
from mla_compile.passes.operands import norm_scale, normalised
from mla_compile.passes.retype import widened
from mla_compile.passes.turned import turn_back
from mla_compile.program import Program
from mla_compile.runtime import ops
from mla_compile.site import AttentionSite, Projection

__all__ = ["Attended", "SiteActivations", "Watcher", "attend_site", "observe_outputs", "observe_sites", "per_head"]


class Watcher(fx.Interpreter):
    """Runs a graph, hands watched values to their observers, and frees every value after its last use."""

    def __init__(
        self, module: fx.GraphModule, watched: Mapping[str, Sequence[Callable[[Tensor, torch.Size], Tensor | None]]]
    ) -> None:
        super().__init__(module)
        self._watched = watched
        self._shape = torch.Size()

    def observe(self, shape: torch.Size, inputs: Sequence[Tensor]) -> Any:  # noqa: ANN401 - what the graph returns
        """Run on inputs of ``[batch, length]``, which observers are told; what an observer returns takes a place."""
        self._shape = shape
        return self.run(*inputs)

    def run_node(self, n: fx.Node) -> Any:  # noqa: ANN401, D102 - the interpreter's own
        value = super().run_node(n)
        for observe in self._watched.get(n.name, ()):
            replaced = observe(value, self._shape)
            value = value if replaced is None else replaced
        return value


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


def observe_sites(
    program: Program, sites: Sequence[AttentionSite], *, gradients: bool
) -> Callable[[Tensor], list[SiteActivations]]:
    """Prepare to look at every site.

    Args:
        program: The original model.
        sites: Its attention sites.
        gradients: Whether to run backward too, from the sum of the next tokens' losses (empirical Fisher).

    Returns:
        A function from token ids ``[B, S]`` to one entry per site.
    """
    nodes, sizes = {n.name: n for n in program.exported.graph.nodes}, Sizes.of(program)
    seen: dict[str, Tensor] = {}
    attended: dict[str, Tensor] = {}
    watched: dict[str, list[Callable[[Tensor, torch.Size], Tensor | None]]] = {}

    def remember(name: str) -> None:
        axes = token_axes(sizes, nodes[name].meta["val"].shape)

        def observe(value: Tensor, shape: torch.Size) -> None:
            seen[name] = per_token(axes, value.detach(), *shape)

        watched.setdefault(name, []).append(observe)

    def follow(name: str) -> None:
        """Let the loss be differentiated by a layer's outputs, and by nothing before the first layer."""

        def observe(value: Tensor, _: torch.Size) -> Tensor:
            attended[name] = value if value.requires_grad else value.detach().requires_grad_()
            return attended[name]

        watched.setdefault(name, []).append(observe)

    for name in {n for s in sites for n in (s.key.source, *(_printed(p) for p in (s.query, s.key, s.value)))}:
        remember(name)
    for site in sites if gradients else ():
        follow(site.output)
    watcher = Watcher(widened(program.flat_module()), watched)

    def activations(ids: Tensor) -> list[SiteActivations]:
        slopes: Sequence[Tensor | None] = [None] * len(sites)
        with torch.set_grad_enabled(gradients):
            logits = watcher.observe(ids.shape, program.inputs(ids))
            if gradients:
                slopes = _slopes(_next_token_loss(logits, ids), [attended[s.output] for s in sites])
        found = [_of_site(site, seen, slope, len(ids)) for site, slope in zip(sites, slopes, strict=True)]
        seen.clear()
        attended.clear()
        return found

    return activations


def observe_outputs(program: Program, sites: Sequence[AttentionSite]) -> Callable[[Tensor], list[Tensor]]:
    """Prepare to look at the attention outputs ``[B, S, H, Dv]`` of every site, heads in the site's order.

    Returns:
        A function from token ids ``[B, S]`` to one tensor per site.
    """
    seen: dict[str, Tensor] = {}

    def keep(site: AttentionSite) -> Callable[[Tensor, torch.Size], None]:
        def observe(value: Tensor, shape: torch.Size) -> None:
            seen[site.output] = _heads(site, value, shape[0])

        return observe

    watcher = Watcher(widened(program.flat_module()), {site.output: [keep(site)] for site in sites})

    def outputs(ids: Tensor) -> list[Tensor]:
        watcher.observe(ids.shape, program.inputs(ids))
        return [seen.pop(site.output) for site in sites]

    return outputs


def _printed(projection: Projection) -> str:
    return projection.activation or projection.node


def _next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    scored = logits[:, :-1].float()
    return F.cross_entropy(scored.reshape(-1, scored.shape[-1]), ids[:, 1:].reshape(-1), reduction="sum")


def _slopes(loss: Tensor, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """Derivatives of the loss by attention outputs only: the model's parameters are the user's.

    Raises:
        RefusedError: Something in the model has no derivative.
    """
    try:
        return torch.autograd.grad(loss, outputs)
    except RuntimeError as error:  # NotImplementedError too
        raise RefusedError(
            f"The model cannot be run backward ({str(error).splitlines()[0].rstrip('.')}).",
            "Pass --no-gradients (gradients=False in Python).",
        ) from error


def _heads(site: AttentionSite, output: Tensor, batch: int) -> Tensor:
    """A layer's attention output, or something in its place, as ``[B, S, H, Dv]`` in the site's order."""
    heads = Layout(site.output_axes).arrange(output, "bshd", batch)
    return heads if site.order is None else heads[:, :, list(site.order)]


def _of_site(site: AttentionSite, seen: Mapping[str, Tensor], slope: Tensor | None, batch: int) -> SiteActivations:
    query, key, value = (normalised(p, seen[_printed(p)].double()) for p in (site.query, site.key, site.value))
    if site.query.turned is not None:
        query = turn_back(query, site.rope)
    scale = norm_scale(site.key, seen[_printed(site.key)].double())
    return SiteActivations(
        source=seen[site.key.source].float(),
        query=query.float(),
        key=key.float(),
        value=value.float(),
        gradient=None if slope is None else _heads(site, slope, batch).float(),
        key_scale=key.new_zeros(*key.shape[:2], 0).float() if scale is None else scale.float(),
    )


@dataclass(frozen=True)
class Attended:
    """What attention did on one batch.

    Attributes:
        weights: ``[B, H, S, S]`` attention weights; without a sink's share they may sum to less than one.
        output: ``[B, S, H, Dv]``.
        slope: ``[B, H, S, S]`` derivative of the logits by ``q . k`` times the scale: below 1 where a soft-cap bends.
    """

    weights: Tensor
    output: Tensor
    slope: Tensor | None


def attend_site(site: AttentionSite, query: Tensor, key: Tensor, value: Tensor) -> Attended:
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
    return Attended(weights, output.transpose(1, 2), slope)


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
    mask = ops.score_mask(ones, length, site.mask.window or 0, slopes, scores.dtype)
    scores = scores + mask if mask.is_floating_point() else scores.masked_fill(~mask, -math.inf)
    if site.scores.sinks is not None:
        column = torch.tensor(site.scores.sinks, dtype=scores.dtype).reshape(1, -1, 1, 1)
        scores = torch.cat([scores, column.expand(len(scores), -1, length, 1)], -1)
    return scores.softmax(-1)[..., :length], slope
