"""Values again, from what the converted model really attends to: least squares per query head.

Keys and values were factorised for the original's attention. The converted model's attention differs a little, and its
layers see what the earlier ones made of the text. Given the latents it averages, the up-projection that comes closest
to the original's attention outputs is a regression in closed form, for every query head of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from mla_compile.passes.activations import observe_outputs
from mla_compile.passes.factorise import LatentWeights
from mla_compile.program import Program
from mla_compile.runtime.module import LatentModel, positions_from_mask
from mla_compile.site import AttentionSite

__all__ = ["refit_values"]

_RIDGE = 1e-4
"""Pull towards the weights that are refitted, relative to a latent entry's own variance."""


class _Contexts(fx.Interpreter):
    """Runs a rewritten graph and keeps what every layer's attention averages: latents ``[B, S, H, r]``."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.contexts: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:  # noqa: ANN401 - the interpreter's own
        if n.target is not torch.ops.mla.latent_attention.default:
            return super().run_node(n)
        arguments, keywords = self.fetch_args_kwargs_from_env(n)
        names = [a.name for a in n.target._schema.arguments]
        given = dict(zip(names, arguments, strict=False)) | keywords
        value_up = given["value_up"]
        identity = torch.eye(value_up.shape[1], dtype=value_up.dtype)[None]
        context, present = n.target(**given | {"value_up": identity})
        past: Any = n.args[2]
        self.contexts[past.name] = context
        per_head = value_up.repeat_interleave(context.shape[2] // len(value_up), 0)
        return torch.einsum("bshr,hrv->bshv", context, per_head), present


def refit_values(
    program: Program,
    sites: Sequence[AttentionSite],
    weights: Sequence[LatentWeights],
    model: LatentModel,
    windows: Tensor,
    *,
    batch: int = 4,
    progress: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
) -> tuple[LatentWeights, ...]:
    """Regress the original's attention outputs on the latents that a converted model averages.

    Args:
        program: The original.
        sites: The converted layers.
        weights: Their latent weights.
        model: The converted model with these weights; its other layers' caches are told apart by their names.
        windows: Token ids ``[windows, length]``.
        batch: Windows per pass.
        progress: Wraps the batches to show progress.

    Returns:
        The weights with a value up-projection per query head.
    """
    outputs = observe_outputs(program, sites)
    converted = _Contexts(model.graph)  # type: ignore[arg-type]
    caches = _cache_names(model)
    grams = [torch.zeros(s.heads, w.value_up.shape[1], w.value_up.shape[1], dtype=torch.float64)
             for s, w in zip(sites, weights, strict=True)]  # fmt: skip
    crosses = [
        torch.zeros(s.heads, w.value_up.shape[1], s.v_dim, dtype=torch.float64)
        for s, w in zip(sites, weights, strict=True)
    ]
    with torch.inference_mode():
        for ids in progress(windows.split(batch)):
            mask = torch.ones_like(ids)
            converted.run(ids, mask, positions_from_mask(mask, ids.shape[1]), *model.empty_cache(len(ids)))
            for index, (wanted, name) in enumerate(zip(outputs(ids), caches, strict=True)):
                context, bias = converted.contexts[name].double(), weights[index].output_bias
                target = wanted.double() if bias is None else wanted.double() - bias
                grams[index] += torch.einsum("bshr,bsht->hrt", context, context)
                crosses[index] += torch.einsum("bshr,bshv->hrv", context, target)
            converted.contexts.clear()
    return tuple(_solve(w, g, c) for w, g, c in zip(weights, grams, crosses, strict=True))


def _cache_names(model: LatentModel) -> list[str]:
    """Cache inputs of the latent layers, in order."""
    graph = model.graph.graph
    assert isinstance(graph, fx.Graph)
    return [n.args[2].name for n in graph.nodes if n.target is torch.ops.mla.latent_attention.default]


def _solve(weights: LatentWeights, gram: Tensor, cross: Tensor) -> LatentWeights:
    before = weights.value_up.repeat_interleave(len(gram) // len(weights.value_up), 0)
    variance = gram.diagonal(dim1=1, dim2=2)
    pull = torch.diag_embed(_RIDGE * variance + 1e-9 * variance.mean(1, keepdim=True) + 1e-30)
    return replace(weights, value_up=torch.linalg.solve(gram + pull, cross + pull @ before))
