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

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Node

from mla_compile.errors import RefusedError
from mla_compile.passes.evaluate import GraphEvaluator, example_inputs
from mla_compile.passes.factorise import LatentWeights
from mla_compile.passes.probe import longest_length
from mla_compile.passes.trace import DataFlow
from mla_compile.program import Program
from mla_compile.runtime import ops  # noqa: F401 - registers mla::latent_attention
from mla_compile.site import AttentionSite

__all__ = ["INPUT_NAMES", "insert_latent", "past_name"]

_aten = torch.ops.aten
INPUT_NAMES = ("input_ids", "attention_mask", "position_ids")
_LONG_COUNT = 8192
"""Length up to which a count is followed."""
_INCREMENTAL = 1e-4
"""Relative difference that is more than float32 rounding, which stays below 1e-5."""
_INCREMENTAL_HALF = 0.05
"""The same for float16 and bfloat16, whose single roundings are up to 4e-3."""
_VIEWS = (_aten.view.default, _aten._unsafe_view.default)


def past_name(layer: int) -> str:
    """Placeholder of one layer's cache."""
    return f"past_{layer}"


def insert_latent(
    program: Program, sites: Sequence[AttentionSite], weights: Sequence[LatentWeights], dtype: torch.dtype
) -> fx.GraphModule:
    """Replace every site by latent attention.

    Args:
        program: The original; it and its weights are left as they are (untouched weights are shared).
        sites: All attention layers of the program.
        weights: Latent weights of every site.
        dtype: Type the latent weights are stored in.

    Returns:
        A module ``(input_ids [B, S], attention_mask [B, P + S], position_ids [B, S], past_0 [B, P, R_0], ...) ->
        (logits [B, S, V], present_0 [B, P + S, R_0], ...)``, a plain, trainable ``torch.fx`` graph.

    Raises:
        RefusedError: Something outside the sites depends on length or position in a way that is not understood.
    """
    module = program.flat_module()
    graph = module.graph
    nodes = {n.name: n for n in graph.nodes}

    inputs = _make_inputs(graph, nodes, program, len(sites))
    rotations: dict[tuple[float, ...], tuple[Node, Node]] = {}
    presents = []
    for layer, (site, latent) in enumerate(zip(sites, weights, strict=True)):
        with graph.inserting_before(nodes[site.output]):
            presents.append(
                _insert_site(module, nodes, site, latent, inputs, inputs[past_name(layer)], rotations, dtype)
            )
    output = next(n for n in graph.nodes if n.op == "output")
    output.args = ((nodes[program.logits], *presents),)
    _erase_dead(graph)
    _repair_positions(program, graph, inputs["position_ids"])
    _erase_dead(graph)
    _check_no_leftovers(program, graph, sites, inputs)
    _renumber_placeholders(graph, nodes, program, inputs)
    for node in graph.nodes:
        if node.target in _VIEWS:  # recorded strides were those of the old attention's output
            node.target = _aten.reshape.default
    graph.lint()
    # A module with only what the new graph reads: the replaced projections must not linger among its parameters.
    used = {str(n.target): _attribute(module, str(n.target)) for n in graph.nodes if n.op == "get_attr"}
    rewritten = fx.GraphModule(used, graph, class_name="LatentGraph")
    _check_incremental(rewritten, program, [latent.row.shape[0] for latent in weights], dtype)
    return rewritten


def _check_incremental(module: fx.GraphModule, program: Program, rows: Sequence[int], dtype: torch.dtype) -> None:
    """Refuse a graph in which something outside attention still looks at the length or at other tokens.

    Whatever was overlooked (a convolution, a running sum, positions counted in floats) shows as a difference between a
    sequence at once and the same sequence in pieces.
    """
    ids = example_inputs(program, 2, 12, seed=1)[program.tokens]
    try:
        whole = _run_in_pieces(module, ids, [12], rows, dtype)
        pieces = _run_in_pieces(module, ids, [5, 1, 4, 1, 1], rows, dtype)
        difference = float((whole - pieces).abs().max() / whole.abs().max().clamp(min=1e-30))
    except (RuntimeError, IndexError) as error:
        reason = str(error).strip().splitlines()[0][:120]
        raise RefusedError(
            f"'{program.source}' cannot be run in pieces after the rewrite ({reason}).",
            "Something outside attention depends on the length of the sequence; compute it from positions instead.",
        ) from error
    if not difference < (_INCREMENTAL if dtype in (torch.float32, torch.float64) else _INCREMENTAL_HALF):
        raise RefusedError(
            f"Something outside attention in '{program.source}' depends on the length or on other tokens: in pieces, "
            f"the rewritten model differs by {difference:.1e}.",
            "Compute it from positions, or convert a model whose only memory is attention.",
        )


def _run_in_pieces(
    module: fx.GraphModule, ids: Tensor, sizes: Sequence[int], rows: Sequence[int], dtype: torch.dtype
) -> Tensor:
    cache = [torch.zeros(len(ids), 0, row, dtype=dtype) for row in rows]
    parts, done = [], 0
    with torch.no_grad():
        for size in sizes:
            mask = torch.ones(len(ids), done + size, dtype=torch.long)
            positions = torch.arange(done, done + size).expand(len(ids), size)
            logits, *cache = module(ids[:, done : done + size], mask, positions, *cache)
            parts.append(logits)
            done += size
    return torch.cat(parts, 1)


def _attribute(module: nn.Module, path: str) -> Any:  # noqa: ANN401 - parameters, buffers and constants
    return functools.reduce(getattr, path.split("."), module)


def _make_inputs(graph: fx.Graph, nodes: Mapping[str, Node], program: Program, layers: int) -> dict[str, Node]:
    """Add the new inputs behind the token placeholder, in calling order."""
    inputs = {"input_ids": nodes[program.tokens]}
    last = _last_placeholder(graph)
    for name in (*INPUT_NAMES[1:], *(past_name(i) for i in range(layers))):
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


def _insert_site(
    module: fx.GraphModule,
    nodes: Mapping[str, Node],
    site: AttentionSite,
    latent: LatentWeights,
    inputs: Mapping[str, Node],
    past: Node,
    rotations: dict[tuple[float, ...], tuple[Node, Node]],
    dtype: torch.dtype,
) -> Node:
    """Emit one latent-attention layer, redirect the users of the old output to it, and return its new cache."""
    graph = module.graph
    path = _add_weights(module, site, latent, dtype)

    def weight(name: str) -> Node | None:
        return graph.get_attr(f"{path}.{name}") if getattr(latent, name) is not None else None

    tokens = inputs["input_ids"]
    batch, length = (graph.call_function(_aten.sym_size.int, (tokens, d)) for d in (0, 1))
    source = nodes[site.query.source]
    heads, head_dim, _ = latent.query.shape
    flat_query = graph.call_function(_aten.linear.default, (source, weight("query"), weight("query_bias")))
    query = graph.call_function(_aten.reshape.default, (flat_query, [batch, length, heads, head_dim]))
    row = graph.call_function(_aten.linear.default, (source, weight("row"), weight("row_bias")))
    row = graph.call_function(_aten.reshape.default, (row, [batch, length, latent.row.shape[0]]))
    cos, sin = _rotation(module, latent.inv_freq, inputs["position_ids"], path, rotations)
    window = site.mask.window or 0
    result = graph.call_function(
        torch.ops.mla.latent_attention.default,
        (
            query,
            row,
            past,
            inputs["attention_mask"],
            cos,
            sin,
            weight("key_up"),
            weight("value_up"),
            float(site.scale),
            window,
        ),
    )
    attended = graph.call_function(operator.getitem, (result, 0))
    if latent.output_bias is not None:
        attended = graph.call_function(_aten.add.Tensor, (attended, weight("output_bias")))
    attended = graph.call_function(_aten.transpose.int, (attended, 1, 2))
    for node in (query, row, result, attended):
        node.meta["mla_compile"] = {"pass": "insert-latent", "site": site.path}
    nodes[site.output].replace_all_uses_with(attended)
    return graph.call_function(operator.getitem, (result, 1))


def _add_weights(module: fx.GraphModule, site: AttentionSite, latent: LatentWeights, dtype: torch.dtype) -> str:
    """Register the latent weights as parameters of a sub-module beside the layer's own, and return its path."""
    holder = nn.Module()
    heads, head_dim, _ = latent.query.shape
    for name in ("query", "query_bias", "row", "row_bias", "key_up", "value_up", "output_bias"):
        value = getattr(latent, name)
        if value is not None:
            value = value.reshape(heads * head_dim, -1).squeeze(-1) if name.startswith("query") else value
            holder.register_parameter(name, nn.Parameter(value.to(dtype).contiguous()))
    path = f"{site.path.removeprefix('L__self___')}.latent_{site.index}"
    module.add_submodule(path, holder)
    return path


def _rotation(
    module: fx.GraphModule,
    inv_freq: Tensor,
    position_ids: Node,
    path: str,
    rotations: dict[tuple[float, ...], tuple[Node, Node]],
) -> tuple[Node, Node]:
    """Cosines and sines ``[B, S, groups, rope_dim / 2]`` at the new tokens' positions, shared by equal layers.

    Angles are float32, as in every RoPE implementation: half precision cannot hold a position.
    """
    key = (inv_freq.shape[0], *inv_freq.flatten().tolist())
    if key not in rotations:
        graph = module.graph
        module.get_submodule(path).register_buffer("inv_freq", inv_freq.float())
        with graph.inserting_after(_last_placeholder(graph)):
            frequency = graph.get_attr(f"{path}.inv_freq")
        with graph.inserting_after(frequency):
            position = graph.call_function(_aten._to_copy.default, (position_ids,), {"dtype": torch.float32})
        with graph.inserting_after(position):
            column = graph.call_function(_aten.unsqueeze.default, (position, -1))
        with graph.inserting_after(column):
            column = graph.call_function(_aten.unsqueeze.default, (column, -1))
        with graph.inserting_after(column):
            angle = graph.call_function(_aten.mul.Tensor, (column, frequency))
        with graph.inserting_after(angle):
            cos = graph.call_function(_aten.cos.default, (angle,))
        with graph.inserting_after(angle):
            sin = graph.call_function(_aten.sin.default, (angle,))
        rotations[key] = (cos, sin)
    return rotations[key]


def _last_placeholder(graph: fx.Graph) -> Node:
    placeholders: list[Node] = [n for n in graph.nodes if n.op == "placeholder"]
    return placeholders[-1]


def _erase_dead(graph: fx.Graph) -> None:
    """Remove everything without users; assertions and dropout-capable operators count as impure and need a push."""
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users and "mla." not in str(node.target):
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _repair_positions(program: Program, graph: fx.Graph, position_ids: Node) -> None:
    """Derive from the positions whatever still counts from zero.

    1. An integer tensor equal to ``c + arange(length)`` becomes ``position_ids + c``.
    2. A static table sliced to the length becomes the table indexed by the positions.
    """
    evaluator, flow = GraphEvaluator(program), DataFlow(program)
    alive = {n.name: n for n in graph.nodes}
    counters = _counters(program, evaluator, flow, alive)
    for name, first in counters.items():
        node = alive[name]
        for user in node.users:
            if user.name not in counters:
                _require_broadcasting(program, evaluator, name, user.name)
        with graph.inserting_after(node):
            shifted = graph.call_function(_aten.add.Scalar, (position_ids, first)) if first else position_ids
        # Members of the same chain are replaced in their own turn.
        node.replace_all_uses_with(
            shifted, delete_user_cb=lambda user, new=shifted: user is not new and user.name not in counters
        )
    for node in list(graph.nodes):
        source = evaluator.nodes.get(node.name)
        if node.target is not _aten.slice.Tensor or source is None or source.args[0] not in flow.static:
            continue
        arguments: list[Any] = [*source.args, None, None][:3]
        dim, start = arguments[1] or 0, arguments[2]
        table = arguments[0].meta["val"]
        if isinstance(source.meta["val"].shape[dim], int) or start not in (0, None):
            continue
        if dim not in (0, 1) or (dim == 1 and table.shape[0] != 1):
            raise RefusedError(
                f"The position table sliced at '{node.name}' has shape {tuple(table.shape)}, which is not understood.",
                "Index the table by positions in the model instead.",
            )
        with graph.inserting_before(node):
            flat = node.args[0] if dim == 0 else graph.call_function(_aten.select.int, (node.args[0], 0, 0))
            looked_up = graph.call_function(_aten.index.Tensor, (flat, [position_ids]))
        node.replace_all_uses_with(looked_up)


def _require_broadcasting(program: Program, evaluator: GraphEvaluator, counter: str, user: str) -> None:
    """Check that a reader of a count gives the same for every sequence when the count gains a batch axis.

    Raises:
        RefusedError: It reads the count's axes (a reversal, a selection), not only its values.
    """
    batch, length = 2, 7
    inputs = example_inputs(program, batch, length)
    node, reader = evaluator.nodes[counter], evaluator.nodes[user]
    counted, expected = evaluator.run([node, reader], {}, inputs)
    try:
        (got,) = evaluator.run([reader], {node: counted.expand(batch, length)}, inputs)
        same = torch.equal(got, expected.expand_as(got))
    except (RuntimeError, IndexError):
        same = False
    if not same:
        raise RefusedError(
            f"Positions are counted at '{counter}' and used at '{user}' in a way that is not understood.",
            "Index a table of positions, or add positions to a batch of them, in the model instead.",
        )


def _counters(program: Program, evaluator: GraphEvaluator, flow: DataFlow, alive: Mapping[str, Node]) -> dict[str, int]:
    """Live integer nodes that evaluate to ``c + arange(length)``, and their ``c``."""
    found: dict[str, int] = {}
    for node in evaluator.graph.nodes:
        value = node.meta.get("val")
        if (
            node.op != "call_function"
            or node.name not in alive
            or node in flow.hidden
            or not isinstance(value, Tensor)
            or value.is_floating_point()
            or value.is_complex()
            or value.dtype == torch.bool
            or not 1 <= value.dim() <= 2
            or isinstance(value.shape[-1], int)
        ):
            continue

        def start(length: int, node: Node = node) -> int | None:
            return _start(evaluator.run([node], {}, example_inputs(program, 2, length))[0], length)

        # The long one tells a count from one that stops or starts anew (a clamp, a remainder).
        starts = {start(length) for length in (7, 12, longest_length(evaluator, start, _LONG_COUNT))}
        if len(starts) == 1 and (first := starts.pop()) is not None:
            found[node.name] = first
    return found


def _start(values: Tensor, length: int) -> int | None:
    """The ``c`` for which values are ``c + arange(length)``, if there is one."""
    if values.shape[-1] != length:
        return None
    first = (values - torch.arange(length)).unique()
    return int(first[0]) if len(first) == 1 else None


def _check_no_leftovers(
    program: Program, graph: fx.Graph, sites: Sequence[AttentionSite], inputs: Mapping[str, Node]
) -> None:
    """Refuse when something outside the sites still needs scores, the mask input or a count from zero."""
    alive = {n.name: n for n in graph.nodes}
    for site in sites:
        if site.softmax in alive:
            raise RefusedError(
                f"The attention scores of {site.path} are used besides the weighted sum of values.",
                "Export the model without attention weights among its outputs.",
            )
    if program.attention_mask and alive[program.attention_mask].users:
        user = next(iter(alive[program.attention_mask].users))
        raise RefusedError(
            f"The padding mask is used outside attention, at '{user.name}'.",
            "Export the model without attention_mask, or report this architecture.",
        )


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
