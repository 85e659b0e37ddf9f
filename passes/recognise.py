"""Recognise every attention layer of a program: trace, probe, and believe nothing that was not verified."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor
from torch.fx import Node

from mla_compile.errors import first_line
from mla_compile.passes.evaluate import GraphEvaluator, example_inputs
from mla_compile.passes.factored import from_one_activation, read_from_one
from mla_compile.passes.grouping import chosen_heads, distinct_heads, scaled_heads, side_by_side, value_heads
from mla_compile.passes.kinds import kind_of
from mla_compile.passes.late import require_same_far
from mla_compile.passes.layout import Layout, Sizes
from mla_compile.passes.mismatch import MismatchError
from mla_compile.passes.norm import nodes_between
from mla_compile.passes.offset_rotation import common_rope, turn_by_phases
from mla_compile.passes.operands import (
    MOVES,
    ReadOperand,
    normalised,
    read_operand,
    read_query,
    with_gains,
)
from mla_compile.passes.padding import check_own_mask, padding_input
from mla_compile.passes.probe import Operand, longest_length
from mla_compile.passes.scorer import AnchorLayouts, Scorer
from mla_compile.passes.scores import (
    anchor_layouts,
    anchor_sizes,
    probe_probabilities,
    probe_scores,
)
from mla_compile.passes.trace import Anchor, DataFlow, find_anchors, module_path
from mla_compile.passes.turned import looks_ahead, turn_back
from mla_compile.program import AnyProgram
from mla_compile.runtime import reference
from mla_compile.site import AttentionSite, Kind, PlainSite, RejectCode, Rejection, Rope, Scores

__all__ = ["VERIFY_TOLERANCE", "Recognition", "plain_layers", "recognise"]

VERIFY_TOLERANCE = 1e-6
"""Relative error a description may have against its sub-graph. Both sides are float64; float32 rotation tables inside
the model are the only rounding left, and were observed below 3e-7."""
_log = logging.getLogger(__name__)
_Described = TypeVar("_Described")
_VERIFY_LENGTH = 160
"""Longer of the two lengths a description is verified at."""


@dataclass(frozen=True)
class Recognition:
    """What was found in a program, in graph order."""

    sites: tuple[AttentionSite, ...]
    rejections: tuple[Rejection, ...]


@dataclass(frozen=True)
class _Context:
    """One anchor and everything needed to ask questions about it."""

    index: int
    path: str
    anchor: Anchor
    layouts: AnchorLayouts
    flow: DataFlow
    evaluator: GraphEvaluator
    sizes: Sizes

    def sizes_of(self, role: str) -> Sizes:
        """The sizes as an operand sees them: keys and values know nothing of queries."""
        return self.sizes if role == "query" else self.sizes.of_keys()


def recognise(program: AnyProgram) -> Recognition:
    """Find every attention layer and describe it, or say why it cannot be described.

    Args:
        program: The exported model; it is not changed.

    Returns:
        Sites whose description reproduced the sub-graph on random data, and rejections with codes and reasons. A layer
        that is understood but is no causal self-attention is among the rejections, with its description.
    """
    sites: list[AttentionSite] = []
    rejections: list[Rejection] = []
    kinds: dict[str, AttentionSite] = {}
    for context in _contexts(program):
        if isinstance(context, Rejection):
            rejections.append(context)
            continue
        try:
            site = _of_kind(context, kinds, _describe)
            if site.kind == Kind.CAUSAL:
                sites.append(site)
            else:
                rejections.append(_other_kind(site))
        except MismatchError as mismatch:
            rejections.append(Rejection(context.index, context.path, mismatch.code, mismatch.reason, _plain(context)))
    for site in sites:
        _log.info("%s is converted: %d query and %d key/value heads.", site.path, site.heads, site.kv_heads)
    for rejection in rejections:
        fate = "not converted" if rejection.plain is None else "kept with an ordinary cache"
        _log.info("%s is %s: %s [%s].", rejection.path, fate, rejection.reason, rejection.code.value)
    return Recognition(tuple(sites), tuple(rejections))


def plain_layers(program: AnyProgram) -> tuple[Rejection, ...]:
    """Describe every attention layer as ordinary attention with an ordinary cache: what a model is without conversion.

    Args:
        program: The exported model; it is not changed.

    Returns:
        One rejection per layer, in graph order; one that is not understood has no ``plain`` description.
    """
    layers: list[Rejection] = []
    kinds: dict[str, PlainSite] = {}
    for context in _contexts(program):
        if isinstance(context, Rejection):
            layers.append(context)
            continue
        try:
            site = _of_kind(context, kinds, _describe_plain)
            layers.append(
                Rejection(context.index, context.path, RejectCode.AS_ASKED, "it was asked for as it is", site)
            )
        except MismatchError as mismatch:
            layers.append(Rejection(context.index, context.path, mismatch.code, mismatch.reason))
    return tuple(layers)


def _contexts(program: AnyProgram) -> Iterator[_Context | Rejection]:
    """Every attention layer in graph order, or why nothing can be asked about it."""
    flow, evaluator = DataFlow(program), GraphEvaluator(program)
    for index, found in enumerate(find_anchors(flow, program)):
        node = found.softmax if isinstance(found, Anchor) else found[0]
        path = module_path(node, f"attention_{index}")
        if not isinstance(found, Anchor):
            yield Rejection(index, path, found[1].code, found[1].reason)
            continue
        try:
            sizes = anchor_sizes(program, found)
            yield _Context(index, path, found, anchor_layouts(sizes, found), flow, evaluator, sizes)
        except MismatchError as mismatch:
            yield Rejection(index, path, mismatch.code, mismatch.reason)


def _of_kind(
    context: _Context,
    kinds: dict[str, _Described],
    describe: Callable[[_Context, _Described | None], _Described],
) -> _Described:
    """Describe a layer like another of its kind, or by itself where that does not fit.

    Args:
        context: The layer.
        kinds: The last description of every kind so far; the layer's is added.
        describe: Describes a layer, with what is taken over of another one.

    Raises:
        MismatchError: It is not understood by itself.
    """
    kind = kind_of(context.anchor, context.flow, context.evaluator)
    if kind in kinds:
        try:
            kinds[kind] = _speaking(context, lambda c: describe(c, kinds[kind]))
        except MismatchError:
            pass
        else:
            return kinds[kind]
    kinds[kind] = _speaking(context, lambda c: describe(c, None))
    return kinds[kind]


def _other_kind(site: AttentionSite) -> Rejection:
    """Why a layer that is understood has no cache that could shrink as tokens are generated."""
    if site.kind == Kind.CROSS:
        code, reason = RejectCode.CROSS, "it is cross attention: keys and values belong to another sequence"
    else:
        code = RejectCode.MASK
        reason = "attention is bidirectional: nothing is cached, so there is no cache to shrink"
    return Rejection(site.index, site.path, code, reason, site=site)


def _speaking(context: _Context, describe: Callable[[_Context], _Described]) -> _Described:
    """Turn a failure to evaluate into a reason."""
    try:
        return describe(context)
    except (RuntimeError, IndexError, TypeError, ValueError, KeyError) as error:  # of operators, on made-up values
        # For example, a table inside the model is shorter than the shortest probe.
        reason = f"the layer cannot be evaluated on {context.sizes.short} tokens ({first_line(error)})"
        raise MismatchError(RejectCode.LAYOUT, reason) from error


def _describe(context: _Context, other: AttentionSite | None = None) -> AttentionSite:
    """Describe a layer and verify the description.

    Args:
        context: The layer.
        other: A layer of the same kind, whose rotation and scores are taken over.
    """
    generator = torch.Generator().manual_seed(context.index)
    anchor, layouts, flow = context.anchor, context.layouts, context.flow
    read: dict[str, ReadOperand] = {}
    operands: dict[str, Operand] = {}
    for role in ("query", "key", "value"):
        node = getattr(anchor, role)
        operand = Operand(context.evaluator, context.sizes_of(role), role, node, node, getattr(layouts, role))
        operands[role] = operand
        known = None if other is None else other.rope if role != "value" else Rope()
        if role == "query":
            queries = functools.partial(read_query, operand, flow, generator, known)
            read[role] = queries(turned=other is not None and other.query.turned is not None)
        else:
            read[role] = read_operand(operand, flow, generator, known)
    if read["key"].behind is not None:
        read["query"] = with_gains(queries(turned=True), read["key"].behind)
    query, key, value = (read[role].projection for role in ("query", "key", "value"))
    nodes = context.evaluator.nodes
    key, value = from_one_activation(key, value, context.evaluator, flow, context.sizes.of_keys())
    stop = {nodes[p.activation or p.node] for p in (query, key, value)}
    if (reader := flow.reads_tokens(anchor.output, stop)) is not None:
        raise MismatchError(RejectCode.MASK, f"attention depends on which tokens were given, at '{reader.name}'")
    if read["value"].rope.pairs:
        raise MismatchError(RejectCode.ROPE, "values are rotated by position")
    turning = read["query"].rope if query.turned is None else replace(read["key"].rope, phases=())
    rope = common_rope(turning, read["key"].rope)
    heads = query.heads
    if query.activation is not None and other is None:
        projected = query.node != query.activation
        given = replace(operands["query"], base=nodes[query.node if projected else key.origin])
        if looks_ahead(given, nodes[query.activation], projected):
            raise MismatchError(RejectCode.POSITION_MIXING, "the query depends on how many tokens follow it")
        require_same_far(given, flow, nodes_between(given, anchor.query, flow))
    order = side_by_side(key, heads)
    if order is not None and value.heads == heads:
        query, key, value = (chosen_heads(p, order) for p in (query, key, value))
    key, value = distinct_heads(key, heads), value_heads(value, heads)
    if other is None or other.scores.own:
        scores = probe_scores(context.evaluator, flow, context.sizes, anchor, layouts, heads=heads, dim=query.head_dim)
    else:
        scores = other.scores
    probe_probabilities(context.evaluator, context.sizes, anchor, layouts)
    if order is not None and (other is None or other.scores.own):
        scores = _ordered(scores, order)
    if scores.factors is not None:
        query = scaled_heads(query, scores.factors)
    site = AttentionSite(
        index=context.index,
        path=context.path,
        query=query,
        key=key,
        value=value,
        rope=rope,
        scores=scores,
        output=anchor.output.name,
        output_axes=layouts.output.axes,
        softmax=anchor.softmax.name,
        error=0.0,
        order=order,
    )
    if not scores.mask.causal:
        site = _of_other_kind(context, site)
    elif other is None:
        check_own_mask(Scorer(context.evaluator, context.sizes, anchor, layouts, heads), flow)
    if site.key.norm is not None and site.key.offset is not None and (scores.softcap or scores.sinks is not None):
        raise MismatchError(RejectCode.NONLINEAR, "the key norm has a bias, and a soft-cap or sinks would see it")
    if site.value.norm is not None and site.value.offset is not None and scores.sinks is not None:
        raise MismatchError(RejectCode.NONLINEAR, "the value norm has a bias, and sinks would see it")
    return replace(site, error=_verified(context, lambda length: _compare(context, site, length)))


def _of_other_kind(context: _Context, site: AttentionSite) -> AttentionSite:
    """Complete the description of a layer that is not causal: what its keys belong to, and what hides them.

    Raises:
        MismatchError: Another sequence's keys rotate, or its keys are hidden in a way that is not understood.
    """
    cross = context.sizes.cross or not read_from_one(
        site.query, site.key, context.evaluator, context.flow, context.sizes.of_keys()
    )
    if cross and site.rope.pairs:
        raise MismatchError(RejectCode.ROPE, "keys of another sequence rotate by position")
    if site.query.turned is not None and site.rope.pairs:
        raise MismatchError(RejectCode.NONLINEAR, "something stands behind the rotation of queries that see both ways")
    scorer = Scorer(context.evaluator, context.sizes, context.anchor, context.layouts, site.heads)
    return replace(site, cross=cross, padding=padding_input(scorer))


def _ordered(scores: Scores, order: tuple[int, ...]) -> Scores:
    """What scores are per head, for heads in another order."""
    found = (scores.sinks, scores.slopes, scores.factors)
    sinks, slopes, factors = (None if x is None else tuple(x[h] for h in order) for x in found)
    return replace(scores, sinks=sinks, slopes=slopes, factors=factors)


def _plain(context: _Context) -> PlainSite | None:
    """Describe a layer that is not converted as ordinary attention with an ordinary cache, if it is that."""
    try:
        return _speaking(context, _describe_plain)
    except MismatchError:
        return None


def _describe_plain(context: _Context, other: PlainSite | None = None) -> PlainSite:
    """Describe a layer; the scores of another of its kind are not probed again, but for a layer's own numbers."""
    anchor, layouts, evaluator = context.anchor, context.layouts, context.evaluator
    shapes = {role: getattr(anchor, role).meta["val"].shape for role in ("query", "key", "value", "output")}
    heads, key_heads, value_heads = (
        _heads(shapes[role], getattr(layouts, role), context.sizes) for role in ("query", "key", "value")
    )
    operands = {getattr(anchor, role) for role in ("query", "key", "value")}
    if (reader := context.flow.reads_tokens(anchor.output, operands)) is not None:
        raise MismatchError(RejectCode.MASK, f"attention depends on which tokens were given, at '{reader.name}'")
    if key_heads != value_heads or heads % key_heads:
        raise MismatchError(RejectCode.GROUPING, f"{heads} query, {key_heads} key and {value_heads} value heads")
    dims = {role: int(shapes[role][getattr(layouts, role).axes.index("d")]) for role in ("query", "value")}
    if other is not None and not other.scores.own:
        scores = other.scores
    else:
        scores = probe_scores(evaluator, context.flow, context.sizes, anchor, layouts, heads=heads, dim=dims["query"])
        if not scores.mask.causal:
            raise MismatchError(RejectCode.MASK, "attention is not causal")
        check_own_mask(Scorer(evaluator, context.sizes, anchor, layouts, heads), context.flow)
        for role in ("query", "key", "value"):
            node = getattr(anchor, role)
            operand = Operand(evaluator, context.sizes_of(role), role, node, node, getattr(layouts, role))
            made = context.flow.behind(node, lambda n: context.flow.projection(n) is not None)
            require_same_far(operand, context.flow, made)
        probe_probabilities(evaluator, context.sizes, anchor, layouts)
    repeats = math.gcd(*(_repeats(context, role, heads) for role in ("key", "value"))) if key_heads == heads else 1
    axes = (layouts.query.axes, layouts.key.axes, layouts.value.axes, layouts.output.axes)
    site = PlainSite(
        query=anchor.query.name,
        key=anchor.key.name,
        value=anchor.value.name,
        axes=axes,
        heads=heads,
        kv_heads=key_heads // repeats,
        qk_dim=dims["query"],
        v_dim=dims["value"],
        scores=scores,
        output=anchor.output.name,
        softmax=anchor.softmax.name,
        repeats=repeats,
    )
    _verified(context, lambda length: _compare_plain(context, site, length))
    return site


def _repeats(context: _Context, role: str, heads: int) -> int:
    """How often each head stands in keys or values that were repeated for grouped queries."""
    end = node = getattr(context.anchor, role)
    while node.op == "call_function" and node.target in MOVES:
        node = node.args[0]
    batch, generator = 1, torch.Generator().manual_seed(7)
    sizes = context.sizes_of(role)
    shape = sizes.bind(node.meta["val"].shape, batch, sizes.short)
    given = {node: torch.randn(shape, generator=generator, dtype=torch.float64)}
    inputs = example_inputs(context.evaluator.program, batch, sizes.short, sizes=sizes)
    (got,) = context.evaluator.run([end], given, inputs)
    plain = getattr(context.layouts, role).arrange(got, "bthd", batch)[0].transpose(0, 1).flatten(1)
    repeats = next((h for h in range(1, heads) if not torch.equal(plain[h], plain[0])), heads)
    if heads % repeats or not torch.equal(plain[::repeats].repeat_interleave(repeats, 0), plain):
        return 1
    return repeats


def _heads(shape: torch.Size, layout: Layout, sizes: Sizes) -> int:
    bound = sizes.bind(shape, 1, sizes.short)
    heads = 1
    for size, axis in zip(bound, layout.axes, strict=True):
        heads *= size if axis in ("h", "bh") else 1
    return heads


def _verified(context: _Context, compare: Callable[[int], float]) -> float:
    """Compare description and sub-graph at a short and a long length, and return the larger error.

    Raises:
        MismatchError: It is not rounding.
    """
    short = context.sizes.short
    errors = {short: compare(short)}

    def attempt(length: int) -> None:
        errors[length] = compare(length)

    longest_length(context.evaluator, context.sizes, attempt, _VERIFY_LENGTH)
    error = max(errors.values())
    if not all(e < VERIFY_TOLERANCE for e in errors.values()):  # NaN too
        raise MismatchError(RejectCode.VERIFY, f"the recovered description is off by {error:.1e} on random inputs")
    return error


def _compare(context: _Context, site: AttentionSite, length: int) -> float:
    """Error on fresh random projections; relative to the largest output."""
    batch, generator = 2, torch.Generator().manual_seed(1000 + site.index)
    nodes, evaluator = context.evaluator.nodes, context.evaluator
    overrides: dict[Node, Tensor] = {}
    drawn: dict[str, Tensor] = {}
    bases: dict[str, Operand] = {}
    for role in ("query", "key", "value"):
        name = getattr(site, role).node
        bases[role] = Operand(evaluator, context.sizes_of(role), role, nodes[name], nodes[name], Layout(()))
        if name not in drawn:
            count = length if role == "query" else context.sizes.key_length(length)
            shape = (batch, count, bases[role].width)
            drawn[name] = torch.randn(shape, generator=generator, dtype=torch.float64)
            overrides[nodes[name]] = bases[role].place(drawn[name])
    inputs = example_inputs(evaluator.program, batch, length, sizes=context.sizes)
    wanted = [context.anchor.output, *([nodes[site.query.activation]] if site.query.activation else [])]
    got, *activation = evaluator.run(wanted, overrides, inputs)
    outputs = {role: drawn[getattr(site, role).node] for role in ("query", "key", "value")}
    if activation:
        base = replace(bases["query"], base=wanted[1])
        outputs["query"] = base.flatten(activation[0], batch, length)
    query, key, value = (normalised(getattr(site, role), outputs[role]) for role in ("query", "key", "value"))
    query = query if site.query.turned is None else turn_back(query, site.rope)
    query = turn_by_phases(query, site.rope)
    return _difference(got, query, key, value, site.rope, site.scores, site.output_axes, site.order)


def _compare_plain(context: _Context, site: PlainSite, length: int) -> float:
    """Error on fresh random operands; relative to the largest output."""
    batch, generator = 2, torch.Generator().manual_seed(2000 + context.index)
    nodes, evaluator = context.evaluator.nodes, context.evaluator
    overrides, plain = {}, []
    for name, axes, order in zip((site.query, site.key, site.value), site.axes, ("bshd", "bthd", "bthd"), strict=False):
        shape = context.sizes.bind(nodes[name].meta["val"].shape, batch, length)
        if nodes[name] not in overrides:
            overrides[nodes[name]] = torch.randn(shape, generator=generator, dtype=torch.float64)
        drawn = Layout(axes).arrange(overrides[nodes[name]], order, batch)
        if name != site.query and site.repeats > 1:
            drawn = drawn[:, :, :: site.repeats].repeat_interleave(site.repeats, 2)
            overrides[nodes[name]] = Layout(axes).place(drawn, order, shape)
        plain.append(drawn)
    inputs = example_inputs(evaluator.program, batch, length, sizes=context.sizes)
    (got,) = evaluator.run([context.anchor.output], overrides, inputs)
    query, key, value = plain
    if site.scores.factors is not None:
        query = query * torch.tensor(site.scores.factors, dtype=torch.float64)[:, None]
    return _difference(got, query, key, value, Rope(), site.scores, site.axes[3])


def _difference(
    got: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rope: Rope,
    scores: Scores,
    axes: tuple[str, ...],
    order: tuple[int, ...] | None = None,
) -> float:
    sinks, slopes = (None if x is None else torch.tensor(x, dtype=torch.float64) for x in (scores.sinks, scores.slopes))
    expected = reference.attention(
        query,
        key,
        value,
        rope.pairs,
        rope.inv_freq,
        scores.scale,
        scores.mask.window,
        sinks=sinks,
        slopes=slopes,
        softcap=scores.softcap,
        causal=scores.mask.causal,
        chunked=scores.mask.chunked,
    )
    arranged = Layout(axes).arrange(got, "bshd", len(query))
    arranged = arranged if order is None else arranged[:, :, list(order)]
    if arranged.shape != expected.shape:
        raise MismatchError(RejectCode.LAYOUT, f"the attention output is arranged as {tuple(got.shape)}")
    return float((arranged - expected).abs().max() / expected.abs().max())
