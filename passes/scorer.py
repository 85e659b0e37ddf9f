"""Evaluate what reaches the softmax of one attention layer, for raw scores of one's choice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from mla_compile.passes.evaluate import Arguments, GraphEvaluator, example_inputs
from mla_compile.passes.layout import Layout, Sizes
from mla_compile.passes.masks import MASKED
from mla_compile.passes.mismatch import MismatchError
from mla_compile.passes.probe import exceeds
from mla_compile.passes.trace import Anchor, operator_argument
from mla_compile.site import RejectCode

__all__ = ["AnchorLayouts", "Scorer"]

_aten = torch.ops.aten


@dataclass(frozen=True)
class AnchorLayouts:
    """Axes of everything around one attention anchor; ``raw`` and ``weights`` are None for a fused operator."""

    query: Layout
    key: Layout
    value: Layout
    output: Layout
    raw: Layout | None
    weights: Layout | None


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
        patched: Mapping[Node, Arguments] | None = None,
        overrides: Mapping[Node, Tensor] | None = None,
    ) -> Tensor:
        """Return logits ``[B, H, S, T (+ sinks)]``, relative to each query's own position, or to the first key.

        Args:
            length: Number of queries.
            scores: Raw scores ``[B, H, S, T]``, zero at that position; all zeros of two sequences by default and if
                fused. One head stands for all, where nothing between needs to be told how many there are.
            patched: Arguments to use in place of a node's own.
            overrides: Values to take as given.
        """
        logits = self.absolute(length, scores, patched, overrides)
        keys = self.sizes.key_length(length)
        own = logits[..., :1] if self.sizes.cross else logits[..., :keys].diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        if scores is None and exceeds(own, -MASKED):
            raise MismatchError(RejectCode.MASK, "a query does not see its own position")
        return logits - own

    def values(self, nodes: Sequence[Node]) -> list[Tensor]:
        """Values of nodes that no activation reaches, at the short length."""
        return self.evaluator.run(
            nodes, {}, example_inputs(self.evaluator.program, 2, self.sizes.short, sizes=self.sizes)
        )

    def absolute(
        self,
        length: int,
        scores: Tensor | None = None,
        patched: Mapping[Node, Arguments] | None = None,
        overrides: Mapping[Node, Tensor] | None = None,
        inputs: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Return logits as they are; ``inputs`` are used in place of the usual ones of their names."""
        batch, keys = 2 if scores is None else len(scores), self.sizes.key_length(length)
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
        patched: Mapping[Node, Arguments] | None,
    ) -> Tensor:
        product: Any = self.anchor.scores
        layout, batch = self.layouts.raw, len(raw)
        assert layout is not None
        shape = self.sizes.bind(product.meta["val"].shape, batch, length)
        if raw.shape[1] == 1:
            alone = {"h": 1, "bh": batch}
            shape = [alone.get(axis, size) for axis, size in zip(layout.axes, shape, strict=True)]
        placed = layout.place(raw, "bhst", shape)
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
        patched: Mapping[Node, Arguments] | None,
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
