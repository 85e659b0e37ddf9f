"""What a conversion costs layer by layer, measured: every layer on the original's inputs, against its outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mla_compile.latent_weights import LatentWeights
from mla_compile.passes.activations import SiteRun
from mla_compile.passes.converted import side_by_side, steps_beside
from mla_compile.passes.kept import kept_values
from mla_compile.passes.layerwise import Resources
from mla_compile.program import Program
from mla_compile.report import LayerError
from mla_compile.runtime.module import LatentModel
from mla_compile.site import AttentionSite

__all__ = ["error_steps", "layer_errors"]


def error_steps(
    program: Program,
    sites: Sequence[AttentionSite],
    batches: Sequence[Tensor],
    resources: Resources,
    *,
    gradients: bool,
) -> int:
    """How many steps :func:`layer_errors` takes."""
    beside = steps_beside(program, sites, batches, resources)
    if not gradients:
        return beside
    shape = (int(batches[0].shape[0]), int(batches[0].shape[1]))
    return beside + SiteRun(program, sites, shape, gradients=True, resources=resources).steps(len(batches))


def layer_errors(
    program: Program,
    sites: Sequence[AttentionSite],
    weights: Sequence[LatentWeights],
    model: LatentModel,
    windows: Tensor,
    *,
    gradients: bool = True,
    batch: int = 4,
    resources: Resources | None = None,
    progress: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
) -> tuple[LayerError, ...]:
    """Measure every converted layer by itself on text.

    Args:
        program: The original.
        sites: The converted layers.
        weights: Their latent weights.
        model: The converted model with these weights.
        windows: Token ids ``[windows, length]``.
        gradients: Run the original backward, for the errors' price in the loss.
        batch: Windows per pass.
        resources: What running each of the models may take.
        progress: Wraps the batches of all steps to show progress.
    """
    resources = resources or Resources()

    def forced(index: int, given: Mapping[str, Any], wanted: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Go on with what the original's layer made, and tell how far this one is from it."""
        got, present = torch.ops.mla.latent_attention.default(**given)
        bias = weights[index].output_bias  # it is added behind the operator
        inner = wanted if bias is None else wanted - bias.to(wanted)
        return (inner, present), got - inner

    batches = windows.split(batch)
    shape = (int(batches[0].shape[0]), int(batches[0].shape[1]))
    look = SiteRun(program, sites, shape, gradients=True, resources=resources) if gradients else None
    count = len(batches) if look is None else look.layerwise.at_a_time(len(batches))
    errors, squares, losses = (torch.zeros(len(sites), dtype=torch.float64) for _ in range(3))
    for start in range(0, len(batches), count):
        part = batches[start : start + count]
        with kept_values(resources.folder) as kept:
            for place, index, wanted, error in side_by_side(program, sites, model, forced, part, resources, progress):
                errors[index] += float(error.double().square().sum())
                squares[index] += float(wanted.double().square().sum())
                if look is not None:
                    kept.put(place, {str(index): error})
            for place, index, seen in [] if look is None else look.run(part, progress):
                assert seen.gradient is not None
                error = kept.get(place, [str(index)])[str(index)].to(seen.gradient.device)
                losses[index] += float((seen.gradient * error).sum((2, 3)).double().square().sum() / 2)
                kept.drop(place, [str(index)])
    return tuple(
        LayerError(math.sqrt(error / max(square, 1e-300)), loss / windows.numel() if gradients else None)
        for error, square, loss in zip(errors.tolist(), squares.tolist(), losses.tolist(), strict=True)
    )
