"""Values again, from what the converted model really attends to: least squares per query head.

Keys and values were factorised for the original's attention. The converted model's attention differs a little, and its
layers see what the earlier ones made of the text. Given the latents it averages, the up-projection that comes closest
to the original's attention outputs is a regression in closed form, for every query head of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mla_compile.devices import on_device
from mla_compile.disk.spill import Shelf, spilled
from mla_compile.latent_weights import LatentWeights
from mla_compile.passes.converted import side_by_side, steps_beside
from mla_compile.passes.layerwise import Resources
from mla_compile.program import Program
from mla_compile.runtime.module import LatentModel
from mla_compile.site import AttentionSite

__all__ = ["refit_values"]

_RIDGE = 1e-4
"""Pull towards the weights that are refitted, relative to a latent entry's own variance."""
_BLOCK = 256
"""Rows of a Gram matrix that are computed together."""


def _context(_: int, given: Mapping[str, Any], __: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Run a layer, and tell what its attention averages: latents ``[B, S, H, r]``."""
    value_up = given["value_up"]
    identity = torch.eye(value_up.shape[1], dtype=value_up.dtype, device=value_up.device)[None]
    context, present = torch.ops.mla.latent_attention.default(**{**given, "value_up": identity})
    per_head = value_up.repeat_interleave(context.shape[2] // len(value_up), 0)
    return (torch.einsum("bshr,hrv->bshv", context, per_head), present), context


def refit_values(
    program: Program,
    sites: Sequence[AttentionSite],
    weights: Sequence[LatentWeights],
    model: LatentModel,
    windows: Tensor,
    *,
    batch: int = 4,
    resources: Resources | None = None,
    folder: Path | None = None,
    progress: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
) -> tuple[LatentWeights, ...]:
    """Regress the original's attention outputs on the latents that a converted model averages.

    Args:
        program: The original.
        sites: The converted layers.
        weights: Their latent weights.
        model: The converted model with these weights.
        windows: Token ids ``[windows, length]``.
        batch: Windows per pass.
        resources: What running each of the models may take.
        folder: Where sums of layers lie while those of another grow, and the result; in memory by default.
        progress: Wraps the batches of all steps to show progress.

    Returns:
        The weights with a value up-projection per query head.
    """
    resources, batches = resources or Resources(), windows.split(batch)
    in_turn = steps_beside(program, sites, batches, resources) > len(batches)
    sums = Shelf(lambda index: _Sums.zeros(sites[index], weights[index]), folder if in_turn else None)
    left = [len(batches)] * len(sites)
    found: dict[int, LatentWeights] = {}
    for _, index, wanted, context in side_by_side(program, sites, model, _context, batches, resources, progress):
        bias = weights[index].output_bias
        sums.at(index).add(on_device(resources.device, _Sums.of_batch, context, wanted, bias))
        left[index] -= 1
        if not left[index]:
            done = sums.take(index)
            found[index] = spilled(_solve(weights[index], _mirrored(done.gram), done.cross), folder)
    return tuple(found[index] for index in range(len(sites)))


@dataclass
class _Sums:
    """What a layer's regression needs of all tokens.

    Attributes:
        gram: ``[H, r, r]``, of the latents that its heads average; only the lower half counts.
        cross: ``[H, r, Dv]``, of them and the outputs that are wanted.
    """

    gram: Tensor
    cross: Tensor

    @classmethod
    def zeros(cls, site: AttentionSite, weights: LatentWeights) -> _Sums:
        """Of no tokens."""
        rank = weights.value_up.shape[1]
        gram = torch.zeros(site.heads, rank, rank, dtype=torch.float64)
        return cls(gram, torch.zeros(site.heads, rank, site.v_dim, dtype=torch.float64))

    @classmethod
    def of_batch(cls, context: Tensor, wanted: Tensor, bias: Tensor | None) -> _Sums:
        """Of a batch's tokens.

        Args:
            context: ``[B, S, H, r]``, latents that heads average.
            wanted: ``[B, S, H, Dv]``, outputs.
            bias: ``[H, Dv]``, what is added to outputs behind the up-projection, or None.
        """
        seen = context.double()
        target = wanted.double() if bias is None else wanted.double() - bias
        return cls(_gram(seen.flatten(0, 1).transpose(0, 1)), torch.einsum("bshr,bshv->hrv", seen, target))

    def add(self, other: _Sums) -> None:
        """Add those of other tokens."""
        self.gram += other.gram
        self.cross += other.cross


def _gram(seen: Tensor) -> Tensor:
    """``X^T X`` of ``[H, tokens, r]`` below the diagonal, block by block: little more than half of the products."""
    heads, _, rank = seen.shape
    gram = seen.new_zeros(heads, rank, rank)
    for start in range(0, rank, _BLOCK):
        rows = seen[:, :, start : start + _BLOCK]
        gram[:, start : start + _BLOCK, : start + rows.shape[2]] = rows.mT @ seen[:, :, : start + rows.shape[2]]
    return gram


def _mirrored(gram: Tensor) -> Tensor:
    """The whole of a symmetric matrix whose lower half is known."""
    return gram.tril() + gram.tril(-1).mT


def _solve(weights: LatentWeights, gram: Tensor, cross: Tensor) -> LatentWeights:
    before = weights.value_up.repeat_interleave(len(gram) // len(weights.value_up), 0)
    variance = gram.diagonal(dim1=1, dim2=2)
    pull = torch.diag_embed(_RIDGE * variance + 1e-9 * variance.mean(1, keepdim=True) + 1e-30)
    return replace(weights, value_up=torch.linalg.solve(gram + pull, cross + pull @ before))
