"""Stream calibration text through the original graph and accumulate what factorisation needs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mla_compile.devices import on_device
from mla_compile.passes.activations import SiteRun
from mla_compile.program import Program
from mla_compile.site import AttentionSite
from mla_compile.text.processes import Processes

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
    run: SiteRun | None = None,
    processes: Processes | None = None,
    progress: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
) -> tuple[PairNorms, ...]:
    """Measure mean pair norms of queries and keys (MHA2MLA section 3.1, the 2-norm criterion).

    Args:
        program: The original model.
        sites: Its attention sites.
        windows: Token ids ``[windows, length]``.
        batch: Windows per forward pass.
        run: How the model is run, if not as a :class:`~mla_compile.passes.activations.SiteRun` by default.
        processes: Those that share the batches; all of them get the norms of all batches.
        progress: Wraps the batches of all steps to show progress.

    Returns:
        One entry per site. Memory does not grow with the number of tokens.
    """
    run = run or SiteRun(program, sites, (batch, windows.shape[1]), gradients=False)
    processes = processes or Processes()
    totals = [PairNorms(*(torch.zeros(p.heads, len(s.rope.pairs), dtype=torch.float64) for p in (s.query, s.key)))
              for s in sites]  # fmt: skip
    for _, number, seen in run.run(processes.share(windows.split(batch)), progress):
        for total, heads in ((totals[number].query, seen.query), (totals[number].key, seen.key)):
            lengths = functools.partial(_lengths, sites[number])
            total += on_device(run.layerwise.device, lengths, heads.double())
    tokens = windows.numel()
    return tuple(PairNorms(processes.total(t.query) / tokens, processes.total(t.key) / tokens) for t in totals)


def _lengths(site: AttentionSite, heads: Tensor) -> Tensor:
    """Sum over tokens of the length of every pair, ``[heads, pairs]``, of ``[B, S, heads, D]``."""
    pairs = torch.tensor(site.rope.pairs, dtype=torch.long).reshape(-1, 2)
    return torch.hypot(heads[..., pairs[:, 0]], heads[..., pairs[:, 1]]).sum((0, 1))
