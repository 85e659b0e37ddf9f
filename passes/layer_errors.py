"""What a conversion costs layer by layer, measured: every layer on the original's inputs, against its outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from mla_compile.passes.activations import observe_outputs, observe_sites
from mla_compile.passes.factorise import LatentWeights
from mla_compile.passes.retype import widened
from mla_compile.program import Program
from mla_compile.report import LayerError
from mla_compile.runtime.module import LatentModel, positions_from_mask
from mla_compile.site import AttentionSite

__all__ = ["layer_errors"]


class _Forced(fx.Interpreter):
    """Runs a rewritten graph on the original's attention outputs, and keeps the errors of what its layers make."""

    def __init__(self, model: LatentModel, biases: Sequence[Tensor | None]) -> None:
        super().__init__(widened(model.graph))  # type: ignore[arg-type]
        self._biases = biases
        self._wanted: Iterator[tuple[Tensor, Tensor | None]] = iter(())
        self.errors: list[Tensor] = []

    def compare(self, wanted: Sequence[Tensor], *inputs: Tensor) -> list[Tensor]:
        """Errors ``[B, S, H, Dv]`` of every latent layer; ``wanted`` are the original's outputs of these layers."""
        self._wanted = iter(zip(wanted, self._biases, strict=True))
        self.errors = []
        self.run(*inputs)
        return self.errors

    def run_node(self, n: fx.Node) -> Any:  # noqa: ANN401 - the interpreter's own
        value = super().run_node(n)
        if n.target is not torch.ops.mla.latent_attention.default:
            return value
        got, present = value
        wanted, bias = next(self._wanted)
        inner = wanted if bias is None else wanted - bias.to(wanted.dtype)  # the bias is added behind the operator
        self.errors.append(got - inner)
        return inner, present


def layer_errors(
    program: Program,
    sites: Sequence[AttentionSite],
    weights: Sequence[LatentWeights],
    model: LatentModel,
    windows: Tensor,
    *,
    gradients: bool = True,
    batch: int = 4,
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
        progress: Wraps the batches to show progress.
    """
    outputs = observe_outputs(program, sites)
    look = observe_sites(program, sites, gradients=True) if gradients else None
    converted = _Forced(model, [w.output_bias for w in weights])
    errors, squares, losses = (torch.zeros(len(sites), dtype=torch.float64) for _ in range(3))
    for ids in progress(windows.split(batch)):
        slopes = [None] * len(sites) if look is None else [seen.gradient for seen in look(ids)]
        with torch.inference_mode():
            wanted, mask = outputs(ids), torch.ones_like(ids)
            positions = positions_from_mask(mask, ids.shape[1])
            cache = (torch.zeros(len(ids), 0, row) for row in model.rows)
            found = converted.compare(wanted, ids, mask, positions, *cache)
            for index, (error, output, slope) in enumerate(zip(found, wanted, slopes, strict=True)):
                errors[index] += error.double().square().sum()
                squares[index] += output.double().square().sum()
                if slope is not None:
                    losses[index] += (slope * error).sum((2, 3)).double().square().sum() / 2
    return tuple(
        LayerError(math.sqrt(error / max(square, 1e-300)), loss / windows.numel() if gradients else None)
        for error, square, loss in zip(errors.tolist(), squares.tolist(), losses.tolist(), strict=True)
    )
