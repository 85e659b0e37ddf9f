"""Find out what happens between ``q . k`` and the attention weights: scale, soft-cap, bias, mask, sinks.

The raw scores are replaced by chosen numbers, and what reaches the softmax is compared. Softmax does not see what is
added to all logits of a query, so logits are taken relative to the query's own position, which every causal mask shows;
in cross attention, where a query has no position among the keys, relative to the first key.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from mla_compile.passes.evaluate import GraphEvaluator, example_inputs
from mla_compile.passes.far import far_mask
from mla_compile.passes.joined import refuse_far_changes
from mla_compile.passes.layout import Layout, Sizes, attended_layout, fused_layout, score_layouts, score_lengths
from mla_compile.passes.masks import MASKED, visible
from mla_compile.passes.mismatch import MismatchError
from mla_compile.passes.probe import exceeds, longest_length
from mla_compile.passes.scorer import AnchorLayouts, Scorer
from mla_compile.passes.trace import Anchor, DataFlow, find_anchors, operator_argument
from mla_compile.program import AnyProgram
from mla_compile.site import RejectCode, Scores

__all__ = ["anchor_layouts", "anchor_sizes", "layer_sizes", "probe_probabilities", "probe_scores"]

_aten = torch.ops.aten
_LONG_MASK = 600
"""Upper end of the long probe of the mask, whose cost is quadratic."""


def anchor_sizes(program: AnyProgram, anchor: Anchor) -> Sizes:
    """Read the batch and the lengths of an anchor.

    Raises:
        MismatchError: Its lengths are not found.
    """
    if anchor.fused:
        lengths = (anchor.query.meta["val"].shape[-2], anchor.key.meta["val"].shape[-2])
    else:
        lengths = score_lengths(anchor.scores, anchor.query, anchor.key)
    return Sizes.around(program, anchor.query, lengths)


def layer_sizes(program: AnyProgram) -> dict[int, Sizes]:
    """Sizes of every attention layer, by its index."""
    anchors = enumerate(find_anchors(DataFlow(program), program))
    return {index: anchor_sizes(program, found) for index, found in anchors if isinstance(found, Anchor)}


def anchor_layouts(sizes: Sizes, anchor: Anchor) -> AnchorLayouts:
    """Name the axes of an anchor's operands and results.

    Raises:
        MismatchError: Some axis is not understood.
    """
    if anchor.probabilities is None:
        query, output = fused_layout(sizes, anchor.query, "s"), fused_layout(sizes, anchor.output, "s")
        key, value = fused_layout(sizes, anchor.key, "t"), fused_layout(sizes, anchor.value, "t")
        return AnchorLayouts(query, key, value, output, None, None)
    query, key, raw = score_layouts(sizes, anchor.scores, anchor.query, anchor.key)
    weights, value, output = attended_layout(sizes, anchor.product, anchor.probabilities, anchor.value)
    return AnchorLayouts(query, key, value, output, raw, weights)


def probe_scores(
    evaluator: GraphEvaluator,
    flow: DataFlow,
    sizes: Sizes,
    anchor: Anchor,
    layouts: AnchorLayouts,
    heads: int,
    dim: int,
) -> Scores:
    """Measure the way from ``q . k`` to the attention weights.

    Args:
        evaluator: Evaluates the graph.
        flow: Data flow, to notice masks that depend on activations.
        sizes: Batch and length symbols.
        anchor: The attention anchor.
        layouts: Axes around it.
        heads: Query heads.
        dim: Channels per query head, for the fused operator's default scale.

    Raises:
        MismatchError: Scores are changed in another way than :class:`~mla_compile.site.Scores` can say.
    """
    scale = _operator_scale(flow, anchor, dim) if anchor.fused else None
    if not anchor.fused:
        entry: Any = anchor.softmax.args[0]
        refuse_far_changes(evaluator, sizes, anchor.scores, entry, weights=False)
    scorer = Scorer(evaluator, sizes, anchor, layouts, heads)
    short, keys = sizes.short, sizes.key_length(sizes.short)
    base = scorer(short)
    sinks = _sinks(base, keys)
    if anchor.output is not anchor.product:
        if sinks is not None:
            raise MismatchError(RejectCode.SCORES, "the output has a factor beside sinks in the softmax")
        sinks = scorer.factor_sinks(base)
    softcap = 0.0
    factors = torch.ones(heads, 1, 1, dtype=torch.float64)
    if scale is None:
        scale, factors, softcap = _bending(scorer, base[..., :keys])
    slopes, mask = visible(base[..., :keys])
    seen: dict[int, Tensor] = {}

    def attempt(length: int) -> None:
        seen[length] = scorer(length)[..., : sizes.key_length(length)]

    long = longest_length(evaluator, sizes, attempt, _LONG_MASK)
    if long not in seen:
        attempt(long)
    seen_long = visible(seen[long])
    if seen_long[1].causal != mask.causal or (mask.window is not None and (slopes, mask) != seen_long):
        raise MismatchError(RejectCode.MASK, "the mask changes its kind with the length")
    slopes, mask = seen_long
    bend = functools.partial(_bent, scale=scale * factors, softcap=softcap)
    if not anchor.fused and long > short:
        _check_long(scorer, seen[long], long, bend)
    if not sizes.fixed:
        mask = far_mask(scorer, flow, slopes, mask, long, bend)
    if slopes is not None and len(slopes) == 1:
        slopes = slopes * heads  # one mask for all heads
    name = _parameter_behind(flow, anchor) if sinks is not None else None
    different = None if bool((factors == 1).all()) else tuple(factors.flatten().tolist())
    return Scores(scale, mask, softcap, slopes, sinks, name, different)


def _operator_scale(flow: DataFlow, anchor: Anchor, dim: int) -> float:
    mask = operator_argument(anchor.scores, "attn_mask")
    if isinstance(mask, Node) and mask in flow.hidden:
        raise MismatchError(
            RejectCode.MASK, f"what is added to the scores is computed from activations, at '{mask.name}'"
        )
    if operator_argument(anchor.scores, "dropout_p"):
        raise MismatchError(
            RejectCode.SCORES, "attention weights are dropped out at random: call model.eval() before exporting"
        )
    given = operator_argument(anchor.scores, "scale")
    if isinstance(given, Node):
        raise MismatchError(RejectCode.SCORES, f"the scale of the scores is computed, at '{given.name}'")
    return float(given) if given is not None else dim**-0.5


def _sinks(logits: Tensor, length: int) -> tuple[float, ...] | None:
    """Read what stands in one more column than there are keys."""
    extra = logits[..., length:]
    if logits.shape[-1] == length:
        return None
    if logits.shape[-1] != length + 1 or exceeds(extra - extra[:1, :, :1], 1e-9):
        raise MismatchError(RejectCode.SCORES, "the softmax sees extra columns that are not constant sinks")
    return tuple(extra[0, :, 0, 0].tolist())


def _parameter_behind(flow: DataFlow, anchor: Anchor) -> str | None:
    """The parameter among what joins the scores on their way to the softmax, or the output behind it."""
    start = anchor.softmax.args[0] if anchor.output is anchor.product else anchor.output
    names, stack, seen = set(), [start], {anchor.product}
    while stack:
        node = stack.pop()
        if isinstance(node, Node) and node not in seen and node is not anchor.scores:
            seen.add(node)
            if node in flow.parameters:
                names.add(flow.parameters[node])
            stack.extend(node.all_input_nodes)
    return names.pop() if len(names) == 1 else None


def _bending(scorer: Scorer, base: Tensor) -> tuple[float, Tensor, float]:
    """What stands between raw scores and logits.

    Returns:
        Their factor, another one per head ``[H, 1, 1]`` of at most one, and the soft-cap.

    Raises:
        MismatchError: There is anything else between them.
    """
    generator = torch.Generator().manual_seed(5)
    short = scorer.sizes.short
    keys = scorer.sizes.key_length(short)
    shape = (2, scorer.heads, short, keys)
    scores = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5
    if scorer.sizes.cross:
        scores[..., 0] = 0.0
    else:
        scores *= 1 - torch.eye(short)
    visible = (base > MASKED).expand(shape) & (scores != 0)

    def moved(magnitude: float) -> Tensor:
        logits = scorer(short, scores * magnitude)
        rounding = 1e-9 * max(1.0, 1e-3 * magnitude)  # of the largest scores, when the maximum is subtracted
        if exceeds(logits[..., keys:] - logits[:1, :, :1, keys:], rounding):
            raise MismatchError(RejectCode.SCORES, "the extra column of the softmax depends on the scores")
        return torch.where(visible, (logits[..., :keys] - base).expand(shape), 0.0)

    plain = torch.where(visible, scores, 0.0)
    if not bool(visible.any()):
        return 1.0, torch.ones(scorer.heads, 1, 1, dtype=torch.float64), 0.0  # a query sees itself alone
    scale, factors = _factors((moved(1e-4) / (plain * 1e-4)).transpose(0, 1).flatten(1))
    softcap = 0.0
    largest = float(moved(1e9).abs().max())
    if largest < 1e-3 * abs(scale) * 1e9:
        softcap = largest
    for magnitude in (1e-2, 1.0, 1e1, 1e3):
        wanted = _bent(plain * magnitude, scale * factors, softcap)
        # Logits are differences from a query's own position, where a bias may have cost some digits.
        if exceeds(moved(magnitude) - wanted, 1e-6 * float(wanted.abs().max()) + 1e-12):
            raise MismatchError(
                RejectCode.SCORES,
                "scores pass through something other than one constant factor per head, or a soft-cap behind it",
            )
    return scale, factors, softcap


def _factors(seen: Tensor) -> tuple[float, Tensor]:
    """One factor for all heads, and what each head has beside it, ``[H, 1, 1]``.

    Args:
        seen: ``[H, numbers]`` ratios of logits and scores; no number where a score is hidden.
    """
    common = float(seen.nanmedian())
    own = seen.nanmedian(1).values.nan_to_num(common)
    if not exceeds(own - common, 1e-9 * abs(common)):
        return common, torch.ones(len(seen), 1, 1, dtype=torch.float64)
    largest = float(own[own.abs().argmax()])
    return largest, (own / largest)[:, None, None]


def _bent(scores: Tensor, scale: Tensor, softcap: float) -> Tensor:
    """Logits made of raw scores ``[..., H, S, T]``, by factors ``[H, 1, 1]``."""
    return softcap * torch.tanh(scale * scores / softcap) if softcap else scale * scores


def _check_long(scorer: Scorer, base: Tensor, length: int, bend: Callable[[Tensor], Tensor]) -> None:
    """Check at the long length, too, that scores are bent and no more; ``base`` are logits of zero scores."""
    keys = base.shape[-1]
    pattern = ((7 * torch.arange(length)[:, None] + 11 * torch.arange(keys)) % 17).double() / 17
    if scorer.sizes.cross:
        pattern[:, 0] = 0.0
    else:
        pattern.fill_diagonal_(0.0)
    logits = scorer(length, pattern.expand(1, scorer.heads, length, keys))[..., :keys]
    error = torch.where(base[:1] < MASKED, 0.0, logits - base[:1] - bend(pattern))
    if exceeds(error, 1e-6 * float(bend(pattern).abs().max())):
        raise MismatchError(
            RejectCode.SCORES, f"scores of {length} tokens pass through something else than those of few tokens"
        )


def probe_probabilities(evaluator: GraphEvaluator, sizes: Sizes, anchor: Anchor, layouts: AnchorLayouts) -> None:
    """Check that softmax weights reach the value product unchanged, but for a sink's column.

    Raises:
        MismatchError: They are scaled, mixed or gated on the way.
    """
    if anchor.probabilities is None or layouts.weights is None:
        return
    batch, short = 2, sizes.short
    entry = anchor.softmax
    shape = sizes.bind(entry.meta["val"].shape, batch, short)
    given = torch.rand(shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    inputs = example_inputs(evaluator.program, batch, short, sizes=sizes)
    (arrived,) = evaluator.run([anchor.probabilities], {entry: given}, inputs)
    before = Layout((*sizes.leading(entry.meta["val"].shape[:-2]), "s", "t")).arrange(given, "bhst", batch)
    before = before[..., : sizes.key_length(short)]
    after = layouts.weights.arrange(arrived, "bhst", batch)
    if _random_between(anchor):
        raise MismatchError(
            RejectCode.SCORES, "attention weights are dropped out at random: call model.eval() before exporting"
        )
    if after.shape != before.shape or exceeds(after - before, 1e-12):
        raise MismatchError(RejectCode.SCORES, "probabilities are changed between softmax and values")
    refuse_far_changes(evaluator, sizes, anchor.softmax, anchor.probabilities, weights=True)


def _random_between(anchor: Anchor) -> bool:
    """Whether a random operator that does something stands between the softmax and the product with the values."""
    seen, stack = set(), [anchor.probabilities]
    while stack:
        node = stack.pop()
        if node is None or node in seen or node is anchor.softmax:
            continue
        seen.add(node)
        stack.extend(node.all_input_nodes)
        target: Any = node.target
        tags = getattr(target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags and not (
            target is _aten.dropout.default and not (node.args[1] and node.args[2])
        ):
            return True
    return False
