"""Stream calibration text through the original graph and accumulate what factorisation needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mla_compile.passes.activations import Watcher
from mla_compile.passes.layout import Sizes, per_token, token_axes
from mla_compile.passes.operands import normalised
from mla_compile.passes.retype import widened
from mla_compile.program import Program
from mla_compile.site import AttentionSite, Projection

__all__ = ["PairNorms", "pair_norms"]


@dataclass(frozen=True)
class PairNorms:
    """Mean length of every rotary pair of one site, before rotation, in float64.

    Attributes:
        query: ``[heads, pairs]``, mean over tokens of ``|q|`` of the pair.
        key: ``[kv_heads, pairs]``.
    """

    query: Tensor
    key: Tensor


def pair_norms(
    program: Program,
    sites: Sequence[AttentionSite],
    windows: Tensor,
    batch: int = 8,
    progress: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
) -> tuple[PairNorms, ...]:
    """Measure mean pair norms of queries and keys (MHA2MLA section 3.1, the 2-norm criterion).

    Args:
        program: The original model.
        sites: Its attention sites.
        windows: Token ids ``[windows, length]``.
        batch: Windows per forward pass.
        progress: Wraps the batches to show progress.

    Returns:
        One entry per site. Memory does not grow with the number of tokens.
    """
    sums = [
        {role: torch.zeros(p.heads, len(s.rope.pairs), dtype=torch.float64) for role, p in _operands(s)} for s in sites
    ]
    watched: dict[str, list[Callable[[Tensor, torch.Size], Tensor | None]]] = {}
    nodes, sizes = {n.name: n for n in program.exported.graph.nodes}, Sizes.of(program)
    for site, total in zip(sites, sums, strict=True):
        for role, projection in _operands(site):
            name = projection.activation or projection.node
            axes = token_axes(sizes, nodes[name].meta["val"].shape)

            def observe(
                value: Tensor,
                shape: torch.Size,
                axes: tuple[str, ...] = axes,
                site: AttentionSite = site,
                p: Projection = projection,
                into: Tensor = total[role],
            ) -> None:
                into += _norms(per_token(axes, value, *shape), p, site)

            watched.setdefault(name, []).append(observe)

    watcher = Watcher(widened(program.flat_module()), watched)
    with torch.inference_mode():
        for ids in progress(windows.split(batch)):
            watcher.observe(ids.shape, program.inputs(ids))
    tokens = windows.numel()
    return tuple(PairNorms(query=total["query"] / tokens, key=total["key"] / tokens) for total in sums)


def _operands(site: AttentionSite) -> tuple[tuple[str, Projection], ...]:
    return (("query", site.query), ("key", site.key))


def _norms(outputs: Tensor, projection: Projection, site: AttentionSite) -> Tensor:
    """Sum over tokens of the length of every pair, behind the norm if there is one, ``[heads, pairs]``.

    Args:
        outputs: ``[B, S, N]``, what the projection printed, or its activation.
        projection: Queries or keys.
        site: Their layer.
    """
    heads = normalised(projection, outputs.double())
    pairs = torch.tensor(site.rope.pairs, dtype=torch.long).reshape(-1, 2)
    return torch.hypot(heads[..., pairs[:, 0]], heads[..., pairs[:, 1]]).sum((0, 1))
