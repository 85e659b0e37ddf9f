"""From scores to weights: every part reads the logits of the part before it.

Text of ONNX operators over the names of :mod:`mla_compile.runtime.onnx_function`, which says what its suffixes are.
Heads lie behind the queries (``BSHT``) in the folded form, and before them (``BHST``) in the unfolded one.
"""

from __future__ import annotations

from mla_compile.runtime.onnx_variant import Variant

__all__ = ["heads_first_weights", "logit_weights"]

_SOFTCAP = """
  bound = Constant <value_float: float = @softcap> ()
  bound_like = CastLike (bound, query_BSHD)
  ratio_BSHT = Div (LOGITS, bound_like)
  within_one_BSHT = Tanh (ratio_BSHT)
  capped_BSHT = Mul (within_one_BSHT, bound_like)
"""

_SLOPES = """
  distance_BS1T = Unsqueeze (distance_BST, two)
  distance_float_BS1T = CastLike (distance_BS1T, slopes_H)
  slopes_H1 = Unsqueeze (slopes_H, one)
  loss_own_BSHT = Mul (distance_float_BS1T, slopes_H1)
  loss_BSHT = CastLike (loss_own_BSHT, query_BSHD)
  sloped_BSHT = Sub (LOGITS, loss_BSHT)
"""

# Added, not chosen by ``Where``: the same numbers, with half the time for all heads' scores.
_MASK = """
  nothing_lost = Constant <value_float = 0.0> ()
  visible = CastLike (nothing_lost, query_BSHD)
  infinity = Constant <value_float = -inf> ()
  hidden = CastLike (infinity, query_BSHD)
  loss_BS1T = Where (seen_BS1T, visible, hidden)
  masked_BSHT = Add (LOGITS, loss_BS1T)
"""

_SOFTMAX = """
  weights_BSHT = Softmax <axis = -1> (LOGITS)
"""

_SOFTMAX_SINKS = """
  sinks_like = CastLike (sinks_H, query_BSHD)
  sinks_H1 = Unsqueeze (sinks_like, one)
  column_shape = Concat <axis = 0> (BS, H, one)
  column_BSH1 = Expand (sinks_H1, column_shape)
  with_sinks = Concat <axis = -1> (LOGITS, column_BSH1)
  weights_with_sinks = Softmax <axis = -1> (with_sinks)
  last_axis = Constant <value_ints = [3]> ()
  weights_BSHT = Slice (weights_with_sinks, zero, T, last_axis)
"""


_HEADS_FIRST = {
    "(distance_BST, two)": "(distance_BST, one)",
    "_BS1T": "_B1ST",
    "_BSHT": "_BHST",
    "(slopes_H, one)": "(slopes_H, behind_heads)",
    "(sinks_like, one)": "(sinks_like, behind_heads)",
    "_H1": "_H11",
    "column_BSH1": "column_BHS1",
    "(BS, H, one)": "(B, H, S, one)",
}
"""What the same text says of logits whose heads come first."""

_BEHIND_HEADS = """
  behind_heads = Constant <value_ints = [1, 2]> ()
"""


def heads_first_weights(variant: Variant) -> str:
    """From ``scores_BHST`` to ``weights_BHST``, with ``seen_B1ST`` (and ``distance_BST`` for slopes)."""
    text = logit_weights(variant)
    for behind, before in _HEADS_FIRST.items():
        text = text.replace(behind, before)
    return _BEHIND_HEADS * (variant.sinks or variant.slopes) + text


def logit_weights(variant: Variant) -> str:
    """From ``scores_BSHT`` to ``weights_BSHT``, with ``seen_BS1T`` (and ``distance_BST`` for slopes)."""
    parts, logits = [], "scores_BSHT"
    for wanted, part, result in (
        (variant.softcap, _SOFTCAP, "capped_BSHT"),
        (variant.slopes, _SLOPES, "sloped_BSHT"),
        (True, _MASK, "masked_BSHT"),
        (True, _SOFTMAX_SINKS if variant.sinks else _SOFTMAX, "weights_BSHT"),
    ):
        if wanted:
            parts.append(part.replace("LOGITS", logits))
            logits = result
    return "".join(parts)
