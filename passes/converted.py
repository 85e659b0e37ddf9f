"""The converted model on text: its logits, and its layers beside those of the original."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from mla_compile.passes.activations import output_run, site_heads
from mla_compile.passes.layerwise import Layerwise, Resources
from mla_compile.passes.retype import widened
from mla_compile.passes.segments import Mark
from mla_compile.program import Program
from mla_compile.runtime.module import LatentModel, positions_from_mask
from mla_compile.site import AttentionSite

__all__ = ["BesideHook", "converted_logits", "latent_arguments", "original_logits", "side_by_side", "steps_beside"]

_LATENT = torch.ops.mla.latent_attention.default
Progress = Callable[[Iterable[Tensor]], Iterable[Tensor]]
BesideHook = Callable[[int, Mapping[str, Any], Tensor], tuple[tuple[Tensor, Tensor], Tensor]]
"""From the number of a site, the arguments of its latent attention by name, and the original's attention outputs
``[B, S, H, Dv]`` there: outputs and cache to go on with, and what to tell."""


def latent_arguments(node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a latent attention node by name."""
    target: Any = node.target
    return dict(zip([a.name for a in target._schema.arguments], args, strict=False)) | dict(kwargs)


def original_logits(
    program: Program,
    sites: Sequence[AttentionSite],
    batches: Sequence[Tensor],
    resources: Resources,
    *,
    wide: bool = False,
) -> Iterator[Tensor]:
    """Logits of the unconverted model, batch by batch; it is run layer by layer if it is large.

    Args:
        program: The model.
        sites: Its attention sites, between which it may be cut.
        batches: Token ids ``[batch, length]``.
        resources: What the run may take.
        wide: Whether to compute in float32 what the model computes in fewer bits.
    """
    module = widened(program.flat_module()) if wide else program.flat_module()
    marks = [Mark(site.output) for site in sites]
    run = Layerwise(module, program.tokens, [program.logits], marks, _shape(batches), resources)
    return _results(run, batches, program.inputs, program.logits)


def converted_logits(model: LatentModel, batches: Sequence[Tensor], resources: Resources) -> Iterator[Tensor]:
    """Logits of a converted model, likewise.

    Args:
        model: The model.
        batches: Token ids ``[batch, length]``.
        resources: What the run may take.
    """
    graph = getattr(model, "graph", None)
    if not isinstance(graph, fx.GraphModule):  # it is run as its own forward says
        return _by_forward(model, batches)
    output: Any = next(n for n in graph.graph.nodes if n.op == "output").args[0]
    marks = [Mark(n.name) for n in _latent_nodes(graph)]
    run = Layerwise(graph, _tokens(graph), [output[0].name], marks, _shape(batches), resources)
    return _results(run, batches, _inputs(model), output[0].name)


def side_by_side(
    program: Program,
    sites: Sequence[AttentionSite],
    model: LatentModel,
    hook: BesideHook,
    batches: Sequence[Tensor],
    resources: Resources,
    progress: Progress = iter,
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Run the original and its conversion in float32, one segment of each after the other.

    Args:
        program: The original.
        sites: The converted layers.
        model: The converted model.
        hook: Computes every latent attention.
        batches: Token ids ``[batch, length]``.
        resources: What each run may take.
        progress: Wraps the batches of all steps to show progress.

    Yields:
        Number of the batch and of the site, the original's attention outputs ``[B, S, H, Dv]``, and what the hook told.
    """
    graph = widened(model.graph)
    nodes = _latent_nodes(graph)
    told: dict[int, tuple[Tensor, Tensor]] = {}
    wanted: dict[int, Tensor] = {}

    def call(number: int) -> Callable[..., Any]:
        def compute(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
            going_on, telling = hook(number, latent_arguments(node, args, kwargs), wanted[number])
            told[number] = wanted[number], telling
            return going_on

        return compute

    shape = _shape(batches)
    original = output_run(program, sites, shape, resources)
    cut = len(original.segments) > 1  # both or neither, so that they pass their layers in the same order
    converted = Layerwise(
        graph,
        _tokens(graph),
        [n.name for n in nodes],
        [Mark(n.name, (n.name,)) for n in nodes],
        shape,
        dataclasses.replace(resources, whole=-1 if cut else 2**63),
        calls={n.name: call(number) for number, n in enumerate(nodes)},
    )
    count = min(run.at_a_time(len(batches)) for run in (original, converted))
    for start in range(0, len(batches), count):
        part = batches[start : start + count]
        ours = converted.run(part, _inputs(model, torch.float32))
        for seen in original.run(part, program.inputs, progress):
            wanted.clear()
            for number, site in enumerate(sites):
                if site.output in seen.values:
                    wanted[number] = site_heads(site, seen.values[site.output], len(part[seen.batch]))
            next(ours)
            for number, found in told.items():
                yield start + seen.batch, number, *found
            told.clear()


def _by_forward(model: LatentModel, batches: Sequence[Tensor]) -> Iterator[Tensor]:
    for ids in batches:
        with torch.no_grad():
            logits = model(ids).logits
        yield logits


def steps_beside(
    program: Program, sites: Sequence[AttentionSite], batches: Sequence[Tensor], resources: Resources
) -> int:
    """How many steps :func:`side_by_side` takes."""
    return output_run(program, sites, _shape(batches), resources).steps(len(batches))


def _latent_nodes(graph: fx.GraphModule) -> list[Node]:
    return [n for n in graph.graph.nodes if n.target is _LATENT]


def _tokens(graph: fx.GraphModule) -> str:
    return next(str(n.name) for n in graph.graph.nodes if n.op == "placeholder")


def _shape(batches: Sequence[Tensor]) -> tuple[int, int]:
    return int(batches[0].shape[0]), int(batches[0].shape[1])


def _inputs(model: LatentModel, dtype: torch.dtype | None = None) -> Callable[[Tensor], Sequence[Tensor]]:
    """Makes inputs for whole sequences, with caches of another type than the model's if need be."""

    def inputs(ids: Tensor) -> Sequence[Tensor]:
        mask = torch.ones_like(ids)
        empty = (cache.to(dtype or cache.dtype) for cache in model.empty_cache(len(ids)))
        return (ids, mask, positions_from_mask(mask, ids.shape[1]), *empty)

    return inputs


def _results(
    run: Layerwise, batches: Sequence[Tensor], inputs: Callable[[Tensor], Sequence[Tensor]], name: str
) -> Iterator[Tensor]:
    return (seen.values[name] for seen in run.run(batches, inputs) if name in seen.values)
