"""Rewrite the graph: every attention site becomes ``mla::latent_attention`` with an explicit latent cache.

The result is one graph that does prefill, chunked prefill and decoding: positions come from an input, the mask from the
padding mask and the cache length, and whatever else in the original depended on the sequence starting at position 0
(aranges, sliced position tables) is re-derived from the positions.

Before::

    linear -> view -> transpose -> rope -> scaled_dot_product_attention -> transpose -> view -> linear

After::

    linear -> view -> mla::latent_attention(query, row, past, mask, cos, sin, ...) -> transpose -> ...
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx
from torch.fx import Node

from mla_compile.errors import RefusedError
from mla_compile.latent_weights import LatentWeights
from mla_compile.passes.emit import Emitter, last_placeholder
from mla_compile.passes.emit_open import OpenEmitter
from mla_compile.passes.incremental import check_incremental
from mla_compile.passes.moved import VIEWS
from mla_compile.passes.positions import repair_positions
from mla_compile.passes.retype import attribute, widened
from mla_compile.passes.scores import layer_sizes
from mla_compile.program import DecoderProgram, Program
from mla_compile.site import AttentionSite, Rejection

__all__ = [
    "ENCODER_MASK",
    "INPUT_NAMES",
    "LatentGraph",
    "check_scores_are_dead",
    "cross_name",
    "erase_dead",
    "finished",
    "insert_latent",
    "past_name",
]

_aten = torch.ops.aten
ENCODER_MASK = "encoder_attention_mask"
INPUT_NAMES = ("input_ids", "attention_mask", "position_ids")


@dataclass(frozen=True)
class LatentGraph:
    """A rewritten graph.

    Attributes:
        module: ``(input_ids [B, S], attention_mask [B, P + S], position_ids [B, S], past_0 [B, P, R_0], ...) ->
            (logits [B, S, V], present_0 [B, P + S, R_0], ...)``, a plain, trainable ``torch.fx`` graph.
        rows: Cache row length ``R`` per attention layer, in graph order.
        cross: Row length per cross attention layer; their rows ``[B, N, R]`` are further inputs, and behind them the
            padding mask ``[B, N]`` if the decoder reads one.
    """

    module: fx.GraphModule
    rows: tuple[int, ...]
    cross: tuple[int, ...] = ()


def past_name(layer: int) -> str:
    """Placeholder of one layer's cache."""
    return f"past_{layer}"


def cross_name(layer: int) -> str:
    """Placeholder of what one cross attention layer keeps of the encoder."""
    return f"cross_{layer}"


def insert_latent(
    program: Program,
    sites: Sequence[AttentionSite],
    weights: Sequence[LatentWeights],
    dtype: torch.dtype,
    kept: Sequence[Rejection] = (),
    cross: Sequence[tuple[AttentionSite, LatentWeights]] = (),
    *,
    stored: bool = False,
    check: bool = True,
) -> LatentGraph:
    """Replace every site by latent attention, and every layer that is kept by attention with an ordinary cache.

    Args:
        program: The original; it and its weights are left as they are (untouched weights are shared).
        sites: The layers to convert.
        weights: Latent weights of every site.
        dtype: Type of the latent weights and of caches: the original's own, or float32, in which all of the result
            then computes.
        kept: The other attention layers; each has a ``plain`` description.
        cross: Cross attention layers of a decoder, with their latent weights.
        stored: Store all weights as float32, if that is the type, instead of sharing the original's narrower ones.
        check: Run the result in pieces, over all of its weights: what is outside the layers is as it was with others.

    Returns:
        The rewritten graph.

    Raises:
        RefusedError: Something outside the layers depends on length or position in a way that is not understood.
    """
    module = program.flat_module()
    graph = module.graph
    nodes = {n.name: n for n in graph.nodes}
    converted = dict(zip((s.index for s in sites), zip(sites, weights, strict=True), strict=True))
    plain = {r.index: (r, r.plain) for r in kept if r.plain is not None}
    order = sorted([*converted, *plain])

    encoder_mask = program.encoder_mask if isinstance(program, DecoderProgram) else None
    further = [*(cross_name(i) for i in range(len(cross))), *([ENCODER_MASK] if encoder_mask else [])]
    inputs = _make_inputs(graph, nodes, program, len(order), further)
    emitter = Emitter(program, module, nodes, inputs, dtype)
    presents, rows, softmaxes = [], [], []
    for cache, index in enumerate(order):
        past = inputs[past_name(cache)]
        if index in converted:
            site, latent = converted[index]
            presents.append(emitter.latent(site, latent, past))
            rows.append(latent.row_width(site))
            softmaxes.append((site.path, site.softmax))
        else:
            rejection, other = plain[index]
            presents.append(emitter.plain(other, index, rejection.path, past))
            rows.append(other.elements_per_token)
            softmaxes.append((rejection.path, other.softmax))
    widths = []
    all_sizes = layer_sizes(program) if cross else {}
    for place, (site, latent) in enumerate(cross):
        given = {program.tokens: inputs["input_ids"]}
        given |= {encoder_mask: inputs[ENCODER_MASK]} if encoder_mask else {}
        sizes = all_sizes[site.index]
        OpenEmitter(program, module, nodes, given, dtype, sizes=sizes, reads=site.query.source).over(
            site, latent, inputs[cross_name(place)]
        )
        widths.append(latent.row_width(site))
        softmaxes.append((site.path, site.softmax))
    output = next(n for n in graph.nodes if n.op == "output")
    output.args = ((nodes[program.logits], *presents),)
    erase_dead(graph)
    check_scores_are_dead(graph, softmaxes)
    repair_positions(program, graph, inputs["position_ids"], inputs["attention_mask"])
    erase_dead(graph)
    _cut_padding_mask(program, graph, inputs["attention_mask"], inputs["input_ids"])
    _renumber_placeholders(graph, nodes, program, inputs)
    rewritten = finished(module)
    wide = widened(rewritten)  # without roundings, what is no rounding shows
    if check:
        check_incremental(wide, program, rows, widths)
    if dtype == torch.float32:
        rewritten = widened(rewritten, stored=True) if stored else wide
    return LatentGraph(rewritten, tuple(rows), tuple(widths))


def finished(module: fx.GraphModule) -> fx.GraphModule:
    """A rewritten graph with only what it reads: replaced projections must not linger among its parameters."""
    graph = module.graph
    for node in graph.nodes:
        node.target = VIEWS.get(node.target, node.target)  # recorded strides were those of the old attention's output
    graph.lint()
    graph._tracer_cls = None  # torch's exporter leaves one that no copy can be unpickled with
    used = {str(n.target): attribute(module, str(n.target)) for n in graph.nodes if n.op == "get_attr"}
    return fx.GraphModule(used, graph, class_name="LatentGraph")


def _make_inputs(
    graph: fx.Graph, nodes: Mapping[str, Node], program: Program, layers: int, further: Sequence[str]
) -> dict[str, Node]:
    """Add the new inputs behind the token placeholder, in calling order."""
    inputs = {"input_ids": nodes[program.tokens]}
    last = last_placeholder(graph)
    for name in (*INPUT_NAMES[1:], *(past_name(i) for i in range(layers)), *further):
        with graph.inserting_after(last):
            last = graph.create_node("placeholder", f"mla_{name}", name=f"mla_{name}")
        inputs[name] = last
    for name in filter(None, (program.attention_mask, program.position_ids)):
        for user in list(nodes[name].users):
            if user.target is _aten.sym_size.int:  # all inputs of the original are [batch, length]
                user.update_arg(0, inputs["input_ids"])
    if program.position_ids:
        nodes[program.position_ids].replace_all_uses_with(inputs["position_ids"])
    return inputs


def erase_dead(graph: fx.Graph) -> None:
    """Remove everything without users; assertions and dropout-capable operators count as impure and need a push."""
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users and "mla." not in str(node.target):
            graph.erase_node(node)
    graph.eliminate_dead_code()


def check_scores_are_dead(graph: fx.Graph, softmaxes: Sequence[tuple[str, str]]) -> None:
    """Refuse when something outside the layers still needs their scores.

    Raises:
        RefusedError: Something does; the layer is named.
    """
    alive = {n.name: n for n in graph.nodes}
    for path, softmax in softmaxes:
        if softmax in alive:
            raise RefusedError(
                f"The attention scores of {path} are used besides the weighted sum of values.",
                "Export the model without attention weights among its outputs.",
            )


def _cut_padding_mask(program: Program, graph: fx.Graph, attention_mask: Node, tokens: Node) -> None:
    """Give what reads the padding mask outside attention the mask of the new tokens.

    Whatever needs the mask of earlier tokens too (a state, a count) differs in pieces, which is checked in the end.
    """
    old = next((n for n in graph.nodes if n.name == program.attention_mask), None)
    if old is None or not old.users:
        return
    with graph.inserting_before(min(old.users)):
        new = graph.call_function(_aten.sym_size.int, (tokens, 1))
        total = graph.call_function(_aten.sym_size.int, (attention_mask, 1))
        start = graph.call_function(operator.sub, (total, new))
        own = graph.call_function(_aten.slice.Tensor, (attention_mask, 1, start, total))
    old.replace_all_uses_with(own)


def _renumber_placeholders(
    graph: fx.Graph, nodes: Mapping[str, Node], program: Program, inputs: Mapping[str, Node]
) -> None:
    """Drop the original inputs that are dead now, and give the new ones their final names."""
    for node in [n for n in graph.nodes if n.op == "placeholder"]:
        if node not in inputs.values():
            if node.users:
                raise RefusedError(
                    f"Input '{node.name}' is still used after the rewrite.", "Export a model that takes token ids only."
                )
            graph.erase_node(node)
    for name, node in inputs.items():
        node.name = node.target = name
