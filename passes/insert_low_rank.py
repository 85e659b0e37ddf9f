"""Rewrite encoders: low-rank keys and values, or what a decoder's cross attention keeps of their states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx
from torch.fx import Node

from mla_compile.errors import RefusedError
from mla_compile.latent_weights import LatentWeights
from mla_compile.passes.emit import last_placeholder
from mla_compile.passes.emit_open import OpenEmitter
from mla_compile.passes.insert_latent import check_scores_are_dead, erase_dead, finished
from mla_compile.passes.scores import layer_sizes
from mla_compile.program import AnyProgram
from mla_compile.site import AttentionSite

__all__ = ["insert_low_rank", "insert_rows", "read_sizes_from"]

_aten = torch.ops.aten


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
        RefusedError: The scores of a layer are used by something else, or its length is no size of what it reads.
    """
    module = program.whole_module()
    graph = module.graph
    nodes = {n.name: n for n in graph.nodes}
    inputs = {name: nodes[name] for name in program.user_inputs}
    sizes = layer_sizes(program)
    for site, latent in zip(sites, weights, strict=True):
        emitter = OpenEmitter(program, module, nodes, inputs, dtype, sizes=sizes[site.index], reads=site.query.source)
        emitter.open(site, latent)
    erase_dead(graph)
    check_scores_are_dead(graph, [(site.path, site.softmax) for site in sites])
    return finished(module)


def insert_rows(
    program: AnyProgram,
    inputs: Sequence[str],
    sites: Sequence[AttentionSite],
    weights: Sequence[LatentWeights],
    dtype: torch.dtype,
) -> fx.GraphModule:
    """Make the encoder of an encoder-decoder end in the rows that the decoder's cross attention layers read.

    Args:
        program: The whole model.
        inputs: Its encoder's inputs.
        sites: The cross attention layers.
        weights: Their latent weights.
        dtype: Type the latent weights are stored in.

    Returns:
        A graph of the encoder's inputs to one tensor ``[batch, tokens, row]`` per layer.

    Raises:
        RefusedError: The rows depend on an input of the decoder.
    """
    module = program.whole_module()
    graph = module.graph
    nodes = {n.name: n for n in graph.nodes}
    sizes = layer_sizes(program)
    given = {name: nodes[name] for name in inputs}
    emitters = [
        OpenEmitter(program, module, nodes, given, dtype, sizes=sizes[s.index], reads=s.key.origin) for s in sites
    ]
    rows = tuple(e.rows(site, latent) for e, site, latent in zip(emitters, sites, weights, strict=True))
    nodes["output"].args = (rows,)
    originals = {n.name: n for n in program.exported.graph.nodes}
    read_sizes_from({node: program.user_inputs[name][1] for name, node in given.items()}, graph, originals)
    erase_dead(graph)
    for node in [n for n in graph.nodes if n.op == "placeholder" and n.name not in inputs]:
        if node.users:
            raise RefusedError(
                f"The encoder's states depend on '{node.name}', which is an input of the decoder.",
                "Export a model whose encoder does not read the decoder's tokens.",
            )
        graph.erase_node(node)
    return finished(module)


def read_sizes_from(kept: Mapping[Node, Tensor], graph: fx.Graph, originals: Mapping[str, Node]) -> None:
    """Read every size, and what is computed of sizes (a subsampled length), from an input that stays and has it."""
    last = last_placeholder(graph)
    for node in [n for n in graph.nodes if n.op == "call_function"]:
        size = originals[node.name].meta.get("val") if node.name in originals else None
        if not isinstance(size, torch.SymInt) or (node.target is _aten.sym_size.int and node.args[0] in kept):
            continue
        for source, value in kept.items():
            axis = next((i for i, d in enumerate(value.shape) if str(d) == str(size)), None)
            if axis is not None:
                with graph.inserting_after(last):
                    node.replace_all_uses_with(graph.call_function(_aten.sym_size.int, (source, axis)))
                break
