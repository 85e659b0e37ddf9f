"""Find out what happens between ``q . k`` and the attention weights: scale, soft-cap, bias, mask, sinks.

The raw scores are replaced by chosen numbers, and what reaches the softmax is compared. Softmax does not see what is
added to all logits of a query, so logits are taken relative to the query's own position, which every causal mask shows;
in cross attention, where a query has no position among the keys, relative to the first key.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from mla_compile.passes.evaluate import GraphEvaluator, example_inputs
from mla_compile.passes.layout import Layout, Sizes, attended_layout, fused_layout, score_layouts, score_lengths
from mla_compile.passes.mismatch import MismatchError
from mla_compile.passes.probe import exceeds, longest_length
from mla_compile.passes.trace import Anchor, DataFlow, find_anchors, operator_argument
from mla_compile.program import AnyProgram
from mla_compile.site import Mask, RejectCode, Scores

__all__ = [
    "AnchorLayouts",
    "Scorer",
    "anchor_layouts",
    "anchor_sizes",
    "hides",
    "layer_sizes",
    "probe_probabilities",
    "probe_scores",
]

_aten = torch.ops.aten
_LONG_MASK = 600
"""Upper end of the long probe of the mask, whose cost is quadratic; larger windows must be numbers in the graph."""
_MASKED = -9e3
"""Additive mask values below this mean 'not visible'; -10000 is the smallest in use."""
_LARGEST = 2.0**31
"""Numbers from here on are no lengths; they hide masked scores."""


@dataclass(frozen=True)
class AnchorLayouts:
    """Axes of everything around one attention anchor; ``raw`` and ``weights`` are None for a fused operator."""

    query: Layout
    key: Layout
    value: Layout
    output: Layout
    raw: Layout | None
    weights: Layout | None


def hides(logits: Tensor) -> Tensor:
    """Which logits are so low that their key is hidden."""
    return logits < _MASKED


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


@dataclass(frozen=True)
class Scorer:
    """What reaches the softmax of one anchor, for chosen raw scores."""

    evaluator: GraphEvaluator
    sizes: Sizes
    anchor: Anchor
    layouts: AnchorLayouts
    heads: int

    def __call__(
        self,
        length: int,
        scores: Tensor | None = None,
        patched: Mapping[Node, tuple[Any, ...]] | None = None,
        overrides: Mapping[Node, Tensor] | None = None,
    ) -> Tensor:
        """Return logits ``[B, H, S, T (+ sinks)]``, relative to each query's own position, or to the first key.

        Args:
            length: Number of queries.
            scores: Raw scores ``[2, H, S, T]``, zero at that position; all zeros by default and if fused.
            patched: Arguments to use in place of a node's own.
            overrides: Values to take as given.
        """
        logits = self.absolute(length, scores, patched, overrides)
        keys = self.sizes.key_length(length)
        own = logits[..., :1] if self.sizes.cross else logits[..., :keys].diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        if scores is None and exceeds(own, -_MASKED):
            raise MismatchError(RejectCode.MASK, "a query does not see its own position")
        return logits - own

    def absolute(
        self,
        length: int,
        scores: Tensor | None = None,
        patched: Mapping[Node, tuple[Any, ...]] | None = None,
        overrides: Mapping[Node, Tensor] | None = None,
        inputs: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Return logits as they are; ``inputs`` are used in place of the usual ones of their names."""
        batch, keys = 2, self.sizes.key_length(length)
        usual = example_inputs(self.evaluator.program, batch, length, sizes=self.sizes)
        fed, given = {**usual, **(inputs or {})}, dict(overrides or {})
        if self.anchor.fused:
            return self._operator_mask(length, fed, given, patched)  # the operator scales, and no more
        raw = torch.zeros(batch, self.heads, length, keys, dtype=torch.float64) if scores is None else scores
        return self._traced(raw, length, fed, given, patched)

    def _traced(
        self,
        raw: Tensor,
        length: int,
        inputs: Mapping[str, Tensor],
        given: dict[Node, Tensor],
        patched: Mapping[Node, tuple[Any, ...]] | None,
    ) -> Tensor:
        product: Any = self.anchor.scores
        layout, batch = self.layouts.raw, len(raw)
        assert layout is not None
        placed = layout.place(raw, "bhst", self.sizes.bind(product.meta["val"].shape, batch, length))
        if product.target is _aten.baddbmm.default:  # the product adds something of its own
            (added,) = self.evaluator.run([product.args[0]], given, inputs, patched)
            placed = placed * product.kwargs.get("alpha", 1) + added * product.kwargs.get("beta", 1)
        entry: Any = self.anchor.softmax.args[0]
        (logits,) = self.evaluator.run([entry], {**given, product: placed}, inputs, patched)
        axes = (*self.sizes.leading(entry.meta["val"].shape[:-2]), "s", "t")
        return Layout(axes).arrange(logits.double(), "bhst", batch)

    def _operator_mask(
        self,
        length: int,
        inputs: Mapping[str, Tensor],
        given: dict[Node, Tensor],
        patched: Mapping[Node, tuple[Any, ...]] | None,
    ) -> Tensor:
        added = torch.zeros(1, 1, length, self.sizes.key_length(length), dtype=torch.float64)
        mask = operator_argument(self.anchor.scores, "attn_mask")
        if isinstance(mask, Node):
            (value,) = self.evaluator.run([mask], given, inputs, patched)
            value = torch.where(value, 0.0, -math.inf).double() if value.dtype == torch.bool else value.double()
            if value.dim() == 3:  # [B * H, S, T], or [H, S, T] for a single head axis
                value = value.unflatten(0, (-1, self.heads)) if value.shape[0] % self.heads == 0 else value[:, None]
            added = added + value
        if operator_argument(self.anchor.scores, "is_causal"):
            added = added.masked_fill(~torch.ones(added.shape[2:], dtype=torch.bool).tril(), -math.inf)
        return added

    def factor_sinks(self, base: Tensor) -> tuple[float, ...]:
        """Read sinks spelled as a factor of the output, ``sigmoid(logsumexp(logits) - sink)``.

        A sink takes part of the weights: what is left of them is that factor, for any value (values of one show it).

        Args:
            base: Logits ``[B, H, S, T]`` of zero scores, relative to the query's own position.

        Raises:
            MismatchError: The factor is not a sink's.
        """
        batch, length = len(base), base.shape[2]
        nodes: Any = (self.anchor.value, self.anchor.scores)
        ones, zeros = (
            torch.full(self.sizes.bind(n.meta["val"].shape, batch, length), x, dtype=torch.float64)
            for n, x in zip(nodes, (1.0, 0.0), strict=True)
        )
        inputs = example_inputs(self.evaluator.program, batch, length, sizes=self.sizes)
        (got,) = self.evaluator.run([self.anchor.output], dict(zip(nodes, (ones, zeros), strict=True)), inputs)
        left = self.layouts.output.arrange(got, "bshd", batch)[..., 0].transpose(1, 2)  # [B, H, S]
        sinks = torch.log1p(-left[0, :, 0]) - left[0, :, 0].log()
        seen = base.logsumexp(-1)
        if left.shape != seen.shape or exceeds(left - torch.sigmoid(seen - sinks[:, None]), 1e-9):
            raise MismatchError(
                RejectCode.SCORES, "the output is scaled by something computed from the scores that is not a sink"
            )
        return tuple(sinks.tolist())


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
    scorer = Scorer(evaluator, sizes, anchor, layouts, heads)
    short, keys = sizes.short, sizes.key_length(sizes.short)
    base = scorer(short)
    sinks = _sinks(base, keys)
    if anchor.output is not anchor.product:
        if sinks is not None:
            raise MismatchError(RejectCode.SCORES, "the output has a factor beside sinks in the softmax")
        sinks = scorer.factor_sinks(base)
    softcap = 0.0
    if scale is None:
        scale, softcap = _bending(scorer, base[..., :keys])
    slopes, mask = _visible(base[..., :keys])
    long = longest_length(evaluator, sizes, scorer, _LONG_MASK)
    seen_long = _visible(scorer(long)[..., : sizes.key_length(long)])
    if seen_long[1].causal != mask.causal or (mask.window is not None and (slopes, mask) != seen_long):
        raise MismatchError(RejectCode.MASK, "the mask changes its kind with the length")
    slopes, mask = seen_long
    if mask.window is None and not sizes.fixed:
        mask = _distant(scorer, base[..., :keys], mask, long)
    if slopes is not None and len(slopes) == 1:
        slopes = slopes * heads  # one mask for all heads
    name = _parameter_behind(flow, anchor) if sinks is not None else None
    return Scores(scale=scale, mask=mask, softcap=softcap, slopes=slopes, sinks=sinks, sinks_name=name)


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


def _bending(scorer: Scorer, base: Tensor) -> tuple[float, float]:
    """Factor and soft-cap between raw scores and logits.

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
    visible = (base > _MASKED).expand(shape) & (scores != 0)

    def moved(magnitude: float) -> Tensor:
        logits = scorer(short, scores * magnitude)
        rounding = 1e-9 * max(1.0, 1e-3 * magnitude)  # of the largest scores, when the maximum is subtracted
        if exceeds(logits[..., keys:] - logits[:1, :, :1, keys:], rounding):
            raise MismatchError(RejectCode.SCORES, "the extra column of the softmax depends on the scores")
        return (logits[..., :keys] - base).expand(shape)[visible]

    plain = scores[visible]
    if not len(plain):
        return 1.0, 0.0  # a query sees itself alone, and scores do not matter
    scale = float((moved(1e-4) / (plain * 1e-4)).median())
    softcap = 0.0
    largest = float(moved(1e9).abs().max())
    if largest < 1e-3 * abs(scale) * 1e9:
        softcap = largest
    for magnitude in (1e-2, 1.0, 1e1, 1e3):
        wanted = scale * plain * magnitude
        if softcap:
            wanted = softcap * torch.tanh(wanted / softcap)
        # Logits are differences from a query's own position, where a bias may have cost some digits.
        if exceeds(moved(magnitude) - wanted, 1e-6 * float(wanted.abs().max()) + 1e-12):
            raise MismatchError(
                RejectCode.SCORES, "scores pass through something other than one constant factor or a soft-cap"
            )
    return scale, softcap


def _visible(added: Tensor) -> tuple[tuple[float, ...] | None, Mask]:
    """Name what is added to scores ``[B, H, S, T]``: a mask, and slopes if there are any.

    Raises:
        MismatchError: Something else is added.
    """
    mask = _classify(added)
    if not mask.causal:
        if exceeds(added, 1e-6):
            raise MismatchError(
                RejectCode.SCORES,
                "a bias that differs between places (a relative position bias) is added to the scores",
            )
        return None, mask
    length = added.shape[-1]
    distance = (torch.arange(length)[:, None] - torch.arange(length)[None]).double()
    bias = torch.where(added < _MASKED, 0.0, added)
    slopes = -bias[0, :, 1, 0]
    # ALiBi tables are often float32 (or their ramp is), so a slope is held to that precision.
    expected = torch.where(added < _MASKED, 0.0, -slopes[None, :, None, None] * distance)
    if exceeds(bias - expected, 1e-6 * max(1.0, float(expected.abs().max()))):
        raise MismatchError(RejectCode.SCORES, "a bias is added to the scores that is not linear in the distance")
    if not exceeds(bias, 1e-6):
        return None, mask
    return tuple(slopes.tolist()), mask


def _classify(added: Tensor) -> Mask:
    """Name the visibility pattern of an additive mask ``[B, H, S, T]``."""
    visible = added >= _MASKED
    if (visible != visible[:1, :1]).any():
        raise MismatchError(RejectCode.MASK, "the mask differs between heads or sequences")
    distance = torch.arange(visible.shape[-2])[:, None] - torch.arange(visible.shape[-1])[None]
    pattern = visible[0, 0]
    if torch.equal(pattern, distance >= 0):
        return Mask()
    window = int(pattern[-1].sum())
    if torch.equal(pattern, (distance >= 0) & (distance < window)):
        return Mask(window)
    if pattern.all():
        return Mask(causal=False)
    chunk = max(int(pattern[:, 0].sum()), 1)
    rows, columns = (torch.arange(n) // chunk for n in pattern.shape)
    if torch.equal(pattern, (distance >= 0) & (rows[:, None] == columns)):
        raise MismatchError(RejectCode.MASK, f"a query sees its own chunk of {chunk} tokens only")
    raise MismatchError(RejectCode.MASK, "the mask is neither causal, nor a causal sliding window, nor open to all")


def _distant(scorer: Scorer, base: Tensor, mask: Mask, shown: int) -> Mask:
    """Look for what a mask does only beyond the lengths it was looked at, where a number in the graph says so.

    Every such number is made small, to see at a short length what it does: nothing, or hide scores that are hidden
    already, or make a window.

    Raises:
        MismatchError: It does anything else.
    """
    small = 5
    for constant, node, attempt in _constants(scorer, shown):
        try:
            changed = attempt(small)[..., : base.shape[-1]]
        except MismatchError as mismatch:
            raise MismatchError(
                mismatch.code, f"from {constant:g} tokens on, at '{node.name}', {mismatch.reason}"
            ) from mismatch
        except (RuntimeError, IndexError):
            continue  # a size: nothing fits when it changes
        if changed.shape == base.shape and not exceeds(torch.where(base < _MASKED, 0.0, changed - base), 1e-9):
            continue  # the number that hides masked scores, or one that does not matter
        try:
            _, patched = _visible(changed)
        except MismatchError as mismatch:
            raise MismatchError(
                mismatch.code, f"from {constant:g} tokens on, at '{node.name}', {mismatch.reason}"
            ) from mismatch
        if patched.causal != mask.causal:
            raise MismatchError(
                RejectCode.MASK, f"from {constant:g} tokens on, at '{node.name}', the mask changes its kind"
            )
        if patched.window is not None:
            return Mask(window=int(constant) + patched.window - small)
    return mask


def _constants(scorer: Scorer, shown: int) -> Iterator[tuple[float, Node, Callable[[int], Tensor]]]:
    """List numbers that may shape the mask beyond the lengths it was looked at (a 4096-token window).

    Yields:
        The number, the node it is in, and a function that evaluates the logits at the short length with a smaller
        number in its place. Numbers below the length the mask was seen at would have shown.
    """
    anchor = scorer.anchor
    start = operator_argument(anchor.scores, "attn_mask") if anchor.fused else anchor.softmax.args[0]
    if not isinstance(start, Node):
        return

    def matters(number: object) -> bool:
        return type(number) in (int, float) and shown <= abs(number) < _LARGEST  # type: ignore[arg-type]

    seen, stack = set(), [start]
    while stack:
        node = stack.pop()
        if node in seen or (node is anchor.scores and not anchor.fused):
            continue
        seen.add(node)
        stack.extend(node.all_input_nodes)
        value = scorer.evaluator.scalar(node)
        if value is not None and matters(value):
            sign = 1 if value > 0 else -1
            yield (
                abs(value),
                node,
                lambda small, node=node, sign=sign: scorer(  # type: ignore[misc]
                    scorer.sizes.short, overrides={node: torch.full_like(scorer.evaluator.constant(node), sign * small)}
                ),
            )
        for place, number in enumerate(node.args):
            if matters(number):
                kind, sign = type(number), 1 if number > 0 else -1  # type: ignore[operator]
                yield (
                    abs(number),  # type: ignore[arg-type]
                    node,
                    lambda small, node=node, place=place, new=kind, sign=sign: scorer(  # type: ignore[misc]
                        scorer.sizes.short,
                        patched={node: (*node.args[:place], new(sign * small), *node.args[place + 1 :])},
                    ),
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
