"""Rewrite the layers of an encoder: low-rank keys and values, the model's own inputs and outputs, and no cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from mla_compile.passes.emit_open import OpenEmitter
from mla_compile.passes.factorise import LatentWeights
from mla_compile.passes.insert_latent import check_scores_are_dead, erase_dead, finished
from mla_compile.passes.layout import Sizes
from mla_compile.passes.scores import anchor_sizes
from mla_compile.passes.trace import Anchor, DataFlow, find_anchors
from mla_compile.program import AnyProgram
from mla_compile.site import AttentionSite

__all__ = ["insert_low_rank", "layer_sizes"]


def layer_sizes(program: AnyProgram) -> dict[int, Sizes]:
    """Sizes of every attention layer, by its index."""
    anchors = enumerate(find_anchors(DataFlow(program), program))
    return {index: anchor_sizes(program, found) for index, found in anchors if isinstance(found, Anchor)}


def insert_low_rank(
    program: AnyProgram, sites: Sequence[AttentionSite], weights: Sequence[LatentWeights], dtype: torch.dtype
) -> fx.GraphModule:
    """Replace bidirectional layers by latent attention over their own tokens.

    Args:
        program: The original; it and its weights are left as they are (untouched weights are shared).
        sites: The layers to convert; all others stay as they are.
        weights: Latent weights of every site.
        dtype: Type the latent weights are stored in.

    Returns:
        The rewritten graph, with the inputs and outputs of :meth:`~mla_compile.program.AnyProgram.whole_module`.

    Raises:
        RefusedError: The scores of a layer are used by something else, or its length is no size of an input.
    """
    module = program.whole_module()
    graph = module.graph
    nodes = {n.name: n for n in graph.nodes}
    inputs = {name: nodes[name] for name in program.user_inputs}
    sizes = layer_sizes(program)
    for site, latent in zip(sites, weights, strict=True):
        OpenEmitter(program, module, nodes, inputs, dtype, sizes=sizes[site.index]).open(site, latent)
    erase_dead(graph)
    check_scores_are_dead(graph, [(site.path, site.softmax) for site in sites])
    return finished(module)
