"""Find the input that hides keys of a layer, and check that this is all it does.

A causal layer gets its padding mask from the compiler, in place of the model's own mask input, which must not have done
anything else. Other layers keep the inputs of their model, so what the mask input does to their keys must be known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.fx import Node

from mla_compile.passes.evaluate import example_inputs
from mla_compile.passes.masks import hides
from mla_compile.passes.mismatch import MismatchError
from mla_compile.passes.probe import exceeds
from mla_compile.passes.scorer import Scorer
from mla_compile.passes.trace import DataFlow, operator_argument, projections_behind, upstream
from mla_compile.program import Role
from mla_compile.site import RejectCode

__all__ = ["check_own_mask", "padding_input"]

_SIZE = torch.ops.aten.sym_size.int
_MORE = "does more than hide the keys it marks with 0"
_PADDED = 3
"""Tokens that are padding in front of a sequence, where a model that generates has them."""


def check_own_mask(scorer: Scorer, flow: DataFlow) -> None:
    """Check that the model's own mask input hides keys of a causal layer, and does nothing else to it.

    Args:
        scorer: The layer's scores.
        flow: Data flow of the graph.

    Raises:
        MismatchError: It does something to scores, keys or values that hiding keys does not.
    """
    anchor, sizes, evaluator = scorer.anchor, scorer.sizes, scorer.evaluator

    def ends(node: Node) -> bool:
        return flow.projection(node) is not None or node.target is _SIZE

    behind = _behind_mask(scorer) | upstream([anchor.key, anchor.value], ends)
    for name in sorted(_masks(scorer, behind)):
        value, length = evaluator.program.user_inputs[name][1], sizes.short
        given = torch.ones(2, length)
        given[1, :_PADDED] = 0
        _require_one_per_key(name, sizes.bind(value.shape, 2, length), length)
        padded = given.to(value.dtype)
        generator = torch.Generator().manual_seed(10)
        scores = torch.rand(2, scorer.heads, length, length, generator=generator, dtype=torch.float64)
        masked = _logits(scorer, length, scores, {name: padded})
        if not _only_hidden(_logits(scorer, length, scores, {}), masked, given) and not _as_without_padding(
            scorer, masked, scores
        ):
            raise MismatchError(RejectCode.MASK, f"the mask input '{name}' {_MORE}")
        overrides = {
            found.node: torch.randn(
                sizes.bind(found.node.meta["val"].shape, 2, length), generator=generator, dtype=torch.float64
            )
            for found in projections_behind(flow, anchor.value)
        }
        usual = example_inputs(evaluator.program, 2, length, sizes=sizes)
        before, after = (
            scorer.layouts.value.arrange(evaluator.run([anchor.value], overrides, {**usual, **inputs})[0], "bthd", 2)[
                :, _PADDED:
            ]
            for inputs in ({}, {name: padded})
        )
        if exceeds(after - before, 1e-6):
            raise MismatchError(RejectCode.MASK, f"the mask input '{name}' {_MORE}")


def _logits(scorer: Scorer, length: int, scores: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """Logits ``[2, H, S, S]`` of given scores, relative to those of a query with itself."""
    logits = scorer.absolute(length, scores, inputs=inputs)[..., :length].expand(2, scorer.heads, -1, -1)
    return logits - logits.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)


def _only_hidden(plain: Tensor, masked: Tensor, given: Tensor) -> bool:
    """Whether a mask ``[2, S]`` hides keys from real tokens, and does nothing else to their logits."""
    # What padding itself attends to is nobody's concern.
    plain, masked = plain[..., _PADDED:, :], masked[..., _PADDED:, :]
    hidden = hides(plain) | (given == 0)[:, None, None]
    return torch.equal(hides(masked), hidden) and not exceeds((masked - plain).masked_fill(hidden, 0.0), 1e-6)


def _as_without_padding(scorer: Scorer, masked: Tensor, scores: Tensor) -> bool:
    """Whether tokens behind padding have the logits that they have without it, as where chunks begin behind it."""
    length = scores.shape[-1]
    alone = _logits(scorer, length, scores.roll((-_PADDED, -_PADDED), (-2, -1)), {})[1, :, :-_PADDED, :-_PADDED]
    whole = _logits(scorer, length, scores, {})[0]
    pairs = ((masked[0], whole), (masked[1, :, _PADDED:, _PADDED:], alone))
    return bool(hides(masked[1, :, _PADDED:, :_PADDED]).all()) and all(
        torch.equal(hides(got), hides(expected))
        and not exceeds((got - expected).masked_fill(hides(expected), 0.0), 1e-6)
        for got, expected in pairs
    )


def padding_input(scorer: Scorer) -> str | None:
    """Name the user's padding mask ``[batch, keys]`` that hides keys of a layer.

    Args:
        scorer: The layer's scores, which show all keys when nothing is padded.

    Returns:
        The placeholder, or None where no input hides keys.

    Raises:
        MismatchError: Several inputs do, or one does anything else than hide the keys it marks with 0.
    """
    inputs = scorer.evaluator.program.user_inputs
    names = [*_masks(scorer, _behind_mask(scorer))]
    if not names:
        return None
    if len(names) > 1:
        raise MismatchError(RejectCode.MASK, f"several inputs hide keys: {', '.join(sorted(names))}")
    (name,) = names
    value, length = inputs[name][1], scorer.sizes.short
    shape = scorer.sizes.bind(value.shape, 2, length)
    _require_one_per_key(name, shape, scorer.sizes.key_length(length))
    given = torch.ones(shape)
    given[1, 1::2] = 0
    logits = scorer.absolute(length, inputs={name: given.to(value.dtype)})[..., : shape[1]]
    if not torch.equal(hides(logits), (given == 0)[:, None, None].expand(logits.shape)):
        raise MismatchError(RejectCode.MASK, f"the mask input '{name}' {_MORE}")
    return name


def _require_one_per_key(name: str, shape: list[int], keys: int) -> None:
    """Refuse a mask input whose shape, for two sequences, is not that of keys."""
    if len(shape) == 2 and shape[0] == 2 and shape[1] != keys:
        raise MismatchError(
            RejectCode.MASK,
            f"the mask input '{name}' has {shape[1]} numbers for {keys} keys, which are subsampled; no mask made of it "
            "is read: export without it, for inputs without padding",
        )
    if shape != [2, keys]:
        raise MismatchError(RejectCode.MASK, f"the mask input '{name}' is not one number per key")


def _masks(scorer: Scorer, nodes: Iterable[Node]) -> set[str]:
    """Names of the mask inputs among some nodes."""
    inputs = scorer.evaluator.program.user_inputs
    return {n.name for n in nodes if n.name in inputs and inputs[n.name][0] == Role.MASK}


def _behind_mask(scorer: Scorer) -> set[Node]:
    """What the scores are made of, besides activations, and besides what only has its size read."""
    anchor = scorer.anchor
    start = operator_argument(anchor.scores, "attn_mask") if anchor.fused else anchor.softmax.args[0]
    seen: set[Node] = set()
    stack = [start]
    while stack:
        node = stack.pop()
        if isinstance(node, Node) and node not in seen and (anchor.fused or node is not anchor.scores):
            seen.add(node)
            stack.extend(node.all_input_nodes if node.target is not _SIZE else ())
    return seen
