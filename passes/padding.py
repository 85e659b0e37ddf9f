"""Find the input that hides keys of a layer that is not causal, and check that this is all it does.

A causal layer gets its padding mask from the compiler. Other layers keep the inputs of their model, so what the model's
own mask input does to their keys must be known.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from mla_compile.passes.masks import hides
from mla_compile.passes.mismatch import MismatchError
from mla_compile.passes.scorer import Scorer
from mla_compile.passes.trace import operator_argument
from mla_compile.program import Role
from mla_compile.site import RejectCode

__all__ = ["padding_input"]


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
    names = [n.name for n in _behind_mask(scorer) if n.name in inputs and inputs[n.name][0] == Role.MASK]
    if not names:
        return None
    if len(names) > 1:
        raise MismatchError(RejectCode.MASK, f"several inputs hide keys: {', '.join(sorted(names))}")
    (name,) = names
    value, length = inputs[name][1], scorer.sizes.short
    shape = scorer.sizes.bind(value.shape, 2, length)
    if shape != [2, scorer.sizes.key_length(length)]:
        raise MismatchError(RejectCode.MASK, f"the mask input '{name}' is not one number per key")
    given = torch.ones(shape)
    given[1, 1::2] = 0
    logits = scorer.absolute(length, inputs={name: given.to(value.dtype)})[..., : shape[1]]
    if not torch.equal(hides(logits), (given == 0)[:, None, None].expand(logits.shape)):
        raise MismatchError(RejectCode.MASK, f"the mask input '{name}' does more than hide the keys it marks with 0")
    return name


def _behind_mask(scorer: Scorer) -> set[Node]:
    """What the scores are made of, besides activations."""
    anchor = scorer.anchor
    start = operator_argument(anchor.scores, "attn_mask") if anchor.fused else anchor.softmax.args[0]
    seen: set[Node] = set()
    stack = [start]
    while stack:
        node = stack.pop()
        if isinstance(node, Node) and node not in seen and (anchor.fused or node is not anchor.scores):
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return seen
