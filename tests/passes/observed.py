"""Attention layers looked at one batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from mla_compile.passes.activations import SiteActivations, SiteRun, output_run, site_heads
from mla_compile.passes.layerwise import Resources
from mla_compile.program import Program
from mla_compile.site import AttentionSite


def observe_sites(
    program: Program, sites: Sequence[AttentionSite], *, gradients: bool, resources: Resources | None = None
) -> Callable[[Tensor], list[SiteActivations]]:
    """Prepare to look at every site on one batch at a time.

    Args:
        program: The original model.
        sites: Its attention sites.
        gradients: Whether to run backward too, from the sum of the next tokens' losses (empirical Fisher).
        resources: What the run may take.

    Returns:
        A function from token ids ``[B, S]`` to one entry per site.
    """

    def activations(ids: Tensor) -> list[SiteActivations]:
        shape = (int(ids.shape[0]), int(ids.shape[1]))
        run = SiteRun(program, sites, shape, gradients=gradients, resources=resources)
        found = {number: seen for _, number, seen in run.run([ids])}
        return [found[number] for number in range(len(sites))]

    return activations


def observe_outputs(program: Program, sites: Sequence[AttentionSite]) -> Callable[[Tensor], list[Tensor]]:
    """Prepare to look at the attention outputs ``[B, S, H, Dv]`` of every site, heads in the site's order.

    Returns:
        A function from token ids ``[B, S]`` to one tensor per site.
    """

    def outputs(ids: Tensor) -> list[Tensor]:
        run = output_run(program, sites, (int(ids.shape[0]), int(ids.shape[1])))
        found: dict[str, Any] = {}
        for seen in run.run([ids], program.inputs):
            found |= seen.values
        return [site_heads(site, found[site.output], len(ids)) for site in sites]

    return outputs
